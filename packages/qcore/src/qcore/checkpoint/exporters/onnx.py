"""ONNX with QuantizeLinear and DequantizeLinear around every quantized layer (QDQ), as ONNX Runtime fuses it into integer kernels.

A layer with a static input becomes  x → Q → DQ → Conv(DQ(weight), DQ(bias)),  whatever stands between (ReLU, pooling, additions) stays float, and the
next layer's Q follows.  Weights of fewer than 8 bits are kept in 8-bit containers: ONNX Runtime has no convolution of less.

The graph is what `torch.fx` traces of the model, as the plain adapters see it; a model that cannot be traced is refused.  Batch and image sizes are
free.  Opset 17, which every ONNX Runtime since 1.12 reads.

Needs the package `onnx` (pip install 'qcore[onnx]').
"""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qcore.checkpoint.exporters.base import Exported, Exporter
from qcore.checkpoint.exporters.onnx_numbers import InputCodes, input_codes, input_problem, weight_codes, weight_problem
from qcore.errors import NotFound, SpecError, at
from qcore.model.plain import trace
from qcore.modules.conv import QuantizedConv
from qcore.modules.linear import QuantizedLinear
from qcore.modules.sum import Sum
from qcore.ops.conv import sides

OPSET = 17
_PASS = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
# one ONNX operator each, without attributes
_PLAIN: dict[Any, str] = {
    **dict.fromkeys((nn.ReLU, F.relu, torch.relu, "relu"), "Relu"),
    **dict.fromkeys((nn.Sigmoid, F.sigmoid, torch.sigmoid, "sigmoid"), "Sigmoid"),
    **dict.fromkeys((nn.Tanh, F.tanh, torch.tanh, "tanh"), "Tanh"),
    **dict.fromkeys((nn.Hardswish, F.hardswish), "HardSwish"),
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), "Add"),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, "mul", "mul_"), "Mul"),
}
_FLAT = (torch.flatten, "flatten")
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class OnnxExporter(Exporter):
    """weights: how 8-bit weights lie in the file.  "int8" is what most runtimes expect; beside uint8 inputs its products saturate on processors
    without VNNI (see `onnx_numbers.saturates`).  "uint8" never does, and costs some speed.  "auto": uint8 for those layers whose weights are large
    enough to saturate
    """

    name: ClassVar[str] = "onnx"
    suffix: ClassVar[str] = ".onnx"
    weights: Literal["auto", "int8", "uint8"] = "auto"

    def __post_init__(self) -> None:
        if self.weights not in ("auto", "int8", "uint8"):
            raise SpecError(f"onnx: weights is auto, int8 or uint8, got {self.weights!r}")

    def refuses(self, model: nn.Module) -> list[str]:
        """Every layer and operation that has no place in the file."""
        if model.training:
            return ["the model is in training mode, where batch norms and dropout are no fixed functions; call model.eval()"]
        try:
            graph = trace(model)
        except Exception as e:  # whatever the model's forward does with a traced tensor
            first = str(e).splitlines()[0] if str(e) else ""
            return [
                f"torch.fx cannot trace {type(model).__name__} ({type(e).__name__}: {first}), so there is no graph to write; "
                "it is for networks whose forward runs the same layers for every input, such as convolutional ones"
            ]
        inputs = [node.name for node in graph.nodes if node.op == "placeholder"]
        reasons = [] if len(inputs) == 1 else [f"the model reads {len(inputs)} tensors ({', '.join(inputs)}), the file has one input"]
        for node in graph.nodes:
            why = _refuses_node(node, model)
            if why:
                reasons.append(f"{node.target if node.op == 'call_module' else node.name}: {why}")
        return reasons

    def write(self, model: nn.Module, file: Path, example: Tensor) -> Exported:
        reasons = self.refuses(model)
        if reasons:
            raise SpecError("this model cannot be written as ONNX:\n" + "\n".join(f"  {r}" for r in reasons))
        onnx = _package()
        graph = _Graph(model, self.weights, onnx)
        proto = graph.build(trace(model), example)
        try:
            onnx.checker.check_model(proto, full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as e:
            raise SpecError(f"ONNX's own checker does not accept the graph ({e}); linear layers are written for inputs [B, K]") from e
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(file.name + ".part")
        part.write_bytes(proto.SerializeToString())
        part.replace(file)
        return Exported(file, tuple(graph.notes))


def _package() -> Any:
    try:
        import onnx
    except ModuleNotFoundError as e:
        raise NotFound("ONNX files are written with the package onnx, which is not installed: pip install 'qcore[onnx]'") from e
    return onnx


def _refuses_node(node: fx.Node, model: nn.Module) -> str | None:
    if node.op in ("placeholder", "output"):
        if node.op == "output" and not isinstance(node.args[0], fx.Node):
            return "the model puts out more than one tensor"
        return None
    if node.op == "get_attr":
        return "a tensor is read outside a layer"
    if node.op == "call_module":
        return _refuses_module(model.get_submodule(str(node.target)))
    if node.target in _FLAT and (len(node.all_input_nodes) != 1 or tuple(node.args[1:]) not in ((1,), (1, -1)) or node.kwargs):
        return "flatten is written from axis 1 to the last"
    if node.target in _PLAIN or node.target in _FLAT or node.target in (F.relu6, F.silu):
        constants = [a for a in node.args if not isinstance(a, fx.Node) and node.target not in _FLAT]
        constants += [f"{k}={v!r}" for k, v in node.kwargs.items() if k != "inplace"]
        return f"an operand is the constant {constants[0]}" if constants else None
    return f"the operation {getattr(node.target, '__name__', node.target)} is not known"


def _refuses_module(module: nn.Module) -> str | None:
    if isinstance(module, QuantizedConv | QuantizedLinear):
        if isinstance(module, QuantizedConv) and module.geometry["padding_mode"] != "zeros":
            return f"padding_mode {module.geometry['padding_mode']!r} is not written"
        if isinstance(module, QuantizedLinear) and module.online is not None:
            return "a module before the layer is not written"
        return weight_problem(module.spec) or input_problem(module.activation)
    if isinstance(module, Sum):
        if module.fine_channels is not None:
            return "a sum whose fine part reads some channels alone is not written"
        return _refuses_module(module.coarse) or _refuses_module(module.fine)
    if isinstance(module, nn.AdaptiveAvgPool2d):
        return None if module.output_size in (1, (1, 1)) else f"adaptive pooling to {module.output_size} is not written, to 1 it is"
    if isinstance(module, nn.Flatten):
        return None if (module.start_dim, module.end_dim) == (1, -1) else "flatten is written from axis 1 to the last"
    if isinstance(module, _CONVS):
        return None if module.padding_mode == "zeros" else f"padding_mode {module.padding_mode!r} is not written"
    known = (nn.Linear, nn.ReLU6, nn.Hardtanh, nn.SiLU, nn.LeakyReLU, nn.ZeroPad2d, nn.MaxPool2d, nn.AvgPool2d, nn.BatchNorm2d, *_PASS)
    if isinstance(module, known) or type(module) in _PLAIN:
        return None
    return f"{type(module).__name__} is not known"


@dataclass
class _Graph:
    """Nodes and constants of one file."""

    model: nn.Module
    form: str
    onnx: Any
    nodes: list[Any] = field(default_factory=list)
    constants: list[Any] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _unsigned: int = 0
    _coded: dict[tuple[str, InputCodes], str] = field(default_factory=dict)

    def build(self, graph: fx.Graph, example: Tensor) -> Any:
        helper, kind = self.onnx.helper, self.onnx.TensorProto.FLOAT
        with torch.no_grad():
            result = self.model(example)
        value: dict[fx.Node, str] = {}
        inputs, outputs = [], []
        for node in graph.nodes:
            if node.op == "placeholder":
                value[node] = "input"
                free = {0: "batch", 2: "height", 3: "width"}
                inputs.append(helper.make_tensor_value_info("input", kind, [free.get(i, n) for i, n in enumerate(example.shape)]))
            elif node.op == "output":
                self.node("Identity", [value[node.args[0]]], "output")
                outputs.append(
                    helper.make_tensor_value_info("output", kind, ["batch", *result.shape[1:]] if result.ndim == 2 else [None] * result.ndim)
                )
            elif node.op == "call_module":
                path = str(node.target)
                with at(path):
                    value[node] = self.module(path, self.model.get_submodule(path), value[node.all_input_nodes[0]])
            else:
                value[node] = self.function(node, [value[n] for n in node.args if isinstance(n, fx.Node)])
        if self._unsigned:
            self.notes.append(
                f"the weights of {self._unsigned} layers are stored as uint8 with the zero point 128, so that no processor's sums saturate"
            )
        proto = helper.make_graph(self.nodes, "qcore", inputs, outputs, initializer=self.constants)
        return helper.make_model(proto, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8, producer_name="qcore")

    # pieces ------------------------------------------------------------------------------------------------------------------------------

    def node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(self.onnx.helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def constant(self, name: str, value: Tensor) -> str:
        self.constants.append(self.onnx.numpy_helper.from_array(value.detach().cpu().contiguous().numpy(), name))
        return name

    def function(self, node: fx.Node, inputs: list[str]) -> str:
        if node.target in _FLAT:
            return self.node("Flatten", inputs, node.name, axis=1)
        if node.target is F.relu6:
            return self.clip(node.name, inputs[0], 0.0, 6.0)
        if node.target is F.silu:
            return self.node("Mul", [inputs[0], self.node("Sigmoid", inputs, f"{node.name}.sigmoid")], node.name)
        return self.node(_PLAIN[node.target], inputs, node.name)

    def clip(self, name: str, x: str, low: float, high: float) -> str:
        ends = [self.constant(f"{name}.{end}", torch.tensor(v)) for end, v in (("low", low), ("high", high))]
        return self.node("Clip", [x, *ends], name)

    def module(self, path: str, module: nn.Module, x: str) -> str:
        if isinstance(module, QuantizedConv | QuantizedLinear):
            return self.quantized(path, module, x)
        if isinstance(module, Sum):
            both = [self.module(f"{path}.{part}", getattr(module, part), x) for part in ("coarse", "fine")]
            return self.node("Add", both, path)
        if isinstance(module, _PASS):
            return x
        if type(module) in _PLAIN:
            return self.node(_PLAIN[type(module)], [x], path)
        for kind, emit in _EMITTERS.items():
            if isinstance(module, kind):
                return emit(self, path, module, x)
        raise AssertionError(f"{type(module).__name__} was not refused")

    def quantized(self, path: str, module: QuantizedConv | QuantizedLinear, x: str) -> str:
        stored = module.stored()
        inputs = None
        if module.activation is not None:
            inputs = input_codes(stored, module.activation)
            x = self.codes(path, x, inputs)
        made = weight_codes(module.qtensor(), module.bias, inputs, self.form)
        self._unsigned += made.zero != 0
        n = made.codes.shape[0]
        shape = module.geometry["weight"] if isinstance(module, QuantizedConv) else list(module.shape)
        zero = torch.full((n,), made.zero, dtype=made.codes.dtype)
        names = [
            self.constant(f"{path}.weight", made.codes.reshape(shape)),
            self.constant(f"{path}.weight_scale", made.scale),
            self.constant(f"{path}.weight_zero", zero),
        ]
        operands = [x, self.node("DequantizeLinear", names, f"{path}.weight_value", axis=0)]
        if made.bias is not None:
            assert inputs is not None
            unit = self.constant(f"{path}.bias_scale", (made.scale.double() * inputs.scale).float())
            zeros = self.constant(f"{path}.bias_zero", torch.zeros(n, dtype=torch.int32))
            operands.append(self.node("DequantizeLinear", [self.constant(f"{path}.bias", made.bias), unit, zeros], f"{path}.bias_value", axis=0))
        elif module.bias is not None:
            operands.append(self.constant(f"{path}.bias", module.bias.float()))
        if isinstance(module, QuantizedLinear):
            return self.node("Gemm", operands, path, transB=1)
        return self.node("Conv", operands, path, **_geometry(module.geometry))

    def codes(self, path: str, x: str, inputs: InputCodes) -> str:
        """x on the grid of its codes; readers of one tensor with the same grid share it."""
        if (x, inputs) not in self._coded:
            scale = self.constant(f"{path}.input_scale", torch.tensor(inputs.scale))
            zero = self.constant(f"{path}.input_zero", torch.tensor(inputs.zero, dtype=torch.uint8))
            codes = self.node("QuantizeLinear", [x, scale, zero], f"{path}.input_codes")
            self._coded[x, inputs] = self.node("DequantizeLinear", [codes, scale, zero], f"{path}.input_value")
        return self._coded[x, inputs]


def _geometry(g: Mapping[str, Any]) -> dict[str, Any]:
    pads = sides(g)
    return {
        "kernel_shape": list(g["weight"][2:]),
        "strides": list(g["stride"]),
        "pads": [before for before, _ in pads] + [after for _, after in pads],
        "dilations": list(g["dilation"]),
        "group": g["groups"],
    }


def _pair(value: Any) -> list[int]:
    return list(value) if isinstance(value, tuple | list) else [value, value]


def _conv(graph: _Graph, path: str, m: Any, x: str) -> str:
    operands = [x, graph.constant(f"{path}.weight", m.weight.float())]
    if m.bias is not None:
        operands.append(graph.constant(f"{path}.bias", m.bias.float()))
    return graph.node("Conv", operands, path, **_geometry(QuantizedConv.geometry_of(m)))


def _linear(graph: _Graph, path: str, m: Any, x: str) -> str:
    operands = [x, graph.constant(f"{path}.weight", m.weight.float())]
    if m.bias is not None:
        operands.append(graph.constant(f"{path}.bias", m.bias.float()))
    return graph.node("Gemm", operands, path, transB=1)


def _pool(graph: _Graph, path: str, m: Any, x: str) -> str:
    op = "MaxPool" if isinstance(m, nn.MaxPool2d) else "AveragePool"
    extra = {"dilations": _pair(m.dilation)} if op == "MaxPool" else {"count_include_pad": int(m.count_include_pad)}
    sizes = {"kernel_shape": _pair(m.kernel_size), "strides": _pair(m.stride), "pads": [*_pair(m.padding), *_pair(m.padding)]}
    return graph.node(op, [x], path, ceil_mode=int(m.ceil_mode), **sizes, **extra)


def _pad(graph: _Graph, path: str, m: Any, x: str) -> str:
    left, right, top, bottom = m.padding
    return graph.node("Pad", [x, graph.constant(f"{path}.pads", torch.tensor([0, 0, top, left, 0, 0, bottom, right]))], path)


def _batchnorm(graph: _Graph, path: str, m: Any, x: str) -> str:
    gain = m.weight if m.affine else torch.ones_like(m.running_var)
    shift = m.bias if m.affine else torch.zeros_like(m.running_var)
    values = (("weight", gain), ("bias", shift), ("running_mean", m.running_mean), ("running_var", m.running_var))
    return graph.node("BatchNormalization", [x, *(graph.constant(f"{path}.{n}", t.float()) for n, t in values)], path, epsilon=m.eps)


def _silu(graph: _Graph, path: str, m: Any, x: str) -> str:
    return graph.node("Mul", [x, graph.node("Sigmoid", [x], f"{path}.sigmoid")], path)


_EMITTERS: dict[type[nn.Module], Callable[[_Graph, str, Any, str], str]] = {
    **dict.fromkeys(_CONVS, _conv),
    nn.Linear: _linear,
    nn.Hardtanh: lambda g, path, m, x: g.clip(path, x, float(m.min_val), float(m.max_val)),  # ReLU6 is one
    nn.SiLU: _silu,
    nn.LeakyReLU: lambda g, path, m, x: g.node("LeakyRelu", [x], path, alpha=float(m.negative_slope)),
    nn.ZeroPad2d: _pad,
    nn.MaxPool2d: _pool,
    nn.AvgPool2d: _pool,
    nn.AdaptiveAvgPool2d: lambda g, path, m, x: g.node("GlobalAveragePool", [x], path),
    nn.Flatten: lambda g, path, m, x: g.node("Flatten", [x], path, axis=1),
    nn.BatchNorm2d: _batchnorm,
}
