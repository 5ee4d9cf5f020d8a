"""The consumer's side: what plain transformers makes of a checkpoint, and what it makes of one that it cannot read."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from qcore.checkpoint import Manifest, load, prove, save
from qcore.modules import QuantizedLinear
from qcore.modules.linear import as_stored
from qcore.numbers import FP8_E4M3, Int, PerChannel, QuantSpec, Tile, fp8_activation, int_activation, int_weight, mx
from qcore.ops import ReferenceLinear, TorchInt4Linear

transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

_spec = importlib.util.spec_from_file_location("checkpoint_conftest", Path(__file__).with_name("conftest.py"))
helpers = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(helpers)

FP8 = QuantSpec(format=FP8_E4M3, granularity=PerChannel(0), scale="bfloat16")
FP8_BLOCK = QuantSpec(format=FP8_E4M3, granularity=Tile(128, 128), scale="bfloat16")


def logits(model, x):
    with torch.no_grad():
        return model(x).logits


def quantized(registry, spec, activation=None, **more):
    model = helpers.tiny_llama(**more)
    return helpers.quantize_leaves(model, spec, registry, activation=activation, skip={"lm_head"})


@pytest.mark.parametrize(
    ("spec", "dtype", "format"),
    [
        (int_weight(4, 32), torch.float32, "pack-quantized"),
        (int_weight(2, 16, scale="bfloat16"), torch.float32, "pack-quantized"),
        (int_weight(8), torch.float32, "pack-quantized"),
        (int_weight(4, 32), torch.float16, "pack-quantized"),
        (FP8, torch.float32, "float-quantized"),
        (FP8_BLOCK, torch.bfloat16, "float-quantized"),
    ],
    ids=str,
)
def test_plain_transformers_gives_the_same_logits_bit_for_bit(spec, dtype, format, registry, tmp_path):
    model = quantized(registry, spec, dtype=dtype)
    manifest = save(model, tmp_path / "out", companions=helpers.write_config(model), registry=registry, source="hf-config")
    assert manifest.layout == "compressed-tensors"
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format"] == format and config["ignore"] == ["lm_head"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.dtype == dtype
    x = helpers.tokens()
    # transformers rounds the weight to its dtype and multiplies; a kernel of ours may keep more
    with as_stored(model):
        assert torch.equal(logits(theirs, x), logits(model, x))
    assert torch.equal(logits(load(tmp_path / "out", registry=registry), x), logits(model, x))


def test_a_model_quantized_in_float32_is_served_in_the_dtype_of_its_source(registry, tmp_path):
    model = quantized(registry, int_weight(4, 16, scale="bfloat16"), dtype=torch.bfloat16).float()
    manifest = save(model, tmp_path / "out", dtype=torch.bfloat16, companions=helpers.write_config(model), registry=registry, source="hf-config")
    assert manifest.dtype == "bfloat16" and manifest.layout == "compressed-tensors"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    x = helpers.tokens()
    assert logits(model, x).dtype == torch.bfloat16
    assert prove(tmp_path / "out", model, [x], registry=registry).level == "identical"


def test_the_4_bit_kernel_rounds_like_bfloat16_does(registry, tmp_path):
    spec = int_weight(4, 32, scale="bfloat16")
    model = quantized(registry, spec, dtype=torch.bfloat16)
    registry.kernels = helpers.Shelf([TorchInt4Linear, ReferenceLinear])
    helpers.bind_all(model, registry, torch.bfloat16)
    assert model.model.layers[0].mlp.up_proj.explain().kernel.name == "torch-int4-linear"
    save(model, tmp_path / "out", companions=helpers.write_config(model), registry=registry, source="hf-config")
    x = helpers.tokens()
    before = logits(model, x)
    proof = prove(tmp_path / "out", model, [x], registry=registry)
    # what is stored is the same bit for bit; as it runs, each of 14 layers is rounded to 8 bits of mantissa in another order
    assert proof.level == "identical" and proof.loader == "transformers.LlamaForCausalLM.from_pretrained"
    assert 0 < proof.as_run < 0.03
    # the proof leaves the model as it was
    assert model.model.layers[0].mlp.up_proj.explain().kernel.name == "torch-int4-linear"
    assert torch.equal(logits(model, x), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("spec", "activation"), [(FP8, fp8_activation()), (int_weight(8, scale="bfloat16"), int_activation())], ids=str)
def test_a_proof_tells_the_stored_weights_from_how_inputs_are_rounded(spec, activation, dtype, registry, tmp_path):
    model = quantized(registry, spec, activation, dtype=dtype)
    save(model, tmp_path / "out", companions=helpers.write_config(model), registry=registry, source="hf-config")
    x = helpers.tokens()
    before = logits(model, x)
    proof = prove(tmp_path / "out", model, [x], registry=registry)
    assert proof.level == "identical"
    # E4M3 inputs are scaled alike in float32; in bfloat16 they round the scale too, and int8 inputs they scale by amax / 127.5
    assert (proof.as_run == 0) == (dtype == torch.float32 and activation == fp8_activation())
    assert torch.equal(logits(model, x), before)


@pytest.mark.parametrize(("spec", "activation"), [(FP8, fp8_activation()), (int_weight(8), int_activation())], ids=str)
def test_quantized_inputs_agree_to_the_rounding_of_inputs(spec, activation, registry, tmp_path):
    model = quantized(registry, spec, activation)
    manifest = save(model, tmp_path / "out", companions=helpers.write_config(model), registry=registry, source="hf-config")
    assert manifest.layout == "compressed-tensors"
    scheme = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    assert scheme["input_activations"]["strategy"] == "token" and scheme["format"] in ("int-quantized", "float-quantized")
    x = helpers.tokens()
    assert torch.equal(logits(load(tmp_path / "out", registry=registry), x), logits(model, x))
    mine, theirs = logits(model, x), logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out"), x)
    if activation == fp8_activation():
        # both scale E4M3 inputs by amax / 448
        assert torch.equal(mine, theirs)
        return
    # compressed-tensors scales int8 inputs by amax / 127.5 where qcore and vLLM take amax / 127, so most roundings fall otherwise: two independent
    # errors of one size, which are √2 of it apart
    for m in model.modules():
        if isinstance(m, QuantizedLinear):
            m.activation = None
            m.bind([registry.kernels["reference-linear"]()])
    exact = logits(model, x)
    own, other = (mine - exact).norm(), (theirs - exact).norm()
    assert 0.01 < own / exact.norm() < 0.1
    assert 0.75 < other / own < 1.33
    assert (mine - theirs).norm() < 1.2 * 2**0.5 * own


def test_several_schemes_of_one_format_name_their_modules(registry, tmp_path):
    model = helpers.tiny_llama()
    helpers.quantize_leaves(model.model.layers[0], int_weight(4, 32), registry)
    helpers.quantize_leaves(model.model.layers[1], int_weight(8), registry)
    save(model, tmp_path / "out", companions=helpers.write_config(model), registry=registry)
    groups = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"]
    assert [g["weights"]["num_bits"] for g in groups.values()] == [4, 8]
    x = helpers.tokens()
    assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out"), x), logits(model, x))


def test_a_bias_is_added_after_the_product(registry, tmp_path):
    model = quantized(registry, int_weight(4, 32), bias=True)
    for m in model.modules():
        if isinstance(m, QuantizedLinear) and m.bias is not None:
            m.bias.data.normal_()
    save(model, tmp_path / "out", companions=helpers.write_config(model), registry=registry)
    x = helpers.tokens()
    theirs = logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out"), x)
    # transformers adds the bias inside of the product: one float32 rounding apart in each of 8 layers
    torch.testing.assert_close(theirs, logits(model, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("head", ["float", "quantized"])
def test_ties_survive_or_are_cut_for_good(head, registry, tmp_path):
    model = helpers.tiny_llama(tied=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    helpers.quantize_leaves(model, int_weight(4, 32), registry, skip={"lm_head"} if head == "float" else ())
    manifest = save(model, tmp_path / "out", companions=helpers.write_config(model), registry=registry, source="hf-config")
    assert manifest.ties == ({"lm_head.weight": "model.embed_tokens.weight"} if head == "float" else {})
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is (head == "float")
    x = helpers.tokens()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(theirs, x), logits(model, x))
    mine = load(tmp_path / "out", registry=registry)
    assert torch.equal(logits(mine, x), logits(model, x))
    if head == "float":
        assert mine.lm_head.weight is mine.model.embed_tokens.weight


def test_shards_have_the_index_that_transformers_reads(registry, tmp_path):
    model = quantized(registry, int_weight(4, 32))
    manifest = save(model, tmp_path / "out", companions=helpers.write_config(model), registry=registry, source="hf-config", shard_bytes=40_000)
    assert len(manifest.files) > 2 and (tmp_path / "out" / "model.safetensors.index.json").is_file()
    x = helpers.tokens()
    assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out"), x), logits(model, x))
    assert torch.equal(logits(load(tmp_path / "out", registry=registry), x), logits(model, x))


@pytest.mark.parametrize(
    ("spec", "activation", "dtype", "reason"),
    [
        (int_weight(3, 32), None, torch.float32, "packing 'bits'"),
        (mx(), None, torch.float32, "packing 'bits'"),
        (int_weight(4, 32, asymmetric=True), None, torch.float32, "packing 'bits'"),
        (int_weight(8, scale="float32"), None, torch.bfloat16, "rounded to bfloat16"),
        (int_weight(8), int_activation(4), torch.float32, "not dynamic, symmetric and per token"),
    ],
    ids=str,
)
def test_what_the_portable_layout_cannot_say_is_saved_as_qcore(spec, activation, dtype, reason, registry, tmp_path):
    model = quantized(registry, spec, activation, dtype=dtype)
    manifest = save(model, tmp_path / "out", companions=helpers.write_config(model), registry=registry, source="hf-config")
    assert manifest.layout == "qcore" and reason in manifest.record["layout_reasons"][0]
    x = helpers.tokens()
    assert torch.equal(logits(load(tmp_path / "out", registry=registry), x), logits(model, x))


def saved_as_qcore(registry, folder, **more):
    model = quantized(registry, int_weight(3, 32), **more)
    save(model, folder, companions=helpers.write_config(model), registry=registry, source="hf-config")
    return model


def test_without_the_import_transformers_refuses_the_qcore_layout(registry, tmp_path, monkeypatch):
    from transformers.quantizers import auto

    # another test may have imported qcore.hf already
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "qcore", raising=False)
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "qcore", raising=False)
    saved_as_qcore(registry, tmp_path / "out")
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("tied", [False, True])
def test_with_the_import_transformers_loads_the_qcore_layout_bit_for_bit(tied, registry, tmp_path, monkeypatch):
    monkeypatch.setattr("qcore.plugins.load_registry", lambda: registry)
    import qcore.hf

    qcore.hf.register()  # a second time changes nothing
    model = saved_as_qcore(registry, tmp_path / "out", dtype=torch.bfloat16, bias=True, tied=tied)
    x = helpers.tokens()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", variant="qcore")
    assert theirs.dtype == torch.bfloat16
    assert torch.equal(logits(theirs, x), logits(model, x))
    theirs.save_pretrained(tmp_path / "again", variant="qcore")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", variant="qcore")
    assert torch.equal(logits(again, x), logits(model, x))
    assert again.generate(x[:1, :4], max_new_tokens=3, do_sample=False).shape == (1, 7)


def test_a_proof_notices_a_changed_weight(registry, tmp_path):
    model = quantized(registry, int_weight(4, 32))
    save(model, tmp_path / "out", companions=helpers.write_config(model), registry=registry, source="hf-config")
    proof = prove(tmp_path / "out", model, [helpers.tokens(1), helpers.tokens(2)])
    assert proof.level == "identical" and proof.batches == 2 and proof.max_output > 0.1
    assert json.loads((tmp_path / "out" / "proof.json").read_text())["versions"]["transformers"] == transformers.__version__
    model.model.layers[0].mlp.up_proj.weight_scale.mul_(2)
    assert prove(tmp_path / "out", model, [helpers.tokens()]).level == "different"


@pytest.mark.slow
def test_a_proof_in_a_fresh_process(registry, tmp_path):
    model = quantized(registry, int_weight(4, 32))
    save(model, tmp_path / "out", companions=helpers.write_config(model), registry=registry)
    proof = prove(tmp_path / "out", model, [helpers.tokens()], fresh=True)
    assert proof.level == "identical" and proof.fresh


def test_the_manifest_says_where_things_come_from(registry, tmp_path):
    saved_as_qcore(registry, tmp_path / "out")
    manifest = Manifest.read(tmp_path / "out")
    assert manifest.origins == {
        "modules": {"quantized-linear": "qcore"},
        "formats": {"int": "qcore"},
        "packings": {"bits": "qcore"},
        "sources": {"hf-config": "qcore"},
    }
    entry = manifest.modules["model.layers.0.mlp.up_proj"]
    assert entry.config["shape"] == [128, 64] and entry.config["spec"]["format"] == {"name": "int", "bits": 3, "signed": True}
    assert Int(3).bits == 3
