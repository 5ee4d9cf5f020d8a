"""What commands print: tables on stdout, progress and remarks on stderr."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qcore.engines import Verdict
    from qcore.evaluation import Report
    from qcore.plan import Plan


def print_json(value: Any) -> None:
    from qcore.evaluation.report import finite

    print(json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False))


def remark(text: str) -> None:
    """A line for people, on stderr, so that stdout holds results alone."""
    print(text, file=sys.stderr, flush=True)


def table(
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    title: str | None = None,
    right: Sequence[int] = (),
    stderr: bool = False,
    width: int = 160,
) -> None:
    """Print a table.  right: columns that are aligned to the right;  width: where there is no terminal"""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    made = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for i, header in enumerate(headers):
        made.add_column(escape(header), justify="right" if i in right else "left", overflow="fold")
    for row in rows:
        made.add_row(*(escape(cell) for cell in row))
    console = Console(stderr=stderr)
    if not console.is_terminal:
        # a file or a pipe has no width; 80 columns would fold the very names one greps for
        console = Console(stderr=stderr, width=width)
    console.print(made)


def show_plan(plan: "Plan", *, verbose: bool = False, stderr: bool = False) -> None:
    from qcore.evaluation.report import megabytes

    if verbose:
        headers = ("site", "shape", "stored as", "input", "solver", "packing", "kernel", "size")
        rows = [
            (d.site, _shape(d.shape), d.spec, d.activation or "float", d.solver, d.packing, d.kernel, _change(d.bytes_before, d.bytes_after))
            for d in plan.decisions
        ]
    else:
        headers = ("sites", "shape", "stored as", "input", "solver", "packing", "kernel", "size")
        rows = [
            (
                f"{k['count']} × {k['kind']}",
                _shape(k["shape"]),
                k["spec"],
                k["activation"] or "float",
                k["solver"],
                k["packing"],
                k["kernel"],
                _change(k["bytes_before"], k["bytes_after"]),
            )
            for k in plan.kinds()
        ]
    table(headers, rows, title=f"{plan.model}, recipe {plan.recipe}", stderr=stderr)
    out = sys.stderr if stderr else sys.stdout
    if plan.left_float:
        by_reason: dict[str, list[str]] = {}
        for what, why in plan.left_float.items() if verbose else ((f"{n} × {kind}", why) for (kind, why), n in plan.left_float_kinds().items()):
            by_reason.setdefault(why, []).append(what)
        for why, names in by_reason.items():
            print(f"left float: {', '.join(names)} ({why})", file=out)
    for use in plan.transforms:
        links = f"{len(use.links)} links" if use.links else "links are chosen when it is fitted"
        listed = f": {', '.join(use.links if verbose else use.links[:4])}{'' if verbose or len(use.links) <= 4 else ' …'}" if use.links else ""
        print(f"transform: {use.transform}, {links}{listed}", file=out)
    bits = f", {plan.effective_bits:.2f} bits per quantized weight" if plan.effective_bits else ""
    print(f"size: {megabytes(plan.bytes_before)} → {megabytes(plan.bytes_after)}{bits}", file=out)
    computing = f"about {max(plan.seconds, 1):.0f} s of computing at 50 GFLOP/s"
    if plan.budget is not None:
        how = "streamed, one block in memory at a time" if plan.budget.stream else "the model in memory"
        bound = f" of {megabytes(plan.budget.limit)}" if plan.budget.limit is not None else ""
        computing += f", about {megabytes(plan.budget.estimate)}{bound} of memory ({how})"
    print(f"estimate: {computing}", file=out)
    for verdict in plan.engines:
        print(_served(verdict, verbose), file=out)
    if plan.coverage:
        print(f"experts: {_expected(plan.coverage)}", file=out)
    for note in plan.notes:
        print(f"note: {note}", file=out)


def _served(verdict: "Verdict", verbose: bool) -> str:
    """One line: whether a program can serve the checkpoint, and over how many devices."""
    if verdict.reasons:
        said = verdict.reasons if verbose else verdict.reasons[:1]
        return f"{verdict.engine}: no; " + "; ".join(said)
    split = [str(n) for n, why in verdict.parallel.items() if not why]
    words = [f"over {', '.join(split)} devices"] if split else []
    words += [f"not over {n}: {why[0]}" for n, why in verdict.parallel.items() if why][: None if verbose else 1]
    words += verdict.notes if verbose else verdict.notes[:1]
    return f"{verdict.engine}: yes" + "".join(f"; {w}" for w in words)


def show_report(report: "Report") -> None:
    table(("", "float model", report.recipe["name"]), report.lines(), title=report.model["name"], width=110)
    if report.data.get("note"):
        print(report.data["note"])
    if "experts" in report.coverage:
        print("rows that each expert saw:", *heat_map(report.coverage["experts"]), sep="\n  ")
    for note in report.model.get("notes", ()):
        print(f"note: {note}")


def show_attribution(name: str, found: Mapping[str, Any], most: int = 10) -> None:
    """The modules that cost most, and how much of the loss they explain together."""
    listed = found["modules"][:most]
    lines = [
        (cost["module"], f"{cost['saved']:+.5f}", f"{cost['saved'] / found['kl']:+.1%}" if found["kl"] else "–", f"{cost['kl']:.5f}")
        for cost in listed
    ]
    title = f"{name}: what each module costs, the worst {len(listed)} of {len(found['modules'])}"
    table(("module", "KL saved if float", "of all", "KL left"), lines, right=(1, 2, 3), title=title)
    print(f"KL {found['kl']:.5f} on {found['rows']} tokens; {found['kl_float']:.5f} with all {len(found['modules'])} float again")


_SHADES = "·▁▂▃▄▅▆▇█"


def heat_map(ledger: Mapping[str, Any]) -> list[str]:
    """One line for each stack of experts: the rows that each expert saw, as shades of the most that one saw, and the extremes in numbers."""
    lines = []
    for module, stack in ledger["stacks"].items():
        own = next(iter(stack.values()))
        most = max(own["rows"], default=0)
        shades = "".join(_SHADES[0 if not n else 1 + (7 * n) // max(most, 1)] for n in own["rows"])
        mended = sorted({part for tensor in stack.values() for part in tensor["instead"]}, key=int)
        lines.append(f"{module}  {shades}  {min(own['rows'])} to {most} rows" + (f"; too few, mended: {', '.join(mended)}" if mended else ""))
    return lines


def _expected(coverage: Mapping[str, Any]) -> str:
    even = coverage["rows_if_even"]
    rows = "" if even is None else f", about {even} rows for each if routing is even"
    data = "no calibration data is used" if not coverage["tokens"] else f"{coverage['tokens']} tokens from {coverage['from']}{rows}"
    policy = "" if not coverage["tokens"] else f"; fewer than {coverage['minimum']}: {coverage['below']}"
    return f"{coverage['experts']} in {coverage['stacks']} stacks; {data}{policy}"


def score_name(scores: Mapping[str, float]) -> str:
    """What the task's own score is called."""
    from qcore.evaluation.report import own_scores

    if "accuracy" in scores:
        return "accuracy"
    if "perplexity" in scores or "sqnr_db" in scores:
        return "perplexity" if "perplexity" in scores else "signal to noise"
    return next(iter(own_scores(scores)), "score")


def scores_row(scores: Mapping[str, float]) -> tuple[str, ...]:
    """The task's own score (`score_name`), KL, top-1 agreement as a table shows them."""
    from qcore.evaluation.report import own_scores

    name = score_name(scores)
    if name in scores:
        own = f"{scores[name]:.2%}" if name == "accuracy" else f"{scores[name]:.3f}" if name == "perplexity" else own_scores(scores)[name][1]
    else:
        own = f"{scores['sqnr_db']:.1f} dB" if "sqnr_db" in scores else "–"
    error = scores.get("kl_standard_error")
    kl = f"{scores['kl']:.5f}" + (f" ± {error:.5f}" if error is not None and error == error else "") if "kl" in scores else "–"
    return own, kl, f"{scores['top1'] * 100:.2f} %" if "top1" in scores else "–"


def _shape(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def _change(before: int, after: int) -> str:
    from qcore.evaluation.report import megabytes

    return f"{megabytes(before)} → {megabytes(after)}"
