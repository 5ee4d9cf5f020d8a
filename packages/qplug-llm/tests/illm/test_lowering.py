"""What is lowered, what is refused, and FSBR's scales through SwiGLU."""

import copy

import pytest
import torch
from qcore.checkpoint import load, save
from qcore.checkpoint.lowering import stored_weights
from qcore.errors import SpecError
from qcore.model.topology import Topology
from qcore.plugins import load_registry
from qcore.testing import check_module
from qcore.transforms import SmoothQuant
from qcore.transforms.apply import apply_rewrite
from qcore.transforms.learn_static import LearnStatic
from qplug_llm.illm import ILLM, PAPER, lower
from qplug_llm.illm.reading import differs, foreign, logits
from qplug_llm.illm.swiglu_smooth import SplitSiLU, SwiGLUSmooth, is_silu, split_swiglu
from torch import nn

BATCHES = [torch.randint(3, 61, (4, 20), generator=torch.Generator().manual_seed(2))]


def test_the_lowering_is_found_by_its_name():
    registry = load_registry()
    assert registry.lowerings["i-llm"] is ILLM
    assert {"illm-w8a8", "illm-w6a6", "illm-w4a4"} <= set(registry.recipes)


def test_what_is_read_is_what_the_class_computes(model, ids):
    assert foreign(model) == [] and differs(model) is None
    double = copy.deepcopy(model).double()
    with torch.no_grad():
        own = double(input_ids=ids).logits
    torch.testing.assert_close(logits(double, ids), own, rtol=0, atol=1e-5)  # norms of transformers compute in float32


@pytest.mark.parametrize(
    ("cls", "changes", "reason"),
    [
        ("Qwen3", {}, "has a module 'k_norm'"),
        ("Gemma", {"hidden_act": "silu", "hidden_activation": "silu"}, "computes something else than a Llama: on a twin the logits differ"),
        ("Granite", {"residual_multiplier": 0.5}, "computes something else than a Llama"),
        ("Mistral", {"sliding_window": 8}, "sliding window"),
        ("Llama", {"hidden_act": "gelu"}, "DI-SwiGLU is made of SiLU"),
        ("Llama", {"attention_bias": True}, "has a bias, which DI-MatMul does not add"),
        ("Phi", {}, "it has no module 'model.norm'"),
    ],
)
def test_families_that_compute_something_else_are_refused(build, cls, changes, reason):
    run = build.quantized(build.model(cls, **changes), build.recipe())
    with pytest.raises(SpecError, match=reason):
        lower(run)


def test_mistral_without_a_window_is_a_llama(build, ids):
    own = build.model("Mistral", sliding_window=None)
    run = build.quantized(own, build.recipe())
    with torch.no_grad():
        exact = own(input_ids=ids).logits.double()
    assert float((lower(run)(ids).dequantize() - exact).square().mean() / exact.square().mean()) < 0.02


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"scale": "float16"}, r"scales in float16; bfloat16 ones are dyadic numbers with 8-bit m.*scale 'bfloat16'"),
        ({"offset": "none"}, "without a zero point; the integer program has one for every token: offset 'code'"),
    ],
)
def test_what_is_not_stored_for_integers_is_refused(build, model, changes, reason):
    with pytest.raises(SpecError, match=reason):
        lower(build.quantized(model, build.recipe(**changes)))


def test_a_float_model_is_refused_with_every_layer(model):
    reasons = ILLM().refuses(model, Topology(()), stored_weights(model))
    assert len(reasons) == 14 and all("not quantized; let a rule cover it" in r for r in reasons)


def test_a_saved_checkpoint_gives_the_same_program(build, run, program, ids, tmp_path):
    save(run.model, tmp_path / "out", registry=load_registry(), adapter="decoder-lm")
    again = lower(load(tmp_path / "out", skeleton=build.model(), registry=load_registry()))
    assert torch.equal(again(ids).x, program(ids).x)


def test_the_codes_of_the_checkpoint_are_those_of_the_program(run, program):
    weights = {site.module: q for site, q in stored_weights(run.model).items()}
    own = weights["model.layers.1.mlp.down_proj"]
    mine = program.blocks[1].mlp.down.weight
    assert torch.equal(mine.codes, own.codes) and torch.equal(mine.dequantize().float(), own.dequantize())


# scales through SwiGLU -------------------------------------------------------------------------------------------------------------------


def scales(size: int, seed: int) -> torch.Tensor:
    return 0.1 * 100 ** torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("seed", range(3))
def test_scales_through_swiglu_leave_the_function_as_it_is(model, ids, seed):
    double = copy.deepcopy(model).double()
    rewrite = split_swiglu("model.layers.0.mlp", scales(80, seed)).then(split_swiglu("model.layers.1.mlp", scales(80, seed + 9)))
    # the buffer is float32 in a checkpoint; here it is what the weights were scaled by
    changed = apply_rewrite(double, rewrite, load_registry().modules).double()
    for i, s in enumerate((scales(80, seed), scales(80, seed + 9))):
        changed.model.layers[i].mlp.act_fn.s = 1 / s
    with torch.no_grad():
        torch.testing.assert_close(changed(input_ids=ids).logits, double(input_ids=ids).logits, rtol=0, atol=1e-12)
    torch.testing.assert_close(logits(changed, ids), logits(double, ids), rtol=0, atol=1e-12)


def test_swiglu_smooth_makes_gate_and_up_alike(build):
    own = build.model()
    for layer in own.model.layers:
        layer.mlp.gate_proj.weight[5] *= 30
        layer.mlp.up_proj.weight[9] *= 30
    run = build.quantized(own, build.recipe(transforms=(SwiGLUSmooth(),)), BATCHES)
    mlp = run.model.model.layers[0].mlp
    assert isinstance(mlp.act_fn, SplitSiLU)
    gate, up = (m.dequantize().square().sum(-1).sqrt() for m in (mlp.gate_proj, mlp.up_proj))
    assert 0.3 < float(gate[5] / up[5]) < 3 and 0.3 < float(gate[9] / up[9]) < 3


def test_scales_through_swiglu_help_where_eight_bits_lie_between(build, ids):
    own = build.model()
    for layer in own.model.layers:  # one loud gate channel with a quiet partner: it takes the levels of all others
        layer.mlp.gate_proj.weight[5] *= 100
        layer.mlp.up_proj.weight[5] /= 100
    with torch.no_grad():
        exact = own(input_ids=ids).logits.double()

    def error(transforms: tuple) -> float:
        found = lower(build.quantized(own, build.recipe(transforms=transforms), BATCHES), PAPER)(ids).dequantize()
        return float((found - exact).square().mean() / exact.square().mean())

    assert error((SwiGLUSmooth(),)) < 0.7 * error(())


def test_a_lowered_model_with_all_scales_is_near_to_the_float_one(build, model, ids):
    run = build.quantized(model, build.recipe(transforms=(SmoothQuant(), SwiGLUSmooth())), BATCHES)
    with torch.no_grad():
        exact = model(input_ids=ids).logits.double()
    assert float((lower(run)(ids).dequantize() - exact).square().mean() / exact.square().mean()) < 0.02


def test_learned_scales_and_clipping_are_lowered(build, model, ids):
    learned = LearnStatic(ranges=False, target="block", steps=4, batch=2, length=20, held_out=2)
    run = build.quantized(model, build.recipe(transforms=(learned, SwiGLUSmooth())), BATCHES)
    assert any("learned 4 steps block by block" in note for note in run.notes)
    program = lower(run)
    with torch.no_grad():
        exact = model(input_ids=ids).logits.double()
    assert all(block.mlp.smooth is not None for block in program.blocks)
    assert float((program(ids).dequantize() - exact).square().mean() / exact.square().mean()) < 0.02


def test_split_silu_is_a_module_of_checkpoints():
    module = SplitSiLU(12)
    module.s = torch.rand(12) + 0.5
    check_module(module, torch.randn(3, 12))


def test_silu_is_known_by_what_it_computes():
    assert is_silu(nn.SiLU()) and not is_silu(nn.GELU()) and not is_silu(nn.Linear(2, 2)) and not is_silu(nn.ReLU())


def test_alpha_is_between_zero_and_one():
    with pytest.raises(SpecError, match="alpha lies between 0"):
        SwiGLUSmooth(alpha=1.5)


def test_an_mlp_without_silu_is_left_alone_with_a_note(build):
    own = build.model("Llama", hidden_act="gelu")
    run = build.quantized(own, build.recipe(transforms=(SwiGLUSmooth(),)), BATCHES)
    assert any("is no SwiGLU of gate_proj, up_proj and act_fn" in note for note in run.notes)
