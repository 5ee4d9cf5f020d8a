"""One check for each kind of thing that a plug-in may bring.  Each raises AssertionError, and says what is wrong and what to do.

Every class is checked by what its protocol promises, and by nothing else: laws (round trips, merges, equality in float64), not golden numbers.
"""

import copy
import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qcore.calibration.observer import Observer
from qcore.errors import CalibrationError
from qcore.model.adapter import Batch, ModelAdapter, tied_names
from qcore.model.layers import layout
from qcore.model.reader import DictReader, TensorReader
from qcore.model.tap import Tap, attach, detach
from qcore.model.topology import Site, Topology
from qcore.modules.runtime import RuntimeModule
from qcore.numbers import NumberFormat, PerTensor, QTensor, QuantSpec, fake_quantize, int_weight, quantize, spec_from_dict, spec_to_dict
from qcore.ops.kernel import Job, Kernel
from qcore.packing.base import Packing
from qcore.solvers.base import WeightSolver
from qcore.testing.adapters import check_adapter, deviation, outputs, to_double
from qcore.transforms.apply import INSERTABLE, apply_rewrite
from qcore.transforms.base import Transform
from qcore.transforms.rewrite import Rewrite, RewrittenReader, cut_ties, rewritten_topology

__all__ = [
    "check_adapter",
    "check_format",
    "check_kernel",
    "check_module",
    "check_observer",
    "check_packing",
    "check_selector",
    "check_solver",
    "check_transform",
    "fit_transform",
    "observe",
]


def _rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# numbers ---------------------------------------------------------------------------------------------------------------------------------


def check_format(fmt: NumberFormat) -> None:
    """A number format rounds to the nearest of at most 2**bits numbers, its codes survive decode → encode, and it is plain data."""
    d = fmt.dim
    assert fmt.lo < fmt.hi, f"{fmt}: lo={fmt.lo} is not below hi={fmt.hi}"
    x = _format_values(fmt)
    params: dict[str, Tensor] = {}
    if fmt.parts:
        params = {name: part if name in fmt.shared else part[0] for name, part in fmt.fit(x.unsqueeze(0)).items()}
        assert set(params) == set(fmt.parts), f"{fmt}: fit() returned {sorted(params)}, `parts` promises {sorted(fmt.parts)}"
    codes = fmt.encode(x, params)
    shape = x.shape if d == 1 else x.shape[:-1]
    assert codes.shape == shape, (
        f"{fmt}: encode made codes of shape {tuple(codes.shape)} from values of shape {tuple(x.shape)}, wanted {tuple(shape)}"
    )
    assert not codes.is_floating_point(), f"{fmt}: codes are {codes.dtype}; they are integers"
    values = fmt.decode(codes, params)
    assert values.dtype == torch.float32 and values.shape == x.shape, (
        f"{fmt}: decode gives float32 of the values' shape, got {values.dtype} {values.shape}"
    )
    assert torch.isfinite(values).all(), f"{fmt}: decode(encode(x)) is not finite; encode must saturate, not overflow"
    again = fmt.encode(values, params)
    kept = fmt.decode(again, params)
    assert torch.equal(kept, values), f"{fmt}: encode(decode(c)) stands for another number than c in {int((kept != values).sum())} places"
    count = codes.unique().numel()
    assert count <= 2**fmt.bits, f"{fmt}: {count} different codes, more than 2**{fmt.bits}"
    if d == 1:
        _check_scalar_format(fmt, x, values)
    spec = QuantSpec(format=fmt, granularity=PerTensor())
    data = json.loads(json.dumps(spec_to_dict(spec)))
    assert spec_from_dict(data, {fmt.name: type(fmt)}) == spec, (
        f"{fmt}: its dataclass fields do not rebuild it; a checkpoint stores them and nothing else"
    )


def _format_values(fmt: NumberFormat) -> Tensor:
    if fmt.dim > 1:
        return _rand(2048, fmt.dim).clamp(-2, 2) / 2
    if fmt.lo > 0:  # scales: positive numbers over many orders of magnitude
        return torch.logspace(-6, 6, 1001).clamp(fmt.lo, fmt.hi)
    top = min(fmt.hi, 1e4)
    return torch.linspace(max(fmt.lo, -1e4), top, 4001)


def _check_scalar_format(fmt: NumberFormat, x: Tensor, values: Tensor) -> None:
    assert bool((values.diff() >= 0).all()), f"{fmt}: a larger x got a smaller number; encode is not monotone"
    assert values.min() >= fmt.lo * (1 + 1e-6) - 1e-6 or fmt.lo > 0, f"{fmt}: reaches {values.min():.6g}, below lo={fmt.lo}"
    assert values.max() <= fmt.hi * (1 + 1e-6), f"{fmt}: reaches {values.max():.6g}, above hi={fmt.hi}"
    grid = values.unique()
    best = (x.unsqueeze(1) - grid).abs().amin(1)
    worse = (x - values).abs() - best
    assert bool((worse <= 1e-6 * x.abs() + 1e-9).all()), (
        f"{fmt}: encode is not nearest: {float(x[worse.argmax()]):.6g} became {float(values[worse.argmax()]):.6g}, "
        f"{float(worse.max()):.3g} further off than another of its numbers"
    )


# acts ------------------------------------------------------------------------------------------------------------------------------------


def check_observer(observer: Observer, *, rtol: float = 1e-5, any_split: bool = True) -> None:
    """An observer streams: batches, resuming and merging ranks give what one pass over all rows gives.

    any_split: False for observers that sample, whose result depends on the order of rows
    """
    x = _rand(96, 16) * torch.linspace(0.1, 3, 16)

    def watch(*batches: Tensor, weight: bool = False) -> Observer:
        seen = observer.fresh()
        for rows in batches:
            seen.update(rows, torch.ones(rows.shape[0]) if weight else None)
        return seen

    name = observer.name
    try:
        observer.fresh().result()
    except CalibrationError:
        pass
    else:
        raise AssertionError(f"observer {name!r}: result() before any row must raise CalibrationError")
    whole = watch(x).result()
    _same(watch(x).result(), whole, 0.0, f"observer {name!r}: two passes over the same rows differ")
    _same(watch(x, weight=True).result(), whole, rtol, f"observer {name!r}: weight 1 for every row is not the same as no weight")
    half = watch(x[:40])
    resumed = observer.fresh()
    resumed.load(half.state())
    for seen in (half, resumed):
        seen.update(x[40:])
    _same(resumed.result(), half.result(), 0.0, f"observer {name!r}: going on from state() is not the same as going on")
    assert all(isinstance(t, Tensor) for t in half.state().values()), f"observer {name!r}: state() holds only tensors"
    if any_split:
        _same(half.result(), whole, rtol, f"observer {name!r}: the result depends on how rows are cut into batches")
        merged = observer.fresh()
        merged.merge([watch(x[:40]).state(), watch(x[40:]).state()])
        _same(merged.result(), whole, rtol, f"observer {name!r}: merged ranks do not give what one pass gives")
    assert not observer.fresh().state(), f"observer {name!r}: fresh() has seen something already"


def _same(a: Any, b: Any, rtol: float, message: str) -> None:
    if isinstance(a, Tensor):
        assert a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=rtol, atol=rtol), (
            f"{message}: by {deviation(a.double(), b.double()):.2g}"
        )
    elif isinstance(a, Mapping):
        for key in a:
            _same(a[key], b[key], rtol, f"{message} ({key})")
    elif isinstance(a, Sequence) and not isinstance(a, str):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            _same(x, y, rtol, f"{message} ([{i}])")
    else:
        assert a == b, f"{message}: {a} and {b}"


def check_solver(solver: WeightSolver, spec: QuantSpec | None = None, *, shape: tuple[int, int] = (24, 64)) -> None:
    """A solver stores what the spec says, the same twice, takes dead inputs and zero rows, and is no worse than rounding by what it looks at.

    It is measured by the Gram-weighted error where it observes "gram"; a data-free solver may minimise what it likes.
    """
    spec = int_weight(4, 32) if spec is None else spec
    n, k = shape
    x = _rand(256, k) @ _rand(k, k, seed=1) * torch.logspace(-1, 1, k)
    w = _rand(n, k, seed=2)
    x[:, 3] = 0  # an input that never fires
    w[1] = 0
    seen = {}
    for prototype in solver.observes:
        watch = prototype.fresh()
        watch.update(x)
        seen[prototype.name] = watch.result()
    kept = w.clone()
    q = solver.solve(w, spec, seen)
    name = f"solver {solver.name!r} on {spec}"
    assert torch.equal(w, kept), f"{name} wrote into the weight; it must return a QTensor and leave its input alone"
    assert isinstance(q, QTensor) and q.shape == shape, f"{name}: the QTensor has shape {getattr(q, 'shape', None)}, the weight {shape}"
    assert q.spec == spec, f"{name} returned another spec: {q.spec}"
    values = q.dequantize()
    assert torch.isfinite(values).all(), f"{name}: the dequantized weight is not finite; look at dead inputs (zero columns of the Gram) and zero rows"
    assert float(values[1].abs().max()) <= float(values.abs().max()) * 1e-3, f"{name}: a row of zeros came out as {float(values[1].abs().max()):.3g}"
    # the codes are what `quantize` would find for these very values: nothing is stored that the spec cannot say
    back = quantize(values, spec, {p: t for p, t in q.parts.items() if p != "codes"}).dequantize()
    assert deviation(back, values) < 1e-5, f"{name}: its values are not on its own grid"
    again = solver.solve(w, spec, seen)
    assert all(torch.equal(again.parts[p], t) for p, t in q.parts.items()), f"{name}: two runs on the same weight give different parts"
    if "gram" in seen:
        plain = fake_quantize(w, spec)
        ours, nearest = (((w - v) @ seen["gram"] * (w - v)).sum() for v in (values, plain))
        assert ours <= nearest * 1.0001, f"{name}: error tr(ΔW G ΔWᵀ) = {ours:.4g}, rounding to nearest has {nearest:.4g}"


def check_transform(
    transform: Transform,
    adapter: ModelAdapter,
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    specs: Mapping[Site, QuantSpec] | None = None,
    after: Rewrite | None = None,
    modules: Mapping[str, type[Any]] | None = None,
    rtol: float = 1e-9,
) -> Rewrite:
    """A transform leaves the function of a tiny model alone (float64), touches nothing itself, and yields data; returns its rewrite.

    specs:   what is to be stored; None: 4-bit integers for every weight site
    after:   a rewrite that is applied first, such as FoldNorm's before a rotation
    modules: run-time modules that it may insert; None: qcore's own
    rtol:    of exact transforms; others are held to the `Rewrite.exact` that they claim
    """
    name = f"transform {transform.name!r}"
    twin = copy.deepcopy(model).double().eval()
    adapter.prepare(twin)
    data = [to_double(batch) for batch in batches]
    reference = [outputs(adapter, twin, batch) for batch in data]
    if after is not None:
        twin = apply_rewrite(twin, after, modules)
    before = {n: t.clone() for n, t in twin.state_dict().items()}
    topology = adapter.topology(twin)
    rewrite = fit_transform(transform, adapter, twin, data, specs)
    state = twin.state_dict()
    assert set(state) == set(before) and all(torch.equal(state[n], t) for n, t in before.items()), (
        f"{name} wrote into the model; a transform yields data"
    )
    _check_scope(rewrite, topology, twin, name, modules)
    limit = rtol if transform.exact else rewrite.exact
    assert transform.exact or rewrite.exact > 0, f"{name} has exact=False, so its rewrite must claim a deviation (Rewrite.exact)"
    _check_equal(adapter, apply_rewrite(twin, rewrite, modules), data, reference, limit, f"{name} changed the outputs")
    _check_stored(rewrite, twin, modules, name)
    if not rewrite.inserts:
        # a second fit on what the first one leaves composes with it
        left = RewrittenReader(DictReader(dict(twin.state_dict())), rewrite, twin)
        second = fit_transform(transform, adapter, twin, data, specs, topology=rewritten_topology(topology, rewrite), reader=left)
        both = rewrite.then(second)
        _check_equal(
            adapter, apply_rewrite(twin, both, modules), data, reference, 2 * limit, f"{name}, fitted a second time and composed, changed the outputs"
        )
    return rewrite if after is None else after.then(rewrite)


def fit_transform(
    transform: Transform,
    adapter: ModelAdapter,
    model: nn.Module,
    batches: Sequence[Batch],
    specs: Mapping[Site, QuantSpec] | None = None,
    *,
    topology: Topology | None = None,
    reader: TensorReader | None = None,
) -> Rewrite:
    """The rewrite of a model in memory, block by block or whole, as the transform's scope says; observed on the float model.

    specs:    None: 4-bit integers for every weight site
    topology: None: the adapter's
    reader:   None: the model's own tensors
    """
    topology = adapter.topology(model) if topology is None else topology
    specs = {site: int_weight(4) for site in topology.sites} if specs is None else specs
    reader = DictReader(dict(model.state_dict())) if reader is None else reader
    rewrite = Rewrite()
    for piece in [topology] if transform.scope == "model" else [topology.within(block) for block in topology.blocks]:
        own = {*piece.sites, *(site.input for site in piece.sites), *piece.activations}
        here = {site: spec for site, spec in specs.items() if site in own}
        seen = observe(adapter, model, transform.wants(piece, here), batches)
        rewrite = rewrite.then(transform.fit(piece, here, seen, model, reader))
    return cut_ties(rewrite, model, topology.ties)


def observe(
    adapter: ModelAdapter, model: nn.Module, wishes: Mapping[Site, Sequence[Observer]], batches: Iterable[Batch]
) -> dict[Site, dict[str, Any]]:
    """What observers see at inputs of modules and at taps, on the float model: enough for tests; calibration proper is `qcore.calibration.runner`."""
    watching = {site: [o.fresh() for o in observers] for site, observers in wishes.items()}
    undo: list[Callable[[], None]] = []
    for site, observers in watching.items():
        module = model.get_submodule(site.module)
        if site.tensor == "input" and site.part is None:
            undo.append(module.register_forward_pre_hook(_InputHook(observers)).remove)
        else:
            handler = _Watch(observers)
            attach(module, site.tensor, handler, site.part)
            undo.append(partial(detach, module, site.tensor, handler, site.part))
    try:
        for batch in batches:
            outputs(adapter, model, batch)
    finally:
        for step in undo:
            step()
    return {site: {o.name: o.result() for o in observers} for site, observers in watching.items()}


class _InputHook:
    def __init__(self, observers: Sequence[Observer]) -> None:
        self.observers = observers

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        for observer in self.observers:
            observer.update(layout(module).rows(args[0]))


class _Watch(Tap):
    """Observes rows where a module taps them."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        super().__init__()
        self.observers = observers

    def forward(self, x: Tensor, rows: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        for observer in self.observers:
            observer.update(x.reshape(-1, x.shape[-1]), None if weight is None else weight.reshape(-1))
        return x


def _check_scope(rewrite: Rewrite, topology: Topology, model: nn.Module, name: str, modules: Mapping[str, type[Any]] | None) -> None:
    """The rewrite edits only what links name, their norms, and biases of modules on a link."""
    params = {port.param for link in topology.links for port in link.ports} | {site.param for site in topology.sites}
    owners = {p.rpartition(".")[0] for p in params} | {path for link in topology.links for path in link.through}
    known = set(dict(model.named_parameters(remove_duplicate=False))) | set(dict(model.named_buffers()))
    for param in rewrite.edits:
        assert param in known or param in rewrite.derived, f"{name} edits {param!r}, which the model does not have"
        near = {o for o in owners if param.startswith(f"{o}.")}
        assert near, f"{name} edits {param!r}, which lies on no link and no site of the topology"
    ties = tied_names(model)
    for param in rewrite.unties:
        assert param in ties, f"{name} unties {param!r}, which is not tied"
    for new, old in rewrite.derived.items():
        assert old in known, f"{name} derives {new!r} from {old!r}, which the model does not have"
    for path, insert in rewrite.inserts.items():
        registered = INSERTABLE if modules is None else modules
        assert insert.module.type in registered, f"{name} inserts {insert.module.type!r} at {path}, which is no registered run-time module"


def _check_equal(adapter: ModelAdapter, model: nn.Module, data: list[Batch], reference: list[Tensor], limit: float, message: str) -> None:
    gap = max(deviation(outputs(adapter, model, batch), y) for batch, y in zip(data, reference, strict=True))
    assert gap <= limit, (
        f"{message} by {gap:.2g}, allowed is {limit:.2g}; fit it with scale_link, rotate_link or permute_link, which treat both sides"
    )


def _check_stored(rewrite: Rewrite, model: nn.Module, modules: Mapping[str, type[Any]] | None, name: str) -> None:
    tensors, data = rewrite.state()
    back = Rewrite.from_state(tensors, json.loads(json.dumps(data)))
    here, there = apply_rewrite(model, rewrite, modules).state_dict(), apply_rewrite(model, back, modules).state_dict()
    assert set(here) == set(there), f"{name}: state() → from_state() loses {sorted(set(here) ^ set(there))[:3]}"
    moved = [n for n, t in here.items() if not torch.equal(t, there[n])]
    assert not moved, f"{name}: state() → from_state() changes {moved[0]!r}"


def check_selector(selector: Any, *, count: int = 40, k: int = 8) -> None:
    """A selector returns k different indices in the order of choice, the same ones for the same embeddings."""
    embeddings = _rand(count, 12)
    kept = embeddings.clone()
    chosen = [int(i) for i in selector.select(embeddings, k, scores=torch.linspace(0, 1, count))]
    name = f"selector {selector.name!r}"
    assert torch.equal(embeddings, kept), f"{name} wrote into the embeddings"
    assert len(chosen) == k, f"{name} returned {len(chosen)} indices, asked for {k}"
    assert len(set(chosen)) == k, f"{name} chose an index twice: {chosen}"
    assert all(0 <= i < count for i in chosen), f"{name} returned an index outside 0 … {count - 1}: {chosen}"
    again = [int(i) for i in selector.select(embeddings, k, scores=torch.linspace(0, 1, count))]
    assert again == chosen, f"{name} is not deterministic: {chosen}, then {again}; a random one needs a seed= field"
    assert sorted(int(i) for i in selector.select(embeddings, count, scores=torch.linspace(0, 1, count))) == list(range(count)), (
        f"{name}: k = all samples must return every index"
    )


# form ------------------------------------------------------------------------------------------------------------------------------------


def check_packing(packing: Packing, spec: QuantSpec, shape: tuple[int, ...] = (16, 256)) -> None:
    """A packing gives every part back bit for bit, knows shapes without data, and names its tensors locally."""
    name = f"packing {packing.name!r} on {spec}"
    reason = packing.refuses(spec, shape)
    assert reason is None, f"{name} refuses shape {shape}: {reason}; check it with a spec that it accepts"
    q = _every_code(quantize(_rand(*shape), spec))
    packed = packing.pack(q)
    for key in packed:
        assert "." not in key, f"{name}: {key!r} has a dot; names are local to the module, the checkpoint adds the path"
    back = packing.unpack({n: t.clone() for n, t in packed.items()}, spec, shape)
    assert set(back.parts) == set(q.parts), f"{name}: parts {sorted(q.parts)} came back as {sorted(back.parts)}"
    for part, t in q.parts.items():
        other = back.parts[part]
        assert other.shape == t.shape and torch.equal(other.to(t.dtype), t), f"{name}: part {part!r} did not come back bit for bit"
    assert torch.equal(back.dequantize(), q.dequantize()), f"{name}: the unpacked tensor stands for other values"
    meta = packing.pack(QTensor(spec, {p: t.to("meta") for p, t in q.parts.items()}, q.shape))
    for key, t in packed.items():
        assert key in meta and meta[key].shape == t.shape and meta[key].dtype == t.dtype, (
            f"{name}: on meta tensors {key!r} has another shape or dtype"
        )


def _every_code(q: QTensor) -> QTensor:
    """The tensor with every code that its format can round to, also those that random weights rarely reach (-8 of 4-bit integers)."""
    fmt = q.spec.format
    if fmt.parts or fmt.dim > 1:
        return q
    reached = fmt.encode(_format_values(fmt)).unique()
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
    """A kernel computes x Ŵᵀ as the dequantized weight would, in every number of rows, with leading axes, and leaves its inputs alone.

    rtol: of the largest output; say why where it is larger (bfloat16 accumulation: 2e-2)
    """
    name = f"kernel {kernel.name!r}"
    q = quantize(_rand(*shape) / shape[1] ** 0.5, spec)
    job = Job("linear", packing.name, spec, shape, activation, torch.device(device), dtype, partial(packing.unpack, spec=spec, shape=shape))
    reason = kernel.refuses(job)
    assert reason is None, f"{name} refuses {spec} {shape} on {device}: {reason}; check it with a job that it accepts"
    other = kernel.refuses(replace(job, packing="no such packing", unpack=None))
    assert other is not None, f"{name} accepts a packing that it has never heard of; compare job.packing in refuses()"
    parts = kernel.prepare({n: t.to(device) for n, t in packing.pack(q).items()}, job)
    w = q.dequantize()
    for t in rows:
        x = _rand(t, shape[1], seed=t).to(device, dtype)
        kept = x.clone()
        y = kernel(x, parts, job)
        assert torch.equal(x, kept), f"{name} wrote into its input"
        assert y.shape == (t, shape[0]) and y.dtype == dtype, f"{name}: x {tuple(x.shape)} {dtype} gave {tuple(y.shape)} {y.dtype}"
        seen = x.float().cpu() if activation is None else fake_quantize(x.float().cpu(), activation)
        gap = deviation(y.double().cpu(), (seen.double() @ w.double().T))
        assert gap <= rtol, f"{name} on {t} rows is off the dequantized reference by {gap:.2g} of the largest output, allowed is {rtol:.2g}"
    x = _rand(2, 3, shape[1]).to(device, dtype)
    y = kernel(x, parts, job)
    assert y.shape == (2, 3, shape[0]), f"{name}: leading axes [2, 3] came out as {tuple(y.shape[:-1])}"


def check_module(module: RuntimeModule, *inputs: Tensor, registry: Any = None) -> None:
    """A run-time module is rebuilt from its JSON-ready config and its state_dict, and can be copied.

    registry: for modules whose `from_config` asks for one, to find formats and packings by name
    """
    name = f"module {module.name!r}"
    config = json.loads(json.dumps(module.config()))
    assert isinstance(module, nn.Module), f"{name} is no nn.Module"
    make: Any = type(module).from_config
    twin = make(config, registry=registry) if "registry" in inspect.signature(make).parameters else make(config)
    state = module.state_dict()
    fresh = twin.state_dict()
    assert set(fresh) == set(state), f"{name}: from_config(config()) lacks or adds {sorted(set(fresh) ^ set(state))[:3]} of the state"
    wrong = [n for n in state if fresh[n].shape != state[n].shape or fresh[n].dtype != state[n].dtype]
    assert not wrong, f"{name}: from_config(config()) makes {wrong[0]!r} with another shape or dtype, so a checkpoint cannot fill it"
    twin.load_state_dict(state, assign=True)  # fresh parameters may be on meta
    assert json.loads(json.dumps(twin.config())) == config, f"{name}: config() changes on the way through from_config"
    with torch.no_grad():
        y = module(*inputs)
        for other, how in ((twin, "rebuilt from config and state"), (copy.deepcopy(module), "deep-copied")):
            gap = deviation(other(*inputs).double(), y.double())
            assert gap == 0, f"{name} {how} gives other outputs, by {gap:.2g}; keep everything that matters in config() or in buffers"
