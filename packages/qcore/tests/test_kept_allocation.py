"""An allocation is found once in the life of a journal."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from qcore.checkpoint.journal import Journal
from qcore.errors import CheckpointError
from qcore.model import LoadedModel
from qcore.model.reader import DictReader
from qcore.model.topology import Site
from qcore.numbers import int_weight
from qcore.pipeline import quantize_model
from qcore.pipeline.allocation import KeptAllocation, with_kept_allocation
from qcore.plugins.registry import Registry
from qcore.recipe import Recipe, Rule
from qcore.solvers import RTN, Allocator, Choice, Look
from qcore.solvers.mixed import Candidate, Mixed
from qcore.testing.models import TinyDecoderAdapter, tiny_decoder

RULES = (Rule("*:weight", int_weight(4, 16)),)
ASKED: Counter[str] = Counter()


class Killed(Exception):
    pass


@dataclass(frozen=True, kw_only=True)
class Counting(Mixed):
    """`Mixed`, and how often it was asked."""

    def allocate(self, sites: Sequence[Site], look: Look) -> Mapping[Site, Choice]:
        ASKED["mixed"] += 1
        return super().allocate(sites, look)


CANDIDATES = tuple(Candidate(spec=int_weight(bits, 16), solver=solver) for bits, solver in ((2, None), (4, RTN()), (6, None)))
MIXED = Counting(bits=5, metric="mse", solver=RTN(clip="mse"), candidates=CANDIDATES)


def run(journal: Journal, allocator: Allocator = MIXED, die_at: int | None = None, stream: bool = False):
    model = tiny_decoder(layers=3)
    loaded = LoadedModel(model, DictReader(dict(model.state_dict())), "tiny:", torch.float32, None, "tiny")
    registry = Registry("")
    recipe = with_kept_allocation(Recipe(rules=RULES, solver=RTN(), allocator=allocator), journal, registry)

    def progress(phase: str, done: int, total: int) -> None:
        if phase == "block" and done == die_at:
            raise Killed

    return quantize_model(loaded, recipe, registry=registry, adapter=TinyDecoderAdapter(), journal=journal, progress=progress, stream=stream)


def test_a_resumed_run_does_not_ask_again_and_comes_out_the_same(tmp_path: Path) -> None:
    ASKED.clear()
    whole = run(Journal(tmp_path / "whole", {}))
    assert ASKED["mixed"] == 1 and len({why.split()[0] for why in whole.choices.values()}) > 1  # several widths were chosen
    journal = Journal(tmp_path / "cut", {})
    with pytest.raises(Killed):
        run(journal, die_at=1)
    assert ASKED["mixed"] == 2
    again = run(journal)
    assert ASKED["mixed"] == 2
    assert again.choices == whole.choices and again.notes == whole.notes
    assert {s: str(spec) for s, spec in again.specs.items()} == {s: str(spec) for s, spec in whole.specs.items()}
    for (name, a), (other, b) in zip(again.model.state_dict().items(), whole.model.state_dict().items(), strict=True):
        assert name == other and torch.equal(a, b)


def test_killed_before_the_choice_is_kept_it_is_made_anew(tmp_path: Path) -> None:
    ASKED.clear()
    journal = Journal(tmp_path, {})

    class Dying(Counting):
        def allocate(self, sites: Sequence[Site], look: Look) -> Mapping[Site, Choice]:
            raise Killed

    with pytest.raises(Killed):
        run(journal, Dying(bits=5, metric="mse"))
    assert journal.step("allocation") is None
    run(journal)
    assert ASKED["mixed"] == 1


def test_what_a_recipe_cannot_say_is_not_kept(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Odd(RTN):
        """A solver with a field that no recipe can hold."""

        table: object = None

    @dataclass(frozen=True)
    class Chooses(Allocator):
        name: ClassVar[str] = "chooses"

        @property
        def solvers(self):
            return (Odd(table=object()),)

        def allocate(self, sites: Sequence[Site], look: Look) -> Mapping[Site, Choice]:
            ASKED["odd"] += 1
            return {site: Choice(int_weight(4, 16), Odd(table=object())) for site in sites}

    ASKED.clear()
    journal = Journal(tmp_path, {})
    run(journal, Chooses())
    assert journal.step("allocation") is None and ASKED["odd"] == 1


def test_a_choice_for_a_site_that_was_not_asked_about_is_not_kept(tmp_path: Path) -> None:
    asked, tapped = Site("attention.q"), Site("attention", "k")

    @dataclass(frozen=True)
    class Wide(Counting):
        def allocate(self, sites: Sequence[Site], look: Look) -> Mapping[Site, Choice]:
            return {site: Choice(int_weight(4, 16), RTN()) for site in (*sites, *(s.input for s in sites), *extra)}

    for extra in ((tapped,), ()):
        journal = Journal(tmp_path / str(len(extra)), {})
        kept = KeptAllocation(Wide(bits=5, metric="mse"), journal, Registry(""))
        look: Look = None  # type: ignore[assignment]  # nobody looks
        assert kept.allocate([asked], look).keys() == {asked, asked.input, *extra}
        assert (journal.step("allocation") is None) == bool(extra)
        assert kept.allocate([asked], look).keys() == {asked, asked.input, *extra}


def test_choices_for_another_model_are_refused(tmp_path: Path) -> None:
    journal = Journal(tmp_path, {})
    with pytest.raises(Killed):
        run(journal, die_at=0)
    tensors, data = journal.step("allocation") or ({}, {})
    journal.keep_step("allocation", tensors, data | {"rules": re.sub(r'(sites = ")', r"\1other.", data["rules"], count=1)})
    with pytest.raises(CheckpointError, match=r"holds a choice for other\..*start again"):
        run(journal)


def test_a_recipe_without_an_allocator_is_left_as_it_is(tmp_path: Path) -> None:
    recipe = Recipe(rules=RULES, solver=RTN())
    assert with_kept_allocation(recipe, Journal(tmp_path, {}), Registry("")) is recipe
    kept = with_kept_allocation(replace(recipe, allocator=MIXED), Journal(tmp_path / "b", {}), Registry(""))
    assert kept.allocator is not None
    assert (kept.allocator.name, kept.allocator.needs, kept.allocator.solvers) == (MIXED.name, MIXED.needs, MIXED.solvers)
