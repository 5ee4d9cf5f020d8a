"""Where a run writes: a folder beside the target, which takes the target's place at the end, or is gone on with after a kill.

    out.run/            the journal of the run: finished blocks (see qcore.checkpoint.journal)
      reference/        the float model's outputs
      checkpoint/       what becomes out/

A run that stops before its first block is finished leaves nothing; one that is interrupted later leaves out.run/, and --resume goes on from there.
An error that the user can mend ends the run for good: with the same input it would come again.
"""

import os
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcore.cli._replace import take_place

if TYPE_CHECKING:
    from qcore.checkpoint.journal import Journal
    from qcore.processes import Processes


# either of them tells a folder that a run wrote
OURS = {"qcore.json", "report.json"}


def run_folder(out: Path) -> Path:
    """The folder beside `out`, or beside what it links to, that a run into it writes."""
    out = Path(os.path.realpath(out))
    return out.parent / f"{out.name}.run"


def check_target(out: Path, *, force: bool, resume: bool = False, inputs: Sequence[Path] = ()) -> bool:
    """SpecError when `out` cannot be written without harm; True where a run to be resumed had only its own folder left to delete.

    inputs: what the run reads; --force never replaces a folder that holds one of them, or one that no run wrote
    """
    from qcore.errors import SpecError

    if not out.name:
        raise SpecError(f"-o {str(out)!r} has no name of its own; name a folder, as -o out/")
    given, out = out, Path(os.path.realpath(out))
    run = run_folder(out)
    if out.is_file():
        raise SpecError(f"-o {given.name} is a file; name a folder")
    if (above := next((p for p in out.parents if p.exists()), out)).is_file():
        raise SpecError(f"-o {given} would lie in {above}, which is a file; name another folder")
    if os.path.ismount(out):
        raise SpecError(
            f"-o {given} is a mount point, and a finished checkpoint takes its place by a rename; name a folder inside it: -o {given / 'out'}"
        )
    if run.exists() and not (run.is_dir() and _of_a_run(run)):
        raise SpecError(f"{run.name} beside {out.name} is where a run into it works, and no run made it; move it away, or name another folder")
    if out.is_dir() and (there := sorted(p.name for p in out.iterdir())):
        if not force:
            if resume and (run / "run.json").is_file() and not (run / "checkpoint").exists() and (out / "report.json").is_file():
                return True
            raise SpecError(f"-o {given.name} is not empty; name another folder, or pass --force to replace it")
        if not OURS & set(there):
            raise SpecError(
                f"-o {given.name} holds {', '.join(there[:3])}{', …' if len(there) > 3 else ''} and neither {' nor '.join(sorted(OURS))}: "
                "no run wrote it, and --force replaces results of runs alone; name another folder"
            )
        for used in (Path.cwd(), *inputs):
            if Path(os.path.realpath(used)).is_relative_to(out):
                raise SpecError(f"-o {given.name} --force would delete {used}, which this run needs; name another folder")
    if not (resume or force) and (done := len(list(run.glob("block-*.json")))):
        raise SpecError(
            f"{run.name}/ beside {out.name} holds an unfinished run with {done} finished blocks; go on with --resume, or start anew with --force"
        )
    return False


@contextmanager
def running_into(out: Path, content: Mapping[str, Any], *, resume: bool, processes: "Processes | None" = None) -> Iterator[tuple["Journal", Path]]:
    """The journal of the run and the folder to build in, which takes the place of `out` when the block ends well.

    processes: that share the run; the first makes and finishes the folder, the others read it
    """
    from qcore.checkpoint.journal import Journal
    from qcore.cli import Interrupted
    from qcore.errors import CheckpointError, QcoreError, SpecError, Stopped

    # a link to a folder stays, and what it points to is replaced: it may lie on another disk on purpose
    out = Path(os.path.realpath(out))
    run = run_folder(out)
    if processes is not None and processes.rank:
        processes.share(None)  # the first process has made the folder
        with _terminable():
            yield Journal(run, content, guest=True), run / "checkpoint"
        return
    created = [p for p in (out.parent, *out.parent.parents) if not p.exists()]
    try:
        journal = Journal(run, content, fresh=not resume)
    except OSError as e:
        raise SpecError(f"-o {out}: the run cannot work in {run}, beside it: {e.strerror or e}; name a folder where you can write") from e
    building = run / "checkpoint"
    shutil.rmtree(building, ignore_errors=True)
    for left in (*run.glob(".checkpoint.*"), *out.parent.glob(f".{out.name}.replaced-*")):
        shutil.rmtree(left, ignore_errors=True)
    building.mkdir()
    if processes is not None:
        processes.share(None)
    keep = False
    try:
        with _terminable():
            yield journal, building
            take_place(building, out)
    except KeyboardInterrupt:
        done = _finished(run)
        keep = done > 0
        said = f"; {done} blocks are finished: the same command with --resume goes on" if keep else ""
        raise Interrupted(f"interrupted; nothing was written in {out}/{said}") from None
    except Stopped as e:
        keep = _finished(run) > 0
        then = f"{_finished(run)} blocks are finished: the same command with --resume goes on" if keep else "nothing was finished; start again"
        raise Stopped(f"{e}; {then}") from e
    except (QcoreError, OSError) as e:
        # a full disk is no fault of the input, whoever names it
        disk = e if isinstance(e, OSError) else e.__cause__
        if resume and isinstance(e, CheckpointError) and str(run) in str(e):
            keep = True  # a file of the run itself is damaged: the user is told to delete the folder, and may have a copy instead
        if keep or not isinstance(disk, OSError) or not (keep := _finished(run) > 0):
            raise
        where = f" ({disk.filename})" if disk.filename else ""
        raise Stopped(
            f"{disk.strerror or disk}{where}; nothing was written in {out}/; {_finished(run)} blocks are finished: mend that, "
            "and the same command with --resume goes on"
        ) from e
    except BaseException:
        keep = _finished(run) > 0
        raise
    finally:
        if keep:
            shutil.rmtree(building, ignore_errors=True)
            journal.close()
        else:
            journal.delete()
        if not out.exists() and not keep:
            with suppress(OSError):  # something else may have been put there meanwhile
                for parent in created:
                    parent.rmdir()


def _of_a_run(run: Path) -> bool:
    """Whether a folder is empty, or the journal of a run."""
    names = [p.name for p in run.iterdir()]
    return not names or any(name in ("lock", "run.json") or name.startswith("block-") for name in names)


def _finished(run: Path) -> int:
    return len(list(run.glob("block-*.json")))


@contextmanager
def _terminable() -> Iterator[None]:
    """A polite kill (SIGTERM) cleans up as Ctrl-C does."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    try:
        before: Callable[..., Any] | int | None = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
