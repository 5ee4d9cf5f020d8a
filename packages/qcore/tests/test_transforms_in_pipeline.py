"""Rows of transforms through `quantize_model`: at 8 bits the model stays what it was, so a rewrite applied on one side alone shows."""

import copy

import pytest
import torch
from qcore.model.plain import PlainCNN, PlainMLP
from qcore.numbers import int_weight
from qcore.pipeline import load_in_memory, quantize_model
from qcore.plugins.registry import Registry
from qcore.recipe import Recipe, Rule
from qcore.solvers import RTN
from qcore.testing.models import TinyDecoderAdapter, tiny_cnn, tiny_decoder, tiny_mlp, tokens
from qcore.transforms import AWQScale, CrossLayerEqualize, FoldNorm, HadamardRotate, IfBeneficial, Reorder, SmoothQuant, SplitColumns

ONLINE = HadamardRotate(online=("*.down_proj:weight",))
SPLIT = SplitColumns(sites=("*.down_proj:weight",), channels=2)
AWQ = AWQScale(grid=3)


def deviation(model, adapter, batches, transforms):
    """How far the 8-bit model is off, relative to the largest output."""
    recipe = Recipe(rules=(Rule("*:weight", int_weight(8)),), solver=RTN(), transforms=transforms)
    with torch.no_grad():
        reference = model(batches[0])
        quantized = quantize_model(load_in_memory(copy.deepcopy(model)), recipe, batches, registry=Registry(""), adapter=adapter).model
        return float((quantized(batches[0]) - reference).abs().max() / reference.abs().max())


@pytest.mark.parametrize(
    ("options", "transforms"),
    [
        ({"tied": True}, (FoldNorm(),)),
        ({"tied": True, "norm_offset": 1.0}, (FoldNorm(), HadamardRotate())),
        ({"intermediate": 92}, (FoldNorm(), ONLINE)),
        ({"intermediate": 92}, (FoldNorm(), ONLINE, AWQ, SmoothQuant())),
        ({}, (FoldNorm(), ONLINE, IfBeneficial(AWQ), IfBeneficial(HadamardRotate(seed=5, residual=False)))),
        ({"norm_offset": 1.0}, (SmoothQuant(), AWQ, CrossLayerEqualize(), Reorder())),
        ({}, (SmoothQuant(), SPLIT)),
        ({}, (SPLIT, SmoothQuant(), Reorder())),
    ],
    ids=lambda v: "-".join(t.name for t in v) if isinstance(v, tuple) else "",
)
def test_decoders(options, transforms):
    batches = [tokens(seed=s) for s in range(3)]
    assert deviation(tiny_decoder(bias=True, **options), TinyDecoderAdapter(), batches, transforms) < 0.08  # plain rounding: 0.035


@pytest.mark.parametrize("transforms", [(SmoothQuant(), AWQ), (CrossLayerEqualize(), Reorder())], ids=lambda v: "-".join(t.name for t in v))
@pytest.mark.parametrize("kind", ["mlp", "cnn", "cnn with batch norms"])
def test_plain_networks(kind, transforms):
    generator = torch.Generator().manual_seed(0)
    if kind == "mlp":
        net, adapter, x = tiny_mlp(), PlainMLP(), torch.randn(8, 16, generator=generator)
    else:
        net, adapter, x = tiny_cnn(batch_norm=kind != "cnn"), PlainCNN(), torch.randn(2, 3, 12, 12, generator=generator)
    assert deviation(net, adapter, [x], transforms) < 0.02  # plain rounding: 0.01
