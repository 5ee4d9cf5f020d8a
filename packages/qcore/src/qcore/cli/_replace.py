"""A finished folder takes the place of an older one."""

import os
import shutil
from pathlib import Path


def take_place(folder: Path, out: Path) -> None:
    """Put `folder` where `out` is; what was there is deleted last, and is back in its place where that fails."""
    old = out.parent / f".{out.name}.replaced-{os.getpid()}"
    there = out.exists()
    if there:
        out.rename(old)
    try:
        folder.rename(out)
    except OSError:
        if there:
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)
