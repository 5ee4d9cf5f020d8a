// `qkernels.native._native`: addresses and sizes in, nothing checked; the Python side has done that.
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include "driver.h"

namespace {

struct Isa {
  const char* name;
  const qk::Ops* (*ops)();
  bool offered;  // the emulation is for tests, and is used only by name
};

// best first
constexpr int ISAS = 5;
const Isa isas[ISAS] = {
    {"amx", qk::amx_ops, true},           {"avx512-vnni", qk::avx512_ops, true},         {"avx2", qk::avx2_ops, true},
    {"portable", qk::portable_ops, true}, {"amx-emulated", qk::amx_emulated_ops, false},
};

bool read(PyObject* const* args, int64_t* to, Py_ssize_t count) {
  for (Py_ssize_t i = 0; i < count; i++) {
    to[i] = PyLong_AsLongLong(args[i]);
    if (to[i] == -1 && PyErr_Occurred()) return false;
  }
  return true;
}

PyObject* finish(qk::Status status) {
  if (status == qk::NO_MEMORY) return PyErr_NoMemory();
  return PyLong_FromLong(status);
}

const qk::Ops* ops_of(int64_t index) {
  const qk::Ops* ops = index >= 0 && index < ISAS ? isas[index].ops() : nullptr;
  if (!ops) PyErr_Format(PyExc_ValueError, "instruction set %lld does not run here", (long long)index);
  return ops;
}

PyObject* available(PyObject*, PyObject*) {
  PyObject* found = PyList_New(0);
  for (int i = 0; found && i < ISAS; i++) {
    if (!isas[i].ops()) continue;
    PyObject* entry = Py_BuildValue("(siO)", isas[i].name, i, isas[i].offered ? Py_True : Py_False);
    if (!entry || PyList_Append(found, entry)) return nullptr;
    Py_DECREF(entry);
  }
  return found;
}

PyObject* use_openmp_of(PyObject*, PyObject* path) {
  PyObject* bytes = PyUnicode_AsUTF8String(path);
  if (!bytes) return nullptr;
  bool found = qk::use_openmp_of(PyBytes_AsString(bytes));
  Py_DECREF(bytes);
  return PyBool_FromLong(found);
}

// (isa, int8 inputs?, x, x type, T, codes, scale, scale type, shift, N, K, group, bits, y, y type, threads, static scale's address or 0) → status
PyObject* linear(PyObject*, PyObject* const* args, Py_ssize_t count) {
  int64_t a[17];
  if (count != 17) return PyErr_Format(PyExc_TypeError, "17 numbers expected, got %zd", count);
  if (!read(args, a, 17)) return nullptr;
  qk::Call call = {};
  if (!(call.ops = ops_of(a[0]))) return nullptr;
  call.x = (const void*)a[2], call.x_type = (int)a[3], call.t = a[4];
  call.weight = {(const uint8_t*)a[5], (const void*)a[6], (const float*)a[8], a[9], a[10], a[11], 0, (int)a[12], (int)a[7]};
  call.out = {(void*)a[13], (int)a[14]};
  call.threads = (int)a[15];
  call.static_scale = a[16] ? *(const float*)a[16] : 0;
  PyThreadState* state = PyEval_SaveThread();
  qk::Status status = a[1] ? qk::int8_call(call) : qk::float_call(call);
  PyEval_RestoreThread(state);
  return finish(status);
}

// (isa, x, x type, T, K, static scale's address or 0, codes, scale, threads) → status
PyObject* quantize(PyObject*, PyObject* const* args, Py_ssize_t count) {
  int64_t a[9];
  if (count != 9) return PyErr_Format(PyExc_TypeError, "9 numbers expected, got %zd", count);
  if (!read(args, a, 9)) return nullptr;
  const qk::Ops* ops = ops_of(a[0]);
  if (!ops) return nullptr;
  PyThreadState* state = PyEval_SaveThread();
  qk::Status status = qk::quantize_call(ops, (const void*)a[1], (int)a[2], a[3], a[4], a[5] ? *(const float*)a[5] : 0, (int8_t*)a[6], (float*)a[7], (int)a[8]);
  PyEval_RestoreThread(state);
  return finish(status);
}

PyMethodDef methods[] = {
    {"available", available, METH_NOARGS, "[(name, index, offered)], best first"},
    {"use_openmp_of", use_openmp_of, METH_O, "take threads from the OpenMP library that this loaded library uses"},
    {"linear", (PyCFunction)(void (*)(void))linear, METH_FASTCALL, nullptr},
    {"quantize", (PyCFunction)(void (*)(void))quantize, METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__native() { return PyModule_Create(&definition); }
