"""LAVT: the adapter's contract, what padding may not do, released checkpoints, folders."""

import argparse
import json

import pytest
import torch
from qcore.errors import CheckpointError, NotFound, SpecError
from qcore.model.tap import Tap, attach
from qcore.testing import check_adapter
from qcore.transforms.apply import apply_rewrite
from qplug_segmentation.adapter import LavtAdapter, attentions_of, stages_of
from qplug_segmentation.fold import FoldDecoder
from qplug_segmentation.lavt import Lavt, LavtConfig, TappedWindowAttention
from qplug_segmentation.source import LavtSource, read_folder, read_weights
from qplug_segmentation.testing import CONFIG, SIZES, tiny_batch, tiny_lavt, write_folder
from timm.models.swin_transformer import WindowAttention
from torch import nn


@pytest.fixture(scope="module")
def model():
    return tiny_lavt()


def test_the_adapter_tells_the_truth():
    check_adapter(LavtAdapter(), tiny_lavt(), tiny_batch())


@torch.no_grad()
def run(model, batch):
    return model(batch["image"], batch["ids"], batch["words"])


def test_logits_are_of_every_pixel_and_classes_come_last_for_qcore(model):
    batch = tiny_batch()
    out = run(model, batch)
    assert out.shape == (2, 2, 32, 32) and bool(torch.isfinite(out).all())
    with torch.no_grad():
        assert torch.equal(LavtAdapter().outputs(model, batch), out.permute(0, 2, 3, 1))


def test_padding_of_a_sentence_and_its_ids_do_not_matter(model):
    """BERT's mask and the mask of the fusion are both at work: float32 rounding alone is left."""
    batch = tiny_batch()
    ids = torch.cat([batch["ids"], torch.full((2, 3), 7)], 1)
    longer = {**batch, "ids": ids, "words": torch.cat([batch["words"], torch.zeros(2, 3, dtype=torch.long)], 1)}
    assert torch.allclose(run(model, batch), run(model, longer), atol=2e-5)
    other = {**batch, "ids": torch.where(batch["words"].bool(), batch["ids"], 5)}
    assert torch.allclose(run(model, batch), run(model, other), atol=2e-5)


def test_the_sentence_matters(model):
    batch = tiny_batch()
    other = {**batch, "ids": batch["ids"].flip(0), "words": batch["words"].flip(0)}
    assert (run(model, batch) - run(model, other)).abs().max() > 1e-2


@pytest.mark.parametrize("mask", [None, 4])
def test_window_attention_written_out_is_timms(mask):
    torch.manual_seed(0)
    theirs = WindowAttention(12, 3, window_size=3).eval()
    ours = TappedWindowAttention(12, 3, window_size=3).eval()
    ours.load_state_dict(theirs.state_dict())
    theirs.fused_attn = False
    x = torch.randn(8, 9, 12)
    own = None if mask is None else torch.where(torch.rand(mask, 9, 9) > 0.7, -100.0, 0.0)
    assert torch.allclose(ours(x, own), theirs(x, own), atol=1e-6)


def test_every_product_of_activations_is_tapped_once(model):
    class Count(Tap):
        def __init__(self) -> None:
            super().__init__()
            self.shapes: list[torch.Size] = []

        def forward(self, x, rows=None, weight=None):
            self.shapes.append(x.shape)
            return x

    twin = tiny_lavt()
    counts = {(path, name): Count() for path in attentions_of(twin) for name in "qkvp"}
    for (path, name), handler in counts.items():
        attach(twin.get_submodule(path), name, handler)
    out = run(twin, tiny_batch())
    assert torch.equal(out, run(model, tiny_batch()))
    assert all(len(c.shapes) == 1 for c in counts.values())
    p = counts["backbone.layers.1.fusion.image_lang_att", "p"].shapes[0]
    assert p == (2, 64, 1, 9)  # places by heads by words


def test_sites_leave_out_the_gate_that_nobody_reads(model):
    paths = [path for stage in stages_of(model) for path in stage]
    assert "backbone.layers.2.res_gate.0" in paths and "backbone.layers.3.res_gate.0" not in paths
    linear = {n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d))}
    assert linear - set(paths) == {"backbone.layers.3.res_gate.0", "backbone.layers.3.res_gate.2"}


def test_folding_the_decoder_keeps_the_function():
    from qcore.model.reader import DictReader

    model = tiny_lavt().double()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in tiny_batch().items()}
    before = run(model, batch)
    reader = DictReader({n: t.detach() for n, t in model.state_dict().items()})
    rewrite = FoldDecoder().fit(LavtAdapter().topology(model), {}, {}, model, reader)
    folded = apply_rewrite(model, rewrite)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert torch.allclose(run(folded, batch), before, rtol=1e-9, atol=1e-12)
    with pytest.raises(SpecError, match="folds LAVT's decoder"):
        FoldDecoder().fit(None, {}, {}, nn.Linear(2, 2), reader)


def test_real_sizes_are_those_of_the_release():
    """Swin-B with windows of 12 and BERT-base: the names and shapes that released checkpoints have, without their weights."""
    from qcore.model.source import parameters_on_meta

    with parameters_on_meta():
        model = Lavt(LavtConfig())
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert shapes["backbone.layers.2.blocks.17.attn.relative_position_bias_table"] == (23 * 23, 16)
    assert shapes["backbone.layers.3.fusion.image_lang_att.f_key.0.weight"] == (1024, 768, 1)
    assert shapes["backbone.layers.0.downsample.reduction.weight"] == (256, 512)
    assert shapes["classifier.conv1_4.weight"] == (512, 1536, 3, 3) and shapes["classifier.conv1_1.weight"] == (2, 512, 1, 1)
    assert shapes["text_encoder.encoder.layer.11.output.dense.weight"] == (768, 3072)
    # all of timm's own Swin-B but for its last norm, and a norm for each stage
    import timm

    with parameters_on_meta():
        theirs = timm.create_model("swin_base_patch4_window12_384", num_classes=0)
    ours = sum(p.numel() for n, p in model.named_parameters() if n.startswith("backbone") and "fusion" not in n and "res_gate" not in n)
    assert ours == sum(p.numel() for p in theirs.parameters()) - 2 * 1024 + 2 * (128 + 256 + 512 + 1024)


# files -----------------------------------------------------------------------------------------------------------------------------------


def released(model) -> dict[str, torch.Tensor]:
    """A state dict as the release saves it: buffers that libraries compute now, and a DataParallel prefix."""
    tensors = dict(model.state_dict())
    for i, stage in enumerate(model.backbone.layers):
        for j, block in enumerate(stage.blocks):
            tensors[f"backbone.layers.{i}.blocks.{j}.attn.relative_position_index"] = block.attn.relative_position_index
    tensors["text_encoder.embeddings.position_ids"] = torch.arange(16).unsqueeze(0)
    return {f"module.{n}": t for n, t in tensors.items()}


def test_a_released_checkpoint_is_read_as_tensors_alone(tmp_path, model):
    folder = write_folder(tmp_path / "a", model)
    (folder / "model.safetensors").unlink()
    torch.save({"model": released(model), "optimizer": {"lr": 0.1}, "epoch": 3, "args": argparse.Namespace(swin_type="base")}, folder / "model.pth")
    loaded = LavtSource().load(f"lavt:{folder}")
    loaded.model.load_state_dict({n: loaded.reader[n] for n in loaded.model.state_dict()}, assign=True)
    assert torch.equal(run(loaded.model, tiny_batch()), run(model, tiny_batch()))


class Arbitrary:
    """What no file of weights should hold."""


def test_a_checkpoint_with_objects_in_it_is_refused(tmp_path, model):
    folder = write_folder(tmp_path / "a", model)
    (folder / "model.safetensors").unlink()
    torch.save({"model": released(model), "hook": Arbitrary()}, folder / "model.pth")
    with pytest.raises(CheckpointError, match=r"tensors alone.*convert it once"):
        LavtSource().load(f"lavt:{folder}")


def test_weights_of_another_size_or_kind_are_named(tmp_path, model):
    from safetensors.torch import save_file

    folder = write_folder(tmp_path / "a", model)
    tensors = {n: t.contiguous() for n, t in model.state_dict().items()}
    save_file({n: t for n, t in tensors.items() if not n.startswith("text_encoder")}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lack \d+ of \d+ tensors, text_encoder.*not 'lavt', which keeps"):
        LavtSource().load(str(folder))
    save_file({**tensors, "backbone.layers.9.x": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no place in the model, backbone\.layers\.9\.x first"):
        LavtSource().load(str(folder))


def test_folders_say_what_is_wrong_with_them(tmp_path):
    with pytest.raises(NotFound, match="does not exist"):
        LavtSource().load(f"lavt:{tmp_path / 'none'}")
    (tmp_path / "config.json").write_text('{"architecture": "lavt"}')
    with pytest.raises(CheckpointError, match="architecture 'lavt'"):
        read_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "lavt": {**SIZES, "depth": 3}}))
    with pytest.raises(SpecError, match="no field 'depth'"):
        LavtSource().load(f"lavt:{tmp_path}")
    with pytest.raises(NotFound, match=r"neither model\.safetensors nor model\.pth"):
        read_weights(tmp_path, {"x"})
    with pytest.raises(SpecError, match="3 heads do not divide"):
        LavtConfig(embed=8, heads=(3, 3, 3, 3))


def test_float16_weights_are_read_as_float32(tmp_path, model):
    from safetensors.torch import save_file

    folder = write_folder(tmp_path / "a", model)
    save_file({n: t.half().contiguous() if t.is_floating_point() else t for n, t in model.state_dict().items()}, folder / "model.safetensors")
    loaded = LavtSource().load(str(folder))
    value = loaded.reader["classifier.conv1_1.weight"]
    assert value.dtype is torch.float32 and torch.equal(value, model.classifier.conv1_1.weight.half().float())
