"""The preflight: every decision and every violation, on meta tensors, before any computing."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import partial
from math import prod
from typing import Any

import torch
from torch import nn

from qcore.budget import Budget, Work, choose_budget, footprint, too_small
from qcore.calibration.ranges import range_observer
from qcore.engines import ENGINES, Verdict, Weight
from qcore.errors import NotFound, QcoreError, SpecError
from qcore.model.adapter import ModelAdapter
from qcore.model.reader import owned_names, tied_groups
from qcore.model.source import LoadedModel
from qcore.model.topology import Site, Topology
from qcore.modules.conv import QuantizedConv
from qcore.modules.kv_cache import bytes_per_token, kv_problem
from qcore.numbers import QuantSpec
from qcore.numbers.granularity import Shape
from qcore.ops.conv import ConvJob
from qcore.ops.kernel import Choice, Job, choose
from qcore.packing import first_that_accepts
from qcore.plan.left import left_at_run_time
from qcore.plan.plan import Decision, Plan, TransformUse
from qcore.plan.sizes import context_length, experts_per_token, matrix_shape, packed_bytes
from qcore.plugins import Registry
from qcore.recipe import Recipe, resolve_scale
from qcore.transforms.base import LearnedTransform


def make_plan(
    loaded: LoadedModel,
    recipe: Recipe,
    adapter: ModelAdapter,
    registry: Registry,
    *,
    has_data: bool = True,
    device: str = "cpu",
    max_ram: int | None = None,
    stream: bool = False,
    eval_tokens: int = 0,
    processes: int = 1,
    engine: str | None = None,
    tensor_parallel: int = 1,
) -> Plan:
    """Decide everything and check everything; nothing is read but names.  Prepares `loaded.model` in place, as the run itself would.

    has_data: whether there will be calibration batches
    max_ram:  bytes that the run may take; None = what the machine can give
    stream:   whether to stream a model that would fit
    eval_tokens: that the models will be compared on
    processes: that share the machine; each may take its part of the memory
    engine:   the program that is to serve the checkpoint, one of `qcore.engines.ENGINES`: what stands against it is a problem then
    tensor_parallel: over how many devices it is to be split
    """
    if engine is None and tensor_parallel != 1:
        raise SpecError(f"--tensor-parallel {tensor_parallel} is about the program that is to serve the checkpoint; name it with --engine")
    if engine is not None and engine not in ENGINES:
        raise NotFound(f"there is no engine {engine!r}; have: {', '.join(ENGINES)}")
    adapter.prepare(loaded.model)
    return _Planner(
        loaded,
        recipe,
        adapter.topology(loaded.model),
        registry,
        has_data,
        torch.device(device),
        max_ram=max_ram,
        stream=stream,
        eval_tokens=eval_tokens,
        processes=processes,
        engine=engine,
        tensor_parallel=tensor_parallel,
    ).plan()


@dataclass
class _Planner:
    loaded: LoadedModel
    recipe: Recipe
    topology: Topology
    registry: Registry
    has_data: bool
    device: torch.device
    max_ram: int | None = None
    stream: bool = False
    eval_tokens: int = 0
    processes: int = 1
    engine: str | None = None
    tensor_parallel: int = 1
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    alike: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.model = self.loaded.model
        self.sites = self.topology.sites
        self.all_sites = [s for site in self.sites for s in (site, site.input)] + list(self.topology.activations)
        self.specs = self.recipe.wishes(self.topology, str(self.loaded.dtype).removeprefix("torch."))
        self.groups = tied_groups(self.model)
        self.packings = {name: cls() for name, cls in self.registry.packings.items()}
        self.kernels = [cls() for cls in self.registry.kernels.values()]
        self.sizes: dict[tuple[QuantSpec, Shape, str], int] = {}
        self.itemsize = self.loaded.dtype.itemsize

    def plan(self) -> Plan:
        decisions = tuple(d for site in self.sites if site in self.specs and (d := self._decide(site)) is not None)
        self._check_rules()
        cache = self._cache()
        self._check_tensors()
        uses = self._transforms()
        allocator = self.recipe.allocator
        solvers = [self._solver(s) for s in self.sites if s in self.specs] + list(allocator.solvers if allocator else ())
        needs_data = any(u.observes for u in uses) or any(s.observes for s in solvers) or bool(self._static) or self.recipe.block_solver is not None
        if allocator is not None:
            needs_data = needs_data or allocator.needs != "weights"
            self.notes.append(f"allocator {allocator.name!r} chooses spec and solver when it has read the weights; sizes are those of the rules")
            self._check_allocator(decisions)
        if self.recipe.correct_bias and self.recipe.block_solver is not None:
            self.notes.append(
                f"block solver {self.recipe.block_solver.name!r} changes codes after biases were corrected for them, and corrects none again; "
                "compare with --set correct_bias=false"
            )
        if needs_data and not self.has_data:
            self.problems.append(
                f"recipe {self.recipe.name!r} looks at calibration data, and there is none; pass --calib text.txt, "
                "or take a recipe that needs none, such as w4a16-rtn"
            )
        length, context = self.recipe.calibration.length, context_length(self.model)
        if needs_data and context is not None and length > context:
            self.problems.append(
                f"calibration.length={length} is longer than what {self.loaded.name} can see, {context} tokens; --set calibration.length={context}"
            )
        if not decisions and not any(s in self.specs for s in self.topology.activations) and not self.problems and not self.alike:
            self.problems.append(f'recipe {self.recipe.name!r} quantizes nothing of {self.loaded.name}; add a rule, such as sites = "*:weight"')
        coverage = self._coverage(needs_data)
        self._flush_alike()
        engines = self._engines(decisions)
        left = self._left_float()
        before, after = self._sizes(decisions)
        flops = self._flops(decisions, needs_data)
        budget = self._budget(decisions, needs_data, after)
        if allocator is not None and budget.stream and allocator.needs in ("model", "gradients"):
            self.problems.append(
                f"allocator {allocator.name!r} runs the whole float model in memory, and this run is streamed; take a metric of weights or inputs "
                "(--set allocator.metric=output), or give it more memory"
            )
        source = self.recipe.calibration.source
        if needs_data and budget.stream and source is not None and source.kept(self.model, self.recipe.calibration) is None:
            self.problems.append(
                f"calibration source {source.name!r} makes its data with the whole float model in memory, and this run is streamed; "
                "make it once where the model fits (calibration.source.path names the file that keeps it), or use text: --set calibration.source=none"
            )
        return Plan(
            model=self.loaded.name,
            recipe=self.recipe.name,
            decisions=decisions,
            left_float=left,
            refused={str(port): why for port, why in self.topology.blocked.items()},
            transforms=uses,
            problems=tuple(self.problems),
            notes=(*self.loaded.notes, *self.notes),
            bytes_before=before,
            bytes_after=after,
            needs_data=needs_data,
            flops=flops,
            budget=budget,
            coverage=coverage,
            cache=cache,
            engines=engines,
        )

    # one site -----------------------------------------------------------------------------------------------------------------------------

    def _decide(self, site: Site) -> Decision | None:
        spec, activation = self.specs[site], self.specs.get(site.input)
        try:
            module = self.model.get_submodule(site.module)
            shape = matrix_shape(module, site)
        except (AttributeError, QcoreError) as e:
            self.problems.append(f"{site}: {e}")
            return None
        try:
            spec.check(shape)
        except QcoreError as e:
            self._problem(site, str(e))
            return None
        if activation is not None and (isinstance(module, nn.Linear) or site.part is not None):
            try:
                activation.check((1, shape[1]))
            except QcoreError as e:
                self._problem(site.input, str(e))
                return None
        if self.recipe.block_solver is not None and (why := self.recipe.block_solver.refuses(spec)):
            self._problem(site, f"{why}; leave out `block_solver`, or store integers")
        packing = self._packing(site, spec, shape, activation)
        if packing is None:
            return None
        choice = self._kernel(module, site, packing, spec, shape, activation)
        return Decision(
            site=str(site),
            shape=shape,
            spec=str(spec),
            solver=self._solver(site).name,
            packing=packing.name,
            kernel=choice.kernel.name if choice else "–",
            refused=choice.refused if choice else (),
            activation=None if activation is None else str(activation),
            bytes_before=prod(shape) * self.itemsize,
            bytes_after=self._packed_bytes(packing, spec, shape),
        )

    def _packing(self, site: Site, spec: QuantSpec, shape: Shape, activation: QuantSpec | None) -> Any:
        rule = self.recipe.rule_for(site)
        name = rule.packing if rule else None
        try:
            if name is not None and (why := self.packings[name].refuses(spec, shape)):
                self._problem(site, f"packing {name!r} refuses {spec}: {why}; leave `packing` out, and one that accepts is chosen")
                return None
            return self.packings[name] if name is not None else first_that_accepts(self.packings.values(), spec, shape, activation)
        except KeyError:
            self._problem(site, f"there is no packing {name!r}; have: {', '.join(self.packings)}")
        except QcoreError as e:
            self._problem(site, str(e))
        return None

    def _kernel(self, module: nn.Module, site: Site, packing: Any, spec: QuantSpec, shape: Shape, activation: QuantSpec | None) -> Choice | None:
        """The kernel expected to run it; None where it is neither a linear layer nor a convolution: its op is known when it is replaced."""
        conv = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        if not isinstance(module, nn.Linear) and site.part is None and not conv:
            return None
        try:
            about = (packing.name, spec, shape, activation, self.device, self.loaded.dtype, partial(packing.unpack, spec=spec, shape=shape))
            return choose(self.kernels, ConvJob("conv", *about, QuantizedConv.geometry_of(module)) if conv else Job("linear", *about))
        except NotFound as e:
            self._problem(site, str(e))
            return None

    def _packed_bytes(self, packing: Any, spec: QuantSpec, shape: Shape) -> int:
        key = (spec, shape, packing.name)
        if key not in self.sizes:
            self.sizes[key] = packed_bytes(packing, spec, shape)
        return self.sizes[key]

    def _solver(self, site: Site) -> Any:
        rule = self.recipe.rule_for(site)
        return rule.solver if rule is not None and rule.solver is not None else self.recipe.solver

    # the whole ----------------------------------------------------------------------------------------------------------------------------

    def _check_allocator(self, decisions: Sequence[Decision]) -> None:
        """What the allocator says against the run, of the weights that the rules would quantize."""
        allocator, shapes = self.recipe.allocator, {d.site: d.shape for d in decisions}
        assert allocator is not None
        sites = {s: prod(shapes[str(s)]) for s in self.sites if s in self.specs and str(s) in shapes}

        def nbytes(site: Site, spec: QuantSpec) -> int | None:
            shape, own = shapes[str(site)], resolve_scale(spec, str(self.loaded.dtype).removeprefix("torch."))
            try:
                own.check(shape)
                return self._packed_bytes(first_that_accepts(self.packings.values(), own, shape, self.specs.get(site.input)), own, shape)
            except QcoreError:
                return None

        self.problems += allocator.problems(sites, nbytes)

    def _check_rules(self) -> None:
        names = [str(s) for s in self.all_sites]
        # a transform that splits leaves says what it calls the parts: rules may name them before they are there
        parts = {part for t in self.recipe.transforms for part in getattr(t, "parts", ())}
        split = [Site(f"{s.module}.{part}", s.tensor, role=s.role) for s in self.all_sites for part in sorted(parts)]
        for rule in self.recipe.unmatched([*self.all_sites, *split]):
            if rule.window is not None and not any(s.cached for s in self.topology.activations):
                continue  # the check of the cache says more
            near = get_close_matches(rule.sites, names, n=2, cutoff=0.5) or list(dict.fromkeys(names))[:2]
            self.problems.append(
                f"the pattern {rule.sites!r} matches none of the {len(names)} sites of {self.loaded.name}; sites look like {' and '.join(near)} "
                "(`qcore plan --verbose` lists them); mend the pattern or drop the rule"
            )
        for site in self.sites:
            if site not in self.specs and site.input in self.specs:
                own = self.recipe.rule_for(site)
                why = f"rule {own.sites!r} leaves its weight float" if own is not None else "no rule names its weight"
                self.notes.append(f"{site.input} is not quantized, though a rule names it: {why}")

        for site in self._static:
            own = self.recipe.rule_for(site)
            try:
                range_observer(self.specs[site], None if own is None else own.observer)
            except SpecError as e:
                self._problem(site, str(e))

    def _cache(self) -> dict[str, Any]:
        """What the cache of keys and values will hold, and what stands against it."""
        kept = [s for s in self.topology.activations if s.cached]
        for rule in self.recipe.rules:
            if rule.window is None:
                continue
            if not kept:
                self.problems.append(
                    f"the rule {rule.sites!r} is about a cache of keys and values (window={rule.window}), and {self.loaded.name} keeps none: it is "
                    "no decoder with attention, or it caches something else (latents, a state); drop the rule"
                )
            elif wrong := [s for s in self.all_sites if s not in kept and self.recipe.rule_for(s) is rule]:
                self.problems.append(
                    f"the rule {rule.sites!r} is about a cache (window={rule.window}), but names {_names(map(str, wrong))}, which no cache keeps; "
                    'name keys and values alone, "*:[kv]", or leave `window` out'
                )
        quantized = [s for s in kept if s in self.specs]
        sound = []
        for site in quantized:
            if why := kv_problem(self.specs[site], site.heads, site.head_dim):
                self._problem(site, why)
            else:
                sound.append(site)
        if not sound or len(sound) < len(quantized) or not all(s.heads and s.head_dim for s in kept):
            return {}
        before = sum(s.heads * s.head_dim * self.itemsize for s in kept)
        after = sum(bytes_per_token(self.specs[s], s.heads, s.head_dim) if s in self.specs else s.heads * s.head_dim * self.itemsize for s in kept)
        policies = dict.fromkeys((s.tensor, self.specs[s], self.recipe.rule_for(s)) for s in sound)
        said = [f"{place} {spec}" + (f", the last {rule.window} tokens float" if rule and rule.window else "") for place, spec, rule in policies]
        self.notes.append(f"cache of keys and values: {'; '.join(said)}; {before:,} bytes per token become {after:,.0f}")
        return {"policies": said, "bytes_per_token": {"before": before, "after": after}}

    @property
    def _static(self) -> list[Site]:
        """The activations whose scales are found while calibrating."""
        inputs = [site.input for site in self.sites if site in self.specs]
        return [s for s in dict.fromkeys([*inputs, *self.topology.activations]) if s in self.specs and self.specs[s].when == "static"]

    def _check_tensors(self) -> None:
        known = {name for name, *_ in owned_names(self.model, "")}
        known |= {f"{path}.{n}" if path else n for path, m in self.model.named_modules(remove_duplicate=False) for n in m._buffers}
        there = set(self.loaded.reader.names())
        twins = {name: group for group in self.groups for name in group}
        missing = [
            name
            for name, p in self.model.named_parameters(remove_duplicate=False)
            if p.is_meta and name not in there and not any(twin in there for twin in twins.get(name, ()))
        ]
        if missing:
            self.problems.append(
                f"the weights lack {_names(missing)}, which the model has; they would be left without values. "
                "Complete the folder, or fetch the weights again"
            )
        if unknown := sorted(there - known):
            self.problems.append(f"the weights hold {_names(unknown)}, which the model does not have; is this the config that belongs to them?")

    def _transforms(self) -> tuple[TransformUse, ...]:
        uses = []
        for transform in self.recipe.transforms:
            whole = getattr(transform, "scope", "block") == "model"
            parts = [self.topology] if whole else [self.topology.within(b) for b in self.topology.blocks]
            watched: set[Site] = set()
            links: dict[str, Any] = {}
            for topology in parts:
                wants = transform.wants(topology, self.specs)
                watched |= {s for s, observers in wants.items() if observers}
                links |= {link.name: link for link in topology.links if any(p.axis == "in" and _site_of(p.param).input in wants for p in link.reads)}
                self._foresee(transform, topology)
            uses.append(TransformUse(repr(transform), len(watched), tuple(links)))
            touched = {p.param for link in links.values() for p in link.ports}
            for group in self.groups:
                if ends := [n for n in group if n in touched]:
                    size = self.model.get_parameter(group[0]).numel() * self.itemsize
                    self.notes.append(
                        f"transform {transform.name!r} touches {ends[0]}, which is tied to {' and '.join(n for n in group if n != ends[0])}: "
                        f"they may become two tensors, which adds {size / 1e6:.1f} MB"
                    )
        return tuple(uses)

    def _foresee(self, transform: Any, topology: Topology) -> None:
        """What a transform knows beforehand that it will not do, and whether it needs the whole float model."""
        name = f"transform {transform.name!r}"
        if callable(foresee := getattr(transform, "foresee", None)):
            try:
                self.notes += [f"{name}: {note}" for note in foresee(topology, self.specs, self.model)]
            except SpecError as e:
                self.problems.append(f"{name}: {e}")
        if self.stream and isinstance(transform, LearnedTransform):
            self.notes.append(f"{name} learns through the whole float model, which it holds in memory although the run is streamed")

    def _left_float(self) -> dict[str, str]:
        of_param: dict[str, list[Site]] = {}
        for site in self.sites:
            of_param.setdefault(site.param, []).append(site)
        left = {}
        for name, param in self.model.named_parameters():
            sites = of_param.get(name, [])
            if sites and any(s in self.specs for s in sites):
                continue
            if not sites:
                left[name] = "a vector, which is not worth quantizing" if param.ndim < 2 else "outside the blocks that the adapter names"
                continue
            rule = self.recipe.rule_for(sites[0])
            left[name] = "no rule matches it" if rule is None else f"rule {rule.sites!r} says so"
        return left

    def _sizes(self, decisions: Sequence[Decision]) -> tuple[int, int]:
        before = sum(p.numel() for p in self.model.parameters()) * self.itemsize
        return before, before + sum(d.bytes_after - d.bytes_before for d in decisions)

    def _coverage(self, needs_data: bool) -> dict[str, Any]:
        """What can be said of the experts' rows before any token was routed."""
        parts: dict[str, int] = {}
        for site in self.sites:
            if site.part is not None and site in self.specs:
                parts[site.module] = max(parts.get(site.module, 0), site.part + 1)
        if not parts:
            return {}
        settings = self.recipe.calibration
        tokens = settings.samples * settings.length if needs_data else 0
        chosen = experts_per_token(self.model)
        even = None if chosen is None else tokens * chosen // max(parts.values())
        if needs_data and even is not None and even < settings.minimum and settings.below == "fail":
            self.problems.append(
                f"{tokens} calibration tokens, {chosen} experts for each, give each of {max(parts.values())} experts about {even} rows, fewer than "
                f"calibration.minimum={settings.minimum}; use more: --set calibration.samples="
                f"{-(-settings.minimum * settings.samples // max(even, 1))}, or say what to do: --set calibration.below=layer"
            )
        return {
            "experts": sum(parts.values()),
            "stacks": len(parts),
            "tokens": tokens,
            "from": "the calibration text" if settings.source is None else repr(settings.source),
            "rows_if_even": even,
            "minimum": settings.minimum,
            "below": settings.below,
        }

    def _engines(self, decisions: Sequence[Decision]) -> tuple[Verdict, ...]:
        """What serving programs make of it: of language models all that are known, else the one that was asked for."""
        config = getattr(self.model, "config", None)
        if self.engine is None and not hasattr(config, "num_attention_heads"):
            return ()
        packings = {d.site: d.packing for d in decisions}
        weights = [
            Weight(s.module if s.part is None else f"{s.module}.{s.tensor}.{s.part}", matrix_shape(self.model.get_submodule(s.module), s), spec, a, p)
            for s in self.sites
            for spec, a, p in [(self.specs.get(s), self.specs.get(s.input), packings.get(str(s), ""))]
            if spec is None or p
        ]
        verdicts = tuple(judge(weights, config) for judge in ENGINES.values())
        own: list[str] = []
        if inside := [s for s in self.topology.activations if s in self.specs]:
            # a policy of a cache, or a tensor inside a module: no other program's format has a word for it
            own.append(f"{_names(map(str, inside))}: {self.specs[inside[0]]} inside the model is")
        if others := [
            s for s in self.sites if s in self.specs and (s.tensor != "weight" or hasattr(self.model.get_submodule(s.module), "kernel_size"))
        ]:
            # experts of a fused stack, routers, convolutions: compressed-tensors knows linear layers
            own.append(f"{_names(map(str, others))}: what is no linear layer's weight is")
        for t in self.recipe.transforms:
            if left := left_at_run_time(t, self.topology, self.specs, self.model, self.loaded.reader):
                own.append(f"transform {t.name!r} leaves {left} in the model, which are")
        if own:
            reasons = [f"{what} run by qcore alone, or after `import qcore.hf`" for what in own]
            verdicts = tuple(replace(v, reasons=(*v.reasons, *reasons), parallel={}) for v in verdicts)
        elif self.recipe.allocator is not None:
            note = f"allocator {self.recipe.allocator.name!r} may choose what this program cannot load"
            verdicts = tuple(replace(v, notes=(*v.notes, note)) for v in verdicts)
        if self.engine is not None:
            asked = verdicts[list(ENGINES).index(self.engine)]
            self.problems += [f"{asked.engine}: {problem}" for problem in asked.problems(self.tensor_parallel)]
        return verdicts

    def _share(self, decision: Decision) -> float:
        """The share of tokens that a weight sees: an expert is not always chosen."""
        module, _, own = decision.site.partition(":")
        chosen = experts_per_token(self.model)
        if chosen is None or not own.endswith("]") or "[" not in own:
            return 1.0
        return min(1.0, chosen / max(1, getattr(self.model.get_submodule(module), own.partition("[")[0]).shape[0]))

    def _budget(self, decisions: Sequence[Decision], needs_data: bool, packed: int) -> Budget:
        settings, shapes = self.recipe.calibration, {d.site: d.shape for d in decisions}
        sites = [s for s in self.sites if s in self.specs and str(s) in shapes]
        solves = [(s, shapes[str(s)], any(getattr(o, "name", o) == "gram" for o in self._solver(s).observes)) for s in sites]
        work = Work(
            tokens=settings.samples * settings.length if needs_data else 0,
            batch_tokens=settings.batch * settings.length if needs_data else 0,
            eval_tokens=self.eval_tokens,
            values=8 if self.loaded.dtype is torch.float64 else 4,
        )
        streams = all(b.feed == "previous" for b in self.topology.blocks)
        estimate = footprint(self.model, self.topology, solves, packed, work)
        if (problem := too_small(estimate, self.max_ram, streams=streams)) is not None:
            self.problems.append(problem)
        if self.stream and not streams:
            self.problems.append("the blocks of this model are not fed by the block before alone, so it cannot be streamed; leave out --stream")
        return choose_budget(estimate, self.max_ram, streams=streams, wanted=self.stream, processes=self.processes)

    def _flops(self, decisions: Sequence[Decision], needs_data: bool) -> float:
        settings = self.recipe.calibration
        tokens = settings.samples * settings.length if needs_data else 0
        # two passes of each block, the Gram matrices, and what a column-wise solver does to each matrix
        shares = [self._share(d) for d in decisions]
        seen = [(d.shape[1], tokens * share) for d, share in zip(decisions, shares, strict=True) if needs_data]
        flops = 4.0 * tokens * sum(d.values * share for d, share in zip(decisions, shares, strict=True))
        flops += sum(2.0 * k * k * rows for k, rows in seen) + sum(4.0 * d.values * d.shape[1] for d in decisions if needs_data)
        return flops

    def _problem(self, site: Site, what: str) -> None:
        """Note a violation; those of the same wording become one line that counts its sites."""
        self.alike.setdefault(what, []).append(str(site))

    def _flush_alike(self) -> None:
        self.problems[:0] = [f"{_names(sites)}: {what}" for what, sites in self.alike.items()]


def _site_of(param: str) -> Site:
    module, _, tensor = param.rpartition(".")
    return Site(module, tensor)


def _names(names: Iterable[str]) -> str:
    """ "a, b, c and 12 more" """
    listed = list(names)
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return ", ".join(listed[:3]) + more
