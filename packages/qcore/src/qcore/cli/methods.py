"""`qcore methods`: everything that a recipe may name, from qcore and from plug-ins."""

import inspect
from dataclasses import MISSING, fields, is_dataclass
from typing import Annotated, Any

import typer

from qcore.cli._options import JsonOption, registry

KINDS = (
    "solvers", "block_solvers", "transforms", "formats", "observers", "allocators", "selectors", "calibrations",
    "packings", "kernels", "adapters", "sources", "tasks", "exporters", "lowerings",
)  # fmt: skip


def methods(
    kind: Annotated[str | None, typer.Argument(help=f"One of {', '.join(KINDS)}; all without it.", show_default=False)] = None,
    as_json: JsonOption = False,
) -> None:
    """List solvers, transforms, number formats, packings, kernels and the rest, with their options.

    Example: qcore methods solvers
    """
    from difflib import get_close_matches

    from qcore.cli._show import print_json, table
    from qcore.errors import NotFound

    if kind is not None and kind not in KINDS:
        near = get_close_matches(kind, KINDS, n=1)
        raise NotFound(f"no kind named {kind!r}{f'; did you mean {near[0]!r}?' if near else ''}; have: {', '.join(KINDS)}")
    rows = described(registry(), (kind,) if kind else KINDS)
    if as_json:
        print_json(rows)
    else:
        table(
            ("kind", "name", "what it does", "options", "from"), [(r["kind"], r["name"], r["what"], ", ".join(r["options"]), r["from"]) for r in rows]
        )


def described(own: Any, kinds: tuple[str, ...] = KINDS) -> list[dict[str, Any]]:
    """One row per registered class: its name, the first sentence of its docstring, its fields with their defaults, and who brings it."""
    rows = []
    for kind in kinds:
        shelf = getattr(own, kind)
        for name in sorted(shelf):
            cls = shelf[name]
            options = [_option(f) for f in fields(cls) if f.init] if is_dataclass(cls) else []
            rows.append({"kind": kind.removesuffix("s"), "name": name, "what": _first_sentence(cls), "options": options, "from": shelf.origin[name]})
    return rows


def _option(field: Any) -> str:
    if field.default is MISSING and field.default_factory is MISSING:
        return field.name
    default = field.default if field.default is not MISSING else field.default_factory()
    # a spec's repr is a constructor call of five lines; its str is what tables show
    return f"{field.name}={default}" if hasattr(default, "bits_per_value") else f"{field.name}={default!r}"


def _first_sentence(cls: type) -> str:
    # a dataclass without a docstring gets its signature for one, which the options say already
    doc = inspect.cleandoc(cls.__doc__ or "")
    if not doc or doc.startswith(f"{cls.__name__}("):
        return ""
    return " ".join(doc.split("\n\n")[0].split())
