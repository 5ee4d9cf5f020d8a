"""RWKV-6 and RWKV-7: equal to their recurrence, to the published package's own output, and true to their topologies."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from qcore.errors import CheckpointError
from qcore.model.reader import materialize
from qcore.model.source import LoadedModel
from qcore.testing import check_adapter
from qcore.testing.models import randomize
from qplug_ssm.rwkv7 import wkv7_chunked, wkv7_sequential
from qplug_ssm.rwkv_adapter import RWKV4Adapter, RWKV6Adapter, RWKV7Adapter
from qplug_ssm.rwkv_files import RWKVFiles
from qplug_ssm.testing import Tensors, logits_of, rwkv6, rwkv7
from safetensors.torch import save_file
from torch import nn

MAKE = {6: rwkv6, 7: rwkv7}
ADAPTER = {6: RWKV6Adapter, 7: RWKV7Adapter}
TOKENS = [3, 17, 5, 5, 39, 0, 21, 8, 8, 30, 2, 11, 4, 36, 19, 7, 23, 1, 12]  # more than one chunk


def opened(path: Path, dtype: torch.dtype = torch.float64) -> nn.Module:
    loaded: LoadedModel = RWKVFiles().load(str(path))
    materialize(loaded.model, "", loaded.reader, dtype)
    return loaded.model


@pytest.fixture(params=[6, 7])
def published(request, tmp_path) -> tuple[int, Tensors, Path]:
    tensors = MAKE[request.param]()
    path = tmp_path / f"RWKV-{request.param}.pth"
    torch.save(tensors, path)
    return request.param, tensors, path


def test_a_published_file_gives_the_logits_of_the_written_out_recurrence(published):
    version, tensors, path = published
    with torch.no_grad():
        logits = opened(path)(torch.tensor([TOKENS]))[0]
    torch.testing.assert_close(logits, logits_of(tensors, TOKENS, version), rtol=1e-9, atol=1e-10)


def test_safetensors_gives_the_same_model_as_pth(published, tmp_path):
    _, tensors, path = published
    save_file(tensors, tmp_path / "m.safetensors")
    one, other = opened(path).state_dict(), opened(tmp_path / "m.safetensors").state_dict()
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_files_of_old_versions_of_torch_are_read(published, tmp_path):
    _, tensors, path = published
    torch.save(tensors, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    one, other = opened(path).state_dict(), opened(tmp_path / "old.pth").state_dict()
    assert all(torch.equal(one[k], other[k]) for k in one)


def test_streaming_equals_parallel(published):
    _, _, path = published
    model, tokens = opened(path), torch.tensor([TOKENS, TOKENS[::-1]])
    with torch.no_grad():
        whole = model(tokens)
        state = model.empty_state(2)
        pieces = [model(tokens[:, a:b], state) for a, b in ((0, 7), (7, 8), (8, 9), (9, 19))]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-9, atol=1e-10)


def test_topology_is_true(published):
    version, _, path = published
    check_adapter(ADAPTER[version](), randomize(opened(path)), torch.tensor([TOKENS]))


def test_every_linear_and_every_elementwise_vector_is_a_site(published):
    version, _, path = published
    model = opened(path)
    sites = {str(s) for s in ADAPTER[version]().topology(model).sites}
    linears = {f"{n}:weight" for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "head"}
    vectors = {f"{n.removesuffix('.mu')}:mu" for n, _ in model.named_parameters() if n.endswith(".mu")}
    assert sites == linears | vectors
    assert len(vectors) == (3 * 10 if version == 7 else 3 * 9)


def test_chunked_recurrence_equals_sequential_from_any_state():
    g = torch.Generator().manual_seed(1)
    r, k, v = (torch.randn(2, 3, 37, 8, generator=g, dtype=torch.float64) for _ in range(3))
    kk = torch.nn.functional.normalize(torch.randn(2, 3, 37, 8, generator=g, dtype=torch.float64), dim=-1)
    log_w = -0.6 * torch.rand(2, 3, 37, 8, generator=g, dtype=torch.float64)
    b = kk * torch.rand(2, 3, 37, 8, generator=g, dtype=torch.float64)
    start = torch.randn(2, 3, 8, 8, generator=g, dtype=torch.float64)
    for one, other in zip(wkv7_chunked(start, r, log_w, k, v, -kk, b), wkv7_sequential(start, r, log_w, k, v, -kk, b), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("version", [6, 7])
def test_logits_are_those_of_the_package_rwkv(version, tmp_path, monkeypatch, capsys):
    spec = importlib.util.find_spec("rwkv")
    if spec is None:
        pytest.skip("the package rwkv (the published implementation) is not installed")
    tensors = MAKE[version](width=64, head=64 if version == 7 else 32, ffn=64)
    path = tmp_path / "model.pth"
    torch.save({n: t.clone() for n, t in tensors.items()}, path)
    monkeypatch.setenv("RWKV_V7_ON", str(int(version == 7)))
    monkeypatch.setenv("RWKV_JIT_ON", "0")
    monkeypatch.setenv("RWKV_CUDA_ON", "0")
    # the version is chosen by the environment while the module is imported
    source = importlib.util.spec_from_file_location(f"rwkv_oracle_{version}", os.path.join(os.path.dirname(spec.origin), "model.py"))
    oracle = importlib.util.module_from_spec(source)
    sys.modules[source.name] = oracle
    source.loader.exec_module(oracle)
    theirs = oracle.RWKV(model=str(path).removesuffix(".pth"), strategy="cpu fp32")
    expected, _ = theirs.forward(TOKENS, None, full_output=True)
    with torch.no_grad():
        ours = opened(path, torch.float32)(torch.tensor([TOKENS]))[0]
    torch.testing.assert_close(ours, expected.float(), rtol=1e-4, atol=1e-4)  # float32 sums; the package writes exp(-1/2) as 0.606531


# what cannot be loaded -------------------------------------------------------------------------------------------------------------------


def refuse(path: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as e:
        RWKVFiles().load(str(path))
    assert all(w in str(e.value) for w in (path.name, *words)), str(e.value)


def test_other_versions_are_named(tmp_path):
    path = tmp_path / "old.pth"
    torch.save({"emb.weight": torch.zeros(4, 4), "blocks.0.att.time_mix_k": torch.zeros(4)}, path)
    refuse(path, "RWKV-4", "transformers")
    torch.save({"emb.weight": torch.zeros(4, 4), "blocks.0.att.ln_x.weight": torch.zeros(4)}, path)
    refuse(path, "RWKV-5")
    torch.save({"encoder.weight": torch.zeros(4, 4)}, path)
    refuse(path, "encoder.weight", "RWKV-7")


def test_a_missing_or_spare_or_misshapen_tensor_is_named(tmp_path):
    path = tmp_path / "m.pth"
    torch.save({n: t for n, t in rwkv7().items() if n != "blocks.1.att.x_g"}, path)
    refuse(path, "blocks.1.att.x_g")
    torch.save(rwkv7() | {"blocks.1.att.extra": torch.zeros(2)}, path)
    refuse(path, "blocks.1.att.extra")
    torch.save(rwkv7() | {"blocks.1.ffn.key.weight": torch.zeros(47, 32)}, path)
    refuse(path, "blocks.1.ffn.key.weight", "47", "48")


def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path):
    path = tmp_path / "evil.pth"
    torch.save({"emb.weight": nn.Linear(2, 2)}, path)
    refuse(path, "execute code")
    path.write_bytes(b"not a checkpoint")
    refuse(path)


def test_a_folder_of_another_model_type_is_left_to_others(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert not RWKVFiles().matches(str(tmp_path))


# version 4 -------------------------------------------------------------------------------------------------------------------------------


def tiny_v4(layers: int = 2) -> nn.Module:
    from transformers import RwkvConfig, RwkvForCausalLM

    config = RwkvConfig(vocab_size=40, hidden_size=24, attention_hidden_size=24, num_hidden_layers=layers, intermediate_size=40, context_length=32)
    config.tie_word_embeddings = False
    return randomize(RwkvForCausalLM(config)).eval()


def test_topology_of_version_4_is_true():
    check_adapter(RWKV4Adapter(), tiny_v4(), torch.tensor([TOKENS]), rtol=1e-5)  # transformers computes exponents in float32


def test_version_4_no_longer_rewrites_its_weights_when_it_runs():
    model = tiny_v4(layers=8)
    model.config.rescale_every = 6
    model.double()
    with torch.no_grad():
        before = model.rwkv.blocks[7].attention.output.weight.clone()
        expected = model(torch.tensor([TOKENS])).logits
        assert not torch.equal(before, model.rwkv.blocks[7].attention.output.weight), "transformers no longer rescales: prepare() has nothing to do"
        RWKV4Adapter().prepare(model)
        assert torch.equal(before, model.rwkv.blocks[7].attention.output.weight)
        torch.testing.assert_close(RWKV4Adapter().outputs(model, torch.tensor([TOKENS])), expected, rtol=1e-4, atol=1e-5)  # LayerNorm's epsilon


def test_what_the_zoo_trains_is_loaded(tmp_path):
    script = Path(__file__).parents[3] / "tools/zoo/rwkv7.py"
    if not script.is_file():
        pytest.skip("the zoo's training scripts are part of the repository alone")
    source = importlib.util.spec_from_file_location("zoo_rwkv7", script)
    zoo = importlib.util.module_from_spec(source)
    sys.modules[source.name] = zoo
    source.loader.exec_module(zoo)
    theirs = zoo.RWKV7(zoo.RWKV7Config(vocab_size=40, n_layer=2, n_embd=64, head_size=16, ffn_size=48, decay_lora=4, a_lora=4, v_lora=4, gate_lora=6))
    randomize(theirs)
    (tmp_path / "config.json").write_text(json.dumps(theirs.config_json()))
    save_file({n: t.contiguous() for n, t in theirs.state_dict().items()}, tmp_path / "model.safetensors")
    with torch.no_grad():
        expected = theirs(torch.tensor([TOKENS]))
        torch.testing.assert_close(opened(tmp_path, torch.float32)(torch.tensor([TOKENS])), expected, rtol=1e-4, atol=1e-4)  # float32 sums of 64
