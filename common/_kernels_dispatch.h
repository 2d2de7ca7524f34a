/* Every kernel in every instruction set that this compiler can make, and the table to choose from at run time. */

#ifndef REFLEET_KERNELS_DISPATCH_H
#define REFLEET_KERNELS_DISPATCH_H

#include "_kernels_core.h"

#define LEVEL SCALAR
#define LNAME(x) x##_scalar
#include "_kernels_level.h"
#undef LNAME
#undef LEVEL

#if REFLEET_X86
#define AVX2_TARGET "avx2,bmi,bmi2,lzcnt,popcnt"
#define AVX512_TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx512vpopcntdq,avx512vbmi2,avx2,bmi,bmi2,lzcnt,popcnt"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target(AVX2_TARGET))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,bmi,bmi2,lzcnt,popcnt")
#endif
#define LEVEL AVX2
#define LNAME(x) x##_avx2
#include "_kernels_level.h"
#undef LNAME
#undef LEVEL
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target(AVX512_TARGET))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vpopcntdq,avx512vbmi2,avx2,bmi,bmi2,lzcnt,popcnt")
#endif
#define LEVEL AVX512
#define LNAME(x) x##_avx512
#include "_kernels_level.h"
#undef LNAME
#undef LEVEL
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

typedef struct {
    const char *name;
    int (*extract)(const uint8_t *, const uint8_t *, size_t, unsigned, const uint8_t *, unsigned, changes *);
    int (*apply)(uint8_t *, const uint8_t *, size_t, unsigned, const uint8_t *, unsigned, const size_t *,
                 const size_t *, const uint32_t *, const uint8_t *);
    void (*sample)(const uint8_t *, const uint8_t *, size_t, size_t, size_t, unsigned, uint32_t *, uint32_t *);
    void (*to_planes)(const uint8_t *, const uint8_t *, uint8_t *, size_t, unsigned, unsigned);
    void (*from_planes)(const uint8_t *const *, const uint8_t *, uint8_t *, size_t, unsigned, unsigned);
    void (*leaves)(const uint8_t *, size_t, uint8_t *);
} kernels;

#define KERNELS(suffix)                                                                                             \
    { "c-" #suffix, extract_##suffix, apply_##suffix, sample_##suffix, to_planes_##suffix, from_planes_##suffix,       \
      leaves_##suffix }

static const kernels KERNELS_OF[] = {
    KERNELS(scalar),
#if REFLEET_X86
    KERNELS(avx2), KERNELS(avx512),
#endif
};

/* Whether this machine runs KERNELS_OF[level]. */
static int level_runs(unsigned level) {
    if (level >= sizeof KERNELS_OF / sizeof *KERNELS_OF) return 0;
#if REFLEET_X86
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
               __builtin_cpu_supports("popcnt");
    if (level == AVX2) return avx2;
    if (level == AVX512)
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("avx512vbmi2");
#endif
    return 1;
}

/* Checks and applies the streams of all classes. */
static int apply_streams(const kernels *with, uint8_t *out, const uint8_t *base, size_t elements, unsigned kind,
                         const uint8_t *thresholds, unsigned count, const class_streams *streams) {
    size_t starts[CLASSES_MAX], ends[CLASSES_MAX];
    unsigned width = width_of(kind);
    size_t total = 0;
    uint64_t spans = 0;
    for (unsigned class = 0; class <= count; class++) {
        if (!streams_fit(&streams[class], elements, width)) return WRONG_SIZES;
        starts[class] = total;
        total += streams[class].count;
        ends[class] = total;
        if (total > elements) return BEYOND_END;
    }
    uint32_t *gaps = malloc((total + 1) * sizeof *gaps);
    uint8_t *steps = malloc((total + 1) * width);
    int refused = !gaps || !steps ? NO_MEMORY : OK;
    for (unsigned class = 0; class <= count && !refused; class++) {
        if (!streams[class].count) continue;
        uint64_t span = 0;
        size_t first = starts[class];
        refused = unpack_class(&streams[class], elements, width, gaps + first, steps + first * width, &span);
        spans += span;
        if (!refused && spans > elements) refused = BEYOND_END;
    }
    if (!refused)
        refused = with->apply(out, base, elements, kind, thresholds, count, starts, ends, gaps, steps);
    free(gaps);
    free(steps);
    return refused;
}

#endif
