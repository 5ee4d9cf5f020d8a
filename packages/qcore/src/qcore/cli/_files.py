"""Files that a command writes on demand: whole, or not at all."""

import os
from contextlib import suppress
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write `text` beside `path` and rename it; where that fails, what was there stays.  A link is written through.  OSError names `path`."""
    real = Path(os.path.realpath(path))
    if real.exists() and not real.is_file():  # a device or a pipe takes text, but no rename
        real.write_text(text, encoding="utf-8")
        return
    part = real.with_name(f".{real.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(real)
    except OSError as e:
        raise OSError(e.errno, e.strerror, str(path)) from e
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
