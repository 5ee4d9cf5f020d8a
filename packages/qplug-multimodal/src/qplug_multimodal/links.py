"""From the anatomy of a vision-language model to links between its channels."""

from typing import Literal

import torch
from qcore.model.topology import Axis, Invariance, Link, Port, covered_axes
from torch import nn

from qplug_multimodal.anatomy import Anatomy, BlockAnatomy, Tower

_ALL = Invariance.PERMUTE | Invariance.SCALE | Invariance.ROTATE


class Links:
    """Collects links, and the reasons for those that there are not."""

    def __init__(self, model: nn.Module, anatomy: Anatomy) -> None:
        self.model, self.anatomy = model, anatomy
        self.links: list[Link] = []
        self.why: dict[tuple[str, Axis], str] = {}
        for tower in (anatomy.vision, anatomy.language):
            for block in tower.blocks:
                self._block(block, tower)
        self._connector()
        self._vision_stream()
        self._language_stream()

    # ports -------------------------------------------------------------------------------------------------------------------------------

    def _has(self, path: str, name: str) -> bool:
        return getattr(self.model.get_submodule(path), name, None) is not None

    def _writes(self, path: str, channels: tuple[range, ...] = (), repeat: int = 1) -> tuple[Port, ...]:
        ports = [Port(f"{path}.weight", "out", channels=channels, repeat=repeat)]
        if self._has(path, "bias"):
            ports.append(Port(f"{path}.bias", "out", channels=channels, repeat=repeat))
        return tuple(ports)

    def _reads(self, *paths: str, repeat: int = 1) -> tuple[Port, ...]:
        return tuple(Port(f"{p}.weight", "in", repeat=repeat) for p in paths)

    def _size(self, path: str, axis: Literal["in", "out"] = "out") -> int:
        return int(self.model.get_parameter(f"{path}.weight").shape[1 if axis == "in" else 0])

    def _refuse(self, ports: tuple[Port, ...], why: str) -> None:
        for port in ports:
            self.why.setdefault((port.param, port.axis), why)

    # blocks ------------------------------------------------------------------------------------------------------------------------------

    def _norm(self, norm: str, readers: tuple[str, ...], repeat: int = 1) -> None:
        gain = norm_gain(self.model.get_submodule(norm))
        if gain is None:
            self._refuse(self._reads(*readers), f"{norm} ({type(self.model.get_submodule(norm)).__name__}) does not multiply by its weight")
            return
        writes = (Port(f"{norm}.weight", "out", gain=gain), *self._writes(norm)[1:])
        self.links.append(Link(f"{norm}→", self._size(norm), writes, self._reads(*readers, repeat=repeat), Invariance.SCALE))

    def _block(self, b: BlockAnatomy, tower: Tower) -> None:
        if b.strange:
            for stage in b.stages:
                for path in stage:
                    if path:
                        self._refuse((*self._writes(path), *self._reads(path)), b.strange)
            return
        self._norm(b.first_norm, b.attends)
        self._norm(b.second_norm, b.widens)
        size = b.kv_heads * b.head_dim
        value = self._writes(b.qkv, (range(2 * size, 3 * size),)) if b.qkv else self._writes(b.v)
        self.links.append(
            Link(f"{b.path}.v→out", size, value, self._reads(b.out, repeat=b.heads // b.kv_heads), _ALL, heads=b.kv_heads),
        )
        if tower.turned:
            queries = self._writes(b.qkv) if b.qkv else (*self._writes(b.q), *self._writes(b.k))
            self._refuse(queries, "queries and keys are turned by a rotary embedding, which this adapter does not follow")
        else:
            key = self._writes(b.qkv, (range(size, 2 * size),)) if b.qkv else self._writes(b.k)
            query = self._writes(b.qkv, (range(size),)) if b.qkv else self._writes(b.q, repeat=b.heads // b.kv_heads)
            self.links.append(Link(f"{b.path}.k·q", size, key, query, _ALL, heads=b.kv_heads))
        inner, down = self._size(b.up), self._reads(b.down)
        if b.gate:
            self.links.append(Link(f"{b.path}.up→down", inner, self._writes(b.up), down, Invariance.SCALE))
            self.links.append(Link(f"{b.path}.gate·up→down", inner, self._writes(b.gate) + self._writes(b.up), down, Invariance.PERMUTE))
        else:
            self.links.append(Link(f"{b.path}.up→down", inner, self._writes(b.up), down, Invariance.PERMUTE))

    # between ----------------------------------------------------------------------------------------------------------------------------

    def _connector(self) -> None:
        c = self.anatomy.connector
        if c.strange:
            for path in c.layers:
                self._refuse((*self._writes(path), *self._reads(path)), c.strange)
            return
        if c.norm:
            self._norm(c.norm, c.layers[:1], c.merge)
        first, last = c.layers
        self.links.append(Link(f"{first}→{last}", self._size(first), self._writes(first), self._reads(last), Invariance.PERMUTE))

    def _stream(self, tower: Tower) -> tuple[tuple[Port, ...], tuple[Port, ...], tuple[str, ...]]:
        writes = tuple(Port(p, "out") for p in tower.entries)
        reads: tuple[Port, ...] = ()
        through = list(tower.passes)
        for b in tower.blocks:
            writes += self._writes(b.out) + self._writes(b.down)
            reads += self._reads(*b.attends, *b.widens)
            through += [b.first_norm, b.second_norm]
        return writes, reads, tuple(through)

    def _invariance(self, through: tuple[str, ...]) -> Invariance:
        centred = any(isinstance(self.model.get_submodule(p), nn.LayerNorm) for p in through)
        return Invariance.PERMUTE if centred else Invariance.PERMUTE | Invariance.ROTATE

    def _vision_stream(self) -> None:
        a, c = self.anatomy, self.anatomy.connector
        why = a.strange or a.vision.strange or c.strange
        if not why and not a.vision.blocks:
            why = "the connector reads what enters the tower"
        if not why:
            width, takes = self._size(a.vision.blocks[0].first_norm), self._size(c.layers[0], "in")
            if takes != c.merge * width:
                why = f"{c.layers[0]} reads {takes} channels, and the stream has {width}: how patches lie in them is not known"
        if why:
            if not a.vision.strange:
                writes, reads, _ = self._stream(a.vision)
                self._refuse((*writes, *reads, *self._reads(c.layers[0])), f"the tower's residual stream could not be followed: {why}")
            return
        writes, reads, through = self._stream(a.vision)
        through += (c.norm,) if c.norm else ()
        size = self._size(a.vision.blocks[0].first_norm)
        reads += self._reads(c.layers[0], repeat=c.merge)
        self.links.append(Link("vision residual", size, writes, reads, self._invariance(through), through))

    def _language_stream(self) -> None:
        a = self.anatomy
        if a.language.strange or a.connector.strange:
            return
        writes, reads, through = self._stream(a.language)
        writes += self._writes(a.connector.layers[-1])
        through += (a.final_norm,)
        self._norm(a.final_norm, (a.head,))
        size = self._size(a.final_norm)
        self.links.append(Link("residual", size, writes, (*reads, *self._reads(a.head)), self._invariance(through), through))

    # what is left ------------------------------------------------------------------------------------------------------------------------

    def blocked(self) -> dict[Port, str]:
        """Every axis of every matrix that no link has, with the reason."""
        from qcore.model.topology import Topology

        covered = covered_axes(Topology((), tuple(self.links)))
        found: dict[Port, str] = {}
        axes: tuple[Axis, ...] = ("out", "in")
        for path, module in self.model.named_modules():
            for name, p in module.named_parameters(recurse=False):
                for axis in axes if p.ndim > 1 else ():
                    param = f"{path}.{name}" if path else name
                    if (param, axis) not in covered:
                        found[Port(param, axis)] = self.why.get((param, axis)) or self._reason(path, module, axis)
        return found

    def _reason(self, path: str, module: nn.Module, axis: Axis) -> str:
        a = self.anatomy
        if any(path == u or path.startswith(u + ".") for u in a.vision.unread):
            return "nothing reads what lies behind the layer of the tower that the connector takes"
        if isinstance(module, nn.Embedding) and axis == "in":
            return "token ids or positions: their order is the vocabulary's"
        if path == a.head and axis == "out":
            return "the vocabulary: logits keep their order and size"
        if isinstance(module, nn.Conv2d | nn.Conv3d) and axis == "in":
            return "the channels of an image"
        return "no other parameter was found that shares these channels"


def norm_gain(module: nn.Module) -> float | None:
    """What is added to a norm's weight to give its factor (1 where it multiplies by 1 + weight), tried on numbers; None where neither fits."""
    own = dict(module.named_parameters(recurse=False))
    x = torch.randn(3, own["weight"].shape[0], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = []
    for w in (0.0, 1.0):
        given = {n: torch.zeros(p.shape, dtype=torch.float64) for n, p in own.items()}
        given["weight"] += w
        with torch.no_grad():
            values.append(torch.func.functional_call(module, given, (x,)))
    step = values[1] - values[0]
    if not bool(values[0].abs().max() > 0):
        return 0.0
    return 1.0 if torch.allclose(step, values[0], rtol=1e-5, atol=1e-6) else None
