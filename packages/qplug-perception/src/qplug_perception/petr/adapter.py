"""The adapter of PETR: where its tensors lie, which channels are shared, what its outputs are.

| link | between | allows |
|---|---|---|
| those of the image branch | as its traced graph shows | whatever lies between allows |
| memory | features and positions → keys and values of all layers | everything: the two are added, and read by linear layers alone |
| q↔k, v→out | inside an attention | permutations and rotations inside heads; scales |
| hidden layers behind a ReLU | two linear layers | permutations, scales |
| decoder | queries' places and all sublayers → all sublayers and the branches | permutations: each sum passes a LayerNorm |
| norm → branches | the last norm's gain → both branches | scales |
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from qcore.model import Block, Invariance, Link, ModelAdapter, Port, Site, Topology
from qcore.model.adapter import tied_names
from qcore.model.plain import plain_topology
from qcore.model.topology import covered_axes, join
from torch import Tensor, nn

from qplug_perception.petr.model import PETR
from qplug_perception.petr.qfpe import QFPE

_PS = Invariance.PERMUTE | Invariance.SCALE
_IMAGE = "image"
# the decoder starts from zero, so the values of its first self-attention are one and the same bias, and where they are looked for makes no difference
_DEAD = "layers.0.self_attn"


def batch_of(images: Tensor, lidar2img: Tensor) -> dict[str, Tensor]:
    """A batch as the adapter takes it."""
    return {"images": images, "lidar2img": lidar2img}


class PETRAdapter(ModelAdapter):
    """PETR and Q-PETR, as `qplug_perception.petr.model.PETR` builds them."""

    name: ClassVar[str] = "petr"

    def matches(self, model: nn.Module) -> bool:
        return isinstance(model, PETR)

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        """Logits and box codes of the last layer behind each other.  [B, Q, classes + 10]"""
        return torch.cat(model(batch["images"], batch["lidar2img"], batch.get("padding")), -1)

    def topology(self, model: nn.Module) -> Topology:
        assert isinstance(model, PETR), type(model)
        image = _below(plain_topology(model.image), _IMAGE)
        last = Port(f"{_IMAGE}.input_proj.weight", "out")
        stages = [stage for block in image.blocks for stage in block.stages]
        layers = [f"layers.{i}" for i in range(len(model.layers))]
        heads = [f"{p}.mlp" if p == "position" else p for p in ("position", "views", "query")]
        stages += [tuple(Site(f"{p}.{i}") for p in heads) for i in (0, 2)]
        stages.append(tuple(Site(f"{p}.cross_attn.{kind}_proj") for p in layers for kind in "kv"))
        for p in layers:
            stages += [tuple(Site(f"{p}.self_attn.{kind}_proj") for kind in "qkv"), (Site(f"{p}.self_attn.out_proj"),)]
            stages += [(Site(f"{p}.cross_attn.q_proj"),), (Site(f"{p}.cross_attn.out_proj"),), (Site(f"{p}.up"),), (Site(f"{p}.down"),)]
        stages += [(Site(f"classify.{3 * i}"), Site(f"regress.{2 * i}")) for i in range(3)]
        links = (*image.links, *self._links(model, layers))
        topology = Topology(
            blocks=(Block("", tuple(stages), feed="rerun"),),
            links=links,
            blocked={port: why for port, why in image.blocked.items() if port != last} | _blocked(model),
            activations=tuple(Site(f"{p}.{kind}_attn", tap) for p in layers for kind in ("self", "cross") for tap in ("scores", "p")),
            ties=tied_names(model),
        )
        covered = covered_axes(replace(topology, blocked={}))
        return replace(topology, blocked={p: why for p, why in topology.blocked.items() if (p.param, p.axis) not in covered})

    def _links(self, model: PETR, layers: list[str]) -> list[Link]:
        width = model.config.width
        attentions = [f"{p}.{kind}_attn" for p in layers for kind in ("self", "cross")]
        memory = Link(
            "memory",
            width,
            writes=(*_out(f"{_IMAGE}.input_proj"), *_out("position.mlp.2"), *_out("views.2")),
            reads=_in(f"{p}.cross_attn.{kind}_proj" for p in layers for kind in "kv"),
            invariance=_PS | Invariance.ROTATE,
        )
        # every sum of the decoder is normalized: a permutation passes, and the norms' own vectors move with it
        decoder = Link(
            "decoder",
            width,
            writes=(
                *_out("query.2"),
                *(port for a in attentions for port in _out(f"{a}.out_proj")),
                *(port for p in layers for port in _out(f"{p}.down")),
            ),
            reads=_in(
                [
                    *(f"{p}.self_attn.{kind}_proj" for p in layers for kind in "qkv"),
                    *(f"{p}.cross_attn.q_proj" for p in layers),
                    *(f"{p}.up" for p in layers),
                    *("classify.0", "regress.0"),
                ]
            ),
            invariance=Invariance.PERMUTE,
            through=(*(f"{p}.norms.{i}" for p in layers for i in range(3)), "norm"),
        )
        norm = Link(
            "norm→branches", width, (Port("norm.weight", "out"), Port("norm.bias", "out")), _in(["classify.0", "regress.0"]), Invariance.SCALE
        )
        links = [memory, decoder, norm]
        for a in attentions:
            heads = model.config.heads
            if a != _DEAD:
                links.append(Link(f"{a}.q↔k", width, _out(f"{a}.q_proj"), _out(f"{a}.k_proj"), _PS | Invariance.ROTATE, heads=heads))
            links.append(Link(f"{a}.v→out", width, _out(f"{a}.v_proj"), _in([f"{a}.out_proj"]), _PS | Invariance.ROTATE, heads=heads))
        pairs = [
            ("position.mlp.0", "position.mlp.2"),
            ("views.0", "views.2"),
            ("query.0", "query.2"),
            ("regress.0", "regress.2"),
            ("regress.2", "regress.4"),
        ]
        for one, other in [*pairs, *((f"{p}.up", f"{p}.down") for p in layers)]:
            links.append(Link(f"{one}→{other}", _size(model, one), _out(one), _in([other]), _PS))
        for i in (0, 3):
            one, between, other = f"classify.{i}", f"classify.{i + 1}", f"classify.{i + 3}"
            links.append(Link(f"{one}→{other}", width, _out(one), _in([other]), Invariance.PERMUTE, through=(between,)))
            links.append(
                Link(f"{between}→{other}", width, (Port(f"{between}.weight", "out"), Port(f"{between}.bias", "out")), _in([other]), Invariance.SCALE)
            )
        return links


def _blocked(model: PETR) -> dict[Port, str]:
    """Axes at the model's edges."""
    reasons: dict[tuple[str, str], str] = {
        ("views.0.weight", "in"): "sine features of fixed places",
        ("query.0.weight", "in"): "sine features of the reference points",
        ("reference.weight", "out"): "points in space, of which sines are taken",
        ("reference.weight", "in"): "which query it is",
        **{(f"{_DEAD}.{kind}_proj.weight", "out"): "all values are alike in the first self-attention, which starts from zero" for kind in "qk"},
        ("classify.6.weight", "out"): "the model's output",
        ("regress.4.weight", "out"): "the model's output",
    }
    if isinstance(model.position, QFPE):
        reasons |= {
            ("position.mlp.0.weight", "in"): "written by the anchors' vectors, which lie axis by axis",
            ("position.anchors.vectors", "out"): "vectors of anchors, mixed by where a pixel looks",
            ("position.anchors.vectors", "in"): "vectors of anchors, mixed by where a pixel looks",
        }
    else:
        reasons["position.mlp.0.weight", "in"] = "coordinates of points behind a pixel"
    return {Port(param, axis): why for (param, axis), why in reasons.items()}  # type: ignore[arg-type]


def _size(model: PETR, path: str) -> int:
    return int(model.get_parameter(f"{path}.weight").shape[0])


def _out(path: str) -> tuple[Port, ...]:
    return Port(f"{path}.weight", "out"), Port(f"{path}.bias", "out")


def _in(paths: Iterable[str]) -> tuple[Port, ...]:
    return tuple(Port(f"{path}.weight", "in") for path in paths)


def _below(topology: Topology, prefix: str) -> Topology:
    """The topology of a submodule, in the names of the whole model."""

    def port(p: Port) -> Port:
        return replace(p, param=join(prefix, p.param))

    def ports(many: Iterable[Port]) -> tuple[Port, ...]:
        return tuple(map(port, many))

    blocks = tuple(
        replace(
            b,
            module=join(prefix, b.module) if b.module else prefix,
            stages=tuple(tuple(replace(s, module=join(prefix, s.module)) for s in stage) for stage in b.stages),
        )
        for b in topology.blocks
    )
    links = tuple(replace(k, writes=ports(k.writes), reads=ports(k.reads), through=tuple(join(prefix, t) for t in k.through)) for k in topology.links)
    return Topology(blocks, links, {port(p): why for p, why in topology.blocked.items()})
