"""What `qcore plugins doctor` looks for: everything that plug-ins bring is opened, made and read once."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import typer

from qcore.plugins import KINDS, PLUGIN_API, PluginRecord, PluginWarning, Registry
from qcore.plugins.shelf import BUILTIN, plain

Problem = dict[str, str]  # "what" is wrong, and what to "do"

# what whoever uses one calls, by kind
METHODS = {
    "formats": ("encode", "decode"),
    "observers": ("update", "result", "state", "load", "merge"),
    "transforms": ("wants", "fit"),
    "solvers": ("solve",),
    "block_solvers": ("refuses", "solve_block"),
    "allocators": ("allocate",),
    "selectors": ("select",),
    "modules": ("config", "from_config", "forward"),
    "packings": ("refuses", "pack", "unpack"),
    "kernels": ("refuses", "prepare", "__call__"),
    "adapters": ("matches", "topology", "outputs"),
    "sources": ("matches", "load"),
    "calibrations": ("needs_text", "kept", "windows"),
    "tasks": ("data", "sample", "reference", "evaluate"),
    "exporters": ("refuses", "write"),
}
# every run makes one of each of these and asks it, whatever the recipe says
ASKED_BY_ALL = ("sources", "adapters", "packings", "kernels")


def examine(registry: Registry) -> tuple[dict[str, int], list[Problem]]:
    """How many there are of each kind, and what is wrong."""
    counts: dict[str, int] = {}
    problems: list[Problem] = []
    for kind in KINDS:
        try:
            with quietly():
                shelf = getattr(registry, kind)
        except Exception as e:
            problems.append({"what": f"qcore's own {kind} do not load: {type(e).__name__}: {e}", "do": "reinstall qcore"})
            continue
        counts[kind] = len(shelf)
        problems += _clashes(kind, shelf)
        for name in shelf:
            if shelf.origin[name] != BUILTIN and kind in METHODS:
                problems += _class(kind, name, shelf[name], shelf.origin[name])
    problems += _recipes(registry) if "recipes" in counts else []
    problems += _commands(registry) if "commands" in counts else []
    for record in registry.plugins:
        if record.status not in ("ok", "disabled"):
            problems.append({"what": f"{record}: {record.error}", "do": _remedy(record)})
        if record.heavy:
            problems.append(
                {
                    "what": f"{record} imports {', '.join(record.heavy)} when it is registered, so every `qcore` command waits for it",
                    "do": "put these imports inside its hooks, and its classes into a module that only hooks import",
                }
            )
    for name in registry.unknown:
        problems.append({"what": f"QCORE_PLUGINS names {name!r}, which is not installed", "do": "mend the name, or install that plug-in"})
    return counts, problems


def command_trouble(name: str, command: Any) -> str:
    """Why a plug-in's command cannot be built, "" where it can; typer builds all commands at once, so one such would take the others with it."""
    alone = typer.Typer()
    try:
        if isinstance(command, typer.Typer):
            alone.add_typer(command, name=name)
        else:
            alone.command(name)(command)
        typer.main.get_command(alone)
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    return ""


@contextmanager
def quietly() -> Iterator[None]:
    """Warnings about plug-ins are left to the commands' own words; what a plug-in prints while it loads goes to stderr, for stdout may be JSON."""
    with warnings.catch_warnings(), redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore", PluginWarning)
        yield


def _clashes(kind: str, shelf: Any) -> list[Problem]:
    what = kind.removesuffix("s")
    both = [
        {
            "what": f"{what} {name!r} is given by {' and by '.join(origins)}, and cannot be used while both are",
            "do": "uninstall one, leave one out with QCORE_PLUGINS, or ask its author for another name",
        }
        for name, origins in shelf.conflicts.items()
    ]
    ours = [
        {
            "what": f"{what} {name!r} of {' and '.join(origins)} is left out: qcore has one of that name, which is used",
            "do": "give it another name, or ask its author to",
        }
        for name, origins in shelf.refused.items()
    ]
    return both + ours


def _class(kind: str, name: str, cls: type, origin: str) -> list[Problem]:
    what = f"{kind.removesuffix('s')} {name!r} of {origin}"
    own = getattr(cls, "name", name)
    found = []
    if own != plain(own):
        do = f'write name: ClassVar[str] = "{plain(own)}"'
        found.append({"what": f"{what} calls itself {own!r}; names are lower case, and compared as they are written", "do": do})
    if missing := [f"{m}()" for m in METHODS[kind] if not callable(getattr(cls, m, None))]:
        do = f"see docs/add for what {kind} are, or return {cls.__name__} from the hook of its own kind"
        found.append({"what": f"{what}: its class {cls.__name__} has no {', '.join(missing)}", "do": do})
    elif kind in ASKED_BY_ALL and (trouble := _trouble(kind, cls)):
        do = f"until it is mended, QCORE_PLUGINS without {origin} keeps it out of the way"
        found.append({"what": f"{what}: {trouble}; every run asks it, so none would start", "do": do})
    return found


def _trouble(kind: str, cls: type) -> str:
    """What happens to a run that asks a source, an adapter, a packing or a kernel of things that are not its own."""
    try:
        with quietly():
            thing = cls()
    except Exception as e:
        return f"{cls.__name__}() raises {type(e).__name__}: {e}; give every field a default"
    if kind not in ("sources", "adapters"):
        return ""
    from torch import nn

    stranger, said = ("no/such/model", "an address of another kind") if kind == "sources" else (nn.Identity(), "a model of another family")
    try:
        with quietly():
            taken = thing.matches(stranger)
    except Exception as e:
        return f"matches() raises {type(e).__name__}: {e}, asked about {said}"
    return f"matches() is {taken!r} for {said}" if taken is not False else ""


def _recipes(registry: Registry) -> list[Problem]:
    """Recipes that are no TOML, or name what is not there."""
    from qcore.errors import QcoreError
    from qcore.recipe_file import load_recipe

    found = []
    for name, path in registry.recipes.items():
        try:
            with quietly():
                load_recipe(name, registry)
        except QcoreError as e:
            said = str(e).partition("\n")[0]
            do = f"mend the file, or tell its author ({registry.recipes.origin[name]}); what there is: `qcore methods`"
            found.append({"what": f"recipe {path} cannot be used: {said}", "do": do})
    return found


def _commands(registry: Registry) -> list[Problem]:
    from qcore.cli import OWN_COMMANDS

    found = []
    for name, command in registry.commands.items():
        what = f"command {name!r} of {registry.commands.origin[name]}"
        if name in OWN_COMMANDS:
            found.append({"what": f"{what} is left out: qcore has one of that name", "do": "give it another name, or ask its author to"})
        elif trouble := command_trouble(name, command):
            found.append(
                {
                    "what": f"{what} is left out: typer cannot build it: {trouble}",
                    "do": "annotate its arguments as typer reads them",
                }
            )
    return found


def _remedy(record: PluginRecord) -> str:
    if record.status == "duplicate":
        return "uninstall one of the two, or name the distribution you want in QCORE_PLUGINS"
    if record.status == "incompatible":
        return f"upgrade qcore, or install a {record.distribution} that was written for plug-in API {PLUGIN_API}"
    missing = "No module named" in record.error
    first = f"reinstall it with all it needs (`uv pip install {record.distribution}`)" if missing else f"upgrade {record.distribution}"
    return f"{first}, uninstall it (`uv pip uninstall {record.distribution}`), or tell its author; the traceback is in `doctor --json`"
