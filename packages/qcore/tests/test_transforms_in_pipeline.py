"""Rows of transforms through `quantize_model`: at 8 bits the model stays what it was, so a rewrite applied on one side alone shows."""

import copy

import pytest
import torch
from qcore.checkpoint.journal import Journal
from qcore.model.plain import PlainCNN, PlainMLP
from qcore.numbers import Int, Offset, PerToken, QuantSpec, int_weight
from qcore.pipeline import load_in_memory, quantize_model
from qcore.plan import make_plan
from qcore.plugins.registry import Registry
from qcore.recipe import Recipe, Rule
from qcore.solvers import RTN
from qcore.testing.models import TinyDecoderAdapter, tiny_cnn, tiny_decoder, tiny_mlp, tokens
from qcore.transforms import AWQScale, CrossLayerEqualize, FoldNorm, HadamardRotate, IfBeneficial, LearnRotations, Reorder, SmoothQuant, SplitColumns

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


INT4_TOKEN = QuantSpec(format=Int(4), granularity=PerToken(), offset=Offset.CODE, when="dynamic")
LEARNED = Recipe(
    rules=(Rule("*:weight", int_weight(4, 16)), Rule("*:input", INT4_TOKEN), Rule("*:[kv]", INT4_TOKEN)),
    solver=RTN(),
    transforms=(FoldNorm(), LearnRotations(steps=4, batch=4, length=12, held_out=4, start="hadamard")),
)


def test_a_learned_rewrite_is_journalled_and_taken_from_there(tmp_path, monkeypatch):
    batches, phases = [tokens(4, 12, seed=s) for s in range(4)], []

    def run():
        journal = Journal(tmp_path, {"what": "a test"})
        loaded = load_in_memory(copy.deepcopy(tiny_decoder(tied=True)))
        done = quantize_model(
            loaded, LEARNED, batches, registry=Registry(""), adapter=TinyDecoderAdapter(), journal=journal, progress=lambda *p: phases.append(p)
        )
        journal.close()
        return done

    first = run()
    assert ("learn", 4, 4) in phases
    assert any(note.startswith("learned 4 steps by kl-top: held-out loss") for note in first.notes)
    assert any(note.startswith("QSUR^(1/d)") for note in first.notes)
    assert {i.place for i in first.rewrite.inserts.values()} == {"before", "tap:q,k"}
    for file in tmp_path.glob("block-*"):
        file.unlink()
    phases.clear()
    again = run()
    assert not any(phase == "learn" for phase, *_ in phases)
    with torch.no_grad():
        assert torch.equal(first.model(batches[0]), again.model(batches[0]))
        taps = again.model.model.layers[0].self_attn.taps
        assert [type(h).name for h in taps["k"].handlers] == ["head-hadamard", "quantized-tap"]


def test_learning_without_data_is_foreseen():
    loaded = load_in_memory(tiny_decoder())
    plan = make_plan(loaded, LEARNED, TinyDecoderAdapter(), Registry(""), has_data=False)
    assert plan.needs_data and any("there is none" in p for p in plan.problems)
