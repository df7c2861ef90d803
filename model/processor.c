/* What this processor can run of the kernels beside this file. The only one that is compiled for the baseline processor. */

enum { FLOAT32_RUNS = 1, BFLOAT16_RUNS = 2, INT8_RUNS = 4, HAS_AMX = 8 };

#if defined(__x86_64__) && LANES == 16
#include <cpuid.h>

enum { STRUCTURED_FEATURES = 7, AMX_BF16 = 1 << 22 };

static int has_amx(void)
{
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid_count(STRUCTURED_FEATURES, 0, &eax, &ebx, &ecx, &edx) && edx & AMX_BF16;
}
#endif

/* A sum of the features above: which kernels run, in float32, between bfloat16 numbers and with int8 weights, and
 * whether the processor has a matrix unit that they do not use. */
int features(void)
{
#if !defined(__x86_64__)
    return 0;
#elif LANES == 8
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? FLOAT32_RUNS + INT8_RUNS : 0;
#else
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
        return 0;
    return FLOAT32_RUNS + (__builtin_cpu_supports("avx512bf16") ? BFLOAT16_RUNS : 0) +
           (__builtin_cpu_supports("avx512vnni") ? INT8_RUNS : 0) + (has_amx() ? HAS_AMX : 0);
#endif
}
