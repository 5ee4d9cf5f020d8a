"""Traces from files: what is right is read, what is damaged is refused with a word about it."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qcore.errors import CalibrationError, NotFound, QcoreError, SpecError
from qplug_hardware.nvr.files import read_trace, save_trace
from qplug_hardware.nvr.synth import short_rows, two_level


@pytest.mark.parametrize("trace", [two_level(20, 30), short_rows(20, 30)], ids=lambda t: t.name)
def test_a_saved_trace_comes_back(tmp_path, trace):
    save_trace(tmp_path / "t.npz", trace)
    back = read_trace(tmp_path / "t.npz")
    assert back.summary() == trace.summary() and back.name == trace.name
    assert np.array_equal(back.targets, trace.targets) and np.array_equal(back.loops, trace.loops)
    assert (back.index_bytes, back.value_bytes) == (trace.index_bytes, trace.value_bytes)
    assert read_trace(tmp_path / "t.npz", row_bytes=32).row_bytes == 32


def test_the_forms_of_scipy(tmp_path):
    sparse = pytest.importorskip("scipy.sparse")
    a = sparse.random(12, 9, density=0.3, random_state=0, format="csr")
    sparse.save_npz(tmp_path / "a.npz", a)
    trace = read_trace(tmp_path / "a.npz")
    assert trace.targets.tolist() == a.indices.tolist() and trace.rows == 9 and trace.row_bytes == 128
    sparse.save_npz(tmp_path / "c.npz", a.tocsc())
    assert read_trace(tmp_path / "c.npz").targets.tolist() == a.tocsc().indices.tolist()
    sparse.save_npz(tmp_path / "o.npz", a.tocoo())
    with pytest.raises((SpecError, CalibrationError), match=r"o\.npz"):
        read_trace(tmp_path / "o.npz")


def test_plain_arrays(tmp_path):
    np.savez(tmp_path / "p.npz", row_ptr=[0, 2, 2, 3], col_idx=[4, 0, 1])
    trace = read_trace(tmp_path / "p.npz", row_bytes=64)
    assert trace.targets.tolist() == [4, 0, 1] and trace.rows == 5 and trace.loops.tolist() == [[0, 2], [2, 3]]


MTX = "%%MatrixMarket matrix coordinate real general\n% a comment\n3 4 4\n3 1 0.5\n1 2 1e3\n1 1 -2\n3 4 1\n"


def test_matrix_market(tmp_path):
    (tmp_path / "m.mtx").write_text(MTX)
    trace = read_trace(tmp_path / "m.mtx")
    assert trace.targets.tolist() == [0, 1, 0, 3] and trace.rows == 4 and trace.loops.tolist() == [[0, 2], [2, 4]]
    (tmp_path / "s.mtx").write_text("%%MatrixMarket matrix coordinate pattern symmetric\n3 3 3\n1 1\n2 1\n3 2\n")
    assert read_trace(tmp_path / "s.mtx").targets.tolist() == [0, 1, 0, 2, 1]


def test_lists_of_rows(tmp_path):
    (tmp_path / "l.csv").write_text("5, 1,2\n\n0\n")
    trace = read_trace(tmp_path / "l.csv")
    assert trace.targets.tolist() == [5, 1, 2, 0] and trace.rows == 6 and trace.loops.tolist() == [[0, 3], [3, 4]]


WRONG = [
    ("m.mtx", "", CalibrationError, "line 1: no Matrix Market header"),
    ("m.mtx", MTX.replace("coordinate", "array"), SpecError, "array"),
    ("m.mtx", MTX.replace("3 4 4", "3 4 5"), CalibrationError, "4 entries, its header promises 5"),
    ("m.mtx", MTX.replace("3 4 4", "2 4 4"), SpecError, r"line 4: entry \(3, 1\); allowed: \(1, 1\) to \(2, 4\)"),
    ("m.mtx", MTX.replace("3 1 0.5", "3"), CalibrationError, "line 4: 1 numbers; wanted 2"),
    ("m.mtx", MTX.replace("3 1 0.5", "-3 1 1"), CalibrationError, "line 4: '-3' is no whole number"),
    ("m.mtx", MTX.splitlines()[0], CalibrationError, "no line with the numbers"),
    ("l.csv", "1,2\n3,x\n", CalibrationError, "line 2: 'x'"),
    ("l.csv", "1,,2\n", CalibrationError, "line 1: ''"),
    ("l.csv", "1_0\n", CalibrationError, "'1_0'"),
    ("l.csv", "9" * 30, CalibrationError, "no whole number"),
    ("l.csv", "\n\n", CalibrationError, "no numbers"),
    ("l.txt", "1", SpecError, "ends with .txt"),
    ("t.npz", "not a zip", CalibrationError, "cannot be read"),
]


@pytest.mark.parametrize(("name", "text", "error", "message"), WRONG, ids=lambda v: str(v)[:24])
def test_damaged_texts_are_refused_by_line(tmp_path, name, text, error, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(error, match=message) as caught:
        read_trace(tmp_path / name)
    assert name in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(NotFound, match="does not exist"):
        read_trace(tmp_path / "no.npz")
    with pytest.raises(NotFound, match="is a folder"):
        read_trace(tmp_path)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"row_ptr": np.array([0, 5]), "col_idx": np.array([1])}, "allowed: from 0 to 1"),
        ({"row_ptr": np.array([0, 1]), "col_idx": np.array([1.5])}, "float64"),
        ({"row_ptr": np.array([0, 1]), "col_idx": np.array([[1]])}, "shape"),
        ({"row_ptr": np.array([0, 1]), "col_idx": np.array([-4])}, "is -4"),
        ({"row_ptr": np.array([0, 1]), "col_idx": np.array([3]), "columns": np.array(2)}, "allowed: 0 to 1"),
        ({"other": np.array([1])}, "it holds other"),
        ({"indptr": [0, 1], "indices": [0], "format": "bsr", "shape": [1, 1]}, "bsr"),
        ({"indptr": [0, 1], "indices": [0], "format": "csr", "shape": [1.5, 1]}, "two integers"),
        ({"indices": [0], "rows": [1, 2], "bounds": [[0, 1]]}, "one integer"),
        ({"indices": [0], "rows": 1, "bounds": [[0, 1]], "row_bytes": 0}, "row_bytes is 0"),
    ],
    ids=lambda v: str(v)[:24],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "t.npz", **arrays)
    with pytest.raises(QcoreError, match=message):
        read_trace(tmp_path / "t.npz")


def test_pickled_objects_are_never_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    np.savez(tmp_path / "t.npz", row_ptr=np.array([0, 1]), col_idx=np.array([Trap()], object))
    with pytest.raises(CalibrationError, match="without pickled objects"):
        read_trace(tmp_path / "t.npz")
    assert not (tmp_path / "sprung").exists()


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    save_trace(folder / "t.npz", two_level(20, 30))
    (folder / "m.mtx").write_text(MTX)
    (folder / "l.csv").write_text("5,1,2\n\n0\n")
    return {p.suffix: p.read_bytes() for p in folder.iterdir()}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data(), suffix=st.sampled_from([".npz", ".mtx", ".csv"]))
def test_damage_is_an_error_of_ours_or_harmless(tmp_path, good, data, suffix):
    raw = bytearray(good[suffix])
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw
    path = tmp_path / f"damaged{suffix}"
    path.write_bytes(raw)
    try:
        trace = read_trace(path)
    except QcoreError as e:
        assert path.name in str(e)
    else:
        assert trace.gathers >= 1 and trace.targets.max() < trace.rows
