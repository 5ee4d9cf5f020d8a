"""Checks of what takes part in a whole run: sources of models, allocators, block solvers, tasks."""

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from qcore.evaluation.store import Reference
from qcore.evaluation.task import Batch, Task
from qcore.model.source import LoadedModel, ModelSource
from qcore.model.topology import Site
from qcore.numbers import QTensor, QuantSpec, int_weight
from qcore.pipeline import load_in_memory, quantize_model
from qcore.plugins import load_registry
from qcore.recipe import Recipe, Rule
from qcore.solvers import RTN
from qcore.solvers.allocate import Allocator, Choice, Look, Needs
from qcore.solvers.base import BlockSolver, BlockView, WeightSolver
from qcore.testing.acts import noise
from qcore.testing.contract import by_itself, calls, check_named, kept_tensors, unchanged
from qcore.testing.models import tiny_mlp

NEEDS = ("weights", "inputs", "model", "gradients")


def check_source(source: ModelSource, uri: str) -> LoadedModel:
    """A source knows its own addresses and no others, and gives a skeleton without weights and a reader for all of them, the same each time.

    uri: an address of a small model
    """
    name = check_named(source, "source", "matches", "load")
    assert isinstance(getattr(source, "help", None), str) and source.help.strip(), (
        f"{name} has no help: one line that says what its addresses look like"
    )
    with calls(f"{name}: matches"):
        assert source.matches(uri) is True, f"{name}: matches({uri!r}) is not True"
        for other in ("", "no-such-prefix:x", "/no/such/folder", "no such file.bin"):
            assert source.matches(other) is False, f"{name}: matches({other!r}) is not False, so it takes the addresses of all other sources"
    with by_itself(f"{name}: load"):
        loaded, again = source.load(uri), source.load(uri)
    assert isinstance(loaded, LoadedModel), f"{name}: load() returned a {type(loaded).__name__}; return a LoadedModel"
    assert loaded.source in ("", source.name), f"{name}: LoadedModel.source is {loaded.source!r}; it is the source's own name, or empty"
    parameters = dict(loaded.model.named_parameters())
    real = [n for n, p in parameters.items() if not p.is_meta]
    assert not real, f"{name}: {len(real)} parameters hold memory ({real[0]} …); build the skeleton inside `with parameters_on_meta():`"
    there = set(loaded.reader.names())
    lost = [n for n in parameters if n not in there]
    assert not lost, (
        f"{name}: the reader lacks {len(lost)} of the model's parameters ({', '.join(lost[:3])} …); it has {', '.join(sorted(there)[:3])} …"
    )
    for key, p in parameters.items():
        with calls(f"{name}: the reader, asked for {key!r},"):
            one, two = loaded.reader[key], again.reader[key]
        assert one.shape == p.shape, f"{name}: {key!r} is {tuple(one.shape)} in the reader, {tuple(p.shape)} in the skeleton"
        assert torch.equal(one, two), f"{name}: {key!r} has other values when it is loaded again"
    return loaded


def check_allocator(allocator: Allocator, model: nn.Module | None = None, batches: Sequence[Batch] | None = None) -> Mapping[Site, Choice]:
    """An allocator chooses for sites that it was shown, among the solvers that it names, the same twice, and leaves the weights alone.

    model, batches: None: a network of three linear layers, at 4 bits where it chooses nothing
    """
    name = check_named(allocator, "allocator", "allocate")
    assert isinstance(allocator.solvers, tuple), f"{name}: `solvers` is a tuple of all that it may choose, got {allocator.solvers!r}"
    assert allocator.needs in NEEDS, f"{name}: `needs` is one of {', '.join(NEEDS)}, got {allocator.needs!r}"
    spy = _Allocator(allocator, name)
    _run(Recipe(rules=(Rule("*:weight", int_weight(4)),), solver=RTN(), allocator=spy), model, batches, name)
    return spy.choices


@dataclass(frozen=True)
class _Allocator(Allocator):
    """Asks twice and looks at the answers."""

    inner: Allocator
    what: str
    choices: dict[Site, Choice] = field(default_factory=dict)

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.inner.name

    @property
    def solvers(self) -> tuple[WeightSolver, ...]:
        return self.inner.solvers

    @property
    def needs(self) -> Needs:
        return self.inner.needs

    def problems(self, values: Mapping[Site, int], nbytes: Callable[[Site, QuantSpec], int | None]) -> list[str]:
        return self.inner.problems(values, nbytes)

    def allocate(self, sites: Sequence[Site], look: Look) -> Mapping[Site, Choice]:
        kept = {site: look.weight(site).clone() for site in sites}
        with by_itself(f"{self.what}: allocate"):
            choices, again = self.inner.allocate(sites, look), self.inner.allocate(sites, look)
        assert isinstance(choices, Mapping) and all(isinstance(c, Choice) for c in choices.values()), (
            f"{self.what}: allocate() returned {choices!r:.100}; return {{site: Choice(spec, solver, why)}}"
        )
        assert choices == again, f"{self.what}: asked twice, it chooses twice otherwise; break ties by the order of sites, draw by a seed of its own"
        strange = [str(site) for site in choices if site not in sites]
        assert not strange, f"{self.what} chose for {', '.join(strange[:3])}, which it was not shown"
        kinds = {type(s) for s in self.inner.solvers}
        unnamed = {type(c.solver).__name__ for c in choices.values() if type(c.solver) not in kinds}
        assert not unnamed, f"{self.what} chose {', '.join(unnamed)}, which `solvers` does not name: a plan would not know what data is needed"
        assert all(torch.equal(look.weight(site), w) for site, w in kept.items()), f"{self.what} wrote into the weights that it looked at"
        self.choices.update(choices)
        return choices


def check_block_solver(
    solver: BlockSolver, spec: QuantSpec | None = None, model: nn.Module | None = None, batches: Sequence[Batch] | None = None
) -> None:
    """A block solver returns what its weights' specs store, the same twice, and no worse by the block's outputs than what it was given.

    model, batches: None: a network of three linear layers
    """
    spec = int_weight(3) if spec is None else spec
    name = f"{check_named(solver, 'block solver', 'refuses', 'solve_block')} on {spec}"
    assert solver.target in ("same", "float"), f"{name}: target is 'same' or 'float', got {solver.target!r}"
    with calls(f"{name}: refuses"):
        reason = solver.refuses(spec)
    assert reason is None, f"{name} refuses it: {reason}; check it with a spec that it accepts"
    spy = _BlockSolver(solver, name)
    _run(Recipe(rules=(Rule("*:weight", spec, scale="spec"),), solver=RTN(), block_solver=cast(BlockSolver, spy)), model, batches, name)
    assert spy.asked, f"{name} was never asked: the model has no block whose weights are stored so"


class _BlockSolver:
    """Asks twice and looks at the answers."""

    def __init__(self, inner: BlockSolver, what: str) -> None:
        self.inner, self.what, self.asked = inner, what, 0
        self.name, self.target = inner.name, inner.target

    def refuses(self, spec: QuantSpec) -> str | None:
        return self.inner.refuses(spec)

    def solve_block(self, view: BlockView) -> Mapping[Site, QTensor]:
        self.asked += 1
        kept = kept_tensors({site: dict(q.parts) for site, q in view.start.items()})
        with by_itself(f"{self.what}: solve_block"):
            found, again = self.inner.solve_block(view), self.inner.solve_block(view)
        assert isinstance(found, Mapping) and all(isinstance(q, QTensor) for q in found.values()), (
            f"{self.what}: solve_block() returned {found!r:.100}; return {{site: QTensor}}"
        )
        assert unchanged({site: dict(q.parts) for site, q in view.start.items()}, kept), f"{self.what} wrote into view.start"
        for site, q in found.items():
            assert site in view.start, f"{self.what} returned codes for {site}, which is not in the block"
            own = view.start[site]
            assert q.spec == own.spec and q.shape == own.shape, f"{self.what}: {site} came back as {q.spec} {q.shape}, was {own.spec} {own.shape}"
            assert set(q.parts) == set(own.parts), f"{self.what}: {site} came back with the parts {sorted(q.parts)}, had {sorted(own.parts)}"
            assert all(torch.equal(q.parts[p], again[site].parts[p]) for p in q.parts), f"{self.what}: asked twice, it finds two sets of codes"
        before, after = _error(view, view.start), _error(view, {**view.start, **found})
        assert after <= before * (1 + 1e-4) + 1e-12, (
            f"{self.what} made the block's outputs worse: squared error {after:.4g}, was {before:.4g}; keep the start then"
        )
        return found


def _error(view: BlockView, found: Mapping[Site, QTensor]) -> float:
    values = {site: q.dequantize() for site, q in found.items()}
    with torch.no_grad():
        return sum(share * float((view.run(b, values) - view.target(b)).square().sum()) for b, share in enumerate(view.shares))


def _run(recipe: Recipe, model: nn.Module | None, batches: Sequence[Batch] | None, name: str) -> None:
    model = tiny_mlp() if model is None else model
    batches = [noise(64, 16)] if batches is None else batches
    with calls(f"{name}, in a run on a {type(model).__name__},"):
        quantize_model(load_in_memory(model), recipe, batches, registry=load_registry())


def check_task(task: Task, forward: Callable[[Batch], Tensor]) -> Mapping[str, float]:
    """A task is the same twice, tells a model from its float self by finite scores, and finds a noisy one no better than that.

    forward: a small model, as the task calls it
    """
    name = check_named(task, "task", "data", "sample", "reference", "evaluate")
    assert isinstance(task.better, dict) and task.better, f"{name}: `better` says of each score whether more is better, such as {{'kl': False}}"
    with by_itself(f"{name}: data() and sample()"):
        data, sample = task.data(), task.sample()
        assert isinstance(data, str) and data and data == task.data(), f"{name}: data() is the sha256 of its data, the same each time; got {data!r}"
        out = forward(sample)
    assert isinstance(out, Tensor), f"{name}: the model gives a {type(out).__name__} for sample(), not a tensor"
    generator = torch.Generator().manual_seed(0)

    def noisy(batch: Batch) -> Tensor:
        y = forward(batch)
        return y + y.detach().std() * torch.randn(y.shape, generator=generator).to(y.dtype)

    with tempfile.TemporaryDirectory() as folder:
        with by_itself(f"{name}: reference"):
            reference = task.reference(forward, Path(folder) / "reference")
        assert isinstance(reference, Reference), f"{name}: reference() returned a {type(reference).__name__}; return what write_reference gives"
        assert reference.data == data, f"{name}: its reference is of the data {reference.data!r}, data() says {data!r}"
        with by_itself(f"{name}: evaluate"):
            own, again, other = (task.evaluate(f, reference) for f in (forward, forward, noisy))
    wrong: dict[str, Any] = {k: v for k, v in own.items() if not isinstance(v, int | float) or (isinstance(v, float) and math.isnan(v))}
    unknown = {k: v for k, v in wrong.items() if not isinstance(v, float)}
    assert not unknown, f"{name}: scores are numbers, got {unknown}"
    judged = [s for s in task.better if s in own and s not in wrong]
    assert judged, f"{name}: `better` names {', '.join(task.better)}, the scores are {', '.join(own)}: none tells which model is better"
    assert {k: v for k, v in own.items() if k not in wrong} == {k: v for k, v in again.items() if k not in wrong}, (
        f"{name}: evaluated twice, it scores otherwise"
    )
    for score in judged:
        sign = 1 if task.better[score] else -1
        assert sign * own[score] >= sign * other[score], (
            f"{name}: {score} of the float model itself is {own[score]:.4g}, with noise on its outputs {other[score]:.4g}, which `better` prefers"
        )
    return own
