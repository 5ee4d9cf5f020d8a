"""What serving programs make of a plan, before the plan is run."""

from types import SimpleNamespace

import pytest
from qcore.engines import ENGINES, Weight, llama_cpp, onnxruntime, transformers, vllm
from qcore.numbers import FP8_E4M3, Int, PerTensor, QuantSpec, fp8_activation, fp8_weight, int_activation, int_weight

LLAMA = SimpleNamespace(num_attention_heads=32, num_key_value_heads=8)
NAMES = {"q_proj": (4096, 4096), "k_proj": (1024, 4096), "v_proj": (1024, 4096), "o_proj": (4096, 4096)}
NAMES |= {"gate_proj": (14336, 4096), "up_proj": (14336, 4096), "down_proj": (4096, 14336)}


def llama(spec=None, packing="ct-pack", activation=None, **others: Weight) -> list[Weight]:
    spec = spec or int_weight(4, 128)
    return [others.get(name) or Weight(f"layers.0.{name}", shape, spec, activation, packing) for name, shape in NAMES.items()]


def test_an_ordinary_checkpoint_is_served_and_split():
    assert not transformers(llama(), LLAMA).problems()
    verdict = vllm(llama(), LLAMA)
    assert (verdict.reasons, verdict.notes) == ((), ())
    assert verdict.parallel == {1: (), 2: (), 4: (), 8: ()}
    w8a8 = llama(int_weight(8), "ct-int", int_activation(8))
    assert not vllm(w8a8, LLAMA).problems(8) and not transformers(w8a8, LLAMA).problems()


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (llama(int_weight(3, 128), "bits"), "layers.0.q_proj and 6 more: packing 'bits' is none of compressed-tensors'"),
        (llama(int_weight(2, 128)), "4 or 8 bits, got 2"),
        (llama(int_weight(4, 16)), "groups of 32, 64 or 128, got 16"),
        (llama(activation=int_activation(8)), "pack-quantized weights have float inputs"),
        (llama(int_weight(8), "ct-int"), "with int8 inputs"),
        (llama(int_weight(8), "ct-int", QuantSpec(format=Int(8), granularity=PerTensor())), "not dynamic, symmetric and per token"),
        (
            llama(k_proj=Weight("layers.0.k_proj", (1024, 4096), int_weight(8, 128), None, "ct-pack")),
            "layers.0: vLLM fuses q_proj and k_proj and v_proj into one layer, which must be stored alike",
        ),
        (llama(up_proj=Weight("layers.0.up_proj", (14336, 4096), None)), "gate_proj int4 per group 128, scale float16, up_proj float"),
    ],
)
def test_what_vllm_cannot_load(weights, said):
    verdict = vllm(weights, LLAMA)
    assert any(said in reason for reason in verdict.reasons), verdict.reasons
    assert verdict.parallel == {} and verdict.problems(4) == verdict.reasons


def test_what_cannot_be_split_names_the_layer_and_the_degree():
    down = Weight("layers.0.down_proj", (2048, 5632), int_weight(4, 128), None, "ct-pack")  # TinyLlama: 44 groups
    verdict = vllm(llama(down_proj=down), SimpleNamespace(num_attention_heads=12, num_key_value_heads=4))
    assert verdict.parallel[4] == () and verdict.parallel[2] == ()
    assert verdict.parallel[8] == (
        "12 attention heads are not divided by 8",
        "layers.0.down_proj: 5632 inputs over 8 devices leave 704 each, which groups of 128 do not divide",
    )
    assert verdict.problems(8) == verdict.parallel[8]
    assert "was not judged" in verdict.problems(3)[0]


def test_key_value_heads_that_divide_the_degree_are_repeated():
    few = {n: Weight(f"layers.0.{n}", (2 * 129, 4096), int_weight(4, 128), None, "ct-pack") for n in ("k_proj", "v_proj")}
    verdict = vllm(llama(**few), SimpleNamespace(num_attention_heads=32, num_key_value_heads=2))
    assert verdict.parallel[4] == () and verdict.parallel[8] == ()
    assert "3 key-value heads neither divide nor" in vllm(llama(), SimpleNamespace(num_attention_heads=24, num_key_value_heads=3)).parallel[2][0]


def test_shapes_that_marlin_has_no_tiles_for_are_noted_not_refused():
    odd = Weight("layers.0.q_proj", (576, 576), int_weight(4, 64), None, "ct-pack")
    verdict = vllm([odd], SimpleNamespace(num_attention_heads=9, num_key_value_heads=3))
    assert not verdict.reasons
    assert verdict.notes == ("layers.0.q_proj: [576, 576] is no multiple of Marlin's tile of 64 × 128: vLLM takes a slower kernel, or none",)


def test_fused_layers_with_a_scale_each_are_said_to_be_rounded_anew():
    fp8 = QuantSpec(format=FP8_E4M3, granularity=PerTensor())
    verdict = vllm(llama(fp8, "ct-float", fp8_activation()), LLAMA)
    assert not verdict.reasons
    (note,) = verdict.notes
    assert note.startswith("layers.0.q_proj and 4 more: vLLM fuses it") and "per channel" in note  # o_proj and down_proj stand alone
    assert vllm(llama(fp8_weight(), "ct-float", fp8_activation()), LLAMA).notes == ()


def test_engines_whose_files_qcore_does_not_write_say_so_and_what_else_is_wrong():
    odd = [Weight("layers.0.q_proj", (64, 72), int_weight(4, 24), None, "bits")]
    assert [r.partition(":")[2] for r in llama_cpp(odd, LLAMA).reasons[1:]] == [" its blocks of 32 do not divide K=72"]
    assert "blocks of a power of two from 16 on, got 24" in onnxruntime(odd, LLAMA).reasons[1]
    assert set(ENGINES) == {"transformers", "vllm", "llama.cpp", "onnxruntime"}
