"""What is unusual about a weight is said in the report, and a run goes on."""

import copy

import pytest
import torch
from qcore.numbers import int_weight
from qcore.pipeline import load_in_memory, quantize_model
from qcore.plugins.registry import Registry
from qcore.recipe import Recipe, Rule
from qcore.remarks import listening, remark
from qcore.solvers import GPTQ
from qcore.testing.models import TinyDecoderAdapter, tiny_decoder, tokens

RECIPE = Recipe(rules=(Rule("*:weight", int_weight(4, 16)),), solver=GPTQ(damp=1e-8))


def quantized(model, batches):
    return quantize_model(load_in_memory(model), RECIPE, batches, registry=Registry(""), adapter=TinyDecoderAdapter())


def test_remarks_are_heard_once_by_the_innermost_listener_and_logged_without_one(caplog):
    with listening() as outer:
        remark("a")
        with listening() as inner:
            remark("b")
            remark("b")
        remark("c")
    assert (outer, inner) == (["a", "c"], ["b"])
    remark("nobody listens")
    assert caplog.messages == ["nobody listens"]


def test_rows_of_zeros_and_inputs_never_seen_are_named_and_finite():
    model = copy.deepcopy(tiny_decoder(layers=1))
    with torch.no_grad():
        path = next(n for n, _ in model.named_modules() if n.endswith(".0.mlp"))
        up, gate = (model.get_submodule(f"{path}.{name}") for name in ("up_proj", "gate_proj"))
        up.weight[:3] = 0  # what they put out is multiplied into what down_proj reads
    assert gate.weight.abs().sum() > 0
    q = quantized(model, [tokens(batch=4, length=16, seed=s) for s in range(3)])
    by_site = {r.site: r.remarks for r in q.sites}
    assert f"3 of {up.weight.shape[0]} rows are all zero" in by_site[f"{path}.up_proj:weight"]
    down = by_site[f"{path}.down_proj:weight"]
    assert any(f"3 of {up.weight.shape[0]} inputs were zero on all calibration rows" in said for said in down)
    assert any("up_proj" in note and "rows are all zero" in note for note in q.notes)
    assert all(torch.isfinite(p).all() for p in q.model.state_dict().values() if p.is_floating_point())
    assert all(r.error < 1 for r in q.sites)


@pytest.mark.parametrize("length", [1, 2])
def test_a_batch_of_one_token_is_solved_with_more_damping_and_says_so(length):
    q = quantized(copy.deepcopy(tiny_decoder(layers=1)), [tokens(batch=1, length=length)])
    said = [r for r in q.sites if any("not positive definite" in words for words in r.remarks)]
    assert said and all(r.error < 1 for r in q.sites)
