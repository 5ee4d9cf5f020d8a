"""The models by name, and one call that runs some of them on a trace."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches

from qcore.errors import NotFound

from qplug_hardware.nvr.config import Settings
from qplug_hardware.nvr.metrics import Result, measure
from qplug_hardware.nvr.oracle import run_oracle
from qplug_hardware.nvr.prefetchers import IMP, NextLine, StreamPrefetcher
from qplug_hardware.nvr.runahead import RunaheadPrefetcher
from qplug_hardware.nvr.simulate import NoPrefetcher, Outcome, Prefetcher, Program, Simulation
from qplug_hardware.nvr.trace import Trace


def _imp(s: Settings) -> Prefetcher:
    return IMP(s.imp, s.stream, s.runahead.depth if s.imp.distance is None else s.imp.distance)


PREFETCHERS: Mapping[str, Callable[[Settings], Prefetcher]] = {
    "none": lambda s: NoPrefetcher(),
    "next-line": lambda s: NextLine(),
    "stream": lambda s: StreamPrefetcher(s.stream),
    "imp": _imp,
    "dvr": lambda s: RunaheadPrefetcher(replace(s.runahead, vmig=False), stalled_only=True),
    "nvr": lambda s: RunaheadPrefetcher(s.runahead),
    "nvr-nsb": lambda s: RunaheadPrefetcher(s.runahead),
}
MODELS = (*PREFETCHERS, "oracle")


def require_models(names: Sequence[str]) -> None:
    """NotFound for a model that there is not."""
    for name in names:
        if name not in MODELS:
            near = get_close_matches(name, MODELS, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise NotFound(f"there is no model {name!r}; {hint}have: {', '.join(MODELS)}")


def simulate(trace: Trace, model: str, settings: Settings | None = None) -> Outcome:
    """One model on one trace.  The same arguments give the same outcome."""
    settings = settings or Settings()
    require_models([model])
    return _run(Program(trace, settings.machine), model, settings)


def compare(
    trace: Trace,
    models: Sequence[str],
    settings: Settings | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Result]:
    """Results by model, each against the baseline `none`, which runs whether it was asked for or not."""
    settings = settings or Settings()
    require_models(models)
    program = Program(trace, settings.machine)
    wanted = [m for m in dict.fromkeys(models) if m != "none"]
    report(0, 1 + len(wanted))
    base = _run(program, "none", settings)
    outcomes = {"none": base}
    for i, model in enumerate(wanted, 1):
        report(i, 1 + len(wanted))
        outcomes[model] = _run(program, model, settings)
    report(1 + len(wanted), 1 + len(wanted))
    return {m: measure(m, outcomes[m], base, settings, program.stages - 1) for m in dict.fromkeys(models)}


def _run(program: Program, model: str, settings: Settings) -> Outcome:
    if model == "oracle":
        return run_oracle(program, settings.machine, settings.nsb)
    done = Simulation(program, settings.machine, PREFETCHERS[model](settings), settings.nsb if model == "nvr-nsb" else None)
    done.run()
    return Outcome.of(done)
