"""The adapter of LAVT: its blocks, the channels that may be rewritten, and the products of activations that may be quantized."""

from collections.abc import Iterator
from typing import Any, ClassVar

from qcore.model.adapter import ModelAdapter, tied_names
from qcore.model.attention import attention_sites
from qcore.model.topology import Block, Invariance, Link, Port, Site, Topology, covered_axes
from torch import Tensor, nn

ALL = Invariance.PERMUTE | Invariance.SCALE | Invariance.ROTATE


class LavtAdapter(ModelAdapter):
    """LAVT with one Swin and one BERT (`qplug_segmentation.lavt`).

    One block, the whole model, because its parts read each other's outputs across stages; sites stand in the order in which they run.  Outputs are
    logits with the classes *last*, [B, H, W, 2]: the release's calibration takes a softmax over the last axis of [B, 2, H, W], the width.
    """

    name: ClassVar[str] = "lavt"

    def matches(self, model: nn.Module) -> bool:
        return all(hasattr(model, part) for part in ("backbone", "classifier", "text_encoder")) and hasattr(model.backbone, "patch_embed")

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch["image"], batch["ids"], batch["words"]).permute(0, 2, 3, 1)

    def topology(self, model: nn.Module) -> Topology:
        stages, attentions = stages_of(model), attentions_of(model)
        blocks = (Block("", stages=tuple(tuple(Site(path) for path in stage) for stage in stages), feed="rerun"),)
        links = tuple(_links(model))
        covered = covered_axes(Topology(blocks, links))
        blocked = {}
        for name, p in model.named_parameters(remove_duplicate=False):
            for axis in ("out", "in"):
                if p.ndim > 1 and (name, axis) not in covered:
                    blocked[Port(name, axis)] = _why(name, axis)
        activations = tuple(site for path in attentions for site in attention_sites(path))
        return Topology(blocks, links, blocked, activations, tied_names(model))


def stages_of(model: Any) -> list[list[str]]:
    """Paths of the layers in the order in which they run; those of one list are looked at together."""
    stages = []
    for i in range(len(model.text_encoder.encoder.layer)):
        at = f"text_encoder.encoder.layer.{i}"
        stages.append([f"{at}.attention.self.{n}" for n in ("query", "key", "value")])
        stages.append([f"{at}.attention.output.dense", f"{at}.intermediate.dense", f"{at}.output.dense"])
    stages.append(["backbone.patch_embed.proj"])
    for i, stage in enumerate(model.backbone.layers):
        at = f"backbone.layers.{i}"
        for j in range(len(stage.blocks)):
            stages.append([f"{at}.blocks.{j}.{n}" for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")])
        own = f"{at}.fusion.image_lang_att"
        stages.append([f"{at}.fusion.vis_project.0", *(f"{own}.{n}.0" for n in ("f_query", "f_key", "f_value", "W")), f"{at}.fusion.project_mm.0"])
        stages.append([f"{at}.res_gate.0", f"{at}.res_gate.2"])
        if stage.downsample is not None:
            stages.append([f"{at}.downsample.reduction"])
    stages += [[f"classifier.conv{j}_{i}" for j in (1, 2)] for i in (4, 3, 2)]
    # in the last stage what follows the gate is read by nobody
    last = f"backbone.layers.{len(model.backbone.layers) - 1}.res_gate"
    return [*([p for p in s if not p.startswith(last)] for s in stages if not s[0].startswith(last)), ["classifier.conv1_1"]]


def attentions_of(model: Any) -> list[str]:
    """Paths of the modules that multiply activations with each other, in the order in which they run."""
    found = [f"text_encoder.encoder.layer.{i}.attention.self" for i in range(len(model.text_encoder.encoder.layer))]
    for i, stage in enumerate(model.backbone.layers):
        found += [f"backbone.layers.{i}.blocks.{j}.attn" for j in range(len(stage.blocks))]
        found.append(f"backbone.layers.{i}.fusion.image_lang_att")
    return found


def _ports(path: str, *axes: str, bias: bool = True, channels: tuple[range, ...] = ()) -> tuple[Port, ...]:
    """Output ports of a layer, bias and all, or the input port of its weight."""
    if axes == ("in",):
        return (Port(f"{path}.weight", "in", channels=channels),)
    own = (Port(f"{path}.weight", "out", channels=channels),)
    return (*own, Port(f"{path}.bias", "out", channels=channels)) if bias else own


def _links(model: Any) -> Iterator[Link]:
    for i, layer in enumerate(model.text_encoder.encoder.layer):
        at = f"text_encoder.encoder.layer.{i}"
        width, heads = layer.attention.self.value.out_features, layer.attention.self.num_attention_heads
        value, dense = f"{at}.attention.self.value", f"{at}.attention.output.dense"
        yield Link(f"{at}.v→o", width, _ports(value, "out"), _ports(dense, "in"), ALL, heads=heads)
        hidden = layer.intermediate.dense.out_features
        yield Link(f"{at}.mlp", hidden, _ports(f"{at}.intermediate.dense", "out"), _ports(f"{at}.output.dense", "in"), Invariance.PERMUTE)
    for i, stage in enumerate(model.backbone.layers):
        for j, block in enumerate(stage.blocks):
            at = f"backbone.layers.{i}.blocks.{j}"
            width, hidden = block.attn.proj.in_features, block.mlp.fc1.out_features
            v = _ports(f"{at}.attn.qkv", "out", channels=(range(2 * width, 3 * width),))
            read = _ports(f"{at}.attn.proj", "in")
            yield Link(f"{at}.v→proj", width, v, read, ALL, heads=block.attn.num_heads)
            yield Link(f"{at}.mlp", hidden, _ports(f"{at}.mlp.fc1", "out"), _ports(f"{at}.mlp.fc2", "in"), Invariance.PERMUTE)


def _why(name: str, axis: str) -> str:
    """Why no rewrite may touch an axis."""
    if name.startswith("text_encoder.embeddings") or "position" in name:
        return "a table that is added up with others before a LayerNorm"
    if "image_lang_att" in name or "fusion" in name:
        return "normalized by an InstanceNorm, multiplied element by element, or passed through a GELU"
    if name.startswith("classifier"):
        return "joined with channels of another stage, or passed through a batch norm"
    if "res_gate" in name:
        return "passes a ReLU and a tanh, and gates element by element"
    return f"the {'inputs' if axis == 'in' else 'outputs'} lie in a stream that LayerNorms normalize, or beside queries and keys"
