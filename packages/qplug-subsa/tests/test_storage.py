"""Stored forms of embeddings: round trips, sizes, and recall."""

import numpy as np
import pytest
import torch
from qcore.errors import CalibrationError, SpecError
from qplug_subsa.storage import FORMS, PCA, Binary, Float8, Int8, recall


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    """2,000 unit vectors of 64 dimensions around 30 centres."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(30, 64))[rng.integers(0, 30, 2000)] + 0.8 * rng.normal(size=(2000, 64)) + 0.2
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def recall_at_10(form, vectors):
    fitted = form.fit(vectors)
    queries = vectors[:200] + 0.02 * np.random.default_rng(1).normal(size=(200, 64)).astype(np.float32)
    exact = FORMS["float32"].fit(vectors).similarities(queries, vectors)
    return recall(fitted.similarities(queries, fitted.encode(vectors)), exact, 10)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_row_has_the_bytes_it_says(form, vectors):
    fitted = form.fit(vectors)
    stored = fitted.encode(vectors)
    assert stored.shape[0] == 2000 and stored[0].nbytes == form.nbytes(64) == fitted.nbytes(64)
    assert np.array_equal(fitted.encode(vectors), stored)
    assert np.array_equal(fitted.encode(vectors[100:103]), stored[100:103])


@pytest.mark.parametrize("name", ["float32", "float8-e4m3", "float8-e4m3-sqrt-d", "float8-e4m3-per-dim", "float8-e5m2", "int8"])
def test_what_is_decoded_encodes_to_itself(name, vectors):
    form = FORMS[name].fit(vectors)
    stored = form.encode(vectors)
    assert np.array_equal(form.encode(form.decode(stored)), stored)


def test_errors_are_those_of_the_grids(vectors):
    int8 = Int8("int8").fit(vectors)
    off = np.abs(int8.decode(int8.encode(vectors)) - vectors)
    assert (off <= int8.step / 2 * 1.001).all()
    for kind, share in (("e4m3", 2**-4), ("e5m2", 2**-3)):
        form = Float8("float8", kind, "dim").fit(vectors)
        off = np.abs(form.decode(form.encode(vectors)) - vectors)
        smallest = float(torch.finfo(form._dtype).smallest_normal) / 8  # √64
        assert (off <= np.maximum(np.abs(vectors), smallest) * share * 1.001).all()


def test_values_outside_the_collections_range_are_clamped(vectors):
    int8 = Int8("int8").fit(vectors)
    far = int8.decode(int8.encode(vectors[:1] * 100))
    assert (far <= vectors.max(0) + 1e-5).all() and (far >= vectors.min(0) - 1e-5).all()
    e4m3 = Float8("float8").fit(vectors)
    assert np.isfinite(e4m3.decode(e4m3.encode(vectors[:1] * 1e9))).all()


def test_recall_falls_with_bytes_and_whole_vectors_lose_nothing(vectors):
    found = {name: recall_at_10(form, vectors) for name, form in FORMS.items()}
    assert found["float32"] == 1.0
    assert recall_at_10(PCA("all", share=1.0), vectors) > 0.999
    for name in ("float8-e4m3", "float8-e4m3-sqrt-d", "float8-e4m3-per-dim", "int8"):
        assert found[name] > 0.9
    assert found["float8-e5m2"] < found["float8-e4m3"]  # two bits of mantissa against three
    assert found["pca25-int8"] < found["pca50-int8"] <= found["pca50"] + 0.01
    assert max(found["binary"], found["binary-centred"]) < found["float8-e5m2"]
    assert abs(found["pca50-float8"] - found["pca50"]) < 0.06


def test_a_pca_of_vectors_in_a_plane_keeps_them(vectors):
    low = vectors[:, :8] @ np.random.default_rng(3).normal(size=(8, 64)).astype(np.float32)
    assert recall_at_10(PCA("pca", share=8 / 64), low) > 0.999


def test_binary_keeps_signs(vectors):
    form = Binary("binary").fit(vectors)
    assert np.array_equal(form.decode(form.encode(vectors)) > 0, vectors > 0)
    odd = Binary("binary", centre=True).fit(vectors[:, :13])
    assert odd.encode(vectors[:, :13]).shape == (2000, 2) and odd.decode(odd.encode(vectors[:, :13])).shape == (2000, 13)


def test_recall_counts_shared_neighbours():
    exact = np.array([[4.0, 3, 2, 1]])
    assert recall(exact, exact, 2) == 1.0
    assert recall(np.array([[1.0, 4, 3, 2]]), exact, 2) == 0.5
    assert recall(-exact, exact, 2) == 0.0


def test_what_cannot_be_fitted_is_refused():
    for form in FORMS.values():
        with pytest.raises(CalibrationError, match="finite"):
            form.fit(np.full((3, 8), np.nan, np.float32))
    with pytest.raises(SpecError):
        Float8("x", "e3m4")
    with pytest.raises(SpecError):
        PCA("x", share=0)
