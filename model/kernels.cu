// What lies between the products of an encoder on a GPU, each in one pass over memory. compiled_cuda.py compiles it at start
// for the device and the checkpoint that are there, and defines
//   HIDDEN     numbers in a row, a multiple of 8
//   HEAD       numbers of a head, D, a multiple of 32
//   BFLOAT16   where the numbers are bfloat16; else they are float16
//   QUERIES    of a tile of attention, at most, a multiple of 16
//   WARPS      of a block of attention; BLOCKS of it that a multiprocessor is to have at once; ROWS of a block of the others
// Sums are float32.

// Embeddings and LayerNorm: a warp has a row, and each lane eight numbers of it at a time.

#define VECTORS (HIDDEN / 8)
#define PER_LANE ((VECTORS + 31) / 32)

struct alignas(16) Vector {
    unsigned pair[4];
};

__device__ float over_lanes(float sum) {
    for (int distance = 16; distance; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    return sum;
}

// A lane's part of a row: vectors lane, lane + 32, …
struct Part {
    float number[PER_LANE][8];
};

__device__ void add(Part &part, const Vector *row, int lane, bool first) {
#pragma unroll
    for (int n = 0; n < PER_LANE; n++) {
        if (lane + 32 * n >= VECTORS) continue;
        Vector vector = row[lane + 32 * n];
#pragma unroll
        for (int p = 0; p < 4; p++) {
            float2 wide = widen(vector.pair[p]);
            part.number[n][2 * p] = wide.x + (first ? 0.0f : part.number[n][2 * p]);
            part.number[n][2 * p + 1] = wide.y + (first ? 0.0f : part.number[n][2 * p + 1]);
        }
    }
}

__device__ void layer_norm(Part &part, const Vector *weight, const Vector *bias, Vector *out, int lane, float eps) {
    float sum = 0.0f, squares = 0.0f;
#pragma unroll
    for (int n = 0; n < PER_LANE; n++)
        if (lane + 32 * n < VECTORS)
            for (int i = 0; i < 8; i++) sum += part.number[n][i];
    float mean = over_lanes(sum) / HIDDEN;
#pragma unroll
    for (int n = 0; n < PER_LANE; n++)
        if (lane + 32 * n < VECTORS)
            for (int i = 0; i < 8; i++) {
                float distance = part.number[n][i] -= mean;
                squares += distance * distance;
            }
    float scale = rsqrtf(over_lanes(squares) / HIDDEN + eps);
#pragma unroll
    for (int n = 0; n < PER_LANE; n++) {
        if (lane + 32 * n >= VECTORS) continue;
        Vector w = weight[lane + 32 * n], b = bias[lane + 32 * n], normed;
#pragma unroll
        for (int p = 0; p < 4; p++) {
            float2 by = widen(w.pair[p]), plus = widen(b.pair[p]);
            normed.pair[p] = narrow(part.number[n][2 * p] * scale * by.x + plus.x, part.number[n][2 * p + 1] * scale * by.y + plus.y);
        }
        out[lane + 32 * n] = normed;
    }
}

// LayerNorm of x + residual, all [rows, HIDDEN]. A row of the residual is `step` vectors after the one before: with 0 all are one.
extern "C" __global__ void __launch_bounds__(32 * ROWS)
    add_layer_norm(const Vector *x, const Vector *residual, int step, const Vector *weight, const Vector *bias, Vector *out, int rows,
                   float eps) {
    int row = blockIdx.x * ROWS + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    Part part;
    add(part, x + (size_t)row * VECTORS, lane, true);
    add(part, residual + (size_t)row * step, lane, false);
    layer_norm(part, weight, bias, out + (size_t)row * VECTORS, lane, eps);
}

// LayerNorm of token + segment + position; each of these, [rows], is the number of a row of its table.
extern "C" __global__ void __launch_bounds__(32 * ROWS)
    embed(const long long *token, const Vector *tokens, int token_rows, const long long *segment, const Vector *segments,
          int segment_rows, const long long *position, const Vector *positions, int position_rows, const Vector *weight,
          const Vector *bias, Vector *out, int rows, float eps) {
    int row = blockIdx.x * ROWS + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    long long t = token[row], s = segment[row], p = position[row];
    if (t < 0 || t >= token_rows || s < 0 || s >= segment_rows || p < 0 || p >= position_rows) __trap();
    Part part;
    add(part, tokens + t * VECTORS, lane, true);
    add(part, segments + s * VECTORS, lane, false);
    add(part, positions + p * VECTORS, lane, false);
    layer_norm(part, weight, bias, out + (size_t)row * VECTORS, lane, eps);
}

// ---------------------------------------------------------------------------------------------------------------------
// Attention: softmax(Q Kᵀ / √D) V of one head for the queries of a tile, which are neighbouring rows of one text. A warp has
// a tile, passes once over the keys of its text with a running maximum and sum (FlashAttention-2, arXiv 2307.08691,
// algorithm 1), and shares nothing with another: what it gives for a query is bit-equal in any batch.
//
// Products are mma.m16n8k16: sixteen queries by eight keys or columns. Which number a lane holds where is fixed by the
// instruction, but a sum doesn't mind in which order its terms come, nor a row the order of its columns: so each lane takes
// eight neighbouring numbers of a row at a time, straight from global memory, and rows are never rearranged in between.
// With i = lane / 4 and j = lane % 4:
//   queries and keys   rows i and i + 8, columns 32 h + 8 j to 32 h + 8 j + 7: the lane's terms of products 2 h and 2 h + 1
//   values             rows 2 j, 2 j + 1, 2 j + 8, 2 j + 9, columns W i to W i + W - 1, W = D / 8: one for each product
//   output             rows i and i + 8, columns 2 W j to 2 W j + 2 W - 1

#define SIXTEENS (HEAD / 16)
#define WIDTH (HEAD / 8)
#define FRAGMENTS (QUERIES / 16)
#define NEGATIVE_INFINITY __int_as_float(0xff800000)

struct Tile {
    int first, queries;    // rows of q and out
    int keys, end;         // rows of k and v, the end is one past the last
};

// Sum or maximum over the four lanes that hold a row.
__device__ float row_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

__device__ float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// The eight numbers of a row from column 32 h + 8 j on, for every h.
__device__ void load_terms(Vector (&terms)[HEAD / 32], const unsigned short *row, int j) {
#pragma unroll
    for (int h = 0; h < HEAD / 32; h++) terms[h] = *(const Vector *)(row + 32 * h + 8 * j);
}

// The WIDTH numbers of a row from column WIDTH i on, as pairs.
__device__ void load_columns(unsigned (&pairs)[WIDTH / 2], const unsigned short *row, int i) {
    const unsigned short *from = row + WIDTH * i;
#if WIDTH % 8 == 0
#pragma unroll
    for (int n = 0; n < WIDTH / 8; n++) {
        Vector vector = ((const Vector *)from)[n];
#pragma unroll
        for (int p = 0; p < 4; p++) pairs[4 * n + p] = vector.pair[p];
    }
#else
#pragma unroll
    for (int n = 0; n < WIDTH / 4; n++) {
        uint2 two = ((const uint2 *)from)[n];
        pairs[2 * n] = two.x;
        pairs[2 * n + 1] = two.y;
    }
#endif
}

// What a warp has of its tile: queries, and for each of them the largest score so far, in powers of two, and by it the sums of
// weights and of weighted values.
struct State {
    unsigned queries[FRAGMENTS][SIXTEENS][4];
    float largest[FRAGMENTS][2], total[FRAGMENTS][2], sums[FRAGMENTS][WIDTH][4];
};

// Pass over so many sixteens of keys from row `start` on; where MASKED, what comes at `end` or later has no weight.
template <int GROUPS, bool MASKED>
__device__ void pass(State &state, const unsigned short *k, const unsigned short *v, int stride, int start, int end, float scale, int i, int j) {
    unsigned values[GROUPS][4][WIDTH / 2];
    float scores[FRAGMENTS][2 * GROUPS][4];
#pragma unroll
    for (int g = 0; g < GROUPS; g++)
#pragma unroll
        for (int n = 0; n < 4; n++) {
            int row = start + 16 * g + 2 * j + n % 2 + n / 2 * 8;
            load_columns(values[g][n], v + (size_t)(MASKED ? min(row, end - 1) : row) * stride, i);
        }
#pragma unroll
    for (int eight = 0; eight < 2 * GROUPS; eight++) {
        Vector terms[HEAD / 32];
        int row = start + 8 * eight + i;
        load_terms(terms, k + (size_t)(MASKED ? min(row, end - 1) : row) * stride, j);
#pragma unroll
        for (int f = 0; f < FRAGMENTS; f++) {
#pragma unroll
            for (int c = 0; c < 4; c++) scores[f][eight][c] = 0.0f;
#pragma unroll
            for (int s = 0; s < SIXTEENS; s++)
                multiply(scores[f][eight], state.queries[f][s], terms[s / 2].pair[s % 2 * 2], terms[s / 2].pair[s % 2 * 2 + 1]);
            if (MASKED)
#pragma unroll
                for (int c = 0; c < 4; c++)
                    if (start + 8 * eight + 2 * j + c % 2 >= end) scores[f][eight][c] = NEGATIVE_INFINITY;
        }
    }
#pragma unroll
    for (int f = 0; f < FRAGMENTS; f++) {
        unsigned weights[GROUPS][4];
        float shrink[2];
#pragma unroll
        for (int side = 0; side < 2; side++) {
            float most = NEGATIVE_INFINITY, weight = 0.0f, before = state.largest[f][side];
#pragma unroll
            for (int eight = 0; eight < 2 * GROUPS; eight++)
                most = fmaxf(most, fmaxf(scores[f][eight][2 * side], scores[f][eight][2 * side + 1]));
            float now = state.largest[f][side] = fmaxf(before, row_max(most) * scale);
            shrink[side] = power_of_two(before - now);
#pragma unroll
            for (int eight = 0; eight < 2 * GROUPS; eight++) {
                float a = power_of_two(scores[f][eight][2 * side] * scale - now);
                float b = power_of_two(scores[f][eight][2 * side + 1] * scale - now);
                weight += a + b;
                weights[eight / 2][side + eight % 2 * 2] = narrow(a, b);
            }
            state.total[f][side] = state.total[f][side] * shrink[side] + weight;
        }
        if (__any_sync(0xffffffffu, shrink[0] != 1.0f || shrink[1] != 1.0f)) // seldom, after the first keys
#pragma unroll
            for (int w = 0; w < WIDTH; w++)
#pragma unroll
                for (int c = 0; c < 4; c++) state.sums[f][w][c] *= shrink[c / 2];
#pragma unroll
        for (int g = 0; g < GROUPS; g++)
#pragma unroll
            for (int w = 0; w < WIDTH; w++) {
                unsigned halves = w % 2 ? 0x7632 : 0x5410;
                multiply(state.sums[f][w], weights[g], __byte_perm(values[g][0][w / 2], values[g][1][w / 2], halves),
                         __byte_perm(values[g][2][w / 2], values[g][3][w / 2], halves));
            }
    }
}

// q, k, v and out point to the first row; a row is so many numbers after the one before. `scale` is log2(e) / √D.
extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)
    attend(const unsigned short *q, const unsigned short *k, const unsigned short *v, unsigned short *out, int q_stride, int k_stride,
           int out_stride, const Tile *tiles, int tile_count, float scale) {
    int number = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32, i = lane / 4, j = lane % 4;
    if (number >= tile_count) return;
    Tile tile = tiles[number];
    if (tile.queries == 0) return;
    q += blockIdx.y * HEAD, k += blockIdx.y * HEAD, v += blockIdx.y * HEAD, out += blockIdx.y * HEAD;

    State state;
#pragma unroll
    for (int f = 0; f < FRAGMENTS; f++) {
#pragma unroll
        for (int side = 0; side < 2; side++) {
            Vector terms[HEAD / 32];
            int row = min(16 * f + 8 * side + i, tile.queries - 1); // rows that are too many compute what nobody reads
            load_terms(terms, q + (size_t)(tile.first + row) * q_stride, j);
#pragma unroll
            for (int s = 0; s < SIXTEENS; s++) {
                state.queries[f][s][side] = terms[s / 2].pair[s % 2 * 2];
                state.queries[f][s][side + 2] = terms[s / 2].pair[s % 2 * 2 + 1];
            }
            state.largest[f][side] = NEGATIVE_INFINITY;
            state.total[f][side] = 0.0f;
        }
#pragma unroll
        for (int w = 0; w < WIDTH; w++)
#pragma unroll
            for (int c = 0; c < 4; c++) state.sums[f][w][c] = 0.0f;
    }

    int start = tile.keys;
    for (; start + 32 <= tile.end; start += 32) pass<2, false>(state, k, v, k_stride, start, tile.end, scale, i, j);
    if (start + 16 < tile.end)
        pass<2, true>(state, k, v, k_stride, start, tile.end, scale, i, j);
    else if (start < tile.end)
        pass<1, true>(state, k, v, k_stride, start, tile.end, scale, i, j);

#pragma unroll
    for (int f = 0; f < FRAGMENTS; f++)
#pragma unroll
        for (int side = 0; side < 2; side++) {
            float share = 1.0f / row_sum(state.total[f][side]);
            int row = 16 * f + 8 * side + i;
            if (row >= tile.queries) continue;
            uint2 *to = (uint2 *)(out + (size_t)(tile.first + row) * out_stride + 2 * WIDTH * j);
#pragma unroll
            for (int half = 0; half < 2; half++)
#pragma unroll
                for (int w = 0; w < WIDTH; w += 4) {
                    float(*four)[4] = &state.sums[f][w];
                    int c = 2 * side + half;
                    to[(WIDTH * half + w) / 4] =
                        make_uint2(narrow(four[0][c] * share, four[1][c] * share), narrow(four[2][c] * share, four[3][c] * share));
                }
        }
}
