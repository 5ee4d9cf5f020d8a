"""Convolutional networks through `quantize_model`: folded, equalized, quantized, saved and loaded again."""

import copy

import pytest
import torch
from qcore.checkpoint import load, save
from qcore.errors import SpecError
from qcore.model.plain import PlainCNN
from qcore.modules import QuantizedConv
from qcore.modules.leaves import FloatConv2d
from qcore.modules.sum import Sum
from qcore.numbers import int_weight
from qcore.pipeline import load_in_memory, quantize_model
from qcore.plugins.registry import Registry
from qcore.recipe import Recipe, Rule
from qcore.solvers import RTN
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
