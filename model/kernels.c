/* CPU kernels of the BERT encoder: embeddings, attention over packed texts, and LayerNorm of a residual sum.
 *
 * Texts of different lengths lie one after another in one matrix, without padding; `cu_q` and `cu_k`
 * (cumulative lengths, texts + 1 of them) say where each begins. Every result depends on its own text
 * only: the order of its floating-point operations is fixed by the text's length and the head's size,
 * never by the rest of the batch or by the number of threads.
 *
 * One code serves float32 and bfloat16, because both products of attention work on 32-bit words: a word
 * is one float, or two bfloat16 neighbours along the summed dimension, which is what VDPBF16PS multiplies. */

#ifdef __x86_64__
#include "vectors.h"

#include <math.h>
#include <stdlib.h>

enum {
    TILE_ROWS = LANES == 16 ? 8 : 6, /* query rows whose sums are in registers at once */
    QUERY_BLOCK = 128,        /* query rows in one task */
    PACKING = 8,              /* copying a key and its value into panels costs about as much as 8 queries of it */
    TASK_WORK = 1 << 17,      /* multiply-adds of either product that a thread takes from the queue at once */
    SERIAL_WORK = 1 << 18,    /* multiply-adds of either product that one thread finishes sooner than several */
    SERIAL_NUMBERS = 1 << 14, /* size of a matrix that one thread normalises sooner than several */
};

/* 2^x for x <= 0, to 1.5e-7 of itself, 1 at 0, 0 at -inf, NaN at NaN. A polynomial takes the fraction of x, and the
 * integer part is added to the exponent. */
INLINE floats exp2_vector(floats x)
{
    const floats part = fraction(x);
    floats power = all(1.867130166e-03f);
    power = fmadd(power, part, all(9.017029777e-03f));
    power = fmadd(power, part, all(5.579991266e-02f));
    power = fmadd(power, part, all(2.401644439e-01f));
    power = fmadd(power, part, all(6.931512952e-01f));
    power = fmadd(power, part, all(1.0f));
    return scale_by_power(power, x);
}

/* Panels of the transposed keys: k [count, depth] with row stride `stride`, in words, becomes
 * [count / LANES][depth][LANES]; the last panel repeats the last key, and exponentiate() ignores the copies. */
static void pack_keys(const word *k, long stride, long count, long depth, word *panels)
{
    for (long key = 0; key < count; key += LANES, panels += LANES * depth)
        for (long column = 0; column < depth; column += LANES) {
            const word *from = k + key * stride + column;
            const long columns = at_most(LANES, depth - column), last = count - 1 - key;
            words block[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++)
                block[i] = load_first_words(from + at_most(i, last) * stride, columns);
            transpose(block);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++)
                if (i < columns)
                    store_words(panels + (column + i) * LANES, block[i]);
        }
}

/* Panels of the values: v [count, head_size] becomes [head_size / LANES][depth][LANES] words, where depth is the
 * number of keys or, in bfloat16, of pairs of keys; a last key without a partner is paired with zeros. */
INLINE void pack_values(const word *v, long stride, long count, long head_size, word *panels, bool bf16)
{
    const long depth = bf16 ? blocks_of(count, 2) : count;
    for (long row = 0; row < depth; row++)
        for (long column = 0; column < head_size; column += LANES) {
            words values;
#ifdef HAS_BFLOAT16
            if (bf16) {
                const word *from = v + 2 * row * stride + column / 2;
                values = load_pairs(from, from + stride, 2 * row + 1 < count);
            } else
#endif
                values = load_words(v + row * stride + column);
            store_words(panels + column * depth + row * LANES, values);
        }
}

/* c = a b for `rows` <= TILE_ROWS rows of a and `width` = 1 or 2 adjacent panels of b. The sums stay in registers, enough of
 * them to hide the latency of a multiply-add. Strides in words; c is float32. */
INLINE void multiply_tile(const int rows, const int width, const word *a, long a_stride, const word *b, long depth,
                          float *c, long c_stride, bool bf16)
{
    floats sums[TILE_ROWS][2];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
        sums[r][0] = sums[r][1] = all(0);
    for (long i = 0; i < depth; i++) {
        const words left = load_words(b + i * LANES);
        const words right = width == 2 ? load_words(b + (depth + i) * LANES) : left;
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            const words factor = all_words(a[r * a_stride + i]);
            sums[r][0] = multiply_add(factor, left, sums[r][0], bf16);
            if (width == 2)
                sums[r][1] = multiply_add(factor, right, sums[r][1], bf16);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
        store(c + r * c_stride, sums[r][0]);
        if (width == 2)
            store(c + r * c_stride + LANES, sums[r][1]);
    }
}

/* c = a b with all panels of b. */
INLINE void multiply_panels(const int rows, const word *a, long a_stride, const word *b, long depth, long panels,
                            float *c, long c_stride, bool bf16)
{
    for (; panels >= 2; panels -= 2, b += 2 * LANES * depth, c += 2 * LANES)
        multiply_tile(rows, 2, a, a_stride, b, depth, c, c_stride, bf16);
    if (panels)
        multiply_tile(rows, 1, a, a_stride, b, depth, c, c_stride, bf16);
}

/* multiply_panels with a constant for each number of rows. */
INLINE void multiply(int rows, const word *a, long a_stride, const word *b, long depth, long panels,
                     float *c, long c_stride, bool bf16)
{
    switch (rows) {
    case 1: multiply_panels(1, a, a_stride, b, depth, panels, c, c_stride, bf16); break;
    case 2: multiply_panels(2, a, a_stride, b, depth, panels, c, c_stride, bf16); break;
    case 3: multiply_panels(3, a, a_stride, b, depth, panels, c, c_stride, bf16); break;
    case 4: multiply_panels(4, a, a_stride, b, depth, panels, c, c_stride, bf16); break;
    case 5: multiply_panels(5, a, a_stride, b, depth, panels, c, c_stride, bf16); break;
#if LANES == 16
    case 6: multiply_panels(6, a, a_stride, b, depth, panels, c, c_stride, bf16); break;
    case 7: multiply_panels(7, a, a_stride, b, depth, panels, c, c_stride, bf16); break;
#endif
    default: multiply_panels(TILE_ROWS, a, a_stride, b, depth, panels, c, c_stride, bf16);
    }
}

/* Functions of their own, not parts of attend_block(), because their loops need the registers for themselves. */
__attribute__((noinline)) static void multiply_f32(int rows, const word *a, long a_stride, const word *b, long depth,
                                                   long panels, float *c, long c_stride)
{
    multiply(rows, a, a_stride, b, depth, panels, c, c_stride, false);
}

__attribute__((noinline)) static void multiply_bf16(int rows, const word *a, long a_stride, const word *b, long depth,
                                                    long panels, float *c, long c_stride)
{
    multiply(rows, a, a_stride, b, depth, panels, c, c_stride, true);
}

/* Turns a row of scores into the numerators of the softmax of scale * scores, in place - as bfloat16 in the first
 * half of the row if bf16 - with zeros after the last key up to a whole vector. Returns 1 / their sum. */
INLINE float exponentiate(float *scores, long keys, float scale, bool bf16)
{
    const long padded = blocks_of(keys, LANES) * LANES;
    const floats nothing = all(-INFINITY), to_log2 = all(scale * (float)M_LOG2E);
    float *last = scores + padded - LANES;
    store(last, load_first(last, LANES - (padded - keys), nothing));

    floats most = nothing, sum = all(0);
    for (long i = 0; i < padded; i += LANES)
        most = larger(most, load(scores + i));
    most = all(largest_of(most));
    for (long i = 0; i < padded; i += LANES) {
        const floats power = exp2_vector((load(scores + i) - most) * to_log2);
        sum += power;
        store_numbers(scores, i, power, bf16);
    }
    return 1.0f / sum_of(sum);
}

/* One task: the queries of a block, the keys of their text, in one head. Pointers to the first, strides in words. */
typedef struct {
    const word *q, *k, *v;
    word *out;
    long queries, keys, head_size, q_stride, kv_stride, out_stride;
} task;

/* How many words of scratch attend_block() needs: the panels of k and of v, scores and results of a tile. */
INLINE long scratch_words(long keys, long head_size, long head_words)
{
    return blocks_of(keys, LANES) * LANES * (2 * head_words + TILE_ROWS) + TILE_ROWS * head_size;
}

/* The next head's words follow this head's in every row, and are the next task's: starts loading them into the
 * second-level cache, for no hardware prefetcher foresees such short pieces of rows. */
INLINE void prefetch_next_head(const word *head, long stride, long rows, long head_words)
{
    for (long row = 0; row < rows; row++)
        for (long i = 0; i < head_words; i += LINE / sizeof(word))
            _mm_prefetch((const char *)(head + row * stride + head_words + i), _MM_HINT_T1);
}

/* One task: out = softmax(q k^T / sqrt(head_size)) v, a tile of queries at a time. All scores of a tile are kept, so
 * that the softmax is a plain one. */
INLINE void attend_block(const task t, word *scratch, bool bf16)
{
    const long panels = blocks_of(t.keys, LANES), padded = panels * LANES;
    const long head_words = bf16 ? t.head_size / 2 : t.head_size, key_words = bf16 ? blocks_of(t.keys, 2) : t.keys;
    word *k_panels = scratch, *v_panels = k_panels + padded * head_words;
    float *scores = (float *)(v_panels + padded * head_words), *mixed = scores + TILE_ROWS * padded;
    pack_keys(t.k, t.kv_stride, t.keys, head_words, k_panels);
    pack_values(t.v, t.kv_stride, t.keys, t.head_size, v_panels, bf16);
    prefetch_next_head(t.q, t.q_stride, t.queries, head_words);
    prefetch_next_head(t.k, t.kv_stride, t.keys, head_words);
    prefetch_next_head(t.v, t.kv_stride, t.keys, head_words);

    const float scale = (float)(1 / sqrt(t.head_size));
    for (long done = 0, rows; done < t.queries; done += rows) {
        const long left = t.queries - done;
        rows = blocks_of(left, blocks_of(left, TILE_ROWS)); /* tiles of nearly equal height */
        (bf16 ? multiply_bf16 : multiply_f32)(rows, t.q + done * t.q_stride, t.q_stride, k_panels, head_words, panels,
                                              scores, padded);
        float inverse_sums[TILE_ROWS];
        for (long r = 0; r < rows; r++)
            inverse_sums[r] = exponentiate(scores + r * padded, t.keys, scale, bf16);
        (bf16 ? multiply_bf16 : multiply_f32)(rows, (word *)scores, padded, v_panels, key_words, t.head_size / LANES,
                                              mixed, t.head_size);
        for (long r = 0; r < rows; r++)
            for (long i = 0; i < t.head_size; i += LANES)
                store_numbers(t.out + (done + r) * t.out_stride, i, load(mixed + r * t.head_size + i) * all(inverse_sums[r]), bf16);
    }
}

/* Shares the (text, block of queries, head) tasks out among threads; see attend_f32 for the arguments. */
static status attend(const word *q, const word *k, const word *v, word *out, long q_stride, long kv_stride,
                     long out_stride, const int32_t *cu_q, const int32_t *cu_k, long texts, long heads,
                     long head_size, bool bf16)
{
    const long numbers = bf16 ? 2 : 1; /* in a word */
    if (head_size <= 0 || head_size % LANES || q_stride % numbers || kv_stride % numbers || out_stride % numbers)
        return BAD_SHAPE;
    q_stride /= numbers, kv_stride /= numbers, out_stride /= numbers;
    const long head_words = head_size / numbers;

    long most_queries = 0, most_keys = 0, work = 0;
    for (long t = 0; t < texts; t++) {
        const long queries = cu_q[t + 1] - cu_q[t], keys = cu_k[t + 1] - cu_k[t];
        most_queries = queries > most_queries ? queries : most_queries;
        most_keys = keys > most_keys ? keys : most_keys;
        work += (queries + PACKING) * keys * heads * head_size;
    }
    const long blocks = blocks_of(most_queries, QUERY_BLOCK);
    const long task_work = (at_most(most_queries, QUERY_BLOCK) + PACKING) * most_keys * head_size;
    const long chunk = 1 + TASK_WORK / (1 + task_work);
    const long scratch_size = scratch_words(most_keys, head_size, head_words) * sizeof(word);
    status result = WORK_OK;

#pragma omp parallel if (work > SERIAL_WORK)
    {
        word *scratch = aligned_alloc(sizeof(floats), scratch_size);
        if (!scratch)
            result = OUT_OF_MEMORY;
#pragma omp for collapse(3) schedule(dynamic, chunk)
        for (long t = 0; t < texts; t++)
            for (long block = 0; block < blocks; block++)
                for (long h = 0; h < heads; h++) {
                    const long first = cu_q[t] + block * QUERY_BLOCK;
                    const long queries = at_most(cu_q[t + 1] - first, QUERY_BLOCK), keys = cu_k[t + 1] - cu_k[t];
                    if (queries <= 0 || keys <= 0 || !scratch)
                        continue;
                    const task one = {
                        .q = q + first * q_stride + h * head_words,
                        .k = k + cu_k[t] * kv_stride + h * head_words,
                        .v = v + cu_k[t] * kv_stride + h * head_words,
                        .out = out + first * out_stride + h * head_words,
                        .queries = queries, .keys = keys, .head_size = head_size,
                        .q_stride = q_stride, .kv_stride = kv_stride, .out_stride = out_stride,
                    };
                    if (bf16)
                        attend_block(one, scratch, true);
                    else
                        attend_block(one, scratch, false);
                }
        free(scratch);
    }
    return result;
}

/* Attention of every text over itself, for all heads: out = softmax(q k^T / sqrt(head_size)) v.
 * q [cu_q[texts], heads * head_size], k and v [cu_k[texts], heads * head_size], out like q, with row strides in
 * numbers; text t has query rows cu_q[t]..cu_q[t + 1] and key rows cu_k[t]..cu_k[t + 1]. head_size is a multiple
 * of LANES. out must not overlap the rest. Returns 0 or a negative status. */
int attend_f32(const void *q, const void *k, const void *v, void *out, long q_stride, long kv_stride, long out_stride,
               const int32_t *cu_q, const int32_t *cu_k, long texts, long heads, long head_size)
{
    return attend(q, k, v, out, q_stride, kv_stride, out_stride, cu_q, cu_k, texts, heads, head_size, false);
}

#ifdef HAS_BFLOAT16
/* The same in bfloat16, with scores, softmax and sums in float32. */
int attend_bf16(const void *q, const void *k, const void *v, void *out, long q_stride, long kv_stride, long out_stride,
                const int32_t *cu_q, const int32_t *cu_k, long texts, long heads, long head_size)
{
    return attend(q, k, v, out, q_stride, kv_stride, out_stride, cu_q, cu_k, texts, heads, head_size, true);
}
#endif

/* A vector of a + b + c, where b and c may be NULL. */
INLINE floats load_sum(const void *a, const void *b, const void *c, long index, bool bf16)
{
    floats sum = load_numbers(a, index, bf16);
    if (b)
        sum += load_numbers(b, index, bf16);
    if (c)
        sum += load_numbers(c, index, bf16);
    return sum;
}

/* out [hidden] = LayerNorm(a + b + c) * weight + bias, with the biased variance. The sum is formed anew in each of
 * the three passes, from the first-level cache, so that it is never rounded and out may be one of the inputs. */
INLINE void normalise_row(const void *a, const void *b, const void *c, const void *weight, const void *bias,
                          void *out, long hidden, float eps, bool bf16)
{
    floats sum = all(0), squares = all(0);
    for (long i = 0; i < hidden; i += LANES)
        sum += load_sum(a, b, c, i, bf16);
    const floats mean = all(sum_of(sum) / hidden);
    for (long i = 0; i < hidden; i += LANES) {
        const floats centred = load_sum(a, b, c, i, bf16) - mean;
        squares = fmadd(centred, centred, squares);
    }
    const floats scale = all(1.0f / sqrtf(sum_of(squares) / hidden + eps));
    for (long i = 0; i < hidden; i += LANES) {
        const floats normal = (load_sum(a, b, c, i, bf16) - mean) * scale;
        store_numbers(out, i, fmadd(normal, load_numbers(weight, i, bf16), load_numbers(bias, i, bf16)), bf16);
    }
}

/* out = LayerNorm(x + residual): contiguous [rows, hidden] matrices, residual may be NULL, out may be x or residual;
 * weight and bias [hidden]; hidden is a multiple of LANES. Returns 0 or a negative status. */
int add_layer_norm_f32(const float *x, const float *residual, const float *weight, const float *bias, float *out,
                       long rows, long hidden, float eps)
{
    if (hidden <= 0 || hidden % LANES)
        return BAD_SHAPE;
#pragma omp parallel for schedule(static) if (rows * hidden > SERIAL_NUMBERS)
    for (long r = 0; r < rows; r++)
        normalise_row(x + r * hidden, residual ? residual + r * hidden : NULL, NULL, weight, bias, out + r * hidden,
                      hidden, eps, false);
    return WORK_OK;
}

#ifdef HAS_BFLOAT16
/* The same in bfloat16, with the sum and the statistics in float32. */
int add_layer_norm_bf16(const uint16_t *x, const uint16_t *residual, const uint16_t *weight, const uint16_t *bias,
                        uint16_t *out, long rows, long hidden, float eps)
{
    if (hidden <= 0 || hidden % LANES)
        return BAD_SHAPE;
#pragma omp parallel for schedule(static) if (rows * hidden > SERIAL_NUMBERS)
    for (long r = 0; r < rows; r++)
        normalise_row(x + r * hidden, residual ? residual + r * hidden : NULL, NULL, weight, bias, out + r * hidden,
                      hidden, eps, true);
    return WORK_OK;
}
#endif

/* Three tables of `hidden` columns, with so many rows each. */
typedef struct {
    const void *table[3];
    long count[3];
} tables;

/* indices [3][rows]: the row of each table that a token has. */
INLINE int embed(tables from, const int64_t *const indices[3], const void *weight, const void *bias, void *out, long rows,
                 long hidden, float eps, bool bf16)
{
    if (hidden <= 0 || hidden % LANES)
        return BAD_SHAPE;
    for (int t = 0; t < 3; t++)
        for (long r = 0; r < rows; r++)
            if (indices[t][r] < 0 || indices[t][r] >= from.count[t])
                return BAD_INDEX;
    const long bytes = hidden * (bf16 ? sizeof(uint16_t) : sizeof(float));
#pragma omp parallel for schedule(static) if (rows * hidden > SERIAL_NUMBERS)
    for (long r = 0; r < rows; r++) {
        const char *row[3];
        for (int t = 0; t < 3; t++)
            row[t] = (const char *)from.table[t] + indices[t][r] * bytes;
        normalise_row(row[0], row[1], row[2], weight, bias, (char *)out + r * bytes, hidden, eps, bf16);
    }
    return WORK_OK;
}

/* out [rows, hidden] = LayerNorm(words[ids] + segments[types] + positions[places]), from tables of so many rows as follow
 * them and `hidden` columns; hidden is a multiple of LANES. Returns 0 or a negative status: BAD_INDEX where there is no such row. */
int embed_f32(const float *words, long word_count, const float *segments, long segment_count, const float *positions,
              long position_count, const int64_t *ids, const int64_t *types, const int64_t *places, const float *weight,
              const float *bias, float *out, long rows, long hidden, float eps)
{
    return embed((tables){ { words, segments, positions }, { word_count, segment_count, position_count } },
                 (const int64_t *const[3]){ ids, types, places }, weight, bias, out, rows, hidden, eps, false);
}

#ifdef HAS_BFLOAT16
/* The same in bfloat16, with the sum and the statistics in float32. */
int embed_bf16(const uint16_t *words, long word_count, const uint16_t *segments, long segment_count,
               const uint16_t *positions, long position_count, const int64_t *ids, const int64_t *types,
               const int64_t *places, const uint16_t *weight, const uint16_t *bias, uint16_t *out, long rows, long hidden,
               float eps)
{
    return embed((tables){ { words, segments, positions }, { word_count, segment_count, position_count } },
                 (const int64_t *const[3]){ ids, types, places }, weight, bias, out, rows, hidden, eps, true);
}
#endif
#endif
