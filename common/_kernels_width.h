/* The kernels that depend on the element's width, included once per width and instruction set.

   Expects: BITS, LEVEL, NAME(x). Extraction and application look at strips of 64 tiles of 64 elements: one 64-bit mask
   tells which elements of a tile changed, four hold the bits of their classes, and ranks in a class are popcounts.
   What depends on single changes comes after, in loops whose branches don't. Rest and SCALAR go element by element. */

#define GLUE_(a, b, c) a##b##c
#define GLUE(a, b, c) GLUE_(a, b, c)
#define UINT GLUE(uint, BITS, _t)
#define WIDTH (BITS / 8)
#define TOP_BIT (BITS - 1)
#define HOT static inline __attribute__((always_inline))

HOT UINT NAME(load)(const uint8_t *block, size_t n) {
    UINT bits;
    memcpy(&bits, block + n * WIDTH, WIDTH);
    return bits;
}

HOT void NAME(store)(uint8_t *block, size_t n, UINT bits) { memcpy(block + n * WIDTH, &bits, WIDTH); }

/* Bits as integers in the order of the numbers they stand for; integers stay. */
HOT UINT NAME(ordered)(UINT bits, int is_float) {
    UINT negative = (UINT)(0 - (bits >> TOP_BIT));
    return is_float ? (UINT)(bits ^ (negative | (UINT)1 << TOP_BIT)) : bits;
}

HOT UINT NAME(unordered)(UINT order, int is_float) {
    UINT negative = (UINT)(0 - (order >> TOP_BIT));
    return is_float ? (UINT)(order ^ ((UINT)~negative | (UINT)1 << TOP_BIT)) : order;
}

/* The exponent in 8 bits, from which classes are made; 0 for integers. */
HOT uint8_t NAME(key)(UINT bits, unsigned mantissa) {
    if (!mantissa) return 0;
#if BITS == 64
    int exponent = (int)(bits >> 52 & 0x7FF) - 895;
    return (uint8_t)(exponent < 0 ? 0 : exponent > 255 ? 255 : exponent);
#else
    return (uint8_t)((bits & (UINT)~((UINT)1 << TOP_BIT)) >> mantissa);
#endif
}

HOT void NAME(apply_one)(uint8_t *block, size_t n, const uint8_t *steps, size_t number, int is_float) {
    UINT order = NAME(ordered)(NAME(load)(block, n), is_float);
    NAME(store)(block, n, NAME(unordered)((UINT)(order + NAME(load)(steps, number)), is_float));
}

HOT UINT NAME(step)(UINT after, UINT before, int is_float) {
    return (UINT)(NAME(ordered)(after, is_float) - NAME(ordered)(before, is_float));
}

#define PREFETCH(at) (__builtin_prefetch((at) + 2048), __builtin_prefetch((at) + 2048 + 64))
#if LEVEL > SCALAR
/* Keys of a tile of the base, and the mask of elements that differ (0 where `new` is NULL). */
HOT uint64_t NAME(tile)(const uint8_t *base, const uint8_t *new, unsigned mantissa, LNAME(keys) *tile) {
#if BITS == 16 && LEVEL == AVX512
    __m512i low = _mm512_loadu_si512(base), high = _mm512_loadu_si512(base + 64);
    const __m512i mask = _mm512_set1_epi16((short)(mantissa ? 0x7FFF >> mantissa : 0));
    const __m128i by = _mm_cvtsi32_si128((int)mantissa);
    __m256i low_keys = _mm512_cvtepi16_epi8(_mm512_and_si512(_mm512_srl_epi16(low, by), mask));
    __m256i high_keys = _mm512_cvtepi16_epi8(_mm512_and_si512(_mm512_srl_epi16(high, by), mask));
    tile->all = _mm512_inserti64x4(_mm512_castsi256_si512(low_keys), high_keys, 1);
    if (!new) return 0;
    return (uint64_t)_mm512_cmpneq_epi16_mask(low, _mm512_loadu_si512(new)) |
           (uint64_t)_mm512_cmpneq_epi16_mask(high, _mm512_loadu_si512(new + 64)) << 32;
#elif BITS == 16
    const __m256i mask = _mm256_set1_epi16((short)(mantissa ? 0x7FFF >> mantissa : 0));
    const __m128i by = _mm_cvtsi32_si128((int)mantissa);
    uint64_t differ = 0;
    for (int half = 0; half < 2; half++) {
        const __m256i *at = (const __m256i *)(base + 64 * half);
        __m256i low = _mm256_loadu_si256(at), high = _mm256_loadu_si256(at + 1);
        __m256i packed = _mm256_packus_epi16(_mm256_and_si256(_mm256_srl_epi16(low, by), mask),
                                             _mm256_and_si256(_mm256_srl_epi16(high, by), mask));
        tile->half[half] = _mm256_permute4x64_epi64(packed, 0xD8);
        if (new) {
            const __m256i *with = (const __m256i *)(new + 64 * half);
            __m256i same = _mm256_packs_epi16(_mm256_cmpeq_epi16(low, _mm256_loadu_si256(with)),
                                              _mm256_cmpeq_epi16(high, _mm256_loadu_si256(with + 1)));
            differ |= (uint64_t)~(uint32_t)_mm256_movemask_epi8(_mm256_permute4x64_epi64(same, 0xD8)) << 32 * half;
        }
    }
    return differ;
#else
    UINT before[TILE], after[TILE];
    uint8_t other[TILE];
    memcpy(before, base, sizeof before);
    for (int n = 0; n < TILE; n++) tile->of[n] = NAME(key)(before[n], mantissa);
    if (!new) return 0;
    memcpy(after, new, sizeof after);
    for (int n = 0; n < TILE; n++) other[n] = before[n] != after[n] ? 0xFF : 0;
    const __m256i *at = (const __m256i *)other;
    return (uint32_t)_mm256_movemask_epi8(_mm256_loadu_si256(at)) |
           (uint64_t)(uint32_t)_mm256_movemask_epi8(_mm256_loadu_si256(at + 1)) << 32;
#endif
}
#endif

#if LEVEL > SCALAR
/* The tiles of a strip of the base: classes of the elements, as bytes and as bit planes of a tile; before[c][tile]: how
   many elements of class c are in the tiles before; rows: the same by tile, which is how AVX-512 makes it. */
typedef struct {
    uint64_t planes[STRIP / TILE][4];
    uint16_t before[CLASSES_MAX][STRIP / TILE + 1];
#if LEVEL == AVX512
    uint16_t rows[STRIP / TILE + 1][CLASSES_MAX];
#endif
    uint64_t differ[STRIP / TILE];
    uint8_t classes[STRIP];
} NAME(strip);

#if LEVEL == AVX512
#define BEFORE(strip, class, tile) (strip).rows[tile][class]
#else
#define BEFORE(strip, class, tile) (strip).before[class][tile]
#endif

HOT void NAME(look_by)(NAME(strip) *strip, const uint8_t *base, const uint8_t *new, unsigned mantissa,
                       const classifier *by, const unsigned count) {
    LNAME(keys) keys;
#if LEVEL == AVX512
    LNAME(counter) counter;
    LNAME(make_counter)(&counter, by);
#else
    uint32_t before[CLASSES_MAX] = {0};
#endif
    for (unsigned tile = 0; tile < STRIP / TILE; tile++) {
        const size_t at = tile * TILE * WIDTH;
        PREFETCH(base + at);
        if (new) PREFETCH(new + at);
        strip->differ[tile] = NAME(tile)(base + at, new ? new + at : NULL, mantissa, &keys);
        if (count == 0) continue; /* one class: its elements are all, the caller knows how many */
        uint64_t planes[4];
        LNAME(classify)(&keys, by, strip->classes + tile * TILE, planes);
        memcpy(strip->planes[tile], planes, sizeof planes);
#if LEVEL == AVX512
        LNAME(put_sums)(&counter, strip->rows[tile]);
        LNAME(count_tile)(&counter, planes, count < 8 ? 1 : 2);
#else
        uint64_t low[4], high[4];
        for (unsigned n = 0; n < 4; n++) {
            low[n] = (n & 1 ? planes[0] : ~planes[0]) & (n & 2 ? planes[1] : ~planes[1]);
            high[n] = (n & 1 ? planes[2] : ~planes[2]) & (n & 2 ? planes[3] : ~planes[3]);
        }
        for (unsigned class = 0; class <= count; class++) {
            strip->before[class][tile] = (uint16_t)before[class];
            before[class] += (uint32_t)__builtin_popcountll(low[class & 3] & high[class >> 2]);
        }
#endif
    }
#if LEVEL == AVX512
    LNAME(put_sums)(&counter, strip->rows[STRIP / TILE]);
    for (unsigned class = 0; !new && class <= count; class++)
        for (unsigned tile = 0; tile <= STRIP / TILE; tile++) strip->before[class][tile] = strip->rows[tile][class];
#else
    for (unsigned class = 0; class <= count; class++) strip->before[class][STRIP / TILE] = (uint16_t)before[class];
#endif
    if (count == 0) BEFORE(*strip, 0, STRIP / TILE) = strip->before[0][STRIP / TILE] = STRIP;
}

/* The usual counts of thresholds as constants: loops over them are unrolled, and counters stay in registers. */
static __attribute__((noinline)) void NAME(look)(NAME(strip) *strip, const uint8_t *base, const uint8_t *new,
                                                 unsigned mantissa, const classifier *by) {
#if BITS == 16
    switch (by->count) {
    case 0: NAME(look_by)(strip, base, new, mantissa, by, 0); return;
    case 8: NAME(look_by)(strip, base, new, mantissa, by, 8); return;
    case 9: NAME(look_by)(strip, base, new, mantissa, by, 9); return;
    case 10: NAME(look_by)(strip, base, new, mantissa, by, 10); return;
    case 11: NAME(look_by)(strip, base, new, mantissa, by, 11); return;
    case 12: NAME(look_by)(strip, base, new, mantissa, by, 12); return;
    default: break;
    }
#endif
    NAME(look_by)(strip, base, new, mantissa, by, by->count);
}

/* The tile of the strip that holds the element of the class with this rank: how many tiles end at or before it. */
HOT unsigned NAME(tile_of)(const NAME(strip) *strip, unsigned class, uint64_t rank) {
    const __m256i sought = _mm256_set1_epi16((short)rank);
    __m256i later = _mm256_setzero_si256(); /* ranks are at most STRIP: the sign of 16 bits does not matter */
    for (unsigned tile = 0; tile < STRIP / TILE; tile += 16) {
        __m256i ends = _mm256_loadu_si256((const __m256i *)(strip->before[class] + tile + 1));
        later = _mm256_sub_epi16(later, _mm256_cmpgt_epi16(ends, sought));
    }
    __m256i sums = _mm256_sad_epu8(later, _mm256_setzero_si256());
    __m128i sum = _mm_add_epi64(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    return STRIP / TILE - (unsigned)(_mm_cvtsi128_si32(sum) + _mm_extract_epi32(sum, 2));
}
#endif

/* All changes between `base` and `new`; TOO_MANY beyond list->limit. */
static int NAME(extract)(const uint8_t *new, const uint8_t *base, size_t elements, unsigned mantissa,
                         const uint8_t *thresholds, unsigned count, changes *list) {
    uint64_t run[CLASSES_MAX] = {0}; /* elements of the class since its last change; wraps below 0 within a strip */
    classifier by;
    const int is_float = mantissa != 0;
    size_t n = 0;
    make_classifier(&by, thresholds, count);
    if (!count) mantissa = 0; /* one class: keys don't matter */
#if LEVEL > SCALAR
    NAME(strip) strip;
    uint16_t places[STRIP + TILE];
    for (; elements - n >= STRIP; n += STRIP) {
        const uint8_t *after = new + n * WIDTH, *before = base + n * WIDTH;
        NAME(look)(&strip, before, after, mantissa, &by);
        size_t found = 0;
        for (unsigned tile = 0; tile < STRIP / TILE; tile++)
            found += LNAME(places_of)(strip.differ[tile], tile * TILE, places + found);
        list->count += found;
        if (list->count > list->limit) return TOO_MANY;
        for (unsigned class = 0; class <= count && found; class++)
            if (make_room(&list->of[class], found, list->width)) return NO_MEMORY;
        uint64_t last[CLASSES_MAX]; /* rank after the last change; wraps below 0 where that is in a strip before */
        size_t counts[CLASSES_MAX];
        uint32_t *gaps[CLASSES_MAX];
        uint8_t *steps[CLASSES_MAX];
        for (unsigned class = 0; class <= count; class++) {
            last[class] = 0 - run[class];
            counts[class] = list->of[class].count;
            gaps[class] = list->of[class].gaps;
            steps[class] = list->of[class].steps;
        }
        for (size_t k = 0; k < found && !count; k++) {
            unsigned place = places[k];
            gaps[0][counts[0]] = (uint32_t)(place - last[0]);
            last[0] = place + 1;
            NAME(store)(steps[0], counts[0]++, NAME(step)(NAME(load)(after, place), NAME(load)(before, place), is_float));
        }
        for (size_t k = 0; k < found && count; k++) {
            unsigned place = places[k], tile = place / TILE, class = strip.classes[place];
            uint64_t below = LNAME(members)(strip.planes[tile], &by, class) & (((uint64_t)1 << place % TILE) - 1);
            uint64_t rank = BEFORE(strip, class, tile) + (uint64_t)__builtin_popcountll(below);
            uint64_t gap = rank - last[class];
            last[class] = rank + 1;
            size_t number = counts[class]++;
            gaps[class][number] = (uint32_t)gap;
            NAME(store)(steps[class], number, NAME(step)(NAME(load)(after, place), NAME(load)(before, place), is_float));
        }
        for (unsigned class = 0; class <= count; class++) {
            list->of[class].count = counts[class];
            run[class] = 0 - last[class];
        }
        for (unsigned class = 0; class <= count; class++) run[class] += BEFORE(strip, class, STRIP / TILE);
    }
#endif
    for (; n < elements; n++) {
        UINT before = NAME(load)(base, n), after = NAME(load)(new, n);
        unsigned class = by.table[NAME(key)(before, mantissa)];
        if (before == after) {
            run[class]++;
            continue;
        }
        if (++list->count > list->limit) return TOO_MANY;
        if (list->of[class].room == list->of[class].count && make_room(&list->of[class], 256, list->width))
            return NO_MEMORY;
        size_t number = list->of[class].count++;
        list->of[class].gaps[number] = (uint32_t)run[class];
        NAME(store)(list->of[class].steps, number, NAME(step)(after, before, is_float));
        run[class] = 0;
    }
    return OK;
}

/* Changes `out`, which holds the base's elements from `first` to `last`, in place. `left`: unchanged elements of the
   class before its next change, `next`: that change's number. */
HOT void NAME(apply_strip)(uint8_t *out, size_t first, size_t last, unsigned mantissa, const classifier *by,
                           uint64_t *left, size_t *next, const size_t *ends, const uint32_t *gaps, const uint8_t *steps) {
    const int is_float = mantissa != 0;
    size_t n = first;
#if LEVEL > SCALAR
    if (last - first == STRIP) {
        NAME(strip) strip;
        uint8_t *at = out + first * WIDTH;
        NAME(look)(&strip, at, NULL, mantissa, by);
        for (unsigned class = 0; class <= by->count; class++) {
            const uint64_t size = strip.before[class][STRIP / TILE];
            uint64_t rank = left[class];
            size_t number = next[class];
            while (rank < size) {
                unsigned tile = NAME(tile_of)(&strip, class, rank);
                uint64_t members = LNAME(members)(strip.planes[tile], by, class);
                uint64_t bit = _tzcnt_u64(_pdep_u64((uint64_t)1 << (rank - strip.before[class][tile]), members));
                NAME(apply_one)(at, tile * TILE + bit, steps, number, is_float);
                rank = ++number < ends[class] ? rank + 1 + gaps[number] : NEVER;
            }
            next[class] = number;
            left[class] = rank - size;
        }
        return;
    }
#endif
    for (; n < last; n++) {
        unsigned class = by->table[NAME(key)(NAME(load)(out, n), mantissa)];
        if (left[class]) {
            left[class]--;
            continue;
        }
        size_t number = next[class]++;
        NAME(apply_one)(out, n, steps, number, is_float);
        left[class] = next[class] < ends[class] ? gaps[number + 1] : NEVER;
    }
}

/* Fills `out` from `base` and unpacked changes: those of class c have the numbers starts[c] to ends[c]. */
static int NAME(apply)(uint8_t *out, const uint8_t *base, size_t elements, unsigned mantissa,
                       const uint8_t *thresholds, unsigned count, const size_t *starts, const size_t *ends,
                       const uint32_t *gaps, const uint8_t *steps) {
    if (count == 0) { /* positions are known without a look at the base */
        if (out != base) memmove(out, base, elements * WIDTH);
        for (size_t number = starts[0], n = 0; number < ends[0]; number++, n++) {
            n += gaps[number];
            if (n >= elements) return BEYOND_END;
            NAME(apply_one)(out, n, steps, number, mantissa != 0);
        }
        return OK;
    }
    classifier by;
    uint64_t left[CLASSES_MAX];
    size_t next[CLASSES_MAX];
    make_classifier(&by, thresholds, count);
    for (unsigned class = 0; class <= count; class++) {
        next[class] = starts[class];
        left[class] = starts[class] < ends[class] ? gaps[starts[class]] : NEVER;
    }
    int overlap = out < base + elements * WIDTH && base < out + elements * WIDTH;
    if (overlap && out != base) memmove(out, base, elements * WIDTH);
    for (size_t first = 0; first < elements; first += STRIP) {
        size_t last = elements - first < STRIP ? elements : first + STRIP;
        if (!overlap) memcpy(out + first * WIDTH, base + first * WIDTH, (last - first) * WIDTH);
        NAME(apply_strip)(out, first, last, mantissa, &by, left, next, ends, gaps, steps);
    }
    for (unsigned class = 0; class <= count; class++)
        if (next[class] != ends[class]) return BEYOND_END;
    return OK;
}

/* Elements and changed elements by key in `pieces` pieces of `piece` elements, `stride` elements apart. */
static void NAME(sample)(const uint8_t *new, const uint8_t *base, size_t pieces, size_t piece, size_t stride,
                         unsigned mantissa, uint32_t *seen, uint32_t *changed) {
    uint32_t other[3][KEYS] = {{0}}; /* several tables: equal keys in a row don't wait for each other */
    uint32_t *tables[4] = {seen, other[0], other[1], other[2]};
    for (size_t number = 0; number < pieces; number++) {
        const uint8_t *one = new + number * stride * WIDTH, *two = base + number * stride * WIDTH;
        for (size_t n = 0; n < piece; n++) {
            UINT before = NAME(load)(two, n);
            uint8_t key = NAME(key)(before, mantissa);
            tables[n & 3][key]++;
            changed[key] += before != NAME(load)(one, n);
        }
    }
    for (unsigned key = 0; key < KEYS; key++) seen[key] += other[0][key] + other[1][key] + other[2][key];
}

/* Elements -> planes (byte k of every element), after `how`: 0 as they are, 1 rotated left by one bit so that a float's
   exponent starts at the top, 2 zigzag difference to the base in the order of the numbers. */
static void NAME(to_planes)(const uint8_t *new, const uint8_t *base, uint8_t *planes, size_t elements, unsigned how,
                            int is_float) {
    UINT strip[256];
    for (size_t first = 0; first < elements; first += 256) {
        size_t size = elements - first < 256 ? elements - first : 256;
        memcpy(strip, new + first * WIDTH, size * WIDTH);
        if (how == 1) {
            for (size_t n = 0; n < size; n++) strip[n] = (UINT)((UINT)(strip[n] << 1) | strip[n] >> TOP_BIT);
        } else if (how == 2) {
            UINT before[256];
            memcpy(before, base + first * WIDTH, size * WIDTH);
            for (size_t n = 0; n < size; n++) {
                UINT step = (UINT)(NAME(ordered)(strip[n], is_float) - NAME(ordered)(before[n], is_float));
                strip[n] = (UINT)((UINT)(step << 1) ^ (UINT)(0 - (step >> TOP_BIT)));
            }
        }
        for (unsigned plane = 0; plane < WIDTH; plane++) {
            uint8_t *to = planes + plane * elements + first;
            for (size_t n = 0; n < size; n++) to[n] = (uint8_t)(strip[n] >> 8 * plane);
        }
    }
}

/* Inverse of to_planes; `out` may be `base`. */
static void NAME(from_planes)(const uint8_t *const *planes, const uint8_t *base, uint8_t *out, size_t elements,
                              unsigned how, int is_float) {
    UINT strip[256];
    for (size_t first = 0; first < elements; first += 256) {
        size_t size = elements - first < 256 ? elements - first : 256;
        for (size_t n = 0; n < size; n++) strip[n] = planes[0][first + n];
        for (unsigned plane = 1; plane < WIDTH; plane++) {
            const uint8_t *at = planes[plane] + first;
            for (size_t n = 0; n < size; n++) strip[n] |= (UINT)((UINT)at[n] << 8 * plane % BITS);
        }
        if (how == 1) {
            for (size_t n = 0; n < size; n++) strip[n] = (UINT)(strip[n] >> 1 | (UINT)(strip[n] << TOP_BIT));
        } else if (how == 2) {
            UINT before[256];
            memcpy(before, base + first * WIDTH, size * WIDTH);
            for (size_t n = 0; n < size; n++) {
                UINT step = (UINT)(strip[n] >> 1 ^ (UINT)(0 - (strip[n] & 1)));
                strip[n] = NAME(unordered)((UINT)(NAME(ordered)(before[n], is_float) + step), is_float);
            }
        }
        memcpy(out + first * WIDTH, strip, size * WIDTH);
    }
}

#undef BEFORE
#undef GLUE_
#undef GLUE
#undef UINT
#undef WIDTH
#undef TOP_BIT
#undef HOT
#undef PREFETCH
