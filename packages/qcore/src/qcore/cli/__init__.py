"""`qcore`: the command line.  One file per command; nothing heavy is imported before a command runs.

Exit codes: 0; 2 for input that the user can mend; 130 for Ctrl-C.  Anything else is a defect of ours, and shows its traceback.
"""

import errno
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from qcore.errors import QcoreError

# conditions of the machine, not defects
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_MACHINE = _FULL | {errno.EROFS, errno.EACCES, errno.EPERM}
# paths that lead nowhere, though they were looked at: a folder that vanished, a name too long, a file where a folder should be
_PATHS = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EBUSY, errno.ESTALE, errno.EIO, errno.EINVAL}


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with what became of the output."""


class _Group(TyperGroup):
    """The commands inside the error boundary."""

    def invoke(self, ctx: Any) -> Any:  # click's context, or that of typer's own copy of click, as the version has it
        with boundary():
            return super().invoke(ctx)


@contextmanager
def boundary() -> Iterator[None]:
    """Turn what the user can mend into a message on stderr and an exit code."""
    if os.environ.get("QCORE_DEBUG"):
        yield
        return
    try:
        yield
    except QcoreError as e:
        _say(f"error: {e}")
        raise typer.Exit(2) from None
    except KeyboardInterrupt as e:
        _say(str(e) or "interrupted")
        raise typer.Exit(130) from None
    except OSError as e:
        where = f" ({e.filename})" if e.filename else ""
        if e.errno in _PATHS and e.filename:
            _say(f"error: {e.strerror}{where}; check the path and the disk, or set QCORE_DEBUG=1 to see where this came from")
            raise typer.Exit(2) from None
        if e.errno not in _MACHINE:
            raise
        step = "free some space, or choose another folder with -o" if e.errno in _FULL else "choose another folder with -o"
        _say(f"error: {e.strerror or e}{where}; nothing was written; {step}")
        raise typer.Exit(2) from None


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _version(wanted: bool) -> None:
    if not wanted:
        return
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import qcore

    found = [f"qcore {qcore.__version__}", f"python {platform.python_version()}"]
    for name in ("torch", "transformers"):  # looked up, not imported: that would take seconds
        with suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    print(", ".join(found))
    raise typer.Exit


def build() -> typer.Typer:
    """The command tree, without the plug-ins' commands."""
    from qcore.cli import bench, compare, evaluate, explain, export, lower, methods, plan, plugins, quantize, recipes, report, verify

    app = typer.Typer(
        name="qcore",
        cls=_Group,
        help="Quantize neural networks, and see what it cost.\n\nExample: qcore quantize zoo:tiny-llama --recipe w4a16-gptq -o out/",
        no_args_is_help=True,
        add_completion=False,
        # drawing boxes with rich would take the help longer than everything else together
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def group(
        version: Annotated[
            bool, typer.Option("--version", "-V", callback=_version, is_eager=True, expose_value=True, help="Print the versions and exit.")
        ] = False,
    ) -> None:
        pass

    app.command("quantize", short_help="Quantize a model and measure the cost.")(quantize.quantize)
    app.command("plan", short_help="Show what a run would do, without computing.")(plan.plan)
    app.command("eval", short_help="Measure a model or checkpoint on text.")(evaluate.evaluate)
    app.command("compare", short_help="Compare models with the first of them.")(compare.compare)
    app.command("report", short_help="Make report.html again from report.json.")(report.report)
    app.command("verify", short_help="Read a checkpoint through, or make it again.")(verify.verify)
    app.command("explain", short_help="Show what runs a checkpoint, and why.")(explain.explain)
    app.command("export", short_help="Write a checkpoint for another program.")(export.export)
    app.command("lower", short_help="Run a checkpoint as another program.")(lower.lower)
    app.command("bench", short_help="Time a checkpoint's layers on this machine.")(bench.bench)
    app.add_typer(recipes.app, name="recipes", short_help="List recipes, or show one to start from.")
    app.add_typer(plugins.app, name="plugins", short_help="List plug-ins, or find out what is wrong.")
    app.command("methods", short_help="List all that a recipe may name.")(methods.methods)
    return app


OWN_COMMANDS = {"quantize", "plan", "eval", "compare", "explain", "verify", "bench", "export", "lower", "report", "recipes", "plugins", "methods"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = [_at_home(arg) for arg in (sys.argv[1:] if argv is None else argv)]
    for stream in (sys.stdout, sys.stderr):
        # a locale without × and │ gets ? for them, not a UnicodeEncodeError after the work
        if isinstance(stream, TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")
    # the bars of libraries would run through our own progress
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        app = build()
        if not args or args[0] not in OWN_COMMANDS:  # the help lists the plug-ins' commands, and an unknown command may be one of theirs
            _mount_plugins(app)
        app(args=args, prog_name="qcore")
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else 0 if e.code is None else 1
    except QcoreError as e:  # plug-ins that clash, before any command runs
        if os.environ.get("QCORE_DEBUG"):
            raise
        _say(f"error: {e}")
        return 2
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    return 0


def _at_home(arg: str) -> str:
    """~/x as a shell writes it out, also in --out=~/x, which shells leave alone: a folder called ~ is nobody's wish."""
    option, equals, path = arg.partition("=") if arg.startswith("--") else ("", "", arg)
    return option + equals + (os.path.expanduser(path) if path == "~" or path.startswith("~/") else path)


def _mount_plugins(app: typer.Typer) -> None:
    from qcore.cli.plugins import mount_commands
    from qcore.plugins import PluginWarning, load_registry

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PluginWarning)  # `qcore plugins doctor` tells them
        mount_commands(app, load_registry())
