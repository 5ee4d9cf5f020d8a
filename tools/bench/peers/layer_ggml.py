"""ggml's product of a quantized weight with float32 inputs (it rounds them to 8 bits itself), through its C interface.

The library comes from a folder with libggml-base.so and libggml-cpu.so: the one in QCORE_GGML, or that of `llama-cpp-python` or `libggml-python` on
the path.  `make_env.sh ggml FOLDER` builds the first for the processor at hand; the wheel of the second on PyPI is built for AVX2.
"""

import ctypes
import importlib.util
import os
from collections.abc import Callable
from ctypes import CDLL, POINTER, Structure, byref, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch

TYPES = {"Q4_0": (2, 32), "Q4_K": (12, 256)}  # number of the type, and what K has to be a multiple of
F32 = 0
CONTEXT = 1 << 20  # bytes for the records of tensors and graphs


class InitParams(Structure):
    _fields_ = [("size", c_size_t), ("buffer", c_void_p), ("no_alloc", c_bool)]


class Plan(Structure):
    # what newer versions have at the end fits into the reserve
    _fields_ = [("work_size", c_size_t), ("work", c_void_p), ("threads", c_int), ("rest", c_void_p * 12)]


def folder() -> Path | None:
    if "QCORE_GGML" in os.environ:
        return Path(os.environ["QCORE_GGML"])
    for package in ("llama_cpp", "libggml"):
        spec = importlib.util.find_spec(package)
        for root in (spec.submodule_search_locations or []) if spec else []:
            for library in Path(root).glob("**/libggml-cpu.so"):
                return library.parent
    return None


@cache
def _library() -> Any:
    where = folder()
    if where is None:
        raise ModuleNotFoundError("no libggml-cpu.so: make_env.sh ggml FOLDER makes one, QCORE_GGML names its folder")
    pointers = ("init", "new_tensor_2d", "mul_mat", "new_graph", "get_data", "backend_alloc_ctx_tensors_from_buft", "backend_cpu_buffer_type")
    pointers += ("backend_cpu_reg", "backend_reg_dev_get", "backend_reg_get_proc_address")
    libraries = [CDLL(str(where / name), mode=ctypes.RTLD_GLOBAL) for name in ("libggml-base.so", "libggml-cpu.so")]

    class Functions:
        def __getattr__(self, name: str) -> Any:
            full = "ggml_" + name
            function = next(getattr(lib, full) for lib in libraries if hasattr(lib, full))
            if name in pointers:
                function.restype = c_void_p
            setattr(self, name, function)
            return function

    own = Functions()
    own.init.argtypes = [InitParams]
    own.new_tensor_2d.argtypes = [c_void_p, c_int, c_int64, c_int64]
    own.mul_mat.argtypes = [c_void_p] * 3
    own.backend_reg_get_proc_address.argtypes = [c_void_p, c_char_p]
    own.backend_reg_dev_get.argtypes = [c_void_p, c_size_t]
    own.row_size.argtypes, own.row_size.restype = [c_int, c_int64], c_size_t
    own.quantize_chunk.argtypes, own.quantize_chunk.restype = [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p], c_size_t
    own.backend_tensor_set.argtypes = [c_void_p, c_void_p, c_size_t, c_size_t]
    own.graph_plan.argtypes, own.graph_plan.restype = [c_void_p, c_int, c_void_p], Plan
    own.graph_compute.argtypes = [c_void_p, POINTER(Plan)]
    for name in ("new_graph", "get_data", "free"):
        getattr(own, name).argtypes = [c_void_p]
    own.build_forward_expand.argtypes = own.backend_alloc_ctx_tensors_from_buft.argtypes = [c_void_p, c_void_p]
    own.cpu_init()
    return own


def repacked_buffers() -> list[int]:
    """The buffer types in which ggml lays some quantized weights out anew, for this processor."""
    lib = _library()
    reg = lib.backend_cpu_reg()
    get = lib.backend_reg_get_proc_address(reg, b"ggml_backend_dev_get_extra_bufts")
    if not get:
        return []
    found = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(get)(lib.backend_reg_dev_get(reg, 0))
    buffers = []
    while found and found[len(buffers)]:
        buffers.append(found[len(buffers)])
    return buffers


def bytes_of(kind: str, n: int, k: int) -> int:
    size: int = _library().row_size(TYPES[kind][0], k) * n
    return size


def version() -> str:
    """ggml's own number, and which of the instructions that matter here it was built with."""
    lib = _library()
    lib.version.restype = c_char_p
    built = [name for name in ("avx2", "avx512", "avx512_vnni", "amx_int8") if getattr(lib, f"cpu_has_{name}")()]
    return f"{lib.version().decode()} ({', '.join(built)})"


def missing(kind: str, k: int) -> str | None:
    """Why ggml does not run it; None where it does."""
    try:
        _library()
    except (ModuleNotFoundError, OSError) as e:
        return str(e)
    multiple = TYPES[kind][1]
    return f"{kind} needs K to be a multiple of {multiple}, got {k}" if k % multiple else None


def matmul(kind: str, weight: torch.Tensor, x: torch.Tensor, threads: int, *, repack: bool) -> Callable[[], torch.Tensor]:
    """A call that computes x Ŵᵀ.

    weight: [N, K] float32, quantized here by ggml's own rounding
    x:      [T, K] float32
    repack: keep the weight in ggml's own layout for this processor, where it has one (RuntimeError where not)
    return: a view of the result [T, N] float32, which the next call overwrites
    """
    lib, (number, _), (n, k) = _library(), TYPES[kind], weight.shape
    records = lib.init(InitParams(CONTEXT, None, True))
    w = lib.new_tensor_2d(records, number, k, n)
    buffers = repacked_buffers()[-1:] if repack else [lib.backend_cpu_buffer_type()]
    if not buffers or not lib.backend_alloc_ctx_tensors_from_buft(records, buffers[0]):
        raise RuntimeError(f"ggml has no other layout for {kind}")
    quantized = torch.empty(bytes_of(kind, n, k), dtype=torch.uint8)
    weight = weight.float().contiguous()
    lib.quantize_chunk(number, weight.data_ptr(), quantized.data_ptr(), 0, n, k, None)
    lib.backend_tensor_set(w, quantized.data_ptr(), 0, quantized.numel())

    tokens = x.shape[0]
    context = lib.init(InitParams(CONTEXT + 4 * tokens * (n + k), None, False))
    inputs = lib.new_tensor_2d(context, F32, k, tokens)
    x = x.float().contiguous()
    ctypes.memmove(lib.get_data(inputs), x.data_ptr(), x.numel() * 4)
    y = lib.mul_mat(context, w, inputs)
    graph = lib.new_graph(context)
    lib.build_forward_expand(graph, y)
    plan = lib.graph_plan(graph, threads, None)
    work = torch.empty(plan.work_size + 64, dtype=torch.uint8)
    plan.work = work.data_ptr()
    result = torch.frombuffer((ctypes.c_float * (n * tokens)).from_address(lib.get_data(y)), dtype=torch.float32).reshape(tokens, n)
    compute, argument = lib.graph_compute, byref(plan)

    def call(kept: tuple[torch.Tensor, Plan] = (work, plan)) -> torch.Tensor:
        if compute(graph, argument) != 0:
            raise RuntimeError(f"ggml refuses {kind}")
        return result

    return call
