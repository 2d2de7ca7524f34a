/* refleet.common._kernels: the codec kernels for Python, optional; kernels_numpy.py is their reference.

   Limited API, buffer protocol only. Sizes of all buffers are checked here, contents in _kernels_core.h. The interpreter
   lock is released while kernels run, so a caller must not resize or change its buffers meanwhile. */

#define PY_SSIZE_T_CLEAN
#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030B0000
#endif
#include <Python.h>

#include "_kernels_dispatch.h"

static const kernels *chosen(unsigned level) {
    if (level_runs(level)) return &KERNELS_OF[level];
    PyErr_SetString(PyExc_ValueError, "this machine does not run kernels of that level");
    return NULL;
}

static int sizes_agree(const Py_buffer *one, const Py_buffer *other, unsigned kind) {
    if (kind_is_known(kind) && one->len == other->len && one->len % width_of(kind) == 0 && one->len < (Py_ssize_t)1 << 31)
        return 1;
    PyErr_SetString(PyExc_ValueError, "blocks of different or impossible sizes");
    return 0;
}

static PyObject *levels(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    PyObject *names = PyList_New(0);
    for (unsigned level = 0; names && level_runs(level); level++) {
        PyObject *name = PyUnicode_FromString(KERNELS_OF[level].name);
        if (!name || PyList_Append(names, name)) Py_CLEAR(names);
        Py_XDECREF(name);
    }
    return names;
}

static PyObject *py_first_difference(PyObject *self, PyObject *args) {
    Py_buffer one, other;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*y*", &one, &other)) return NULL;
    size_t bytes = (size_t)(one.len < other.len ? one.len : other.len), at;
    Py_BEGIN_ALLOW_THREADS
    at = first_difference(one.buf, other.buf, bytes);
    Py_END_ALLOW_THREADS
    int same = at == bytes && one.len == other.len;
    PyBuffer_Release(&one);
    PyBuffer_Release(&other);
    return PyLong_FromSsize_t(same ? -1 : (Py_ssize_t)at);
}

static PyObject *py_sample(PyObject *self, PyObject *args) {
    unsigned level, kind;
    Py_buffer new, base;
    Py_ssize_t pieces, piece, stride;
    PyObject *result = NULL;
    (void)self;
    if (!PyArg_ParseTuple(args, "Iy*y*Innn", &level, &new, &base, &kind, &pieces, &piece, &stride)) return NULL;
    const kernels *with = chosen(level);
    if (with && sizes_agree(&new, &base, kind)) {
        Py_ssize_t elements = new.len / (Py_ssize_t)width_of(kind);
        if (pieces < 1 || piece < 0 || stride < 0 || piece > elements || pieces > 1 << 20 || stride > elements ||
            (pieces - 1) * stride + piece > elements) {
            PyErr_SetString(PyExc_ValueError, "samples beyond the block");
        } else {
            uint32_t counts[2 * KEYS] = {0};
            Py_BEGIN_ALLOW_THREADS
            with->sample(new.buf, base.buf, (size_t)pieces, (size_t)piece, (size_t)stride, kind, counts, counts + KEYS);
            Py_END_ALLOW_THREADS
            result = PyBytes_FromStringAndSize((const char *)counts, sizeof counts);
        }
    }
    PyBuffer_Release(&new);
    PyBuffer_Release(&base);
    return result;
}

/* extract: one class's packed streams, made without the interpreter lock, then turned into Python objects */

typedef struct {
    size_t count;
    unsigned shift;
    uint8_t *fields;
    packed_symbols gaps, steps;
} packed_class;

static int pack_class(class_changes *list, unsigned width, packed_class *out) {
    size_t count = out->count = list->count;
    if (!count) return OK;
    uint64_t skipped = 0;
    for (size_t n = 0; n < count; n++) skipped += list->gaps[n];
    out->shift = shift_for(skipped, count);
    if (!(out->fields = malloc(field_bytes(count, out->shift) + 8))) return NO_MEMORY;
    switch (width) { /* constant widths: plain loads and stores */
    case 1: pack_fields(list->gaps, list->steps, 1, count, out->shift, out->fields); break;
    case 2: pack_fields(list->gaps, list->steps, 2, count, out->shift, out->fields); break;
    case 4: pack_fields(list->gaps, list->steps, 4, count, out->shift, out->fields); break;
    default: pack_fields(list->gaps, list->steps, 8, count, out->shift, out->fields);
    }
    int refused = pack_gaps(list->gaps, count, out->shift, &out->gaps);
    return refused ? refused : pack_steps(list->steps, width, count, &out->steps);
}

static PyObject *symbols_object(const packed_symbols *s) {
    return Py_BuildValue("(Iy#y#y#)", s->mode, s->packed ? (const char *)s->packed : "", (Py_ssize_t)s->packed_bytes,
                         s->escapes ? (const char *)s->escapes : "", (Py_ssize_t)s->escape_bytes,
                         s->wide ? (const char *)s->wide : "", (Py_ssize_t)s->wide_bytes);
}

static PyObject *class_object(const packed_class *from) {
    PyObject *gaps = symbols_object(&from->gaps), *steps = gaps ? symbols_object(&from->steps) : NULL, *result = NULL;
    if (gaps && steps)
        result = Py_BuildValue("(nIy#OO)", (Py_ssize_t)from->count, from->shift,
                               from->fields ? (const char *)from->fields : "",
                               (Py_ssize_t)(from->fields ? field_bytes(from->count, from->shift) : 0), gaps, steps);
    Py_XDECREF(gaps);
    Py_XDECREF(steps);
    return result;
}

static PyObject *py_extract(PyObject *self, PyObject *args) {
    unsigned level, kind;
    Py_buffer new, base, thresholds;
    Py_ssize_t limit;
    PyObject *result = NULL;
    (void)self;
    if (!PyArg_ParseTuple(args, "Iy*y*Iy*n", &level, &new, &base, &kind, &thresholds, &limit)) return NULL;
    const kernels *with = chosen(level);
    if (!with || !sizes_agree(&new, &base, kind)) goto done;
    if (!thresholds_rise(thresholds.buf, (size_t)thresholds.len) || limit < 0) {
        PyErr_SetString(PyExc_ValueError, "thresholds do not rise, or a negative count");
        goto done;
    }
    unsigned width = width_of(kind), count = (unsigned)thresholds.len;
    size_t elements = (size_t)new.len / width;
    changes list = {0};
    packed_class classes[CLASSES_MAX] = {{0}};
    int refused;
    Py_BEGIN_ALLOW_THREADS
    list.limit = (size_t)limit;
    list.width = width;
    refused = with->extract(new.buf, base.buf, elements, kind, thresholds.buf, count, &list);
    for (unsigned class = 0; class <= count && !refused; class++)
        refused = pack_class(&list.of[class], width, &classes[class]);
    free_changes(&list);
    Py_END_ALLOW_THREADS
    if (refused == TOO_MANY) {
        Py_INCREF(Py_None);
        result = Py_None;
    } else if (refused) {
        PyErr_NoMemory();
    } else if ((result = PyList_New(0))) {
        for (unsigned class = 0; class <= count && result; class++) {
            PyObject *item = class_object(&classes[class]);
            if (!item || PyList_Append(result, item)) Py_CLEAR(result);
            Py_XDECREF(item);
        }
    }
    for (unsigned class = 0; class < CLASSES_MAX; class++) {
        free(classes[class].fields);
        free(classes[class].gaps.packed);
        free(classes[class].steps.packed);
    }
done:
    PyBuffer_Release(&new);
    PyBuffer_Release(&base);
    PyBuffer_Release(&thresholds);
    return result;
}

/* apply */

#define VIEWS_MAX (7 * CLASSES_MAX)

static int take_view(Py_buffer *held, int *used, view *to) {
    to->data = held[*used].buf;
    to->bytes = (size_t)held[*used].len;
    return ++*used;
}

static int parse_class(PyObject *item, class_streams *to, Py_buffer *held, int *used) {
    Py_ssize_t count;
    int at = *used;
    if (!PyTuple_Check(item)) {
        PyErr_SetString(PyExc_TypeError, "a class is a tuple");
        return 0;
    }
    if (!PyArg_ParseTuple(item, "nIy*(Iy*y*y*)(Iy*y*y*)", &count, &to->shift, &held[at], &to->gaps.mode, &held[at + 1],
                          &held[at + 2], &held[at + 3], &to->steps.mode, &held[at + 4], &held[at + 5], &held[at + 6]))
        return 0;
    to->count = (size_t)count; /* a negative one is larger than any block */
    take_view(held, used, &to->fields);
    take_view(held, used, &to->gaps.packed);
    take_view(held, used, &to->gaps.escapes);
    take_view(held, used, &to->gaps.wide);
    take_view(held, used, &to->steps.packed);
    take_view(held, used, &to->steps.escapes);
    take_view(held, used, &to->steps.wide);
    return 1;
}

static PyObject *py_apply(PyObject *self, PyObject *args) {
    unsigned level, kind;
    Py_buffer out, base, thresholds, held[VIEWS_MAX];
    PyObject *items, *result = NULL;
    class_streams streams[CLASSES_MAX];
    int used = 0, refused = OK;
    (void)self;
    if (!PyArg_ParseTuple(args, "Iw*y*Iy*O", &level, &out, &base, &kind, &thresholds, &items)) return NULL;
    const kernels *with = chosen(level);
    if (!with || !sizes_agree(&out, &base, kind)) goto done;
    if (!PyList_Check(items) || !thresholds_rise(thresholds.buf, (size_t)thresholds.len) ||
        PyList_Size(items) != thresholds.len + 1) {
        PyErr_SetString(PyExc_ValueError, "thresholds do not rise, or another number of classes");
        goto done;
    }
    for (Py_ssize_t n = 0; n <= thresholds.len; n++)
        if (!parse_class(PyList_GetItem(items, n), &streams[n], held, &used)) goto done;
    Py_BEGIN_ALLOW_THREADS
    refused = apply_streams(with, out.buf, base.buf, (size_t)out.len / width_of(kind), kind, thresholds.buf,
                            (unsigned)thresholds.len, streams);
    Py_END_ALLOW_THREADS
    result = refused == NO_MEMORY ? PyErr_NoMemory() : PyLong_FromLong(refused);
done:
    while (used) PyBuffer_Release(&held[--used]);
    PyBuffer_Release(&out);
    PyBuffer_Release(&base);
    PyBuffer_Release(&thresholds);
    return result;
}

static PyObject *py_to_planes(PyObject *self, PyObject *args) {
    unsigned level, kind, how;
    Py_buffer new, base, planes;
    int ok = 0;
    (void)self;
    if (!PyArg_ParseTuple(args, "Iy*y*w*II", &level, &new, &base, &planes, &how, &kind)) return NULL;
    const kernels *with = chosen(level);
    if (with && sizes_agree(&new, &base, kind) && sizes_agree(&new, &planes, kind)) {
        Py_BEGIN_ALLOW_THREADS
        with->to_planes(new.buf, base.buf, planes.buf, (size_t)new.len / width_of(kind), how, kind);
        Py_END_ALLOW_THREADS
        ok = 1;
    }
    PyBuffer_Release(&new);
    PyBuffer_Release(&base);
    PyBuffer_Release(&planes);
    if (!ok) return NULL;
    Py_INCREF(Py_None);
    return Py_None;
}

static PyObject *py_from_planes(PyObject *self, PyObject *args) {
    unsigned level, kind, how;
    Py_buffer base, out, held[8];
    PyObject *items;
    Py_ssize_t taken = 0;
    int ok = 0;
    (void)self;
    if (!PyArg_ParseTuple(args, "IOy*w*II", &level, &items, &base, &out, &how, &kind)) return NULL;
    const kernels *with = chosen(level);
    if (!with || !sizes_agree(&out, &base, kind)) goto done;
    unsigned width = width_of(kind);
    size_t elements = (size_t)out.len / width;
    const uint8_t *planes[8];
    if (!PyList_Check(items) || PyList_Size(items) != (Py_ssize_t)width) {
        PyErr_SetString(PyExc_ValueError, "another number of planes");
        goto done;
    }
    for (; taken < (Py_ssize_t)width; taken++) {
        if (PyObject_GetBuffer(PyList_GetItem(items, taken), &held[taken], PyBUF_SIMPLE)) goto done;
        planes[taken] = held[taken].buf;
        if ((size_t)held[taken].len != elements) {
            taken++;
            PyErr_SetString(PyExc_ValueError, "a plane of another size");
            goto done;
        }
    }
    Py_BEGIN_ALLOW_THREADS
    with->from_planes(planes, base.buf, out.buf, elements, how, kind);
    Py_END_ALLOW_THREADS
    ok = 1;
done:
    while (taken) PyBuffer_Release(&held[--taken]);
    PyBuffer_Release(&base);
    PyBuffer_Release(&out);
    if (!ok) return NULL;
    Py_INCREF(Py_None);
    return Py_None;
}

static PyObject *py_leaves(PyObject *self, PyObject *args) {
    unsigned level;
    Py_buffer data;
    PyObject *result = NULL;
    (void)self;
    if (!PyArg_ParseTuple(args, "Iy*", &level, &data)) return NULL;
    const kernels *with = chosen(level);
    if (with && data.len % (Py_ssize_t)LEAF) PyErr_SetString(PyExc_ValueError, "no whole number of leaves of 64 KiB");
    else if (with) result = PyBytes_FromStringAndSize(NULL, data.len / (Py_ssize_t)LEAF * LEAF_DIGEST);
    if (result) {
        uint8_t *digests = (uint8_t *)PyBytes_AsString(result); /* nobody else has this object yet */
        Py_BEGIN_ALLOW_THREADS
        with->leaves(data.buf, (size_t)data.len / LEAF, digests);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&data);
    return result;
}

static PyMethodDef METHODS[] = {
    {"levels", levels, METH_NOARGS, "Names of the kernels that this machine runs; the index is the level."},
    {"first_difference", py_first_difference, METH_VARARGS, "(one, other) -> index of the first byte that differs, or -1."},
    {"sample", py_sample, METH_VARARGS, "(level, new, base, kind, pieces, piece, stride) -> 2 x 256 counts, native u32."},
    {"extract", py_extract, METH_VARARGS,
     "(level, new, base, kind, thresholds, limit) -> streams of each class; None: more than limit changed."},
    {"apply", py_apply, METH_VARARGS, "(level, out, base, kind, thresholds, classes) -> 0, or why the bytes are refused."},
    {"to_planes", py_to_planes, METH_VARARGS, "(level, new, base, planes, how, kind): fills `planes`."},
    {"from_planes", py_from_planes, METH_VARARGS, "(level, planes, base, out, how, kind): fills `out`."},
    {"leaves", py_leaves, METH_VARARGS, "(level, data) -> XXH3-128 of each 64 KiB, 16 bytes each."},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot SLOTS[] = {{0, NULL}};

static PyModuleDef MODULE = {
    PyModuleDef_HEAD_INIT, "_kernels", "The codec kernels in C. Use refleet.common.kernels.", 0, METHODS, SLOTS, NULL,
    NULL, NULL,
};

PyMODINIT_FUNC PyInit__kernels(void) { return PyModuleDef_Init(&MODULE); }
