"""What `qcore nvr` does.  Everything that can be wrong is found before the first simulation."""

import json
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from qcore.cli.kit import progress, table
from qcore.errors import NotFound, SpecError, at

from qplug_hardware.nvr.config import Settings
from qplug_hardware.nvr.files import read_trace
from qplug_hardware.nvr.metrics import Result
from qplug_hardware.nvr.models import compare, require_models
from qplug_hardware.nvr.plot import depth_plot
from qplug_hardware.nvr.synth import SYNTHETIC
from qplug_hardware.nvr.trace import Trace

DEPTHS = (16, 32, 64, 128, 256, 512)
DEEP = ("imp", "dvr", "nvr", "nvr-nsb")  # models whose reach is the depth
Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Job:
    """The arguments of `qcore nvr`."""

    trace: Path | None = None
    synthetic: str | None = None
    models: tuple[str, ...] = ("none", "nvr")
    rows: int | None = None
    gathers: int | None = None
    seed: int | None = None
    row_bytes: int | None = None
    limit: int | None = None
    settings: tuple[str, ...] = ()
    depths: str | None = None
    plot: Path | None = None


def run(job: Job, *, as_json: bool = False) -> None:
    """Simulate, and print tables or JSON."""
    models = tuple(m.strip() for m in job.models)
    require_models(models)
    settings = settings_from(job.settings)
    depths = _depths(job, models)
    if job.plot is not None:
        _check_plot(job.plot)
    trace = _trace(job)
    if job.limit is not None:
        trace = trace.head(job.limit)
    with progress() as report:
        results = compare(trace, models, settings, lambda done, total: report("models", done, total))
        swept = sweep(trace, [m for m in models if m in DEEP], depths, settings, report)
    if job.plot is not None:
        flat = {m: r.speedup for m, r in results.items() if m not in DEEP}
        job.plot.write_text(depth_plot(depths, {m: [r.speedup for r in c.values()] for m, c in swept.items()}, flat, trace.name), encoding="utf-8")
    if as_json:
        told = {m: {str(d): r.to_dict() for d, r in c.items()} for m, c in swept.items()}
        found = {m: r.to_dict() for m, r in results.items()}
        print(json.dumps({"trace": trace.summary(), "settings": asdict(settings), "models": found, "depths": told}, indent=2))
        return
    _show(trace, results, swept)
    if job.plot is not None:
        print(f"written: {job.plot}")


def sweep(
    trace: Trace,
    models: Sequence[str],
    depths: Sequence[int],
    settings: Settings,
    report: Report = lambda phase, done, total: None,
) -> dict[str, dict[int, Result]]:
    """Results by model and depth."""
    out: dict[str, dict[int, Result]] = {m: {} for m in models}
    for i, depth in enumerate(depths if models else ()):
        report("depths", i, len(depths))
        # a distance that is set for IMP alone would not move
        own = replace(settings, runahead=replace(settings.runahead, depth=depth), imp=replace(settings.imp, distance=None))
        for model, result in compare(trace, models, own).items():
            out[model][depth] = result
        report("depths", i + 1, len(depths))
    return out


def settings_from(texts: Sequence[str]) -> Settings:
    """The defaults with `key=value` set, as machine.l2.size=524288.  SpecError names the key and what there is."""
    settings = Settings()
    for text in texts:
        key, equals, value = (part.strip() for part in text.partition("="))
        if not equals:
            raise SpecError(f"--set {text!r} is not of the form KEY=VALUE, such as runahead.depth=64")
        with at(f"--set {text}"):
            settings = _with(settings, key.split("."), _value(value), "")
    return settings


def _with(owner: Any, path: Sequence[str], value: Any, where: str) -> Any:
    own = {f.name: getattr(owner, f.name) for f in fields(owner)}
    name = path[0]
    if name not in own:
        near = get_close_matches(name, own, n=1)
        hint = f"; did you mean {where}{near[0]}?" if near else ""
        raise SpecError(f"there is no setting {where}{name}{hint}; have: {', '.join(where + n for n in own)}")
    inner = own[name]
    if is_dataclass(inner) != (len(path) > 1):
        what = "; have: " + ", ".join(f"{where}{name}.{f.name}" for f in fields(inner)) if is_dataclass(inner) else "; it has no parts"
        raise SpecError(f"{where}{name} is {'a group' if is_dataclass(inner) else 'one value'}{what}")
    return replace(owner, **{name: value if len(path) == 1 else _with(inner, path[1:], value, f"{where}{name}.")})


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _depths(job: Job, models: Sequence[str]) -> tuple[int, ...]:
    if job.plot is not None and not set(models) & set(DEEP):
        raise SpecError(f"--plot draws the speedup against the depth, and none of {', '.join(models)} has one; add one of {', '.join(DEEP)}")
    if job.depths is None:
        return DEPTHS if job.plot is not None else ()
    words = [w.strip() for w in job.depths.split(",")]
    wrong = [w for w in words if not re.fullmatch(r"[1-9][0-9]{0,6}", w)]
    if wrong:
        raise SpecError(f"--depths {job.depths}: {wrong[0]!r} is no depth; allowed: whole numbers from 1, separated by commas")
    return tuple(sorted({int(w) for w in words}))


def _trace(job: Job) -> Trace:
    if (job.trace is None) == (job.synthetic is None):
        raise SpecError("pass a trace file, or --synthetic with a name, and not both")
    if job.trace is not None:
        given = [f"--{name}" for name in ("rows", "gathers", "seed") if getattr(job, name) is not None]
        if given:
            raise SpecError(f"{', '.join(given)} beside a trace file: a file has its own rows and gathers; use --limit to simulate a part of it")
        return read_trace(job.trace, job.row_bytes)
    assert job.synthetic is not None
    if job.synthetic not in SYNTHETIC:
        near = get_close_matches(job.synthetic, SYNTHETIC, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise NotFound(f"there is no synthetic trace {job.synthetic!r}; {hint}have: {', '.join(SYNTHETIC)}")
    given_or = [d if v is None else v for v, d in ((job.rows, 20_000), (job.gathers, 40_000), (job.row_bytes, 128), (job.seed, 0))]
    for name, value, low in zip(("--rows", "--gathers", "--row-bytes", "--seed"), given_or, (1, 1, 1, 0), strict=True):
        if not low <= value <= 10**7:
            raise SpecError(f"{name} is {value}; allowed: {low} to {10**7}")
    return SYNTHETIC[job.synthetic](*given_or)


def _check_plot(path: Path) -> None:
    if path.suffix != ".svg":
        raise SpecError(f"--plot {path.name} is not called *.svg; a plot is an SVG picture, which every browser shows")
    if not path.parent.is_dir():
        raise SpecError(f"--plot {path}: the folder {path.parent} does not exist; make it first")


def _show(trace: Trace, results: Mapping[str, Result], swept: Mapping[str, Mapping[int, Result]]) -> None:
    facts = trace.summary()
    levels = "" if facts["levels"] == 1 else f", {facts['levels']} levels"
    loops = "1 loop" if facts["loops"] == 1 else f"{facts['loops']} loops"
    title = f"{trace.name}: {facts['gathers']} gathers of {facts['distinct_rows']} rows of {trace.row_bytes} bytes, {loops}{levels}"
    headers = ("model", "cycles", "speedup", "stalled", "covered", "late", "accuracy", "timely", "off-chip", "tables")
    rows = [
        (
            m, str(r.cycles), f"{r.speedup:.2f}", f"{r.stall_cycles / r.cycles:.1%}", f"{r.coverage:.1%}", f"{r.coverage_with_late - r.coverage:.1%}",
            _share(r.accuracy), _share(r.timeliness), f"{r.offchip_bytes / 1e6:.3f} MB", f"{r.area['sum'] / 1000:.1f} kbit" if r.area["sum"] else "–",
        )
        for m, r in results.items()
    ]  # fmt: skip
    table(headers, rows, title=title, right=range(1, len(headers)))
    depths = list(next(iter(swept.values()), {}))
    if depths:
        lines = [(m, *(f"{r.speedup:.2f}" for r in c.values())) for m, c in swept.items()]
        table(("depth", *map(str, depths)), lines, title="speedup", right=range(1, len(depths) + 1))


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"
