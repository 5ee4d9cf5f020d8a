"""`qcore explain`: what lies in a checkpoint, which kernel runs each part of it, and why no faster one does."""

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

import typer

from qcore.cli._options import JsonOption, registry


def explain(
    checkpoint: Annotated[Path, typer.Argument(help="A folder that `qcore quantize` wrote.", show_default=False)],
    pattern: Annotated[str, typer.Argument(help="Only modules that match, as *.down_proj.")] = "*",
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="One line per module instead of one per kind.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what each module of a checkpoint stores, which kernel runs it here, and every refusal of a better one with its reason.

    Example: qcore explain out/ "*.down_proj"
    """
    from qcore.checkpoint import load
    from qcore.cli._show import print_json, table
    from qcore.errors import CheckpointError, NotFound

    if not checkpoint.is_dir():
        raise NotFound(f"{checkpoint} is no folder; pass the -o of `qcore quantize`")
    there = rows_of(load(checkpoint, registry=registry()), _errors(checkpoint))
    if not there:
        raise CheckpointError(f"{checkpoint} holds no quantized module, so no kernel runs it; quantize with a recipe that names some")
    if not (rows := [row for row in there if fnmatchcase(row["module"], pattern)]):
        some = " and ".join(dict.fromkeys((there[0]["module"], there[-1]["module"])))
        raise NotFound(f"no quantized module of {checkpoint} matches {pattern!r}; they are called {some}, and * stands for any characters")
    if as_json:
        print_json(rows)
        return
    if verbose:
        lines = [(r["module"], r["weight"], r["input"], r["packing"], r["kernel"], _error(r["error"])) for r in rows]
        table(("module", "weight", "input", "packing", "kernel", "error"), lines)
    else:
        table(("modules", "weight", "input", "packing", "kernel", "largest error"), _kinds(rows))
    reasons = dict.fromkeys(f"{kernel}: {why}" for r in rows for kernel, why in r["refused"])
    if reasons:
        print("kernels that would be preferred, and why they do not run:")
        for reason in reasons:
            print(f"  {reason}")


def rows_of(model: Any, errors: dict[str, float]) -> list[dict[str, Any]]:
    """One row per module that runs from packed parts, and per policy of a cache."""
    from qcore.modules.kv_cache import KVCache

    rows = []
    for path, module in model.named_modules():
        if not callable(getattr(module, "explain", None)):
            continue
        rows.append(_of_cache(path, module) if isinstance(module, KVCache) else _of_weight(path, module, errors.get(path)))
    return rows


def _of_weight(path: str, module: Any, error: float | None) -> dict[str, Any]:
    choice = module.explain()
    activation = getattr(module, "activation", None)
    return {
        "module": path,
        "type": type(module).__name__,
        "weight": str(module.spec),
        "shape": list(module.shape),
        "input": "float" if activation is None else str(activation),
        "packing": module.packing.name,
        "bytes": sum(t.numel() * t.element_size() for t in module.stored().values()),
        "kernel": choice.kernel.name,
        "refused": [list(pair) for pair in choice.refused],
        "error": error,
    }


def _of_cache(path: str, module: Any) -> dict[str, Any]:
    """A policy for keys or values; its path is that of the attention and the tap, as rules name it."""
    choice = module.explain()
    return {
        "module": path.partition(".handlers.")[0].replace(".taps.", ":"),
        "type": type(module).__name__,
        "weight": f"cache: {module.spec}" + (f", the last {module.window} tokens float" if module.window else ""),
        "shape": list(module.shape),
        "input": "float",
        "packing": "bits",
        "bytes": 0,
        "kernel": choice.kernel.name,
        "refused": [list(pair) for pair in choice.refused],
        "error": None,
    }


def _errors(folder: Path) -> dict[str, float]:
    """Module → relative error, where the report is still there."""
    from qcore.evaluation import read_report

    if not (folder / "report.json").exists():
        return {}
    return {row["site"].rpartition(":")[0]: row["error"] for row in read_report(folder).get("sites", []) if row.get("error") is not None}


def _kinds(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    alike: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for r in rows:
        key = (r["module"].rpartition(".")[2], r["weight"], r["input"], r["packing"], r["kernel"])
        alike.setdefault(key, []).append(r)
    lines = []
    for (kind, *rest), own in alike.items():
        known = [r for r in own if r["error"] is not None]
        worst = max(known, key=lambda r: r["error"]) if known else None
        lines.append((f"{len(own)} × {kind}", *rest, f"{worst['error']:.2e} ({worst['module']})" if worst else "–"))
    return lines


def _error(value: float | None) -> str:
    return "–" if value is None else f"{value:.2e}"
