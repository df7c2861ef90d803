/* Vectors of 16 numbers: the operations of vectors.h, with the instructions of AVX-512.
 *
 * float32 functions contain no bfloat16 instruction; the compiler only has to know of them. */

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,fma,prefer-vector-width=512")
#include <immintrin.h>

#define HAS_BFLOAT16

typedef __m512 floats;
typedef __m512i words;
typedef int32_t integers __attribute__((vector_size(LANES * 4), may_alias));

INLINE floats load(const float *from) { return _mm512_loadu_ps(from); }
INLINE void store(float *to, floats x) { _mm512_storeu_ps(to, x); }
INLINE words load_words(const word *from) { return _mm512_loadu_si512(from); }
INLINE void store_words(word *to, words x) { _mm512_storeu_si512(to, x); }

INLINE floats all(float x) { return _mm512_set1_ps(x); }
INLINE words all_words(word x) { return _mm512_set1_epi32(x); }

/* The first `count` numbers, then those of `others`; the first `count` words, then zeros. */
INLINE floats load_first(const float *from, long count, floats others)
{
    return _mm512_mask_loadu_ps(others, 0xffff >> (LANES - count), from);
}
INLINE words load_first_words(const word *from, long count) { return _mm512_maskz_loadu_epi32((1u << count) - 1, from); }

INLINE floats fmadd(floats a, floats b, floats c) { return _mm512_fmadd_ps(a, b, c); }
INLINE float sum_of(floats x) { return _mm512_reduce_add_ps(x); }
INLINE float largest_of(floats x) { return _mm512_reduce_max_ps(x); }

INLINE float smallest_of(floats x) { return _mm512_reduce_min_ps(x); }

/* The larger or smaller one; b, where either is NaN. */
INLINE floats larger(floats a, floats b) { return _mm512_max_ps(a, b); }
INLINE floats smaller(floats a, floats b) { return _mm512_min_ps(a, b); }

/* |x| or, where that is less, a limit that is not negative; NaN remains NaN. */
INLINE floats limited(floats x, float limit) { return _mm512_range_ps(x, all(limit), 10); }

/* x - floor(x), and y 2^floor(x): 0 where x is -inf, whatever the fraction is. */
INLINE floats fraction(floats x) { return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
INLINE floats scale_by_power(floats y, floats x) { return _mm512_scalef_ps(y, x); }

/* Of 16 numbers, which begin at a cache line, those that the lowest four bits of each index name. */
INLINE floats look_up(const float *table, words index) { return _mm512_permutexvar_ps(index, _mm512_load_ps(table)); }

/* The nearest integers, and integers as bytes: 0 or 255 for what lies beyond. */
INLINE integers rounded(floats x) { return (integers)_mm512_cvtps_epi32(x); }
INLINE void store_bytes(uint8_t *to, integers x) { _mm_storeu_si128((__m128i *)to, _mm512_cvtusepi32_epi8((words)x)); }

/* sum + the products of the four bytes in each word of a, unsigned, and of b, signed. */
enum { BYTE_WORDS = 1 };
INLINE integers add_bytes(const words a[BYTE_WORDS], const words b[BYTE_WORDS], integers sum)
{
    return (integers)_mm512_dpbusd_epi32((words)sum, *a, *b);
}

/* Transposes 16 x 16 words in registers: at each step, 2 x 2 blocks of `half` words swap across. */
INLINE void transpose(words rows[LANES])
{
    const words lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
#pragma GCC unroll 4
    for (int half = 1; half < LANES; half *= 2) {
        const words bit = all_words(half), other = all_words(LANES);
        const __mmask16 upper = _mm512_test_epi32_mask(lane, bit);
        const words low = _mm512_mask_add_epi32(lane, upper, lane, _mm512_sub_epi32(other, bit));
        const words high = _mm512_add_epi32(low, bit);
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            if (!(i & half)) {
                words first = rows[i], second = rows[i + half];
                rows[i] = _mm512_permutex2var_epi32(first, low, second);
                rows[i + half] = _mm512_permutex2var_epi32(first, high, second);
            }
    }
}

/* Sixteen bfloat16 numbers as floats, the first `count` and zeros, and floats rounded to bfloat16. */
INLINE floats load_halves(const uint16_t *from)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16));
}
INLINE floats load_first_halves(const uint16_t *from, long count)
{
    const __m256i halves = _mm256_maskz_loadu_epi16((1u << count) - 1, from);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
INLINE void store_halves(uint16_t *to, floats x) { _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(x)); }

/* sum + both products of the bfloat16 pairs in a and b. */
INLINE floats multiply_add_pairs(words a, words b, floats sum) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

/* Pairs of a bfloat16 number of one row and the one below it, or zero, where there is no row below. */
INLINE words load_pairs(const word *row, const word *below, bool is_below)
{
    const __m256i even = _mm256_loadu_si256((const __m256i *)row);
    const __m256i odd = _mm256_maskz_loadu_epi32(is_below ? 0xff : 0, below);
    return _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}
