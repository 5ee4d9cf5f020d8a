"""`check_transform`, and what fits and looks in its place."""

import copy
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qcore.calibration.observer import Observer
from qcore.errors import SpecError
from qcore.model.adapter import Batch, ModelAdapter, tied_names
from qcore.model.layers import layout
from qcore.model.reader import DictReader, TensorReader
from qcore.model.tap import Tap, attach, detach
from qcore.model.topology import Site, Topology
from qcore.numbers import QuantSpec, int_weight
from qcore.testing.adapters import deviation, outputs, to_double
from qcore.testing.contract import by_itself, calls, check_named
from qcore.transforms.apply import INSERTABLE, apply_rewrite
from qcore.transforms.base import Transform
from qcore.transforms.rewrite import Rewrite, RewrittenReader, cut_ties, rewritten_topology


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
    name = check_named(transform, "transform", "wants", "fit")
    assert transform.scope in ("block", "model"), f"{name}: scope is 'block' or 'model', got {transform.scope!r}"
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
    _check_again(rewrite, fit_transform(transform, adapter, twin, data, specs), name)
    _check_scope(rewrite, topology, twin, name, modules)
    limit = rtol if transform.exact else rewrite.exact
    with calls(f"{name}: its rewrite, when it is applied,"):
        apply_rewrite(twin, rewrite, modules)
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
        name = f"transform {transform.name!r}"
        with by_itself(f"{name}: wants"):
            wishes = transform.wants(piece, here)
        _check_wishes(wishes, model, name)
        seen = observe(adapter, model, wishes, batches)
        with by_itself(f"{name}: fit", SpecError):
            found = transform.fit(piece, here, seen, model, reader)
        assert isinstance(found, Rewrite), f"{name}: fit() returned {found!r:.100}; return a Rewrite, an empty one where there is nothing to do"
        rewrite = rewrite.then(found)
    return cut_ties(rewrite, model, topology.ties)


def _check_wishes(wishes: Any, model: nn.Module, name: str) -> None:
    asked = "wants() returns {site: (observer, …)}"
    assert isinstance(wishes, Mapping), f"{name}: {asked}, got {wishes!r:.100}"
    for site, observers in wishes.items():
        assert isinstance(site, Site) and isinstance(observers, tuple | list), f"{name}: {asked}, got {site!r}: {observers!r:.100}"
        for observer in observers:
            assert not isinstance(observer, type | str), f"{name}: {asked} with prototypes, such as AbsMax(), got {observer!r}"
        try:
            model.get_submodule(site.module)
        except AttributeError:
            raise AssertionError(f"{name} wants to see {site}, but the model has no module {site.module!r}; take sites from the topology") from None


def _check_again(one: Rewrite, other: Rewrite, name: str) -> None:
    """The same model and data give the same rewrite: an interrupted run, and every process of several, must find it again."""
    (a, plain), (b, same) = one.state(), other.state()
    moved = [key for key in a if key not in b or not torch.equal(a[key], b[key])]
    assert set(a) == set(b) and not moved and plain == same, f"{name}: fitted twice on the same data it finds two rewrites; draw by a seed of its own"


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
