"""Models of open_clip, taken over into transformers' CLIP: the same outputs, and what cannot be taken over is named."""

import json
from pathlib import Path

import pytest
import torch
from qcore.checkpoint import load
from qcore.cli import main
from qcore.errors import CheckpointError, NotFound, SpecError
from qcore.model import adapter_for, load_source
from qcore.model.reader import materialize
from qcore.plugins import load_registry
from qcore.testing import check_source
from qplug_multimodal.openclip import OpenClip, clip_config, named, translated
from qplug_multimodal.two_tower import TwoTower
from safetensors.torch import save_file

open_clip = pytest.importorskip("open_clip", reason="the extra open-clip")

REGISTRY = load_registry()
SMALL = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 16, "patch_size": 8, "mlp_ratio": 2.5},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 48, "heads": 4, "layers": 2},
}


def made(**change):
    cfg = SMALL | change
    torch.manual_seed(0)
    model = open_clip.model.CLIP(**cfg).eval()
    for p in model.parameters():  # gains and biases too
        torch.nn.init.normal_(p, std=0.2)
    return cfg, model


def written(folder: Path, cfg, model) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": cfg, "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}})
    )
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return folder


def batch():
    g = torch.Generator().manual_seed(1)
    texts = open_clip.get_tokenizer("ViT-B-32")(["a dog", "two green cats on a mat", "a photograph of nothing at all"])
    return {"pixel_values": torch.randn(2, 3, 32, 32, generator=g).double(), "input_ids": texts}


@pytest.mark.parametrize("change", [{}, {"quick_gelu": True}], ids=["gelu", "quick gelu"])
def test_outputs_are_those_of_open_clip(tmp_path, change):
    cfg, model = made(**change)
    loaded = load_source(f"open_clip:{written(tmp_path / 'm', cfg, model)}", REGISTRY.sources)
    adapter = adapter_for(loaded.model, REGISTRY.adapters)
    assert isinstance(adapter, TwoTower) and loaded.dtype == torch.float32
    adapter.prepare(loaded.model)
    materialize(loaded.model, "", loaded.reader)
    x = batch()
    with torch.no_grad():
        images, texts, scale = model.double()(x["pixel_values"], x["input_ids"])
        own = adapter.outputs(loaded.model.double(), x)
    torch.testing.assert_close(own, scale * images @ texts.T, rtol=1e-12, atol=1e-12)


def test_the_source_is_one(tmp_path):
    folder = written(tmp_path / "m", *made())
    loaded = check_source(OpenClip(), f"open_clip:{folder}")
    assert loaded.data.processor.mean == (0.5, 0.5, 0.5)
    check_source(OpenClip(), f"open_clip:{folder}@random:3")


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("RN50", r"vision_cfg.layers = \[3, 4, 6, 3\], a ResNet"),
        ("ViT-B-16-SigLIP", "vision_cfg.timm_model_name"),
        ("coca_ViT-B-32", "multimodal_cfg"),
        ("EVA02-B-16", "custom_text"),
    ],
)
def test_other_kinds_are_refused_with_what_is_strange(model, reason):
    with pytest.raises(SpecError, match=reason):
        clip_config(named(model), model)


def test_the_usual_ones_are_taken_over():
    for name, heads in (("ViT-B-32", 12), ("ViT-L-14", 16), ("ViT-H-14", 16), ("ViT-bigG-14", 16)):
        assert clip_config(named(name), name).vision_config.num_attention_heads == heads
    assert clip_config(named("ViT-B-32-quickgelu"), "").text_config.hidden_act == "quick_gelu"


def test_errors_name_the_next_step(tmp_path):
    with pytest.raises(NotFound, match=r"no model 'ViT-B-33'.*it has ViT-B"):
        OpenClip().load("open_clip:ViT-B-33@random")
    with pytest.raises(NotFound, match=r"names no weights, and qcore downloads none; .*@random"):
        OpenClip().load("open_clip:ViT-B-32")
    with pytest.raises(SpecError, match="as in @random:7, got 'x'"):
        OpenClip().load("open_clip:ViT-B-32@random:x")
    with pytest.raises(NotFound, match=r"weights file nothing\.safetensors does not exist"):
        OpenClip().load("open_clip:ViT-B-32@nothing.safetensors")
    cfg, model = made()
    folder = written(tmp_path / "m", cfg | {"embed_dim": 32}, model)
    with pytest.raises(CheckpointError, match=r"gives \(24, 64\), visual_projection.weight is \(32, 64\)"):
        OpenClip().load(f"open_clip:{folder}")
    folder = written(tmp_path / "m", cfg | {"text_cfg": cfg["text_cfg"] | {"layers": 3}}, model)
    with pytest.raises(CheckpointError, match=r"lacks transformer\.resblocks\.2"):
        OpenClip().load(f"open_clip:{folder}")
    (folder / "open_clip_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="wants model_cfg"):
        OpenClip().load(f"open_clip:{folder}")


def test_a_file_of_torch_is_read_without_running_code(tmp_path):
    cfg, model = made()
    folder = written(tmp_path / "m", cfg, model)
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "w.pt")
    (folder / "open_clip_model.safetensors").unlink()
    reader = OpenClip().load(f"open_clip:{folder}@{tmp_path / 'w.pt'}").reader
    q = model.visual.transformer.resblocks[1].attn.in_proj_weight[:64]
    assert torch.equal(reader["vision_model.encoder.layers.1.self_attn.q_proj.weight"], q)

    class Code:
        def __reduce__(self):
            return (print, ("code ran",))

    torch.save({"a": Code()}, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match="cannot be read without running code"):
        OpenClip().load(f"open_clip:{folder}@{tmp_path / 'bad.pt'}")


def test_every_name_of_transformers_leads_to_one_of_open_clip():
    assert translated("text_model.encoder.layers.10.self_attn.v_proj.bias") == ("transformer.resblocks.10.attn.in_proj_bias", "v")
    assert translated("vision_model.post_layernorm.weight") == ("visual.ln_post.weight", "")
    assert translated("text_projection.weight") == ("text_projection", "transposed")


def test_the_whole_path(tmp_path, capsys):
    image = pytest.importorskip("PIL.Image")
    cfg, model = made()
    folder = written(tmp_path / "m", cfg, model)
    for split, offset in (("train", 0), ("test", 100)):
        lines = []
        for i in range(6):
            image.new("RGB", (40, 50), (offset + 20 * i, 255 - 30 * i, 7 * i)).save(tmp_path / f"{split}{i}.png")
            lines.append(json.dumps({"images": [f"{split}{i}.png"], "text": f"a square of colour {i} {split}"}))
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    data = ["--calib", str(tmp_path / "train.jsonl"), "--eval", str(tmp_path / "test.jsonl")]
    out = tmp_path / "out"
    assert main(["quantize", f"open_clip:{folder}", "-r", "rtn-w8a8", *data, "-o", str(out)]) == 0, capsys.readouterr().err
    report = json.loads((out / "report.json").read_text())
    scores = report["quality"]["scores"]
    assert scores["rows"] == 6 and 0 < scores["kl"] < 0.1 and scores["sqnr_db"] > 20 and 0 <= scores["accuracy"] <= 1
    assert report["data"]["evaluation"]["pairs"] == 6 and report["data"]["evaluation"]["file"] == "test.jsonl"
    quantized = load(out, registry=REGISTRY)
    assert type(quantized).__name__ == "CLIPModel"
    assert main(["eval", str(out), "--eval", str(tmp_path / "test.jsonl"), "--json"]) == 0
    assert main(["verify", str(out), "--json"]) == 0
    # without pictures there is nothing to be static about
    assert main(["quantize", f"open_clip:{folder}", "-r", "smoothquant-w8a8", "-o", str(tmp_path / "none")]) == 2
