"""`check_adapter`: links are tested, not believed."""

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from qcore.errors import QcoreError
from qcore.model.adapter import Batch, ModelAdapter, tied_names
from qcore.model.layers import layout
from qcore.model.reader import DictReader
from qcore.model.tap import Tap, attach, running
from qcore.model.topology import Block, Invariance, Link, Port, Site, Topology, covered_axes
from qcore.testing.contract import by_itself, calls, check_named
from qcore.transforms.apply import apply_rewrite
from qcore.transforms.fold_norm import FoldNorm
from qcore.transforms.rewrite import Rewrite, cut_ties, owner_of, permute_link, rotate_link, scale_classes, scale_link, through_ports

CHANGED = 1e-6  # a rewrite of one side alone must move the outputs by more than this, relative to the largest
HINTS = {
    Invariance.SCALE: "a GELU, SiLU or softmax between allows only PERMUTE; with RoPE say share= and rotary_dims=; check repeat= and gain=",
    Invariance.PERMUTE: "check heads= and repeat=, and that norms between are named in through=",
    Invariance.ROTATE: "nothing but norms without gain may lie between; a LayerNorm's mean does not commute; check heads= and repeat=",
}


def check_adapter(adapter: ModelAdapter, model: nn.Module, batch: Batch, *, rtol: float = 1e-9, seed: int = 0) -> None:
    """An adapter tells the truth about a tiny model of its family.

    Everything is computed on a float64 copy of `model`; give it weights that hide nothing (`qcore.testing.models.randomize`).
    - `matches` says yes, `prepare` renames nothing and keeps the outputs;
    - every axis of every parameter of two dimensions or more is in a link, or blocked with a reason;
    - every link leaves the outputs alone under a random T of every invariance that it claims: positive scales (shared where RoPE pairs channels),
      permutations inside heads, a rotation for each head (with the norms in `through` folded);
    - and the same T on the writing side alone does change them, so that a link on dead parameters is found;
    - every site exists, and its tap or hook fires in one forward pass, blocks and stages in the order given, each block on what the last one put out;
    - and the topology is found without weights too, on meta, where plans are made.
    """
    name = check_named(adapter, "adapter", "matches", "topology", "prepare", "outputs", "context")
    _check_matches(adapter, model, name)
    twin = _prepared(adapter, model, batch, rtol)
    topology = _topology(adapter, twin, name)
    x = to_double(batch)
    _check_ports(topology, twin)
    _check_covered(topology, twin)
    _check_ties(topology, twin)
    _check_sites(adapter, topology, twin, x)
    reference = outputs(adapter, twin, x)
    generator = torch.Generator().manual_seed(seed)
    for link in topology.links:
        for kind in Invariance:
            if kind in link.invariance:
                _check_link(adapter, link, kind, topology, twin, x, reference, rtol, generator)


def outputs(adapter: ModelAdapter, model: nn.Module, batch: Batch) -> Tensor:
    """One forward pass without gradients, in the adapter's context."""
    with torch.no_grad(), running(adapter.context(batch)):
        return adapter.outputs(model, batch)


def to_double(batch: Any) -> Any:
    """The batch with every float tensor in float64."""
    if isinstance(batch, Tensor):
        return batch.double() if batch.is_floating_point() else batch
    if isinstance(batch, dict):
        return {k: to_double(v) for k, v in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(to_double(v) for v in batch)
    return batch


class _Stranger(nn.Module):
    """A model of no family."""

    def __init__(self) -> None:
        super().__init__()
        self.strange = nn.Parameter(torch.ones(2))


def _check_matches(adapter: ModelAdapter, model: nn.Module, name: str) -> None:
    with calls(f"{name}: matches"):
        assert adapter.matches(model), f"{name}: matches() is False for the {type(model).__name__} it is to be checked with"
    with calls(f"{name}: matches, asked about a model of another family,"):
        assert not adapter.matches(_Stranger()), f"{name}: matches() takes a model without a single layer; it would take every family's models"


def _topology(adapter: ModelAdapter, model: nn.Module, name: str) -> Topology:
    with by_itself(f"{name}: topology"):
        topology = adapter.topology(model)
    assert isinstance(topology, Topology), f"{name}: topology() returned {topology!r:.100}; return a Topology"
    assert topology.blocks, f"{name}: the topology has no blocks, so there is nothing to quantize"
    for block in topology.blocks:
        well = isinstance(block.stages, tuple) and all(isinstance(s, tuple) and all(isinstance(x, Site) for x in s) for s in block.stages)
        assert well, f"{name}: the stages of block {block.module!r} are tuples of sites, ((Site(…), Site(…)), (Site(…),)), got {block.stages!r:.200}"
    twice = [str(site) for site, count in Counter(topology.sites).items() if count > 1]
    assert not twice, f"{name}: site {twice[0]} stands in the topology twice"
    with calls(f"{name}: topology of a model on meta, where plans are made,"):
        bare = adapter.topology(copy.deepcopy(model).to("meta"))
    assert bare.blocks == topology.blocks and bare.links == topology.links, (
        f"{name}: the topology of the model on meta is another one; it hangs on weights"
    )
    return topology


def deviation(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest magnitude of `b`."""
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-300))


def _prepared(adapter: ModelAdapter, model: nn.Module, batch: Batch, rtol: float) -> nn.Module:
    twin = copy.deepcopy(model).double().eval()
    before = outputs(adapter, twin, to_double(batch))
    assert isinstance(before, Tensor), (
        f"{adapter.name}: outputs() gives a {type(before).__name__}; return the one tensor by which models are compared"
    )
    assert torch.isfinite(before).all(), f"{adapter.name}: the float model's outputs are not finite; give the tiny model other weights"
    assert torch.equal(before, outputs(adapter, twin, to_double(batch))), (
        f"{adapter.name}: two forward passes give different outputs; switch dropout and other chance off in prepare() or outputs()"
    )
    names = set(twin.state_dict())
    with calls(f"{adapter.name}: prepare"):
        adapter.prepare(twin)
    assert names == set(twin.state_dict()), f"{adapter.name}: prepare() renamed, lost or added {sorted(names ^ set(twin.state_dict()))[:3]}"
    gap = deviation(outputs(adapter, twin, to_double(batch)), before)
    assert gap <= rtol, f"{adapter.name}: prepare() changed the outputs by {gap:.2g}; the mixer that it puts in is not equal to the family's own"
    return twin


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def _check_ports(topology: Topology, model: nn.Module) -> None:
    tensors = _tensors(model)
    for link in topology.links:
        assert link.writes and link.reads, f"link {link.name!r} needs a write and a read, it has {len(link.writes)} and {len(link.reads)}"
        assert link.size % link.heads == 0, f"link {link.name!r}: {link.heads} heads do not divide {link.size} channels"
        for port in link.ports:
            assert port.param in tensors, f"link {link.name!r} names {port.param!r}, which the model does not have"
            size = _axis_size(port, model)
            assert size == link.size * port.repeat, f"link {link.name!r}: {port} has {size} channels, the link {link.size}" + (
                f" × repeat {port.repeat}" if port.repeat > 1 else ""
            )
        for path in link.through:
            try:
                model.get_submodule(path)
            except AttributeError as e:
                raise AssertionError(f"link {link.name!r} passes {path!r}, which the model does not have") from e
    for port, why in topology.blocked.items():
        assert port.param in tensors, f"blocked port {port}: the model has no {port.param!r}"
        assert why.strip(), f"blocked port {port} gives no reason"


def _axis_size(port: Port, model: nn.Module) -> int:
    owner, own = owner_of(model, port.param), port.param.rpartition(".")[2]
    try:
        channels, _ = layout(owner, own).channels(getattr(owner, own), port.axis)
    except QcoreError as e:
        raise AssertionError(f"{port}: {e}") from e
    return sum(len(r) for r in port.channels) if port.channels else channels.shape[-1]


def _check_covered(topology: Topology, model: nn.Module) -> None:
    covered = covered_axes(topology)
    matrices = [name for name, p in model.named_parameters(remove_duplicate=False) if p.ndim > 1]
    missing = [f"{name}.{axis}" for name in matrices for axis in ("out", "in") if (name, axis) not in covered]
    assert not missing, (
        f"{len(missing)} axes of weights are in no link and not blocked: {', '.join(missing[:4])}{' …' if len(missing) > 4 else ''}; "
        "add a link, or Topology.blocked[Port(name, axis)] = the reason why no rewrite may touch it"
    )


def _check_ties(topology: Topology, model: nn.Module) -> None:
    actual = tied_names(model)
    assert dict(topology.ties) == actual, f"Topology.ties is {dict(topology.ties)}, the model ties {actual}; use ties=tied_names(model)"


class _Fired(Tap):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self, x: Tensor, rows: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        self.count += 1
        return x


class _Passes:
    """Which block ran when, for the first time, on what, and what came out."""

    def __init__(self, topology: Topology, model: nn.Module) -> None:
        self.ran: dict[str, tuple[Any, Any]] = {}  # in the order in which blocks end
        for block in topology.blocks:
            model.get_submodule(block.module).register_forward_hook(partial(self._block, block.module), with_kwargs=True)

    def _block(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = args[0] if args else next(iter(kwargs.values()), None)
        self.ran.setdefault(path, (given, output[0] if isinstance(output, tuple | list) else output))

    def check(self, blocks: Sequence[Block]) -> None:
        order = [b.module for b in blocks if b.module in self.ran]
        assert list(self.ran) == order, f"blocks run in the order {', '.join(list(self.ran)[:4])} …, the topology has {', '.join(order[:4])} …"
        for one, other in pairwise(b for b in blocks if b.feed == "previous" and b.module in self.ran):
            out, given = self.ran[one.module][1], self.ran[other.module][0]
            same = isinstance(out, Tensor) and isinstance(given, Tensor) and out.shape == given.shape and torch.equal(out, given)
            assert same, (
                f"block {other.module!r} does not read what block {one.module!r} puts out, which feed='previous' says; "
                "name larger modules as blocks, or say feed='rerun' for all"
            )


def _check_stages(adapter: ModelAdapter, topology: Topology, model: nn.Module, batch: Batch) -> None:
    """No stage reads what a later one puts out: its inputs stay when later matrices change.  Of the first block and the last.

    Element-wise weights may come last, whoever reads them: they are small, and solved best on what the solved matrices give them.
    """
    for block in dict.fromkeys((topology.blocks[0], topology.blocks[-1])):
        inputs = _inputs(adapter, block, copy.deepcopy(model), batch)
        for late in range(1, len(block.stages)):
            changed = copy.deepcopy(model)
            early = [site for stage in block.stages[:late] for site in stage if site in inputs]
            with torch.no_grad():
                for param in {site.param for site in block.stages[late]} - {site.param for site in early}:
                    if (tensor := _tensors(changed)[param]).squeeze().ndim > 1:
                        tensor.mul_(1.5)
            moved = _inputs(adapter, block, changed, batch)
            for site in early:
                i = next(i for i, stage in enumerate(block.stages) if site in stage)
                assert torch.equal(moved[site], inputs[site]), (
                    f"block {block.module!r}: {site} of stage {i} reads what stage {late} puts out; give stages in the order in which they run"
                )


def _inputs(adapter: ModelAdapter, block: Block, model: nn.Module, batch: Batch) -> dict[Site, Tensor]:
    """What went first into each module of the block's sites that is called with a tensor."""
    seen: dict[Site, Tensor] = {}

    def keep(site: Site, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            seen.setdefault(site, args[0].clone())

    for site in block.sites:
        if site.part is None:
            model.get_submodule(site.module).register_forward_pre_hook(partial(keep, site))
    outputs(adapter, model, batch)
    return seen


def _check_sites(adapter: ModelAdapter, topology: Topology, model: nn.Module, batch: Batch) -> None:
    probe = copy.deepcopy(model)
    counts: dict[str, Callable[[], int]] = {}
    tensors = _tensors(probe)
    for site in topology.sites:
        assert site.param in tensors, f"site {site} stands for {site.param!r}, which the model does not have"
        try:
            layout(probe.get_submodule(site.module), site.tensor)
        except QcoreError as e:
            raise AssertionError(f"site {site}: {e}") from e
    for block in topology.blocks:
        try:
            probe.get_submodule(block.module)
        except AttributeError:
            raise AssertionError(f"block {block.module!r}: the model has no such module") from None
        for site in block.sites:
            assert not block.module or f"{site.module}.".startswith(f"{block.module}."), f"site {site} does not lie in its block {block.module!r}"
    for site in dict.fromkeys([*(s.input for s in topology.sites), *topology.activations]):
        counts[str(site)] = _watch(site, probe)
    passes = _Passes(topology, probe)
    outputs(adapter, probe, batch)
    passes.check(topology.blocks)
    _check_stages(adapter, topology, model, batch)
    silent = [name for name, count in counts.items() if not count()]
    assert not silent, (
        f"{len(silent)} sites were not reached in one forward pass: {', '.join(silent[:4])}; a mixer that reads weights directly needs tap() "
        "calls (the adapter's prepare() puts them in), and a batch must reach every expert"
    )


def _watch(site: Site, model: nn.Module) -> Callable[[], int]:
    module = model.get_submodule(site.module)
    fired = _Fired()

    def hook(*_: Any) -> None:
        fired.count += 1

    if site.part is None and site.tensor == "input":
        module.register_forward_pre_hook(hook)
    elif site.part is None and site.tensor == "output":
        module.register_forward_hook(hook)
    else:
        attach(module, site.tensor, fired, site.part)
    return lambda: fired.count


def _check_link(
    adapter: ModelAdapter,
    link: Link,
    kind: Invariance,
    topology: Topology,
    model: nn.Module,
    batch: Batch,
    reference: Tensor,
    rtol: float,
    generator: torch.Generator,
) -> None:
    if kind is Invariance.ROTATE and link.through:
        folded = FoldNorm().fit(topology, {}, {}, model, DictReader(_tensors(model)))
        model = apply_rewrite(model, folded)
        topology = adapter.topology(model)
        gap = deviation(outputs(adapter, model, batch), reference)
        assert gap <= rtol, f"folding the norms that link {link.name!r} passes changed the outputs by {gap:.2g}; check the norms' own links and gain="
    rewrite = _random(link, kind, model, generator)
    gap = deviation(outputs(adapter, _applied(rewrite, model, topology), batch), reference)
    assert gap <= rtol, f"link {link.name!r} claims {kind.name}, but a random one changed the outputs by {gap:.2g}: {HINTS[kind]}"
    written = {port.param for port in link.writes}
    alone = Rewrite(edits={name: tuple(e for e in edits if e.port in link.writes) for name, edits in rewrite.edits.items() if name in written})
    gap = deviation(outputs(adapter, _applied(alone, model, topology), batch), reference)
    assert gap > CHANGED, (
        f"link {link.name!r}: {kind.name} on its writing side alone changed the outputs by only {gap:.2g}; its parameters do nothing "
        "(not used in the forward pass, or zero in this model: see qcore.testing.models.randomize), or T was the identity (one channel to a head)"
    )


def _applied(rewrite: Rewrite, model: nn.Module, topology: Topology) -> nn.Module:
    return apply_rewrite(model, cut_ties(rewrite, model, topology.ties))


def _random(link: Link, kind: Invariance, model: nn.Module, generator: torch.Generator) -> Rewrite:
    size = link.size // link.heads
    if kind is Invariance.SCALE:
        t = torch.rand(link.size, generator=generator, dtype=torch.float64) * 1.5 + 0.5
        return scale_link(link, t[scale_classes(link)])
    if kind is Invariance.PERMUTE:
        order = torch.cat([torch.randperm(size, generator=generator) + h * size for h in range(link.heads)])
        return permute_link(link, order, through_ports(link, model))
    r = torch.linalg.qr(torch.randn(link.heads, size, size, generator=generator, dtype=torch.float64)).Q
    return rotate_link(link, r)
