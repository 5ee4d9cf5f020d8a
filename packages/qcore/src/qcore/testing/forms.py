"""Checks of the form that a quantized model has: packings, kernels, run-time modules."""

import copy
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qcore.errors import SpecError
from qcore.modules.runtime import RuntimeModule
from qcore.numbers import QTensor, QuantSpec, fake_quantize, fp8_weight, int_weight, mx, quantize
from qcore.ops.kernel import Job, Kernel
from qcore.packing.base import Packing
from qcore.testing.acts import noise
from qcore.testing.adapters import deviation
from qcore.testing.contract import by_itself, calls, check_named, kept_tensors, unchanged
from qcore.testing.numbers import format_values

# what a packing or a kernel is offered besides what it is checked with: it refuses, with a reason, or does it right
OTHERS = (
    int_weight(2),
    int_weight(3, 64),
    int_weight(4, 64),
    int_weight(4, 32, asymmetric=True),
    int_weight(4, 32, scale="bfloat16"),
    int_weight(8),
    int_weight(8, asymmetric=True),
    fp8_weight(),
    mx(),
)
SHAPES = ((16, 192), (5, 64), (3, 7))


def check_packing(packing: Packing, spec: QuantSpec, shape: tuple[int, ...] = (16, 256)) -> None:
    """A packing gives every part back bit for bit, knows shapes without data, names its tensors locally, and refuses what it cannot hold."""
    name = check_named(packing, "packing", "refuses", "pack", "unpack", "rows")
    reason = _refusal(name, packing.refuses, spec, shape)
    assert reason is None, f"{name} on {spec} refuses shape {shape}: {reason}; check it with a spec that it accepts"
    _check_round_trip(packing, f"{name} on {spec}", spec, shape)
    for other in OTHERS:
        for size in (shape, *SHAPES):
            try:
                other.check(size)
            except SpecError:
                continue  # no tensor is stored so
            if _refusal(name, packing.refuses, other, size) is None:
                _check_round_trip(packing, f"{name} accepts {other} of shape {size}, but", other, size)


def _refusal(name: str, refuses: Callable[..., Any], *job: Any) -> str | None:
    with calls(f"{name}: refuses"):
        reason = refuses(*job)
    assert reason is None or (isinstance(reason, str) and reason.strip()), (
        f"{name}: refuses() returned {reason!r}; return None where it accepts, else the reason in words"
    )
    return reason


def _check_round_trip(packing: Packing, name: str, spec: QuantSpec, shape: tuple[int, ...]) -> None:
    q = _every_code(quantize(noise(*shape), spec))
    kept = kept_tensors(dict(q.parts))
    with by_itself(f"{name}: pack"):
        packed = packing.pack(q)
    assert unchanged(dict(q.parts), kept), f"{name}: pack() wrote into the tensor"
    assert isinstance(packed, Mapping) and all(isinstance(t, Tensor) for t in packed.values()), (
        f"{name}: pack() returned {_kinds(packed)}; return a dict of tensors, whatever else there is to know is in the spec and the shape"
    )
    for key in packed:
        assert "." not in key, f"{name}: {key!r} has a dot; names are local to the module, the checkpoint adds the path"
    with by_itself(f"{name}: unpack"):
        back = packing.unpack({n: t.clone() for n, t in packed.items()}, spec, shape)
    assert isinstance(back, QTensor), f"{name}: unpack() returned a {type(back).__name__}; return QTensor(spec, parts, shape)"
    assert back.spec == spec and back.shape == tuple(shape), (
        f"{name}: came back as {back.spec} of shape {back.shape}, was {spec} of shape {tuple(shape)}"
    )
    assert set(back.parts) == set(q.parts), f"{name}: parts {sorted(q.parts)} came back as {sorted(back.parts)}"
    for part, t in q.parts.items():
        other = back.parts[part]
        assert other.shape == t.shape and torch.equal(other.to(t.dtype), t), f"{name}: part {part!r} did not come back bit for bit"
    values = q.dequantize()
    assert torch.equal(back.dequantize(), values), f"{name}: the unpacked tensor stands for other values"
    _check_rows(packing, name, packed, spec, shape, values)
    with calls(f"{name}: pack of tensors on meta, by which a plan knows sizes,"):
        meta = packing.pack(QTensor(spec, {p: t.to("meta") for p, t in q.parts.items()}, q.shape))
    for key, t in packed.items():
        assert key in meta and meta[key].shape == t.shape and meta[key].dtype == t.dtype, (
            f"{name}: on meta tensors {key!r} has another shape or dtype"
        )


def _kinds(value: Any) -> str:
    return str({k: type(v).__name__ for k, v in value.items()}) if isinstance(value, Mapping) else f"a {type(value).__name__}"


def _check_rows(packing: Packing, name: str, packed: Mapping[str, Tensor], spec: QuantSpec, shape: tuple[int, ...], values: Tensor) -> None:
    index = torch.tensor([shape[0] - 1, 0, 1, 1])
    with calls(f"{name}: rows"):
        own = packing.rows(packed, index, spec, shape)
        found = None if own is None else packing.unpack(own, spec, (len(index), *shape[1:])).dequantize()
    assert found is None or torch.equal(found, values[index]), (
        f"{name}: rows() cuts out other rows than those asked for; return None where rows cannot be cut"
    )


def _every_code(q: QTensor) -> QTensor:
    """The tensor with every code that its format can round to, also those that random weights rarely reach (-8 of 4-bit integers)."""
    fmt = q.spec.format
    if fmt.parts or fmt.dim > 1:
        return q
    reached = fmt.encode(format_values(fmt)).unique()
    return QTensor(q.spec, {**q.parts, "codes": reached[torch.arange(q.codes.numel()) % len(reached)].reshape(q.codes.shape)}, q.shape)


def check_kernel(
    kernel: Kernel,
    packing: Packing,
    spec: QuantSpec,
    *,
    activation: QuantSpec | None = None,
    shape: tuple[int, int] = (48, 128),
    rows: Sequence[int] = (1, 7, 33),
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    rtol: float = 1e-4,
) -> None:
    """A kernel computes x Ŵᵀ as the dequantized weight would, for any number of rows and leading axes, writes into nothing, and refuses the rest.

    rtol: of the largest output; say why where it is larger (bfloat16 accumulation: 2e-2)
    """
    name = check_named(kernel, "kernel", "refuses", "prepare", "__call__")
    assert kernel.op == "linear", (
        f"{name} is of op {kernel.op!r}; this checks op 'linear', y = x Ŵᵀ, and a kernel of an op that nobody asks for never runs"
    )
    assert isinstance(getattr(kernel, "rank", None), int), f"{name} has no rank; the lowest that does not refuse is chosen, the reference has 1000"
    first = Job("linear", packing.name, spec, shape, activation, torch.device(device), dtype, partial(packing.unpack, spec=spec, shape=shape))
    reason = _refusal(name, kernel.refuses, first)
    assert reason is None, f"{name} refuses {spec} {shape} on {device}: {reason}; check it with a job that it accepts"
    other = _refusal(name, kernel.refuses, replace(first, packing="no such packing", unpack=None))
    assert other is not None, f"{name} accepts a packing that it has never heard of; compare job.packing in refuses()"
    _check_products(kernel, packing, first, rows, rtol, name)
    for weight in OTHERS:
        held = packing.refuses(weight, shape) is None
        job = replace(first, weight=weight, unpack=partial(packing.unpack, spec=weight, shape=shape))
        if held and weight != spec and _refusal(name, kernel.refuses, job) is None:
            _check_products(kernel, packing, job, rows[:1], rtol, f"{name}, which accepts {weight} too,")


def _check_products(kernel: Kernel, packing: Packing, job: Job, rows: Sequence[int], rtol: float, name: str) -> None:
    k = job.shape[1]
    q = quantize(noise(*job.shape) / k**0.5, job.weight)
    stored = {n: t.to(job.device) for n, t in packing.pack(q).items()}
    kept = kept_tensors(stored)
    with by_itself(f"{name}: prepare"):
        parts = kernel.prepare(stored, job)
    assert unchanged(stored, kept), f"{name}: prepare() wrote into the stored parts, which are saved again as they are"
    assert isinstance(parts, Mapping), f"{name}: prepare() returned {parts!r}; return the parts as the kernel wants them, a dict"
    w = q.dequantize()
    for lead in [*((t,) for t in rows), (2, 3), (0,)]:
        x = noise(*lead, k, seed=sum(lead)).to(job.device, job.dtype)
        before = x.clone()
        with by_itself(f"{name} on x {[*lead, k]}:"):
            y = kernel(x, parts, job)
            again = kernel(x, parts, job)
        assert torch.equal(x, before), f"{name} wrote into its input"
        assert isinstance(y, Tensor) and y.shape == (*lead, job.shape[0]) and y.dtype == job.dtype, (
            f"{name}: x {[*lead, k]} {job.dtype} gave {f'{[*y.shape]} {y.dtype}' if isinstance(y, Tensor) else repr(y)}, "
            f"wanted {[*lead, job.shape[0]]} {job.dtype}"
        )
        if not x.numel():
            continue  # an expert that nobody was sent to
        assert torch.equal(y, again), f"{name}: two calls on the same rows differ by {deviation(y.double(), again.double()):.2g}"
        seen = x.float().cpu() if job.activation is None else fake_quantize(x.float().cpu().reshape(-1, k), job.activation).reshape(x.shape)
        gap = deviation(y.double().cpu(), (seen.double() @ w.double().T))
        assert gap <= rtol, f"{name} on x {[*lead, k]} is off the dequantized reference by {gap:.2g} of the largest output, allowed is {rtol:.2g}"


def check_module(module: RuntimeModule, *inputs: Tensor, registry: Any = None) -> None:
    """A run-time module is rebuilt from its JSON-ready config and its state_dict, and can be copied.

    registry: for modules whose `from_config` asks for one, to find formats and packings by name
    """
    name = check_named(module, "module", "config", "from_config")
    assert isinstance(module, nn.Module), f"{name} is no nn.Module"
    with calls(f"{name}: config(), which is plain data, as JSON,"):
        config = json.loads(json.dumps(module.config()))
    make: Any = type(module).from_config
    with calls(f"{name}: from_config(config())"):
        twin = make(config, registry=registry) if "registry" in inspect.signature(make).parameters else make(config)
    assert type(twin) is type(module), f"{name}: from_config(config()) gave a {type(twin).__name__}; return cls(…)"
    state = module.state_dict()
    fresh = twin.state_dict()
    assert set(fresh) == set(state), f"{name}: from_config(config()) lacks or adds {sorted(set(fresh) ^ set(state))[:3]} of the state"
    wrong = [n for n in state if fresh[n].shape != state[n].shape or fresh[n].dtype != state[n].dtype]
    assert not wrong, f"{name}: from_config(config()) makes {wrong[0]!r} with another shape or dtype, so a checkpoint cannot fill it"
    twin.load_state_dict(state, assign=True)  # fresh parameters may be on meta
    assert json.loads(json.dumps(twin.config())) == config, f"{name}: config() changes on the way through from_config"
    with torch.no_grad():
        y = _outputs(module, inputs, name)
        for other, how in ((twin, "rebuilt from config and state"), (copy.deepcopy(module), "deep-copied")):
            others = _outputs(other, inputs, f"{name} {how}")
            assert len(others) == len(y), f"{name} {how} gives {len(others)} tensors, not {len(y)}"
            gap = max(deviation(a.double(), b.double()) for a, b in zip(others, y, strict=True))
            assert gap == 0, f"{name} {how} gives other outputs, by {gap:.2g}; keep everything that matters in config() or in buffers"


def _outputs(module: nn.Module, inputs: Sequence[Tensor], name: str) -> list[Tensor]:
    """What comes out, one tensor or several."""
    with by_itself(f"{name}: forward"):
        y = module(*inputs)
    found = [t for t in (y if isinstance(y, tuple | list) else [y]) if isinstance(t, Tensor)]
    assert found, f"{name}: forward gave no tensor, but {y!r:.100}"
    return found
