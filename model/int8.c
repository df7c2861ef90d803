/* Linear layers in int8: y = activation(x w^T + bias) with x and y in float32 or bfloat16.
 *
 * The weight is quantised once, symmetrically, with a scale for each output channel. x is quantised at every call,
 * with a scale and a zero point for each row: a byte b stands for (b - zero) * scale, and the 256 bytes span the
 * row's numbers and 0, so that no bit is lost on a lopsided row, such as the outputs of a GELU.
 *
 * AVX-512 VNNI adds four products of bytes to a sum of 32 bits. AVX2 has to add them up in 16 bits first, which hold two words'
 * products only of weights that are small together: there a channel's scale is as large as that takes. The weights then have
 * 7.2 bits on average (all-MiniLM-L6-v2), and vectors are hardly further off, as most of what they are off by comes from x.
 *
 * A row's result depends on this row alone: its sums are integers, hence exact in any order, and the few operations in
 * floating point around them are the same wherever the row lies in the batch and whichever thread computes it. */

#ifdef __x86_64__
#include "vectors.h"

#include <float.h>
#include <math.h>

enum {
    WORD = 4,              /* bytes in a word, of which a panel has LANES side by side */
    STEP = WORD * BYTE_WORDS, /* columns that are multiplied at once */
    PAIR = 2 * LANES,      /* outputs in two adjacent panels */
    MOST_IN = 1 << 16,     /* no sum of as many products of a byte and a weight overflows */
    MOST_SUM = 126,        /* of weights before they are rounded: 255 times their sum does not overflow 16 bits */
    TILE_ROWS = LANES == 16 ? 12 : 4, /* rows whose sums are in registers at once, in two panels */
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
long int8_packed_size(long out, long in) { return out * blocks_of(in, STEP) * STEP; }
long int8_workspace_width(long in) { return row_stride(in) + (long)sizeof(quantisation); }

/* The largest sum, of positive weights or of negative ones, among those whose products add_bytes adds up in 16 bits: the first
 * two, or the last two, of each word in a step. */
static float largest_sum(const float *weight, long in)
{
    float most = 0;
    for (long step = 0; step < in; step += STEP)
        for (long half = step; half < step + WORD; half += 2) {
            float above = 0, below = 0;
            for (long i = half; i < at_most(in, half + STEP); i += i % 2 ? WORD - 1 : 1) {
                above += weight[i] > 0 ? weight[i] : 0;
                below -= weight[i] < 0 ? weight[i] : 0;
            }
            most = above > most ? above : most;
            most = below > most ? below : most;
        }
    return most;
}

/* Quantises weight [out, in] to whole multiples of scales [out] between -127 and 127, and packs them as
 * [out / LANES][in / 4][LANES][4], with zeros after the last column: LANES channels are multiplied by four columns.
 * sums [out] are the channels' sums of the integers, which the product needs for the zero points of x. A weight that
 * is no finite number makes its channel's scale NaN. Returns 0 or a negative status. */
int pack_int8(const float *weight, int8_t *packed, float *scales, int32_t *sums, long out, long in)
{
    if (in <= 0 || in > MOST_IN || out <= 0 || out % LANES)
        return BAD_SHAPE;
    const long depth = blocks_of(in, STEP) * BYTE_WORDS;
    for (long channel = 0; channel < out; channel++) {
        const float *from = weight + channel * in;
        int8_t *to = packed + (channel / LANES * depth * LANES + channel % LANES) * WORD;
        float most = 0, flaw = 0;
        for (long i = 0; i < in; i++) {
            most = fabsf(from[i]) > most ? fabsf(from[i]) : most;
            flaw += from[i] - from[i];
        }
        float scale = most / 127;
        if (BYTE_WORDS > 1) {
            const float least = largest_sum(from, in) / MOST_SUM;
            scale = least > scale ? least : scale;
        }
        scales[channel] = scale + flaw;
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

/* A vector of numbers as floats, or `count` of them and zeros. The branch is cheaper than a mask for every vector. */
INLINE floats load_some(const void *from, long index, long count, bool bf16)
{
    if (count >= LANES)
        return load_numbers(from, index, bf16);
#ifdef HAS_BFLOAT16
    if (bf16)
        return load_first_halves((const uint16_t *)from + index, count);
#endif
    return (floats)load_first_words((const word *)from + index, count);
}

/* Quantises the row of x [in] that begins with number `first`. An infinity or NaN in it makes the scale NaN, and so all
 * outputs; the bytes are then arbitrary. A row of zeros, or so small that 1 / scale would overflow, becomes zeros. */
INLINE void quantise_row(const void *x, long first, long in, uint8_t *bytes, quantisation *result, bool bf16)
{
    floats low = all(0), high = all(0), flaw = all(0);
    for (long i = 0; i < in; i += LANES) {
        const floats numbers = load_some(x, first + i, in - i, bf16);
        low = smaller(low, numbers);
        high = larger(high, numbers);
        flaw += numbers - numbers; /* 0 or NaN */
    }
    const float least = smallest_of(low), most = largest_of(high);
    const float scale = most / 255 - least / 255 + sum_of(flaw);
    const float inverse = scale >= FLT_MIN ? 1 / scale : 0;
    const floats factor = all(inverse);
    const integers zero = rounded(all(-least * inverse));
    *result = (quantisation){ scale, zero[0] };
    for (long i = 0; i < in; i += LANES)
        store_bytes(bytes + i, rounded(load_some(x, first + i, in - i, bf16) * factor) + zero);
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

/* sums [rows, PAIR] = x w^T for `rows` <= TILE_ROWS rows of bytes, `depth` words of each, and two adjacent panels (twice the
 * last one, where it has no neighbour). The sums stay in registers, enough of them to hide the latency of the products. */
INLINE void multiply_rows(const int rows, const uint8_t *x, long stride, const word *left, const word *right, long depth,
                          int32_t *sums)
{
    integers tile[TILE_ROWS][2];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
        tile[r][0] = tile[r][1] = (integers){ 0 };
    for (long i = 0; i < depth; i += BYTE_WORDS) {
        words a[BYTE_WORDS], b[BYTE_WORDS], factor[BYTE_WORDS];
#pragma GCC unroll 2
        for (int w = 0; w < BYTE_WORDS; w++) {
            a[w] = load_words(left + (i + w) * LANES);
            b[w] = load_words(right + (i + w) * LANES);
        }
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
#pragma GCC unroll 2
            for (int w = 0; w < BYTE_WORDS; w++)
                factor[w] = all_words(*(const word *)(x + r * stride + (i + w) * WORD));
            tile[r][0] = add_bytes(factor, a, tile[r][0]);
            tile[r][1] = add_bytes(factor, b, tile[r][1]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
        store_words((word *)sums + r * PAIR, (words)tile[r][0]);
        store_words((word *)sums + r * PAIR + LANES, (words)tile[r][1]);
    }
}

/* multiply_rows with a constant for each number of rows; a function of its own, because its loops need the registers
 * for themselves. */
__attribute__((noinline)) static void multiply_tile(int rows, const uint8_t *x, long stride, const word *left,
                                                    const word *right, long depth, int32_t *sums)
{
    switch (rows) {
#define CASE(n) case n: multiply_rows(n, x, stride, left, right, depth, sums); break;
    CASE(1) CASE(2) CASE(3)
#if LANES == 16
    CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11)
#endif
    default: multiply_rows(TILE_ROWS, x, stride, left, right, depth, sums);
    }
}

/* y = activation((sums - zero * channel sums) * row scale * channel scale + bias) for `rows` rows of the sums of
 * multiply_tile and one or two panels. */
INLINE void finish_tile(const layer *l, long row, int rows, long column, const int32_t *sums)
{
    const activation act = l->act;
    const bool bf16 = l->bf16;
    for (long end = at_most(l->out, column + PAIR); column < end; column += LANES, sums += LANES) {
        const floats scales = load(l->scales + column), bias = load(l->bias + column);
        const integers channel_sums = (integers)load_words((const word *)l->sums + column);
        for (int r = 0; r < rows; r++) {
            const quantisation q = l->quantisations[row + r];
            const integers sum = (integers)load_words((const word *)sums + r * PAIR) - q.zero * channel_sums;
            const floats scaled = __builtin_convertvector(sum, floats) * all(q.scale);
            store_numbers(l->y, (row + r) * l->out + column, activate(fmadd(scaled, scales, bias), act), bf16);
        }
    }
}

/* One task: y for a block of rows and a group of columns. A pair of panels stays in the first-level cache for all
 * rows of the block, whose bytes stay in the second-level one. */
INLINE void multiply_block(const layer *l, long row, long last_row, long column, long last_column)
{
    int32_t sums[TILE_ROWS * PAIR] __attribute__((aligned(LINE)));
    const long depth = blocks_of(l->in, STEP) * BYTE_WORDS;
    for (; column < last_column; column += PAIR) {
        const word *left = (const word *)l->packed + column * depth;
        const word *right = column + LANES < l->out ? left + LANES * depth : left;
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
    const long blocks = blocks_of(l.rows, ROW_BLOCK), pairs = blocks_of(l.out, PAIR);
    const long tasks = TASKS * omp_get_max_threads();
    const long groups = blocks >= tasks ? 1 : at_most(pairs, blocks_of(tasks, blocks));
    const long width = blocks_of(pairs, groups) * PAIR;

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

#ifdef HAS_BFLOAT16
/* The same with x and y in bfloat16. */
int linear_int8_bf16(const uint16_t *x, const int8_t *packed, const float *scales, const int32_t *sums,
                     const float *bias, uint16_t *y, long rows, long in, long out, int activation, void *workspace)
{
    return linear((layer){ .x = x, .packed = packed, .scales = scales, .sums = sums, .bias = bias, .y = y, .rows = rows,
                           .in = in, .out = out, .act = activation, .bf16 = true }, workspace);
}
#endif
#endif
