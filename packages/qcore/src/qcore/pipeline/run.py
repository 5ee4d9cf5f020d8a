"""The steps of a quantization, in their order."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qcore.budget import return_freed_memory
from qcore.calibration.coverage import Ledger, Rows, filled_up, share_inputs
from qcore.calibration.observer import Observer, Seen
from qcore.calibration.runner import BlockFeed, BlockInput, BlockRunner, Progress
from qcore.checkpoint.journal import FinishedBlocks, Journal
from qcore.errors import CalibrationError, at
from qcore.model.adapter import Batch, ModelAdapter, adapter_for
from qcore.model.reader import TensorReader, evaporate, materialize, release
from qcore.model.source import LoadedModel
from qcore.model.tap import Tap, attach
from qcore.model.topology import Block, Site, Topology, join, within
from qcore.modules import module_name, place, rebuild
from qcore.modules.kv_cache import KVCache
from qcore.modules.tapped import QuantizedTap
from qcore.numbers import QTensor
from qcore.pipeline.blocks import BlockStep
from qcore.pipeline.floats import compute_dtype
from qcore.pipeline.look import RunLook
from qcore.pipeline.record import Quantized, SiteRecord
from qcore.pipeline.sites import SiteSolver, Solution, shared_out
from qcore.pipeline.skeleton import Skeleton
from qcore.pipeline.views import StreamedValues, round_parameters
from qcore.pipeline.wishes import Wishes
from qcore.processes import Alone, Processes
from qcore.recipe import Recipe, Rule
from qcore.solvers.rtn import nearest_like
from qcore.transforms.base import LearnedTransform, Lesson, Transform
from qcore.transforms.rewrite import Rewrite, rewritten_topology


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
    processes: Processes | None = None,
) -> Quantized:
    """Quantize `loaded.model` in place, block by block, and return it with its record.

    batches:  calibration batches, as the adapter takes them; may be empty for data-free recipes
    registry: shelves of packings, kernels, modules and adapters (`qcore.plugins.load_registry()`)
    progress: called with (phase, done, total)
    journal:  where finished blocks are kept; blocks that it holds are not computed again
    stream:   keep one block in memory at a time: the model that comes back has its structure alone, its values are in `Quantized.values`
    keep:     bytes of outputs inside a block that may be kept, so that solved layers need not be run again
    processes: that share the work; each is given all batches and runs its own
    """
    if stream and journal is None:
        raise CalibrationError("a streamed run keeps its blocks in a journal; pass journal=Journal(folder, content)")
    run = _Run(loaded, recipe, batches, registry, adapter, progress or (lambda phase, done, total: None), journal, stream, keep, processes or Alone())
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
    run.result.rewrite = run.skeleton.rewrite
    run.result.notes += [*run.skeleton.rewrite.notes, *_said(run.result.sites)]
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
        processes: Processes,
    ) -> None:
        if processes.count > 1 and 0 < len(batches) < processes.count:
            raise CalibrationError(
                f"{processes.count} processes share {len(batches)} calibration batches, and each needs one; start fewer processes, "
                "or make smaller batches: --set calibration.batch=1"
            )
        if processes.count > 1 and (recipe.block_solver is not None or (recipe.allocator is not None and recipe.allocator.needs != "weights")):
            what = f"block solver {recipe.block_solver.name!r}" if recipe.block_solver is not None else f"allocator {recipe.allocator.name!r}"  # type: ignore[union-attr]
            raise CalibrationError(f"{what} looks at all calibration batches, and {processes.count} processes would share them; start one process")
        self.loaded, self.registry, self.processes = loaded, registry, processes
        self.lessons, self.batches = batches, processes.own(batches)
        self.batch_numbers = processes.own(range(len(batches)))
        self.progress, self.journal, self.stream, self.keep = progress, journal, stream, keep
        self.model = loaded.model.eval()
        self.adapter = adapter or adapter_for(self.model, registry.adapters)
        self.adapter.prepare(self.model)
        self.topology = self.adapter.topology(self.model)
        self.dtype_name = str(loaded.dtype).removeprefix("torch.")
        self.compute = compute_dtype(loaded.dtype)
        specs = recipe.wishes(self.topology, self.dtype_name)
        self.skeleton = Skeleton(loaded, self.topology, registry, self.compute)
        self.wishes = Wishes(recipe, registry, specs, self.dtype_name)
        self.sites = SiteSolver(self.model, self.wishes)
        self.result = Quantized(self.model, self.topology, self.adapter, specs, self.skeleton.rewrite)
        self.together = None if recipe.block_solver is None else BlockStep(recipe.block_solver, self.model, self.sites, journal)
        self.result.coverage = Ledger(recipe.calibration.minimum, recipe.calibration.below)

    @property
    def recipe(self) -> Recipe:
        """The recipe, with the rules that an allocator added."""
        return self.wishes.recipe

    # steps -------------------------------------------------------------------------------------------------------------------------------

    def check_coverage(self) -> None:
        """Fail before anything is solved where experts would see too few rows: one pass of the float model, where the policy is to fail."""
        stacks = {
            (s.module, s.tensor) for s in self.topology.sites if s.part is not None and s in self.wishes.specs and self.wishes.solver(s).observes
        }
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
            self.skeleton.rewrite = Rewrite.from_state(*kept)
            return
        for i, transform in enumerate(transforms):
            self.progress(f"transform {transform.name}", i, len(transforms))
            topology = rewritten_topology(self.topology, self.skeleton.rewrite)
            wants = _counted(transform.wants(topology, self.wishes.specs))
            seen = self._observe_model(wants) if wants else {}
            self._fit(transform, topology, seen, f"learned-{i}")
        if self.journal:
            self.journal.keep_step("rewrite", *self.skeleton.rewrite.state())

    def allocate(self) -> None:
        """Let the recipe's allocator choose spec and solver of the weights that are to be quantized; each choice is a rule after all others."""
        allocator = self.recipe.allocator
        if allocator is None:
            return
        sites = [s for s in self.topology.sites if s in self.wishes.specs and s.param not in self.skeleton.rewrite.dropped]
        look = RunLook(self.skeleton, self.wishes, self.adapter, self.batches, self._observed_blocks, self.stream)
        made = allocator.allocate(sites, look) if self.processes.rank == 0 else None
        choices = self.processes.agreed(made)
        chosen = tuple(Rule(str(site).replace("[", "[[]"), c.spec, c.solver) for site, c in choices.items())
        self.wishes.recipe = replace(self.recipe, rules=(*self.recipe.rules, *chosen))
        self.wishes.specs |= self.recipe.specs_for(choices, self.dtype_name)
        self.result.choices = {str(site): c.why for site, c in choices.items()}
        kinds = Counter(f"{c.spec} by {c.solver.name}" for c in choices.values())
        self.result.notes.append(f"allocator {allocator.name}: " + ", ".join(f"{n} × {kind}" for kind, n in kinds.most_common()))

    def solve_blocks(self) -> None:
        """Every block in its turn, on the outputs of the quantized blocks before it."""
        blocks = self.topology.blocks
        needs_data = self.wishes.needs_data(self.topology)
        self.skeleton.settle_outside(values=needs_data or not self.stream)
        done = self.journal.finished(len(blocks)) if self.journal else 0
        for index in range(done):
            assert self.journal is not None
            if (kept := self.journal.step(_own_rewrite(index))) is not None:
                self.skeleton.rewrite = self.skeleton.rewrite.then(Rewrite.from_state(*kept))
            self._restore(blocks[index], *self.journal.block(index))
        feed = self._feed() if needs_data and done < len(blocks) else None
        if self.stream and not any(b.feed == "rerun" for b in blocks):
            self.skeleton.release_outside()
        if feed is not None and done and not feed.rerun:
            assert self.journal is not None
            feed.advance(self.journal.inputs(done, self.batch_numbers))
        for index in range(done, len(blocks)):
            self.progress("block", index, len(blocks))
            self._solve_block(blocks[index], index, feed)
        self.progress("block", len(blocks), len(blocks))
        if self.stream:
            assert self.journal is not None
            self.skeleton.release_outside()
            self.result.values = StreamedValues(FinishedBlocks(self.journal, len(blocks)), self.skeleton.reader, self.compute, self.loaded.dtype)

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
        self.skeleton.install(block.module)
        module = self.model.get_submodule(block.module)
        materialize(module, block.module, self.skeleton.reader, self.compute)
        stages = self.wishes.stages(block, self.skeleton.rewrite)
        runner = BlockRunner(feed, index, module, [s for stage in stages for s in stage], self.keep) if feed is not None else None
        outputs: Sequence[Tensor] = []
        if runner is not None and self.recipe.propagate == "float":
            outputs = self._outputs(runner, index)
            stages = [[site for stage in stages for site in stage]]  # no site sees the errors of another
        test = self.together.begin(feed, index, module, [s for stage in stages for s in stage]) if self.together is not None else None
        all_seen: dict[Site, Seen] = {}
        solved: dict[Site, tuple[QTensor, SiteRecord]] = {}
        inputs: dict[Site, dict[str, Tensor]] = {}
        for stage in stages:
            with self.timed("observe"):
                seen = self._observe_stage(stage, runner)
            with self.timed("solve"):
                solved |= self._solve_stage(stage, seen)
                inputs |= {site.input: self.wishes.static_parts(site.input, seen[site]) for site in stage if self.wishes.is_static(site.input)}
            if runner is not None:
                runner.solved(stage)
            all_seen |= seen if test is not None else {}
        if self.together is not None and test is not None and feed is not None:
            with self.timed("solve"):
                solved |= self.together.improve(test, solved, all_seen)
            runner = BlockRunner(feed, index, module, [])  # what the other one kept is of the codes before
        round_parameters(module, {s.param for s in solved}, block.module, self.loaded.dtype)
        handlers = self._tap_handlers(block, feed, index)
        if runner is not None and self.recipe.propagate == "weights":
            outputs = self._outputs(runner, index)
        for path in dict.fromkeys(site.module for site in solved):
            with at(path):
                self.sites.replace(path, {site: q for site, (q, _) in solved.items() if site.module == path}, inputs)
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

    def _solve_stage(self, stage: Sequence[Site], seen: Mapping[Site, Seen]) -> dict[Site, tuple[QTensor, SiteRecord]]:
        """Choose the codes of all weights of a stage, each in one of the processes; in all of them the leaves hold the values from then on."""
        groups = self.sites.together(stage, seen)
        if self.processes.count == 1:
            found = {i: self.sites.solve(sites, seen[sites[0]]) for i, sites in enumerate(groups)}
        else:
            who = shared_out([self.sites.cost(sites) for sites in groups], self.processes.count)
            own = {i: self.sites.solve(sites, seen[sites[0]]) for i, sites in enumerate(groups) if who[i] == self.processes.rank}
            found = {i: s for brought in self.processes.share(own) for i, s in brought.items()}
        solutions: dict[Site, Solution] = {site: s for i, sites in enumerate(groups) for site, s in zip(sites, found[i], strict=True)}
        return {site: (s.codes, self.sites.settle(site, s)) for site, s in solutions.items()}

    def _outputs(self, runner: BlockRunner, index: int) -> Sequence[Tensor]:
        """What block `index` puts out, which the next one reads; in the journal too, where there is one.  Nobody reads the last block's."""
        if index + 1 == len(self.topology.blocks):
            return []
        with self.timed("advance"):
            if self.journal is None:
                return runner.outputs()
            journal, kept = self.journal, []

            def keep(batch: int, hidden: Tensor) -> None:
                journal.keep_input(index + 1, self.batch_numbers[batch], hidden)
                if not self.stream:
                    kept.append(hidden)

            runner.outputs(keep)
            return journal.inputs(index + 1, self.batch_numbers) if self.stream and not runner.feed.rerun else kept

    def _fit_block_transforms(self, block: Block, index: int, feed: BlockFeed | None) -> None:
        own = Rewrite()
        for transform in self.recipe.transforms:
            if transform.scope != "block":
                continue
            # what is observed goes through the modules that earlier transforms inserted
            self.skeleton.install(block.module)
            # links that end behind an inserted module, or in a leaf that was split, are none any more
            inside = rewritten_topology(self.topology, self.skeleton.rewrite).within(block)
            wants = _counted(transform.wants(inside, self.wishes.specs))
            seen: Mapping[Site, Seen] = {}
            if wants:
                module = self.model.get_submodule(block.module)
                materialize(module, block.module, self.skeleton.reader, self.compute)
                assert feed is not None
                with self.timed("observe"):
                    seen = BlockRunner(feed, index, module).observe(wants)
            with at(f"{block.module}: transform {transform.name}"):
                own = own.then(self._fit(transform, inside, seen))
        if self.journal and (own.notes or not own.empty):
            # the block's weights are kept as they are stored; the rewrite is kept for those who want the float ones again
            self.journal.keep_step(_own_rewrite(index), *own.state())

    def _fit(self, transform: Transform, topology: Topology, seen: Mapping[Site, Seen], page: str = "") -> Rewrite:
        """Fit one transform, in process 0 alone: what comes out must be the same in all to the last digit.

        page: where one of scope "model" that learns, from the batches of all processes, keeps its state
        """
        found: Rewrite | None = None
        if self.processes.rank == 0 and page and isinstance(transform, LearnedTransform):
            self.skeleton.install("")
            lesson = Lesson(self.lessons, self.adapter, self.progress, self.journal, page)
            found = transform.learn(topology, self.wishes.specs, seen, self.model, self.skeleton.reader, lesson)
        elif self.processes.rank == 0:
            found = transform.fit(topology, self.wishes.specs, seen, self.model, self.skeleton.reader)
        if self.processes.count > 1:
            found = Rewrite.from_state(*self.processes.agreed(None if found is None else found.state()))
        assert found is not None
        self.skeleton.rewrite = self.skeleton.rewrite.then(found)
        return found

    def _observe_stage(self, stage: Sequence[Site], runner: BlockRunner | None) -> dict[Site, Seen]:
        if runner is None:
            return {site: {} for site in stage}
        wanted: dict[Site, tuple[Observer, ...]] = {}
        for site in stage:
            own = {o.name: o for o in (*self.wishes.solver(site).observes, *self.wishes.bias_observers(site))}
            wanted[site.input] = (*own.values(), *self.wishes.range_observers(site.input))
        observed = runner.observe(_counted(wanted))
        return self._cover({site: observed[site.input] for site in stage})

    def _cover(self, seen: dict[Site, Seen]) -> dict[Site, Seen]:
        """Enter what the parts of fused stacks saw into the ledger, and do what the recipe says about those that saw too little."""
        ledger = self.result.coverage
        ledger.counts |= {site: own[Rows.name] for site, own in seen.items() if Rows.name in own}
        ledger.require()
        covered = dict(seen)
        for site in ledger.short():
            if site not in seen or "gram" not in {o.name for o in self.wishes.solver(site).observes}:
                continue
            gram = filled_up(seen, ledger.counts, site, ledger.minimum) if ledger.below == "layer" and share_inputs(self.topology, site) else None
            if gram is not None:
                covered[site] = {**seen[site], "gram": gram}
                ledger.instead[site] = "filled up with the layer's average"
            elif ledger.below == "nearest" or not ledger.counts[site].rows:
                covered[site] = {name: value for name, value in seen[site].items() if name != "gram"}
                self.wishes.instead[site] = nearest_like(self.wishes.solver(site))
                ledger.instead[site] = "rounded to nearest"
        return covered

    def _tap_handlers(self, block: Block, feed: BlockFeed | None, index: int) -> dict[Site, Tap]:
        """What quantizes the tensors inside the block's modules; static ranges are those that the solved weights lead to."""
        sites = [s for s in self.topology.activations if within(s.module, block.module) and s in self.wishes.specs]
        static = {s: self.wishes.range_observers(s) for s in sites if self.wishes.is_static(s)}
        seen: Mapping[Site, Seen] = {}
        if static:
            if feed is None:
                raise CalibrationError(f"{next(iter(static))} is to have a static scale, which needs calibration data; pass --calib")
            with self.timed("observe"):
                # a runner that has solved sites would replay the very modules that are tapped
                seen = BlockRunner(feed, index, self.model.get_submodule(block.module), []).observe(static)
        return {s: self._handler(s, self.wishes.static_parts(s, seen[s]) if s in static else None) for s in sites}

    def _handler(self, site: Site, parts: Mapping[str, Tensor] | None) -> Tap:
        spec, rule = self.wishes.specs[site], self.recipe.rule_for(site)
        if not site.cached:
            return QuantizedTap(spec, parts)
        window = rule.window if rule is not None and rule.window is not None else 0
        with at(site):
            return KVCache(spec, window, parts, (site.heads, site.head_dim))

    # the rest of the model, and the journal ----------------------------------------------------------------------------------------------

    def _feed(self) -> BlockFeed:
        affinity = self.recipe.calibration.affinity
        feed = BlockFeed(self.model, self.adapter, self.topology.blocks, self.batches, self._autocast(), affinity, self.processes)

        def run_block(block: Block, call: BlockInput) -> Any:
            self.skeleton.install(block.module)
            module = self.model.get_submodule(block.module)
            if any(p.is_meta for p in module.parameters()):
                materialize(module, block.module, self.skeleton.reader, self.compute)
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
        """One pass of the float model, as rewritten so far."""
        return {site: own for seen in self._observed_blocks(wants) for site, own in seen.items()}

    def _observed_blocks(self, wants: Mapping[Site, Sequence[Observer]]) -> Iterator[Mapping[Site, Seen]]:
        """The same, what each block's sites saw at a time."""
        self.skeleton.settle_outside()
        feed = self._feed()
        for index, block in enumerate(self.topology.blocks):
            self.progress("observe", index, len(self.topology.blocks))
            self.skeleton.install(block.module)
            module = self.model.get_submodule(block.module)
            materialize(module, block.module, self.skeleton.reader, self.compute)
            runner = BlockRunner(feed, index, module, keep=self.keep)
            yield runner.observe({s: o for s, o in wants.items() if within(s.module, block.module)})
            feed.advance(runner.outputs())
            if not feed.rerun:
                release(module)

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
        self.processes.share(None)  # all have kept what the next block reads of their batches, and read what this one did
        self.journal.finish_block(index, tensors, {"modules": modules, "records": [r.__dict__ for r in records], "coverage": coverage})

    def _restore(self, block: Block, tensors: TensorReader, data: dict[str, Any]) -> None:
        for path in sorted(data["modules"], key=lambda p: p.count(".")):
            entry = data["modules"][path]
            place(self.model, path, rebuild(self.registry.modules[entry["type"]], entry["config"], self.registry))
        self.skeleton.installed |= {path: insert for path, insert in self.skeleton.rewrite.inserts.items() if within(path, block.module)}
        if self.stream:
            evaporate(self.model.get_submodule(block.module))  # also what a module makes of its config alone
        else:
            materialize(self.model.get_submodule(block.module), block.module, tensors)
        self.result.coverage.restore(data.get("coverage", ()))
        self.result.sites += [SiteRecord(**{**r, "shape": tuple(r["shape"]), "remarks": tuple(r["remarks"])}) for r in data["records"]]

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.result.seconds[phase] = round(self.result.seconds.get(phase, 0.0) + time.perf_counter() - started, 4)


def _counted(wants: Mapping[Site, Sequence[Observer]]) -> dict[Site, tuple[Observer, ...]]:
    """The same wishes, with the rows of every part of a fused stack counted: a part may see none."""
    return {site: (*observers, Rows()) if site.part is not None and observers else tuple(observers) for site, observers in wants.items()}


def _own_rewrite(index: int) -> str:
    """The step under which a journal keeps what the transforms did to one block."""
    return f"rewrite-{index:05d}"


def _said(records: Sequence[SiteRecord]) -> list[str]:
    """The remarks on all weights, each once."""
    places: dict[str, list[str]] = {}
    for r in records:
        for text in r.remarks:
            places.setdefault(text, []).append(r.site)
    return [f"{sites[0]}{f' and {len(sites) - 1} more' if len(sites) > 1 else ''}: {text}" for text, sites in places.items()]
