/* What the kernels of this folder share: vectors, loads and stores of float32 and bfloat16, activations.
 *
 * They are compiled twice: with LANES, the words in a vector and columns in a panel, as 16 for AVX-512, and as 8 for AVX2. A caller
 * asks features() of processor.c before it calls any. `bf16` is a constant wherever these functions are inlined, and false where
 * there is no bfloat16.
 *
 * The kernels use OpenMP, but are linked without an OpenMP library: the symbols come from the one that torch has
 * loaded, so that both share one pool of threads. */

#ifndef BERTD_VECTORS_H
#define BERTD_VECTORS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __x86_64__
#include <omp.h>

#define INLINE static inline __attribute__((always_inline))

typedef uint32_t __attribute__((may_alias)) word; /* one float, or two bfloat16 neighbours, which VDPBF16PS multiplies */

enum { LINE = 64 }; /* bytes in a cache line */

typedef enum { WORK_OK = 0, BAD_SHAPE = -1, OUT_OF_MEMORY = -2, BAD_INDEX = -3 } status;
typedef enum { NO_ACTIVATION = 0, GELU = 1, RELU = 2 } activation;

INLINE long at_most(long a, long b) { return a < b ? a : b; }
INLINE long blocks_of(long count, long size) { return (count + size - 1) / size; }

#if LANES == 16
#include "avx512.h"
#else
#include "avx2.h"
#endif

/* A vector of numbers as floats; `index` counts numbers, not bytes. */
INLINE floats load_numbers(const void *from, long index, bool bf16)
{
#ifdef HAS_BFLOAT16
    if (bf16)
        return load_halves((const uint16_t *)from + index);
#endif
    return load((const float *)from + index);
}

/* Stores a vector of floats, rounded to bfloat16 if bf16. */
INLINE void store_numbers(void *to, long index, floats numbers, bool bf16)
{
#ifdef HAS_BFLOAT16
    if (bf16)
        store_halves((uint16_t *)to + index, numbers);
    else
#endif
        store((float *)to + index, numbers);
}

/* sum + a * b in each column; of bfloat16 pairs, both products. */
INLINE floats multiply_add(words a, words b, floats sum, bool bf16)
{
#ifdef HAS_BFLOAT16
    if (bf16)
        return multiply_add_pairs(a, b, sum);
#endif
    return fmadd((floats)a, (floats)b, sum);
}

enum { INTERVALS = 16 };

/* GELU to 4e-7: x Phi(x) = max(x, 0) - |x| Phi(-|x|). The second term is a polynomial of degree 4 on
 * each of 16 intervals, whose middles are 1 / 2.75 apart; it ends as 0 at the last middle, and NaN remains NaN. */
INLINE floats gelu(floats x)
{
    static const float terms[5][INTERVALS] __attribute__((aligned(LINE))) = {
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
    const floats place = limited(x * all(2.75f), INTERVALS - 1), to_integer = all(0x1.8p23f), shifted = place + to_integer;
    const floats offset = place - (shifted - to_integer);
    floats tail = look_up(terms[0], (words)shifted);
#pragma GCC unroll 4
    for (int i = 1; i < 5; i++)
        tail = fmadd(tail, offset, look_up(terms[i], (words)shifted));
    return larger(all(0), x) - tail;
}

INLINE floats activate(floats x, activation act)
{
    if (act == GELU)
        return gelu(x);
    return act == RELU ? larger(all(0), x) : x; /* which keeps NaN */
}
#endif
#endif
