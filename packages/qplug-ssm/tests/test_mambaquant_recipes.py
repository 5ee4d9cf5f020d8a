"""The recipes mambaquant-w8a8 and -w4a8: whole runs, from calibration to a reloaded checkpoint."""

import copy
from functools import partial

import pytest
import torch
from qcore.checkpoint import load, save
from qcore.modules.tapped import QuantizedTap
from qcore.pipeline import load_in_memory, quantize_model
from qcore.plan import make_plan
from qcore.plugins import load_registry
from qcore.recipe import Recipe
from qcore.recipe_file import load_recipe
from qcore.testing.models import randomize
from qcore.transforms import FoldNorm, HadamardRotate
from qplug_ssm.mamba_adapter import MambaAdapter
from qplug_ssm.mixer import SelectiveMixer
from qplug_ssm.testing import TinyMamba
from torch import Tensor, nn

G = torch.Generator().manual_seed(0)
BATCHES = [torch.randint(0, 32, (4, 40), generator=G) for _ in range(3)]
HELD_OUT = torch.randint(0, 32, (8, 40), generator=G)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A tiny Mamba with three gate channels and three channels of out_proj's input fifty times as large as the others."""
    model = randomize(TinyMamba(partial(SelectiveMixer.fresh, 32, 64, rank=8, states=16), width=32)).eval().requires_grad_(False)
    for layer in model.layers:
        for c in (5, 20, 41):
            layer.mixer.in_proj.weight[64 + c] *= 50
            layer.mixer.out_proj.weight[:, c] /= 50
    return model


def quantized(model: nn.Module, recipe: Recipe):
    return quantize_model(load_in_memory(copy.deepcopy(model)), recipe, BATCHES, registry=load_registry(), adapter=MambaAdapter())


def error(model: nn.Module, other: nn.Module) -> float:
    def run(m: nn.Module) -> Tensor:
        with torch.no_grad():
            return m(HELD_OUT)

    return float((run(other) - run(model)).square().mean() / run(model).square().mean())


def recipes() -> dict[str, Recipe]:
    from dataclasses import replace

    own = load_recipe("mambaquant-w8a8", load_registry())
    plain = (FoldNorm(), HadamardRotate(online=("*.out_proj:weight",)))
    return {"none": replace(own, transforms=()), "hadamard": replace(own, transforms=plain), "mambaquant": own}


def test_injected_outliers_of_the_gate_cost_less_after_mambaquant(model):
    lost = {name: error(model, quantized(model, recipe).model) for name, recipe in recipes().items()}
    print(lost)
    assert lost["mambaquant"] * 10 <= lost["none"], lost
    assert lost["mambaquant"] * 3 <= lost["hadamard"], lost


@pytest.mark.parametrize("name", ["mambaquant-w8a8", "mambaquant-w4a8"])
def test_a_whole_run_is_planned_quantizes_every_weight_and_loads_again(name, model, tmp_path):
    recipe = load_recipe(name, load_registry())
    plan = make_plan(load_in_memory(copy.deepcopy(model)), recipe, MambaAdapter(), load_registry())
    assert not plan.problems, plan.problems
    done = quantized(model, recipe)
    assert {s.site.rpartition(".")[2] for s in done.sites} == {f"{n}:weight" for n in ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")}
    kinds = {type(m).__name__ for m in done.model.modules()}
    assert {"QuantizedLinear", "QuantizedConv", "QuantizedTap", "RotatedReadout", "SmoothSiLU", "OnlineHadamard", "SubtractMean"} <= kinds
    save(done.model, tmp_path / "out")
    skeleton = copy.deepcopy(model)
    MambaAdapter().prepare(skeleton)
    back = load(tmp_path / "out", skeleton=skeleton)
    with torch.no_grad():
        torch.testing.assert_close(back(HELD_OUT), done.model(HELD_OUT))


def test_activations_are_static_and_span_the_percentile_of_their_histogram(model):
    """99.9999 % of the values at each end; so few rows hold no millionth, and the range is that of the extremes."""
    recipe = load_recipe("mambaquant-w8a8", load_registry(), ("transforms=[]",))
    assert all(r.observer is None or (type(r.observer).__name__, r.observer.q) == ("Percentile", 0.999999) for r in recipe.rules)
    done = quantized(model, recipe).model
    largest = max(float(model.layers[0].norm(model.embed(batch)).abs().max()) for batch in BATCHES)
    scale = done.layers[0].mixer.in_proj.stored()["input.scale"].flatten()
    assert scale.shape == (1,) and float(scale) == pytest.approx(largest / 127, rel=2e-3)


def test_h_and_c_may_have_a_scale_for_each_token(model):
    rule = 'rules.{}={{sites="*.readout*:{}", format={{name="int", bits=8}}, granularity="token", when="dynamic"}}'
    recipe = load_recipe("mambaquant-w8a8", load_registry(), (rule.format(2, "h"), rule.format(3, "c")))
    done = quantized(model, recipe).model
    taps = [m for m in done.modules() if isinstance(m, QuantizedTap)]
    assert len(taps) == 4 and all(t.spec.when == "dynamic" and not t.parts for t in taps)
    # a token's own scale is never larger than that of the tensor, but for the clipped millionth
    static = error(model, quantized(model, load_recipe("mambaquant-w8a8", load_registry())).model)
    assert error(model, done) <= 1.05 * static
