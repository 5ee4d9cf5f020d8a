"""Weights of the release (megvii-research/PETR, ResNet-50), under the names that PETR has here.

| release | here |
|---|---|
| img_backbone.conv1, bn1 | image.backbone.stem.0, .1 |
| img_backbone.layer2.0.conv1 … bn3, downsample.0, .1 | image.backbone.stages.1.0.a.0 … c.1, shortcut.0, .1 |
| ….conv2.weight, ….conv2.conv_offset of a deformable stage | ….b.0.weight, ….b.0.offset |
| img_neck.lateral_convs.0.conv, fpn_convs.0.conv | image.neck.lateral.0, smooth |
| pts_bbox_head.input_proj, adapt_pos3d, position_encoder | image.input_proj, views, position.mlp |
| pts_bbox_head.query_embedding, reference_points | query, reference |
| pts_bbox_head.transformer.decoder.layers.0.attentions.1.attn.in_proj_weight | layers.0.cross_attn.{q,k,v}_proj.weight, a third each |
| ….attn.out_proj, ffns.0.layers.0.0, ffns.0.layers.1, norms.2, post_norm | out_proj, up, down, norms.2, norm |
| pts_bbox_head.cls_branches.5, reg_branches.5 | classify, regress |

The six branches of the release are one object, so its file holds them six times; where they differ the file is of another network, and is refused.
`code_weights` of the loss is left out.  Everything else that has no place here is refused by name, as is whatever is missing: VoVNet, PETRv2 and
StreamPETR are not built here.  Files are read as tensors alone: nothing in them is run.

Not tried on the released files themselves, which were not at hand; names are those that its code gives.
"""

import re
from pathlib import Path
from typing import Any

import torch
from qcore.errors import CheckpointError, NotFound
from qcore.model import DictReader
from qcore.model.reader import SafetensorsReader, TensorReader
from torch import Tensor

_HEAD = "pts_bbox_head."
_DECODER = f"{_HEAD}transformer.decoder."
_IGNORED = re.compile(r"pts_bbox_head\.code_weights|.*\.num_batches_tracked")
_PLAIN = (
    (r"img_backbone\.conv1\.", "image.backbone.stem.0."),
    (r"img_backbone\.bn1\.", "image.backbone.stem.1."),
    (r"img_neck\.lateral_convs\.(\d)\.conv\.", r"image.neck.lateral.\1."),
    (r"img_neck\.fpn_convs\.0\.conv\.", "image.neck.smooth."),
    (rf"{_HEAD}input_proj\.", "image.input_proj."),
    (rf"{_HEAD}adapt_pos3d\.", "views."),
    (rf"{_HEAD}position_encoder\.", "position.mlp."),
    (rf"{_HEAD}query_embedding\.", "query."),
    (rf"{_HEAD}reference_points\.", "reference."),
    (rf"{_DECODER}layers\.(\d+)\.attentions\.0\.attn\.", r"layers.\1.self_attn."),
    (rf"{_DECODER}layers\.(\d+)\.attentions\.1\.attn\.", r"layers.\1.cross_attn."),
    (rf"{_DECODER}layers\.(\d+)\.ffns\.0\.layers\.0\.0\.", r"layers.\1.up."),
    (rf"{_DECODER}layers\.(\d+)\.ffns\.0\.layers\.1\.", r"layers.\1.down."),
    (rf"{_DECODER}layers\.(\d+)\.norms\.", r"layers.\1.norms."),
    (rf"{_DECODER}post_norm\.", "norm."),
)
_BLOCK = re.compile(r"img_backbone\.layer(\d)\.(\d+)\.(conv|bn)(\d)\.(.+)")
_DOWN = re.compile(r"img_backbone\.layer(\d)\.(\d+)\.downsample\.([01])\.(.+)")
_BRANCH = re.compile(rf"{_HEAD}(cls|reg)_branches\.(\d+)\.(.+)")


def read_weights(file: Path) -> TensorReader:
    """The tensors of a file under the names of `PETR`; NotFound or CheckpointError where there are none, or where they do not fit by name."""
    if not file.is_file():
        raise NotFound(f"weights file {file} does not exist; qcore downloads none: pass a local .safetensors or .pth file, or @random")
    if file.suffix == ".safetensors":
        stored = SafetensorsReader(file)
        tensors = {name: stored[name] for name in stored.names()}
    else:
        tensors = _unpickled(file)
    if "norm.weight" in tensors:
        return DictReader(tensors)
    return DictReader(renamed(tensors, str(file)))


def renamed(tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """A state dict of the release under the names here.  where: for messages; CheckpointError for names without a place, or branches that differ"""
    out: dict[str, Tensor] = {}
    strange: list[str] = []
    branches: dict[str, dict[int, Tensor]] = {}
    for name, t in tensors.items():
        if _IGNORED.fullmatch(name):
            continue
        if match := _BRANCH.fullmatch(name):
            own = f"{'classify' if match[1] == 'cls' else 'regress'}.{match[3]}"
            branches.setdefault(own, {})[int(match[2])] = t
        elif match := re.fullmatch(r"(.*)in_proj_(weight|bias)", own := _renamed(name) or ""):
            for kind, part in zip("qkv", t.chunk(3), strict=True):
                out[f"{match[1]}{kind}_proj.{match[2]}"] = part.contiguous()
        elif own:
            out[own] = t
        else:
            strange.append(name)
    if strange:
        raise CheckpointError(
            f"{where}: {len(strange)} tensors have no place in the PETR that is built here, {strange[0]} first; it reads PETR with a ResNet, "
            "plain or with DCNv2. Another backbone (VoVNet), PETRv2 and StreamPETR are not built here"
        )
    for own, copies in branches.items():
        last = copies[max(copies)]
        if any(not torch.equal(last, other) for other in copies.values()):
            raise CheckpointError(
                f"{where}: {own} differs from layer to layer, but all layers of PETR share one branch; the file is of another network"
            )
        out[own] = last
    # counters of batches, which a batch norm has and no forward pass reads
    out |= {f"{n.removesuffix('running_var')}num_batches_tracked": torch.tensor(0) for n in [*out] if n.endswith("running_var")}
    return out


def _renamed(name: str) -> str | None:
    if match := _BLOCK.fullmatch(name):
        stage, block, kind, number, rest = match.groups()
        part = "abc"[int(number) - 1] if number in "123" else ""
        rest = rest.replace("conv_offset.", "offset.")
        return f"image.backbone.stages.{int(stage) - 1}.{block}.{part}.{0 if kind == 'conv' else 1}.{rest}" if part else None
    if match := _DOWN.fullmatch(name):
        return f"image.backbone.stages.{int(match[1]) - 1}.{match[2]}.shortcut.{match[3]}.{match[4]}"
    for pattern, own in _PLAIN:
        if match := re.match(pattern, name):
            return match.expand(own) + name[match.end() :]
    return None


def _unpickled(file: Path) -> dict[str, Tensor]:
    try:
        found: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:  # torch.load raises what the file makes it raise
        raise CheckpointError(
            f"{file} cannot be read as a file of tensors alone ({type(e).__name__}: {str(e).splitlines()[0]}); checkpoints of mmcv hold more beside "
            "them: save its state_dict alone, in an environment that you trust it in"
        ) from e
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict) or not found or not all(isinstance(t, Tensor) for t in found.values()):
        raise CheckpointError(f"{file} holds no state dict; save model.state_dict() and pass that")
    return found
