"""`qcore plugins`: what is installed, what became of it, and what to do about it."""

import json
import warnings
from dataclasses import asdict
from typing import Annotated, Any

import typer

from qcore.cli._doctor import command_trouble, examine, quietly
from qcore.plugins import PLUGIN_API, PluginRecord, PluginWarning, Registry, load_registry

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
    counts, problems = examine(registry)
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
    """Add the plug-ins' commands to `root`; one whose name the root has already, or that cannot be built, is left out with a warning."""
    taken = {c.name or getattr(c.callback, "__name__", "").replace("_", "-") for c in root.registered_commands}
    taken |= {g.name or getattr(g.typer_instance, "info", g).name for g in root.registered_groups}
    for name, command in registry.commands.items():
        if name in taken:
            warnings.warn(f"{registry.commands.origin[name]} brings a command {name!r}, which qcore has already", PluginWarning, stacklevel=2)
        elif trouble := command_trouble(name, command):
            message = f"{registry.commands.origin[name]} brings a command {name!r} that cannot be built: {trouble}"
            warnings.warn(message, PluginWarning, stacklevel=2)
        elif isinstance(command, typer.Typer):
            root.add_typer(command, name=name, rich_help_panel="From plug-ins")
        else:
            root.command(name, rich_help_panel="From plug-ins")(command)


def _registry() -> Registry:
    with quietly():
        return load_registry()


def _described(record: PluginRecord) -> dict[str, Any]:
    return {k: v for k, v in asdict(record).items() if k != "traceback"}


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
