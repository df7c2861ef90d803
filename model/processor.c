/* What this processor can run. The only file that is compiled for the baseline processor. */

enum { FLOAT32_RUNS = 1, BFLOAT16_RUNS = 2, INT8_RUNS = 4, HAS_AMX = 8 };

#ifdef __x86_64__
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
#ifdef __x86_64__
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
        return 0;
    return FLOAT32_RUNS + (__builtin_cpu_supports("avx512bf16") ? BFLOAT16_RUNS : 0) +
           (__builtin_cpu_supports("avx512vnni") ? INT8_RUNS : 0) + (has_amx() ? HAS_AMX : 0);
#else
    return 0;
#endif
}
