"""Substitution: what is put back is the float model's own, and the loss is found where it was made."""

import copy

import pytest
import torch
from qcore.evaluation import LanguageModeling
from qcore.evaluation.attribution import FloatAgain, attribute
from qcore.evaluation.kinds import kind_of, split_site
from qcore.model import DictReader
from qcore.numbers import int_activation, int_weight
from qcore.pipeline import load_in_memory, quantize_model
from qcore.plugins.registry import Registry
from qcore.recipe import Recipe, Rule
from qcore.solvers import RTN
from qcore.testing.models import TinyDecoderAdapter, tiny_decoder, tokens
from qcore.transforms import FoldNorm, HadamardRotate, SmoothQuant, SplitColumns
from qcore.transforms.apply import INSERTABLE
from torch import nn

INT4 = int_weight(4)


class LogitsAdapter(TinyDecoderAdapter):
    def outputs(self, model, batch):
        return model(batch["input_ids"])


FOUR_BITS = (Rule("*:weight", INT4),)


def quantized(model, transforms=(), rules=FOUR_BITS):
    batches = [{"input_ids": tokens(seed=s)} for s in range(2)]
    recipe = Recipe(rules=rules, solver=RTN(), transforms=transforms)
    return quantize_model(load_in_memory(copy.deepcopy(model)), recipe, batches, registry=Registry(""), adapter=LogitsAdapter())


def again_of(result, model) -> FloatAgain:
    return FloatAgain(result.model, copy.deepcopy(model), DictReader(model.state_dict()), LogitsAdapter(), result.rewrite, INSERTABLE)


def evaluated(model, tmp_path):
    task = LanguageModeling(tokens(4, 16, seed=9))
    return task, task.reference(lambda b: model(b["input_ids"]), tmp_path)


@pytest.mark.parametrize(
    "transforms",
    [
        (),
        (FoldNorm(), HadamardRotate()),
        (FoldNorm(), HadamardRotate(online=("*.down_proj:weight",))),
        (SmoothQuant(), SplitColumns(sites=("*.down_proj:weight",), channels=2)),
    ],
    ids=lambda v: "-".join(t.name for t in v) or "none",
)
def test_with_all_modules_float_again_it_is_the_float_model(transforms, tmp_path) -> None:
    model = tiny_decoder(tied=True, intermediate=92)
    result = quantized(model, transforms)
    again = again_of(result, model)
    ids = tokens(seed=7)
    with torch.no_grad():
        reference, before = model(ids), result.model(ids)
        with again.substituted(*again.units()):
            put_back = result.model(ids)
        after = result.model(ids)
    assert (before - reference).abs().max() > 1e-2 * reference.abs().max()
    torch.testing.assert_close(put_back, reference, rtol=1e-4, atol=1e-4 * float(reference.abs().max()))  # float32 sums in another order
    assert torch.equal(after, before)  # and it is quantized again


def test_without_its_rewrite_a_rotated_model_does_not_come_back() -> None:
    model = tiny_decoder()
    result = quantized(model, (FoldNorm(), HadamardRotate()))
    result.rewrite = type(result.rewrite)()
    again = again_of(result, model)
    with torch.no_grad(), again.substituted(*again.units()):
        assert (result.model(tokens()) - model(tokens())).abs().max() > 0.1 * model(tokens()).abs().max()


def test_the_module_that_was_spoilt_costs_most(tmp_path) -> None:
    model = tiny_decoder()
    rules = (Rule("*:weight", int_weight(8)), Rule("*.layers.1.mlp.down_proj:weight", int_weight(2)))
    task, reference = evaluated(model, tmp_path)
    found = attribute(again_of(quantized(model, rules=rules), model), task, reference)
    worst = found.modules[0]
    assert (worst.module, worst.kind) == ("model.layers.1.mlp.down_proj", "mlp.down_proj")
    assert worst.saved > 0.9 * found.kl and worst.kl == pytest.approx(found.kl - worst.saved)
    assert found.kl_float < 1e-6 < found.kl
    assert [c.saved for c in found.modules] == sorted((c.saved for c in found.modules), reverse=True)


def test_starting_at_the_block_gives_what_a_whole_pass_gives(tmp_path) -> None:
    model = tiny_decoder()
    task, reference = evaluated(model, tmp_path)
    result = quantized(model)
    again = again_of(result, model)
    found = {cost.module: cost.kl for cost in attribute(again, task, reference).modules}
    assert set(found) == set(again.units()) and len(found) == 14
    for path in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"):
        with again.substituted(path):
            assert found[path] == task.evaluate(lambda b: result.model(b["input_ids"]), reference)["kl"]


def test_quantized_inputs_are_float_again_with_their_module_and_taps_alone(tmp_path) -> None:
    model = tiny_decoder()
    rules = (Rule("*:weight", int_weight(8)), Rule("*:input", int_activation(3)), Rule("*:k", int_activation(3)))
    again = again_of(quantized(model, rules=rules), model)
    taps = [path for path in again.units() if ".taps." in path]
    assert taps == [f"model.layers.{i}.self_attn.taps.k.handlers.0" for i in range(2)]
    task, reference = evaluated(model, tmp_path)
    found = attribute(again, task, reference)
    assert found.kl_float < 1e-6 < 1e-3 < found.kl
    assert {cost.kind for cost in found.modules if cost.module in taps} == {"self_attn.taps.k.handlers.*"}


def test_a_module_at_two_paths_is_put_back_at_both() -> None:
    model = tiny_decoder()
    result = quantized(model)
    shared = result.model.get_submodule("model.layers.0.mlp")
    result.model.get_submodule("model.layers.1")._modules["mlp"] = shared
    again = again_of(result, model)
    with again.substituted("model.layers.0.mlp.up_proj"):
        assert type(result.model.get_submodule("model.layers.1.mlp.up_proj")) is nn.Linear


def test_the_first_part_of_a_task_is_measured_against_the_first_part_of_its_reference(tmp_path) -> None:
    model, other = tiny_decoder(), tiny_decoder(seed=1)
    task, reference = evaluated(model, tmp_path)
    part, of_part = task.part(35, reference)
    assert part.windows.shape == (2, 16) and of_part.rows == 30
    alone = LanguageModeling(task.windows[:2])
    expected = alone.evaluate(lambda b: other(b["input_ids"]), alone.reference(lambda b: model(b["input_ids"]), tmp_path / "alone"))
    assert part.evaluate(lambda b: other(b["input_ids"]), of_part) == expected


@pytest.mark.parametrize(
    ("site", "expected"),
    [
        ("model.layers.3.mlp.down_proj:weight", ("model.layers.3", "3", "mlp.down_proj")),
        ("model.layers.3.mlp.experts:up_proj[7]", ("model.layers.3", "3", "mlp.experts.up_proj")),
        ("model.layers.3.mlp.experts.up_proj.7", ("model.layers.3", "3", "mlp.experts.up_proj.*")),
        ("lm_head:weight", ("", "", "lm_head")),
        ("0:weight", ("0", "0", "0")),
    ],
)
def test_kinds_leave_the_layer_out(site: str, expected: tuple[str, str, str]) -> None:
    assert split_site(site) == expected and kind_of(site) == expected[2]
