/* Linear layers in int8: y = activation(x w^T + bias) with x and y in float32 or bfloat16.
 *
 * The weight is quantised once, symmetrically, with a scale for each output channel. x is quantised at every call,
 * with a scale and a zero point for each row: a byte b stands for (b - zero) * scale, and the 256 bytes span the
 * row's numbers and 0, so that no bit is lost on a lopsided row, such as the outputs of a GELU.
 *
 * A row's result depends on this row alone: its sums are integers, hence exact in any order, and the few operations in
 * floating point around them are the same wherever the row lies in the batch and whichever thread computes it. */

#ifdef __x86_64__
#include "vectors.h"

#include <float.h>
#include <math.h>

enum {
    WORD = 4,              /* bytes in a word, of which a panel has 16 side by side */
    MOST_IN = 1 << 16,     /* no sum of as many products of a byte and a weight overflows */
    TILE_ROWS = 12,        /* rows whose sums are in registers at once, in two panels */
    ROW_BLOCK = 96,        /* rows in one task */
    TASKS = 4,             /* tasks for each thread, lest one wait long for another */
    SERIAL_WORK = 1 << 19, /* multiply-adds that one thread finishes sooner than several */
};

/* How a row of x is quantised: a byte b stands for (b - zero) * scale. */
typedef struct {
    float scale;
    int32_t zero;
} quantisation;

/* One call: the arguments, the workspace's parts - `bytes` [rows, stride], the quantised x, and its `quantisations`
 * [rows] - and whether x and y are bfloat16. */
typedef struct {
    const void *x;
    const int8_t *packed;
    const float *scales;
    const int32_t *sums;
    const float *bias;
    void *y;
    long rows, in, out, stride;
    uint8_t *bytes;
    quantisation *quantisations;
    activation act;
    bool bf16;
} layer;

/* Bytes between quantised rows: whole lines, and one more lest the rows of a tile fall on the same few cache sets. */
INLINE long row_stride(long in) { return blocks_of(in, LINE) * LINE + LINE; }

/* Sizes in bytes of a packed weight [out, in], and of each row of the workspace of a call with x [rows, in]. */
long int8_packed_size(long out, long in) { return out * blocks_of(in, WORD) * WORD; }
long int8_workspace_width(long in) { return row_stride(in) + (long)sizeof(quantisation); }

/* Quantises weight [out, in] to whole multiples of scales [out] between -127 and 127, and packs them as
 * [out / 16][in / 4][16][4], with zeros after the last column: VPDPBUSD multiplies 16 channels by four columns.
 * sums [out] are the channels' sums of the integers, which the product needs for the zero points of x. A weight that
 * is no finite number makes its channel's scale NaN. Returns 0 or a negative status. */
int pack_int8(const float *weight, int8_t *packed, float *scales, int32_t *sums, long out, long in)
{
    if (in <= 0 || in > MOST_IN || out <= 0 || out % LANES)
        return BAD_SHAPE;
    const long depth = blocks_of(in, WORD);
    for (long channel = 0; channel < out; channel++) {
        const float *from = weight + channel * in;
        int8_t *to = packed + (channel / LANES * depth * LANES + channel % LANES) * WORD;
        float most = 0, flaw = 0;
        for (long i = 0; i < in; i++) {
            most = fabsf(from[i]) > most ? fabsf(from[i]) : most;
            flaw += from[i] - from[i];
        }
        scales[channel] = most / 127 + flaw;
        sums[channel] = 0;
        for (long i = 0; i < depth * WORD; i++) {
            const bool present = i < in && scales[channel] >= FLT_MIN;
            const int number = present ? (int)rintf(from[i] / scales[channel]) : 0;
            to[i / WORD * LANES * WORD + i % WORD] = number;
            sums[channel] += number;
        }
    }
    return WORK_OK;
}

/* Sixteen numbers as floats, or `count` of them and zeros. The branch is cheaper than a mask for every vector. */
INLINE __m512 load_some(const void *from, long index, long count, bool bf16)
{
    if (count >= LANES)
        return load_numbers(from, index, bf16);
    const __mmask16 present = (1u << count) - 1;
    if (!bf16)
        return _mm512_maskz_loadu_ps(present, (const float *)from + index);
    const __m256i halves = _mm256_maskz_loadu_epi16(present, (const uint16_t *)from + index);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

/* Quantises the row of x [in] that begins with number `first`. An infinity or NaN in it makes the scale NaN, and so all
 * outputs; the bytes are then arbitrary. A row of zeros, or so small that 1 / scale would overflow, becomes zeros. */
INLINE void quantise_row(const void *x, long first, long in, uint8_t *bytes, quantisation *result, bool bf16)
{
    __m512 low = _mm512_setzero_ps(), high = low, flaw = low;
    for (long i = 0; i < in; i += LANES) {
        const __m512 numbers = load_some(x, first + i, in - i, bf16);
        low = _mm512_min_ps(low, numbers);
        high = _mm512_max_ps(high, numbers);
        flaw = _mm512_or_ps(flaw, _mm512_sub_ps(numbers, numbers)); /* 0 or NaN */
    }
    const float least = _mm512_reduce_min_ps(low), most = _mm512_reduce_max_ps(high);
    const float scale = most / 255 - least / 255 + _mm512_reduce_add_ps(flaw);
    const float inverse = scale >= FLT_MIN ? 1 / scale : 0;
    const __m512 factor = _mm512_set1_ps(inverse);
    const __m512i zero = _mm512_cvtps_epi32(_mm512_set1_ps(-least * inverse));
    *result = (quantisation){ scale, _mm512_cvtsi512_si32(zero) };
    for (long i = 0; i < in; i += LANES) {
        const __m512 numbers = load_some(x, first + i, in - i, bf16);
        const __m512i steps = _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(numbers, factor)), zero);
        _mm_storeu_si128((__m128i *)(bytes + i), _mm512_cvtusepi32_epi8(steps));
    }
}

/* Quantises rows `row` to last_row - 1 of x [rows, in], with a constant for the type of its numbers. */
static void quantise_rows(const layer *l, long row, long last_row)
{
    for (; row < last_row; row++)
        if (l->bf16)
            quantise_row(l->x, row * l->in, l->in, l->bytes + row * l->stride, l->quantisations + row, true);
        else
            quantise_row(l->x, row * l->in, l->in, l->bytes + row * l->stride, l->quantisations + row, false);
}

/* sums [rows, 32] = x w^T for `rows` <= TILE_ROWS rows of bytes and two adjacent panels (twice the last one, where it
 * has no neighbour). The sums stay in registers, enough of them to hide the latency of VPDPBUSD. */
INLINE void multiply_rows(const int rows, const uint8_t *x, long stride, const int8_t *left, const int8_t *right,
                          long depth, int32_t *sums)
{
    __m512i tile[TILE_ROWS][2];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
        tile[r][0] = tile[r][1] = _mm512_setzero_si512();
    for (long i = 0; i < depth; i++) {
        const __m512i a = _mm512_loadu_si512(left + i * LINE), b = _mm512_loadu_si512(right + i * LINE);
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            const __m512i factor = _mm512_set1_epi32(*(const word *)(x + r * stride + i * WORD));
            tile[r][0] = _mm512_dpbusd_epi32(tile[r][0], factor, a);
            tile[r][1] = _mm512_dpbusd_epi32(tile[r][1], factor, b);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
        _mm512_storeu_si512(sums + r * 2 * LANES, tile[r][0]);
        _mm512_storeu_si512(sums + r * 2 * LANES + LANES, tile[r][1]);
    }
}

/* multiply_rows with a constant for each number of rows; a function of its own, because its loops need the registers
 * for themselves. */
__attribute__((noinline)) static void multiply_tile(int rows, const uint8_t *x, long stride, const int8_t *left,
                                                    const int8_t *right, long depth, int32_t *sums)
{
    switch (rows) {
#define CASE(n) case n: multiply_rows(n, x, stride, left, right, depth, sums); break;
    CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11)
    default: multiply_rows(TILE_ROWS, x, stride, left, right, depth, sums);
    }
}

/* y = activation((sums - zero * channel sums) * row scale * channel scale + bias) for `rows` rows of the sums of
 * multiply_tile and 16 or 32 columns. */
INLINE void finish_tile(const layer *l, long row, int rows, long column, const int32_t *sums)
{
    const activation act = l->act;
    const bool bf16 = l->bf16;
    for (long end = at_most(l->out, column + 2 * LANES); column < end; column += LANES, sums += LANES) {
        const __m512 scales = _mm512_loadu_ps(l->scales + column), bias = _mm512_loadu_ps(l->bias + column);
        const __m512i channel_sums = _mm512_loadu_si512(l->sums + column);
        for (int r = 0; r < rows; r++) {
            const quantisation q = l->quantisations[row + r];
            const __m512i zeros = _mm512_mullo_epi32(_mm512_set1_epi32(q.zero), channel_sums);
            const __m512i sum = _mm512_sub_epi32(_mm512_loadu_si512(sums + r * 2 * LANES), zeros);
            const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(q.scale));
            const __m512 y = activate(_mm512_fmadd_ps(scaled, scales, bias), act);
            store_numbers(l->y, (row + r) * l->out + column, y, bf16);
        }
    }
}

/* One task: y for a block of rows and a group of columns. A pair of panels stays in the first-level cache for all
 * rows of the block, whose bytes stay in the second-level one. */
INLINE void multiply_block(const layer *l, long row, long last_row, long column, long last_column)
{
    int32_t sums[TILE_ROWS * 2 * LANES] __attribute__((aligned(LINE)));
    const long depth = blocks_of(l->in, WORD), panel = depth * LINE;
    for (; column < last_column; column += 2 * LANES) {
        const int8_t *left = l->packed + column / LANES * panel;
        const int8_t *right = column + LANES < l->out ? left + panel : left;
        for (long r = row, rows; r < last_row; r += rows) {
            rows = blocks_of(last_row - r, blocks_of(last_row - r, TILE_ROWS)); /* tiles of nearly equal height */
            multiply_tile(rows, l->bytes + r * l->stride, l->stride, left, right, depth, sums);
            finish_tile(l, r, rows, column, sums);
        }
    }
}

/* Shares the work out among threads. If there are blocks of rows for all, a thread quantises a block just before it
 * multiplies it, with all columns; otherwise all rows are quantised first, and the columns are shared out, too. */
static status linear(layer l, void *workspace)
{
    if (l.rows < 0 || l.in <= 0 || l.in > MOST_IN || l.out <= 0 || l.out % LANES || l.act > RELU)
        return BAD_SHAPE;
    if (l.rows == 0)
        return WORK_OK;
    l.stride = row_stride(l.in);
    l.bytes = workspace;
    l.quantisations = (quantisation *)(l.bytes + l.rows * l.stride);
    const long blocks = blocks_of(l.rows, ROW_BLOCK), pairs = blocks_of(l.out, 2 * LANES);
    const long tasks = TASKS * omp_get_max_threads();
    const long groups = blocks >= tasks ? 1 : at_most(pairs, blocks_of(tasks, blocks));
    const long width = blocks_of(pairs, groups) * 2 * LANES;

#pragma omp parallel if (l.rows * l.in * l.out > SERIAL_WORK)
    {
        if (groups > 1)
#pragma omp for schedule(static)
            for (long r = 0; r < l.rows; r++)
                quantise_rows(&l, r, r + 1);
#pragma omp for collapse(2) schedule(dynamic)
        for (long block = 0; block < blocks; block++)
            for (long group = 0; group < groups; group++) {
                const long row = block * ROW_BLOCK, last_row = at_most(l.rows, row + ROW_BLOCK);
                if (groups == 1)
                    quantise_rows(&l, row, last_row);
                multiply_block(&l, row, last_row, group * width, at_most(l.out, (group + 1) * width));
            }
    }
    return WORK_OK;
}

/* y [rows, out] = activation(x [rows, in] w^T + bias [out]), with the results of pack_int8 for w [out, in]; all are
 * contiguous. activation: 0 none, 1 GELU (the one with erf), 2 ReLU. workspace: int8_workspace_width(in) bytes a row, of
 * any content, best on a cache line, of this call's own. Returns 0 or a negative status. */
int linear_int8_f32(const float *x, const int8_t *packed, const float *scales, const int32_t *sums, const float *bias,
                    float *y, long rows, long in, long out, int activation, void *workspace)
{
    return linear((layer){ .x = x, .packed = packed, .scales = scales, .sums = sums, .bias = bias, .y = y, .rows = rows,
                           .in = in, .out = out, .act = activation, .bf16 = false }, workspace);
}

/* The same with x and y in bfloat16. */
int linear_int8_bf16(const uint16_t *x, const int8_t *packed, const float *scales, const int32_t *sums,
                     const float *bias, uint16_t *y, long rows, long in, long out, int activation, void *workspace)
{
    return linear((layer){ .x = x, .packed = packed, .scales = scales, .sums = sums, .bias = bias, .y = y, .rows = rows,
                           .in = in, .out = out, .act = activation, .bf16 = true }, workspace);
}
#endif
