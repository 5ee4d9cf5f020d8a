"""Mixtures of experts: fused stacks as transformers keeps them, the function that runs them with taps, and their quantized form.

Since transformers 5 the experts of a layer are three-dimensional parameters of one module: `gate_up_proj [E, 2I, H]` (or `up_proj [E, I, H]` where
nothing is gated) and `down_proj [E, H, I]`; gpt_oss keeps both transposed, with biases, gate and up interleaved.  The module's flags say which.  Its
forward goes through transformers' `ExpertsInterface`, as attention does through its own; so one function, registered as "qcore", serves every family,
and no `forward` is patched.  Who routes to the experts is not its business: it is given the chosen experts and what their outputs are multiplied by.

A quantized stack stands under the parameter's own name and holds one leaf for each expert.  So the experts module stays what it was (its gate, its
biases, its interface), experts may have specs of their own, and every leaf chooses its kernel like any linear layer.  It answers as the parameter
would, in values: `stack[ids]` is float [n, 2I, H], and a torch function that is given the stack gets all of it.  So the implementations that
transformers offers (eager, batched_mm, grouped_mm) run too; they unpack what they use, each time.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from qcore.errors import SpecError
from qcore.model.layers import LINEAR, Layout, register_predicate
from qcore.model.tap import tap
from qcore.modules import place
from qcore.modules.linear import QuantizedLinear
from qcore.modules.replace import Pieces, Stored, quantized_leaf, register_leaf, register_stack
from qcore.modules.stored import StoredWeight, resolved
from qcore.numbers import QuantSpec
from qcore.numbers.granularity import Shape
from qcore.packing import Packing
from torch import Tensor, nn

NAME = "qcore"
DOWN = "down_proj"


# what is a stack, what is a router ------------------------------------------------------------------------------------------------------------


def up_name(module: nn.Module) -> str:
    """The parameter that reads the stream: "gate_up_proj", or "up_proj" where nothing is gated."""
    return "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"


def is_stack(module: nn.Module) -> bool:
    """Whether `module` is a fused stack of experts behind transformers' interface, float or quantized."""
    flags = all(hasattr(module, flag) for flag in ("num_experts", "has_gate", "has_bias", "is_transposed", "is_concatenated"))
    return flags and all(_is_fused(getattr(module, name, None)) for name in (up_name(module), DOWN))


def _is_fused(value: Any) -> bool:
    return isinstance(value, ExpertStack) or (isinstance(value, Tensor) and value.ndim == 3)


def is_router(module: nn.Module) -> bool:
    """Whether `module` scores experts: a matrix of one row for each, and a number of them to choose.  Its own forward chooses."""
    weight = getattr(module, "weight", None)
    top_k, experts = getattr(module, "top_k", None), getattr(module, "num_experts", None)
    return isinstance(weight, Tensor) and weight.ndim == 2 and isinstance(top_k, int) and weight.shape[0] == experts


def stacks(model: nn.Module) -> dict[str, nn.Module]:
    """Path → stack, in order of the layers."""
    return {path: module for path, module in model.named_modules() if is_stack(module)}


def gate_channels(module: Any) -> tuple[tuple[range, ...], tuple[range, ...]]:
    """The rows of the up parameter that are gate, and those that are up; empty where they are interleaved or nothing is gated."""
    if not module.has_gate or not module.is_concatenated:
        return (), ()
    size = features(module)[1]
    return (range(size),), (range(size, 2 * size),)


def features(module: Any) -> tuple[int, int]:
    """(H, I): channels of the stream, and inside an expert."""
    down = getattr(module, DOWN)
    a, b = down.shape[1:]
    return (b, a) if module.is_transposed else (a, b)


# running them -----------------------------------------------------------------------------------------------------------------------------------


def register() -> None:
    """Make "qcore" a name that `set_experts_implementation` knows; safe to call again."""
    from transformers.integrations.moe import ExpertsInterface

    ExpertsInterface.register(NAME, experts_forward)


def can_be_set(model: nn.Module) -> bool:
    """Whether the model has experts that run through transformers' ExpertsInterface."""
    check = getattr(type(model), "_can_set_experts_implementation", None)
    return bool(check is not None and check()) and any(is_stack(m) for m in model.modules())


def experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What the chosen experts make of each token, summed with their weights: eager's result, with the inputs of both matrices tapped.

    hidden_states: [T, H];  top_k_index: [T, k], `num_experts` and more = no expert;  top_k_weights: [T, k], what an expert's output is multiplied by
    return: [T, H]

    Taps "gate_up_proj.input" (or "up_proj.input") and "down_proj.input" see the rows of one expert [t, ·], with the tokens' numbers and with the
    multiplier as their weight.  Sums are in the dtype of the products and are rounded to the input's once.
    """
    up = up_name(module)
    out: Tensor | None = None
    order = top_k_index.flatten().argsort(stable=True)
    counts = torch.bincount(top_k_index.flatten(), minlength=module.num_experts).tolist()
    k, start = top_k_index.shape[1], 0
    for expert, count in enumerate(counts[: module.num_experts]):
        if not count:
            continue
        slots = order[start : start + count]
        start += count
        rows = slots // k
        affinity = top_k_weights.flatten()[slots]
        x = tap(module, f"{up}.input", hidden_states[rows], rows=rows, weight=affinity, part=expert)
        h = _project(module, up, expert, x)
        h = module._apply_gate(h) if module.has_gate else module.act_fn(h)
        h = tap(module, f"{DOWN}.input", h, rows=rows, weight=affinity, part=expert)
        y = _project(module, DOWN, expert, h)
        if module.has_post_expert_norm:
            y = module.post_expert_norm(y)
        y = y * affinity.unsqueeze(1)
        if out is None:
            out = torch.zeros(hidden_states.shape[0], y.shape[1], dtype=y.dtype, device=y.device)
        out.index_add_(0, rows, y)
    return torch.zeros_like(hidden_states) if out is None else out.to(hidden_states.dtype)


def _project(module: Any, name: str, expert: int, x: Tensor) -> Tensor:
    weight = getattr(module, name)
    y = weight.leaf(expert)(x) if isinstance(weight, ExpertStack) else F.linear(x, weight[expert].T if module.is_transposed else weight[expert])
    return y + getattr(module, f"{name}_bias")[expert].to(y.dtype) if module.has_bias else y


# their quantized form -----------------------------------------------------------------------------------------------------------------------------


class ExpertStack(nn.Module):
    """Stands under the name of a fused parameter [E, N, K]: one leaf for each expert, quantized or float.

    leaves:     of E experts, in order; None = comes later (a checkpoint names each leaf by its own path, such as "….experts.gate_up_proj.3")
    shape:      of the parameter whose place it takes, [E, N, K], or [E, K, N] transposed
    """

    name: ClassVar[str] = "expert-stack"

    def __init__(self, shape: tuple[int, int, int] | torch.Size, transposed: bool = False, leaves: Mapping[int, nn.Module] | None = None) -> None:
        super().__init__()
        if len(shape) != 3:
            raise SpecError(f"a stack of experts has a shape of three dimensions, got {tuple(shape)}")
        self.shape, self.transposed = torch.Size(shape), transposed
        for expert, leaf in sorted((leaves or {}).items()):
            self.add_module(str(expert), leaf)

    def leaf(self, expert: int) -> nn.Module:
        return self._modules[str(expert)]  # type: ignore[return-value]

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def ndim(self) -> int:
        return 3

    @property
    def dtype(self) -> torch.dtype:
        first = self.leaf(0)
        return first._job.dtype if isinstance(first, QuantizedLinear) else first.weight.dtype  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        return next(t.device for t in (*self.buffers(), *self.parameters()))

    def value(self, expert: int) -> Tensor:
        """The values of one expert as the float parameter keeps them, [N, K] or [K, N] transposed."""
        leaf = self.leaf(expert)
        w: Any = leaf.dequantize() if isinstance(leaf, StoredWeight) else leaf.weight
        w = w.to(self.dtype)
        return w.T if self.transposed else w

    def dequantize(self) -> Tensor:
        """All of it, in float.  [E, N, K] or [E, K, N]"""
        return torch.stack([self.value(e) for e in range(len(self))])

    def __getitem__(self, experts: Any) -> Tensor:
        """As of the float parameter: an expert's number gives its matrix, a tensor of numbers theirs."""
        if isinstance(experts, Tensor) and experts.ndim:
            used, where = experts.unique(return_inverse=True)
            return torch.stack([self.value(int(e)) for e in used])[where]
        return self.value(int(experts))

    def transpose(self, a: int, b: int) -> Tensor:
        return self.dequantize().transpose(a, b)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """A torch function that is given the stack is given its values."""
        return func(*(_float(a) for a in args), **{k: _float(v) for k, v in (kwargs or {}).items()})

    def config(self) -> dict[str, Any]:
        # float leaves are no run-time modules and have no entry of their own
        plain = [int(e) for e, leaf in self._modules.items() if type(leaf) is nn.Linear]
        return {"shape": list(self.shape), "transposed": self.transposed, "float": plain}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        shape, plain = config["shape"], config["float"]
        if not isinstance(shape, list) or len(shape) != 3 or not all(type(n) is int and 0 < n < 1 << 24 for n in shape):
            raise SpecError(f"a stack of experts has shape {shape!r}")
        e, a, b = shape
        if not isinstance(plain, list) or not all(type(i) is int and 0 <= i < e for i in plain):
            raise SpecError(f"a stack of {e} experts has float experts {plain!r}")
        transposed = bool(config["transposed"])
        with torch.device("meta"):
            leaves = {i: nn.Linear(*((a, b) if transposed else (b, a)), bias=False) for i in plain}
        return cls((e, a, b), transposed, leaves)

    def extra_repr(self) -> str:
        return f"{len(self)} experts of {list(self.shape[1:])}, transposed={self.transposed}"


def _float(value: Any) -> Any:
    return value.dequantize() if isinstance(value, ExpertStack | PackedMatrix) else value


def quantized_experts(module: Any, pieces: Pieces) -> nn.Module:
    """Put quantized stacks in the places of the parameters of `module`, in place; experts that are not in `pieces` stay float."""
    names = dict.fromkeys(name for name, _ in pieces)
    for name in names:
        weight = getattr(module, name)
        leaves: dict[int, nn.Module] = {}
        for expert in range(weight.shape[0]):
            stored = pieces.get((name, expert))
            matrix = weight[expert].T if module.is_transposed else weight[expert]
            n, k = matrix.shape
            with torch.device("meta"):
                plain = nn.Linear(k, n, bias=False)
            if stored is None:
                plain.weight = nn.Parameter(matrix.detach().clone(), requires_grad=False)
            leaves[expert] = plain if stored is None else quantized_leaf(plain, stored)
        place(module, name, ExpertStack(weight.shape, module.is_transposed, leaves))
    return module


class PackedMatrix(StoredWeight):
    """Stands under the name of a matrix [N, K] whose module keeps its own forward (a router): packed, unpacked when a torch function asks for it.

    Its values come in the dtype of the first float tensor beside it: F.linear(x, packed) multiplies in the dtype of x.
    """

    name: ClassVar[str] = "packed-matrix"

    def __init__(self, parts: Mapping[str, Tensor], spec: QuantSpec, shape: Shape, packing: Packing) -> None:
        super().__init__(parts, spec, shape, packing)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        given = [a for a in (*args, *(kwargs or {}).values()) if isinstance(a, Tensor) and a.is_floating_point()]

        def value(a: Any) -> Any:
            if not isinstance(a, PackedMatrix):
                return a
            return a.dequantize().to(given[0].dtype) if given else a.dequantize()

        return func(*(value(a) for a in args), **{k: value(v) for k, v in (kwargs or {}).items()})

    def type(self, dst_type: Any) -> Tensor:  # type: ignore[override]
        """As of the float parameter: its values in another dtype."""
        return self.dequantize().to(dst_type)

    def config(self) -> dict[str, Any]:
        return self.stored_config()

    @classmethod
    def from_config(cls, config: dict[str, Any], registry: Any = None) -> Self:
        return cls(**cls.stored_arguments(config, resolved(registry)))


def quantized_router(module: nn.Module, stored: Stored) -> nn.Module:
    """Put the packed matrix in the place of the router's weight, in place: how it chooses stays its own."""
    if stored.activation is not None or stored.online is not None:
        raise SpecError(f"a router ({type(module).__name__}) computes with its matrix itself: its input is not quantized; drop the rule for it")
    place(module, "weight", PackedMatrix(stored.packing.pack(stored.weight), stored.weight.spec, stored.weight.shape, stored.packing))
    return module


# how they lie -------------------------------------------------------------------------------------------------------------------------------------

# the biases of a stack, [E, N]: channels lie on the last axis, parts first
_BIASES = Layout(
    matrix=lambda b: b,
    tensor=lambda m, shape: m.reshape(shape),
    rows=LINEAR.rows,
    channels=lambda b, axis: (b, lambda c: c),
)

register_predicate(lambda module, name: name == "weight" and is_router(module), lambda module, name: LINEAR)
register_predicate(lambda module, name: name.endswith("_bias") and is_stack(module), lambda module, name: _BIASES)
register_leaf(is_router, quantized_router)
register_stack(is_stack, quantized_experts)
