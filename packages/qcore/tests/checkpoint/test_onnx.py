"""ONNX files against ONNX Runtime: the codes of every layer are ours, to one; 8-bit weights beside unsigned inputs do not saturate."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qcore.checkpoint.exporters import OnnxExporter
from qcore.checkpoint.exporters.onnx_numbers import InputCodes, saturates, weight_codes
from qcore.errors import SpecError
from qcore.model.plain import PlainCNN
from qcore.modules import QuantizedConv
from qcore.modules.linear import QuantizedLinear
from qcore.numbers import QTensor, int_weight, quantize
from qcore.ops import ReferenceConv, quantize_input, static_parts
from qcore.pipeline import load_in_memory, quantize_model
from qcore.plugins.registry import Registry
from qcore.recipe_file import load_recipe
from qcore.testing.models import randomize, tiny_cnn
from torch import nn

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

BATCHES = [torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(s)) for s in range(3)]


class Residual(nn.Module):
    """A stem with uneven padding, an inverted bottleneck, a projection with an addition, a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 8, 3, 2, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.wide = nn.Sequential(nn.Conv2d(8, 24, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU6())
        self.depthwise = nn.Sequential(nn.Conv2d(24, 24, 5, padding=2, groups=24, bias=False), nn.BatchNorm2d(24), nn.SiLU())
        self.narrow = nn.Sequential(nn.Conv2d(24, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.head = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding="same"), nn.LeakyReLU(0.1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(16, 10)

    def forward(self, x):
        y = self.stem(x)
        return self.classifier(self.head(self.narrow(self.depthwise(self.wide(y))) + y))


NETS = {"tiny": tiny_cnn, "residual": lambda: randomize(Residual()).eval()}


@pytest.fixture(scope="module", params=[(net, recipe) for net in NETS for recipe in ("cnn-w8a8", "cnn-w4a8")], ids="-".join)
def quantized(request):
    net, recipe = request.param
    registry = Registry("")
    return quantize_model(load_in_memory(NETS[net]()), load_recipe(recipe, registry), BATCHES, registry=registry, adapter=PlainCNN()).model


def run(file, x, *, every=False):
    """Outputs by name; every: also the codes of every input, for which the file is changed to put them out."""
    proto = onnx.load(str(file))
    if every:
        for node in proto.graph.node:
            if node.op_type == "QuantizeLinear":
                proto.graph.output.append(onnx.helper.make_tensor_value_info(node.output[0], onnx.TensorProto.UINT8, None))
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, {"input": x.numpy()}), strict=True))


def forced(model, x, theirs):
    """uint8 codes of every quantized layer's input, by the name that the file gives them, and the output.

    Each layer is then given their codes in place of its own, so that what differs by one code before it does not count as its error.
    """
    found, hooks = {}, []

    def watch(name, module):
        def hook(m, args):
            spec, parts = m.activation, static_parts(m.stored())
            shift = 128 if spec.format.signed else 0
            values = quantize_input(args[0].reshape(-1, 1), spec, parts).reshape(args[0].shape)  # one scale: any shape will do
            found[name] = ((values / parts["scale"]).round() + parts["offset"] + shift).int().numpy()
            return (torch.from_numpy(theirs[name].astype(np.float32)) - parts["offset"] - shift) * parts["scale"]

        hooks.append(module.register_forward_pre_hook(hook))

    for path, module in model.named_modules():
        if isinstance(module, QuantizedConv | QuantizedLinear):
            watch(f"{path}.input_codes", module)
    with torch.no_grad():
        y = model(x)
    for hook in hooks:
        hook.remove()
    return found, y


@pytest.mark.parametrize("weights", ["auto", "int8", "uint8"])
@pytest.mark.parametrize("integers", [True, False], ids=["integers", "simulated"])
def test_onnx_runtime_has_our_codes_in_every_layer_to_one(quantized, weights, integers, tmp_path):
    model = copy.deepcopy(quantized)
    if not integers:
        for m in model.modules():
            if isinstance(m, QuantizedConv):
                m.bind([ReferenceConv()])
    written = OnnxExporter(weights=weights).write(model, tmp_path / "model.onnx", BATCHES[0])
    x = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(9))  # another batch than the example's
    theirs = run(written.file, x, every=True)
    ours, y = forced(model, x, theirs)
    assert len(ours) >= 5
    gaps = {name: int(np.abs(theirs[name].astype(int) - codes).max()) for name, codes in ours.items()}
    assert max(gaps.values()) <= 1, gaps
    # the classifier is given the same codes: what is left is the rounding of its bias to units of input scale · weight scale
    units = [onnx.numpy_helper.to_array(c) for c in onnx.load(str(written.file)).graph.initializer if c.name.endswith("bias_scale")]
    np.testing.assert_allclose(theirs["output"], y.numpy(), rtol=1e-5, atol=1e-5 + 0.5 * float(units[-1].max()))
    free = run(written.file, x)["output"]  # with nothing put out on the way, as users run it
    with torch.no_grad():
        np.testing.assert_allclose(free, model(x).numpy(), rtol=0, atol=0.05 * float(y.abs().max()))


def test_images_of_another_size_run(quantized, tmp_path):
    written = OnnxExporter().write(quantized, tmp_path / "model.onnx", BATCHES[0])
    x = torch.randn(1, 3, 16, 20)
    with torch.no_grad():
        y = quantized(x)
    np.testing.assert_allclose(run(written.file, x)["output"], y.numpy(), rtol=0, atol=0.03 * float(y.abs().max()))


# saturation ------------------------------------------------------------------------------------------------------------------------------


def vpmaddubsw(x, w):
    """What a processor without VNNI makes of Σ x·w: neighbouring products are added in 16 bits, saturating.  x, w: [K], K even"""
    products = (x.astype(np.int64) * w.astype(np.int64)).reshape(-1, 2).sum(1)
    return int(products.clip(-(1 << 15), (1 << 15) - 1).sum())


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-128, 127), min_size=2, max_size=8).filter(lambda w: len(w) % 2 == 0))
def test_saturation_is_foretold_exactly_when_some_order_and_input_saturates(row):
    w = np.array(row)
    said = saturates(torch.tensor([row], dtype=torch.int8))
    worst = []
    for sign in (1, -1):
        order = np.argsort(-sign * w)  # the two largest of one sign side by side
        own = w[order]
        x = np.where(sign * own > 0, 255, 0)
        worst.append(vpmaddubsw(x, own) != int((x * own).sum()))
    assert said == any(worst)


def test_auto_writes_uint8_where_int8_could_saturate():
    large = QTensor(int_weight(8), {"codes": torch.tensor([[127, 127], [1, 1]], dtype=torch.int8), "scale": torch.ones(2, 1)}, (2, 2))
    small = QTensor(int_weight(4), {"codes": torch.tensor([[7, 7], [-8, -8]], dtype=torch.int8), "scale": torch.ones(2, 1)}, (2, 2))
    assert weight_codes(large, None, None, "auto").codes.dtype is torch.uint8 and weight_codes(large, None, None, "auto").zero == 128
    assert weight_codes(large, None, None, "int8").codes.dtype is torch.int8
    assert weight_codes(small, None, None, "auto").codes.dtype is torch.int8
    for form in ("int8", "uint8"):
        made = weight_codes(large, None, None, form)
        assert torch.equal((made.codes.float() - made.zero) * made.scale.unsqueeze(1), large.dequantize())


def test_8_bit_weights_of_a_network_are_written_unsigned_and_said_so(quantized, tmp_path):
    written = OnnxExporter().write(quantized, tmp_path / "model.onnx", BATCHES[0])
    bits = next(m for m in quantized.modules() if isinstance(m, QuantizedConv)).spec.format.bits
    assert bool(written.notes) == (bits == 8)
    assert bits == 4 or "uint8 with the zero point 128" in written.notes[0]


# biases, scales, refusals ----------------------------------------------------------------------------------------------------------------


def test_a_bias_that_would_not_fit_int32_raises_the_scale_of_its_channel():
    weight = torch.tensor([[1e-9, -2e-9], [0.5, -0.25]])
    q = quantize(weight, int_weight(8, scale="float32"))
    bias, inputs = torch.tensor([7.0, 0.1]), InputCodes(0.02, 3)
    made = weight_codes(q, bias, inputs, "int8")
    back = made.bias.double() * made.scale.double() * inputs.scale
    torch.testing.assert_close(back, bias.double(), rtol=1e-6, atol=inputs.scale * float(made.scale[1]) / 2 + 1e-9)
    assert made.bias.abs().max() <= 1 << 30
    values = made.codes.double() * made.scale.double().unsqueeze(1)
    torch.testing.assert_close(values, q.dequantize().double(), rtol=1e-6, atol=4e-7)  # 7 / (0.02 · 2^30)
    dead = quantize(torch.zeros(1, 4), int_weight(8))
    assert weight_codes(dead, torch.tensor([3.0]), inputs, "int8").bias.item() == 150


def test_negative_scales_change_sign_with_their_codes():
    codes = torch.tensor([[-127, 5]], dtype=torch.int8)
    q = QTensor(int_weight(8), {"codes": codes, "scale": torch.tensor([[-0.5]])}, (1, 2))
    made = weight_codes(q, None, None, "int8")
    assert made.codes.tolist() == [[127, -5]] and made.scale.item() == 0.5
    with pytest.raises(SpecError, match="signed_scale = false"):
        weight_codes(QTensor(int_weight(8), {"codes": codes - 1, "scale": torch.tensor([[-0.5]])}, (1, 2)), None, None, "int8")


def test_every_reason_is_told_at_once(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")
            self.mish = nn.Mish()

        def forward(self, x):
            return torch.cat([self.mish(self.conv(x)), x], 1)

    with pytest.raises(SpecError, match=r"(?s)conv: padding_mode 'reflect'.*mish: Mish is not known.*cat: the operation cat is not known"):
        OnnxExporter().write(Odd().eval(), tmp_path / "model.onnx", BATCHES[0])
    assert not list(tmp_path.iterdir())
    assert "training mode" in OnnxExporter().refuses(tiny_cnn().train())[0]
    with pytest.raises(SpecError, match="auto, int8 or uint8"):
        OnnxExporter(weights="int4")


def test_what_an_operation_is_told_beside_its_operands_is_not_dropped():
    class Told(nn.Module):
        def forward(self, x, y):
            return torch.add(x, y, alpha=2) + 1.0

    reasons = OnnxExporter().refuses(Told().eval())
    assert any("reads 2 tensors (x, y)" in r for r in reasons)
    assert any("constant alpha=2" in r for r in reasons) and any("constant 1.0" in r for r in reasons)


def test_dynamic_inputs_and_groups_of_weights_are_refused(tmp_path):
    registry = Registry("")
    for recipe, reason in (("smoothquant-w8a8", "static scales"), ("w4a16-rtn", "per output channel")):
        net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
        q = quantize_model(load_in_memory(net), load_recipe(recipe, registry), [torch.randn(8, 64)], registry=registry).model
        assert any(reason in why for why in OnnxExporter().refuses(q))


def test_a_float_network_with_its_batch_norms_is_written_too(tmp_path):
    written = OnnxExporter().write(tiny_cnn(), tmp_path / "model.onnx", BATCHES[0])
    with torch.no_grad():
        np.testing.assert_allclose(run(written.file, BATCHES[1])["output"], tiny_cnn()(BATCHES[1]).numpy(), rtol=1e-4, atol=1e-4)
