/* Runs the modules of a pass that repeats the pass before, without a look at their operators.
 *
 * The look at each comes right after a layer has emptied the processor's caches, where a line of Python costs several times
 * what it costs alone. leaps.py does the very same where this is not built.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <structmember.h>

/* Fields of the records of leaps.py and steps.py, in their order. */
enum { LEAP_BEGUN, LEAP_LAST, LEAP_END, LEAP_KNOWN };
enum { BEGUN_MODULE, BEGUN_PLACE, BEGUN_ATTRIBUTES, BEGUN_PARAMETERS, BEGUN_BUFFERS, BEGUN_SOURCE, BEGUN_SHAPE };
enum { STEP_SERIAL = 2, STEP_MET = 4 };
enum { MET_SEEN, MET_PLACE, MET_DTYPE };
enum { SEEN_RECORD };

static PyObject *s_count, *s_serial, *s_shape, *s_forward, *s_parameters, *s_buffers, *s_hooks, *s_pre_hooks, *s_compiled;
static PyObject *s_dtype, *tensor_type, *n_function_modes, *pop_mode, *push_mode, *perf_counter;

/* What a runner holds; what each is stands in leaps.py. */
#define FIELDS(do)                                                                                                     \
    do(known) do(tracked) do(steps) do(taken) do(kinds) do(hooks) do(pre_hooks) do(files) do(mode) do(settled)         \
    do(watched) do(activate) do(passed) do(failed)

typedef struct {
    PyObject_HEAD
#define FIELD(name) PyObject *name;
    FIELDS(FIELD)
#undef FIELD
    PyObject *caller;
    double seconds;
} Runner;

/* Whether these are the values of a dict, in this order. */
static int holds(PyObject *dict, PyObject *values) {
    if (dict == NULL || !PyDict_Check(dict)) return 0;
    const Py_ssize_t n = PyTuple_GET_SIZE(values);
    if (PyDict_GET_SIZE(dict) != n) return 0;
    PyObject *key, *value;
    for (Py_ssize_t at = 0, i = 0; PyDict_Next(dict, &at, &key, &value); i++)
        if (i >= n || value != PyTuple_GET_ITEM(values, i)) return 0;
    return 1;
}

/* Whether a dict of hooks is there and empty. */
static int is_empty(PyObject *hooks) { return hooks != NULL && PyDict_Check(hooks) && PyDict_GET_SIZE(hooks) == 0; }

static PyObject *referent(PyObject *reference) { /* borrowed; it is compared only */
#if PY_VERSION_HEX >= 0x030D0000
    PyObject *object = NULL;
    if (PyWeakref_GetRef(reference, &object) < 0) PyErr_Clear();
    Py_XDECREF(object);
    return object;
#else
    return PyWeakref_GetObject(reference);
#endif
}

/* What is known of a tensor that an operator of this pass made; borrowed, NULL for none. */
static PyObject *look(const Runner *self, PyObject *tensor) {
    PyObject *id = PyLong_FromVoidPtr(tensor);
    PyObject *entry = id == NULL ? NULL : PyDict_GetItemWithError(self->tracked, id);
    Py_XDECREF(id);
    return entry != NULL && referent(PyTuple_GET_ITEM(entry, 0)) == tensor ? PyTuple_GET_ITEM(entry, 1) : NULL;
}

static int learn(const Runner *self, PyObject *tensor, PyObject *known) {
    PyObject *id = PyLong_FromVoidPtr(tensor), *reference = NULL, *entry = NULL;
    int failed = id == NULL;
    if (!failed && known == Py_None) {
        failed = PyDict_GetItemWithError(self->tracked, id) ? PyDict_DelItem(self->tracked, id) : PyErr_Occurred() != NULL;
    } else if (!failed) {
        reference = PyWeakref_NewRef(tensor, NULL);
        entry = reference == NULL ? NULL : PyTuple_Pack(2, reference, known);
        failed = entry == NULL || PyDict_SetItem(self->tracked, id, entry);
    }
    Py_XDECREF(id);
    Py_XDECREF(reference);
    Py_XDECREF(entry);
    return failed ? -1 : 0;
}

static int has_shape(PyObject *tensor, PyObject *shape) {
    PyObject *own = PyObject_GetAttr(tensor, s_shape);
    const int same = own == NULL ? -1 : PyObject_RichCompareBool(own, shape, Py_EQ);
    Py_XDECREF(own);
    return same;
}

/* Whether what a module's way depends on is as it was; `own` is its __dict__. */
static int has_attributes(const Runner *self, PyObject *module, PyObject *own, PyObject *attributes) {
    PyObject *get = PyDict_GetItemWithError(self->kinds, (PyObject *)Py_TYPE(module));
    if (get == NULL) return PyErr_Occurred() ? -1 : 0;
    PyObject *now = PyObject_CallOneArg(get, own);
    if (now == NULL) { /* somebody has taken an attribute away */
        if (!PyErr_ExceptionMatches(PyExc_KeyError)) return -1;
        PyErr_Clear();
        return 0;
    }
    const int same = PyObject_RichCompareBool(now, attributes, Py_EQ);
    Py_DECREF(now);
    return same;
}

static int is_as_made(const Runner *self, PyObject *own) {
    if (!is_empty(PyDict_GetItemWithError(own, s_hooks)) || !is_empty(PyDict_GetItemWithError(own, s_pre_hooks))) return 0;
    if (!is_empty(self->hooks) || !is_empty(self->pre_hooks)) return 0;
    return PyDict_Contains(own, s_forward) == 0 && PyDict_Contains(own, s_compiled) == 0;
}

/* Whether a module begins as it did where the leap was noted; an error may be set where not. */
static int is_same(const Runner *self, PyObject *leap, PyObject *module, PyObject *source) {
    PyObject *begun = PyTuple_GET_ITEM(leap, LEAP_BEGUN);
    if (PyTuple_GET_ITEM(begun, BEGUN_MODULE) != module || PyTuple_GET_ITEM(begun, BEGUN_SOURCE) != look(self, source)) return 0;
    if (has_shape(source, PyTuple_GET_ITEM(begun, BEGUN_SHAPE)) != 1) return 0;
    const Py_ssize_t end = PyLong_AsSsize_t(PyTuple_GET_ITEM(leap, LEAP_END));
    if (end < 1 || end > PyList_GET_SIZE(self->taken)) return 0;
    if (PyList_GET_ITEM(self->taken, end - 1) != PyTuple_GET_ITEM(leap, LEAP_LAST)) return 0;
    PyObject *own = PyObject_GenericGetDict(module, NULL);
    if (own == NULL) return 0;
    const int same = has_attributes(self, module, own, PyTuple_GET_ITEM(begun, BEGUN_ATTRIBUTES)) == 1 &&
                     holds(PyDict_GetItemWithError(own, s_parameters), PyTuple_GET_ITEM(begun, BEGUN_PARAMETERS)) &&
                     holds(PyDict_GetItemWithError(own, s_buffers), PyTuple_GET_ITEM(begun, BEGUN_BUFFERS)) &&
                     is_as_made(self, own);
    Py_DECREF(own);
    return same;
}

/* What a module is going to do, if that is known; NULL where it is not, or on an error. */
static PyObject *find(const Runner *self, PyObject *module, PyObject *source) {
    PyObject *count = PyObject_GetAttr(self->steps, s_count);
    PyObject *leap = count == NULL ? NULL : PyDict_GetItemWithError(self->known, count);
    Py_XDECREF(count);
    if (leap == NULL || (PyObject *)Py_TYPE(source) != tensor_type) return NULL;
    Py_INCREF(leap);
    if (!is_same(self, leap, module, source) || PyErr_Occurred()) Py_CLEAR(leap);
    return leap;
}

/* Go on behind a module that ran unwatched. */
static int land(const Runner *self, PyObject *leap, PyObject *output) {
    PyObject *serial = PyTuple_GET_ITEM(PyTuple_GET_ITEM(leap, LEAP_LAST), STEP_SERIAL);
    if (PyObject_SetAttr(self->steps, s_count, PyTuple_GET_ITEM(leap, LEAP_END))) return -1;
    if (PyObject_SetAttr(self->steps, s_serial, serial)) return -1;
    return learn(self, output, PyTuple_GET_ITEM(leap, LEAP_KNOWN));
}

static int last_instruction(PyFrameObject *frame) {
#if PY_VERSION_HEX >= 0x030B0000
    return PyFrame_GetLasti(frame);
#else
    PyObject *number = PyObject_GetAttrString((PyObject *)frame, "f_lasti");
    const long last = number == NULL ? -1 : PyLong_AsLong(number);
    Py_XDECREF(number);
    if (PyErr_Occurred()) PyErr_Clear();
    return (int)last;
#endif
}

static uint64_t mixed(uint64_t all, uint64_t next) {
    all = (all ^ next) * 0x9E3779B97F4A7C15u;
    return all ^ all >> 29;
}

/* A number for a number and the frames from `caller` to the innermost that is of none of the files: 0, or -1 on an error. */
static int find_place(PyObject *files, Py_ssize_t number, PyObject *caller, Py_ssize_t *place) {
    uint64_t all = mixed(0, (uint64_t)number);
    int is_models = 0;
    PyFrameObject *frame = PyEval_GetFrame();
    Py_XINCREF(frame);
    while (frame != NULL) {
        PyCodeObject *code = PyFrame_GetCode(frame);
        const int is_between = is_models ? 0 : PySet_Contains(files, code->co_filename);
        is_models = is_between == 0;
        if (is_models) all = mixed(mixed(all, (uintptr_t)code), (uint64_t)last_instruction(frame));
        Py_DECREF(code);
        const int is_last = is_between < 0 || (is_models && (PyObject *)frame == caller);
        PyFrameObject *outer = is_last ? NULL : PyFrame_GetBack(frame);
        Py_DECREF(frame);
        if (is_between < 0) return -1;
        frame = outer;
    }
    *place = (Py_ssize_t)all;
    return 0;
}

static const char PLACE_DOC[] =
    "place_of(files, number, caller)\n"
    "--\n\n"
    "Return a number for the frames from `caller` to the innermost that is of none of the files, and a number.";

static PyObject *place_of(PyObject *self, PyObject *const *args, Py_ssize_t n) {
    if (n != 3 || !PyAnySet_Check(args[0])) {
        PyErr_SetString(PyExc_TypeError, "place_of takes a set of files, a number and a frame");
        return NULL;
    }
    const Py_ssize_t number = PyLong_AsSsize_t(args[1]);
    Py_ssize_t place;
    if ((number == -1 && PyErr_Occurred()) || find_place(args[0], number, args[2], &place)) return NULL;
    return PyLong_FromSsize_t(place);
}

/* Whether a module that is an activation can be run as its operator, and be counted as before: 1 or 0, or -1. */
static int may_activate(const Runner *self, PyObject *leap, PyObject *source) {
    PyObject *met = PyTuple_GET_ITEM(PyTuple_GET_ITEM(leap, LEAP_LAST), STEP_MET);
    PyObject *dtype = PyObject_GetAttr(source, s_dtype);
    if (dtype == NULL) return -1;
    Py_DECREF(dtype); /* it is compared only */
    if (dtype != PyTuple_GET_ITEM(met, MET_DTYPE)) return 0;
    PyObject *n = PyObject_CallNoArgs(n_function_modes);
    const long modes = n == NULL ? -1 : PyLong_AsLong(n);
    Py_XDECREF(n);
    if (modes != 0) return modes < 0 ? -1 : 0;
    Py_ssize_t place;
    if (find_place(self->files, 0, self->caller, &place)) return -1;
    const Py_ssize_t before = PyLong_AsSsize_t(PyTuple_GET_ITEM(PyTuple_GET_ITEM(leap, LEAP_BEGUN), BEGUN_PLACE));
    if (before == -1 && PyErr_Occurred()) return -1;
    return place == before;
}

static double now(void) {
    PyObject *time = PyObject_CallNoArgs(perf_counter);
    const double seconds = time == NULL ? 0 : PyFloat_AsDouble(time);
    Py_XDECREF(time);
    return seconds;
}

/* Take the probe's mode off the top of torch's stack: 1, or 0 where there is another one or none, or -1. */
static int take_mode(const Runner *self) {
    PyObject *top = PyObject_CallOneArg(pop_mode, Py_None);
    if (top == NULL) { /* the stack is empty */
        if (!PyErr_ExceptionMatches(PyExc_RuntimeError)) return -1;
        PyErr_Clear();
        return 0;
    }
    const int is_ours = top == self->mode;
    PyObject *done = is_ours ? NULL : PyObject_CallOneArg(push_mode, top); /* somebody else wants to see what runs */
    const int failed = !is_ours && done == NULL;
    Py_XDECREF(done);
    Py_DECREF(top);
    return failed ? -1 : is_ours;
}

/* Put it back, whatever was raised. */
static int put_mode(const Runner *self) {
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    PyObject *done = PyObject_CallOneArg(push_mode, self->mode);
    if (done == NULL) {
        Py_XDECREF(type);
        Py_XDECREF(value);
        Py_XDECREF(traceback);
        return -1;
    }
    Py_DECREF(done);
    PyErr_Restore(type, value, traceback);
    return 0;
}

/* Tell the probe which module raised. */
static void tell_failed(const Runner *self, PyObject *module) {
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    PyObject *done = PyObject_CallOneArg(self->failed, module);
    if (done == NULL) PyErr_Clear();
    Py_XDECREF(done);
    PyErr_Restore(type, value, traceback);
}

static int tell_passed(const Runner *self, PyObject *step, PyObject *source, PyObject *output) {
    PyObject *done = PyObject_CallFunctionObjArgs(self->passed, step, source, output, NULL);
    Py_XDECREF(done);
    return done == NULL;
}

/* Run a module as its leap says, the mode taken off. */
static PyObject *run(Runner *self, PyObject *leap, PyObject *module, PyObject *source, int is_activation) {
    PyObject *output, *step = PyTuple_GET_ITEM(leap, LEAP_LAST);
    int is_passed = 0;
    if (is_activation) {
        PyObject *seen = PyTuple_GET_ITEM(PyTuple_GET_ITEM(step, STEP_MET), MET_SEEN);
        is_passed = PySet_Contains(self->settled, PyTuple_GET_ITEM(seen, SEEN_RECORD));
    }
    const int is_counted = is_activation && !is_passed;
    if (is_passed < 0)
        output = NULL;
    else if (is_counted)
        output = PyObject_CallFunctionObjArgs(self->activate, step, source, NULL);
    else
        output = PyObject_CallMethodOneArg(module, s_forward, source);
    if (output == NULL) tell_failed(self, module);
    if (put_mode(self)) Py_CLEAR(output);
    if (output == NULL || is_counted) return output;
    const double started = now();
    if (land(self, leap, output) || (is_passed && tell_passed(self, step, source, output)))
        Py_CLEAR(output);
    else
        self->seconds += now() - started;
    return output;
}

static PyObject *call(Runner *self, PyObject *args, PyObject *kwargs) {
    PyObject *module, *given, *named;
    if (kwargs != NULL || !PyArg_UnpackTuple(args, "run", 3, 3, &module, &given, &named)) {
        if (kwargs != NULL) PyErr_SetString(PyExc_TypeError, "the call of a module comes as module, args and kwargs");
        return NULL;
    }
    PyObject *leap = NULL;
    if (self->caller != NULL && self->caller != Py_None && PyTuple_GET_SIZE(given) == 1 && PyDict_GET_SIZE(named) == 0) {
        const double started = now();
        leap = find(self, module, PyTuple_GET_ITEM(given, 0));
        if (leap == NULL && PyErr_Occurred()) return NULL;
        self->seconds += now() - started;
    }
    if (leap == NULL) return PyObject_Call(self->watched, args, NULL);
    PyObject *source = PyTuple_GET_ITEM(given, 0), *output = NULL;
    const int is_activation = PyTuple_GET_ITEM(PyTuple_GET_ITEM(leap, LEAP_LAST), STEP_MET) != Py_None;
    int is_to_run = is_activation ? may_activate(self, leap, source) : 1;
    if (is_to_run == 1) is_to_run = take_mode(self);
    if (is_to_run == 1)
        output = run(self, leap, module, source, is_activation);
    else if (is_to_run == 0)
        output = PyObject_Call(self->watched, args, NULL);
    Py_DECREF(leap);
    return output;
}

static int init(Runner *self, PyObject *args, PyObject *kwargs) {
#define OWN(name) PyObject *name;
    FIELDS(OWN)
    if (kwargs != NULL || !PyArg_ParseTuple(args, "O!O!OO!O!OOO!OO!(OOOO)", &PyDict_Type, &known, &PyDict_Type, &tracked, &steps,
                                            &PyList_Type, &taken, &PyDict_Type, &kinds, &hooks, &pre_hooks, &PySet_Type, &files,
                                            &mode, &PySet_Type, &settled, &watched, &activate, &passed, &failed))
        return -1;
#define KEEP(name) Py_XSETREF(self->name, Py_NewRef(name));
    FIELDS(KEEP)
    return 0;
}

static int traverse(Runner *self, visitproc visit, void *arg) {
#define VISIT(name) Py_VISIT(self->name);
    FIELDS(VISIT)
    Py_VISIT(self->caller);
    Py_VISIT(Py_TYPE(self));
    return 0;
}

static int clear(Runner *self) {
#define CLEAR(name) Py_CLEAR(self->name);
    FIELDS(CLEAR)
    Py_CLEAR(self->caller);
    return 0;
}

static void dealloc(Runner *self) {
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    clear(self);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyMemberDef MEMBERS[] = {
    {"caller", T_OBJECT, offsetof(Runner, caller), 0, "The frame that runs the model where modules may run unwatched."},
    {"seconds", T_DOUBLE, offsetof(Runner, seconds), 0, "Time that went into looking up what they do."},
    {NULL, 0, 0, 0, NULL}};

static PyType_Slot SLOTS[] = {{Py_tp_doc, "Runs calls of modules, unwatched where it is known what they do; see leaps.py."},
                              {Py_tp_new, PyType_GenericNew},
                              {Py_tp_init, init},
                              {Py_tp_call, call},
                              {Py_tp_traverse, traverse},
                              {Py_tp_clear, clear},
                              {Py_tp_dealloc, dealloc},
                              {Py_tp_members, MEMBERS},
                              {0, NULL}};
static PyType_Spec SPEC = {"deadcheck._leaping.Runner", sizeof(Runner), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, SLOTS};

static PyMethodDef METHODS[] = {{"place_of", (PyCFunction)(void (*)(void))place_of, METH_FASTCALL, PLACE_DOC},
                                {NULL, NULL, 0, NULL}};
static struct PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, "_leaping", "Modules that run unwatched.", -1,
                                    METHODS, NULL, NULL, NULL, NULL};

/* Set a global to an attribute of a module. */
static int import(const char *from, const char *name, PyObject **to) {
    PyObject *module = PyImport_ImportModule(from);
    *to = module == NULL ? NULL : PyObject_GetAttrString(module, name);
    Py_XDECREF(module);
    return *to == NULL;
}

PyMODINIT_FUNC PyInit__leaping(void) {
    static const struct { PyObject **at; const char *name; } NAMES[] = {
        {&s_count, "count"}, {&s_serial, "serial"}, {&s_shape, "shape"}, {&s_forward, "forward"},
        {&s_parameters, "_parameters"}, {&s_buffers, "_buffers"}, {&s_hooks, "_forward_hooks"},
        {&s_pre_hooks, "_forward_pre_hooks"}, {&s_compiled, "_compiled_call_impl"}, {&s_dtype, "dtype"}};
    for (size_t i = 0; i < sizeof NAMES / sizeof *NAMES; i++)
        if ((*NAMES[i].at = PyUnicode_InternFromString(NAMES[i].name)) == NULL) return NULL;
    if (import("torch", "Tensor", &tensor_type) || import("torch._C", "_len_torch_function_stack", &n_function_modes) ||
        import("torch._C", "_pop_torch_dispatch_stack", &pop_mode) ||
        import("torch._C", "_push_on_torch_dispatch_stack", &push_mode) || import("time", "perf_counter", &perf_counter))
        return NULL;
    PyObject *module = PyModule_Create(&MODULE), *type = PyType_FromSpec(&SPEC);
    if (module == NULL || type == NULL || PyModule_AddObject(module, "Runner", type)) return NULL;
    return module;
}
