"""`qcore plugins`: what is installed, what became of it, and what to do about it."""

import json
import sys
import tomllib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from typing import Annotated, Any

import typer

from qcore.plugins import KINDS, PLUGIN_API, PluginRecord, PluginWarning, Registry, load_registry

app = typer.Typer(name="plugins", help="List the installed plug-ins, or find out what is wrong with one.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]

COLOURS = {"ok": "green", "disabled": "dim", "failed": "red", "incompatible": "red", "duplicate": "red"}


@app.command("list")
def list_plugins(as_json: Json = False) -> None:
    """List every installed plug-in and whether it loaded.

    Imports the plug-ins' modules, but calls none of their hooks.

    Examples:

    qcore plugins list

    qcore plugins list --json

    QCORE_PLUGINS=llm,zoo qcore plugins list      (these two alone; empty: none)
    """
    plugins = _registry().plugins
    if as_json:
        typer.echo(json.dumps([_described(p) for p in plugins], indent=2))
    else:
        _print_plugins(plugins)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Load all that every plug-in brings, and say what is wrong and what to do.

    Ends with exit code 0 when nothing is wrong, 1 otherwise.

    Examples:

    qcore plugins doctor

    qcore plugins doctor --json

    QCORE_PLUGINS= qcore plugins doctor      (qcore without any plug-in)
    """
    registry = _registry()
    counts, problems = _examine(registry)
    if as_json:
        report = {
            "ok": not problems,
            "api": PLUGIN_API,
            "counts": counts,
            "problems": problems,
            "plugins": [asdict(p) for p in registry.plugins],
        }
        typer.echo(json.dumps(report, indent=2))
    else:
        _print_plugins(registry.plugins)
        _print_problems(counts, problems)
    raise typer.Exit(1 if problems else 0)


def mount_commands(root: typer.Typer, registry: Registry) -> None:
    """Add the plug-ins' commands to `root`; one whose name the root has already is left out with a warning."""
    taken = {c.name or getattr(c.callback, "__name__", "").replace("_", "-") for c in root.registered_commands}
    taken |= {g.name or getattr(g.typer_instance, "info", g).name for g in root.registered_groups}
    for name, command in registry.commands.items():
        if name in taken:
            warnings.warn(f"{registry.commands.origin[name]} brings a command {name!r}, which qcore has already", PluginWarning, stacklevel=2)
        elif isinstance(command, typer.Typer):
            root.add_typer(command, name=name, rich_help_panel="From plug-ins")
        else:
            root.command(name, rich_help_panel="From plug-ins")(command)


@contextmanager
def _quietly() -> Iterator[None]:
    """Warnings about plug-ins are left to the commands' own words; what a plug-in prints while it loads goes to stderr, for stdout may be JSON."""
    with warnings.catch_warnings(), redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore", PluginWarning)
        yield


def _registry() -> Registry:
    with _quietly():
        return load_registry()


def _described(record: PluginRecord) -> dict[str, Any]:
    return {k: v for k, v in asdict(record).items() if k != "traceback"}


def _examine(registry: Registry) -> tuple[dict[str, int], list[dict[str, str]]]:
    """Open every shelf and read every recipe: how many there are of each kind, and (what is wrong, what to do)."""
    counts, problems = {}, []
    for kind in KINDS:
        try:
            with _quietly():
                shelf = getattr(registry, kind)
        except Exception as e:
            problems.append({"what": f"qcore's own {kind} do not load: {type(e).__name__}: {e}", "do": "reinstall qcore"})
            continue
        counts[kind] = len(shelf)
        problems += [
            {
                "what": f"{kind.removesuffix('s')} {name!r} is given by {' and by '.join(origins)}, and cannot be used while both are",
                "do": "uninstall one, leave one out with QCORE_PLUGINS, or ask its author for another name",
            }
            for name, origins in shelf.conflicts.items()
        ]
    for path in registry.recipes.values() if "recipes" in counts else ():
        try:
            tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as e:
            problems.append({"what": f"recipe {path} cannot be read: {e}", "do": "mend the file, or tell its author"})
    for record in registry.plugins:
        if record.status not in ("ok", "disabled"):
            problems.append({"what": f"{record}: {record.error}", "do": _remedy(record)})
    for name in registry.unknown:
        problems.append({"what": f"QCORE_PLUGINS names {name!r}, which is not installed", "do": "mend the name, or install that plug-in"})
    return counts, problems


def _remedy(record: PluginRecord) -> str:
    if record.status == "duplicate":
        return "uninstall one of the two, or name the distribution you want in QCORE_PLUGINS"
    if record.status == "incompatible":
        return f"upgrade qcore, or install a {record.distribution} that was written for plug-in API {PLUGIN_API}"
    missing = "No module named" in record.error
    first = f"reinstall it with all it needs (`uv pip install {record.distribution}`)" if missing else f"upgrade {record.distribution}"
    return f"{first}, uninstall it (`uv pip uninstall {record.distribution}`), or tell its author; the traceback is in `doctor --json`"


def _print_plugins(plugins: tuple[PluginRecord, ...]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    if not plugins:
        typer.echo("no plug-in is installed; qcore itself is there")
        return
    table = Table("plug-in", "distribution", "version", "status", "brings")
    for p in plugins:
        brings = ", ".join(h.removeprefix("qcore_") for h in p.hooks) or "–"
        status = f"[{COLOURS[p.status]}]{p.status}[/]"
        table.add_row(escape(p.name), escape(p.distribution), escape(p.version), status, escape(p.error or brings))
    Console().print(table)


def _print_problems(counts: dict[str, int], problems: list[dict[str, str]]) -> None:
    typer.echo("there is: " + (", ".join(f"{n} {kind}" for kind, n in counts.items() if n) or "nothing"))
    if not problems:
        typer.secho("all plug-ins are well", fg="green")
    for i, problem in enumerate(problems, 1):
        typer.secho(f"\n{i}. {problem['what']}", fg="red")
        typer.echo(f"   → {problem['do']}")
