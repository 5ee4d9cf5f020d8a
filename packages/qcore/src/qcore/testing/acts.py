"""Checks of what looks and chooses: observers, solvers of one weight, selectors."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from qcore.calibration.observer import Observer
from qcore.calibration.selectors import Selector
from qcore.errors import CalibrationError, SpecError
from qcore.numbers import QTensor, QuantSpec, fake_quantize, int_weight, quantize
from qcore.packing.base import to_stored_scale
from qcore.solvers.base import WeightSolver
from qcore.testing.adapters import deviation
from qcore.testing.contract import by_itself, calls, check_named, kept_tensors, unchanged


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers, the same for the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# observers -------------------------------------------------------------------------------------------------------------------------------


def check_observer(observer: Observer, *, rtol: float = 1e-5, any_split: bool = True, groups: bool = True) -> None:
    """An observer streams: batches, resuming and merging ranks give what one pass over all rows gives; weights count rows.

    any_split: False for observers that sample, whose result depends on the order of rows
    groups:    False for observers of what no layer in groups has (the inputs of element-wise weights)
    """
    name = check_named(observer, "observer", "update", "result", "state", "load", "merge", "fresh")
    x = noise(96, 16) * torch.linspace(0.1, 3, 16)

    def watch(*batches: Tensor, weight: Tensor | None = None) -> Observer:
        with by_itself(f"{name}: fresh() and update()"):
            seen = observer.fresh()
            for rows in batches:
                kept = rows.clone()
                seen.update(rows, None if weight is None else weight.clone())
                assert torch.equal(rows, kept), f"{name}: update() wrote into the rows"
        return seen

    def result(seen: Observer) -> Any:
        with by_itself(f"{name}: result()"):
            return seen.result()

    try:
        found = observer.fresh().result()
    except CalibrationError:
        pass
    else:
        raise AssertionError(f"{name}: result() before any row must raise CalibrationError, it returned {found!r}")
    whole = result(watch(x))
    assert whole is not None, f"{name}: result() returned None"
    _same(result(watch(x)), whole, 0.0, f"{name}: two passes over the same rows differ")
    _same(result(watch(x, weight=torch.ones(96))), whole, rtol, f"{name}: weight 1 for every row is not the same as no weight")
    if groups:
        _same(result(watch(x.unsqueeze(0))), whole, rtol, f"{name}: rows [1, T, K] of a layer in one group do not give what rows [T, K] give")
    half = watch(x[:40])
    with by_itself(f"{name}: state() and load()"):
        state = half.state()
        assert isinstance(state, Mapping) and all(isinstance(t, Tensor) for t in state.values()), f"{name}: state() holds only tensors, by name"
        resumed = observer.fresh()
        resumed.load(state)
        for seen in (half, resumed):
            seen.update(x[40:])
    _same(result(resumed), result(half), 0.0, f"{name}: going on from state() is not the same as going on")
    if any_split:
        _check_split(name, observer, x, whole, rtol, watch, result)
    assert not observer.fresh().state(), f"{name}: fresh() has seen something already"


def _check_split(name: str, observer: Observer, x: Tensor, whole: Any, rtol: float, watch: Any, result: Any) -> None:
    pieces = x.split([40, 8, 48])
    _same(result(watch(*pieces)), whole, rtol, f"{name}: the result depends on how rows are cut into batches")
    with by_itself(f"{name}: merge()"):
        merged = observer.fresh()
        merged.merge([watch(piece).state() for piece in pieces])
    _same(result(merged), whole, rtol, f"{name}: merged ranks do not give what one pass gives")
    times = torch.arange(96) % 3  # rows that were never there, once, twice
    twice = result(watch(x.repeat_interleave(times, 0)))
    _same(result(watch(x, weight=times.double())), twice, rtol, f"{name}: a row of weight 2 is not two rows, or one of weight 0 is not left out")


def _same(a: Any, b: Any, rtol: float, message: str) -> None:
    if isinstance(a, Tensor):
        a = a.squeeze(0) if a.ndim == b.ndim + 1 else a  # a group of its own
        assert a.shape == b.shape, f"{message}: shape {tuple(a.shape)} and {tuple(b.shape)}"
        assert torch.allclose(a.double(), b.double(), rtol=rtol, atol=rtol), f"{message}: by {deviation(a.double(), b.double()):.2g}"
    elif isinstance(a, Mapping):
        for key in a:
            _same(a[key], b[key], rtol, f"{message} ({key})")
    elif isinstance(a, Sequence) and not isinstance(a, str):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            _same(x, y, rtol, f"{message} ([{i}])")
    else:
        assert a == b or (isinstance(a, float) and abs(a - b) <= rtol * max(abs(a), abs(b))), f"{message}: {a} and {b}"


# solvers ---------------------------------------------------------------------------------------------------------------------------------


def check_solver(solver: WeightSolver, spec: QuantSpec | None = None, *, shape: tuple[int, int] = (24, 64)) -> None:
    """A solver stores what the spec says, the same twice, takes dead inputs and zero rows, and is no worse than rounding by what it looks at.

    It is measured by the Gram-weighted error where it observes "gram"; a data-free solver may minimise what it likes.
    """
    spec = int_weight(4, 32) if spec is None else spec
    name = f"{check_named(solver, 'solver', 'solve')} on {spec}"
    n, k = shape
    x = noise(256, k) @ noise(k, k, seed=1) * torch.logspace(-1, 1, k)
    w = noise(n, k, seed=2)
    x[:, 3] = 0  # an input that never fires
    w[1] = 0
    seen = _seen(solver, name, x)
    q = _solved(solver, name, w, spec, seen)
    values = q.dequantize()
    assert torch.isfinite(values).all(), f"{name}: the dequantized weight is not finite; look at dead inputs (zero columns of the Gram) and zero rows"
    assert float(values[1].abs().max()) <= float(values.abs().max()) * 1e-3, f"{name}: a row of zeros came out as {float(values[1].abs().max()):.3g}"
    # the codes are what `quantize` would find for these very values: nothing is stored that the spec cannot say
    back = quantize(values, spec, {p: t for p, t in q.parts.items() if p != "codes"}).dequantize()
    assert deviation(back, values) < 1e-5, f"{name}: its values are not on its own grid"
    again = _solved(solver, name, w, spec, seen)
    assert all(torch.equal(again.parts[p], t) for p, t in q.parts.items()), f"{name}: two runs on the same weight give different parts"
    if "gram" in seen:
        plain = fake_quantize(w, spec)
        ours, nearest = (((w - v) @ seen["gram"] * (w - v)).sum() for v in (values, plain))
        assert ours <= nearest * 1.0001, f"{name}: error tr(ΔW G ΔWᵀ) = {ours:.4g}, rounding to nearest has {nearest:.4g}"
    if seen:
        groups = _seen(solver, name, torch.stack([x, x.flip(1)]))
        try:
            grouped = solver.solve(w.clone(), spec, groups)
        except SpecError:
            return  # it says itself that it takes none
        except Exception as e:
            raise AssertionError(f"{name} on a layer in 2 groups, whose 'gram' is [2, K, K] and the like: {type(e).__name__}: {e}") from e
        assert torch.isfinite(grouped.dequantize()).all(), f"{name}: on a layer in 2 groups the weight is not finite"


def _seen(solver: WeightSolver, name: str, rows: Tensor) -> dict[str, Any]:
    observes = getattr(solver, "observes", None)
    assert isinstance(observes, tuple), f"{name}: `observes` is a tuple of observers, () for none, got {observes!r}"
    seen = {}
    for prototype in observes:
        assert not isinstance(prototype, type | str), f"{name} observes {prototype!r}; list prototypes, such as (Gram(),)"
        with calls(f"{name}: observer {prototype!r}"):
            watch = prototype.fresh()
            watch.update(rows)
            seen[prototype.name] = watch.result()
    return seen


def _solved(solver: WeightSolver, name: str, w: Tensor, spec: QuantSpec, seen: dict[str, Any]) -> QTensor:
    """What it finds, held to the form of what `quantize` stores; what it was given is as it was."""
    kept, known = w.clone(), kept_tensors(seen)
    with by_itself(f"{name}: solve"):
        q = solver.solve(w, spec, seen)
    assert torch.equal(w, kept), f"{name} wrote into the weight; it must return a QTensor and leave its input alone"
    assert unchanged(seen, known), f"{name} wrote into what was seen; other weights with the same input are solved by it too"
    assert isinstance(q, QTensor), f"{name} returned a {type(q).__name__}; return a QTensor, as `quantize(values, spec)` makes one"
    assert q.shape == tuple(w.shape), f"{name}: the QTensor has shape {tuple(q.shape)}, the weight {tuple(w.shape)}"
    assert q.spec == spec, f"{name} returned another spec: {q.spec}"
    plain = quantize(w, spec)
    assert set(q.parts) == set(plain.parts), (
        f"{name}: the QTensor has the parts {', '.join(sorted(q.parts))}, the spec stores {', '.join(sorted(plain.parts))}"
    )
    for part, t in plain.parts.items():
        own = q.parts[part]
        assert own.shape == t.shape and own.dtype == t.dtype, (
            f"{name}: part {part!r} is {own.dtype} {tuple(own.shape)}, what the spec stores is {t.dtype} {tuple(t.shape)}"
        )
    if isinstance(spec.scale, str) and "scale" in q.parts:
        with calls(name):
            to_stored_scale(q.parts["scale"], spec)
    return q


# selectors -------------------------------------------------------------------------------------------------------------------------------


def check_selector(selector: Selector, *, count: int = 40, k: int = 8) -> None:
    """A selector returns k different indices in the order of choice, the same ones for the same embeddings."""
    name = check_named(selector, "selector", "select")
    embeddings = noise(count, 12)
    kept, scores = embeddings.clone(), torch.linspace(0, 1, count)

    def choose(k: int) -> list[int]:
        with by_itself(f"{name}: select"):
            chosen = list(selector.select(embeddings, k, scores=scores))
            assert all(isinstance(i, int) or (getattr(i, "ndim", 1) == 0 and int(i) == i) for i in chosen), (
                f"{name} returned {chosen[:3]} …; return row indices, whole numbers"
            )
            return [int(i) for i in chosen]

    chosen = choose(k)
    assert torch.equal(embeddings, kept), f"{name} wrote into the embeddings"
    assert len(chosen) == k, f"{name} returned {len(chosen)} indices, asked for {k}"
    assert len(set(chosen)) == k, f"{name} chose an index twice: {chosen}"
    assert all(0 <= i < count for i in chosen), f"{name} returned an index outside 0 … {count - 1}: {chosen}"
    again = choose(k)
    assert again == chosen, f"{name} is not deterministic: {chosen}, then {again}; a random one needs a seed= field"
    assert sorted(choose(count)) == list(range(count)), f"{name}: k = all samples must return every index"
    with calls(f"{name}: select without scores, where only CalibrationError is allowed,"), suppress(CalibrationError):
        selector.select(embeddings, k)
