"""Names of the release: every tensor finds its place, what has none is refused."""

import re

import pytest
import torch
from qcore.errors import CheckpointError
from qplug_perception.petr.released import read_weights, renamed
from qplug_perception.petr.testing import small_petr

HEAD = "pts_bbox_head."
LAYERS = f"{HEAD}transformer.decoder.layers."


def released_name(name: str) -> str:
    """The other way round, written down on its own."""
    rules = (
        (r"image\.backbone\.stem\.0\.", "img_backbone.conv1."),
        (r"image\.backbone\.stem\.1\.", "img_backbone.bn1."),
        (r"image\.neck\.lateral\.(\d)\.", r"img_neck.lateral_convs.\1.conv."),
        (r"image\.neck\.smooth\.", "img_neck.fpn_convs.0.conv."),
        (r"image\.input_proj\.", f"{HEAD}input_proj."),
        (r"views\.", f"{HEAD}adapt_pos3d."),
        (r"position\.mlp\.", f"{HEAD}position_encoder."),
        (r"query\.", f"{HEAD}query_embedding."),
        (r"reference\.", f"{HEAD}reference_points."),
        (r"layers\.(\d)\.self_attn\.out_proj\.", rf"{LAYERS}\1.attentions.0.attn.out_proj."),
        (r"layers\.(\d)\.cross_attn\.out_proj\.", rf"{LAYERS}\1.attentions.1.attn.out_proj."),
        (r"layers\.(\d)\.up\.", rf"{LAYERS}\1.ffns.0.layers.0.0."),
        (r"layers\.(\d)\.down\.", rf"{LAYERS}\1.ffns.0.layers.1."),
        (r"layers\.(\d)\.norms\.", rf"{LAYERS}\1.norms."),
        (r"norm\.", f"{HEAD}transformer.decoder.post_norm."),
    )
    for pattern, own in rules:
        if re.match(pattern, name):
            return re.sub(pattern, own, name, count=1)
    stage, block, part, index, rest = re.fullmatch(r"image\.backbone\.stages\.(\d)\.(\d)\.(a|b|c|shortcut)\.([01])\.(.*)", name).groups()
    place = f"img_backbone.layer{int(stage) + 1}.{block}."
    if part == "shortcut":
        return f"{place}downsample.{index}.{rest}"
    number = "abc".index(part) + 1
    return f"{place}{'conv' if index == '0' else 'bn'}{number}.{rest.replace('offset.', 'conv_offset.')}"


def released(model) -> dict[str, torch.Tensor]:
    out, state = {f"{HEAD}code_weights": torch.ones(10)}, model.state_dict()
    for name, t in state.items():
        if match := re.fullmatch(r"(classify|regress)\.(.*)", name):
            kind = "cls" if match[1] == "classify" else "reg"
            out |= {f"{HEAD}{kind}_branches.{i}.{match[2]}": t for i in range(6)}
        elif match := re.fullmatch(r"(layers\.\d)\.(self|cross)_attn\.([qkv])_proj\.(weight|bias)", name):
            index = 0 if match[2] == "self" else 1
            whole = torch.cat([state[f"{match[1]}.{match[2]}_attn.{kind}_proj.{match[4]}"] for kind in "qkv"])
            out[f"{HEAD}transformer.decoder.{match[1]}.attentions.{index}.attn.in_proj_{match[4]}"] = whole
        else:
            out[released_name(name)] = t
    return out


@pytest.fixture(scope="module")
def model():
    return small_petr(bottleneck=True, caffe=True, deformable=(False, False, True, True))


def test_every_tensor_of_the_release_finds_its_place(model):
    found, own = renamed(released(model), "file"), model.state_dict()
    assert set(found) == set(own)
    assert all(torch.equal(found[n], t) for n, t in own.items())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_are_read_as_tensors_alone(model, tmp_path, suffix):
    file = tmp_path / f"petr{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": released(model), "meta": {"epoch": 24}}, file)
    else:
        from safetensors.torch import save_file

        save_file({n: t.clone() for n, t in released(model).items()}, file)
    reader = read_weights(file)
    assert torch.equal(reader["layers.1.cross_attn.k_proj.weight"], model.layers[1].cross_attn.k_proj.weight)


def test_what_has_no_place_is_named(model):
    with pytest.raises(CheckpointError, match=r"img_backbone\.stem\.stem_1/conv\.weight.*VoVNet"):
        renamed(released(model) | {"img_backbone.stem.stem_1/conv.weight": torch.zeros(1)}, "file")


def test_branches_that_differ_are_refused(model):
    other = released(model)
    other[f"{HEAD}reg_branches.3.0.bias"] = other[f"{HEAD}reg_branches.3.0.bias"] + 1
    with pytest.raises(CheckpointError, match=r"regress\.0\.bias differs"):
        renamed(other, "file")


class _Code:
    pass


def test_a_file_with_code_in_it_is_refused(tmp_path):
    torch.save({"state_dict": {"a": torch.zeros(1)}, "meta": _Code()}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="tensors alone"):
        read_weights(tmp_path / "x.pth")


@pytest.mark.slow
def test_the_backbone_is_the_one_that_the_names_mean():
    """torchvision's ResNet has the release's names and strides in the 3×3."""
    resnet = pytest.importorskip("torchvision.models.resnet", reason="torchvision is not installed")
    from qcore.testing.models import randomize
    from qplug_perception.petr.backbone import ResNet
    from qplug_perception.petr.config import PETRConfig

    theirs = randomize(resnet.ResNet(resnet.Bottleneck, [1, 2, 1, 1])).eval()
    own = ResNet(PETRConfig(caffe=False, blocks=(1, 2, 1, 1), deformable=(False,) * 4)).eval()
    state = {f"img_backbone.{n}": t for n, t in theirs.state_dict().items() if not n.startswith("fc.")}
    own.load_state_dict({n.removeprefix("image.backbone."): t for n, t in renamed(state, "torchvision").items()})
    x = torch.randn(1, 3, 64, 64)
    y = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
    wanted = []
    for stage in (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4):
        y = stage(y)
        wanted.append(y)
    for a, b in zip(own(x), wanted[-2:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
