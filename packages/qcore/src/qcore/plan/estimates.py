"""What a run takes and what comes of it: bytes, memory, operations, and which programs serve it."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from qcore.budget import Budget, Work, choose_budget, footprint, too_small
from qcore.engines import ENGINES, Verdict, Weight
from qcore.plan.case import Case, names
from qcore.plan.left import left_at_run_time
from qcore.plan.plan import Decision
from qcore.plan.sizes import experts_per_token, matrix_shape


def sizes(case: Case, decisions: Sequence[Decision]) -> tuple[int, int]:
    before = sum(p.numel() for p in case.model.parameters()) * case.itemsize
    return before, before + sum(d.bytes_after - d.bytes_before for d in decisions)


def engines(case: Case, decisions: Sequence[Decision]) -> tuple[Verdict, ...]:
    """What serving programs make of it: of language models all that are known, else the one that was asked for."""
    config = getattr(case.model, "config", None)
    if case.engine is None and not hasattr(config, "num_attention_heads"):
        return ()
    packings = {d.site: d.packing for d in decisions}
    weights = [
        Weight(s.module if s.part is None else f"{s.module}.{s.tensor}.{s.part}", matrix_shape(case.model.get_submodule(s.module), s), spec, a, p)
        for s in case.sites
        for spec, a, p in [(case.specs.get(s), case.specs.get(s.input), packings.get(str(s), ""))]
        if spec is None or p
    ]
    verdicts = tuple(judge(weights, config) for judge in ENGINES.values())
    own: list[str] = []
    if inside := [s for s in case.topology.activations if s in case.specs]:
        # a policy of a cache, or a tensor inside a module: no other program's format has a word for it
        own.append(f"{names(map(str, inside))}: {case.specs[inside[0]]} inside the model is")
    if others := [s for s in case.sites if s in case.specs and (s.tensor != "weight" or hasattr(case.model.get_submodule(s.module), "kernel_size"))]:
        # experts of a fused stack, routers, convolutions: compressed-tensors knows linear layers
        own.append(f"{names(map(str, others))}: what is no linear layer's weight is")
    for t in case.recipe.transforms:
        if left := left_at_run_time(t, case.topology, case.specs, case.model, case.loaded.reader):
            own.append(f"transform {t.name!r} leaves {left} in the model, which are")
    if own:
        reasons = [f"{what} run by qcore alone, or after `import qcore.hf`" for what in own]
        verdicts = tuple(replace(v, reasons=(*v.reasons, *reasons), parallel={}) for v in verdicts)
    elif case.recipe.allocator is not None:
        note = f"allocator {case.recipe.allocator.name!r} may choose what this program cannot load"
        verdicts = tuple(replace(v, notes=(*v.notes, note)) for v in verdicts)
    if case.engine is not None:
        asked = verdicts[list(ENGINES).index(case.engine)]
        case.problems += [f"{asked.engine}: {problem}" for problem in asked.problems(case.tensor_parallel)]
    return verdicts


def _share(case: Case, decision: Decision) -> float:
    """The share of tokens that a weight sees: an expert is not always chosen."""
    module, _, own = decision.site.partition(":")
    chosen = experts_per_token(case.model)
    if chosen is None or not own.endswith("]") or "[" not in own:
        return 1.0
    return min(1.0, chosen / max(1, getattr(case.model.get_submodule(module), own.partition("[")[0]).shape[0]))


def budget(case: Case, decisions: Sequence[Decision], needs_data: bool, packed: int) -> Budget:
    settings, shapes = case.recipe.calibration, {d.site: d.shape for d in decisions}
    sites = [s for s in case.sites if s in case.specs and str(s) in shapes]
    solves = [(s, shapes[str(s)], any(getattr(o, "name", o) == "gram" for o in case.solver(s).observes)) for s in sites]
    work = Work(
        tokens=settings.samples * settings.length if needs_data else 0,
        batch_tokens=settings.batch * settings.length if needs_data else 0,
        eval_tokens=case.eval_tokens,
        values=8 if case.loaded.dtype is torch.float64 else 4,
    )
    streams = all(b.feed == "previous" for b in case.topology.blocks)
    estimate = footprint(case.model, case.topology, solves, packed, work)
    if (problem := too_small(estimate, case.max_ram, streams=streams)) is not None:
        case.problems.append(problem)
    if case.stream and not streams:
        case.problems.append("the blocks of this model are not fed by the block before alone, so it cannot be streamed; leave out --stream")
    return choose_budget(estimate, case.max_ram, streams=streams, wanted=case.stream, processes=case.processes)


def flops(case: Case, decisions: Sequence[Decision], needs_data: bool) -> float:
    settings = case.recipe.calibration
    tokens = settings.samples * settings.length if needs_data else 0
    # two passes of each block, the Gram matrices, and what a column-wise solver does to each matrix
    shares = [_share(case, d) for d in decisions]
    seen = [(d.shape[1], tokens * share) for d, share in zip(decisions, shares, strict=True) if needs_data]
    flops = 4.0 * tokens * sum(d.values * share for d, share in zip(decisions, shares, strict=True))
    flops += sum(2.0 * k * k * rows for k, rows in seen) + sum(4.0 * d.values * d.shape[1] for d in decisions if needs_data)
    return flops
