"""Substitution where matrices are fused: a stack of experts is float again as one, and so is a tap inside the attention."""

import copy

import torch
from qcore.evaluation import FloatAgain
from qcore.model import DictReader
from qcore.numbers import int_activation, int_weight
from qcore.pipeline import load_in_memory, quantize_model
from qcore.plugins import load_registry
from qcore.recipe import CalibrationSettings, Recipe, Rule
from qcore.solvers import RTN
from qcore.transforms import FoldNorm
from qplug_llm.decoder import DecoderLM
from qplug_llm.testing import ids, model_of


def test_stacks_and_taps_are_put_back_and_the_model_is_the_float_one() -> None:
    model, registry, adapter = model_of("Mixtral"), load_registry(), DecoderLM()
    rules = (Rule("*:weight", int_weight(4)), Rule("*:k", int_activation(4)))
    recipe = Recipe(rules=rules, solver=RTN(), transforms=(FoldNorm(),), calibration=CalibrationSettings(below="nearest"))
    result = quantize_model(load_in_memory(copy.deepcopy(model)), recipe, [{"input_ids": ids()}], registry=registry, adapter=adapter)
    again = FloatAgain(result.model, copy.deepcopy(model), DictReader(model.state_dict()), adapter, result.rewrite, registry.modules)
    units = again.units()
    assert {"model.layers.0.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"} <= set(units)
    assert [u for u in units if ".taps.k." in u] == [f"model.layers.{i}.self_attn.taps.k.handlers.0" for i in range(2)]
    with torch.no_grad():
        reference, before = (adapter.outputs(m, ids()) for m in (model, result.model))
        with again.substituted(*units):
            put_back = adapter.outputs(result.model, ids())
        with again.substituted("model.layers.0.mlp.experts.gate_up_proj"):
            one = adapter.outputs(result.model, ids())
        after = adapter.outputs(result.model, ids())
    assert torch.equal(after, before) and not torch.equal(one, before)
    off = (put_back - reference).norm() / reference.norm()
    assert off < 1e-4 < (before - reference).norm() / reference.norm()  # float32 sums in another order
