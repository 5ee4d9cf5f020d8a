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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qcore.checkpoint.journal import Journal
    from qcore.processes import Processes


def run_folder(out: Path) -> Path:
    """The folder beside `out` that a run into it writes."""
    return out.parent / f"{out.name}.run"


def check_target(out: Path, *, force: bool, resume: bool = False) -> bool:
    """SpecError when `out` cannot be written without harm; True where a run to be resumed had only its own folder left to delete."""
    from qcore.errors import SpecError

    out = Path(os.path.abspath(out))
    run = run_folder(out)
    if out.is_file():
        raise SpecError(f"-o {out.name} is a file; name a folder")
    if out.is_dir() and any(out.iterdir()) and not force:
        if resume and (run / "run.json").is_file() and not (run / "checkpoint").exists() and (out / "report.json").is_file():
            return True
        raise SpecError(f"-o {out.name} is not empty; name another folder, or pass --force to replace it")
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
    from qcore.errors import QcoreError, Stopped

    out = Path(os.path.abspath(out))
    run = run_folder(out)
    if processes is not None and processes.rank:
        processes.share(None)  # the first process has made the folder
        with _terminable():
            yield Journal(run, content, guest=True), run / "checkpoint"
        return
    created = [p for p in (out.parent, *out.parent.parents) if not p.exists()]
    journal = Journal(run, content, fresh=not resume)
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
            _swap(building, out)
    except KeyboardInterrupt:
        done = _finished(run)
        keep = done > 0
        said = f"; {done} blocks are finished: the same command with --resume goes on" if keep else ""
        raise Interrupted(f"interrupted; nothing was written in {out}/{said}") from None
    except Stopped as e:
        keep = _finished(run) > 0
        then = f"{_finished(run)} blocks are finished: the same command with --resume goes on" if keep else "nothing was finished; start again"
        raise Stopped(f"{e}; {then}") from e
    except QcoreError:
        raise
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
            for parent in created:
                parent.rmdir()


def _finished(run: Path) -> int:
    return len(list(run.glob("block-*.json")))


def _swap(folder: Path, out: Path) -> None:
    """Put `folder` where `out` is; what was there is deleted last."""
    old = out.parent / f".{out.name}.replaced-{os.getpid()}"
    if out.exists():
        out.rename(old)
    folder.rename(out)
    shutil.rmtree(old, ignore_errors=True)


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
