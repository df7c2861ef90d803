/* Linear layers in float32 and bfloat16: y = activation(x w^T + bias).
 *
 * The weight [out, in] is laid out beforehand as panels [out / LANES][depth][LANES] of words, where depth is the words
 * in a row: one word of each of LANES outputs side by side. Sums are in float32.
 *
 * A row's result depends on this row alone: its products are summed in one order, wherever the row lies in the batch and
 * whichever thread computes it. */

#ifdef __x86_64__
#include "vectors.h"

enum {
#if LANES == 16
    TILE_ROWS = 14,        /* rows whose sums are in registers at once, in two panels */
    ROW_BLOCK = 98,        /* rows in one task: whole tiles */
    AHEAD = 64,            /* vectors of a panel between the one that is multiplied and the one that is called for */
#else
    TILE_ROWS = 6,
    ROW_BLOCK = 96,
    AHEAD = 0,             /* none is: that only takes time */
#endif
    PAIR = 2 * LANES,      /* outputs in two adjacent panels */
    DEPTH_BLOCK = 384,     /* words summed at a stretch: rounding errors grow with their number */
    TASKS = 16,            /* tasks for each thread, lest one wait long for another */
    SERIAL_WORK = 1 << 17, /* multiply-adds that one thread finishes sooner than several */
};

/* One call: x [rows, depth] and panels in words, y [rows, out] in numbers of x's type. */
typedef struct {
    const word *x, *panels;
    const float *bias;
    void *y;
    long rows, depth, out;
    activation act;
} layer;

/* Where the rows of a tile begin: row r at from[r / 3] + r % 3 * stride. A pointer for each row takes more registers than
 * there are, and so does what the compiler makes of one for all: a distance from it for each row. */
INLINE void find_rows(const int rows, const word *tile, long stride, const word *from[])
{
#pragma GCC unroll 8
    for (int r = 0; r < rows; r += 3) {
        from[r / 3] = tile + r * stride;
        __asm__("" : "+r"(from[r / 3])); /* hides how they are related */
    }
}

/* sums [rows, PAIR] += x w^T for `rows` <= TILE_ROWS rows, `depth` words of each, and two adjacent panels (twice the last
 * one, where it has no neighbour). The new sums stay in registers, enough of them to hide the latency of the products. */
INLINE void multiply_rows(const int rows, const word *x, long stride, const word *left, const word *right, long depth,
                          float *sums, bool bf16)
{
    floats tile[TILE_ROWS][2];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
        tile[r][0] = tile[r][1] = all(0);
    const word *from[(TILE_ROWS + 2) / 3];
    find_rows(rows, x, stride, from);
    for (long i = 0; i < depth; i++) {
        const words a = load_words(left + i * LANES), b = load_words(right + i * LANES);
        if (AHEAD) {
            __builtin_prefetch(left + (i + AHEAD) * LANES);
            __builtin_prefetch(right + (i + AHEAD) * LANES);
        }
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            const words factor = all_words(from[r / 3][r % 3 * stride + i]);
            tile[r][0] = multiply_add(a, factor, tile[r][0], bf16);
            tile[r][1] = multiply_add(b, factor, tile[r][1], bf16);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
        float *to = sums + r * PAIR;
        store(to, load(to) + tile[r][0]);
        store(to + LANES, load(to + LANES) + tile[r][1]);
    }
}

/* multiply_rows with a constant for each number of rows and each type; functions of their own, because their loops need
 * the registers for themselves. */
#if LANES == 16
#define MORE_CASES CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12) CASE(13)
#else
#define MORE_CASES
#endif
#define CASE(n) case n: multiply_rows(n, x, stride, left, right, depth, sums, BF16); break;
#define MULTIPLY_TILE(name)                                                                                        \
    __attribute__((noinline)) static void name(int rows, const word *x, long stride, const word *left,             \
                                               const word *right, long depth, float *sums)                         \
    {                                                                                                              \
        switch (rows) {                                                                                            \
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) MORE_CASES                                                     \
        default: multiply_rows(TILE_ROWS, x, stride, left, right, depth, sums, BF16);                              \
        }                                                                                                          \
    }
#define BF16 false
MULTIPLY_TILE(multiply_tile_f32)
#undef BF16
#define BF16 true
MULTIPLY_TILE(multiply_tile_bf16)

/* Calls for the lines of y that a tile will be written to, so that they are there when it is. */
INLINE void prefetch_tile(const layer *l, long row, long rows, long column, bool bf16)
{
    const long size = bf16 ? sizeof(uint16_t) : sizeof(float), bytes = at_most(PAIR, l->out - column) * size;
    for (long r = row; r < row + rows; r++)
        for (long byte = 0; byte < bytes; byte += LINE)
            __builtin_prefetch((const char *)l->y + (r * l->out + column) * size + byte, 1);
}

/* The sums of a tile before its first product: the bias. */
INLINE void start_tile(const layer *l, long rows, long column, float *sums)
{
    for (long c = column, end = at_most(l->out, column + PAIR); c < end; c += LANES, sums += LANES) {
        const floats bias = load(l->bias + c);
        for (long r = 0; r < rows; r++)
            store(sums + r * PAIR, bias);
    }
}

/* y = activation(sums) for `rows` rows of the sums of a tile and one or two panels. */
INLINE void finish_tile(const layer *l, long row, long rows, long column, const float *sums, bool bf16)
{
    for (long end = at_most(l->out, column + PAIR); column < end; column += LANES, sums += LANES)
        for (long r = 0; r < rows; r++)
            store_numbers(l->y, (row + r) * l->out + column, activate(load(sums + r * PAIR), l->act), bf16);
}

/* One task: y for a block of rows, which stay in the second-level cache, and a group of columns. */
INLINE void multiply_block(const layer *l, long row, long last_row, long column, long last_column, bool bf16)
{
    float sums[TILE_ROWS * PAIR] __attribute__((aligned(LINE))) = { 0 };
    for (; column < last_column; column += PAIR) {
        const word *left = l->panels + column * l->depth;
        const word *right = column + LANES < l->out ? left + LANES * l->depth : left;
        for (long r = row, rows; r < last_row; r += rows) {
            rows = blocks_of(last_row - r, blocks_of(last_row - r, TILE_ROWS)); /* tiles of nearly equal height */
            prefetch_tile(l, r, rows, column, bf16);
            start_tile(l, rows, column, sums);
            for (long i = 0; i < l->depth; i += DEPTH_BLOCK)
                (bf16 ? multiply_tile_bf16 : multiply_tile_f32)(rows, l->x + r * l->depth + i, l->depth, left + i * LANES,
                                                                right + i * LANES, at_most(DEPTH_BLOCK, l->depth - i),
                                                                sums);
            finish_tile(l, r, rows, column, sums, bf16);
        }
    }
}

/* Shares blocks of rows out among threads and, where there are few of them, groups of columns too. */
static status linear(layer l, bool bf16)
{
    if (l.rows < 0 || l.depth <= 0 || l.out <= 0 || l.out % LANES || l.act > RELU)
        return BAD_SHAPE;
    const long blocks = blocks_of(l.rows, ROW_BLOCK), pairs = blocks_of(l.out, PAIR);
    const long tasks = TASKS * omp_get_max_threads();
    const long groups = blocks ? at_most(pairs, blocks_of(tasks, blocks)) : 1;
    const long width = blocks_of(pairs, groups) * PAIR;

#pragma omp parallel for collapse(2) schedule(dynamic) if (l.rows * l.depth * l.out > SERIAL_WORK)
    for (long block = 0; block < blocks; block++)
        for (long group = 0; group < groups; group++) {
            const long row = block * ROW_BLOCK, last_row = at_most(l.rows, row + ROW_BLOCK);
            const long column = group * width, last_column = at_most(l.out, column + width);
            if (bf16)
                multiply_block(&l, row, last_row, column, last_column, true);
            else
                multiply_block(&l, row, last_row, column, last_column, false);
        }
    return WORK_OK;
}

/* y [rows, out] = activation(x [rows, in] w^T + bias [out]), all contiguous; out is a multiple of LANES. activation: 0 none,
 * 1 GELU (the one with erf), 2 ReLU. Returns 0 or a negative status. */
int linear_f32(const void *x, const void *panels, const float *bias, void *y, long rows, long in, long out, int activation)
{
    return linear((layer){ x, panels, bias, y, rows, in, out, activation }, false);
}

#ifdef HAS_BFLOAT16
/* The same with x, w and y in bfloat16; in is even. */
int linear_bf16(const void *x, const void *panels, const float *bias, void *y, long rows, long in, long out, int activation)
{
    if (in % 2)
        return BAD_SHAPE;
    return linear((layer){ x, panels, bias, y, rows, in / 2, out, activation }, true);
}
#endif
#endif
