"""What the commands do.  Everything that can be wrong with the input is found before a model runs."""

import csv
import json
import time
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from qcore.cli.kit import progress, remark, table
from qcore.errors import CalibrationError, SpecError
from qcore.plugins import load_registry

from qplug_subsa.coverage import Coverage, coverage_of, nearest_chosen, random_coverage
from qplug_subsa.embed import LocalModel, Progress, default_cache, default_model, embed_texts, quiet
from qplug_subsa.objective import Selection
from qplug_subsa.options import make_selector
from qplug_subsa.plot import principal_plane
from qplug_subsa.pool import Pool, read_pool
from qplug_subsa.report import SHOWN, Picture, write_report
from qplug_subsa.rows import NpyRows, Rows, as_rows, require_budget
from qplug_subsa.subsa import SubSA
from qplug_subsa.units import Units


@dataclass(frozen=True)
class SelectJob:
    """The arguments of `qcore select`."""

    pool: Path
    budget: int
    out: Path
    selector: str = "subsa"
    settings: tuple[str, ...] = ()
    embeddings: Path | None = None
    model: Path | None = None
    scores: str | None = None
    report: Path | None = None
    text_fields: tuple[str, ...] = ("text",)
    id_field: str | None = None
    cache: Path | None = None


def run_select(job: SelectJob, *, force: bool = False, as_json: bool = False) -> None:
    """Choose, and write the chosen records and the report."""
    _check_outputs([job.out, *([job.report] if job.report else [])], (".jsonl", ".csv"), force)
    chooser = make_selector(job.selector, load_registry().selectors, job.settings)
    pool = read_pool(job.pool, job.text_fields, job.id_field)
    require_budget(job.budget, len(pool))
    scores = _scores(pool, job.scores)
    # what a selector misses (scores, most likely) is said before a model runs for minutes
    _chosen(chooser, as_rows(np.eye(2, dtype=np.float32)), 1, None if scores is None else np.resize(scores, 2))
    seconds: dict[str, float] = {}
    with progress() as report:
        with _timed(seconds, "embed"):
            rows, source = _rows(pool, job.embeddings, job.model, job.cache, report)
        with _timed(seconds, "select"):
            found = _chosen(chooser, rows, job.budget, scores, report)
        report("coverage", 0, 1)
        with _timed(seconds, "coverage"):
            units = Units.of(rows)
            best, which, curve = nearest_chosen(units, found.indices)
            mine, random = coverage_of(units, found.indices, best), random_coverage(units, job.budget)
        report("coverage", 1, 1)
    notes = list(found.notes)
    if pool.copies:
        notes.append(f"{pool.copies} of {len(pool)} texts are copies of others in the pool, word for word")
    if mine.nearest < random.nearest:
        hint = "; try --set lam=auto" if found.lam is not None and "lam=auto" not in job.settings else "; try --selector facility-location"
        notes.append(f"a random selection covers the pool better ({random.nearest:.3f} against {mine.nearest:.3f}){hint}")
    _write_records(job.out, _chosen_records(pool, found))
    settings = ", ".join(job.settings) or "its defaults"
    summary = {
        "pool": str(job.pool),
        "texts": len(pool),
        "budget": job.budget,
        "selector": repr(chooser),
        "lam": found.lam,
        "embeddings": source,
        "indices": list(found.indices),
        "gains": list(found.gains),
        "coverage": mine.to_dict(),
        "coverage_random": random.to_dict(),
        "notes": notes,
        "seconds": {k: round(v, 4) for k, v in seconds.items()},
        "out": str(job.out),
        "report": str(job.report) if job.report else None,
    }
    if job.report is not None:
        serves = np.bincount(which, minlength=job.budget)
        lines = [("pool", f"{job.pool.name}, {len(pool)} texts"), ("selector", f"{job.selector} with {settings}"), ("embeddings", source)]
        if found.lam is not None:
            lines.append(("λ", f"{found.lam:g}"))
        _write_page(job.report, pool, units, found, mine, random, serves, curve, lines, notes)
    if as_json:
        print(json.dumps(summary, indent=2, ensure_ascii=False))
        return
    _show(pool, found, mine, random, seconds)
    for note in notes:
        print(f"note: {note}")
    print(f"written: {job.out}" + (f" and {job.report}" if job.report else ""))


def _chosen(chooser: Any, rows: Rows, k: int, scores: Any, report: Progress = quiet) -> Selection:
    """What a selector chooses.  Ours read rows from where they are; others get the tensor that the contract promises."""
    if isinstance(chooser, SubSA):
        return chooser.run(rows, k, progress=lambda done, total: report("choose", done, total))
    if type(chooser).__module__.startswith("qplug_subsa."):
        return chooser.run(rows, k) if hasattr(chooser, "run") else Selection(tuple(chooser.select(rows, k, scores=scores)))
    import torch

    embeddings = torch.from_numpy(np.array(rows.block(0, rows.shape[0])))
    confidence = None if scores is None else torch.from_numpy(np.asarray(scores))
    return Selection(tuple(int(i) for i in chooser.select(embeddings, k, scores=confidence)))


def _show(pool: Pool, found: Selection, mine: Coverage, random: Coverage, seconds: dict[str, float]) -> None:
    shown = list(enumerate(found.indices, 1))[:10]
    rows = [
        (str(rank), pool.ids[i], f"{found.gains[rank - 1]:.1f}" if found.gains else "–", " ".join(pool.texts[i].split())[:90] if pool.texts else "")
        for rank, i in shown
    ]
    table(("rank", "id", "gain", "text"), rows, right=(0, 2))
    if len(found.indices) > len(shown):
        print(f"… and {len(found.indices) - len(shown)} more")
    table(
        ("coverage", "chosen", "random"),
        [
            ("similarity to the nearest chosen text, mean", f"{mine.nearest:.3f}", f"{random.nearest:.3f}"),
            ("the same, worst 5 % of the pool", f"{mine.worst:.3f}", f"{random.worst:.3f}"),
            ("similarity of two chosen texts, mean", f"{mine.redundancy:.3f}", f"{random.redundancy:.3f}"),
        ],
        right=(1, 2),
    )
    print(f"{len(found.indices)} of {len(pool)} texts chosen in {seconds['select']:.3f} s, after {seconds['embed']:.1f} s for embeddings")


def _write_page(
    path: Path,
    pool: Pool,
    units: Units,
    found: Selection,
    mine: Coverage,
    random: Coverage,
    serves: Any,
    curve: Any,
    lines: Sequence[tuple[str, str]],
    notes: Sequence[str],
) -> None:
    plane = principal_plane(units)
    n = len(pool)
    drawn = np.sort(np.random.default_rng(0).permutation(n)[:SHOWN])
    picture = Picture(
        title=f"{len(found.indices)} of {n} texts",
        summary=lines,
        plane=plane,
        map=plane.place(units.take(drawn)),
        map_indices=drawn,
        chosen=plane.place(units.take(np.asarray(found.indices))),
        indices=found.indices,
        gains=found.gains,
        serves=serves.tolist(),
        curve=curve.tolist(),
        found=mine,
        random=random,
        notes=notes,
    )
    write_report(path, picture, pool.ids, pool.texts)


def _chosen_records(pool: Pool, found: Selection) -> Iterable[dict[str, Any]]:
    for rank, i in enumerate(found.indices):
        gain = {"gain": found.gains[rank]} if found.gains else {}
        yield {**pool.records[i], "selection": {"rank": rank + 1, "index": i, **gain}}


def _scores(pool: Pool, name: str | None) -> Any:
    if name is None:
        return None
    values = []
    for record, place in zip(pool.records, pool.places, strict=True):
        try:
            values.append(float(record[name]))
        except (KeyError, TypeError, ValueError):
            has = ", ".join(map(repr, record))
            what = f"{record[name]!r} is no number" if name in record else f"it has {has}"
            raise CalibrationError(f"{pool.path}, {place}: no confidence in the field {name!r}: {what}") from None
    return np.array(values)


@dataclass(frozen=True)
class PromptJob:
    """The arguments of `qcore prompts`."""

    annotated: Path
    test: Path
    out: Path
    tokens: int = 1024
    example_tokens: int = 256
    shots: int | None = None
    tokenizer: Path | None = None
    template: str = "{text}\\nlabel: {label}"
    label_field: str = "label"
    order: str = "ascending"
    centre: str = "none"
    seed: int = 0
    embeddings: Path | None = None
    test_embeddings: Path | None = None
    model: Path | None = None
    text_fields: tuple[str, ...] = ("text",)
    id_field: str | None = None
    cache: Path | None = None


def run_prompts(job: PromptJob, *, force: bool = False, as_json: bool = False) -> None:
    """Retrieve examples for each test item, and write the prompts."""
    from qplug_subsa.embed import load_tokenizer
    from qplug_subsa.prompts import Template, build_prompts, label_remarks
    from qplug_subsa.retrieve import Centre, Limits, Order, similarities

    _check_outputs([job.out], (".jsonl",), force)
    order: Any = _one_of("--order", job.order, get_args(Order))
    centre: Any = _one_of("--centre", job.centre, get_args(Centre))
    text = job.template.replace("\\n", "\n")
    if job.label_field != "label":
        text = text.replace("{label}", f"{{{job.label_field}}}")
    template = Template(text, job.label_field)
    limits = Limits(job.tokens, job.example_tokens, job.shots)
    annotated = read_pool(job.annotated, job.text_fields, job.id_field)
    tests = read_pool(job.test, job.text_fields, job.id_field)
    for record, place in zip(annotated.records, annotated.places, strict=True):
        template.example(record, f"{annotated.path}, {place}")
    remarks = label_remarks([r[job.label_field] for r in annotated.records])
    folder = job.tokenizer or job.model or default_model()
    counter = load_tokenizer(folder)
    if job.tokenizer is None:
        remark(f"tokens are counted by the tokenizer in {folder.name}/; pass that of your language model with --tokenizer")
    with progress() as report:
        examples, source = _rows(annotated, job.embeddings, job.model, job.cache, report)
        items, _ = _rows(tests, job.test_embeddings, job.model, job.cache, report)
        similar = similarities(examples, items, centre)
        built = build_prompts(
            annotated,
            tests,
            similar,
            template,
            lambda t: len(counter.encode(t, add_special_tokens=False, verbose=False)),
            limits,
            order,
            job.seed,
            report,
        )
    records = []
    for i, prompt in enumerate(built):
        record = {
            "id": tests.ids[i],
            "prompt": prompt.text,
            "examples": [annotated.ids[j] for j in prompt.examples],
            "similarities": [round(s, 6) for s in prompt.similarities],
            "tokens": prompt.tokens,
        }
        if job.label_field in tests.records[i]:
            record[job.label_field] = tests.records[i][job.label_field]
        records.append(record)
    _write_records(job.out, records)
    shown = [len(p.examples) for p in built]
    if not min(shown):
        remarks.append(f"{shown.count(0)} of {len(built)} prompts show no example; a larger --tokens or --example-tokens makes room")
    summary = {
        "prompts": len(built),
        "examples": {"mean": float(np.mean(shown)), "least": min(shown), "most": max(shown)},
        "tokens": {"mean": float(np.mean([p.tokens for p in built])), "most": max(p.tokens for p in built), "budget": job.tokens},
        "embeddings": source,
        "notes": remarks,
        "out": str(job.out),
    }
    if as_json:
        print(json.dumps(summary, indent=2, ensure_ascii=False))
        return
    print(f"{len(built)} prompts with {min(shown)} to {max(shown)} examples, {np.mean(shown):.1f} on average, of at most {job.tokens} tokens")
    for note in remarks:
        print(f"note: {note}")
    print(f"written: {job.out}")


# what both commands need ----------------------------------------------------------------------------------------------------------------


def _rows(pool: Pool, embeddings: Path | None, folder: Path | None, cache: Path | None, report: Any) -> tuple[Rows, str]:
    """The vectors of a pool, and where they come from, in words."""
    if embeddings is not None or not pool.texts:
        rows = NpyRows(embeddings or pool.path)
        if rows.shape[0] != len(pool):
            raise CalibrationError(f"{embeddings} has {rows.shape[0]} rows, {pool.path} has {len(pool)} texts; row i belongs to text i")
        return rows, f"{(embeddings or pool.path).name}, {rows.shape[1]} dimensions"
    model = LocalModel(folder or default_model())
    made = embed_texts(model, pool.texts, cache or default_cache(), report)
    where = f"{made.computed} computed, {made.kept} from the cache"
    shown = model.folder.name if folder else "all-MiniLM-L6-v2"
    return as_rows(made.vectors), f"{shown}, {made.vectors.shape[1]} dimensions ({where})"


def _check_outputs(paths: Sequence[Path], suffixes: tuple[str, ...], force: bool) -> None:
    if paths[0].suffix.lower() not in suffixes:
        raise SpecError(f"-o {paths[0]} ends with {paths[0].suffix or 'no suffix'}; what can be written: {', '.join(suffixes)}")
    for path in paths:
        if path.is_dir():
            raise SpecError(f"{path} is a folder; name a file")
        if path.exists() and not force:
            raise SpecError(f"{path} is there already, perhaps with annotations; name another file, or pass --force to replace it")
        if not path.absolute().parent.is_dir():
            raise SpecError(f"{path.parent} is no folder; create it, or name another place")


def _write_records(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """One file, whole or as it was."""
    part = path.with_name(f".{path.name}.partial")
    try:
        with part.open("w", encoding="utf-8", newline="") as f:
            if path.suffix.lower() == ".csv":
                flat = [{k: v for k, v in r.items() if k != "selection"} | r.get("selection", {}) for r in records]
                writer = csv.DictWriter(f, list(dict.fromkeys(k for r in flat for k in r)))
                writer.writeheader()
                writer.writerows(flat)
            else:
                for record in records:
                    f.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _one_of(option: str, value: str, known: Sequence[str]) -> str:
    if value not in known:
        raise SpecError(f"{option} {value!r} is not known; have: {', '.join(known)}")
    return value


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Any:
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started
