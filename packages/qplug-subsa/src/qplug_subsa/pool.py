"""Pools of texts from files: JSONL, CSV, parquet, or embeddings alone (.npy).  Every error names the file and the line."""

import csv
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from qcore.errors import CalibrationError, NotFound, SpecError

FORMATS = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".npy")


@dataclass(frozen=True)
class Pool:
    """Texts in the order of their file.

    path:    where they come from
    records: every field of each text, as the file has it; {"index": i} where there are embeddings alone
    texts:   what is embedded, one for each record; empty where there are embeddings alone
    ids:     one for each record, all different
    places:  "line 7" or "row 7" of each record, for messages
    """

    path: Path
    records: Sequence[dict[str, Any]]
    texts: Sequence[str] = ()
    ids: Sequence[str] = ()
    places: Sequence[str] = field(default=(), repr=False)

    def __len__(self) -> int:
        return len(self.records)

    @property
    def copies(self) -> int:
        """How many texts stand in the pool already, word for word."""
        return len(self.texts) - len(set(self.texts))


def read_pool(path: Path, text_fields: Sequence[str] = ("text",), id_field: str | None = None) -> Pool:
    """The pool in a file, known by its suffix.

    text_fields: the fields that are embedded, joined by line ends
    id_field:    names each text; None: the field "id" where the first record has one, else the position

    NotFound for a file that is not there; CalibrationError, with the line, for broken records, missing or empty texts and ids that occur twice.
    """
    path = Path(path)
    if not path.is_file():
        raise NotFound(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}; pass a file that ends with {', '.join(FORMATS)}")
    kind = path.suffix.lower()
    if kind == ".npy":
        return _embeddings_alone(path)
    readers = {".jsonl": _jsonl, ".ndjson": _jsonl, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}
    if kind not in readers:
        raise SpecError(f"{path} ends with {kind or 'no suffix'}, which is not known here; pass one of {', '.join(FORMATS)}")
    places: list[str] = []
    records: list[dict[str, Any]] = []
    texts: list[str] = []
    ids: list[str] = []
    seen: dict[str, str] = {}
    for place, record in readers[kind](path):
        where = f"{path}, {place}"
        if id_field is None and not records:
            id_field = "id" if "id" in record else ""
        text = "\n".join(_text(record, name, where) for name in text_fields)
        name = str(_field(record, id_field, where)) if id_field else str(len(records))
        if name in seen:
            raise CalibrationError(f"{where}: the id {name!r} is that of {seen[name]} too; give every text an id of its own")
        seen[name] = place
        places.append(place)
        records.append(record)
        texts.append(text)
        ids.append(name)
    if not records:
        raise CalibrationError(f"{path} holds no texts")
    return Pool(path, records, texts, ids, places)


def _embeddings_alone(path: Path) -> Pool:
    from qplug_subsa.rows import NpyRows

    n = NpyRows(path).shape[0]
    if n == 0:
        raise CalibrationError(f"{path} holds no embeddings")
    return Pool(path, _Numbered(n), (), _Ids(n), _Places(n))


class _Numbered(Sequence[Any]):
    """What stands for the records of n embeddings, without n objects."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(self.n))]
        if not -self.n <= i < self.n:
            raise IndexError(i)
        return self.made(i % self.n)

    def made(self, i: int) -> Any:
        return {"index": i}


class _Ids(_Numbered):
    def made(self, i: int) -> Any:
        return str(i)


class _Places(_Numbered):
    def made(self, i: int) -> Any:
        return f"row {i}"


def _field(record: dict[str, Any], name: str, where: str) -> Any:
    if name not in record:
        near = get_close_matches(name, record, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise CalibrationError(
            f"{where}: there is no field {name!r}{hint}; it has {', '.join(map(repr, record)) or 'none'} (--text-field, --id-field)"
        )
    return record[name]


def _text(record: dict[str, Any], name: str, where: str) -> str:
    value = _field(record, name, where)
    if not isinstance(value, str):
        raise CalibrationError(f"{where}: {name!r} is {_short(value)}, not a text; choose another field with --text-field")
    if not value.strip():
        raise CalibrationError(f"{where}: {name!r} is empty; leave the record out, or give it a text")
    return value


def _short(value: Any) -> str:
    shown = json.dumps(value, default=str)
    return shown if len(shown) <= 40 else shown[:37] + "..."


def _jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as e:
            raise CalibrationError(f"{path}, line {number}: no JSON ({e}); the line begins {line.strip()[:40]!r}") from None
        if isinstance(record, str):
            record = {"text": record}
        if not isinstance(record, dict):
            raise CalibrationError(f'{path}, line {number}: {_short(record)} is no JSON object; each line is one, such as {{"text": "…"}}')
        yield f"line {number}", record


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines of a UTF-8 file, from 1, ends kept."""
    with path.open("rb") as f:
        for number, raw in enumerate(f, 1):
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as e:
                raise CalibrationError(f"{path}, line {number}: no UTF-8 text (byte {e.start}: {e.reason}); convert the file") from None


def _csv(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(sys.maxsize)
    read = 0

    def lines() -> Iterator[str]:
        nonlocal read
        for read, line in _lines(path):  # noqa: B007
            yield line

    reader = csv.DictReader(lines(), delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
    while True:
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as e:
            raise CalibrationError(f"{path}, line {read}: {e}") from None
        # DictReader puts fields without a heading under None, and None in place of missing ones
        spare = record.pop(None, None)
        if spare is not None or None in record.values():
            count = len(record) + len(spare or ()) - sum(v is None for v in record.values())
            raise CalibrationError(
                f"{path}, line {reader.line_num}: {count} fields, the first line has {len(reader.fieldnames or ())}; quote what holds a comma"
            )
        yield f"line {reader.line_num}", record


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise NotFound(f"{path}: parquet files are read with pyarrow, which is not installed: pip install 'qplug-subsa[parquet]'") from None
    from pyarrow import ArrowException

    try:
        number = 0
        for batch in parquet.ParquetFile(path).iter_batches():
            for record in batch.to_pylist():
                yield f"row {number}", record
                number += 1
    except (ArrowException, OSError) as e:
        raise CalibrationError(f"{path} cannot be read as parquet: {str(e).splitlines()[0]}") from e
