"""A low-rank correction: exact before rounding, never worse than none by its own measure, and it finds what is of low rank."""

import pytest
import torch
from qcore.errors import SpecError
from qcore.model.plain import PlainCNN, PlainMLP
from qcore.numbers import int_weight
from qcore.pipeline import load_in_memory, quantize_model
from qcore.plan import make_plan
from qcore.plugins import load_registry
from qcore.recipe import Recipe, Rule
from qcore.recipe_file import load_recipe
from qcore.solvers import GPTQ
from qcore.testing import check_transform
from qcore.testing.models import tiny_cnn, tiny_mlp
from qcore.transforms import LowRank
from qcore.transforms.low_rank import nearest


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("adapter", "model", "x"), [(PlainMLP(), tiny_mlp, rand(40, 16)), (PlainCNN(), tiny_cnn, rand(2, 3, 12, 12))], ids=["mlp", "cnn"]
)
def test_the_function_stays(adapter, model, x):
    sites = ("0:weight", "2:weight") if isinstance(adapter, PlainMLP) else ("2.0:weight",)
    found = check_transform(LowRank(sites=sites, rank=2), adapter, model(), [x.float()])
    assert len(found.inserts) == len(sites) and all("rank 2 leaves" in note for note in found.notes)


def test_an_error_of_low_rank_is_taken_up():
    spec = int_weight(3, 16, scale="float32")
    grid = nearest(rand(24, 32), spec)
    w = grid + 0.3 * rand(24, 1, seed=1) @ rand(1, 32, seed=2)
    _, _, left = LowRank(rank=1, rounds=20).factors(w, spec, torch.eye(32))
    assert left < 0.5


def test_more_rank_leaves_less_and_none_is_worse_than_nothing():
    x = rand(200, 32) @ rand(32, 32, seed=3)
    w, spec = rand(24, 32, seed=4), int_weight(2, 16)
    left = [LowRank(rank=r).factors(w, spec, x.T @ x)[2] for r in (1, 4, 12)]
    assert left == sorted(left, reverse=True) and left[0] <= 1 and left[-1] < 0.5


def test_shrunk_ranges_lose_less_than_full_ones():
    from qcore.numbers import fake_quantize

    w, spec = rand(8, 64) ** 3, int_weight(3, 32)
    assert float((w - nearest(w, spec)).square().sum()) < float((w - fake_quantize(w, spec)).square().sum())


def test_a_whole_run_stores_both_parts_and_a_plan_knows_their_names():
    registry, group = load_registry(), 8
    rules = (Rule("*:weight", int_weight(2, group)), Rule("*.fine.*:weight", int_weight(8)))
    recipe = Recipe(rules=rules, solver=GPTQ(), transforms=(LowRank(rank=2),))
    assert not make_plan(load_in_memory(tiny_mlp()), recipe, PlainMLP(), registry).problems
    x = rand(64, 16).float()
    plain = Recipe(rules=rules[:1], solver=GPTQ())
    wanted, errors = tiny_mlp()(x), []
    for own in (plain, recipe):
        done = quantize_model(load_in_memory(tiny_mlp()), own, [x], registry=registry, adapter=PlainMLP())
        errors.append(float((done.model(x) - wanted).detach().square().sum()))
    assert errors[1] < errors[0]
    assert sorted({r.spec.split()[0] for r in done.sites}) == ["int2", "int8"] and len(done.sites) == 9
    assert load_recipe("w2a16-lowrank", registry).transforms == (LowRank(rank=8),)


def test_what_is_no_correction_is_refused():
    with pytest.raises(SpecError, match="at least 1"):
        LowRank(rank=0)
    with pytest.raises(SpecError, match="no smaller than the weight"):
        check_transform(LowRank(rank=24), PlainMLP(), tiny_mlp(), [rand(40, 16).float()])
