"""`quantize_model`: the data path, top to bottom.

    place → wish → transform → allocate → for every block: observe, solve, pack, replace → bind

One page for all runs: a model in memory is a reader over a dict, a resumed run is a journal with finished blocks.  No session, no events, no state on
modules, no patched forward.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from qcore.budget import return_freed_memory
from qcore.calibration.coverage import Ledger, Rows, filled_up, share_inputs
from qcore.calibration.observer import Observer, Seen
from qcore.calibration.ranges import range_observer, range_parts
from qcore.calibration.runner import BlockFeed, BlockInput, BlockRunner, Progress
from qcore.calibration.stream import StreamedModel
from qcore.checkpoint.journal import FinishedBlocks, Journal
from qcore.errors import CalibrationError, at
from qcore.model.adapter import Batch, ModelAdapter, adapter_for
from qcore.model.layers import layout
from qcore.model.reader import DictReader, TensorReader, evaporate, materialize, materialize_outside, release, release_outside, retie, tied_groups
from qcore.model.source import LoadedModel
from qcore.model.tap import Tap, attach
from qcore.model.topology import Block, Site, Topology, join, within
from qcore.modules import module_name, place, rebuild
from qcore.modules.online import Online
from qcore.modules.replace import Stored, quantized_leaf, quantized_stack
from qcore.modules.tapped import QuantizedTap
from qcore.numbers import QTensor, QuantSpec
from qcore.numbers.tensor import concat_rows, require_finite, rows_are_apart, split_rows
from qcore.packing import first_that_accepts
from qcore.recipe import Recipe, Rule
from qcore.solvers.base import WeightSolver
from qcore.solvers.rtn import nearest_like
from qcore.transforms.apply import build_insert
from qcore.transforms.channels import site_matrix
from qcore.transforms.rewrite import Insert, Rewrite, RewrittenReader, owner_of, rewritten_topology


@dataclass(frozen=True)
class SiteRecord:
    """What was done to one weight, and how well it went.

    error:   relative squared error of what the layer puts out, tr(ΔW G ΔWᵀ) / tr(W G Wᵀ), where the solver saw the Gram matrix G;
             else of the weight itself, ‖ΔW‖² / ‖W‖²
    of:      "output" or "weight": which of the two
    bits:    packed bits per weight, scales and fitted parts included
    """

    site: str
    spec: str
    solver: str
    packing: str
    shape: tuple[int, ...]
    error: float
    of: str
    bits: float
    nbytes: int
    seconds: float


@dataclass
class Quantized:
    """A quantized model that runs, and the record of how it came about.

    choices: site → why an allocator chose what it did; {} without one
    """

    model: nn.Module
    topology: Topology
    adapter: ModelAdapter
    specs: dict[Site, QuantSpec]
    rewrite: Rewrite
    sites: list[SiteRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    coverage: Ledger = field(default_factory=Ledger)
    values: TensorReader | None = None  # of a streamed run: the tensors that the model has on meta
    choices: dict[str, str] = field(default_factory=dict)


def load_in_memory(model: nn.Module, name: str = "model") -> LoadedModel:
    """A model that is in memory already, as a source would have loaded it."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    dtype = next(iter(dtypes)) if len(dtypes) == 1 else torch.float32
    return LoadedModel(model, DictReader({n: p.detach() for n, p in model.state_dict().items()}), name, dtype)


def float_forward(loaded: LoadedModel, adapter: ModelAdapter) -> Callable[[Batch], Tensor]:
    """The float model, all of it in memory: batch → outputs.  `release_blocks` frees it again."""
    adapter.prepare(loaded.model)
    ties = tied_groups(loaded.model)
    materialize(loaded.model, "", loaded.reader, compute_dtype(loaded.dtype))
    retie(loaded.model, ties)
    loaded.model.eval()

    @torch.no_grad()
    def forward(batch: Batch) -> Tensor:
        return adapter.outputs(loaded.model, batch)

    return forward


def streamed_float(loaded: LoadedModel, adapter: ModelAdapter) -> StreamedModel:
    """The float model, one block of it in memory at a time."""
    adapter.prepare(loaded.model)
    model, dtype = loaded.model.eval(), compute_dtype(loaded.dtype)
    blocks = adapter.topology(model).blocks
    ties = tied_groups(model)
    materialize_outside(model, [model.get_submodule(b.module) for b in blocks], loaded.reader, dtype)
    retie(model, ties)

    def fill(block: Block) -> None:
        materialize(model.get_submodule(block.module), block.module, loaded.reader, dtype)

    return StreamedModel(model, adapter, blocks, fill)


def compute_dtype(stored: torch.dtype) -> torch.dtype:
    """What a model of this dtype is computed in while it is quantized: float32, or float64 where the model is."""
    return torch.float64 if stored is torch.float64 else torch.float32


@torch.no_grad()
def quantize_model(
    loaded: LoadedModel,
    recipe: Recipe,
    batches: Sequence[Batch] = (),
    *,
    registry: Any,
    adapter: ModelAdapter | None = None,
    progress: Progress | None = None,
    journal: Journal | None = None,
    stream: bool = False,
    keep: int = 2 << 30,
) -> Quantized:
    """Quantize `loaded.model` in place, block by block, and return it with its record.

    batches:  calibration batches, as the adapter takes them; may be empty for data-free recipes
    registry: shelves of packings, kernels, modules and adapters (`qcore.plugins.load_registry()`)
    progress: called with (phase, done, total)
    journal:  where finished blocks are kept; blocks that it holds are not computed again
    stream:   keep one block in memory at a time: the model that comes back has its structure alone, its values are in `Quantized.values`
    keep:     bytes of outputs inside a block that may be kept, so that solved layers need not be run again
    """
    if stream and journal is None:
        raise CalibrationError("a streamed run keeps its blocks in a journal; pass journal=Journal(folder, content)")
    run = _Run(loaded, recipe, batches, registry, adapter, progress or (lambda phase, done, total: None), journal, stream, keep)
    with run.timed("coverage"):
        run.check_coverage()
    with run.timed("transform"):
        run.fit_model_transforms()
    with run.timed("allocate"):
        run.allocate()
    with run.timed("blocks"):
        run.solve_blocks()
    with run.timed("bind"):
        run.bind()
    run.result.notes += run.result.rewrite.notes
    return run.result


class _Run:
    """One quantization: what the steps of `quantize_model` share."""

    def __init__(
        self,
        loaded: LoadedModel,
        recipe: Recipe,
        batches: Sequence[Batch],
        registry: Any,
        adapter: ModelAdapter | None,
        progress: Progress,
        journal: Journal | None,
        stream: bool,
        keep: int,
    ) -> None:
        self.loaded, self.recipe, self.batches, self.registry = loaded, recipe, batches, registry
        self.progress, self.journal, self.stream, self.keep = progress, journal, stream, keep
        self.model = loaded.model.eval()
        self.adapter = adapter or adapter_for(self.model, registry.adapters)
        self.adapter.prepare(self.model)
        self.topology = self.adapter.topology(self.model)
        dtype_name = str(loaded.dtype).removeprefix("torch.")
        specs = recipe.wishes(self.topology, dtype_name)
        self.result = Quantized(self.model, self.topology, self.adapter, specs, Rewrite())
        self.dtype_name = dtype_name
        self.compute = compute_dtype(loaded.dtype)
        self._installed: set[str] = set()
        self._wrapped: set[str] = set()
        self._own_stacks: set[str] = set()
        self._instead: dict[Site, WeightSolver] = {}
        self.result.coverage = Ledger(recipe.calibration.minimum, recipe.calibration.below)
        self._owners = _Owners(self.model)
        self._ties = tied_groups(self.model)

    # steps -------------------------------------------------------------------------------------------------------------------------------

    def check_coverage(self) -> None:
        """Fail before anything is solved where experts would see too few rows: one pass of the float model, where the policy is to fail."""
        stacks = {(s.module, s.tensor) for s in self.topology.sites if s.part is not None and s in self.result.specs and self._solver(s).observes}
        checked = self.journal is not None and self.journal.step("coverage") is not None
        if self.recipe.calibration.below != "fail" or not stacks or not self.batches or checked:
            return
        first = dict(sorted(stacks))  # one of a module's parameters: the parts of all see the same tokens
        sites = [s for s in self.topology.sites if s.part is not None and first.get(s.module) == s.tensor]
        seen = self._observe_model({site.input: (Rows(),) for site in sites})
        census = Ledger(self.recipe.calibration.minimum, "fail", {site: seen[site.input][Rows.name] for site in sites})
        census.require()
        if self.journal:
            self.journal.keep_step("coverage", {}, {"checked": len(sites)})

    def fit_model_transforms(self) -> None:
        """Fit the transforms of scope "model", each on the model that the one before leaves."""
        transforms = [t for t in self.recipe.transforms if t.scope == "model"]
        kept = self.journal.step("rewrite") if self.journal else None
        if kept is not None:
            self.result.rewrite = Rewrite.from_state(*kept)
            return
        for i, transform in enumerate(transforms):
            self.progress(f"transform {transform.name}", i, len(transforms))
            topology = rewritten_topology(self.topology, self.result.rewrite)
            wants = _counted(transform.wants(topology, self.result.specs))
            seen = self._observe_model(wants) if wants else {}
            found = transform.fit(topology, self.result.specs, seen, self.model, self.reader)
            self.result.rewrite = self.result.rewrite.then(found)
        if self.journal:
            self.journal.keep_step("rewrite", *self.result.rewrite.state())

    def allocate(self) -> None:
        """Let the recipe's allocator choose spec and solver of the weights that are to be quantized; each choice is a rule after all others."""
        allocator = self.recipe.allocator
        if allocator is None:
            return
        sites = [s for s in self.topology.sites if s in self.result.specs and s.param not in self.result.rewrite.dropped]
        reader = self.reader
        choices = allocator.allocate(sites, lambda s: site_matrix(s, reader[s.param], owner_of(self._owners, s.param)))
        chosen = tuple(Rule(str(site).replace("[", "[[]"), c.spec, c.solver) for site, c in choices.items())
        self.recipe = replace(self.recipe, rules=(*self.recipe.rules, *chosen))
        self.result.specs |= self.recipe.specs_for(choices, self.dtype_name)
        self.result.choices = {str(site): c.why for site, c in choices.items()}
        kinds = Counter(f"{c.spec} by {c.solver.name}" for c in choices.values())
        self.result.notes.append(f"allocator {allocator.name}: " + ", ".join(f"{n} × {kind}" for kind, n in kinds.most_common()))

    def solve_blocks(self) -> None:
        """Every block in its turn, on the outputs of the quantized blocks before it."""
        blocks = self.topology.blocks
        needs_data = self._needs_data()
        self._settle_outside(values=needs_data or not self.stream)
        done = self.journal.finished(len(blocks)) if self.journal else 0
        for index in range(done):
            assert self.journal is not None
            self._restore(blocks[index], *self.journal.block(index))
        feed = self._feed() if needs_data and done < len(blocks) else None
        if self.stream and not any(b.feed == "rerun" for b in blocks):
            self._release_outside()
        if feed is not None and done and not feed.rerun:
            assert self.journal is not None
            feed.advance(self.journal.inputs(done, len(self.batches)))
        for index in range(done, len(blocks)):
            self.progress("block", index, len(blocks))
            self._solve_block(blocks[index], index, feed)
        self.progress("block", len(blocks), len(blocks))
        if self.stream:
            assert self.journal is not None
            self._release_outside()
            self.result.values = _StreamedValues(FinishedBlocks(self.journal, len(blocks)), self.reader, self.compute, self.loaded.dtype)

    def bind(self) -> None:
        """Let every quantized module choose its kernel."""
        kernels = [k() for k in self.registry.kernels.values()]
        for path, module in self.model.named_modules():
            if callable(getattr(module, "bind", None)):
                with at(path):
                    module.bind(kernels)

    # one block ---------------------------------------------------------------------------------------------------------------------------

    def _solve_block(self, block: Block, index: int, feed: BlockFeed | None) -> None:
        module = self.model.get_submodule(block.module)
        self._fit_block_transforms(block, index, feed)
        self._install(block.module)
        module = self.model.get_submodule(block.module)
        materialize(module, block.module, self.reader, self.compute)
        stages = self._stages(block)
        runner = BlockRunner(feed, index, module, [s for stage in stages for s in stage], self.keep) if feed is not None else None
        outputs: Sequence[Tensor] = []
        if runner is not None and self.recipe.propagate == "float":
            outputs = self._outputs(runner, index)
            stages = [[site for stage in stages for site in stage]]  # no site sees the errors of another
        solved: dict[Site, tuple[QTensor, SiteRecord]] = {}
        inputs: dict[Site, dict[str, Tensor]] = {}
        for stage in stages:
            with self.timed("observe"):
                seen = self._observe_stage(stage, runner)
            with self.timed("solve"):
                for sites in self._together(stage, seen):
                    solved |= self._solve_sites(sites, seen[sites[0]])
                inputs |= {site.input: self._static_parts(site.input, seen[site]) for site in stage if self._is_static(site.input)}
            if runner is not None:
                runner.solved(stage)
        _round_parameters(module, {s.param for s in solved}, block.module, self.loaded.dtype)
        handlers = self._tap_handlers(block, feed, index)
        if runner is not None and self.recipe.propagate == "weights":
            outputs = self._outputs(runner, index)
        for path in dict.fromkeys(site.module for site in solved):
            with at(path):
                self._replace(path, {site: q for site, (q, _) in solved.items() if site.module == path}, inputs)
        for site, handler in handlers.items():
            attach(self.model.get_submodule(site.module), site.tensor, handler, site.part)
        if feed is not None and self.recipe.propagate == "all":
            outputs = self._outputs(BlockRunner(feed, index, self.model.get_submodule(block.module), []), index)
        if feed is not None:
            feed.advance(outputs)
        self.result.sites += [record for _, record in solved.values()]
        if self.journal:
            self._journal_block(block, index, [record for _, record in solved.values()])
        if self.stream:
            evaporate(self.model.get_submodule(block.module))
            return_freed_memory()

    def _outputs(self, runner: BlockRunner, index: int) -> Sequence[Tensor]:
        """What block `index` puts out, which the next one reads; in the journal too, where there is one.  Nobody reads the last block's."""
        if index + 1 == len(self.topology.blocks):
            return []
        with self.timed("advance"):
            if self.journal is None:
                return runner.outputs()
            journal, kept = self.journal, []

            def keep(batch: int, hidden: Tensor) -> None:
                journal.keep_input(index + 1, batch, hidden)
                if not self.stream:
                    kept.append(hidden)

            runner.outputs(keep)
            return journal.inputs(index + 1, len(self.batches)) if self.stream and not runner.feed.rerun else kept

    def _fit_block_transforms(self, block: Block, index: int, feed: BlockFeed | None) -> None:
        for transform in self.recipe.transforms:
            if transform.scope != "block":
                continue
            # what is observed goes through the modules that earlier transforms inserted
            self._install(block.module)
            # links that end behind an inserted module, or in a leaf that was split, are none any more
            inside = rewritten_topology(self.topology, self.result.rewrite).within(block)
            wants = _counted(transform.wants(inside, self.result.specs))
            seen: Mapping[Site, Seen] = {}
            if wants:
                module = self.model.get_submodule(block.module)
                materialize(module, block.module, self.reader, self.compute)
                assert feed is not None
                with self.timed("observe"):
                    seen = BlockRunner(feed, index, module).observe(wants)
            with at(f"{block.module}: transform {transform.name}"):
                found = transform.fit(inside, self.result.specs, seen, self.model, self.reader)
            self.result.rewrite = self.result.rewrite.then(found)

    def _observe_stage(self, stage: Sequence[Site], runner: BlockRunner | None) -> dict[Site, Seen]:
        if runner is None:
            return {site: {} for site in stage}
        wanted: dict[Site, tuple[Observer, ...]] = {}
        for site in stage:
            wanted[site.input] = (*self._solver(site).observes, *self._range_observers(site.input))
        observed = runner.observe(_counted(wanted))
        return self._cover({site: observed[site.input] for site in stage})

    def _cover(self, seen: dict[Site, Seen]) -> dict[Site, Seen]:
        """Enter what the parts of fused stacks saw into the ledger, and do what the recipe says about those that saw too little."""
        ledger = self.result.coverage
        ledger.counts |= {site: own[Rows.name] for site, own in seen.items() if Rows.name in own}
        ledger.require()
        covered = dict(seen)
        for site in ledger.short():
            if site not in seen or "gram" not in {o.name for o in self._solver(site).observes}:
                continue
            gram = filled_up(seen, ledger.counts, site, ledger.minimum) if ledger.below == "layer" and share_inputs(self.topology, site) else None
            if gram is not None:
                covered[site] = {**seen[site], "gram": gram}
                ledger.instead[site] = "filled up with the layer's average"
            elif ledger.below == "nearest" or not ledger.counts[site].rows:
                covered[site] = {name: value for name, value in seen[site].items() if name != "gram"}
                self._instead[site] = nearest_like(self._solver(site))
                ledger.instead[site] = "rounded to nearest"
        return covered

    # activations -------------------------------------------------------------------------------------------------------------------------

    def _is_static(self, site: Site) -> bool:
        spec = self._activation_spec(site)
        return spec is not None and spec.when == "static" and spec.scaled

    def _range_observers(self, site: Site) -> tuple[Observer, ...]:
        if not self._is_static(site):
            return ()
        rule, spec = self.recipe.rule_for(site), self._activation_spec(site)
        assert rule is not None and spec is not None
        with at(site):
            return (range_observer(spec, rule.observer),)

    def _static_parts(self, site: Site, seen: Seen) -> dict[str, Tensor]:
        rule, spec = self.recipe.rule_for(site), self._activation_spec(site)
        assert rule is not None and spec is not None
        with at(site):
            return range_parts(seen["range"], spec, "minmax" if rule.observer is None else rule.observer.name)

    def _tap_handlers(self, block: Block, feed: BlockFeed | None, index: int) -> dict[Site, Tap]:
        """What quantizes the tensors inside the block's modules; static ranges are those that the solved weights lead to."""
        sites = [s for s in self.topology.activations if within(s.module, block.module) and s in self.result.specs]
        static = {s: self._range_observers(s) for s in sites if self._is_static(s)}
        seen: Mapping[Site, Seen] = {}
        if static:
            if feed is None:
                raise CalibrationError(f"{next(iter(static))} is to have a static scale, which needs calibration data; pass --calib")
            with self.timed("observe"):
                # a runner that has solved sites would replay the very modules that are tapped
                seen = BlockRunner(feed, index, self.model.get_submodule(block.module), []).observe(static)
        return {s: QuantizedTap(self.result.specs[s], self._static_parts(s, seen[s]) if s in static else None) for s in sites}

    def _together(self, stage: Sequence[Site], seen: Mapping[Site, Seen]) -> list[list[Site]]:
        """The sites of a stage, those in one list that one solve serves: the same input, spec and solver, and rows that are solved apart anyway.

        q, k and v are one matrix with more rows then: the same codes, in a third of the steps over columns.
        """
        groups: dict[Any, list[Site]] = {}
        for site in stage:
            spec, gram = self._spec(site), seen[site].get("gram")
            shared = gram is not None and gram.ndim == 2 and rows_are_apart(spec)
            key = (id(gram), spec, id(self._solver(site))) if shared else site
            groups.setdefault(key, []).append(site)
        return list(groups.values())

    def _solve_sites(self, sites: Sequence[Site], seen: Seen) -> dict[Site, tuple[QTensor, SiteRecord]]:
        """Choose the codes of weights that share their input, and let the float modules hold the values that they stand for."""
        matrices = [self._matrix(site) for site in sites]
        for site, matrix in zip(sites, matrices, strict=True):
            with at(site):
                self._spec(site).check(tuple(matrix.shape))
                require_finite(matrix)
        started = time.perf_counter()
        with at(", ".join(map(str, sites))):
            q = self._solver(sites[0]).solve(matrices[0] if len(sites) == 1 else torch.cat(matrices), self._spec(sites[0]), seen)
        pieces = [q] if len(sites) == 1 else split_rows(q, [m.shape[0] for m in matrices])
        seconds = (time.perf_counter() - started) / len(sites)
        return {site: (piece, self._settle(site, m, piece, seen, seconds)) for site, m, piece in zip(sites, matrices, pieces, strict=True)}

    def _matrix(self, site: Site) -> Tensor:
        """The float weight of a site, [N, K]."""
        owner = leaf_at(self.model, site.module)
        own, param = layout(owner, site.tensor), getattr(owner, site.tensor)
        if site.part is not None and own.piece is not None:
            return own.piece(param.detach(), site.part).clone()
        whole = own.matrix(param.detach())
        rows = _rows(site, whole, param)
        return whole if rows is None else whole[rows]

    def _settle(self, site: Site, matrix: Tensor, q: QTensor, seen: Seen, seconds: float) -> SiteRecord:
        """Put the values of the codes into the float module in place, and write down how well they do."""
        owner = leaf_at(self.model, site.module)
        own, param = layout(owner, site.tensor), getattr(owner, site.tensor)
        values = q.dequantize().to(matrix.dtype)
        error, of = relative_error(matrix, values, seen.get("gram"))
        if site.part is not None and own.piece is not None:
            # a stack is copied once, not once for each of its experts; the copy is this run's own
            if site.param not in self._own_stacks:
                param.data = param.data.clone()
                self._own_stacks.add(site.param)
            own.piece(param.data, site.part).copy_(values)
        else:
            whole = own.matrix(param.detach())
            rows = _rows(site, whole, param)
            if rows is not None:
                whole = whole.clone()
                whole[rows] = values
            param.data = own.tensor(values if rows is None else whole, param.shape).contiguous()
        packing = self._packing(site, q.shape)
        nbytes = sum(t.numel() * t.element_size() for t in packing.pack(q).values())
        return SiteRecord(
            site=str(site),
            spec=str(q.spec),
            solver=repr(self._solver(site)),
            packing=packing.name,
            shape=q.shape,
            error=error,
            of=of,
            bits=round(8 * nbytes / matrix.numel(), 4),
            nbytes=nbytes,
            seconds=round(seconds, 4),
        )

    def _replace(self, path: str, solved: Mapping[Site, QTensor], inputs: Mapping[Site, Mapping[str, Tensor]]) -> None:
        """Put the packed module where the float leaf was.  inputs: scale and offset of the inputs that have static ones"""
        leaf = leaf_at(self.model, path)
        wrapper = self.model.get_submodule(path)
        first = next(iter(solved))
        if any(site.part is not None or site.tensor != "weight" for site in solved):
            packed = {}
            for site, q in solved.items():
                packed[(site.tensor, site.part)] = Stored(
                    weight=q,
                    packing=self._packing(site, q.shape),
                    activation=self._activation(site),
                    activation_parts=inputs.get(site.input, {}),
                )
            self.model.set_submodule(path, quantized_stack(leaf, packed))
            return
        q = concat_rows([solved[site] for site in sorted(solved, key=lambda s: [r.start for r in s.channels])])
        stored = Stored(
            weight=q,
            packing=self._packing(first, q.shape),
            activation=self._activation(first),
            activation_parts=inputs.get(first.input, {}),
            online=wrapper.before if isinstance(wrapper, Online) else None,
        )
        self.model.set_submodule(path, quantized_leaf(leaf, stored))

    def _packing(self, site: Site, shape: tuple[int, ...]) -> Any:
        return first_that_accepts(self._packings(site), self._spec(site), shape, self._activation(site))

    # lookups -----------------------------------------------------------------------------------------------------------------------------

    @property
    def reader(self) -> TensorReader:
        return _LiveReader(RewrittenReader(self.loaded.reader, self.result.rewrite, self._owners), self._wrapped)

    def _spec(self, site: Site) -> QuantSpec:
        spec = self.result.specs.get(site)
        if spec is None:
            spec = self.recipe.specs_for([site], self.dtype_name)[site]
            self.result.specs[site] = spec
        return spec

    def _stages(self, block: Block) -> list[list[Site]]:
        """The block's stages, without sites that stay float; a weight that was split stands there as its parts."""
        derived: dict[str, list[str]] = {}
        for new, old in self.result.rewrite.derived.items():
            derived.setdefault(old, []).append(new)
        stages = []
        for stage in block.stages:
            sites = []
            for site in stage:
                names = derived.get(site.param, [site.param]) if site.param in self.result.rewrite.dropped else [site.param]
                parts = [site] if names == [site.param] else [Site(path, own) for path, _, own in (n.rpartition(".") for n in names)]
                sites += [s for s in parts if self.recipe.specs_for([s], self.dtype_name)]
            if sites:
                stages.append(sites)
        return stages

    def _solver(self, site: Site) -> WeightSolver:
        if site in self._instead:
            return self._instead[site]
        rule = self.recipe.rule_for(site)
        return rule.solver if rule is not None and rule.solver is not None else self.recipe.solver

    def _activation(self, site: Site) -> QuantSpec | None:
        """The spec of what a weight reads."""
        return self._activation_spec(site.input)

    def _activation_spec(self, site: Site) -> QuantSpec | None:
        if site not in self.result.specs:  # a leaf that a split made of one
            self.result.specs |= self.recipe.specs_for([site], None)
        return self.result.specs.get(site)

    def _packings(self, site: Site) -> list[Any]:
        rule = self.recipe.rule_for(site)
        if rule is not None and rule.packing is not None:
            return [self.registry.packings[rule.packing]()]
        return [cls() for cls in self.registry.packings.values()]

    # the rest of the model, and the journal ----------------------------------------------------------------------------------------------

    def _settle_outside(self, values: bool = True) -> None:
        """Give everything outside the blocks its (rewritten) weights, as they will be stored; blocks go to meta.  values: False = without weights"""
        held = [self.model.get_submodule(b.module) for b in self.topology.blocks]
        rerun = any(b.feed == "rerun" for b in self.topology.blocks)
        for path, insert in list(self.result.rewrite.inserts.items()):
            if not any(within(path, b.module) for b in self.topology.blocks):
                self._install_one(path, insert)
        if not rerun:
            for block in held:
                release(block)
        if not values:
            retie(self.model, self._ties, self.result.rewrite.unties)
            return
        materialize_outside(self.model, held, self.reader, self.compute)
        retie(self.model, self._ties, self.result.rewrite.unties)
        _round_parameters(self.model, set(), "", self.loaded.dtype)
        if rerun:
            # later blocks are not reached by the passes of earlier ones, but a forward pass up to a block needs all before it
            for block in held:
                release(block)

    def _release_outside(self) -> None:
        """Let go of the weights outside the blocks: they are read again when they are saved."""
        release_outside(self.model, [self.model.get_submodule(b.module) for b in self.topology.blocks])
        retie(self.model, self._ties, self.result.rewrite.unties)

    def _install(self, prefix: str) -> None:
        """Build the run-time modules that the rewrite inserts below `prefix`."""
        for path, insert in list(self.result.rewrite.inserts.items()):
            if within(path, prefix):
                self._install_one(path, insert)

    def _install_one(self, path: str, insert: Insert) -> None:
        if path in self._installed:
            return
        self._installed.add(path)
        with at(path):
            module = build_insert(insert, self.registry.modules).eval()
        if insert.place == "before":
            self.model.set_submodule(path, Online(self.model.get_submodule(path), module))
            self._wrapped.add(path)
        elif insert.place == "instead":
            self._owners.replaced[path] = self.model.get_submodule(path)
            self.model.set_submodule(path, module)
        else:
            attach(self.model.get_submodule(path), insert.place.removeprefix("tap:"), module)  # type: ignore[arg-type]

    def _needs_data(self) -> bool:
        """Whether anything in the recipe looks at calibration data."""
        sites = [s for s in self.topology.sites if s in self.result.specs]
        observing = any(self._solver(s).observes or self._is_static(s.input) for s in sites) or any(
            self._is_static(s) for s in self.topology.activations
        )
        block_wants = any(
            t.wants(self.topology.within(b), self.result.specs)
            for t in self.recipe.transforms
            if t.scope == "block"
            for b in self.topology.blocks[:1]
        )
        return observing or block_wants

    def _feed(self) -> BlockFeed:
        feed = BlockFeed(self.model, self.adapter, self.topology.blocks, self.batches, self._autocast(), self.recipe.calibration.affinity)

        def run_block(block: Block, call: BlockInput) -> Any:
            self._install(block.module)
            module = self.model.get_submodule(block.module)
            if any(p.is_meta for p in module.parameters()):
                materialize(module, block.module, self.reader, self.compute)
            return module(*call.args, **call.kwargs)

        known = self.journal.step("feed") if self.journal else None
        with self.timed("inputs"):
            feed.start(run_block, as_tuple=None if known is None else bool(known[1]["as_tuple"]))
        if self.journal and known is None:
            self.journal.keep_step("feed", {}, {"as_tuple": feed.as_tuple})
        if self.stream and not feed.rerun:
            release(self.model.get_submodule(self.topology.blocks[0].module))
        return feed

    def _autocast(self) -> torch.dtype | None:
        """The dtype of matrix products while calibrating, None = that of the weights."""
        wanted = self.recipe.calibration.precision
        native = wanted == "auto" and torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if self.compute is torch.float32 and (wanted == "bfloat16" or native) else None

    def _observe_model(self, wants: Mapping[Site, Sequence[Observer]]) -> dict[Site, Seen]:
        """One pass of the float model, as rewritten so far, block by block."""
        self._settle_outside()
        feed = self._feed()
        seen: dict[Site, Seen] = {}
        for index, block in enumerate(self.topology.blocks):
            self.progress("observe", index, len(self.topology.blocks))
            self._install(block.module)
            module = self.model.get_submodule(block.module)
            materialize(module, block.module, self.reader, self.compute)
            runner = BlockRunner(feed, index, module, keep=self.keep)
            seen |= runner.observe({s: o for s, o in wants.items() if within(s.module, block.module)})
            feed.advance(runner.outputs())
            if not feed.rerun:
                release(module)
        return seen

    def _journal_block(self, block: Block, index: int, records: list[SiteRecord]) -> None:
        assert self.journal is not None
        module = self.model.get_submodule(block.module)
        modules = {}
        for path, m in module.named_modules(prefix=block.module):
            name = module_name(m, self.registry.modules)
            if name is not None:
                modules[path] = {"type": name, "config": m.config()}
        tensors = {join(block.module, n): t for n, t in module.state_dict().items()}
        coverage = self.result.coverage.records(block.sites)
        self.journal.finish_block(index, tensors, {"modules": modules, "records": [r.__dict__ for r in records], "coverage": coverage})

    def _restore(self, block: Block, tensors: TensorReader, data: dict[str, Any]) -> None:
        for path in sorted(data["modules"], key=lambda p: p.count(".")):
            entry = data["modules"][path]
            place(self.model, path, rebuild(self.registry.modules[entry["type"]], entry["config"], self.registry))
        self._installed |= {path for path in self.result.rewrite.inserts if within(path, block.module)}
        if self.stream:
            evaporate(self.model.get_submodule(block.module))  # also what a module makes of its config alone
        else:
            materialize(self.model.get_submodule(block.module), block.module, tensors)
        self.result.coverage.restore(data.get("coverage", ()))
        self.result.sites += [SiteRecord(**{**r, "shape": tuple(r["shape"])}) for r in data["records"]]

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.result.seconds[phase] = round(self.result.seconds.get(phase, 0.0) + time.perf_counter() - started, 4)


class _StreamedValues:
    """The values of a streamed model: of finished blocks from the journal, of everything else as a run in memory would hold them."""

    def __init__(self, blocks: FinishedBlocks, reader: TensorReader, compute: torch.dtype, stored: torch.dtype) -> None:
        self._blocks, self._reader, self._compute, self._stored = blocks, reader, compute, stored

    def names(self) -> Iterable[str]:
        return dict.fromkeys([*self._blocks.names(), *self._reader.names()])

    def __contains__(self, name: object) -> bool:
        return name in self._blocks or name in self._reader

    def __getitem__(self, name: str) -> Tensor:
        if name in self._blocks:
            return self._blocks[name]
        value = self._reader[name]
        return value.to(self._compute).to(self._stored) if value.is_floating_point() else value


class _Owners:
    """The float modules that parameters belong to, also where something stands in their place: they know the layouts."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.replaced: dict[str, nn.Module] = {}

    def get_submodule(self, path: str) -> nn.Module:
        return self.replaced[path] if path in self.replaced else leaf_at(self._model, path)


class _LiveReader:
    """A reader that answers to the names of the live model, where a leaf with a module before it has ".leaf" in its name."""

    def __init__(self, reader: TensorReader, wrapped: set[str]) -> None:
        self._reader, self._wrapped = reader, wrapped

    def _stored_name(self, name: str) -> str:
        path, _, own = name.rpartition(".")
        outer = path.removesuffix(".leaf")
        return f"{outer}.{own}" if outer != path and outer in self._wrapped else name

    def names(self) -> Iterable[str]:
        return self._reader.names()

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._stored_name(name) in self._reader

    def __getitem__(self, name: str) -> Tensor:
        return self._reader[self._stored_name(name)]


def _counted(wants: Mapping[Site, Sequence[Observer]]) -> dict[Site, tuple[Observer, ...]]:
    """The same wishes, with the rows of every part of a fused stack counted: a part may see none."""
    return {site: (*observers, Rows()) if site.part is not None and observers else tuple(observers) for site, observers in wants.items()}


def leaf_at(model: nn.Module, path: str) -> nn.Module:
    """The leaf at a path, behind what was put before it."""
    module = model.get_submodule(path)
    return module.leaf if isinstance(module, Online) else module


def _rows(site: Site, whole: Tensor, param: Tensor) -> Tensor | None:
    """Which rows of the weight matrix a site means; None = all.  Parts of a fused stack lie below each other."""
    if site.part is not None:
        n = whole.shape[0] // param.shape[0]
        return torch.arange(site.part * n, (site.part + 1) * n)
    if site.channels:
        return torch.cat([torch.arange(r.start, r.stop) for r in site.channels])
    return None


def relative_error(weight: Tensor, values: Tensor, gram: Tensor | None) -> tuple[float, str]:
    """How much of the layer's output (or of the weight, without a Gram matrix) the codes lose, squared and relative."""
    delta = weight - values
    if gram is None:
        lost, whole = (float(t.double().square().sum()) for t in (delta, weight))
        return lost / max(whole, 1e-300), "weight"
    g = gram.to(weight)
    if g.ndim == 3:
        delta, weight = (t.unflatten(0, (g.shape[0], -1)) for t in (delta, weight))
    lost, whole = (float(((t @ g) * t).double().sum()) for t in (delta, weight))
    return lost / max(whole, 1e-300), "output"


def _round_parameters(module: nn.Module, solved: set[str], prefix: str, stored: torch.dtype) -> None:
    """Round what stays float to the dtype in which it will be stored, so that the model in memory is the model on disk."""
    for name, p in module.named_parameters(prefix=prefix):
        if name not in solved and not p.is_meta and p.is_floating_point() and stored.itemsize < p.dtype.itemsize:
            p.data = p.data.to(stored).to(p.dtype)
