"""The preflight: every decision and every violation, on meta tensors, before any computing.

case.py       what is planned, and what was found against it
weights.py    one weight
checks.py     the run as a whole
estimates.py  bytes, memory, operations, engines
"""

import torch

from qcore.engines import ENGINES
from qcore.errors import NotFound, SpecError
from qcore.model.adapter import ModelAdapter
from qcore.model.source import LoadedModel
from qcore.plan import checks, estimates, weights
from qcore.plan.case import Case
from qcore.plan.plan import Plan
from qcore.plan.sizes import context_length
from qcore.plugins import Registry
from qcore.recipe import Recipe


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
    case = Case(
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
    )
    case.problems += adapter.problems(loaded.model, case.specs)
    return _plan(case)


def _plan(case: Case) -> Plan:
    decisions = tuple(d for site in case.sites if site in case.specs and (d := weights.decide(case, site)) is not None)
    checks.check_rules(case)
    cache = checks.cache(case)
    checks.inside(case)
    checks.check_tensors(case)
    uses = checks.transforms(case)
    allocator = case.recipe.allocator
    solvers = [case.solver(s) for s in case.sites if s in case.specs] + list(allocator.solvers if allocator else ())
    needs_data = any(u.observes for u in uses) or any(s.observes for s in solvers) or bool(case.static) or case.recipe.block_solver is not None
    if allocator is not None:
        needs_data = needs_data or allocator.needs != "weights"
        case.notes.append(f"allocator {allocator.name!r} chooses spec and solver when it has read the weights; sizes are those of the rules")
        checks.check_allocator(case, decisions)
    if case.recipe.correct_bias and case.recipe.block_solver is not None:
        case.notes.append(
            f"block solver {case.recipe.block_solver.name!r} changes codes after biases were corrected for them, and corrects none again; "
            "compare with --set correct_bias=false"
        )
    if needs_data and not case.has_data:
        case.problems.append(
            f"recipe {case.recipe.name!r} looks at calibration data, and there is none; pass --calib text.txt, "
            "or take a recipe that needs none, such as w4a16-rtn"
        )
    length, context = case.recipe.calibration.length, context_length(case.model)
    if needs_data and context is not None and length > context:
        case.problems.append(
            f"calibration.length={length} is longer than what {case.loaded.name} can see, {context} tokens; --set calibration.length={context}"
        )
    if not decisions and not any(s in case.specs for s in case.topology.activations) and not case.problems and not case.alike:
        case.problems.append(f'recipe {case.recipe.name!r} quantizes nothing of {case.loaded.name}; add a rule, such as sites = "*:weight"')
    coverage = checks.coverage(case, needs_data)
    case.flush()
    engines = estimates.engines(case, decisions)
    left = checks.left_float(case)
    before, after = estimates.sizes(case, decisions)
    flops = estimates.flops(case, decisions, needs_data)
    budget = estimates.budget(case, decisions, needs_data, after)
    if allocator is not None and budget.stream and allocator.needs in ("model", "gradients"):
        case.problems.append(
            f"allocator {allocator.name!r} runs the whole float model in memory, and this run is streamed; take a metric of weights or inputs "
            "(--set allocator.metric=output), or give it more memory"
        )
    source = case.recipe.calibration.source
    if needs_data and budget.stream and source is not None and source.kept(case.model, case.recipe.calibration) is None:
        case.problems.append(
            f"calibration source {source.name!r} makes its data with the whole float model in memory, and this run is streamed; "
            "make it once where the model fits (calibration.source.path names the file that keeps it), or use text: --set calibration.source=none"
        )
    return Plan(
        model=case.loaded.name,
        recipe=case.recipe.name,
        decisions=decisions,
        left_float=left,
        refused={str(port): why for port, why in case.topology.blocked.items()},
        transforms=uses,
        problems=tuple(dict.fromkeys(case.problems)),
        notes=(*case.loaded.notes, *case.notes),
        bytes_before=before,
        bytes_after=after,
        needs_data=needs_data,
        flops=flops,
        budget=budget,
        coverage=coverage,
        cache=cache,
        engines=engines,
    )
