"""Tasks: what a stored reference gives back, and what is compared on it."""

import math
from pathlib import Path

import pytest
import torch
from qcore.errors import QcoreError
from qcore.evaluation import Agreement, Candidate, LanguageModeling, compare
from qcore.evaluation.metrics import kl_rows, nll_rows
from qcore.evaluation.store import Reference, write_reference

V = 40
TABLE = torch.randn(V, V, generator=torch.Generator().manual_seed(0)) * 3
WINDOWS = torch.randint(0, V, (5, 9), generator=torch.Generator().manual_seed(1))


def bigram(table: torch.Tensor):
    return lambda batch: table[batch["input_ids"]]


def noisy(scale: float = 0.1) -> torch.Tensor:
    return TABLE + torch.randn(V, V, generator=torch.Generator().manual_seed(2)) * scale


def test_a_model_against_itself_is_at_distance_zero(tmp_path: Path) -> None:
    task = LanguageModeling(WINDOWS)
    scores = task.evaluate(bigram(TABLE), task.reference(bigram(TABLE), tmp_path))
    assert scores["kl"] == 0 and scores["top1"] == 1 and scores["perplexity"] == scores["perplexity_reference"]
    assert scores["tokens"] == 5 * 8 and scores["windows"] == 5


def test_scores_are_the_naive_formulas_over_positions_with_a_next_token(tmp_path: Path) -> None:
    task, other = LanguageModeling(WINDOWS, batch=2), noisy()
    scores = task.evaluate(bigram(other), task.reference(bigram(TABLE), tmp_path))
    r, c, t = TABLE[WINDOWS[:, :-1]].flatten(0, 1), other[WINDOWS[:, :-1]].flatten(0, 1), WINDOWS[:, 1:].flatten()
    assert scores["kl"] == pytest.approx(float(kl_rows(r, c).mean()), rel=1e-12)
    assert scores["perplexity"] == pytest.approx(math.exp(float(nll_rows(c, t).mean())), rel=1e-12)
    assert scores["top1"] == pytest.approx(float((r.argmax(-1) == c.argmax(-1)).double().mean()))


def test_half_precision_of_the_reference_costs_little_and_is_named(tmp_path: Path) -> None:
    exact, half = LanguageModeling(WINDOWS), LanguageModeling(WINDOWS, largest=100)
    kept = half.reference(bigram(TABLE), tmp_path / "half")
    assert kept.precision == "float16" and Reference.open(tmp_path / "half") == kept
    full = exact.evaluate(bigram(noisy()), exact.reference(bigram(TABLE), tmp_path / "full"))
    short = half.evaluate(bigram(noisy()), kept)
    assert short["kl"] == pytest.approx(full["kl"], rel=0.05)  # log-probabilities rounded to 11 bits
    assert half.evaluate(bigram(TABLE), kept)["kl"] < 1e-6


def test_a_reference_of_other_data_is_refused(tmp_path: Path) -> None:
    kept = LanguageModeling(WINDOWS).reference(bigram(TABLE), tmp_path)
    with pytest.raises(QcoreError, match=r"is of other data \([0-9a-f]{12}…, this task has [0-9a-f]{12}…\); make it anew"):
        LanguageModeling((WINDOWS + 1) % V).evaluate(bigram(TABLE), kept)


def test_a_model_that_gives_nan_is_named_with_its_window(tmp_path: Path) -> None:
    task = LanguageModeling(WINDOWS)
    kept = task.reference(bigram(TABLE), tmp_path)
    with pytest.raises(QcoreError, match=r"NaN or infinite in window 0; try"):
        task.evaluate(bigram(TABLE * torch.nan), kept)
    with pytest.raises(QcoreError, match="float model's output is NaN"):
        task.reference(bigram(TABLE * torch.nan), tmp_path)
    with pytest.raises(QcoreError, match="gives 39 classes, its float reference 40"):
        task.evaluate(bigram(TABLE[:, :-1]), kept)


def test_reading_a_stretch_gives_what_was_written(tmp_path: Path) -> None:
    rows = torch.randn(10, 6)
    kept = write_reference(tmp_path, rows.split(3), 10, "x")
    assert torch.equal(kept.read(2, 9), rows[2:9])


def test_progress_counts_windows(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    LanguageModeling(WINDOWS).reference(bigram(TABLE), tmp_path, lambda *a: seen.append(a))
    assert seen == [("float model", i, 5) for i in range(1, 6)]


def test_agreement_of_a_classifier_with_labels(tmp_path: Path) -> None:
    model = torch.nn.Linear(4, 3)
    batches = list(torch.randn(4, 5, 4).unbind())
    labels = [model(b).argmax(-1) for b in batches]
    task = Agreement(batches, labels)
    kept = task.reference(model, tmp_path)
    same = task.evaluate(model, kept)
    assert same["kl"] == 0 and same["top1"] == 1 and same["sqnr_db"] == math.inf and same["accuracy"] == 1 and same["rows"] == 20
    worse = task.evaluate(lambda b: model(b) * 1.1, kept)
    assert worse["kl"] > 0 and worse["top1"] == 1 and worse["sqnr_db"] == pytest.approx(20, abs=1e-3)  # float32 outputs
    assert "accuracy" not in Agreement(batches).evaluate(model, Agreement(batches).reference(model, tmp_path))


def test_compare_measures_all_against_the_first_one_at_a_time(tmp_path: Path) -> None:
    alive: list[str] = []

    def make(name: str, table: torch.Tensor):
        def candidate() -> Candidate:
            alive.append(name)
            return Candidate(name, bigram(table), bytes=8)

        return candidate

    rows = compare([make("float", TABLE), make("near", noisy(0.05)), make("far", noisy(0.5))], LanguageModeling(WINDOWS), tmp_path)
    assert [r.name for r in rows] == alive == ["float", "near", "far"]
    assert rows[0].scores["kl"] == 0 < rows[1].scores["kl"] < rows[2].scores["kl"]
