/* Damaged streams for the kernels, meant to run under AddressSanitizer and UBSan: kernels_fuzz INPUTS SEED.

   Each input is a valid block, damaged in a few places, in buffers of exactly its size. Every instruction set must give
   the same answer: the same refusal, or the same bytes. Undamaged blocks must come back. */

#include <stdio.h>

#include "_kernels_dispatch.h"

static uint64_t state;

static uint64_t draw(uint64_t below) { /* xorshift */
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state % below;
}

static const unsigned KINDS[] = {1, 2, 4, 8, 1 | 3 << 8, 1 | 2 << 8, 2 | 7 << 8, 2 | 7 << 8, 2 | 10 << 8, 4 | 23 << 8, 8 | 52 << 8};

static view copy_of(const uint8_t *data, size_t bytes) { /* a buffer of its own: one byte too far is found */
    uint8_t *copy = malloc(bytes ? bytes : 1);
    if (bytes) memcpy(copy, data, bytes);
    view result = {copy, bytes};
    return result;
}

static void damage(view *v) {
    uint8_t *data = (uint8_t *)v->data;
    switch (draw(4)) {
    case 0:
        if (v->bytes) v->bytes -= 1 + draw(v->bytes);
        *v = copy_of(data, v->bytes);
        free(data);
        break;
    default:
        for (unsigned n = 0; v->bytes && n < 1 + draw(4); n++) data[draw(v->bytes)] = draw(3) ? (uint8_t)draw(256) : 255;
    }
}

static void take(symbols *to, packed_symbols *from) {
    to->mode = from->mode;
    to->packed = copy_of(from->packed, from->packed_bytes);
    to->escapes = copy_of(from->escapes, from->escape_bytes);
    to->wide = copy_of(from->wide, from->wide_bytes);
    free(from->packed);
}

static void one_input(unsigned long number) {
    unsigned kind = KINDS[draw(sizeof KINDS / sizeof *KINDS)], width = width_of(kind), count = (unsigned)draw(12);
    size_t elements = draw(20) ? 1 + draw(300) : 4000 + draw(9000), bytes = elements * width;
    uint8_t *base = malloc(bytes), *new = malloc(bytes), thresholds[CLASSES_MAX] = {0};
    for (size_t n = 0; n < bytes; n++) base[n] = draw(4) ? (uint8_t)draw(256) : 0x3C;
    memcpy(new, base, bytes);
    for (size_t n = 0, changed = draw(elements / 4 + 2); n < changed; n++) new[draw(bytes)] += (uint8_t)(draw(8) ? 1 : draw(256));
    for (unsigned n = 0, last = draw(2) ? 0 : 110; n < count; n++) thresholds[n] = (uint8_t)(last += 1 + (unsigned)draw(last < 100 ? 9 : 3));
    if (count && thresholds[count - 1] < thresholds[0]) count = 0;

    changes list = {0};
    list.limit = elements, list.width = width;
    unsigned level = 0;
    while (level_runs(level + 1)) level++;
    if (KERNELS_OF[draw(level + 1)].extract(new, base, elements, kind, thresholds, count, &list)) abort();
    class_streams streams[CLASSES_MAX];
    memset(streams, 0, sizeof streams);
    for (unsigned class = 0; class <= count; class++) {
        class_changes *of = &list.of[class];
        class_streams *to = &streams[class];
        uint64_t skipped = 0;
        for (size_t n = 0; n < of->count; n++) skipped += of->gaps[n];
        to->count = of->count;
        if (!of->count) continue;
        to->shift = shift_for(skipped, of->count);
        uint8_t *fields = malloc(field_bytes(of->count, to->shift) + 8);
        packed_symbols gaps, steps;
        pack_fields(of->gaps, of->steps, width, of->count, to->shift, fields);
        if (pack_gaps(of->gaps, of->count, to->shift, &gaps) || pack_steps(of->steps, width, of->count, &steps)) abort();
        to->fields = copy_of(fields, field_bytes(of->count, to->shift));
        free(fields);
        take(&to->gaps, &gaps);
        take(&to->steps, &steps);
    }
    free_changes(&list);

    int damaged = draw(8) != 0;
    for (unsigned n = 0, times = damaged ? 1 + (unsigned)draw(3) : 0; n < times; n++) {
        class_streams *to = &streams[draw(count + 1)];
        view *views[] = {&to->fields, &to->gaps.packed, &to->gaps.escapes, &to->gaps.wide, &to->steps.packed, &to->steps.escapes, &to->steps.wide};
        switch (draw(12)) {
        case 0: to->count = draw(3) ? draw(elements + 2) : (size_t)0 - draw(9); break;
        case 1: to->shift = (unsigned)draw(40); break;
        case 2: to->gaps.mode = (unsigned)draw(6); break;
        case 3: to->steps.mode = (unsigned)draw(6); break;
        default: {
            view *chosen = views[draw(7)];
            if (!chosen->data) *chosen = copy_of(NULL, 0);
            damage(chosen);
        }
        }
    }

    uint8_t *first = malloc(bytes), *out = malloc(bytes);
    int answer = 0;
    for (level = 0; level_runs(level); level++) {
        int in_place = (int)draw(2);
        if (in_place) memcpy(out, base, bytes);
        int refused = apply_streams(&KERNELS_OF[level], out, in_place ? out : base, elements, kind, thresholds, count, streams);
        if (level == 0) {
            answer = refused;
            memcpy(first, out, bytes);
        }
        if (refused != answer || (!refused && memcmp(first, out, bytes))) {
            fprintf(stderr, "input %lu: %s answers %d, scalar %d\n", number, KERNELS_OF[level].name, refused, answer);
            abort();
        }
        if (!damaged && (refused || memcmp(out, new, bytes))) {
            fprintf(stderr, "input %lu: an undamaged block does not come back (%d)\n", number, refused);
            abort();
        }
        for (unsigned how = 0; how < 3; how++) {
            const uint8_t *planes[8];
            KERNELS_OF[level].to_planes(new, base, out, elements, how, kind);
            for (unsigned plane = 0; plane < width; plane++) planes[plane] = out + plane * elements;
            uint8_t *back = malloc(bytes);
            memcpy(back, base, bytes);
            KERNELS_OF[level].from_planes(planes, back, back, elements, how, kind);
            if (memcmp(back, new, bytes)) abort();
            free(back);
        }
    }
    if (first_difference(new, base, bytes) > bytes) abort();
    for (unsigned class = 0; class <= count; class++) {
        class_streams *of = &streams[class];
        const view views[] = {of->fields, of->gaps.packed, of->gaps.escapes, of->gaps.wide, of->steps.packed, of->steps.escapes, of->steps.wide};
        for (unsigned n = 0; n < 7; n++) free((void *)views[n].data);
    }
    free(base), free(new), free(first), free(out);
}

/* Leaves in a buffer of exactly their size: every level gives the same digests. */
static void leaves_agree(void) {
    const size_t count = 3, bytes = count * LEAF;
    uint8_t *data = malloc(bytes), *first = malloc(count * LEAF_DIGEST), *digests = malloc(count * LEAF_DIGEST);
    for (size_t n = 0; n < bytes; n++) data[n] = (uint8_t)draw(256);
    for (unsigned level = 0; level_runs(level); level++) {
        KERNELS_OF[level].leaves(data, count, level ? digests : first);
        if (level && memcmp(first, digests, count * LEAF_DIGEST)) abort();
    }
    free(data), free(first), free(digests);
}

int main(int argc, char **argv) {
    unsigned long inputs = argc > 1 ? strtoul(argv[1], NULL, 10) : 20000;
    state = 0x9E3779B97F4A7C15u + (argc > 2 ? strtoull(argv[2], NULL, 10) : 0);
    for (unsigned long number = 0; number < inputs; number++) one_input(number);
    leaves_agree();
    unsigned level = 0;
    while (level_runs(level + 1)) level++;
    printf("%lu inputs, up to %s\n", inputs, KERNELS_OF[level].name);
    return 0;
}
