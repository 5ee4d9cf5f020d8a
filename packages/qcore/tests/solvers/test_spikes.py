"""Activation spikes: what they cost a per-tensor scale, which layers are kept apart, and that keeping them helps in a saved model too."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from qcore.calibration import Spikes
from qcore.checkpoint import load, save
from qcore.errors import CalibrationError, SpecError
from qcore.model.plain import PlainMLP
from qcore.numbers import Int, PerTensor, PerToken, QuantSpec, fake_quantize, fp8_weight, int_weight
from qcore.pipeline import load_in_memory, quantize_model
from qcore.plan import make_plan
from qcore.plugins import load_registry
from qcore.recipe_file import dump, load_recipe, parse_recipe
from qcore.solvers import RTN, Candidate, Mixed
from qcore.solvers.spikes import SpikeAware
from qcore.testing.models import TinyDecoderAdapter, tiny_decoder, tiny_mlp, tokens
from torch import nn


@pytest.fixture(scope="module")
def registry():
    return load_registry()


@pytest.fixture(scope="module")
def recipe(registry):
    return load_recipe("spike-aware-w8a8", registry)


def sqnr(x: torch.Tensor, y: torch.Tensor) -> float:
    return float(10 * torch.log10(x.square().sum() / (x - y).square().sum()))


@pytest.mark.parametrize(("ratio", "decibels"), [(1.4, 39.4), (17.8, 17.2), (138.8, 0.9), (4136.0, 0.0)])
def test_what_a_spike_leaves_of_the_other_tokens(ratio, decibels):
    # the ratios are those of LLaMA-2-7B's layers; normal rows of 1024
    x = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    top = ratio * float(x.abs().amax(1).median())
    x = x.clamp(-top, top)
    x[3, 7] = top
    seen = Spikes().fresh()
    seen.update(x)
    assert seen.result() == pytest.approx(ratio, rel=0.012)  # the histogram's bins
    others = torch.arange(512) != 3
    found = {g: sqnr(x[others], fake_quantize(x, QuantSpec(format=Int(8), granularity=g))[others]) for g in (PerTensor(), PerToken())}
    assert found[PerTensor()] == pytest.approx(decibels, abs=0.2)
    assert found[PerToken()] == pytest.approx(42.1, abs=0.2)


def spiky(at: int | None = 2) -> tuple[nn.Sequential, torch.Tensor]:
    """A net whose layer `at` (the second or third linear) reads one token with a spike; others read none."""
    g = torch.Generator().manual_seed(3)
    model, x = tiny_mlp(seed=1), torch.randn(96, 16, generator=g)
    x[:, 0] = 0
    if at is not None:
        x[5, 0] = 4.0  # no spike yet
        before = model[at - 2]
        with torch.no_grad():
            before.weight[0] = 0
            before.weight[0, 0] = 500.0
            before.bias[0] = 0
            model[at].weight[:, 0] *= 1e-3  # what the layer makes of it is no spike any more
            if at == 4:  # the second layer's input 0 is the spike's way to the third
                model[0].weight[0] = 0
                model[0].weight[0, 0] = 1.0
                model[2].weight[1:, 0] = 0
    return model, x


def run(model, recipe, x, registry):
    return quantize_model(load_in_memory(model), recipe, [x], registry=registry, adapter=PlainMLP())


@pytest.mark.parametrize("at", [2, 4])
def test_the_keep_list_of_one_spike_is_exactly_that_layer_with_its_input(at, recipe, registry):
    model, x = spiky(at)
    done = run(model, recipe, x, registry)
    assert set(done.choices) == {f"{at}:weight", f"{at}:input"}
    assert [r.site for r in done.sites if r.spec.startswith("fp8")] == [f"{at}:weight"]
    assert all(r.spec.startswith("int8") for r in done.sites if r.site != f"{at}:weight")
    readers = {path: str(m.activation) for path, m in done.model.named_modules() if hasattr(m, "activation")}
    assert readers == {str(i): "fp8-e4m3 per token dynamic" if i == at else "int8 per tensor" for i in (0, 2, 4)}


def test_no_spike_keeps_nothing_and_gives_what_the_rules_alone_give(recipe, registry):
    model, x = spiky(None)
    plain = run(spiky(None)[0], replace(recipe, allocator=None), x, registry)
    done = run(model, recipe, x, registry)
    assert not done.choices
    assert torch.equal(done.model(x), plain.model(x))


def test_a_higher_limit_keeps_no_more_and_a_limit_of_one_keeps_all(recipe, registry):
    kept = []
    for limit in (1.0, 2.0, 4.0, 20.0, 1e6):
        model, x = spiky()
        kept.append(set(run(model, replace(recipe, allocator=SpikeAware(limit=limit)), x, registry).choices))
    assert all(after <= before for before, after in pairwise(kept))
    assert len(kept[0]) == 6 and kept[3] == {"2:weight", "2:input"} and not kept[-1]


def test_it_keeps_the_weights_that_mixed_precision_by_the_same_metric_keeps(recipe, registry):
    model, x = spiky()
    mixed = Mixed(
        bits=64.0,
        candidates=(Candidate(spec=int_weight(2)), Candidate(spec=int_weight(8))),
        metric="spikes",
        choose="threshold",
        limit=20.0,
        solver=RTN(),
    )
    theirs = run(model, replace(recipe, allocator=mixed), x, registry)
    wide = {r.site for r in theirs.sites if r.spec.startswith("int8")}
    ours = run(spiky()[0], recipe, x, registry)
    assert wide == {s for s in ours.choices if s.endswith(":weight")} == {"2:weight"}


def test_keeping_the_layer_of_the_spike_saves_the_other_tokens_also_after_loading(recipe, registry, tmp_path):
    model, x = spiky()
    target = model(x).detach()
    others = torch.arange(len(x)) != 5
    plain = run(spiky()[0], replace(recipe, allocator=None), x, registry)
    done = run(model, recipe, x, registry)
    harmed, saved = (sqnr(target[others], q.model(x)[others].detach()) for q in (plain, done))
    assert saved > harmed + 10, (harmed, saved)  # decibels
    save(done.model, tmp_path / "out", registry=registry, adapter="plain-mlp")
    back = load(tmp_path / "out", skeleton=spiky(None)[0], registry=registry, adapter=PlainMLP())
    assert torch.equal(back(x), done.model(x))


def test_a_decoder_goes_through_whole(recipe, registry):
    inputs = [tokens(batch=4, length=24, seed=i) for i in range(2)]
    low = replace(recipe, allocator=SpikeAware(limit=2.0))
    done = quantize_model(load_in_memory(tiny_decoder()), low, inputs, registry=registry, adapter=TinyDecoderAdapter())
    kept = [s for s in done.choices if s.endswith(":weight")]
    assert 0 < len(kept) < len(done.sites)
    # q, k and v read the same and are kept together
    groups = {s.rsplit(".", 1)[0] for s in kept if s.endswith(("q_proj:weight", "k_proj:weight", "v_proj:weight"))}
    assert all(f"{g}.{n}_proj:weight" in kept for g in groups for n in "qkv")


def test_the_recipe_survives_its_file_form(recipe, registry):
    assert recipe.allocator == SpikeAware()
    assert parse_recipe(dump(recipe), registry, name=recipe.name) == recipe


def test_what_cannot_work_is_said(recipe, registry):
    with pytest.raises(SpecError, match=r"limit=0\.5"):
        SpikeAware(limit=0.5)
    with pytest.raises(SpecError, match="dynamic"):
        SpikeAware(kept_inputs=fp8_weight())
    with pytest.raises(CalibrationError, match="calib"):
        run_without = replace(recipe, rules=recipe.rules[:1])
        quantize_model(load_in_memory(tiny_mlp()), run_without, registry=registry, adapter=PlainMLP())
    unfit = replace(recipe, allocator=SpikeAware(kept=int_weight(8, 7)))
    plan = make_plan(load_in_memory(tiny_mlp()), unfit, registry=registry, adapter=PlainMLP())
    assert any("0:weight and 2 more" in p for p in plan.problems), plan.problems
