"""Convolutional networks through `quantize_model`: folded, equalized, quantized, saved and loaded again."""

import copy

import pytest
import torch
from qcore.calibration.observers import ChannelMoments
from qcore.checkpoint import load, save
from qcore.errors import CalibrationError, SpecError
from qcore.model.plain import PlainCNN
from qcore.modules import QuantizedConv
from qcore.modules.leaves import FloatConv2d
from qcore.modules.sum import Sum
from qcore.numbers import int_weight
from qcore.pipeline import load_in_memory, quantize_model
from qcore.pipeline.sites import bias_shift
from qcore.plugins.registry import Registry
from qcore.recipe import Recipe, Rule
from qcore.recipe_file import load_recipe
from qcore.solvers import GPTQ, RTN
from qcore.testing.models import tiny_cnn
from qcore.transforms import CrossLayerEqualize, FoldBatchNorm, Reorder, SplitColumns
from torch import nn

IMAGES = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))
FOLD = (FoldBatchNorm(),)
SPLIT = SplitColumns(sites=("2.0:weight",), channels=2, by="weight")


def quantized(*rules, transforms=FOLD, model=None, batches=(IMAGES,), solver=None, **options):
    recipe = Recipe(rules=rules, solver=solver or RTN(clip="none"), transforms=transforms, **options)
    loaded = load_in_memory(copy.deepcopy(model or tiny_cnn()))
    return quantize_model(loaded, recipe, list(batches), registry=Registry(""), adapter=PlainCNN())


def gap(model, reference, x=IMAGES):
    with torch.no_grad():
        y = reference(x)
        return float((model(x) - y).abs().max() / y.abs().max())


@pytest.mark.parametrize(
    "more", [(), (CrossLayerEqualize(),), (CrossLayerEqualize(), Reorder()), (SPLIT,)], ids=lambda v: "-".join(t.name for t in v)
)
def test_a_folded_network_at_8_bits_is_the_float_one(more):
    result = quantized(Rule("*:weight", int_weight(8)), transforms=(FoldBatchNorm(), *more))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in result.model.modules())
    assert gap(result.model, tiny_cnn()) < 0.03  # plain rounding: 0.01


def test_a_folded_network_is_saved_and_loaded_with_the_layers_that_stay_float(tmp_path):
    result = quantized(Rule("*:weight", int_weight(8)), Rule("0.0:weight", None))
    first = result.model.get_submodule("0.0")
    assert type(first) is FloatConv2d and first.bias is not None and isinstance(result.model.get_submodule("1.0"), QuantizedConv)
    save(result.model, tmp_path / "out", adapter="plain-cnn", registry=Registry(""))
    again = load(tmp_path / "out", skeleton=tiny_cnn(), registry=Registry(""))
    with torch.no_grad():
        assert torch.equal(again(IMAGES), result.model(IMAGES))


def test_a_model_in_training_mode_is_quantized_as_it_is_in_eval():
    assert gap(quantized(Rule("*:weight", int_weight(8)), model=tiny_cnn().train()).model, tiny_cnn()) < 0.03


def test_a_batch_norm_that_nothing_can_fold_stops_the_run_and_says_so():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU(), nn.Conv2d(4, 2, 1))
    with pytest.raises(SpecError, match="no running statistics"):
        quantized(Rule("*:weight", int_weight(8)), model=model)


def test_a_layer_that_got_its_bias_from_a_fold_can_be_split():
    model = tiny_cnn()
    model[2][0] = nn.Conv2d(16, 24, 1, bias=False).eval()
    result = quantized(Rule("*:weight", int_weight(8)), transforms=(FoldBatchNorm(), SPLIT), model=model)
    assert isinstance(result.model.get_submodule("2.0"), Sum) and gap(result.model, model) < 0.03


@pytest.mark.parametrize("name", ["cnn-w8a8", "cnn-w4a8"])
def test_the_recipes_quantize_a_network(name, tmp_path):
    registry = Registry("")
    recipe = load_recipe(name, registry)
    batches = [torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(s)) for s in range(3)]
    result = quantize_model(load_in_memory(tiny_cnn()), recipe, batches, registry=registry, adapter=PlainCNN())
    assert gap(result.model, tiny_cnn()) < {"cnn-w8a8": 0.04, "cnn-w4a8": 0.3}[name]  # measured 0.02 and 0.16
    assert all(m.activation is not None for m in result.model.modules() if isinstance(m, QuantizedConv))
    save(result.model, tmp_path / "out", adapter="plain-cnn", registry=registry)
    again = load(tmp_path / "out", skeleton=tiny_cnn(), registry=registry)
    with torch.no_grad():
        assert torch.equal(again(IMAGES), result.model(IMAGES))
        # another batch, another size of image
        assert again(IMAGES[:1]).shape == (1, 10) and again(torch.randn(2, 3, 16, 16)).shape == (2, 10)


def test_corrected_biases_give_every_channel_the_mean_that_its_float_weight_would():
    spec = int_weight(2)
    plain, corrected = (quantized(Rule("*:weight", spec), correct_bias=on).model for on in (False, True))
    float_model = tiny_cnn()
    means = []
    for model in (plain, corrected):
        # the first layer's input is the image for all: what its codes add to the mean shows
        with torch.no_grad():
            own = model.get_submodule("0.0")(IMAGES)
            want = float_model[0][1](float_model[0][0](IMAGES))
        means.append((own - want).mean((0, 2, 3)))
    assert means[0].abs().max() > 1e-2 and means[1].abs().max() < 1e-5
    assert all(
        torch.equal(a, b) for (n, a), (_, b) in zip(plain.state_dict().items(), corrected.state_dict().items(), strict=True) if "0.0.weight" in n
    )


def test_bias_correction_sees_the_inputs_of_each_group():
    weight, values = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    mean = torch.randn(2, 5).double()
    seen = {"moments": ChannelMoments(torch.tensor(1.0), mean, mean, mean)}
    want = torch.cat([((v - w).double() @ m) for w, v, m in zip(weight, values, mean, strict=True)])
    torch.testing.assert_close(bias_shift(weight.flatten(0, 1), values.flatten(0, 1), seen), want)
    with pytest.raises(CalibrationError, match="pass calibration batches"):
        bias_shift(weight[0], values[0], {})


def test_gptq_solves_grouped_convolutions_group_by_group():
    rule = Rule("*:weight", int_weight(3))
    errors = {
        solver.name: {r.site: r.error for r in quantized(rule, solver=solver, propagate="float").sites if r.of == "output"}
        for solver in (GPTQ(), RTN(weighted=True))
    }
    # RTN with weights sees the diagonal alone; both observe the Gram of each group's own inputs
    assert len(errors["gptq"]) == 5
    for site in ("0.0:weight", "1.0:weight", "2.0:weight", "3.0:weight"):
        assert errors["gptq"][site] <= errors["rtn"][site] * 1.001, site
    assert errors["gptq"]["3.0:weight"] < 0.9 * errors["rtn"]["3.0:weight"]
