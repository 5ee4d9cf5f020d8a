"""OSTQuant and SpinQuant: rotations, and scales in the rotated basis, learned through the whole model."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from qcore.calibration.coverage import Rows
from qcore.calibration.observer import Observer, Seen
from qcore.calibration.observers import Gram, Moments
from qcore.errors import SpecError
from qcore.model.layers import layout
from qcore.model.reader import TensorReader
from qcore.model.topology import Invariance, Link, Port, Site, Topology
from qcore.numbers import QuantSpec
from qcore.numbers.hadamard import random_signs
from qcore.transforms.base import Lesson
from qcore.transforms.channels import specs_of
from qcore.transforms.learn import Course, Stretch, Turn, compose, learn
from qcore.transforms.qsur import bound, log_qsur
from qcore.transforms.rewrite import Hadamard, Rewrite, Rotate, Scale, cut_ties, owner_of, rewritten_topology
from qcore.transforms.rotate import HadamardRotate, foreseen, require_folded, rotated_links


@dataclass(frozen=True)
class LearnRotations(Course, HadamardRotate):
    """Rotations of the residual stream and of the heads' values, positive scales of everything else that allows them, both learned.

    Where each stands (row vectors; R orthogonal, S positive and diagonal):

        embedding·R,  q k v gate up: W·R,  o down: RᵀW                    one R for the residual stream
        norm gain · S,  the columns of its readers / S                    each norm, in the rotated basis
        v rows · S · R_h,  o columns / S · R_h                            each key-value head; a head of o reads its group's
        k rows · S,  q rows / S                                           one S for a rotary pair; on the gains of q and k norms where there are any
        up rows · S,  down columns / S
        queries and keys after RoPE, down's input: Hadamard at run time   not learned (`heads`, `rest`)

    Scales are exp of what is learned.  Where a head is written once and read several times, so is its R; biases turn and scale with their rows.
    What a link does not allow is left out, link by link; a model without a rotation of the residual stream learns the other pairs.

    scales: learn scales too, of all links with a side that will be rounded
    start:  "womi": eigenvectors of the readers' weights, then Hadamard: all rotated columns have equal variance; "hadamard": random signs alone
    other fields: of `Course` and `HadamardRotate`

    Sources: https://arxiv.org/abs/2501.13987 (OSTQuant), sections 3.2 to 3.4; https://arxiv.org/abs/2405.16406 (SpinQuant): rotations alone, from
    random Hadamard matrices, against the next token.  Differs from OSTQuant's code: scales are positive; S of q and k is shared by the two channels
    that RoPE turns together, S of v divides o's input axis while learning too (issue 21); no bias comes out of padding.
    """

    name: ClassVar[str] = "learn-rotations"
    scope: ClassVar[Literal["block", "model"]] = "model"
    rest: bool = True
    heads: bool = True
    scales: bool = True
    start: Literal["womi", "hadamard"] = "womi"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start not in ("womi", "hadamard"):
            raise SpecError(f"rotations start from 'womi' or 'hadamard', got {self.start!r}")

    def wants(self, topology: Topology, specs: Mapping[Site, QuantSpec]) -> Mapping[Site, tuple[Observer, ...]]:
        wishes: dict[Site, tuple[Observer, ...]] = dict(super().wants(topology, specs))
        for site in _stream_inputs(topology, specs):
            wishes[site] = (*wishes.get(site, ()), Gram(), Moments())
        # learning runs the model: there must be data, also where nothing is to be observed
        return wishes or {site.input: (Rows(),) for site in topology.sites[:1]}

    def fit(self, topology: Topology, specs: Mapping[Site, QuantSpec], seen: Mapping[Site, Seen], model: nn.Module, reader: TensorReader) -> Rewrite:
        """Where learning starts: nothing is learned without a lesson."""
        notes = foreseen(self, topology, specs, model)
        parts = self.learnables(topology, specs, seen, model, reader, notes)
        online = self._online(parts, topology, specs, seen, model, reader, notes)
        return cut_ties(replace(compose(parts).then(online), notes=tuple(notes)), model, topology.ties)

    def learn(
        self,
        topology: Topology,
        specs: Mapping[Site, QuantSpec],
        seen: Mapping[Site, Seen],
        model: nn.Module,
        reader: TensorReader,
        lesson: Lesson,
    ) -> Rewrite:
        notes = foreseen(self, topology, specs, model)
        parts = self.learnables(topology, specs, seen, model, reader, notes)
        online = self._online(parts, topology, specs, seen, model, reader, notes)
        began = compose(parts)
        if parts:
            found = learn(parts, online, topology, specs, model, reader, lesson, self)
            notes.append(
                f"learned {self.steps} steps by {self.loss}: held-out loss {found.before:.4f} → {found.after:.4f}, "
                + (f"of step {found.at}" if found.at else "the start was best")
            )
        ended = compose(parts)
        notes += _report_qsur({"float": Rewrite(), self.start: began, "learned": ended}, topology, specs, seen, model)
        return cut_ties(replace(ended.then(online), notes=tuple(notes)), model, topology.ties)

    def learnables(
        self,
        topology: Topology,
        specs: Mapping[Site, QuantSpec],
        seen: Mapping[Site, Seen],
        model: nn.Module,
        reader: TensorReader,
        notes: list[str],
    ) -> list[Turn | Stretch]:
        """What is learned, as it starts: the scales of a link before its rotation, those of norms after that of the stream.  notes: grows"""
        turned: dict[str, Turn] = {}
        for i, link in rotated_links(self, topology):
            require_folded(link, topology, model, reader)
            turn = Turn(link, self._start(link, i, topology, model, reader))
            if self.is_worth_it(turn.rewrite(), f"link {link.name}", specs, seen, model, reader, topology, notes):
                turned[link.name] = turn
        stretched = {link.name: Stretch.unit(link) for link in topology.links_with(Invariance.SCALE) if self.scales and _matters(link, specs)}
        stream = [t for t in turned.values() if t.link.through]
        inner = [t for t in turned.values() if not t.link.through]
        return [*stream, *stretched.values(), *inner]

    def _start(self, link: Link, index: int, topology: Topology, model: nn.Module, reader: TensorReader) -> Tensor:
        """R of a link, [heads, c, c] float64."""
        size = link.size // link.heads
        signs = random_signs(link.size, self.seed + index).reshape(link.heads, size)
        mixed = torch.stack([Hadamard(Port("", "in"), own, self.block_of(link)).apply(torch.eye(size, dtype=torch.float64)) for own in signs])
        return womi(link, topology, model, reader) @ mixed if self.start == "womi" else mixed

    def _online(
        self,
        parts: list[Turn | Stretch],
        topology: Topology,
        specs: Mapping[Site, QuantSpec],
        seen: Mapping[Site, Seen],
        model: nn.Module,
        reader: TensorReader,
        notes: list[str],
    ) -> Rewrite:
        return self.at_run_time(rewritten_topology(topology, compose(parts)), specs, seen, model, reader, notes)


def womi(link: Link, topology: Topology, model: nn.Module, reader: TensorReader) -> Tensor:
    """Eigenvectors of the covariance of the rows of all weights that read the link and have sites, head by head.  [heads, c, c] float64

    Followed by a Hadamard matrix, which averages the eigenvalues, every channel of these weights has the same variance.

    Source: https://arxiv.org/abs/2501.13987 (OSTQuant), section 3.3, weight outlier minimization initialization.
    """
    size, sites = link.size // link.heads, {s.param for s in topology.sites}
    total = torch.zeros(link.heads, size, size, dtype=torch.float64)
    mean = torch.zeros(link.heads, 1, size, dtype=torch.float64)
    rows = 0
    for port in link.reads:
        if port.param not in sites or port.axis != "in":
            continue
        channels, _ = layout(owner_of(model, port.param), port.param.rpartition(".")[2]).channels(reader[port.param].double(), port.axis)
        channels = channels if port.part is None else channels[port.part]
        if port.channels:
            channels = channels[..., torch.cat([torch.arange(r.start, r.stop) for r in port.channels])]
        heads = channels.reshape(-1, link.heads, port.repeat, size).permute(1, 0, 2, 3).reshape(link.heads, -1, size)
        total += heads.mT @ heads
        mean += heads.sum(1, keepdim=True)
        rows += heads.shape[1]
    if not rows:
        return torch.eye(size, dtype=torch.float64).expand(link.heads, size, size)
    mean /= rows
    return torch.linalg.eigh(total / rows - mean.mT @ mean).eigenvectors


def _matters(link: Link, specs: Mapping[Site, QuantSpec]) -> bool:
    """Whether anything on the link will be rounded: a scale that nobody feels is not learned."""
    attention = {s.module for s in specs if s.tensor in ("q", "k", "v")}
    written = any(port.param.startswith(f"{module}.") for port in link.ports for module in attention)
    return written or any(specs_of(port, specs) for port in link.reads if port.axis == "in") or any(specs_of(p, specs) for p in link.writes)


def _stream_inputs(topology: Topology, specs: Mapping[Site, QuantSpec]) -> dict[Site, str]:
    """Inputs of weights that will be rounded and that read the residual stream, one for each stage, with the parameter."""
    reads = {p.param for link in topology.links_with(Invariance.ROTATE) if link.through for p in link.reads}
    found: dict[Site, str] = {}
    for block in topology.blocks:
        for stage in block.stages:
            for site in stage:
                if site.part is None and site in specs and site.param in reads:
                    found[site.input] = site.param
                    break
    return found


def _report_qsur(
    forms: Mapping[str, Rewrite], topology: Topology, specs: Mapping[Site, QuantSpec], seen: Mapping[Site, Seen], model: nn.Module
) -> list[str]:
    """One sentence on QSUR at the inputs that read the residual stream, in each form."""
    values: dict[str, list[float]] = {name: [] for name in forms}
    size = 0
    for site, param in _stream_inputs(topology, specs).items():
        own = seen.get(site, {})
        if Gram.name not in own or Moments.name not in own:
            continue
        gram, mean = own[Gram.name].double(), own[Moments.name].mean.double()
        size = mean.shape[0]
        covariance = gram - mean.outer(mean) + 1e-6 * gram.diagonal().mean() * torch.eye(size, dtype=torch.float64)
        for name, rewrite in forms.items():
            t = _input_map(rewrite, param, size)
            values[name].append(log_qsur(mean @ t, t.T @ covariance @ t))
    if not size:
        return []
    said = ", ".join(f"{name} {torch.tensor(own).exp().mean():.3f}" for name, own in values.items())
    count, most = len(next(iter(values.values()))), math.exp(bound(size))
    return [f"QSUR^(1/d) of the inputs that read the residual stream, mean over {count}: {said}; at most {most:.3f}"]


def _input_map(rewrite: Rewrite, param: str, size: int) -> Tensor:
    """T with x' = x·T: what the rewrite makes of the inputs that this weight reads.  [K, K] float64"""
    t = torch.eye(size, dtype=torch.float64)
    for edit in rewrite.edits.get(param, ()):
        if edit.port.axis == "in" and isinstance(edit, Rotate | Hadamard):
            t = edit.apply(t)
        elif edit.port.axis == "in" and isinstance(edit, Scale):
            t = t / edit.by
    return t
