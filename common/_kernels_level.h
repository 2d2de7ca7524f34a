/* All kernels of one instruction set. Expects LEVEL and LNAME(x) (a name with the level's suffix). */

#if LEVEL > SCALAR
/* The keys of a tile; in a register where its vectors make them: what is written in parts and read at once waits. */
typedef union {
    uint8_t of[TILE];
    __m256i half[2];
#if LEVEL == AVX512
    __m512i all;
#endif
} LNAME(keys);

/* Classes of the keys of a tile, and their 4 bits as planes. */
static inline __attribute__((always_inline)) void LNAME(classify)(const LNAME(keys) *keys, const classifier *by,
                                                                  uint8_t *classes, uint64_t planes[4]) {
#if LEVEL == AVX512
    __m512i all = keys->all, found;
    if (by->low) {
        __m512i near = _mm512_min_epu8(_mm512_subs_epu8(all, _mm512_set1_epi8((char)by->low)), _mm512_set1_epi8(15));
        found = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)by->near)), near);
    } else {
        found = _mm512_setzero_si512();
        for (unsigned n = 0; n < by->count; n++) {
            __mmask64 above = _mm512_cmpge_epu8_mask(all, _mm512_set1_epi8((char)by->thresholds[n]));
            found = _mm512_mask_add_epi8(found, above, found, _mm512_set1_epi8(1));
        }
    }
    _mm512_storeu_si512(classes, found);
    for (int bit = 0; bit < 4; bit++) planes[bit] = _mm512_test_epi8_mask(found, _mm512_set1_epi8((char)(1 << bit)));
#else
    __m256i low = keys->half[0], high = keys->half[1];
    if (by->low) {
        const __m256i from = _mm256_set1_epi8((char)by->low), last = _mm256_set1_epi8(15);
        const __m256i near = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)by->near));
        low = _mm256_shuffle_epi8(near, _mm256_min_epu8(_mm256_subs_epu8(low, from), last));
        high = _mm256_shuffle_epi8(near, _mm256_min_epu8(_mm256_subs_epu8(high, from), last));
    } else {
        __m256i low_found = _mm256_setzero_si256(), high_found = low_found;
        for (unsigned n = 0; n < by->count; n++) { /* a key is at or above a threshold where the maximum is the key */
            const __m256i from = _mm256_set1_epi8((char)by->thresholds[n]);
            low_found = _mm256_sub_epi8(low_found, _mm256_cmpeq_epi8(_mm256_max_epu8(low, from), low));
            high_found = _mm256_sub_epi8(high_found, _mm256_cmpeq_epi8(_mm256_max_epu8(high, from), high));
        }
        low = low_found, high = high_found;
    }
    _mm256_storeu_si256((__m256i *)classes, low);
    _mm256_storeu_si256((__m256i *)(classes + 32), high);
#define PLANE(bit)                                                                                                  \
    ((uint32_t)_mm256_movemask_epi8(_mm256_slli_epi16(low, 7 - bit)) |                                                \
     (uint64_t)(uint32_t)_mm256_movemask_epi8(_mm256_slli_epi16(high, 7 - bit)) << 32)
    planes[0] = PLANE(0);
    planes[1] = PLANE(1);
    planes[2] = PLANE(2);
    planes[3] = PLANE(3);
#undef PLANE
#endif
}

/* Writes where a mask has bits, from `first` on, and more behind that; returns how many there are. */
static inline __attribute__((always_inline)) size_t LNAME(places_of)(uint64_t mask, unsigned first, uint16_t *places) {
    size_t number = (size_t)__builtin_popcountll(mask);
#if LEVEL == AVX512
    static const uint8_t each[TILE] = {
        0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
        22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43,
        44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63};
    __m512i found = _mm512_maskz_compress_epi8(mask, _mm512_loadu_si512(each)), from = _mm512_set1_epi16((short)first);
    _mm512_storeu_si512(places, _mm512_add_epi16(from, _mm512_cvtepu8_epi16(_mm512_castsi512_si256(found))));
    if (number > 32)
        _mm512_storeu_si512(places + 32,
                            _mm512_add_epi16(from, _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(found, 1))));
#else
    size_t written = 0;
    do { /* 4 at a time: no branch depends on where they are */
        for (unsigned k = 0; k < 4; k++) {
            places[written + k] = (uint16_t)(first + (unsigned)_tzcnt_u64(mask));
            mask &= mask - 1;
        }
        written += 4;
    } while (written < number);
#endif
    return number;
}

static inline __attribute__((always_inline)) uint64_t LNAME(members)(const uint64_t planes[4], const classifier *by,
                                                                      unsigned class) {
    const uint64_t *flips = by->flips[class];
    return (planes[0] ^ flips[0]) & (planes[1] ^ flips[1]) & (planes[2] ^ flips[2]) & (planes[3] ^ flips[3]);
}
#endif

#if LEVEL == AVX512
/* How many elements of each class are in the tiles so far: 16 sums, 8 in a register. */
typedef struct {
    __m512i flips[4][2], sums[2];
} LNAME(counter);

static inline void LNAME(make_counter)(LNAME(counter) *counter, const classifier *by) {
    for (unsigned bit = 0; bit < 4; bit++) {
        uint64_t flips[CLASSES_MAX];
        for (unsigned class = 0; class < CLASSES_MAX; class++) flips[class] = by->flips[class][bit];
        counter->flips[bit][0] = _mm512_loadu_si512(flips);
        counter->flips[bit][1] = _mm512_loadu_si512(flips + 8);
    }
    counter->sums[0] = counter->sums[1] = _mm512_setzero_si512();
}

static inline __attribute__((always_inline)) void LNAME(put_sums)(const LNAME(counter) *counter, uint16_t *row) {
    _mm_storeu_si128((__m128i *)row, _mm512_cvtepi64_epi16(counter->sums[0]));
    _mm_storeu_si128((__m128i *)(row + 8), _mm512_cvtepi64_epi16(counter->sums[1]));
}

/* Counts another tile; of more than 8 classes only if there are. */
static inline __attribute__((always_inline)) void LNAME(count_tile)(LNAME(counter) *counter, const uint64_t planes[4],
                                                                    const unsigned halves) {
    __m512i bits[4];
    for (unsigned bit = 0; bit < 4; bit++) bits[bit] = _mm512_set1_epi64((long long)planes[bit]);
    for (unsigned half = 0; half < halves; half++) { /* 0x28: (a ^ b) & c */
        __m512i members = _mm512_xor_si512(bits[3], counter->flips[3][half]);
        members = _mm512_ternarylogic_epi64(bits[2], counter->flips[2][half], members, 0x28);
        members = _mm512_ternarylogic_epi64(bits[1], counter->flips[1][half], members, 0x28);
        members = _mm512_ternarylogic_epi64(bits[0], counter->flips[0][half], members, 0x28);
        counter->sums[half] = _mm512_add_epi64(counter->sums[half], _mm512_popcnt_epi64(members));
    }
}
#endif

#define BITS 8
#define NAME(x) LNAME(x##_8)
#include "_kernels_width.h"
#undef NAME
#undef BITS

#define BITS 16
#define NAME(x) LNAME(x##_16)
#include "_kernels_width.h"
#undef NAME
#undef BITS

#define BITS 32
#define NAME(x) LNAME(x##_32)
#include "_kernels_width.h"
#undef NAME
#undef BITS

#define BITS 64
#define NAME(x) LNAME(x##_64)
#include "_kernels_width.h"
#undef NAME
#undef BITS

#include "_kernels_xxh3.h"

static int LNAME(extract)(const uint8_t *new, const uint8_t *base, size_t elements, unsigned kind,
                          const uint8_t *thresholds, unsigned count, changes *list) {
    unsigned mantissa = mantissa_of(kind);
    switch (width_of(kind)) {
    case 1: return LNAME(extract_8)(new, base, elements, mantissa, thresholds, count, list);
    case 2: return LNAME(extract_16)(new, base, elements, mantissa, thresholds, count, list);
    case 4: return LNAME(extract_32)(new, base, elements, mantissa, thresholds, count, list);
    default: return LNAME(extract_64)(new, base, elements, mantissa, thresholds, count, list);
    }
}

static int LNAME(apply)(uint8_t *out, const uint8_t *base, size_t elements, unsigned kind, const uint8_t *thresholds,
                        unsigned count, const size_t *starts, const size_t *ends, const uint32_t *gaps,
                        const uint8_t *steps) {
    unsigned mantissa = mantissa_of(kind);
    switch (width_of(kind)) {
    case 1: return LNAME(apply_8)(out, base, elements, mantissa, thresholds, count, starts, ends, gaps, steps);
    case 2: return LNAME(apply_16)(out, base, elements, mantissa, thresholds, count, starts, ends, gaps, steps);
    case 4: return LNAME(apply_32)(out, base, elements, mantissa, thresholds, count, starts, ends, gaps, steps);
    default: return LNAME(apply_64)(out, base, elements, mantissa, thresholds, count, starts, ends, gaps, steps);
    }
}

static void LNAME(sample)(const uint8_t *new, const uint8_t *base, size_t pieces, size_t piece, size_t stride,
                          unsigned kind, uint32_t *seen, uint32_t *changed) {
    unsigned mantissa = mantissa_of(kind);
    switch (width_of(kind)) {
    case 1: LNAME(sample_8)(new, base, pieces, piece, stride, mantissa, seen, changed); break;
    case 2: LNAME(sample_16)(new, base, pieces, piece, stride, mantissa, seen, changed); break;
    case 4: LNAME(sample_32)(new, base, pieces, piece, stride, mantissa, seen, changed); break;
    default: LNAME(sample_64)(new, base, pieces, piece, stride, mantissa, seen, changed);
    }
}

static void LNAME(to_planes)(const uint8_t *new, const uint8_t *base, uint8_t *planes, size_t elements, unsigned how,
                             unsigned kind) {
    int is_float = mantissa_of(kind) != 0;
    switch (width_of(kind)) {
    case 1: LNAME(to_planes_8)(new, base, planes, elements, how, is_float); break;
    case 2: LNAME(to_planes_16)(new, base, planes, elements, how, is_float); break;
    case 4: LNAME(to_planes_32)(new, base, planes, elements, how, is_float); break;
    default: LNAME(to_planes_64)(new, base, planes, elements, how, is_float);
    }
}

static void LNAME(from_planes)(const uint8_t *const *planes, const uint8_t *base, uint8_t *out, size_t elements,
                               unsigned how, unsigned kind) {
    int is_float = mantissa_of(kind) != 0;
    switch (width_of(kind)) {
    case 1: LNAME(from_planes_8)(planes, base, out, elements, how, is_float); break;
    case 2: LNAME(from_planes_16)(planes, base, out, elements, how, is_float); break;
    case 4: LNAME(from_planes_32)(planes, base, out, elements, how, is_float); break;
    default: LNAME(from_planes_64)(planes, base, out, elements, how, is_float);
    }
}
