"""Metrics against naive formulas, and their laws."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from qcore.evaluation.metrics import Distance, Mean, kl_rows, nll_rows, perplexity, same_top1


def logits(seed: int, rows: int = 7, classes: int = 33, spread: float = 4.0) -> torch.Tensor:
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed)) * spread


def naive_kl(r: torch.Tensor, c: torch.Tensor) -> list[float]:
    out = []
    for row_r, row_c in zip(r.double().tolist(), c.double().tolist(), strict=True):
        zr, zc = sum(math.exp(v) for v in row_r), sum(math.exp(v) for v in row_c)
        out.append(sum(math.exp(a) / zr * (math.log(math.exp(a) / zr) - math.log(math.exp(b) / zc)) for a, b in zip(row_r, row_c, strict=True)))
    return out


def test_kl_is_the_naive_formula() -> None:
    r, c = logits(0), logits(1)
    assert kl_rows(r, c).tolist() == pytest.approx(naive_kl(r, c), rel=1e-12)


@given(st.integers(0, 10_000), st.floats(0.01, 50), st.floats(-100, 100))
def test_kl_is_not_negative_is_zero_for_equals_and_ignores_shifts(seed: int, spread: float, shift: float) -> None:
    r, c = logits(seed, spread=spread), logits(seed + 1, spread=spread)
    assert (kl_rows(r, c) >= -1e-12).all()  # float64 rounding over 33 terms
    assert (kl_rows(r, r) == 0).all()
    assert torch.allclose(kl_rows(r, r.double() + shift), torch.zeros(7, dtype=torch.float64), atol=1e-10)


def test_kl_counts_what_the_reference_rules_out_as_nothing() -> None:
    r = torch.tensor([[0.0, 1.0, -torch.inf]])
    assert torch.isfinite(kl_rows(r, torch.zeros(1, 3))).all()


def test_nll_and_perplexity_are_the_naive_formulas() -> None:
    x, targets = logits(2), torch.arange(7)
    naive = [-math.log(math.exp(row[t]) / sum(map(math.exp, row))) for row, t in zip(x.double().tolist(), range(7), strict=True)]
    assert nll_rows(x, targets).tolist() == pytest.approx(naive, rel=1e-12)
    assert perplexity(math.log(12.5)) == pytest.approx(12.5) and perplexity(1e6) == math.inf


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary() -> None:
    assert perplexity(float(nll_rows(torch.zeros(5, 64), torch.arange(5)).mean())) == pytest.approx(64)


def test_mean_has_the_standard_error_of_the_window_means() -> None:
    mean = Mean()
    for window in ([1.0, 3.0], [4.0, 4.0], [6.0, 0.0]):
        mean.add(torch.tensor(window))
    assert mean.mean == pytest.approx(3.0) and mean.rows == 6
    # window means 2, 4, 3: deviation 1, over sqrt(3)
    assert mean.standard_error == pytest.approx(1 / math.sqrt(3))
    single = Mean()
    single.add(torch.ones(4))
    assert math.isnan(single.standard_error)


def test_distance_does_not_depend_on_how_rows_are_chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    r, c, t = logits(3), logits(4), torch.arange(7)
    whole = Distance()
    whole.add(r, c, t)
    monkeypatch.setattr("qcore.evaluation.metrics._CHUNK_BYTES", 8 * 33 * 2)
    pieces = Distance()
    pieces.add(r, c, t)
    for name in ("kl", "top1", "nll", "nll_reference", "hits"):
        assert getattr(pieces, name).mean == pytest.approx(getattr(whole, name).mean, rel=1e-12)
    assert pieces.sqnr_db == pytest.approx(whole.sqnr_db, rel=1e-12)


def test_sqnr_of_a_tenth_of_noise_is_twenty_decibel() -> None:
    r = logits(5)
    d = Distance()
    d.add(r.double(), r.double() * 1.1)
    assert d.sqnr_db == pytest.approx(20.0)
    same = Distance()
    same.add(r, r)
    assert same.sqnr_db == math.inf and same.top1.mean == 1


def test_top1_counts_rows_that_agree() -> None:
    r = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert same_top1(r, torch.tensor([[0.0, 2.0], [0.0, 2.0]])).tolist() == [True, False]
