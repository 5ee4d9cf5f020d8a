"""Adapters for RWKV: versions 6 and 7 as this plug-in's own modules, version 4 as transformers'.

A token shift mixes each channel with its own past, x + μ ∘ (x_{t-1} - x): per-channel scales pass it, rotations do not.  So a norm's gain may be
scaled against everything that reads it, and the residual stream of LayerNorms may be permuted, no more.
"""

from typing import Any, ClassVar

import torch
from qcore.model.adapter import ModelAdapter, tied_names
from qcore.model.layers import Layout, by_type
from qcore.model.tap import RunContext
from qcore.model.topology import Axis, Block, Invariance, Link, Port, Site, Topology
from torch import Tensor, nn

from qplug_ssm.elementwise import Elementwise
from qplug_ssm.rwkv6 import RWKV6, TimeMix6
from qplug_ssm.rwkv7 import RWKV7, TimeMix7

ALL = Invariance.PERMUTE | Invariance.SCALE | Invariance.ROTATE
_WHY_PAIRS = "the recurrence pairs these channels head by head with keys, decays and learning rates; that set of channels is not worked out"
_WHY_VALUES = "values are shared by all layers (first layer's values) and normed head by head; that set of channels is not worked out"


@by_type.register(TimeMix7)
@by_type.register(TimeMix6)
def _(module: nn.Module, name: str) -> Layout:
    """Low-rank maps lie as x multiplies them, [K, N]."""
    return Layout(
        matrix=lambda w: w.T,
        tensor=lambda m, shape: m.T.reshape(shape),
        rows=lambda x: x.reshape(-1, x.shape[-1]),
        channels=lambda w, axis: (w.movedim(1 if axis == "out" else 0, -1), lambda c: c.movedim(-1, 1 if axis == "out" else 0)),
    )


def out(param: str) -> Port:
    return Port(param, "out")


def into(param: str) -> Port:
    return Port(param, "in")


def width_of(model: Any) -> int:
    return model.config.n_embd


class _Own(ModelAdapter):
    """What versions 6 and 7 have in common."""

    kind: ClassVar[type[nn.Module]]
    low_rank: ClassVar[tuple[str, ...]]  # of `att`, those that read the normed stream
    readers: ClassVar[tuple[str, ...]]  # linears of `att` that do

    def matches(self, model: nn.Module) -> bool:
        return type(model) is self.kind

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        """Logits [B, T, V]."""
        return model(batch if isinstance(batch, Tensor) else batch["input_ids"])

    def context(self, batch: Any) -> RunContext:
        if isinstance(batch, Tensor):
            return RunContext()
        mask = batch.get("attention_mask")
        return RunContext(valid=None if mask is None else mask.bool(), weight=float(batch.get("row_weight", 1.0)))

    def topology(self, model: nn.Module) -> Topology:
        paths = [f"blocks.{i}" for i in range(len(model.blocks))]  # type: ignore[arg-type]
        links = [link for path in paths for link in self._block_links(path, model)]
        width = width_of(model)
        links.append(Link("ln_out→head", width, (out("ln_out.weight"), out("ln_out.bias")), (into("head.weight"),), Invariance.SCALE))
        links.append(self._residual(paths, model))
        blocked = {into("emb.weight"): "token ids: their order is the vocabulary's", out("head.weight"): "the vocabulary: logits keep their order"}
        for path in paths:
            blocked |= self._blocked(path, model)
        return Topology(tuple(self._block(path, model) for path in paths), tuple(links), blocked, ties=tied_names(model))

    def _att_reads(self, path: str, model: nn.Module) -> list[Port]:
        att = model.get_submodule(f"{path}.att")
        matrices = [into(f"{path}.att.{name}.weight") for name in self.readers]
        return matrices + [into(f"{path}.att.{name}") for name in self.low_rank if getattr(att, name, None) is not None]

    def _ffn_reads(self, path: str) -> list[Port]:
        raise NotImplementedError

    def _block_links(self, path: str, model: nn.Module) -> list[Link]:
        width = width_of(model)
        ffn: Any = model.get_submodule(f"{path}.ffn")
        return [
            Link(
                f"{path}.ln1→att",
                width,
                (out(f"{path}.ln1.weight"), out(f"{path}.ln1.bias")),
                tuple(self._att_reads(path, model)),
                Invariance.SCALE,
            ),
            Link(f"{path}.ln2→ffn", width, (out(f"{path}.ln2.weight"), out(f"{path}.ln2.bias")), tuple(self._ffn_reads(path)), Invariance.SCALE),
            # relu(t k)² = t² relu(k)²: no scale passes unchanged
            Link(
                f"{path}.ffn.key→value",
                ffn.key.out_features,
                (out(f"{path}.ffn.key.weight"),),
                (into(f"{path}.ffn.value.weight"),),
                Invariance.PERMUTE,
            ),
        ]

    def _residual_writes(self, path: str) -> list[Port]:
        return [out(f"{path}.att.output.weight"), out(f"{path}.ffn.value.weight")]

    def _residual(self, paths: list[str], model: nn.Module) -> Link:
        """Channels may change places everywhere at once: in norms and mixing vectors too."""
        width = width_of(model)
        through = ["ln_out"]
        for path in paths:
            block = model.get_submodule(path)
            through += [f"{path}.{n}" for n, m in block.named_children() if isinstance(m, nn.LayerNorm)]
            through += [f"{path}.{n}" for n, m in block.named_modules() if isinstance(m, Elementwise) and self._in_stream(n)]
        return Link(
            "residual",
            width,
            (out("emb.weight"), *(p for path in paths for p in self._residual_writes(path))),
            (*(p for path in paths for p in (*self._att_reads(path, model), *self._ffn_reads(path))), into("head.weight")),
            Invariance.PERMUTE,
            tuple(through),
        )

    def _in_stream(self, name: str) -> bool:
        """Whether an element-wise vector stands on the residual's channels, not on a head's."""
        return name.rpartition(".")[2] not in ("k_k", "k_a", "r_k", "time_faaaa")

    def _blocked(self, path: str, model: nn.Module) -> dict[Port, str]:
        raise NotImplementedError

    def _block(self, path: str, model: nn.Module) -> Block:
        """Matrices in the order in which they see their inputs; the element-wise vectors last, on what the solved matrices give them."""
        att = tuple(Site(f"{path}.att.{n}") for n in self.readers)
        ffn = tuple(Site(p.param.removesuffix(".weight")) for p in self._ffn_reads(path))
        mu = tuple(Site(f"{path}.{n}", "mu") for n, m in model.get_submodule(path).named_modules() if isinstance(m, Elementwise))
        return Block(path, (att, (Site(f"{path}.att.output"),), ffn, (Site(f"{path}.ffn.value"),), mu))


class RWKV7Adapter(_Own):
    """RWKV-7, as `qplug_ssm.rwkv7.RWKV7`."""

    name: ClassVar[str] = "rwkv7"
    kind: ClassVar[type[nn.Module]] = RWKV7
    low_rank: ClassVar[tuple[str, ...]] = ("w1", "a1", "v1", "g1")
    readers: ClassVar[tuple[str, ...]] = ("receptance", "key", "value")

    def _ffn_reads(self, path: str) -> list[Port]:
        return [into(f"{path}.ffn.key.weight")]

    def _block_links(self, path: str, model: nn.Module) -> list[Link]:
        att = model.get_submodule(f"{path}.att")
        links = super()._block_links(path, model)
        for name, allowed in (("w", Invariance.PERMUTE), ("a", ALL), ("v", ALL), ("g", Invariance.PERMUTE)):
            low = getattr(att, f"{name}1", None)
            if low is not None:
                ports = (out(f"{path}.att.{name}1"),), (into(f"{path}.att.{name}2"),)
                links.append(Link(f"{path}.att.{name}1→{name}2", low.shape[1], *ports, allowed))
        width = width_of(model)
        links.append(Link(f"{path}.att.gate→output", width, (out(f"{path}.att.g2"),), (into(f"{path}.att.output.weight"),), Invariance.SCALE))
        return links

    def _blocked(self, path: str, model: nn.Module) -> dict[Port, str]:
        pairs = ("receptance.weight", "key.weight", "w2", "a2")
        blocked = {out(f"{path}.att.{n}"): _WHY_PAIRS for n in pairs} | {out(f"{path}.att.value.weight"): _WHY_VALUES}
        if getattr(model.get_submodule(f"{path}.att"), "v2", None) is not None:
            blocked[out(f"{path}.att.v2")] = _WHY_VALUES
        return blocked


class RWKV6Adapter(_Own):
    """RWKV-6, as `qplug_ssm.rwkv6.RWKV6`."""

    name: ClassVar[str] = "rwkv6"
    kind: ClassVar[type[nn.Module]] = RWKV6
    low_rank: ClassVar[tuple[str, ...]] = ("time_maa_w1", "time_decay_w1")
    readers: ClassVar[tuple[str, ...]] = ("receptance", "key", "value", "gate")

    def _ffn_reads(self, path: str) -> list[Port]:
        return [into(f"{path}.ffn.{n}.weight") for n in ("key", "receptance")]

    def _block_links(self, path: str, model: nn.Module) -> list[Link]:
        rank: int = model.config.decay_lora  # type: ignore[union-attr,assignment]
        own = Link(f"{path}.att.decay1→2", rank, (out(f"{path}.att.time_decay_w1"),), (into(f"{path}.att.time_decay_w2"),), Invariance.PERMUTE)
        return [*super()._block_links(path, model), own]

    def _residual_writes(self, path: str) -> list[Port]:
        # the gate of the channel mixing multiplies what is added; the data-dependent mixing, [5, rank, C], lies on the same channels
        mixing = Port(f"{path}.att.time_maa_w2", "in")
        return [*super()._residual_writes(path), out(f"{path}.ffn.receptance.weight"), mixing]

    def _blocked(self, path: str, model: nn.Module) -> dict[Port, str]:
        att = f"{path}.att"
        blocked = {out(f"{att}.{n}"): _WHY_PAIRS for n in ("receptance.weight", "key.weight", "time_decay_w2")}
        why = "values are gated and normed head by head; that set of channels is not worked out"
        blocked |= {out(f"{att}.value.weight"): why, out(f"{att}.gate.weight"): why, into(f"{att}.output.weight"): why}
        low = "five low-rank maps lie side by side in one parameter"
        return blocked | {out(f"{att}.time_maa_w1"): low, out(f"{att}.time_maa_w2"): low}


class RWKV4Adapter(ModelAdapter):
    """RWKV-4, as transformers' RwkvForCausalLM.  Its element-wise vectors are parameters of functional code, and stay float."""

    name: ClassVar[str] = "rwkv4"
    priority: ClassVar[int] = 1

    def matches(self, model: nn.Module) -> bool:
        return type(model).__name__ == "RwkvForCausalLM"

    def prepare(self, model: nn.Module) -> None:
        """Switch transformers' halving of weights and activations every few layers off in place: it rewrites weights when the model first runs.

        The function stays: halving only keeps float16 from overflowing, and the last LayerNorm takes it out again.
        """
        inner: Any = model.rwkv
        if inner.config.rescale_every and not inner.layers_are_rescaled:
            inner.config.rescale_every = 0
        elif inner.config.rescale_every:
            with torch.no_grad():
                for i, block in enumerate(inner.blocks):
                    for leaf in (block.attention.output, block.feed_forward.value):
                        leaf.weight.mul_(2 ** (i // inner.config.rescale_every))
            inner.config.rescale_every = 0

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        """Logits [B, T, V]."""
        return model(input_ids=batch if isinstance(batch, Tensor) else batch["input_ids"], use_cache=False).logits

    def context(self, batch: Any) -> RunContext:
        return RunContext() if isinstance(batch, Tensor) else RunContext(weight=float(batch.get("row_weight", 1.0)))

    def topology(self, model: nn.Module) -> Topology:
        inner: Any = model.rwkv
        paths = [f"rwkv.blocks.{i}" for i in range(len(inner.blocks))]
        width = inner.config.hidden_size
        links, blocked = [], {into("rwkv.embeddings.weight"): "token ids: their order is the vocabulary's", out("head.weight"): "the vocabulary"}
        blocked |= {out("rwkv.embeddings.weight"): "mixing vectors of functional code lie on these channels", into("head.weight"): "as the embedding"}
        for path in paths:
            for norm, half, names in (("ln1", "attention", ("key", "value", "receptance")), ("ln2", "feed_forward", ("key", "receptance"))):
                writes = out(f"{path}.{norm}.weight"), out(f"{path}.{norm}.bias")
                reads = tuple(into(f"{path}.{half}.{n}.weight") for n in names)
                links.append(Link(f"{path}.{norm}→{half}", width, writes, reads, Invariance.SCALE))
            size = inner.blocks[0].attention.value.out_features
            pair = (out(f"{path}.attention.value.weight"),), (into(f"{path}.attention.output.weight"),)
            links.append(Link(f"{path}.value→output", size, *pair, Invariance.SCALE))
            hidden = inner.blocks[0].feed_forward.key.out_features
            pair = (out(f"{path}.feed_forward.key.weight"),), (into(f"{path}.feed_forward.value.weight"),)
            links.append(Link(f"{path}.key→value", hidden, *pair, Invariance.PERMUTE))
            stream = ("attention.output.weight", "feed_forward.value.weight", "feed_forward.receptance.weight")
            blocked |= {out(f"{path}.{n}"): "the residual stream, on which mixing vectors of functional code lie" for n in stream}
            blocked |= {out(f"{path}.attention.{n}.weight"): "decays and first-token weights lie on these channels" for n in ("key", "receptance")}
            for half, names in (("attention", ("key", "value", "receptance")), ("feed_forward", ("key", "receptance"))):
                for name in names:
                    mix = f"{path}.{half}.time_mix_{name}"
                    axes: tuple[Axis, ...] = ("out", "in")
                    if any(mix == n for n, _ in model.named_parameters()):
                        blocked |= {Port(mix, axis): "a mixing vector of functional code" for axis in axes}
        sites = tuple(self._block(path) for path in paths)
        return Topology(sites, tuple(links), blocked, ties=tied_names(model))

    def _block(self, path: str) -> Block:
        att = tuple(Site(f"{path}.attention.{n}") for n in ("key", "value", "receptance"))
        ffn = tuple(Site(f"{path}.feed_forward.{n}") for n in ("key", "receptance"))
        # a block returns three things, which transformers unpacks: only the model itself can run it
        return Block(path, (att, (Site(f"{path}.attention.output"),), ffn, (Site(f"{path}.feed_forward.value"),)), feed="rerun")
