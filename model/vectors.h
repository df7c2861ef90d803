/* What the kernels of this folder share: vectors of 16 numbers, loads and stores of float32 and bfloat16, activations.
 *
 * This header's pragma compiles them for AVX-512, so a caller asks features() of processor.c before it calls any.
 * float32 functions contain no bfloat16 instruction; the compiler only has to know of them. `bf16` is a constant wherever these functions are inlined.
 *
 * The kernels use OpenMP, but are linked without an OpenMP library: the symbols come from the one that torch has
 * loaded, so that both share one pool of threads. */

#ifndef BERTD_VECTORS_H
#define BERTD_VECTORS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __x86_64__
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,fma,prefer-vector-width=512")
#include <immintrin.h>
#include <omp.h>

#define INLINE static inline __attribute__((always_inline))

typedef uint32_t __attribute__((may_alias)) word; /* one float, or two bfloat16 neighbours, which VDPBF16PS multiplies */

enum {
    LANES = 16, /* words in a vector, columns in a panel */
    LINE = 64,  /* bytes in a cache line */
};

typedef enum { WORK_OK = 0, BAD_SHAPE = -1, OUT_OF_MEMORY = -2, BAD_INDEX = -3 } status;
typedef enum { NO_ACTIVATION = 0, GELU = 1, RELU = 2 } activation;

INLINE long at_most(long a, long b) { return a < b ? a : b; }
INLINE long blocks_of(long count, long size) { return (count + size - 1) / size; }

/* Sixteen numbers as floats; `index` counts numbers, not bytes. */
INLINE __m512 load_numbers(const void *from, long index, bool bf16)
{
    if (!bf16)
        return _mm512_loadu_ps((const float *)from + index);
    const __m256i halves = _mm256_loadu_si256((const __m256i *)((const uint16_t *)from + index));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

/* Stores sixteen floats, rounded to bfloat16 if bf16. */
INLINE void store_numbers(void *to, long index, __m512 numbers, bool bf16)
{
    if (bf16)
        _mm256_storeu_si256((__m256i *)((uint16_t *)to + index), (__m256i)_mm512_cvtneps_pbh(numbers));
    else
        _mm512_storeu_ps((float *)to + index, numbers);
}

/* sum + a * b in each of 16 columns; of bfloat16 pairs, both products. */
INLINE __m512 multiply_add(__m512i a, __m512i b, __m512 sum, bool bf16)
{
    return bf16 ? _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b) : _mm512_fmadd_ps((__m512)a, (__m512)b, sum);
}

/* GELU of 16 numbers to 4e-7: x Phi(x) = max(x, 0) - |x| Phi(-|x|). The second term is a polynomial of degree 4 on
 * each of 16 intervals, whose middles are 1 / 2.75 apart; it ends as 0 at the last middle, and NaN remains NaN. */
INLINE __m512 gelu(__m512 x)
{
    static const float terms[5][LANES] __attribute__((aligned(LINE))) = {
        { 0.00113963, 0.00083513, 0.00013077, -0.00046050, -0.00063387, -0.00045579, -0.00018070, 0.00000523,
          0.00006816, 0.00005984, 0.00003385, 0.00001458, 0.00000506, 0.00000145, 0.00000035, -0.00026986 },
        { 0.00001298, 0.00417193, 0.00614962, 0.00538021, 0.00304492, 0.00078976, -0.00047522, -0.00078303,
          -0.00060219, -0.00033312, -0.00014572, -0.00005235, -0.00001575, -0.00000401, -0.00000087, -0.00027030 },
        { -0.05275515, -0.04611238, -0.02978502, -0.01178313, 0.00105900, 0.00659530, 0.00673743, 0.00462891,
          0.00247731, 0.00108510, 0.00039806, 0.00012386, 0.00003295, 0.00000753, 0.00000148, -0.00008427 },
        { 0.18181832, 0.08082997, 0.00393479, -0.03722718, -0.04675511, -0.03795844, -0.02399480, -0.01248297,
          -0.00547381, -0.00204846, -0.00065900, -0.00018309, -0.00004407, -0.00000921, -0.00000167, -0.00000874 },
        { 0, 0.13020536, 0.16983961, 0.15017068, 0.10603284, 0.06276032, 0.03177049, 0.01388998,
          0.00527246, 0.00174298, 0.00050275, 0.00012669, 0.00002791, 0.00000538, 0.00000091, 0 },
    };
    const __m512 place = _mm512_range_ps(_mm512_mul_ps(x, _mm512_set1_ps(2.75f)), _mm512_set1_ps(LANES - 1), 10);
    const __m512 to_integer = _mm512_set1_ps(0x1.8p23f), shifted = _mm512_add_ps(place, to_integer);
    const __m512 offset = _mm512_sub_ps(place, _mm512_sub_ps(shifted, to_integer));
    __m512 tail = _mm512_permutexvar_ps((__m512i)shifted, _mm512_load_ps(terms[0]));
#pragma GCC unroll 4
    for (int i = 1; i < 5; i++)
        tail = _mm512_fmadd_ps(tail, offset, _mm512_permutexvar_ps((__m512i)shifted, _mm512_load_ps(terms[i])));
    return _mm512_sub_ps(_mm512_max_ps(_mm512_setzero_ps(), x), tail);
}

INLINE __m512 activate(__m512 x, activation act)
{
    if (act == GELU)
        return gelu(x);
    return act == RELU ? _mm512_max_ps(_mm512_setzero_ps(), x) : x; /* VMAXPS gives the second one if either is NaN */
}
#endif
#endif
