import copy
import json
import pickle
from types import SimpleNamespace

import pytest
import torch
from qcore.errors import SpecError
from qcore.model.layers import layout
from qcore.modules import QuantizedConv, QuantizedEmbedding, QuantizedLinear, Stored, module_name, quantized_leaf, rebuild
from qcore.numbers import (
    FP8_E4M3,
    Codebook,
    Float,
    Int,
    PerChannel,
    PerGroup,
    PerTensor,
    PowerOfTwo,
    QuantSpec,
    Tile,
    int_activation,
    int_weight,
    mx,
    nvfp4,
    quantize,
)
from qcore.ops import ReferenceLinear, TorchInt4Linear, TorchInt8DynamicLinear
from qcore.packing import Bits, CompressedFloat, CompressedInt, CompressedPack, first_that_accepts
from qcore.testing import check_module
from torch import nn
from torch.nn import functional as F

PACKINGS = {p.name: p for p in (CompressedPack, CompressedInt, CompressedFloat, Bits)}
REGISTRY = SimpleNamespace(
    formats={f.name: f for f in (Int, Float, PowerOfTwo, Codebook)},
    packings=PACKINGS,
    modules={m.name: m for m in (QuantizedLinear, QuantizedConv, QuantizedEmbedding)},
)
KERNELS = (ReferenceLinear(), TorchInt4Linear(), TorchInt8DynamicLinear())


def leaf_of(module: nn.Module, spec: QuantSpec, packing=None, **more):
    matrix = layout(module).matrix(module.weight.detach())
    q = quantize(matrix, spec)
    packing = packing or first_that_accepts([p() for p in PACKINGS.values()], spec, q.shape, more.get("activation"))
    return quantized_leaf(module, Stored(weight=q, packing=packing, **more)), q


def rebuilt(leaf: nn.Module) -> nn.Module:
    """Through JSON and a state dict, as a checkpoint does."""
    empty = rebuild(type(leaf), json.loads(json.dumps(leaf.config())), REGISTRY)
    assert all(t.is_meta for t in empty.state_dict().values())
    empty.load_state_dict(leaf.state_dict(), assign=True)
    return empty


class TransposedLinear(nn.Module):
    """As transformers' Conv1D: weight [K, N]."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


FLOATS = {
    "linear": (lambda: nn.Linear(32, 12), (2, 5, 32)),
    "linear without bias": (lambda: nn.Linear(32, 12, bias=False), (3, 32)),
    "transposed linear": (lambda: TransposedLinear(12, 32), (2, 5, 32)),
    "conv1d": (lambda: nn.Conv1d(8, 6, 4, padding="same", padding_mode="circular"), (2, 8, 11)),
    "conv2d": (lambda: nn.Conv2d(8, 6, (3, 1), stride=2, padding=1, dilation=(2, 1)), (2, 8, 9, 10)),
    "conv2d grouped": (lambda: nn.Conv2d(8, 12, 2, groups=4, padding="same", bias=False), (2, 8, 9, 10)),
    "conv2d depthwise reflecting": (lambda: nn.Conv2d(8, 8, 3, groups=8, padding=(1, 2), padding_mode="reflect"), (2, 8, 9, 10)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2, padding=1), (1, 4, 5, 5, 5)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("kind", FLOATS)
@pytest.mark.parametrize("spec", [int_weight(8), int_weight(3), QuantSpec(format=FP8_E4M3, granularity=PerTensor())], ids=str)
def test_a_leaf_is_the_float_layer_with_the_dequantized_weight(kind, spec):
    torch.manual_seed(0)
    make, shape = FLOATS[kind]
    module = make()
    leaf, q = leaf_of(module, spec)
    want = copy.deepcopy(module)
    with torch.no_grad():
        want.weight.copy_(layout(module).tensor(q.dequantize(), module.weight.shape))
    x = torch.randn(shape)
    # a linear layer's bias is added after the product, or within it: one float32 rounding of numbers near 10
    torch.testing.assert_close(leaf(x), want(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(rebuilt(leaf)(x), leaf(x))
    assert torch.equal(layout(module).matrix(want.weight), leaf.dequantize())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("spec", [int_weight(4, 16), mx(), nvfp4(), QuantSpec(format=Codebook(3), granularity=PerGroup(16))], ids=str)
def test_converting_the_model_leaves_the_stored_weight_alone(spec, dtype):
    torch.manual_seed(0)
    leaf, q = leaf_of(nn.Linear(64, 16), spec)
    converted = leaf.to(dtype)
    assert torch.equal(converted.dequantize(), q.dequantize())
    assert converted.bias.dtype == dtype
    x = torch.randn(2, 64).to(dtype)
    assert converted(x).dtype == dtype
    assert torch.equal(converted(x), F.linear(x, q.dequantize().to(dtype)) + converted.bias)


def test_a_float8_weight_stays_float8():
    leaf, _ = leaf_of(nn.Linear(64, 16), QuantSpec(format=FP8_E4M3, granularity=PerChannel(0)))
    assert leaf.bfloat16().weight.dtype == torch.float8_e4m3fn


def test_state_dict_has_the_names_of_compressed_tensors():
    assert set(leaf_of(nn.Linear(32, 8), int_weight(4, 16))[0].state_dict()) == {"weight_packed", "weight_scale", "weight_shape", "bias"}
    w8a8, _ = leaf_of(nn.Linear(32, 8, bias=False), int_weight(8), activation=int_activation())
    assert set(w8a8.state_dict()) == {"weight", "weight_scale"}
    assert set(leaf_of(nn.Linear(32, 8, bias=False), nvfp4())[0].state_dict()) == {"codes", "scale__codes", "scale__scale"}


def test_static_inputs_are_stored_and_reloaded():
    static = QuantSpec(format=Int(8), granularity=PerTensor())
    leaf, q = leaf_of(nn.Linear(32, 8, bias=False), int_weight(8), activation=static, activation_parts={"scale": torch.full((1, 1), 0.25)})
    assert set(leaf.state_dict()) == {"weight", "weight_scale", "input__scale"}
    x = torch.randn(4, 32)
    assert torch.equal(leaf(x), (x / 0.25).round() * 0.25 @ q.dequantize().T)
    assert torch.equal(rebuilt(leaf)(x), leaf(x))


def test_inputs_of_a_convolution_have_one_scale_a_position():
    torch.manual_seed(0)
    module = nn.Conv2d(8, 4, 1, bias=False)
    leaf, q = leaf_of(module, int_weight(8), activation=int_activation())
    x = torch.randn(2, 8, 3, 5)
    rows = quantize(x.permute(0, 2, 3, 1).reshape(-1, 8), int_activation()).dequantize()
    want = (rows @ q.dequantize().T).reshape(2, 3, 5, 4).permute(0, 3, 1, 2)
    torch.testing.assert_close(leaf(x), want, rtol=1e-5, atol=1e-5)  # eight float32 products in another order


def test_what_is_coded_is_what_online_gives():
    torch.manual_seed(0)
    online = nn.Linear(32, 32, bias=False)
    leaf, q = leaf_of(nn.Linear(32, 8, bias=False), int_weight(8), online=online, activation=int_activation())
    x = torch.randn(3, 32)
    assert torch.equal(leaf(x), quantize(online(x), int_activation()).dequantize() @ q.dequantize().T)


def test_kernel_is_chosen_at_binding_and_again_after_a_move():
    leaf, _ = leaf_of(nn.Linear(64, 16), int_weight(4, 32, scale="bfloat16"))
    assert leaf.explain().kernel.name == "reference-linear"
    leaf.bind(KERNELS, dtype=torch.float32)
    assert dict(leaf.explain().refused)["torch-int4-linear"].startswith("needs bfloat16 inputs")
    leaf.to(torch.bfloat16)
    assert leaf.explain().kernel.name == "torch-int4-linear"
    assert "kernel=torch-int4-linear" in repr(leaf)
    leaf.float()
    assert leaf.explain().kernel.name == "reference-linear"


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_run_alike_and_share_nothing(again):
    torch.manual_seed(0)
    leaf, _ = leaf_of(nn.Linear(64, 16), int_weight(4, 32, scale="bfloat16"))
    leaf.to(torch.bfloat16).bind(KERNELS, dtype=torch.bfloat16)
    x = torch.randn(2, 64).bfloat16()
    before = leaf(x)
    copied = again(leaf)
    assert copied.explain().kernel.name == "torch-int4-linear"
    assert torch.equal(copied(x), before)
    copied.weight_packed.zero_()
    assert torch.equal(leaf(x), before)


def test_loading_another_weight_reaches_the_kernels_own_form():
    torch.manual_seed(0)
    a, _ = leaf_of(nn.Linear(64, 16), int_weight(4, 32, scale="bfloat16"))
    b, _ = leaf_of(nn.Linear(64, 16), int_weight(4, 32, scale="bfloat16"))
    for leaf in (a, b):
        leaf.to(torch.bfloat16).bind(KERNELS, dtype=torch.bfloat16)
    a.load_state_dict(b.state_dict())
    x = torch.randn(2, 64).bfloat16()
    assert torch.equal(a(x), b(x))


@pytest.mark.parametrize("spec", [int_weight(4, 16), int_weight(8), nvfp4(), QuantSpec(format=FP8_E4M3, granularity=Tile(8, 8))], ids=str)
def test_embedding_looks_rows_up(spec):
    torch.manual_seed(0)
    leaf, q = leaf_of(nn.Embedding(50, 32), spec)
    index = torch.tensor([[3, 49, 0], [3, 3, 7]])
    assert torch.equal(leaf(index), q.dequantize()[index])
    assert torch.equal(rebuilt(leaf)(index), leaf(index))
    assert leaf.to(torch.bfloat16)(index).dtype == torch.bfloat16
    assert leaf(index[:0]).shape == (0, 3, 32)
    for bad in (-1, 50):
        with pytest.raises(IndexError, match="outside of 0 … 49"):
            leaf(torch.tensor([bad]))


def test_a_subclass_with_its_own_forward_is_not_replaced():
    class Scaled(nn.Embedding):
        def forward(self, index):
            return super().forward(index) * 8

    with pytest.raises(SpecError, match="Scaled is derived from Embedding"):
        leaf_of(Scaled(10, 16), int_weight(8))


@pytest.mark.parametrize(
    ("module", "more", "message"),
    [
        (nn.Embedding(10, 16), {"activation": int_activation()}, "input of an embedding is an index"),
        (nn.Embedding(10, 16, max_norm=1.0), {}, "max_norm"),
        (nn.Conv1d(16, 4, 1), {"online": nn.Identity()}, "could rotate"),
        (nn.Linear(16, 4), {"bias": torch.zeros(5)}, "N=4"),
    ],
    ids=["index", "max_norm", "online", "bias"],
)
def test_what_a_leaf_cannot_do_is_refused(module, more, message):
    with pytest.raises(SpecError, match=message):
        leaf_of(module, int_weight(8), **more)


def test_an_unknown_layer_names_the_way_to_register_it():
    class Odd(nn.Module):
        pass

    q = quantize(torch.randn(4, 8), int_weight(8))
    with pytest.raises(SpecError, match=r"leaf_by_type.register\(Odd\)"):
        quantized_leaf(Odd(), Stored(weight=q, packing=Bits()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [1 << 50, 32]}, "a weight has shape"),
        ({"shape": "x"}, "a weight has shape"),
        ({"parts": {"weight": ["object", [2, 2]]}}, "dtype 'object'"),
        ({"parts": {"weight": ["int8", [-2, 2]]}}, "has shape"),
    ],
    ids=str,
)
def test_a_config_that_no_module_wrote_is_refused(change, message):
    leaf, _ = leaf_of(nn.Linear(32, 8), int_weight(8))
    with pytest.raises(SpecError, match=message):
        rebuild(QuantizedLinear, leaf.config() | change, REGISTRY)


def test_an_unregistered_run_time_module_is_named():
    leaf, _ = leaf_of(nn.Linear(32, 8), int_weight(8))
    assert module_name(leaf, REGISTRY.modules) == "quantized-linear"
    assert module_name(nn.Linear(2, 2), REGISTRY.modules) is None
    with pytest.raises(SpecError, match="hook qcore_modules"):
        module_name(leaf, {})


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("kind", FLOATS)
def test_modules_keep_their_contract(kind):
    torch.manual_seed(0)
    make, shape = FLOATS[kind]
    leaf, _ = leaf_of(make(), nvfp4_of_8() if kind == "linear" else int_weight(8), activation=int_activation())
    check_module(leaf, torch.randn(shape), registry=REGISTRY)


def nvfp4_of_8() -> QuantSpec:
    return QuantSpec(format=nvfp4().format, granularity=PerGroup(8), scale=nvfp4().scale)
