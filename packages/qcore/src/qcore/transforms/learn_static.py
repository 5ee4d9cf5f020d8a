"""MobileQuant: scales of links, clipping of weights and static ranges of inputs, learned together from end to end.

    each step:  weights = round(clip(rewrite(s)))  and  inputs = round(clip(x))  →  what the last block puts out, rounding straight through
                mean squared error against the float model's  →  AdamW on log s, on the clipping's logits, on the log of the ranges

All three are handed over as a `Rewrite`: scales merge into the weights, clipping is what is taken from each weight, so that nearest rounding finds
the learned scale as the extreme, and a range is a module before the layer, so that the observer of extremes finds no more than it.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from qcore.calibration.coverage import Rows
from qcore.calibration.observer import Observer, Seen
from qcore.errors import SpecError
from qcore.model.adapter import Batch, ModelAdapter
from qcore.model.layers import layout
from qcore.model.reader import TensorReader, materialize
from qcore.model.tap import running
from qcore.model.topology import Invariance, Port, Site, Topology
from qcore.modules.clip_range import ClipRange
from qcore.modules.online import Online
from qcore.numbers import Int, Offset, PerTensor, QuantSpec
from qcore.numbers.granularity import block_range, spread
from qcore.transforms.base import Lesson, Transform
from qcore.transforms.channels import specs_of
from qcore.transforms.learn import Course, Stretch, compose, lessons_of
from qcore.transforms.rewrite import Insert, ModuleConfig, Rewrite, Shift, cut_ties, owner_of, scale_classes
from qcore.transforms.smooth import SmoothQuant, input_links
from qcore.transforms.straight_through import fake_quantize_through

_LOOK_EVERY = 10  # steps between two looks at the held-out sequences
_UNCLIPPED = 4.0  # σ(4) = 0.982 of the extremes: where clipping starts


@dataclass(frozen=True)
class LearnStatic(Transform):
    """Learn scales of all links that allow them, how far each row of a weight is clipped, and the static range of each linear layer's input.

    Scales start as SmoothQuant's; a clipped range is σ(γ) of the extremes, γ = 4 at first; ranges of inputs start as the extremes of the data, and
    only inputs with one static integer scale for the tensor have one.  Everything is learned by one loss, the mean squared error of the last block's
    outputs, AdamW without decay, rates falling along a cosine to a tenth.

    Source: https://arxiv.org/abs/2408.13933 (MobileQuant).  Differs: no shifts, which want a bias in every layer after a norm, where most models have
    none; rates are for hundreds of steps, where the paper's (1e-3, 1e-2, 1e-6) are for 61,440; ranges move by a factor.  The numbers that are best on
    held-out sequences are those that are kept.  An interrupted run learns anew.  Price: a run holds what is clipped from every weight.

    steps, batch, length, held_out, seed: as of `Course`
    alpha:   of SmoothQuant, where the scales start
    lr_scale, lr_clip, lr_range: of log s, of γ, and of the log of a range's ends;  0 = left as it starts
    clip, ranges: learn, and hand over, clipping of weights, and ranges of inputs; without both the rewrite is exact
    target:  "end": the last block's outputs, all together; "block": each block's own in its turn with its share of the steps, to compare with
    """

    name: ClassVar[str] = "learn-static"
    scope: ClassVar[Literal["block", "model"]] = "model"
    steps: int = 200
    batch: int = 4
    length: int = 256
    held_out: int = 4
    alpha: float = 0.5
    lr_scale: float = 0.005
    lr_clip: float = 0.02
    lr_range: float = 0.001
    clip: bool = True
    ranges: bool = True
    target: Literal["end", "block"] = "end"
    seed: int = 0

    def __post_init__(self) -> None:
        self.course  # noqa: B018  it checks its fields
        SmoothQuant(self.alpha)
        if min(self.lr_scale, self.lr_clip, self.lr_range) < 0:
            raise SpecError(f"learning rates are 0 or more, got lr_scale={self.lr_scale}, lr_clip={self.lr_clip}, lr_range={self.lr_range}")
        if self.target not in ("end", "block"):
            raise SpecError(f"target is 'end' or 'block', got {self.target!r}")

    @property
    def course(self) -> Course:
        """The part of it that says what is read, and how often."""
        return Course(steps=self.steps, batch=self.batch, length=self.length, held_out=self.held_out, seed=self.seed)

    @property
    def exact(self) -> bool:  # type: ignore[override]
        return not (self.clip or self.ranges)

    def wants(self, topology: Topology, specs: Mapping[Site, QuantSpec]) -> Mapping[Site, tuple[Observer, ...]]:
        # learning runs the model: there must be data, also where nothing is to be observed
        return SmoothQuant(self.alpha).wants(topology, specs) or {site.input: (Rows(),) for site in topology.sites[:1]}

    def fit(self, topology: Topology, specs: Mapping[Site, QuantSpec], seen: Mapping[Site, Seen], model: nn.Module, reader: TensorReader) -> Rewrite:
        """The scales where learning starts: nothing is learned, and nothing clipped, without a lesson."""
        start = compose(self.stretches(topology, specs, seen, model, reader))
        return cut_ties(replace(start, exact=0.0 if self.exact else 1e-9), model, topology.ties)

    def stretches(
        self, topology: Topology, specs: Mapping[Site, QuantSpec], seen: Mapping[Site, Seen], model: nn.Module, reader: TensorReader
    ) -> list[Stretch]:
        """The scales of every link on which something will be rounded, as they start."""
        links = [link for link in topology.links_with(Invariance.SCALE) if any(specs_of(p, specs) for p in link.ports)]
        smooth, found = {link.name for link in input_links(topology, specs)}, []
        for link in links:
            own = Stretch.unit(link)
            if link.name in smooth and link.share == "none":
                s = SmoothQuant(self.alpha).scales(link, specs, seen, model, reader)
                own.log[scale_classes(link)] = -s.log()
            found.append(own)
        return found

    def learn(
        self,
        topology: Topology,
        specs: Mapping[Site, QuantSpec],
        seen: Mapping[Site, Seen],
        model: nn.Module,
        reader: TensorReader,
        lesson: Lesson,
    ) -> Rewrite:
        held_out, train = lessons_of(lesson.batches, self.course)
        student = _Student(self, self.stretches(topology, specs, seen, model, reader), topology, specs, model, reader, lesson.adapter)
        last, notes = len(topology.blocks) - 1, []
        with torch.enable_grad():
            student.start_ranges(lesson.batches)
            before = student.loss(held_out, last)
            phases = [last] if self.target == "end" else list(range(last + 1))
            own_steps = max(self.steps // len(phases), 1)
            for turn, block in enumerate(phases):
                student.learn(train, held_out, block, own_steps, turn, lesson)
            after = student.loss(held_out, last)
            how = "end to end" if self.target == "end" else "block by block"
            notes.append(f"learned {self.steps} steps {how}: held-out error {before:.4g} → {after:.4g}")
            found = student.rewrite()
            claimed = 0.0 if self.exact else max(student.deviation(held_out, last), 1e-9)
        return cut_ties(replace(found, exact=claimed, notes=tuple(notes)), model, topology.ties)


@dataclass
class _Range:
    """The learned range of an input: low·exp(a) … high·exp(b).  ends: [2] low ≤ 0 ≤ high;  log: [2] a and b"""

    spec: QuantSpec
    ends: Tensor = field(default_factory=lambda: torch.zeros(2))
    log: Tensor = field(default_factory=lambda: torch.zeros(2))

    def bounds(self) -> tuple[Tensor, Tensor]:
        low, high = self.ends * self.log.exp()
        return low, high

    def clipped(self, x: Tensor) -> Tensor:
        low, high = (end.to(x) for end in self.bounds())
        return torch.minimum(torch.maximum(x, low), high)

    def rounded(self, x: Tensor) -> Tensor:
        """On the static grid; gradients reach x where it is not clipped, and the range everywhere (LSQ, https://arxiv.org/abs/1902.08153)."""
        fmt = self.spec.format
        low, high = (end.to(x) for end in self.bounds())
        if self.spec.offset is Offset.NONE:
            step = torch.maximum(high / fmt.hi, low / fmt.lo) if fmt.lo < 0 else high / fmt.hi
        else:
            step = (high - low) / (fmt.hi - fmt.lo)
        step = step + (step == 0)
        zero = 0.0 if self.spec.offset is Offset.NONE else _through(fmt.lo - low / step)
        z = (x / step + zero).clamp(fmt.lo, fmt.hi)
        return (_through(z) - zero) * step


def _through(z: Tensor) -> Tensor:
    return z + (z.round() - z).detach()


class _Hidden(nn.Module):
    """What blocks put out while the adapter runs the model, as a module's forward, for `functional_call`."""

    def __init__(self, model: nn.Module, adapter: ModelAdapter, blocks: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self._adapter, self._kept = adapter, [torch.empty(0)] * len(blocks)
        for i, path in enumerate(blocks):
            model.get_submodule(path).register_forward_hook(self._keeper(i))

    def _keeper(self, index: int) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            self._kept[index] = output[0] if isinstance(output, tuple) else output

        return keep

    def forward(self, batch: Batch) -> list[Tensor]:
        self._adapter.outputs(self.model, batch)
        return list(self._kept)


class _Student:
    """The float model twice: as it is, and scaled, clipped and rounded."""

    def __init__(
        self,
        course: LearnStatic,
        stretches: Sequence[Stretch],
        topology: Topology,
        specs: Mapping[Site, QuantSpec],
        model: nn.Module,
        reader: TensorReader,
        adapter: ModelAdapter,
    ) -> None:
        self.own, self.stretches, self.adapter = course, stretches, adapter
        self.dtype = torch.float64 if any(p.dtype is torch.float64 for p in model.parameters()) else torch.float32
        self.blocks = [block.module for block in topology.blocks]
        teacher = copy.deepcopy(model).eval()
        materialize(teacher, "", reader, self.dtype)
        teacher.requires_grad_(False)
        shared = {id(t): t for t in (*teacher.parameters(), *teacher.buffers())}
        self.base = copy.deepcopy(teacher, shared)
        self.teacher, self.student = _Hidden(teacher, adapter, self.blocks), _Hidden(self.base, adapter, self.blocks)
        self.mode: Literal["watch", "round", "clip"] = "round"
        whole = [s for s in topology.sites if s in specs and s.part is None and not s.channels]
        self.weights = {s.param: specs[s] for s in whole}
        self.clips = {name: self._clip(name, spec) for name, spec in self.weights.items() if course.clip}
        self.ranges = {s.module: _Range(specs[s.input]) for s in whole if course.ranges and s.input in specs and self._has_range(s, specs[s.input])}
        for s in whole:
            if s.input in specs:
                self._leaf(s.module).register_forward_pre_hook(self._round_input(s.module, specs[s.input]))

    def _leaf(self, path: str) -> nn.Module:
        module = self.base.get_submodule(path)
        return module.leaf if isinstance(module, Online) else module

    def _has_range(self, site: Site, spec: QuantSpec) -> bool:
        plain = isinstance(spec.format, Int) and spec.scaled and spec.offset is not Offset.VALUE
        return plain and spec.when == "static" and isinstance(spec.granularity, PerTensor) and type(self.base.get_submodule(site.module)) is nn.Linear

    def _clip(self, name: str, spec: QuantSpec) -> Tensor:
        """γ of the low and of the high end of every block of a weight.  [2, g0, g1]"""
        matrix = self._matrix(name, self._float(name))
        low, _ = block_range(matrix, spec.granularity.block(tuple(matrix.shape)))
        return torch.full((2, *low.shape), _UNCLIPPED, dtype=torch.float64)

    def _float(self, name: str) -> Tensor:
        path, _, own = name.rpartition(".")
        return getattr(self._leaf(path), own)

    def _matrix(self, name: str, w: Tensor) -> Tensor:
        return layout(owner_of(self.base, name), name.rpartition(".")[2]).matrix(w)

    def _round_input(self, path: str, spec: QuantSpec) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            own, x = self.ranges.get(path), args[0]
            if self.mode == "watch":
                if own is not None:
                    ends = torch.stack([x.detach().amin(), x.detach().amax()]).to(own.ends)
                    own.ends = torch.stack([torch.minimum(own.ends[0], ends[0]), torch.maximum(own.ends[1], ends[1])])
                return args
            if self.mode == "clip":
                return args if own is None else (own.clipped(x), *args[1:])
            return (fake_quantize_through(x, spec) if own is None else own.rounded(x), *args[1:])

        return hook

    # what is learned, and by what --------------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """The student's parameters, by name in `self.student`."""
        rewrite, found = compose(self.stretches), {}
        for name in dict.fromkeys([*rewrite.edits, *self.weights]):
            path, _, own = name.rpartition(".")
            w = rewrite.tensor(name, self._float(name), owner_of(self.base, name), self.dtype)
            w = self.clipped(name, w) if name in self.clips else w
            if name in self.weights and self.mode == "round":
                lay = layout(owner_of(self.base, name), own)
                w = lay.tensor(fake_quantize_through(lay.matrix(w), self.weights[name]), w.shape)
            live = f"{path}.leaf.{own}" if isinstance(self.base.get_submodule(path), Online) else name
            found[f"model.{live}"] = w
        return found

    def clipped(self, name: str, w: Tensor) -> Tensor:
        """The weight within σ(γ) of the extremes of each of its blocks."""
        lay = layout(owner_of(self.base, name), name.rpartition(".")[2])
        matrix = lay.matrix(w)
        shape, block = tuple(matrix.shape), self.weights[name].granularity.block(tuple(matrix.shape))
        ends = zip(block_range(matrix, block), self.clips[name].to(matrix).sigmoid(), strict=True)
        low, high = (spread(end * share, block, shape) for end, share in ends)
        return lay.tensor(torch.minimum(torch.maximum(matrix, low), high), w.shape)

    def objective(self, batch: Batch, block: int) -> Tensor:
        """Mean squared error of what a block puts out, differentiable in all that is learned."""
        context = self.adapter.context(batch)
        with running(context):
            with torch.no_grad():
                taught = self.teacher(batch)[block]
            said = torch.func.functional_call(self.student, self.tensors(), (batch,))[block]
        rows = slice(None) if context.valid is None else context.valid.reshape(-1)
        return (said.flatten(0, -2)[rows] - taught.flatten(0, -2)[rows]).square().mean()

    @torch.no_grad()
    def loss(self, batches: Sequence[Batch], block: int) -> float:
        return sum(float(self.objective(batch, block)) for batch in batches) / len(batches)

    @torch.no_grad()
    def start_ranges(self, batches: Sequence[Batch]) -> None:
        """Extremes of every input on all calibration data, weights clipped and not rounded, scales as they start."""
        self.mode, tensors = "watch", self.tensors()
        for batch in batches:
            with running(self.adapter.context(batch)):
                torch.func.functional_call(self.student, tensors, (batch,))
        self.mode = "round"

    @torch.no_grad()
    def deviation(self, batches: Sequence[Batch], block: int) -> float:
        """How far clipping alone moves a block's outputs, as a part of the largest."""
        self.mode, worst = "clip", 0.0
        for batch in batches:
            with running(self.adapter.context(batch)):
                taught, said = self.teacher(batch)[block], torch.func.functional_call(self.student, self.tensors(), (batch,))[block]
            worst = max(worst, float((said - taught).abs().max() / taught.abs().max()))
        self.mode = "round"
        return worst

    def learn(self, train: Sequence[Batch], held_out: Sequence[Batch], block: int, steps: int, turn: int, lesson: Lesson) -> None:
        """Learn what lies in a block, or everything, by what the block puts out; the numbers that are best on held-out data are left in place."""
        prefix = "" if self.own.target == "end" or not self.blocks[block] else f"{self.blocks[block]}."
        groups = [
            ([s.log for s in self.stretches if all(p.param.startswith(prefix) for p in s.link.ports)], self.own.lr_scale),
            ([own for name, own in self.clips.items() if name.startswith(prefix)], self.own.lr_clip),
            ([own.log for path, own in self.ranges.items() if f"{path}.".startswith(prefix)], self.own.lr_range),
        ]
        groups = [(own, lr) for own, lr in groups if own and lr > 0]
        flat = [p.requires_grad_() for own, _ in groups for p in own]
        if not flat:
            return
        optimizer = torch.optim.AdamW([{"params": own, "lr": lr} for own, lr in groups], weight_decay=0.0)
        best, values = self.loss(held_out, block), [p.detach().clone() for p in flat]
        for step in range(steps):
            fall = 0.1 + 0.9 * (1 + math.cos(math.pi * step / steps)) / 2
            for group, (_, lr) in zip(optimizer.param_groups, groups, strict=True):
                group["lr"] = lr * fall
            optimizer.zero_grad()
            self.objective(train[(turn * steps + step) % len(train)], block).backward()
            optimizer.step()
            lesson.progress("learn", turn * steps + step + 1, self.own.steps)
            if ((step + 1) % _LOOK_EVERY == 0 or step + 1 == steps) and (now := self.loss(held_out, block)) < best:
                best, values = now, [p.detach().clone() for p in flat]
        with torch.no_grad():
            for p, value in zip(flat, values, strict=True):
                p.requires_grad_(False).copy_(value)

    @torch.no_grad()
    def rewrite(self) -> Rewrite:
        """What was learned, as data."""
        found = compose(self.stretches)
        cuts: dict[str, tuple[Shift, ...]] = {}
        for name in self.clips:
            w = found.tensor(name, self._float(name), owner_of(self.base, name), torch.float64)
            w = w.to(torch.float64)
            cuts[name] = (Shift(Port(name, "out"), (self.clipped(name, w) - w).to(self.dtype)),)
        inserts = {}
        for path, own in self.ranges.items():
            low, high = (end.to(torch.float32) for end in own.bounds())
            inserts[path] = Insert(ModuleConfig(ClipRange.name, {}, {"low": low, "high": high}))
        return found.then(Rewrite(edits=dict(cuts), inserts=inserts))
