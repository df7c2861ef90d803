/* Vectors of 8 numbers: the operations of avx512.h, with the instructions of AVX2 and FMA, in float32 only. */

#pragma GCC target("avx2,fma")
#include <immintrin.h>

typedef __m256 floats;
typedef __m256i words;
typedef int32_t integers __attribute__((vector_size(LANES * 4), may_alias));

INLINE floats load(const float *from) { return _mm256_loadu_ps(from); }
INLINE void store(float *to, floats x) { _mm256_storeu_ps(to, x); }
INLINE words load_words(const word *from) { return _mm256_loadu_si256((const words *)from); }
INLINE void store_words(word *to, words x) { _mm256_storeu_si256((words *)to, x); }

INLINE floats all(float x) { return _mm256_set1_ps(x); }
INLINE words all_words(word x) { return _mm256_set1_epi32(x); }

/* All bits of the first `count` words. */
INLINE words first_lanes(long count)
{
    return _mm256_cmpgt_epi32(all_words(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

INLINE floats load_first(const float *from, long count, floats others)
{
    return _mm256_blendv_ps(others, load(from), (floats)first_lanes(count));
}
INLINE words load_first_words(const word *from, long count)
{
    return _mm256_maskload_epi32((const int *)from, first_lanes(count));
}

INLINE floats fmadd(floats a, floats b, floats c) { return _mm256_fmadd_ps(a, b, c); }
INLINE floats larger(floats a, floats b) { return _mm256_max_ps(a, b); }
INLINE floats smaller(floats a, floats b) { return _mm256_min_ps(a, b); }

INLINE float sum_of(floats x)
{
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

INLINE float largest_of(floats x)
{
    __m128 most = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    most = _mm_max_ps(most, _mm_movehl_ps(most, most));
    return _mm_cvtss_f32(_mm_max_ss(most, _mm_movehdup_ps(most)));
}

INLINE float smallest_of(floats x) { return -largest_of(-x); }

INLINE floats limited(floats x, float limit) { return _mm256_min_ps(all(limit), _mm256_andnot_ps(all(-0.0f), x)); }

INLINE floats fraction(floats x) { return x - _mm256_floor_ps(x); }

/* y 2^floor(x) for y from 1 to 2: floor(x) is added to its exponent; 0 below the normal numbers. */
INLINE floats scale_by_power(floats y, floats x)
{
    const words power = _mm256_slli_epi32(_mm256_cvtps_epi32(_mm256_floor_ps(x)), 23);
    const floats scaled = (floats)_mm256_add_epi32((words)y, power);
    return _mm256_and_ps(scaled, _mm256_cmp_ps(x, all(-126), _CMP_NLT_UQ)); /* where NaN stays */
}

INLINE floats look_up(const float *table, words index)
{
    const floats low = _mm256_permutevar8x32_ps(load(table), index), high = _mm256_permutevar8x32_ps(load(table + 8), index);
    return _mm256_blendv_ps(low, high, (floats)_mm256_slli_epi32(index, 28)); /* by the fourth bit */
}

INLINE integers rounded(floats x) { return (integers)_mm256_cvtps_epi32(x); }
INLINE void store_bytes(uint8_t *to, integers x)
{
    const __m128i low = _mm256_castsi256_si128((words)x), high = _mm256_extracti128_si256((words)x, 1);
    const __m128i halves = _mm_packus_epi32(low, high);
    _mm_storel_epi64((__m128i *)to, _mm_packus_epi16(halves, halves));
}

/* Of two words at once: their products are added in 16 bits, those of the first two columns of both words and those of the last
 * two, and then in 32. The first sums must not overflow; those of two products alone would saturate. */
enum { BYTE_WORDS = 2 };
INLINE integers add_bytes(const words a[BYTE_WORDS], const words b[BYTE_WORDS], integers sum)
{
    const words halves = _mm256_add_epi16(_mm256_maddubs_epi16(a[0], b[0]), _mm256_maddubs_epi16(a[1], b[1]));
    return sum + (integers)_mm256_madd_epi16(halves, _mm256_set1_epi16(1));
}

/* Transposes 8 x 8 words in registers: words, pairs and halves swap across. */
INLINE void transpose(words rows[LANES])
{
    words pairs[LANES], fours[LANES];
#pragma GCC unroll 4
    for (int i = 0; i < LANES; i += 2) {
        pairs[i] = _mm256_unpacklo_epi32(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm256_unpackhi_epi32(rows[i], rows[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < LANES / 2; i++) {
        const words upper = pairs[i / 2 * 4 + i % 2], lower = pairs[i / 2 * 4 + i % 2 + 2];
        fours[i / 2 * 4 + i % 2 * 2] = _mm256_unpacklo_epi64(upper, lower);
        fours[i / 2 * 4 + i % 2 * 2 + 1] = _mm256_unpackhi_epi64(upper, lower);
    }
#pragma GCC unroll 4
    for (int i = 0; i < LANES / 2; i++) {
        rows[i] = _mm256_permute2x128_si256(fours[i], fours[i + 4], 0x20);
        rows[i + 4] = _mm256_permute2x128_si256(fours[i], fours[i + 4], 0x31);
    }
}
