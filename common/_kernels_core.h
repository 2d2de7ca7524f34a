/* What the codec kernels share: element widths, streams, packed symbols. Plain C, knows nothing of Python.

   Sizes are elements unless a name says bytes. Pointers into tensors need not be aligned: every access is a memcpy.
   Functions that meet bytes from outside return 0 or an `enum refusal`; they never read or write beyond what they got. */

#ifndef REFLEET_KERNELS_CORE_H
#define REFLEET_KERNELS_CORE_H

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if !defined(__GNUC__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the kernels are for GCC or Clang on little-endian machines; elsewhere the numpy form does their work"
#endif

#if defined(__x86_64__)
#define REFLEET_X86 1
#include <immintrin.h>
#else
#define REFLEET_X86 0
#endif

#define CLASSES_MAX 16
#define KEYS 256
#define TILE 64
#define NEVER (UINT64_MAX >> 1)
#define STRIP 2048 /* elements copied at a time where out is not base: they stay in the cache for the changes */

/* levels; macros, because the preprocessor compares them */
#define SCALAR 0
#define AVX2 1
#define AVX512 2
enum { PLANES = 3 }; /* symbol modes 0, 1, 2: 2, 4, 8 bits */
enum refusal { OK, NO_MEMORY, WRONG_SIZES, WRONG_ESCAPES, BEYOND_END, TOO_MANY };

typedef struct {
    const uint8_t *data;
    size_t bytes;
} view;

/* `count` numbers: packed symbols, and what did not fit them */
typedef struct {
    unsigned mode;
    view packed, escapes, wide;
} symbols;

typedef struct {
    size_t count;
    unsigned shift;
    view fields; /* low gap bits and sign, shift + 1 bits a change */
    symbols gaps, steps;
} class_streams;

/* The changes of one class in the order of their positions. A step is wrapped at the element's width. */
typedef struct {
    size_t count, room;
    uint32_t *gaps;
    uint8_t *steps; /* `width` bytes each */
} class_changes;

typedef struct {
    size_t count, limit;
    unsigned width;
    class_changes of[CLASSES_MAX];
} changes;

static inline unsigned width_of(unsigned kind) { return kind & 0xFF; }
static inline unsigned mantissa_of(unsigned kind) { return kind >> 8; } /* 0: an integer */
static inline unsigned symbol_bits(unsigned mode) { return 2u << mode; }

/* Up to 8 bytes as a number, and back; this machine is little endian, and a constant size makes one instruction. */
static inline uint64_t load_little(const uint8_t *at, size_t bytes) {
    uint64_t value = 0;
    memcpy(&value, at, bytes);
    return value;
}

static inline void store_little(uint8_t *at, uint64_t value, size_t bytes) { memcpy(at, &value, bytes); }

static inline int kind_is_known(unsigned kind) {
    unsigned width = width_of(kind), mantissa = mantissa_of(kind);
    if (width != 1 && width != 2 && width != 4 && width != 8) return 0;
    return mantissa < 8 * width - 1 && (width != 4 || mantissa == 0 || mantissa == 23) &&
           (width != 8 || mantissa == 0 || mantissa == 52) && (width != 2 || mantissa == 0 || mantissa >= 7);
}

static void free_changes(changes *list) {
    for (unsigned class = 0; class < CLASSES_MAX; class++) {
        free(list->of[class].gaps);
        free(list->of[class].steps);
    }
    memset(list->of, 0, sizeof list->of);
}

/* Room for `more` further changes of a class. */
static int make_room(class_changes *list, size_t more, unsigned width) {
    if (list->room - list->count >= more) return OK;
    size_t room = list->room + list->room / 2 + more;
    void *gaps = realloc(list->gaps, room * sizeof *list->gaps);
    if (gaps) list->gaps = gaps;
    void *steps = realloc(list->steps, room * width);
    if (steps) list->steps = steps;
    if (!gaps || !steps) return NO_MEMORY;
    list->room = room;
    return OK;
}

/* Keys to classes: a class is the number of thresholds at or below the key. Its 4 bits are the bits of `flips`,
   inverted: (plane 0 ^ flips[0]) & ... is the mask of the elements of a class in a tile. */
typedef struct {
    unsigned count; /* of thresholds */
    uint8_t thresholds[CLASSES_MAX], table[KEYS];
    uint8_t low, near[16]; /* where all thresholds lie close together: class of min(key - low, 15), else low is 0 */
    uint64_t flips[CLASSES_MAX][4];
} classifier;

static void make_classifier(classifier *by, const uint8_t *thresholds, unsigned count) {
    memset(by, 0, sizeof *by);
    by->count = count;
    if (count) memcpy(by->thresholds, thresholds, count);
    for (unsigned key = 0, number = 0; key < KEYS; key++) {
        while (number < count && thresholds[number] <= key) number++;
        by->table[key] = (uint8_t)number;
    }
    if (count && thresholds[0] > 1 && thresholds[count - 1] - thresholds[0] < 15) {
        by->low = (uint8_t)(thresholds[0] - 1);
        for (unsigned n = 0; n < 16; n++) by->near[n] = by->table[by->low + n < KEYS ? by->low + n : KEYS - 1];
    }
    for (unsigned class = 0; class < CLASSES_MAX; class++)
        for (unsigned bit = 0; bit < 4; bit++) by->flips[class][bit] = class >> bit & 1 ? 0 : ~(uint64_t)0;
}

static int thresholds_rise(const uint8_t *thresholds, size_t count) {
    if (count >= CLASSES_MAX) return 0;
    for (size_t n = 0; n < count; n++)
        if (thresholds[n] <= (n ? thresholds[n - 1] : 0)) return 0;
    return 1;
}

/* The first byte that differs, or `bytes`. The C library's memcmp runs at the memory's speed. */
static size_t first_difference(const uint8_t *one, const uint8_t *other, size_t bytes) {
    size_t at = 0;
    while (at < bytes) {
        size_t piece = bytes - at < 16384 ? bytes - at : 16384;
        if (memcmp(one + at, other + at, piece)) break;
        at += piece;
    }
    while (at < bytes && one[at] == other[at]) at++;
    return at;
}

/* packing: numbers -> streams */

typedef struct {
    unsigned mode;
    uint8_t *packed, *escapes, *wide; /* one allocation, `packed` owns it */
    size_t packed_bytes, escape_bytes, wide_bytes;
} packed_symbols;

/* The mode from how many numbers reach 3, 15, 255: the fewest bits that leave few escapes. */
static unsigned mode_for(size_t count, size_t from3, size_t from15, size_t from255) {
    if (8 * from3 <= count) return 0;
    if (64 * from15 <= count) return 1;
    return 8 * from255 <= count ? 2 : PLANES;
}

#define NUMBER(n) (numbers32 ? (uint64_t)(numbers32[n] >> shift) : load_little(numbers + (n) * width, width))
#define INLINE static inline __attribute__((always_inline))

INLINE void pack_symbols(const uint8_t *numbers, const uint32_t *numbers32, unsigned shift, unsigned width,
                         size_t count, const unsigned mode, packed_symbols *out) {
    const unsigned bits = symbol_bits(mode), per = 8 / bits, escape = (1u << bits) - 1;
    uint8_t *escapes = out->escapes, *wide = out->wide;
    for (size_t first = 0; first < count; first += per) {
        unsigned byte = 0;
        for (unsigned n = 0; n < per && first + n < count; n++) {
            uint64_t value = NUMBER(first + n);
            unsigned symbol = value < escape ? (unsigned)value : escape;
            byte |= symbol << n * bits;
            if (symbol == escape) {
                uint64_t rest = value - escape;
                *escapes++ = rest < 255 ? (uint8_t)rest : 255;
                if (rest >= 255) {
                    store_little(wide, value, width);
                    wide += width;
                }
            }
        }
        out->packed[first / per] = (uint8_t)byte;
    }
    out->wide_bytes = (size_t)(wide - out->wide);
}

/* Packs numbers of `width` bytes (or `numbers32` >> shift). Gaps never take PLANES. */
INLINE int pack_numbers(const uint8_t *numbers, const uint32_t *numbers32, unsigned shift, unsigned width, size_t count,
                        packed_symbols *out) {
    uint32_t from3 = 0, from15 = 0, from255 = 0; /* 32 bits wide for the sake of vectors */
    if (numbers32 || width <= 2) {
        for (size_t n = 0; n < count; n++) {
            int32_t value = (int32_t)NUMBER(n); /* gaps are below 2^31 */
            from3 += value >= 3;
            from15 += value >= 15;
            from255 += value >= 255;
        }
    } else {
        for (size_t n = 0; n < count; n++) {
            uint64_t value = NUMBER(n);
            from3 += value >= 3;
            from15 += value >= 15;
            from255 += value >= 255;
        }
    }
    unsigned mode = mode_for(count, from3, from15, from255);
    if (numbers32 && mode == PLANES) mode = 2;
    memset(out, 0, sizeof *out);
    out->mode = mode;
    if (mode == PLANES) {
        out->packed_bytes = count * width;
        if (!(out->packed = malloc(out->packed_bytes + 1))) return NO_MEMORY;
        for (size_t n = 0; n < count; n++)
            for (unsigned plane = 0; plane < width; plane++) out->packed[plane * count + n] = numbers[n * width + plane];
        return OK;
    }
    size_t escaped = mode == 0 ? from3 : mode == 1 ? from15 : from255;
    out->packed_bytes = (count + (4 >> mode) - 1) / (4 >> mode);
    if (!(out->packed = malloc(out->packed_bytes + escaped * (1 + (size_t)width) + 1))) return NO_MEMORY;
    out->escapes = out->packed + out->packed_bytes;
    out->wide = out->escapes + escaped;
    out->escape_bytes = escaped;
    if (mode == 0)
        pack_symbols(numbers, numbers32, shift, width, count, 0, out);
    else if (mode == 1)
        pack_symbols(numbers, numbers32, shift, width, count, 1, out);
    else
        pack_symbols(numbers, numbers32, shift, width, count, 2, out);
    return OK;
}
#undef NUMBER

static int pack_gaps(const uint32_t *gaps, size_t count, unsigned shift, packed_symbols *out) {
    return pack_numbers(NULL, gaps, shift, 4, count, out);
}

static int pack_steps(const uint8_t *steps, unsigned width, size_t count, packed_symbols *out) {
    switch (width) { /* constant widths: plain loads */
    case 1: return pack_numbers(steps, NULL, 0, 1, count, out);
    case 2: return pack_numbers(steps, NULL, 0, 2, count, out);
    case 4: return pack_numbers(steps, NULL, 0, 4, count, out);
    default: return pack_numbers(steps, NULL, 0, 8, count, out);
    }
}

/* Turns wrapped steps into |step| - 1 in place, and writes the fields: low gap bits, then the sign (1: down).
   `fields` holds field_bytes(count, shift) + 8 bytes. */
static size_t field_bytes(size_t count, unsigned shift) { return (count * (shift + 1) + 7) / 8; }

INLINE void pack_fields(const uint32_t *gaps, uint8_t *steps, unsigned width, size_t count, unsigned shift,
                        uint8_t *fields) {
    uint64_t held = 0, low = ((uint64_t)1 << shift) - 1;
    unsigned filled = 0, top = 8 * width - 1;
    for (size_t n = 0; n < count; n++) {
        uint64_t step = load_little(steps + n * width, width), down = step >> top & 1;
        store_little(steps + n * width, down ? ~step : step - 1, width);
        held |= ((gaps[n] & low) | down << shift) << filled;
        filled += shift + 1;
        store_little(fields, held, 8);
        fields += filled / 8;
        held >>= filled & ~7u;
        filled &= 7;
    }
    store_little(fields, held, 8);
}

/* The smallest shift that brings the mean of gap >> shift down to 16. */
static unsigned shift_for(uint64_t skipped, size_t count) {
    unsigned shift = 0;
    while (skipped > (uint64_t)16 * count << shift) shift++;
    return shift;
}

/* unpacking: streams -> numbers; everything is checked here */

static int symbols_fit(const symbols *s, size_t count, unsigned width, int is_gap) {
    if (s->mode == PLANES)
        return !is_gap && s->packed.bytes / width == count && s->packed.bytes % width == 0 && !s->escapes.bytes &&
               !s->wide.bytes;
    if (s->mode > 2) return 0;
    size_t per = 8 / symbol_bits(s->mode);
    return s->packed.bytes == count / per + (count % per != 0);
}

static int streams_fit(const class_streams *from, size_t elements, unsigned width) {
    if (from->count > elements || from->shift > 31) return 0;
    if (!from->count) return 1;
    return from->fields.bytes == field_bytes(from->count, from->shift) &&
           symbols_fit(&from->gaps, from->count, 4, 1) && symbols_fit(&from->steps, from->count, width, 0);
}

typedef struct {
    const uint8_t *escape, *escape_end, *wide, *wide_end;
} escape_reader;

static int read_escape(escape_reader *from, unsigned first, unsigned width, uint64_t *value) {
    if (from->escape == from->escape_end) return WRONG_ESCAPES;
    unsigned rest = *from->escape++;
    *value = first + rest;
    if (rest < 255) return OK;
    if ((size_t)(from->wide_end - from->wide) < width) return WRONG_ESCAPES;
    *value = load_little(from->wide, width);
    from->wide += width;
    return OK;
}

static inline escape_reader escapes_of(const symbols *s) {
    escape_reader reader = {s->escapes.data, s->escapes.data + s->escapes.bytes, s->wide.data,
                            s->wide.data + s->wide.bytes};
    return reader;
}

/* Gaps and wrapped steps of one class whose sizes are checked. `*span` gets the elements up to the last change. */
INLINE int unpack_class_of(
    const class_streams *from, size_t elements, const unsigned width, uint32_t *gaps, uint8_t *steps, uint64_t *span
) {
    const unsigned shift = from->shift, step_width = shift + 1;
    const unsigned gap_bits = symbol_bits(from->gaps.mode), gap_per = 8 / gap_bits, gap_escape = (1u << gap_bits) - 1;
    const unsigned planes = from->steps.mode == PLANES, bits = planes ? 8 : symbol_bits(from->steps.mode);
    const unsigned per = 8 / bits, escape = (1u << bits) - 1, gap_log = 2 - from->gaps.mode;
    const unsigned log = planes ? 0 : 2 - from->steps.mode;
    escape_reader gap_rest = escapes_of(&from->gaps), step_rest = escapes_of(&from->steps);
    uint64_t total = 0, at = 0;
    const uint64_t high_max = (uint64_t)elements >> shift;
    for (size_t n = 0; n < from->count; n++, at += step_width) {
        uint64_t high = from->gaps.packed.data[n >> gap_log] >> (n & (gap_per - 1)) * gap_bits & gap_escape;
        size_t byte = at / 8, left = from->fields.bytes - byte;
        uint64_t field = left >= 8 ? load_little(from->fields.data + byte, 8) : load_little(from->fields.data + byte, left);
        field >>= at % 8;
        if (high == gap_escape && read_escape(&gap_rest, gap_escape, 4, &high)) return WRONG_ESCAPES;
        if (high > high_max) return BEYOND_END;
        uint64_t gap = high << shift | (field & (((uint64_t)1 << shift) - 1));
        if (gap > elements) return BEYOND_END;
        gaps[n] = (uint32_t)gap;
        total += gap + 1;
        uint64_t value;
        if (planes) {
            value = 0;
            for (unsigned plane = 0; plane < width; plane++)
                value |= (uint64_t)from->steps.packed.data[plane * from->count + n] << 8 * plane;
        } else {
            value = from->steps.packed.data[n >> log] >> (n & (per - 1)) * bits & escape;
            if (value == escape && read_escape(&step_rest, escape, width, &value)) return WRONG_ESCAPES;
        }
        uint64_t down = (uint64_t)0 - (field >> shift & 1);
        store_little(steps + n * width, (value ^ down) + 1 + down, width);
    }
    if (gap_rest.escape != gap_rest.escape_end || gap_rest.wide != gap_rest.wide_end) return WRONG_ESCAPES;
    if (!planes && (step_rest.escape != step_rest.escape_end || step_rest.wide != step_rest.wide_end))
        return WRONG_ESCAPES;
    *span = total;
    return total > elements ? BEYOND_END : OK;
}

static int unpack_class(const class_streams *from, size_t elements, unsigned width, uint32_t *gaps, uint8_t *steps,
                        uint64_t *span) {
    switch (width) {
    case 1: return unpack_class_of(from, elements, 1, gaps, steps, span);
    case 2: return unpack_class_of(from, elements, 2, gaps, steps, span);
    case 4: return unpack_class_of(from, elements, 4, gaps, steps, span);
    default: return unpack_class_of(from, elements, 8, gaps, steps, span);
    }
}

#endif
