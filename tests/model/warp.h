// A stand-in for a GPU: kernels.cu runs on a processor, each lane of a warp a thread. In place of instructions.cu it has what
// those instructions do (PTX, mma.m16n8k16: which number a lane holds where).
#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

using std::min;

#define __device__ static
#define __global__
#define __launch_bounds__(...)

struct float2 { float x, y; };
struct uint2 { unsigned x, y; };
struct Place { unsigned x, y, z; };
static thread_local Place threadIdx, blockIdx;
static uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static void __trap() { std::abort(); }
static float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
static float power_of_two(float x) { return std::exp2(x); }

template <class To, class From> static To bits(From from) {
    To to;
    static_assert(sizeof to == sizeof from);
    std::memcpy(&to, &from, sizeof to);
    return to;
}
static float __int_as_float(int x) { return bits<float>(x); }
static unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    uint64_t both = (uint64_t)y << 32 | x;
    unsigned result = 0;
    for (int n = 0; n < 4; n++) result |= (unsigned)(both >> (8 * (selector >> (4 * n) & 7)) & 255) << (8 * n);
    return result;
}

#ifdef BFLOAT16
static float widen_one(uint16_t x) { return bits<float>((uint32_t)x << 16); }
static uint16_t narrow_one(float x) { return (bits<uint32_t>(x) + 0x7fff + (bits<uint32_t>(x) >> 16 & 1)) >> 16; }
#else
static float widen_one(uint16_t x) { return (float)bits<_Float16>(x); }
static uint16_t narrow_one(float x) { return bits<uint16_t>((_Float16)x); }
#endif
static float2 widen(unsigned pair) { return {widen_one(pair & 0xffff), widen_one(pair >> 16)}; }
static unsigned narrow(float low, float high) { return narrow_one(low) | (unsigned)narrow_one(high) << 16; }

// What the lanes of one warp tell one another.
struct Warp {
    std::barrier<> turn{32};
    unsigned told[32][6];
};
static thread_local Warp *warp;

static float __shfl_xor_sync(unsigned, float x, int distance) {
    int lane = threadIdx.x % 32;
    warp->told[lane][0] = bits<unsigned>(x);
    warp->turn.arrive_and_wait();
    float other = bits<float>(warp->told[lane ^ distance][0]);
    warp->turn.arrive_and_wait();
    return other;
}

static bool __any_sync(unsigned, bool mine) {
    warp->told[threadIdx.x % 32][0] = mine;
    warp->turn.arrive_and_wait();
    bool any = false;
    for (auto &lane : warp->told) any |= lane[0];
    warp->turn.arrive_and_wait();
    return any;
}

static void multiply(float (&sum)[4], const unsigned (&a)[4], unsigned low, unsigned high) {
    int lane = threadIdx.x % 32;
    unsigned mine[6] = {a[0], a[1], a[2], a[3], low, high};
    std::memcpy(warp->told[lane], mine, sizeof mine);
    warp->turn.arrive_and_wait();
    for (int c = 0; c < 4; c++) {
        int row = lane / 4 + c / 2 * 8, column = lane % 4 * 2 + c % 2;
        for (int k = 0; k < 16; k += 2) {
            float2 left = widen(warp->told[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2]);
            float2 right = widen(warp->told[column * 4 + k % 8 / 2][4 + k / 8]);
            sum[c] += left.x * right.x + left.y * right.y;
        }
    }
    warp->turn.arrive_and_wait();
}

// All blocks of a kernel, one warp after the other.
template <class Kernel> static void launch(int blocks_x, int blocks_y, int threads, Kernel kernel) {
    for (int y = 0; y < blocks_y; y++)
        for (int x = 0; x < blocks_x; x++)
            for (int first = 0; first < threads; first += 32) {
                Warp shared;
                std::vector<std::thread> lanes;
                for (int lane = 0; lane < 32; lane++)
                    lanes.emplace_back([&, lane] {
                        threadIdx = {(unsigned)(first + lane), 0, 0};
                        blockIdx = {(unsigned)x, (unsigned)y, 0};
                        warp = &shared;
                        kernel();
                    });
                for (auto &lane : lanes) lane.join();
            }
}

#include "../../model/kernels.cu"

#define EXPORT(name, ...) \
    extern "C" void launch_##name(int x, int y, int threads, __VA_ARGS__)

EXPORT(add_layer_norm, const Vector *a, const Vector *b, int c, const Vector *d, const Vector *e, Vector *f, int g, float h) {
    launch(x, y, threads, [=] { add_layer_norm(a, b, c, d, e, f, g, h); });
}
EXPORT(embed, const long long *a, const Vector *b, int c, const long long *d, const Vector *e, int f, const long long *g,
       const Vector *h, int i, const Vector *j, const Vector *k, Vector *l, int m, float n) {
    launch(x, y, threads, [=] { embed(a, b, c, d, e, f, g, h, i, j, k, l, m, n); });
}
EXPORT(attend, const unsigned short *a, const unsigned short *b, const unsigned short *c, unsigned short *d, int e, int f, int g,
       const Tile *h, int i, float j) {
    launch(x, y, threads, [=] { attend(a, b, c, d, e, f, g, h, i, j); });
}
