"""LayerNorm to RMSNorm, so that a residual stream behind LayerNorms can be rotated."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from qcore.calibration.observer import Observer, Seen
from qcore.errors import SpecError
from qcore.model.layers import layout
from qcore.model.reader import TensorReader
from qcore.model.topology import Invariance, Link, Port, Site, Topology
from qcore.modules.stream_norm import StreamNorm
from qcore.numbers import QuantSpec
from qcore.numbers.hadamard import random_signs
from qcore.transforms.base import Transform
from qcore.transforms.fold_norm import norm_links
from qcore.transforms.rewrite import Hadamard, Insert, ModuleConfig, Rewrite, Shift, cut_ties, hadamard_link, owner_of
from qcore.transforms.rotate import largest_block

CENTRED = 1e-6  # the share of a parameter's magnitude that its mean over channels may keep: what a float32 checkpoint of a centred one has


@dataclass(frozen=True)
class LayerNormToRMS(Transform):
    """Centre whatever writes a residual stream that passes LayerNorms, put RMSNorm in their places, and rotate the stream.

    LN(x) = (x - mean(x)) / √(var(x) + ε).  Where every producer of x has mean zero over its output channels, W ← W - mean(W), b ← b - mean(b) for
    layers, embeddings, class tokens and positions alike, x has mean zero too, and LN is RMSNorm, which commutes with rotations.  Put FoldNorm
    before it: gains and biases of norms in front of layers go into these.

    Two cases that centring alone does not serve are served exactly all the same:
    - something reads the stream itself, not through a norm (LLaVA's projector reads the last but one layer of its tower): it would miss the mean.
      The
      stream keeps its mean then, and the norm takes away what lies along the rotated direction of ones, one dot product a token
      (`StreamNorm.direction`);
    - a norm stands in the stream (behind the embeddings of CLIP, behind every block of post-norm models): its gain and bias have no layer to go
      to, and become a matrix of the norm's own, d² weights (`StreamNorm.matrix`).  `refuse_matrices` leaves such streams alone instead.

    rotate: by a random-sign Hadamard matrix; False = only replace the norms
    refuse_matrices: leave a stream alone where a norm stands in it
    seed:   of the signs

    Source: https://arxiv.org/abs/2401.15024 (SliceGPT), section 3.2; https://arxiv.org/abs/2502.00425 (MQuant), section 3.3, for vision towers.
    """

    name: ClassVar[str] = "layer-norm-to-rms"
    scope: ClassVar[Literal["block", "model"]] = "model"
    rotate: bool = True
    refuse_matrices: bool = False
    seed: int = 0

    def wants(self, topology: Topology, specs: Mapping[Site, QuantSpec]) -> Mapping[Site, tuple[Observer, ...]]:
        return {}

    def fit(self, topology: Topology, specs: Mapping[Site, QuantSpec], seen: Mapping[Site, Seen], model: nn.Module, reader: TensorReader) -> Rewrite:
        notes: list[str] = []
        rewrite = Rewrite()
        for i, link in enumerate(streams(topology, model)):
            rewrite = rewrite.then(self._stream(link, i, topology, model, reader, notes))
        return cut_ties(replace(rewrite, notes=tuple(notes)), model, topology.ties)

    def _stream(self, link: Link, index: int, topology: Topology, model: nn.Module, reader: TensorReader, notes: list[str]) -> Rewrite:
        before = {path: own for own, path in norm_links(topology) if path in link.through and own.reads}
        inside = [path for path in link.through if path not in before]
        if inside and self.refuse_matrices:
            notes.append(f"link {link.name}: {inside[0]} stands in the stream, and its gain would become a matrix; the stream is left alone")
            return Rewrite()
        for path in before:
            _require_folded(path, model, reader)
        served = {p for own in before.values() for p in own.reads}
        direct = [p for p in link.reads if p not in served]
        d = link.size
        block, signs = largest_block(d), random_signs(d, self.seed + index).double()
        rewrite = Rewrite()
        if direct:
            notes.append(f"link {link.name}: {direct[0].param} reads the stream itself; the stream keeps its mean, and the norms take it away")
        else:
            rewrite = centred(link, model, reader)
        ones = torch.full((d,), 1 / sqrt(d), dtype=torch.float64)

        def turned(t: Tensor) -> Tensor:
            return Hadamard(Port("", "out"), signs, block).apply(t) if self.rotate else t

        for path in link.through:
            norm: Any = model.get_submodule(path)
            tensors = {"direction": turned(ones)} if direct else {}
            if path in inside:
                gain, bias = reader[f"{path}.weight"].double(), reader[f"{path}.bias"].double() if norm.bias is not None else torch.zeros_like(ones)
                # y R = (g ∘ n + b) R with n = n' Rᵀ: rows of Rᵀ diag(g) are those of diag(g) turned on the left
                matrix, shift = torch.diag(gain), bias
                if not direct:
                    matrix, shift = matrix - matrix.mean(1, keepdim=True), shift - shift.mean()
                tensors |= {"matrix": turned(turned(matrix).T).T.contiguous(), "shift": turned(shift)}
                notes.append(f"link {link.name}: {path} stands in the stream; its gain and bias became a matrix of {d} × {d}")
            elif norm.bias is not None and bool(((bias := reader[f"{path}.bias"].double()) != 0).any()):
                tensors |= {"shift": turned(bias)}  # a reader has no bias that could take it over
            config = {"size": d, "eps": float(norm.eps), "centred": not direct, "matrix": "matrix" in tensors, "shift": "shift" in tensors}
            rewrite.inserts[path] = Insert(ModuleConfig(StreamNorm.name, config, tensors), "instead")
        gone = frozenset(f"{path}.{name}" for path in link.through for name, _ in model.get_submodule(path).named_parameters(recurse=False))
        rewrite = replace(rewrite, dropped=gone)
        if not self.rotate:
            return rewrite
        if block < d:
            notes.append(f"link {link.name}: no Hadamard matrix of size {d} is known, rotated in blocks of {block}")
        return rewrite.then(hadamard_link(replace(link, invariance=link.invariance | Invariance.ROTATE), signs, block))


def streams(topology: Topology, model: nn.Module) -> list[Link]:
    """The links that pass nothing but LayerNorms, at least one, of the link's own width."""

    def passes(link: Link) -> bool:
        norms = [model.get_submodule(path) for path in link.through]
        return bool(norms) and all(type(n) is nn.LayerNorm and tuple(n.normalized_shape) == (link.size,) for n in norms)

    return [link for link in topology.links_with(Invariance.PERMUTE) if link.heads == 1 and passes(link)]


def centred(link: Link, model: nn.Module, reader: TensorReader) -> Rewrite:
    """Take from everything that writes the link its mean over the link's channels."""
    rewrite = Rewrite()
    for port in link.writes:
        if port.channels or port.part is not None or port.repeat != 1:
            raise SpecError(f"link {link.name!r}: {port} writes a slice of its parameter, which is not centred here; leave layer-norm-to-rms out")
        w = reader[port.param].double()
        channels, back = layout(owner_of(model, port.param), port.param.rpartition(".")[2]).channels(w, port.axis)
        mean = channels.mean(-1, keepdim=True)
        if float(mean.abs().max()) > CENTRED * float(w.abs().max()):
            rewrite.edits[port.param] = (Shift(port, back(-mean.expand(channels.shape).contiguous())),)
    return rewrite


def _require_folded(path: str, model: nn.Module, reader: TensorReader) -> None:
    """SpecError for a norm whose gains differ; a bias may have stayed, where a layer behind the norm has none."""
    if bool((reader[f"{path}.weight"].double() != 1).any()):
        raise SpecError(f"{path} has gains of its own; put FoldNorm() before layer-norm-to-rms")
