"""Pools from files, and what is said where a file is broken."""

import json

import numpy as np
import pytest
from qcore.errors import CalibrationError, NotFound, SpecError
from qplug_subsa.pool import read_pool

RECORDS = [{"id": "x", "text": 'a, "b"\nc', "label": "1"}, {"id": "y", "text": "zwölf", "label": "2"}]


def write(path, kind):
    import csv

    if kind in ("csv", "tsv"):
        with path.open("w", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, ["id", "text", "label"], delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(RECORDS)
    elif kind == "parquet":
        pa = pytest.importorskip("pyarrow")

        pytest.importorskip("pyarrow.parquet").write_table(pa.Table.from_pylist(RECORDS), path)
    else:
        path.write_text("\ufeff" + "\n\n".join(json.dumps(r) for r in RECORDS), encoding="utf-8")


@pytest.mark.parametrize("kind", ["jsonl", "ndjson", "csv", "tsv", "parquet"])
def test_every_format_gives_the_same_pool(kind, tmp_path):
    write(tmp_path / f"p.{kind}", kind)
    pool = read_pool(tmp_path / f"p.{kind}")
    assert list(pool.records) == RECORDS
    assert list(pool.texts) == ['a, "b"\nc', "zwölf"] and list(pool.ids) == ["x", "y"]


def test_fields_are_joined_and_ids_fall_back_to_positions(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"premise": "it rains", "hypothesis": "wet"}\n{"premise": "sun", "hypothesis": "dry"}\n')
    pool = read_pool(file, ("premise", "hypothesis"))
    assert pool.texts[0] == "it rains\nwet" and list(pool.ids) == ["0", "1"]
    assert list(read_pool(file, ("premise",), "hypothesis").ids) == ["wet", "dry"]
    file.write_text('"bare strings"\n"are texts"\n"are texts"\n')
    assert list(read_pool(file).texts) == ["bare strings", "are texts", "are texts"] and read_pool(file).copies == 1


def test_embeddings_alone_are_a_pool(tmp_path):
    np.save(tmp_path / "e.npy", np.zeros((7, 3), np.float32))
    pool = read_pool(tmp_path / "e.npy")
    assert len(pool) == 7 and pool.records[6] == {"index": 6} and pool.ids[-1] == "6" and not pool.texts and pool.copies == 0
    with pytest.raises(IndexError):
        pool.records[7]


BROKEN = [
    ("a.jsonl", '{"text": "a"}\n{"text": "b"\n', "line 2: no JSON"),
    ("a.jsonl", '{"text": "a"}\n\n[1, 2]\n', "line 3: .* is no JSON object"),
    ("a.jsonl", '{"text": "a"}\n{"txt": "b"}\n', "line 2: there is no field 'text'; did you mean 'txt'"),
    ("a.jsonl", '{"text": "a"}\n{"text": "  "}\n', "line 2: 'text' is empty"),
    ("a.jsonl", '{"text": 5}\n', "line 1: 'text' is 5, not a text"),
    ("a.jsonl", '{"text": null}\n', "line 1: 'text' is null"),
    ("a.jsonl", '{"id": 1, "text": "a"}\n{"id": 2, "text": "b"}\n{"id": 1, "text": "c"}\n', "line 3: the id '1' is that of line 1"),
    ("a.jsonl", '{"id": 1, "text": "a"}\n{"text": "b"}\n', "line 2: there is no field 'id'"),
    ("a.jsonl", "\n", "holds no texts"),
    ("a.csv", "id,text\n1,a\n2,b,c\n", "line 3: 3 fields, the first line has 2"),
    ("a.csv", "id,text\n1,a\n2\n", "line 3: 1 fields, the first line has 2"),
    ("a.csv", 'id,text\n1,"a" b\n', "line 2"),
    ("a.csv", "id,text\n1,\n", "line 2: 'text' is empty"),
    ("a.csv", "", "holds no texts"),
]


@pytest.mark.parametrize(("name", "text", "message"), BROKEN, ids=lambda v: str(v)[:30])
def test_a_broken_file_is_named_with_its_line(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(CalibrationError, match=message) as caught:
        read_pool(tmp_path / name)
    assert name in str(caught.value)


def test_what_is_no_text_file_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(CalibrationError, match="line 2: no UTF-8"):
        read_pool(tmp_path / "a.jsonl")
    for name, kind in (("gone.jsonl", NotFound), ("a.docx", SpecError)):
        (tmp_path / "a.docx").touch()
        with pytest.raises(kind):
            read_pool(tmp_path / name)
    with pytest.raises(NotFound, match="is a folder"):
        read_pool(tmp_path)
    np.save(tmp_path / "o.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(CalibrationError):
        read_pool(tmp_path / "o.npy")
    np.save(tmp_path / "none.npy", np.zeros((0, 3)))
    with pytest.raises(CalibrationError, match="no embeddings"):
        read_pool(tmp_path / "none.npy")


def test_a_broken_parquet_file_is_named(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "p.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(CalibrationError, match=r"p\.parquet cannot be read"):
        read_pool(tmp_path / "p.parquet")
