/* Runs the modules of a pass that repeats the pass before, without a look at their operators.
 *
 * The look at each comes right after a layer has emptied the processor's caches, where a line of Python costs several times
 * what it costs alone. leaps.py does the very same where this is not built.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

/* Fields of the records of leaps.py and steps.py, in their order. */
enum { LEAP_BEGUN, LEAP_LAST, LEAP_END, LEAP_KNOWN };
enum { BEGUN_MODULE, BEGUN_PLACE, BEGUN_ATTRIBUTES, BEGUN_PARAMETERS, BEGUN_BUFFERS, BEGUN_SOURCE, BEGUN_SHAPE };
enum { STEP_SERIAL = 2, STEP_MET = 4 };

static PyObject *s_count, *s_serial, *s_shape, *s_forward, *s_parameters, *s_buffers, *s_hooks, *s_pre_hooks, *s_compiled;
static PyObject *tensor_type, *n_modes, *pop_mode, *push_mode, *perf_counter;

/* What a runner holds; what each is stands in leaps.py. */
#define FIELDS(do)                                                                                                     \
    do(known) do(tracked) do(steps) do(taken) do(kinds) do(hooks) do(pre_hooks) do(mode) do(watched) do(may)           \
    do(activate) do(failed)

typedef struct {
    PyObject_HEAD
#define FIELD(name) PyObject *name;
    FIELDS(FIELD)
#undef FIELD
    char is_open;
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

static double now(void) {
    PyObject *time = PyObject_CallNoArgs(perf_counter);
    const double seconds = time == NULL ? 0 : PyFloat_AsDouble(time);
    Py_XDECREF(time);
    return seconds;
}

/* Take the probe's mode off the top of torch's stack: 1, or 0 where there is another one or none, or -1. */
static int take_mode(const Runner *self) {
    PyObject *n = PyObject_CallNoArgs(n_modes);
    const long modes = n == NULL ? -1 : PyLong_AsLong(n);
    Py_XDECREF(n);
    if (modes < 1) return modes < 0 ? -1 : 0;
    PyObject *top = PyObject_CallOneArg(pop_mode, Py_None);
    if (top == NULL) return -1;
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

/* Run a module as its leap says, the mode taken off. */
static PyObject *run(Runner *self, PyObject *leap, PyObject *module, PyObject *source, int is_activation) {
    PyObject *output;
    if (is_activation)
        output = PyObject_CallFunctionObjArgs(self->activate, leap, source, NULL);
    else
        output = PyObject_CallMethodOneArg(module, s_forward, source);
    if (output == NULL) tell_failed(self, module);
    if (put_mode(self)) Py_CLEAR(output);
    if (output == NULL || is_activation) return output;
    const double started = now();
    if (land(self, leap, output))
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
    if (self->is_open && PyTuple_GET_SIZE(given) == 1 && PyDict_GET_SIZE(named) == 0) {
        const double started = now();
        leap = find(self, module, PyTuple_GET_ITEM(given, 0));
        if (leap == NULL && PyErr_Occurred()) return NULL;
        self->seconds += now() - started;
    }
    if (leap == NULL) return PyObject_Call(self->watched, args, NULL);
    PyObject *source = PyTuple_GET_ITEM(given, 0), *output = NULL;
    const int is_activation = PyTuple_GET_ITEM(PyTuple_GET_ITEM(leap, LEAP_LAST), STEP_MET) != Py_None;
    int is_to_run = 1;
    if (is_activation) {
        PyObject *may = PyObject_CallFunctionObjArgs(self->may, leap, source, NULL);
        is_to_run = may == NULL ? -1 : PyObject_IsTrue(may);
        Py_XDECREF(may);
    }
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
    if (kwargs != NULL || !PyArg_ParseTuple(args, "O!O!OO!O!OOO(OOOO)", &PyDict_Type, &known, &PyDict_Type, &tracked, &steps,
                                            &PyList_Type, &taken, &PyDict_Type, &kinds, &hooks, &pre_hooks, &mode, &watched,
                                            &may, &activate, &failed))
        return -1;
#define KEEP(name) Py_XSETREF(self->name, Py_NewRef(name));
    FIELDS(KEEP)
    return 0;
}

static int traverse(Runner *self, visitproc visit, void *arg) {
#define VISIT(name) Py_VISIT(self->name);
    FIELDS(VISIT)
    Py_VISIT(Py_TYPE(self));
    return 0;
}

static int clear(Runner *self) {
#define CLEAR(name) Py_CLEAR(self->name);
    FIELDS(CLEAR)
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
    {"is_open", T_BOOL, offsetof(Runner, is_open), 0, "Whether a pass runs whose modules may run unwatched."},
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

static struct PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, "_leaping", "Modules that run unwatched.", -1,
                                    NULL, NULL, NULL, NULL, NULL};

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
        {&s_pre_hooks, "_forward_pre_hooks"}, {&s_compiled, "_compiled_call_impl"}};
    for (size_t i = 0; i < sizeof NAMES / sizeof *NAMES; i++)
        if ((*NAMES[i].at = PyUnicode_InternFromString(NAMES[i].name)) == NULL) return NULL;
    if (import("torch", "Tensor", &tensor_type) || import("torch._C", "_len_torch_dispatch_stack", &n_modes) ||
        import("torch._C", "_pop_torch_dispatch_stack", &pop_mode) ||
        import("torch._C", "_push_on_torch_dispatch_stack", &push_mode) || import("time", "perf_counter", &perf_counter))
        return NULL;
    PyObject *module = PyModule_Create(&MODULE), *type = PyType_FromSpec(&SPEC);
    if (module == NULL || type == NULL || PyModule_AddObject(module, "Runner", type)) return NULL;
    return module;
}
