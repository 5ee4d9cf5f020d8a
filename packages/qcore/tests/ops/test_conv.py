import copy
import pickle

import pytest
import torch
from qcore.modules import QuantizedConv
from qcore.modules.replace import Stored, quantized_leaf
from qcore.numbers import Int, Offset, PerChannel, PerTensor, QuantSpec, int_activation, int_weight, quantize, scale_parts
from qcore.ops import KERNELS
from qcore.packing import CompressedInt, CompressedPack
from qkernels.int8_conv import cpu
from torch import nn

kernels = [k() for k in KERNELS]
pytestmark = pytest.mark.skipif(cpu.missing() is not None, reason=str(cpu.missing()))

ACTIVATIONS = {
    "signed, zero point": QuantSpec(format=Int(8), granularity=PerTensor(), offset=Offset.CODE),
    "unsigned, zero point": QuantSpec(format=Int(8, signed=False), granularity=PerTensor(), offset=Offset.CODE),
    "symmetric": QuantSpec(format=Int(8), granularity=PerTensor()),
}
CONVS = {
    "stem": lambda: nn.Conv2d(4, 16, 3, stride=2, padding=1),
    "depthwise": lambda: nn.Conv2d(4, 4, 5, padding=2, groups=4),
    "grouped": lambda: nn.Conv2d(4, 6, 3, padding="same", groups=2, bias=False),
    "pointwise": lambda: nn.Conv2d(4, 5, 1, padding="valid"),
}


def conv(make, activation, bits=8, x=None):
    torch.manual_seed(0)
    leaf = make()
    spec = int_weight(bits)
    parts = {} if activation.when == "dynamic" else scale_parts(x.min().reshape(1, 1).clamp(max=0), x.max().reshape(1, 1), activation)
    packing = CompressedInt() if bits == 8 else CompressedPack()
    stored = Stored(weight=quantize(leaf.weight.detach().flatten(1), spec), packing=packing, activation=activation, activation_parts=parts)
    return quantized_leaf(leaf, stored)


def image(seed=0):
    return torch.randn(3, 4, 9, 7, generator=torch.Generator().manual_seed(seed)) + 0.5


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", CONVS)
def test_integers_put_out_what_the_reference_does(kind, activation, bits):
    if bits == 8 and cpu.saturates():
        pytest.skip("refused here: see kernels/tests/test_conv.py")
    x = image()
    module = conv(CONVS[kind], ACTIVATIONS[activation], bits, x)
    want = module(x)
    module.bind(kernels)
    assert module.explain().kernel.name == "onednn-int8-conv" and not module.explain().refused
    got = module(x)
    # float32's rounding of the reference's sums over K <= 100
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
    step = float(want.abs().max()) / 127
    assert int(((got / step).round() - (want / step).round()).abs().max()) <= 1
    other = image(1)[:1, :, :5, :6]  # another batch, another size
    torch.testing.assert_close(module(other), copy.deepcopy(module).bind(kernels, wish="reference-conv")(other), rtol=1e-5, atol=1e-4)


REFUSED = {
    "dynamic inputs": (CONVS["stem"], int_activation(8), "static 8-bit inputs per tensor"),
    "per channel": (CONVS["stem"], QuantSpec(format=Int(8), granularity=PerChannel(1)), "static 8-bit inputs per tensor"),
    "4-bit inputs": (CONVS["stem"], QuantSpec(format=Int(4), granularity=PerTensor()), "static 8-bit inputs per tensor"),
    "reflected": (lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), ACTIVATIONS["symmetric"], "pads with zeros"),
    "uneven": (lambda: nn.Conv2d(4, 4, 2, padding="same"), ACTIVATIONS["symmetric"], "as much before as after"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_the_integers_cannot_do_they_refuse_with_the_reason(kind):
    make, activation, reason = REFUSED[kind]
    module = conv(make, activation, x=image()).bind(kernels)
    assert module.explain().kernel.name == "reference-conv"
    assert any(name == "onednn-int8-conv" and reason in why for name, why in module.explain().refused)
    module(image())


def test_other_dtypes_and_axes_run_by_the_reference():
    module = conv(CONVS["stem"], ACTIVATIONS["symmetric"], x=image()).bind(kernels).double()
    assert module.explain().kernel.name == "reference-conv" and module(image().double()).dtype is torch.float64
    assert module.float().explain().kernel.name == ("reference-conv" if cpu.saturates() else "onednn-int8-conv")
    line = conv(lambda: nn.Conv1d(4, 4, 3), ACTIVATIONS["symmetric"], x=image()).bind(kernels)
    assert "convolutions of 2 axes, got 1" in dict(line.explain().refused)["onednn-int8-conv"]


def test_a_processor_without_vnni_is_refused_8_bit_weights(monkeypatch):
    monkeypatch.setattr(cpu, "saturates", lambda: True)
    module = conv(CONVS["stem"], ACTIVATIONS["symmetric"], x=image()).bind(kernels)
    assert "saturate in 16 bits" in dict(module.explain().refused)["onednn-int8-conv"]
    assert conv(CONVS["stem"], ACTIVATIONS["symmetric"], bits=4, x=image()).bind(kernels).explain().kernel.name == "onednn-int8-conv"


def test_a_channel_of_zeros_and_an_input_that_was_never_anything_but_zero():
    module = conv(CONVS["stem"], ACTIVATIONS["symmetric"], x=torch.zeros(1, 4, 3, 3)).bind(kernels)
    assert torch.isfinite(module(image())).all()
    leaf = CONVS["stem"]()
    with torch.no_grad():
        leaf.weight[3] = 0
    parts = scale_parts(torch.zeros(1, 1), torch.ones(1, 1), ACTIVATIONS["symmetric"])
    stored = Stored(
        weight=quantize(leaf.weight.detach().flatten(1), int_weight(8)),
        packing=CompressedInt(),
        activation=ACTIVATIONS["symmetric"],
        activation_parts=parts,
    )
    y = quantized_leaf(leaf, stored).bind(kernels)(image())
    torch.testing.assert_close(y[:, 3], leaf.bias[3].detach().expand_as(y[:, 3]))


def test_a_bound_convolution_is_copied_pickled_and_rebuilt():
    x = image()
    module = conv(CONVS["depthwise"], ACTIVATIONS["unsigned, zero point"], x=x).bind(kernels)
    y = module(x)
    assert torch.equal(copy.deepcopy(module)(x), y) and torch.equal(pickle.loads(pickle.dumps(module))(x), y)
    again = QuantizedConv.from_config(module.config())
    again.to_empty(device="cpu").load_state_dict(module.state_dict())
    assert torch.equal(again.bind(kernels)(x), y)
