"""Build the text data and the tokenizer of the zoo from named Debian packages.

The script fetches the packages with ``apt-get download``, takes them apart with ``dpkg-deb -x`` (nothing is installed), cuts
their texts into documents of five domains, splits the documents into train / calibration / evaluation, trains the tokenizer on
the training split and writes

* ``qzoo/data/text/``: ``calib.txt``, ``eval.txt``, ``eval_<domain>.txt``, ``SOURCES.json``, ``NOTICE.txt``,
  ``tokenizer.json``, ``tokenizer_config.json`` (shipped), and
* ``tools/zoo/.work/``: ``train.txt`` and the token streams ``train.npy``, ``eval.npy``, ``calib.npy`` (not shipped).

Run: ``python tools/zoo/make_text.py`` (Debian with apt and a readable package list; libreadline8 for the ``bible`` program).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common import DATA, EOT, VOCAB_SIZE, WORK, sha256_bytes, sha256_file, write_json

PIECE_CHARS = 3000
"""Documents are cut, at blank lines where possible, into pieces of about this many characters before shuffling."""

EVAL_PER_MILLE = 50
"""A document is in the evaluation split if the first 8 hex digits of sha256(domain/document id), mod 1000, are below this."""

TRAIN_BYTES_PER_DOMAIN = 4_200_000
CALIB_BYTES_PER_DOMAIN = 80_000
EVAL_BYTES_PER_DOMAIN = 80_000
EVAL_FILE_BYTES = 60_000


@dataclass
class Source:
    """One domain of text: the packages it comes from and the function that yields its documents."""

    domain: str
    packages: tuple[str, ...]
    licence: str
    reader: Callable[[Path], Iterator[tuple[str, str]]]
    copyright_of: str
    files: list[Path] = field(default_factory=list)


# --------------------------------------------------------------------------------------------------------------------------
# Readers: each yields (document id, text).


def read_bible(root: Path) -> Iterator[tuple[str, str]]:
    """One document a chapter of the King James Bible, printed by the package's own ``bible`` program."""
    data = root / "bible-kjv-text/usr/lib"
    printed = subprocess.run(
        [root / "bible-kjv/usr/bin/bible", "-f", "-p", str(data), "gen1:1-rev22:21"],
        check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL,
    ).stdout  # fmt: skip
    chapters: dict[str, list[str]] = {}
    for line in printed.splitlines():
        match = re.match(r"((?:[1-3] ?)?[A-Za-z]+ ?\d+):(\d+) (.*)", line)
        if match:
            chapters.setdefault(match[1], []).append(f"{match[2]} {match[3]}")
    for chapter, verses in chapters.items():
        name = re.sub(r"(\d+)$", r" \1", chapter)
        yield chapter, name + "\n" + "\n".join(verses)


def read_wordnet(root: Path) -> Iterator[tuple[str, str]]:
    """One document per 32 neighbouring synsets of WordNet: the words, then the gloss."""
    for part in ("noun", "verb", "adj", "adv"):
        entries: list[str] = []
        for line in (root / f"wordnet-base/usr/share/wordnet/data.{part}").read_text("utf-8").splitlines():
            if line.startswith("  "):
                continue
            head, _, gloss = line.partition(" | ")
            fields = head.split()
            count = int(fields[3], 16)
            words = [re.sub(r"\(\w+\)$", "", word).replace("_", " ") for word in fields[4 : 4 + 2 * count : 2]]
            entries.append(f"{', '.join(words)} ({part}): {gloss.strip()}")
        for start in range(0, len(entries), 32):
            yield f"{part}/{start // 32}", "\n".join(entries[start : start + 32])


def _unserialize(data: bytes) -> Any:
    """The little of R's XDR serialization that character vectors, lists and numbers need (version 2 or 3)."""
    position, references = 0, []

    def take(fmt: str) -> Any:
        nonlocal position
        size = struct.calcsize(">" + fmt)
        values = struct.unpack(">" + fmt, data[position : position + size])
        position += size
        return values[0] if len(values) == 1 else values

    def item() -> Any:
        nonlocal position
        flags = take("i")
        kind, has_attributes, has_tag = flags & 0xFF, flags & 0x200, flags & 0x400
        if kind == 254:  # NILVALUE_SXP
            return None
        if kind == 255:  # REFSXP
            return references[(flags >> 8) - 1 if flags >> 8 else take("i") - 1]
        if kind == 1:  # SYMSXP
            references.append(item())
            return references[-1]
        if kind == 2:  # LISTSXP
            pairs = {}
            while kind == 2:
                if has_attributes:
                    item()
                tag = item() if has_tag else len(pairs)
                pairs[tag] = item()
                flags = take("i")
                kind, has_attributes, has_tag = flags & 0xFF, flags & 0x200, flags & 0x400
            return pairs
        if kind == 9:  # CHARSXP
            length = take("i")
            if length < 0:
                return None
            position += length
            return data[position - length : position].decode("utf-8")
        length = take("i")
        if kind in (16, 19):  # STRSXP, VECSXP
            value = [item() for _ in range(length)]
        elif kind in (10, 13):  # LGLSXP, INTSXP
            value = [take("i") for _ in range(length)]
        elif kind == 14:  # REALSXP
            value = [take("d") for _ in range(length)]
        else:
            raise ValueError(f"R object of type {kind}")
        attributes = item() if has_attributes else None
        if attributes and "names" in attributes:
            return dict(zip(attributes["names"], value, strict=True))
        return value

    if data[:2] != b"X\n":
        raise ValueError("not an XDR serialization")
    position = 2
    version = take("i")
    take("ii")
    if version == 3:
        encoding_length = take("i")
        position += encoding_length
    return item()


def read_austen(root: Path) -> Iterator[tuple[str, str]]:
    """One document a chapter of Jane Austen's six novels, from the R package's lazy-load database."""
    data = root / "r-cran-janeaustenr/usr/lib/R/site-library/janeaustenr/data"
    index = _unserialize(zlib.decompress((data / "Rdata.rdx").read_bytes(), 47))
    database = (data / "Rdata.rdb").read_bytes()
    for novel, (offset, length) in sorted(index["variables"].items()):
        chunk = database[offset : offset + length]
        raw = zlib.decompress(chunk[4:]) if chunk[4:5] == b"x" else _decompress_typed(chunk)
        text = "\n".join(line or "" for line in _unserialize(raw))
        chapters = re.split(r"(?m)^(?=chapter [0-9ivxlc]+\.?$)", text, flags=re.IGNORECASE)
        for number, chapter in enumerate(chapters):
            if len(chapter) > 500:
                yield f"{novel}/{number}", chapter


def _decompress_typed(chunk: bytes) -> bytes:
    """A chunk of an R lazy-load database with a type byte ('2': bzip2, 'Z': xz)."""
    import bz2
    import lzma

    kind, body = chunk[4:5], chunk[5:]
    if kind == b"2":
        return bz2.decompress(body)
    if kind == b"Z":
        return lzma.decompress(body, format=lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 6}])
    raise ValueError(f"unknown compression {kind!r}")


def read_stdlib(root: Path) -> Iterator[tuple[str, str]]:
    """One document a file of Python's standard library (tables of code points and generated files left out)."""
    skip = ("encodings/", "pydoc_data/", "_sysconfigdata", "lib2to3/pgen2/", "test/", "__pycache__/", "turtledemo/")
    for package in ("libpython3.11-minimal", "libpython3.11-stdlib"):
        base = root / package / "usr/lib/python3.11"
        for path in sorted(base.rglob("*.py")):
            name = path.relative_to(base).as_posix()
            if path.is_symlink() or any(part in name for part in skip):
                continue
            yield name, path.read_text("utf-8", errors="replace")


def read_python_docs(root: Path) -> Iterator[tuple[str, str]]:
    """One document a reStructuredText page of Python's documentation (change logs left out)."""
    base = root / "python3.11-doc/usr/share/doc/python3.11/html/_sources"
    for path in sorted(base.rglob("*.rst.txt")):
        name = path.relative_to(base).as_posix()
        if "changelog" not in name and not name.startswith(("contents", "copyright", "license")):
            yield name, path.read_text("utf-8")


SOURCES = [
    Source(
        "scripture", ("bible-kjv-text", "bible-kjv"),
        "public domain (text of the King James Version); the data file is for unrestricted use (Chip Chapin 1989)",
        read_bible, "bible-kjv-text",
    ),
    Source("glosses", ("wordnet-base",), "WordNet 3.0 licence (permissive, Princeton University)", read_wordnet, "wordnet-base"),
    Source(
        "novels", ("r-cran-janeaustenr",),
        "public domain (novels of Jane Austen, 1811-1818); the package around them: MIT",
        read_austen, "r-cran-janeaustenr",
    ),
    Source(
        "code", ("libpython3.11-minimal", "libpython3.11-stdlib"),
        "PSF-2.0 (Python's licence; with the permissive notices of the incorporated parts)", read_stdlib, "libpython3.11-minimal",
    ),
    Source("docs", ("python3.11-doc",), "PSF-2.0 (documentation; code examples also 0BSD)", read_python_docs, "python3.11-doc"),
]  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------------


def fetch(packages: list[str], folder: Path) -> dict[str, dict[str, Any]]:
    """Download and unpack the packages; return their versions and hashes."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for package in packages:
        debs = sorted(folder.glob(f"{package}_*.deb"))
        if not debs:
            subprocess.run(["apt-get", "download", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
            debs = sorted(folder.glob(f"{package}_*.deb"))
        subprocess.run(["dpkg-deb", "-x", debs[-1], folder / package], check=True)
        version = subprocess.run(["dpkg-deb", "-f", debs[-1], "Version"], check=True, capture_output=True, text=True).stdout.strip()
        found[package] = {"version": version, "deb_bytes": debs[-1].stat().st_size, "deb_sha256": sha256_file(debs[-1])}
    return found


def clean(text: str) -> str:
    """Normalize line ends and trailing blanks; never let the end-of-text mark occur inside a document."""
    text = text.replace("\r\n", "\n").replace(EOT, "").expandtabs(8)
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def cut(text: str) -> list[str]:
    """Cut a document into pieces of about PIECE_CHARS characters, at blank lines, else at line ends."""
    pieces, start = [], 0
    while len(text) - start > PIECE_CHARS * 4 // 3:
        window = text[start : start + PIECE_CHARS]
        for mark in ("\n\n", "\n"):
            end = window.rfind(mark, PIECE_CHARS // 3)
            if end >= 0:
                end += len(mark)
                break
        else:
            end = PIECE_CHARS
        pieces.append(text[start : start + end].strip("\n") + "\n")
        start += end
    pieces.append(text[start:].strip("\n") + "\n")
    return [piece for piece in pieces if len(piece) > 100]


def in_eval(domain: str, document: str) -> bool:
    """The split rule: a document, whole, is in the evaluation split by the hash of its name."""
    return int(hashlib.sha256(f"{domain}/{document}".encode()).hexdigest()[:8], 16) % 1000 < EVAL_PER_MILLE


def take_bytes(pieces: list[tuple[str, str]], limit: int) -> list[tuple[str, str]]:
    """The first pieces up to about ``limit`` bytes."""
    taken, size = [], 0
    for piece in pieces:
        if size >= limit:
            break
        taken.append(piece)
        size += len(piece[1].encode())
    return taken


def without_links(text: str) -> str:
    """The text without lines that are link targets of reStructuredText (`.. _name: https://…`): addresses are no prose."""
    return re.sub(r"^\.\. _[^\n]*: https?://[^\n]*\n", "", text, flags=re.MULTILINE)


def train_tokenizer(texts: list[str], folder: Path) -> Any:
    """Train the byte-level BPE tokenizer and save it for ``AutoTokenizer``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=[EOT], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOT, bos_token=EOT, clean_up_tokenization_spaces=False, model_max_length=1024
    )
    fast.save_pretrained(folder)
    # The class name that transformers 4 and 5 both know.
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    write_json(folder / "tokenizer_config.json", config | {"tokenizer_class": "PreTrainedTokenizerFast"})
    return tokenizer


def main() -> None:
    """Fetch, split, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--debs", type=Path, default=WORK / "debs", help="folder for the downloaded packages")
    parser.add_argument("--seed", type=int, default=20240)
    args = parser.parse_args()
    out = DATA / "text"
    out.mkdir(parents=True, exist_ok=True)

    packages = [package for source in SOURCES for package in source.packages]
    versions = fetch(packages, args.debs)
    train: list[tuple[str, str]] = []
    calib: list[tuple[str, str]] = []
    held: list[tuple[str, str]] = []
    report: list[dict[str, Any]] = []
    notices: dict[str, list[str]] = {}
    for source in SOURCES:
        documents = [(name, clean(text)) for name, text in source.reader(args.debs)]
        random.Random(f"{args.seed}/{source.domain}").shuffle(documents)
        splits: dict[bool, list[tuple[str, str]]] = {False: [], True: []}
        listing = []
        for name, text in documents:
            listing.append(f"{name} {sha256_bytes(text.encode())}")
            splits[in_eval(source.domain, name)] += [(name, piece) for piece in cut(text)]
        mine_train = take_bytes(splits[False], TRAIN_BYTES_PER_DOMAIN)
        for pieces in (mine_train, splits[True]):
            random.Random(f"{args.seed}/{source.domain}/pieces").shuffle(pieces)
        mine_calib = take_bytes(mine_train, CALIB_BYTES_PER_DOMAIN)
        mine_eval = take_bytes(splits[True], EVAL_BYTES_PER_DOMAIN)
        if {name for name, _ in mine_eval} & {name for name, _ in mine_train}:
            raise AssertionError("a document is in both splits")
        train += mine_train
        calib += mine_calib
        held += mine_eval
        (out / f"eval_{source.domain}.txt").write_text(EOT.join(p for _, p in take_bytes(mine_eval, EVAL_FILE_BYTES)), "utf-8")
        report.append(
            {
                "domain": source.domain,
                "licence": source.licence,
                "packages": {package: versions[package] for package in source.packages},
                "reader": f"{source.reader.__name__}: {(source.reader.__doc__ or '').strip()}",
                "documents": len(documents),
                "bytes": sum(len(text.encode()) for _, text in documents),
                "sha256_of_documents": sha256_bytes("\n".join(sorted(listing)).encode()),
                "train": {"documents": len({n for n, _ in mine_train}), "bytes": sum(len(p.encode()) for _, p in mine_train)},
                "calib": {"documents": len({n for n, _ in mine_calib}), "bytes": sum(len(p.encode()) for _, p in mine_calib)},
                "eval": {"documents": len({n for n, _ in mine_eval}), "bytes": sum(len(p.encode()) for _, p in mine_eval)},
            }
        )
        notice = args.debs / source.copyright_of / "usr/share/doc" / source.copyright_of / "copyright"
        notices.setdefault(notice.read_text("utf-8", errors="replace"), []).append(f"{source.domain} ({source.copyright_of})")
    for name, pieces in (("train", train), ("calib", calib), ("eval", held)):
        random.Random(f"{args.seed}/{name}").shuffle(pieces)
    texts = {name: EOT.join(p for _, p in pieces) for name, pieces in (("train", train), ("calib", calib), ("eval", held))}
    texts["calib"] = without_links(texts["calib"])
    (out / "calib.txt").write_text(texts["calib"], "utf-8")
    (out / "eval.txt").write_text(texts["eval"], "utf-8")
    (WORK / "train.txt").write_text(texts["train"], "utf-8")
    rule = "=" * 78
    (out / "NOTICE.txt").write_text(
        "\n".join(f"{rule}\nCopyright file of: {', '.join(names)}\n{rule}\n\n{text}" for text, names in notices.items()), "utf-8"
    )

    tokenizer = train_tokenizer([p for _, p in train], out)
    streams = {name: np.array(tokenizer.encode(text).ids, dtype=np.uint16) for name, text in texts.items()}
    for name, stream in streams.items():
        np.save(WORK / f"{name}.npy", stream)
    shipped = sorted(p for p in out.iterdir() if p.suffix == ".txt" or p.name == "tokenizer.json")
    write_json(
        out / "SOURCES.json",
        {
            "about": "Text of the zoo: where it comes from, under which licences, and how it was split. Built by tools/zoo/make_text.py.",
            "seed": args.seed,
            "separator": EOT,
            "split_rule": (
                f"by document: int(sha256(domain + '/' + document id).hexdigest()[:8], 16) % 1000 < {EVAL_PER_MILLE} is evaluation, "
                "all others are train; calibration pieces are part of train; evaluation documents are in neither. Documents are cut "
                f"into pieces of about {PIECE_CHARS} characters after the split; the pieces are shuffled and joined by the separator."
            ),
            "tokenizer": {"kind": "byte-level BPE", "vocabulary": VOCAB_SIZE, "trained_on": "train split"},
            "tokens": {name: len(stream) for name, stream in streams.items()},
            "bytes": {name: len(text.encode()) for name, text in texts.items()},
            "train_sha256": sha256_bytes(texts["train"].encode()),
            "files": {p.name: {"bytes": p.stat().st_size, "sha256": sha256_file(p)} for p in shipped},
            "sources": report,
        },
    )
    for name, stream in streams.items():
        print(name, len(texts[name].encode()), "bytes", len(stream), "tokens")


if __name__ == "__main__":
    main()
