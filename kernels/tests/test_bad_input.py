"""Every op: a wrong dtype or shape, another device, a misaligned group is a ValueError that names the argument, what it is, and what is allowed."""

from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from qkernels import (
    codebook_linear,
    dequant_linear,
    fp4_linear,
    grouped_linear,
    hadamard_quantize,
    int8_conv,
    int8_linear,
    int_linear,
    int_pack,
    kv_attention,
    native,
    panels,
    quantize_rows,
    selective_scan,
    weight_linear,
)


@dataclass
class Op:
    """A call that is fine, and which of its tensors to spoil.

    loose: arguments that may have more columns
    skip:  arguments that may be anything
    """

    call: object
    arguments: dict
    loose: tuple = ()
    skip: tuple = ()


def floats(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) + 0.1


def codes(*shape, dtype=torch.int8):
    return torch.randint(0, 8, shape, generator=torch.Generator().manual_seed(0)).to(dtype)


WEIGHT = {"codes": codes(16, 64), "scale": floats(16, 2), "shift": floats(16, 2)}
CACHE = {
    "k": codes(1, 2, 5, 16, dtype=torch.uint8),
    "k_scale": floats(1, 2, 5),
    "v": codes(1, 2, 5, 16, dtype=torch.uint8),
    "v_scale": floats(1, 2, 5),
}
SCAN = {"u": floats(1, 3, 4), "delta": floats(1, 3, 4), "A": -floats(4, 2), "B": floats(1, 3, 2), "C": floats(1, 3, 2), "start": floats(1, 4, 2)}
FP4 = {"packed": codes(16, 32, dtype=torch.uint8), "scale": codes(16, 2, dtype=torch.uint8)}
GROUPED = {"ends": torch.tensor([1, 3], dtype=torch.int32), "scale": floats(2, 16, 2), "shift": floats(2, 16, 2)}
CONV = {"x_scale": 0.1, "x_zero": 3, "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
INT8 = {"x": codes(2, 8), "w": codes(4, 8), "x_scale": floats(2, 1), "w_scale": floats(4)}

OPS = {
    "weight_linear": Op(weight_linear.reference.weight_linear, {"x": floats(2, 64), **WEIGHT}),
    "int_linear": Op(int_linear.reference.int_linear, {"x": floats(2, 64), **WEIGHT, "x_scale": floats(1)}),
    "quantize_rows": Op(quantize_rows.reference.quantize_rows, {"x": floats(2, 8), "scale": floats(1)}, loose=("x",)),
    "fp4_linear": Op(fp4_linear.reference.fp4_linear, {"x": floats(2, 64), **FP4, "tensor_scale": floats(1)}),
    "hadamard_quantize": Op(hadamard_quantize.reference.hadamard_quantize, {"x": floats(2, 32), "small": floats(2, 2)}),
    "grouped_linear": Op(grouped_linear.reference.grouped_linear, {"x": floats(3, 64), "codes": codes(2, 16, 64), **GROUPED}),
    "kv_attention": Op(
        partial(kv_attention.reference.kv_attention, bits=8), {"q": floats(1, 4, 16), **CACHE, "lengths": torch.tensor([5], dtype=torch.int32)}
    ),
    "int_pack.pack": Op(partial(int_pack.pack, bits=4), {"codes": codes(2, 8)}, loose=("codes",)),
    "int_pack.unpack": Op(partial(int_pack.unpack, bits=4, count=8), {"packed": codes(2, 4, dtype=torch.uint8)}),
    "int_pack.quantize_pack": Op(partial(int_pack.quantize_pack, bits=4), {"w": floats(2, 64), "scale": floats(2, 2)}),
    "int_pack.dequantize": Op(partial(int_pack.dequantize, bits=4, count=64), {"words": codes(2, 8, dtype=torch.int32), "scale": floats(2, 2)}),
    "panels.pack": Op(partial(panels.pack, bits=4), WEIGHT),
    "dequant_linear": Op(
        partial(dequant_linear.dequant_linear, block=(1, 4)), {"x": floats(2, 8), "values": codes(4, 8), "scale": floats(4, 2)}, skip=("values",)
    ),
    "int8_linear": Op(int8_linear.reference.int8_linear, INT8),
    "int8_linear on cpu": Op(int8_linear.cpu.int8_linear, INT8),
    "int8_conv": Op(
        partial(int8_conv.int8_conv, **CONV),
        {"x": codes(1, 3, 5, 5, dtype=torch.uint8), "w": codes(4, 3, 2, 2), "w_scale": floats(4)},
        loose=("x", "w"),
    ),
    "codebook_linear": Op(
        partial(codebook_linear.codebook_linear, rows=2, columns=4),
        {"x": floats(2, 8), "codes": codes(4, 8, dtype=torch.uint8), "books": floats(2, 2, 8)},
        loose=("books",),
    ),
    "selective_scan": Op(selective_scan.selective_scan, SCAN),
    "selective_scan_int8": Op(partial(selective_scan.selective_scan_int8, h_scale=torch.ones(()), c_scale=torch.ones(())), SCAN),
}
if native.why_not() is None:
    LAID = panels.pack(**WEIGHT, bits=4)
    OPS["weight_linear on cpu"] = Op(partial(weight_linear.cpu.weight_linear, w=LAID), {"x": floats(2, 64)})
    OPS["int_linear on cpu"] = Op(partial(int_linear.cpu.int_linear, w=LAID), {"x": floats(2, 64), "x_scale": floats(1)})
    OPS["quantize_rows on cpu"] = Op(quantize_rows.cpu.quantize_rows, {"x": floats(2, 8), "scale": floats(1)}, loose=("x",))
    OPS["panels.Panels"] = Op(
        partial(panels.Panels, shape=(16, 64), group=32, bits=4), {"codes": LAID.codes, "scale": LAID.scale, "shift": LAID.shift}
    )
if find_spec("triton") is not None:
    from qkernels.fp4_linear import triton as fp4_gpu
    from qkernels.grouped_linear import triton as grouped_gpu
    from qkernels.hadamard_quantize import triton as hadamard_gpu
    from qkernels.int_linear import triton as int_gpu
    from qkernels.int_pack import triton as pack_gpu
    from qkernels.kv_attention import triton as attention_gpu
    from qkernels.quantize_rows import triton as rows_gpu
    from qkernels.weight_linear import triton as weight_gpu

    HERE = "cuda" if torch.cuda.is_available() else "cpu"
    WORDS = {"words": codes(16, 8, dtype=torch.int32), "scale": floats(16, 2), "shift": floats(16, 2)}
    NV = {"packed": FP4["packed"], "scale": floats(16, 4).to(torch.float8_e4m3fn), "tensor_scale": floats(1)}
    GPU = {
        "weight_linear": Op(partial(weight_gpu.weight_linear, bits=4), {"x": floats(2, 64).half(), **WORDS}),
        "int_linear": Op(partial(int_gpu.int_linear, bits=4), {"q": codes(2, 64), "x_scale": floats(2, 1), **WORDS}),
        "quantize_rows": Op(rows_gpu.quantize_rows, {"x": floats(2, 8), "scale": floats(1)}, loose=("x",)),
        "fp4_linear": Op(fp4_gpu.fp4_linear, {"x": floats(2, 64).half(), **NV}),
        "hadamard_quantize": Op(hadamard_gpu.hadamard_quantize, {"x": floats(2, 64), "small": floats(2, 2)}),
        "grouped_linear": Op(
            partial(grouped_gpu.grouped_linear, bits=4), {"x": floats(3, 64).half(), "words": codes(2, 16, 8, dtype=torch.int32), **GROUPED}
        ),
        "kv_attention": Op(
            partial(attention_gpu.kv_attention, bits=8),
            {"q": floats(1, 4, 16).half(), **CACHE, "lengths": torch.tensor([5], dtype=torch.int32)},
        ),
        "int_pack.quantize_pack": Op(partial(pack_gpu.quantize_pack, bits=4), {"w": floats(2, 64), "scale": floats(2, 2)}),
        "int_pack.dequantize": Op(partial(pack_gpu.dequantize, bits=4), {"words": codes(2, 8, dtype=torch.int32), "scale": floats(2, 2)}, ("words",)),
    }
    for name, op in GPU.items():
        OPS[f"{name} on gpu"] = Op(op.call, {key: t.to(HERE) for key, t in op.arguments.items()}, op.loose)

TENSORS = [(name, key) for name, op in OPS.items() for key in op.arguments if key not in op.skip]
ALSO = {("int_linear", "x_scale"): "scale", ("quantize_rows on cpu", "scale"): "x_scale"}  # what it is called by the op that it is handed to


@pytest.mark.parametrize("name", OPS)
def test_the_unspoiled_call_runs(name):
    OPS[name].call(**OPS[name].arguments)


@pytest.mark.parametrize(("name", "key"), TENSORS)
def test_a_wrong_dtype_is_named(name, key):
    op = OPS[name]
    with pytest.raises(ValueError, match=rf"^{ALSO.get((name, key), key)}: .*complex64.*allowed"):
        op.call(**op.arguments | {key: op.arguments[key].float().to(torch.complex64)})


@pytest.mark.parametrize(("name", "key"), [(n, k) for n, k in TENSORS if k not in OPS[n].loose])
def test_a_wrong_shape_is_named_with_what_is_allowed(name, key):
    op = OPS[name]
    t = op.arguments[key]
    wrong = torch.nn.functional.pad(t.float(), (0, 3)).to(t.dtype) if t.dim() else t.repeat(3)
    with pytest.raises(ValueError, match=r"allowed|take \d+ words"):
        op.call(**op.arguments | {key: wrong})


@pytest.mark.parametrize(("name", "key"), [(n, k) for n, k in TENSORS if len(OPS[n].arguments) > 1])
def test_another_device_is_named_with_the_right_one(name, key):
    op = OPS[name]
    with pytest.raises(ValueError, match=r"is on (meta|cpu).*allowed|on meta; allowed"):
        op.call(**op.arguments | {key: op.arguments[key].to("meta")})


@pytest.mark.parametrize("name", [n for n, op in OPS.items() if "scale" in op.arguments and "linear" in n and "cpu" not in n and "fp4" not in n])
def test_a_misaligned_group_is_named(name):
    op = OPS[name]
    scale = op.arguments["scale"]
    spoiled = {k: torch.ones(*t.shape[:-1], 5, device=t.device) for k, t in op.arguments.items() if k in ("scale", "shift")}
    assert scale.shape[-1] != 5
    with pytest.raises(ValueError, match=r"scale: has (5 groups; allowed: a divisor of K=64|shape)"):
        op.call(**op.arguments | spoiled)


@pytest.mark.parametrize("bits", [0, 3, 5, 16])
@pytest.mark.parametrize("name", [n for n in OPS if n.endswith("on gpu") and isinstance(OPS[n].call, partial)] + ["kv_attention", "panels.pack"])
def test_other_bits_are_named(name, bits):
    op = OPS[name]
    with pytest.raises(ValueError, match=f"bits: got {bits}.*allowed: 4"):
        op.call(**op.arguments, bits=bits)


@pytest.mark.parametrize("lengths", [[0], [-1], [9]])
def test_lengths_outside_the_cache_are_refused(lengths):
    arguments = {**OPS["kv_attention"].arguments, "lengths": torch.tensor(lengths, dtype=torch.int32)}
    with pytest.raises(ValueError, match=f"lengths: run from {lengths[0]} to {lengths[0]}; allowed: 1 to the 5 tokens"):
        OPS["kv_attention"].call(**arguments)


def test_tiles_without_rows_are_refused():
    tiles = torch.zeros(4, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="rows, columns, chunk: got 0, 4, 256"):
        codebook_linear.codebook_linear(torch.zeros(2, 8), tiles, torch.zeros(2, 2, 4), 0, 4)
