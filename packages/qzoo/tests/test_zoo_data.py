"""The shipped data of the zoo is whole: hashes, splits, and the models that only need torch and transformers load and predict."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

DATA = Path(__file__).resolve().parents[1] / "src/qzoo/data"
SHIPPED = sorted(path.name for path in DATA.iterdir())
MODELS = [name for name in SHIPPED if name.startswith("tiny-")]
TRANSFORMERS_MODELS = [name for name in ("tiny-llama", "tiny-moe", "tiny-mamba") if name in MODELS]
images = pytest.mark.skipif("fashion_mnist" not in SHIPPED, reason="the convolutional model and its images are not trained yet")
LIMIT = 12_000_000


def record_of(name: str) -> dict:
    """A model's training record."""
    return json.loads((DATA / name / "record.json").read_text("utf-8"))


@pytest.mark.parametrize("folder", SHIPPED)
def test_files_are_those_of_the_record(folder: str) -> None:
    """Every file named in the record is there, with its hash."""
    source = DATA / folder / ("record.json" if folder in MODELS else "SOURCES.json")
    for name, entry in json.loads(source.read_text("utf-8"))["files"].items():
        content = (DATA / folder / name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (entry["bytes"], entry["sha256"]), name


@pytest.mark.parametrize("name", MODELS)
def test_size_and_parameters(name: str) -> None:
    """A model is small, and its record counts its parameters rightly."""
    weights = DATA / name / "model.safetensors"
    assert weights.stat().st_size < LIMIT
    with safe_open(weights, "pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    assert sum(math.prod(shape) for key, shape in shapes.items() if not key.endswith(buffers)) == record_of(name)["parameters"]


def test_calibration_and_evaluation_texts_are_disjoint() -> None:
    """No document piece is in both texts, and any prefix of a text is mixed."""
    separator = json.loads((DATA / "text/SOURCES.json").read_text("utf-8"))["separator"]
    pieces = {name: (DATA / f"text/{name}.txt").read_text("utf-8").split(separator) for name in ("calib", "eval")}
    assert not set(pieces["calib"]) & set(pieces["eval"])
    scripture = set((DATA / "text/eval_scripture.txt").read_text("utf-8").split(separator))
    assert 0 < len(scripture & set(pieces["eval"][:30])) < 20


@pytest.mark.parametrize("name", TRANSFORMERS_MODELS)
def test_transformers_models_predict_text(name: str) -> None:
    """On a little evaluation text the loss is near the recorded one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DATA / name)
    model = AutoModelForCausalLM.from_pretrained(DATA / name, dtype=torch.float32).eval()
    ids = tokenizer((DATA / "text/eval.txt").read_text("utf-8")[:20_000], return_tensors="pt")["input_ids"]
    windows = ids[0, : 8 * 129].view(8, 129)
    with torch.no_grad():
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    loss = float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()))
    assert abs(loss - record_of(name)["evaluation"]["eval"]["loss_per_token"]) < 0.4


def test_the_default_model_is_shipped() -> None:
    """The model of the README's first command."""
    assert "tiny-llama" in MODELS


@images
def test_images() -> None:
    """The image sets have the promised shapes and types."""
    for name, count in (("eval", 1000), ("calib", 256)):
        tensors = load_file(DATA / f"fashion_mnist/{name}.safetensors")
        assert tensors["images"].shape == (count, 28, 28) and tensors["images"].dtype == torch.uint8
        assert tensors["labels"].shape == (count,) and tensors["labels"].dtype == torch.int64


@images
def test_repvgg_is_accurate() -> None:
    """The convolutional model loads into timm's network and classifies."""
    byobnet = pytest.importorskip("timm.models.byobnet")
    config = json.loads((DATA / "tiny-repvgg/config.json").read_text("utf-8"))
    cfg = dict(config["cfg"])
    blocks = tuple(byobnet.ByoBlockCfg(**block) for block in cfg.pop("blocks"))
    model = byobnet.ByobNet(byobnet.ByoModelCfg(blocks=blocks, **cfg), num_classes=config["num_classes"], in_chans=config["in_chans"]).eval()
    model.load_state_dict(load_file(DATA / "tiny-repvgg/model.safetensors"))
    tensors = load_file(DATA / "fashion_mnist/eval.safetensors")
    preprocessing = config["preprocessing"]
    padded = torch.nn.functional.pad(tensors["images"][:200], (preprocessing["pad"],) * 4).float() / 255
    with torch.no_grad():
        logits = model(((padded - preprocessing["mean"][0]) / preprocessing["std"][0]).unsqueeze(1))
    assert float((logits.argmax(1) == tensors["labels"][:200]).float().mean()) > 0.85
