"""Which windows of a text are calibrated on."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from qcore.calibration.selectors import choose_windows, window_embeddings
from qcore.calibration.text import TextFile
from qcore.errors import CalibrationError, NotFound, SpecError
from qcore.plugins import load_registry
from qcore.plugins.shelf import Shelf
from qcore.recipe import CalibrationSettings
from qcore.recipe_file import dump, load_recipe, parse_recipe
from torch import Tensor


class Letters:
    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]


@dataclass(frozen=True)
class Last:
    """The last k."""

    name: ClassVar[str] = "last"
    skip: int = 0

    def select(self, embeddings: Tensor, k: int, scores: Tensor | None = None) -> Sequence[int]:
        return range(len(embeddings) - 1 - self.skip, len(embeddings) - 1 - self.skip - k, -1)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i:03}\n" for i in range(100)))  # 900 characters
    return path


def said(windows: Tensor) -> list[str]:
    return ["".join(map(chr, w)) for w in windows.tolist()]


def test_a_selector_takes_the_place_of_the_seed(text: Path) -> None:
    settings = CalibrationSettings(samples=3, length=9, select=Last(skip=1))
    assert said(TextFile(text).windows(Letters(), settings)) == ["line 098\n", "line 097\n", "line 096\n"]
    assert TextFile(text).batches(Letters(), replace(settings, batch=3, starts=2))[0]["input_ids"].shape == (3, 9)


def test_candidates_are_drawn_by_the_seed_and_stay_in_order(text: Path) -> None:
    def pool(seed: int, candidates: int = 10) -> list[str]:
        return said(TextFile(text).windows(Letters(), CalibrationSettings(samples=10, length=9, seed=seed, select=Last(), candidates=candidates)))

    assert pool(0) == sorted(pool(0), reverse=True) == pool(0) != pool(1)
    assert pool(0, candidates=3) == pool(0)  # never fewer than samples


def test_windows_of_like_words_are_near_each_other() -> None:
    def windows(words: range, seed: int) -> Tensor:
        made = torch.Generator().manual_seed(seed)
        return torch.randint(words.start, words.stop, (20, 64), generator=made)

    common = torch.arange(5).repeat(40, 2)  # tokens that all windows have say nothing
    both = torch.cat([torch.cat([windows(range(100, 200), 0), windows(range(300, 400), 1)]), common], 1)
    e = window_embeddings(both)
    assert e.shape == (40, 256) and torch.allclose(e.norm(dim=1), torch.ones(40))
    inside, across = (e[:20] @ e[:20].T)[~torch.eye(20, dtype=torch.bool)], e[:20] @ e[20:].T
    assert inside.mean() > 0.3 and across.abs().mean() < 1 / 16  # unrelated windows: the noise of 256 random directions
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(window_embeddings(both[order]), e[order], atol=1e-6)
    assert torch.equal(window_embeddings(both[:, torch.randperm(74)]), e)  # the order of tokens does not count
    assert not window_embeddings(torch.ones(3, 8, dtype=torch.long)).any()


@pytest.mark.parametrize("wrong", [[0, 0], [0], [0, 9], [0, -1]])
def test_a_selector_that_breaks_its_promise_is_named(wrong: list[int]) -> None:
    class Wrong(Last):
        def select(self, embeddings: Tensor, k: int, scores: Tensor | None = None) -> Sequence[int]:
            return wrong

    with pytest.raises(CalibrationError, match="selector 'last' was asked for 2 different windows of 9"):
        choose_windows(torch.arange(18).reshape(9, 2), 2, Wrong())


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch):
    real = load_registry()
    selectors = Shelf("selectors", list)
    selectors.add("last", Last, "qplug-last")
    monkeypatch.setattr(real, "selectors", selectors)
    return real


def test_a_recipe_names_its_selector(registry) -> None:
    recipe = load_recipe("w4a16-gptq", registry, ["calibration.select.name=last", "calibration.select.skip=3", "calibration.candidates=99"])
    assert recipe.calibration.select == Last(3) and recipe.calibration.candidates == 99
    again = parse_recipe(dump(recipe), registry, recipe.name)
    assert again == recipe
    plain = load_recipe("w4a16-gptq", registry)
    assert plain.calibration.select is None and parse_recipe(dump(plain), registry, plain.name) == plain
    with pytest.raises(NotFound, match="no selector named 'lost'; did you mean 'last'"):
        load_recipe("w4a16-gptq", registry, ["calibration.select.name=lost"])
    with pytest.raises(SpecError, match="has no field 'skp'"):
        load_recipe("w4a16-gptq", registry, ["calibration.select.name=last", "calibration.select.skp=3"])
    with pytest.raises(SpecError, match="candidates is at least 1"):
        CalibrationSettings(candidates=0)
