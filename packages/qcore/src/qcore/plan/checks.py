"""What stands against a run as a whole: its rules, its cache, its tensors, its transforms, its allocator, its experts."""

from collections import Counter
from collections.abc import Sequence
from difflib import get_close_matches
from math import prod
from typing import Any

from qcore.calibration.ranges import range_observer
from qcore.errors import QcoreError, SpecError
from qcore.model.reader import owned_names
from qcore.model.topology import Site, Topology
from qcore.modules.kv_cache import bytes_per_token, kv_problem
from qcore.numbers import QuantSpec
from qcore.packing import first_that_accepts
from qcore.plan.case import Case, names
from qcore.plan.plan import Decision, TransformUse
from qcore.plan.sizes import experts_per_token
from qcore.recipe import resolve_scale
from qcore.transforms.base import LearnedTransform


def check_allocator(case: Case, decisions: Sequence[Decision]) -> None:
    """What the allocator says against the run, of the weights that the rules would quantize."""
    allocator, shapes = case.recipe.allocator, {d.site: d.shape for d in decisions}
    assert allocator is not None
    sites = {s: prod(shapes[str(s)]) for s in case.sites if s in case.specs and str(s) in shapes}

    def nbytes(site: Site, spec: QuantSpec) -> int | None:
        shape, own = shapes[str(site)], resolve_scale(spec, str(case.loaded.dtype).removeprefix("torch."))
        try:
            own.check(shape)
            return case.packed_bytes(first_that_accepts(case.packings.values(), own, shape, case.specs.get(site.input)), own, shape)
        except QcoreError:
            return None

    case.problems += allocator.problems(sites, nbytes)


def check_rules(case: Case) -> None:
    names = [str(s) for s in case.all_sites]
    # a transform that splits leaves says what it calls the parts: rules may name them before they are there
    parts = {part for t in case.recipe.transforms for part in getattr(t, "parts", ())}
    split = [Site(f"{s.module}.{part}", s.tensor, role=s.role) for s in case.all_sites for part in sorted(parts)]
    for rule in case.recipe.unmatched([*case.all_sites, *split]):
        if rule.window is not None and not any(s.cached for s in case.topology.activations):
            continue  # the check of the cache says more
        if rule.sites.endswith(":grad"):
            case.problems.append(f"the rule {rule.sites!r} is about gradients, which only fine-tuning has: `qcore tune` runs this recipe")
            continue
        near = get_close_matches(rule.sites, names, n=2, cutoff=0.5) or list(dict.fromkeys(names))[:2]
        case.problems.append(
            f"the pattern {rule.sites!r} matches none of the {len(names)} sites of {case.loaded.name}; sites look like {' and '.join(near)} "
            "(`qcore plan --verbose` lists them); mend the pattern or drop the rule"
        )
    for site in case.sites:
        if site not in case.specs and site.input in case.specs:
            own = case.recipe.rule_for(site)
            why = f"rule {own.sites!r} leaves its weight float" if own is not None else "no rule names its weight"
            case.notes.append(f"{site.input} is not quantized, though a rule names it: {why}")

    for site in case.static:
        own = case.recipe.rule_for(site)
        try:
            range_observer(case.specs[site], None if own is None else own.observer)
        except SpecError as e:
            case.refuse(site, str(e))


def cache(case: Case) -> dict[str, Any]:
    """What the cache of keys and values will hold, and what stands against it."""
    kept = [s for s in case.topology.activations if s.cached]
    for rule in case.recipe.rules:
        if rule.window is None:
            continue
        if not kept:
            case.problems.append(
                f"the rule {rule.sites!r} is about a cache of keys and values (window={rule.window}), and {case.loaded.name} keeps none: it is "
                "no decoder with attention, or it caches something else (latents, a state); drop the rule"
            )
        elif wrong := [s for s in case.all_sites if s not in kept and case.recipe.rule_for(s) is rule]:
            case.problems.append(
                f"the rule {rule.sites!r} is about a cache (window={rule.window}), but names {names(map(str, wrong))}, which no cache keeps; "
                'name keys and values alone, "*:[kv]", or leave `window` out'
            )
    quantized = [s for s in kept if s in case.specs]
    sound = []
    for site in quantized:
        if why := kv_problem(case.specs[site], site.heads, site.head_dim):
            case.refuse(site, why)
        else:
            sound.append(site)
    if not sound or len(sound) < len(quantized) or not all(s.heads and s.head_dim for s in kept):
        return {}
    before = sum(s.heads * s.head_dim * case.itemsize for s in kept)
    after = sum(bytes_per_token(case.specs[s], s.heads, s.head_dim) if s in case.specs else s.heads * s.head_dim * case.itemsize for s in kept)
    rules = {s: case.recipe.rule_for(s) for s in sound}
    windows = {s: own.window if own else None for s, own in rules.items()}
    each = [f"{s.tensor} {case.specs[s]}" + (f", the last {windows[s]} tokens float" if windows[s] else "") for s in sound]
    said = list(dict.fromkeys(each))
    case.notes.append(f"cache of keys and values: {'; '.join(said)}; {before:,} bytes per token become {after:,.0f}")
    return {"policies": said, "bytes_per_token": {"before": before, "after": after}}


def inside(case: Case) -> None:
    """A note of the tensors inside modules that are quantized, but for those that a cache keeps."""
    specs = {s: case.specs[s] for s in case.topology.activations if s in case.specs and not s.cached}
    kinds = Counter(f"{s.tensor} {spec}{', static' if spec.when == 'static' else ''}" for s, spec in specs.items())
    if kinds:
        case.notes.append("inside modules: " + "; ".join(f"{n} × {kind}" for kind, n in kinds.items()))


def check_tensors(case: Case) -> None:
    known = {name for name, *_ in owned_names(case.model, "")}
    known |= {f"{path}.{n}" if path else n for path, m in case.model.named_modules(remove_duplicate=False) for n in m._buffers}
    there = set(case.loaded.reader.names())
    twins = {name: group for group in case.groups for name in group}
    missing = [
        name
        for name, p in case.model.named_parameters(remove_duplicate=False)
        if p.is_meta and name not in there and not any(twin in there for twin in twins.get(name, ()))
    ]
    if missing:
        case.problems.append(
            f"the weights lack {names(missing)}, which the model has; they would be left without values. "
            "Complete the folder, or fetch the weights again"
        )
    if unknown := sorted(there - known):
        case.problems.append(f"the weights hold {names(unknown)}, which the model does not have; is this the config that belongs to them?")


def transforms(case: Case) -> tuple[TransformUse, ...]:
    uses = []
    for transform in case.recipe.transforms:
        whole = getattr(transform, "scope", "block") == "model"
        parts = [case.topology] if whole else [case.topology.within(b) for b in case.topology.blocks]
        watched: set[Site] = set()
        links: dict[str, Any] = {}
        for topology in parts:
            wants = transform.wants(topology, case.specs)
            watched |= {s for s, observers in wants.items() if observers}
            links |= {link.name: link for link in topology.links if any(p.axis == "in" and _site_of(p.param).input in wants for p in link.reads)}
            _foresee(case, transform, topology)
        uses.append(TransformUse(repr(transform), len(watched), tuple(links)))
        touched = {p.param for link in links.values() for p in link.ports}
        for group in case.groups:
            if ends := [n for n in group if n in touched]:
                size = case.model.get_parameter(group[0]).numel() * case.itemsize
                case.notes.append(
                    f"transform {transform.name!r} touches {ends[0]}, which is tied to {' and '.join(n for n in group if n != ends[0])}: "
                    f"they may become two tensors, which adds {size / 1e6:.1f} MB"
                )
    return tuple(uses)


def _foresee(case: Case, transform: Any, topology: Topology) -> None:
    """What a transform knows beforehand that it will not do, and whether it needs the whole float model."""
    name = f"transform {transform.name!r}"
    if callable(foresee := getattr(transform, "foresee", None)):
        try:
            case.notes += [f"{name}: {note}" for note in foresee(topology, case.specs, case.model)]
        except SpecError as e:
            case.problems.append(f"{name}: {e}")
    if case.stream and isinstance(transform, LearnedTransform):
        case.notes.append(f"{name} learns through the whole float model, which it holds in memory although the run is streamed")


def left_float(case: Case) -> dict[str, str]:
    of_param: dict[str, list[Site]] = {}
    for site in case.sites:
        of_param.setdefault(site.param, []).append(site)
    left = {}
    for name, param in case.model.named_parameters():
        sites = of_param.get(name, [])
        if sites and any(s in case.specs for s in sites):
            continue
        if not sites:
            left[name] = "a vector, which is not worth quantizing" if param.ndim < 2 else "outside the blocks that the adapter names"
            continue
        rule = case.recipe.rule_for(sites[0])
        left[name] = "no rule matches it" if rule is None else f"rule {rule.sites!r} says so"
    return left


def coverage(case: Case, needs_data: bool) -> dict[str, Any]:
    """What can be said of the experts' rows before any token was routed."""
    parts: dict[str, int] = {}
    for site in case.sites:
        if site.part is not None and site in case.specs:
            parts[site.module] = max(parts.get(site.module, 0), site.part + 1)
    if not parts:
        return {}
    settings = case.recipe.calibration
    tokens = settings.samples * settings.length if needs_data else 0
    chosen = experts_per_token(case.model)
    even = None if chosen is None else tokens * chosen // max(parts.values())
    if needs_data and even is not None and even < settings.minimum and settings.below == "fail":
        case.problems.append(
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


def _site_of(param: str) -> Site:
    module, _, tensor = param.rpartition(".")
    return Site(module, tensor)
