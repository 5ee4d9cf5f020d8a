"""`qcore`: the command line.  One file per command; nothing heavy is imported before a command runs.

Exit codes: 0; 2 for input that the user can mend; 130 for Ctrl-C.  Anything else is a defect of ours, and shows its traceback.
"""

import errno
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from qcore.errors import QcoreError

# conditions of the machine, not defects
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_MACHINE = _FULL | {errno.EROFS, errno.EACCES, errno.EPERM}


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
        if e.errno not in _MACHINE:
            raise
        where = f" ({e.filename})" if e.filename else ""
        step = "free some space, or choose another folder with -o" if e.errno in _FULL else "choose another folder with -o"
        _say(f"error: {e.strerror or e}{where}; nothing was written; {step}")
        raise typer.Exit(2) from None


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def build() -> typer.Typer:
    """The command tree, without the plug-ins' commands."""
    from qcore.cli import bench, compare, evaluate, explain, export, methods, plan, plugins, quantize, recipes, report, verify

    app = typer.Typer(
        name="qcore",
        cls=_Group,
        help="Quantize neural networks, and see what it cost.\n\nExample: qcore quantize zoo:tiny-llama --recipe w4a16-gptq -o out/",
        no_args_is_help=True,
        add_completion=False,
        # drawing boxes with rich would take the help longer than everything else together
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    app.command("quantize", short_help="Quantize a model and measure the cost.")(quantize.quantize)
    app.command("plan", short_help="Show what a run would do, without computing.")(plan.plan)
    app.command("eval", short_help="Measure a model or checkpoint on text.")(evaluate.evaluate)
    app.command("compare", short_help="Compare models with the first of them.")(compare.compare)
    app.command("report", short_help="Make report.html again from report.json.")(report.report)
    app.command("verify", short_help="Read a checkpoint through, or make it again.")(verify.verify)
    app.command("explain", short_help="Show what runs a checkpoint, and why.")(explain.explain)
    app.command("export", short_help="Write a checkpoint for another program.")(export.export)
    app.command("bench", short_help="Time a checkpoint's layers on this machine.")(bench.bench)
    app.add_typer(recipes.app, name="recipes", short_help="List recipes, or show one to start from.")
    app.add_typer(plugins.app, name="plugins", short_help="List plug-ins, or find out what is wrong.")
    app.command("methods", short_help="List all that a recipe may name.")(methods.methods)
    return app


OWN_COMMANDS = {"quantize", "plan", "eval", "compare", "explain", "verify", "bench", "export", "report", "recipes", "plugins", "methods"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
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


def _mount_plugins(app: typer.Typer) -> None:
    from qcore.cli.plugins import mount_commands
    from qcore.plugins import PluginWarning, load_registry

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PluginWarning)  # `qcore plugins doctor` tells them
        mount_commands(app, load_registry())
