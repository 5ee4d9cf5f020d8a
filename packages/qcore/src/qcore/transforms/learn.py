"""Learn a rewrite: rotations and scales of links that bring the quantized model's outputs nearest to the float model's.

What is learned are the numbers of a `Rewrite` (`Turn`, `Stretch`), and the weights of a training step come from `Rewrite.tensor`, the one method that
also merges them at the end, then in float64.  So the trained form is the merged form: OSTQuant's released code scales o_proj's output axis while it
trains and its input axis when it merges (issue 21), which cannot be written here.

    each step:  weights = rewrite(R, s)  →  outputs with quantized activations (and weights), rounding straight through
                loss(outputs, outputs of the float model with an empty rewrite)  →  Cayley-Adam on R, Adam on log s

Weights are frozen, and nothing of the model is written.  The same seed and thread count give the same bits.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qcore.errors import CalibrationError, SpecError
from qcore.model.adapter import Batch
from qcore.model.layers import layout
from qcore.model.reader import TensorReader, materialize
from qcore.model.tap import Tap, attach, running
from qcore.model.topology import Link, Site, Topology
from qcore.modules.online import Online
from qcore.numbers import QuantSpec
from qcore.transforms.apply import live_name, place_inserts
from qcore.transforms.base import Lesson
from qcore.transforms.losses import LOSSES
from qcore.transforms.rewrite import Rewrite, owner_of, rotate_link, scale_classes, scale_link
from qcore.transforms.stiefel import RotationAdam, nearest_rotation
from qcore.transforms.straight_through import fake_quantize_through

_LOOK_EVERY = 10  # steps between two looks at the held-out sequences, and between two states in the notebook


@dataclass
class Turn:
    """A learnable rotation of a link.  matrix: [h, c, c] float64 orthogonal, h = heads of the link, or 1 for the same in every head"""

    link: Link
    matrix: Tensor

    def rewrite(self) -> Rewrite:
        return rotate_link(self.link, self.matrix)


@dataclass
class Stretch:
    """Learnable positive scales of a link: exp(log), one for each set of channels that must share one.

    OSTQuant's released code learns the scale itself, which may become zero or negative; a logarithm cannot.

    log: [classes of `scale_classes`] float64; zeros = nothing is scaled
    """

    link: Link
    log: Tensor

    @classmethod
    def unit(cls, link: Link) -> "Stretch":
        return cls(link, torch.zeros(int(scale_classes(link).max()) + 1, dtype=torch.float64))

    def rewrite(self) -> Rewrite:
        return scale_link(self.link, self.log.exp()[scale_classes(self.link)])


@dataclass(frozen=True)
class Course:
    """How it is learned.

    steps, batch, length: optimizer steps, each on `batch` sequences of `length` tokens; batches that are no tokens are taken as they come
    loss:      "kl-top", "kl-top-renormalized", "kl", "next-token": see `losses`
    k:         of the two first: how many of the teacher's likeliest classes count
    lr_rotation: angle per step, in radians, see `RotationAdam`;  lr_scale: of Adam on log s.  Both fall linearly to zero
    weights:   round the weights too while learning; False = activations alone, as the papers do where GPTQ follows
    held_out:  sequences that are not learned from.  The numbers that are best on them, looked at every 10 steps, are those that are kept: one step
               moves the rounding of everything, so the loss jumps about by some per cent
    dtype:     of the matrix products while learning: "float32", "bfloat16", or "auto" = bfloat16 where the processor multiplies it natively, which
               takes half the time.  What is found is applied in float64 all the same
    seed:      of the order of the sequences
    """

    steps: int = 100
    batch: int = 4
    length: int = 256
    loss: Literal["kl-top", "kl-top-renormalized", "kl", "next-token"] = "kl-top"
    k: int = 1000
    lr_rotation: float = 0.1
    lr_scale: float = 0.02
    weights: bool = False
    held_out: int = 4
    dtype: Literal["float32", "bfloat16", "auto"] = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "length", "k", "held_out"):
            if getattr(self, name) < 1:
                raise SpecError(f"learning: {name} is at least 1, got {getattr(self, name)}")
        if self.loss not in LOSSES:
            raise SpecError(f"unknown loss {self.loss!r}; have: {', '.join(LOSSES)}")
        if self.dtype not in ("float32", "bfloat16", "auto"):
            raise SpecError(f"learning: dtype is float32, bfloat16 or auto, got {self.dtype!r}")
        if not (self.lr_rotation >= 0 and self.lr_scale >= 0):
            raise SpecError(f"learning rates are 0 or more, got lr_rotation={self.lr_rotation}, lr_scale={self.lr_scale}")


@dataclass
class Learned:
    """What came out.  losses: of each step;  before, after: of the held-out sequences;  at: the step whose numbers were best there, 0 = the start"""

    rewrite: Rewrite
    losses: list[float]
    before: float
    after: float
    at: int


def compose(parts: Iterable[Turn | Stretch]) -> Rewrite:
    """One rewrite of all parts, in order."""
    rewrite = Rewrite()
    for part in parts:
        rewrite = rewrite.then(part.rewrite())
    return rewrite


def learn(
    parts: Sequence[Turn | Stretch],
    online: Rewrite,
    topology: Topology,
    specs: Mapping[Site, QuantSpec],
    model: nn.Module,
    reader: TensorReader,
    lesson: Lesson,
    course: Course,
) -> Learned:
    """Learn the numbers of `parts`, which are changed in place.

    online: fitted on what the parts leave: what is not learned, such as Hadamard matrices at run time
    specs:  what will be stored: inputs and taps are rounded, weights where the course says so
    model:  its structure; values come from `reader`
    """
    held_out, train = lessons_of(lesson.batches, course)
    with torch.enable_grad():
        student = _Student(parts, online, topology, specs, model, reader, lesson, course)
        state = _State(parts, course)
        log = state.resume(lesson)
        if log is None:
            before = student.loss(held_out)
            log = _Log([], before, before, 0, state.snapshot())
        for step in range(len(log.losses), course.steps):
            log.losses.append(state.step(student, train[step % len(train)], fall=1 - step / course.steps))
            lesson.progress("learn", step + 1, course.steps)
            if (step + 1) % _LOOK_EVERY == 0 or step + 1 == course.steps:
                if (loss := student.loss(held_out)) < log.best:
                    log = replace(log, best=loss, at=step + 1, values=state.snapshot())
                state.keep(lesson, log)
    for turn, value in zip(state.turns, log.values, strict=False):
        turn.matrix = nearest_rotation(value) if log.at else value
    for stretch, value in zip(state.stretches, log.values[len(state.turns) :], strict=True):
        stretch.log = value
    return Learned(compose(parts).then(online), log.losses, log.before, log.best, log.at)


@dataclass(frozen=True)
class _Log:
    """How far learning is.  losses: of each step so far;  before, best: of the held-out sequences;  at: the step of the best;  values: its numbers"""

    losses: list[float]
    before: float
    best: float
    at: int
    values: list[Tensor]


class _State:
    """The parameters, their optimizers, and what the notebook keeps of them."""

    def __init__(self, parts: Sequence[Turn | Stretch], course: Course) -> None:
        self.course = course
        self.turns = [p for p in parts if isinstance(p, Turn)]
        self.stretches = [p for p in parts if isinstance(p, Stretch)]
        rotations = [t.matrix.requires_grad_() for t in self.turns]
        logs = [s.log.requires_grad_() for s in self.stretches]
        self.parameters = rotations + logs
        self.rotations = RotationAdam(rotations)
        self.scales = torch.optim.Adam(logs, lr=course.lr_scale) if logs else None

    def step(self, student: "_Student", batch: Batch, fall: float) -> float:
        """One optimizer step; returns the loss before it."""
        for p in self.parameters:
            p.grad = None
        loss = student.objective(batch)
        loss.backward()
        self.rotations.step(self.course.lr_rotation * fall)
        if self.scales is not None:
            self.scales.param_groups[0]["lr"] = self.course.lr_scale * fall
            self.scales.step()
        return float(loss.detach())

    def snapshot(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.parameters]

    def keep(self, lesson: Lesson, log: "_Log") -> None:
        if lesson.notebook is None:
            return
        tensors = {f"best.{i}": t for i, t in enumerate(log.values)}
        tensors |= {f"turn.{n}": t for n, t in self.rotations.state().items()}
        for i, s in enumerate(self.stretches):
            assert self.scales is not None
            moments = self.scales.state[s.log]
            tensors |= {f"log.{i}": s.log.detach().clone(), f"first.{i}": moments["exp_avg"], f"second.{i}": moments["exp_avg_sq"]}
        lesson.notebook.keep_step(lesson.page, tensors, {"losses": log.losses, "before": log.before, "best": log.best, "at": log.at})

    def resume(self, lesson: Lesson) -> "_Log | None":
        """Go on from what the notebook holds; None where it holds nothing."""
        kept = lesson.notebook.step(lesson.page) if lesson.notebook is not None else None
        if kept is None:
            return None
        tensors, data = kept
        count = len(data["losses"])
        self.rotations.load({n.removeprefix("turn."): t for n, t in tensors.items() if n.startswith("turn.")}, count)
        for i, s in enumerate(self.stretches):
            assert self.scales is not None
            with torch.no_grad():
                s.log.copy_(tensors[f"log.{i}"])
            moments = {"exp_avg": tensors[f"first.{i}"], "exp_avg_sq": tensors[f"second.{i}"]}
            self.scales.state[s.log] = {"step": torch.tensor(float(count)), **moments}
        best = [tensors[f"best.{i}"] for i in range(len(self.parameters))]
        return _Log(list(data["losses"]), float(data["before"]), float(data["best"]), int(data["at"]), best)


class _Outputs(nn.Module):
    """The adapter's outputs as a module's forward, for `functional_call`."""

    def __init__(self, model: nn.Module, adapter: Any) -> None:
        super().__init__()
        self.model = model
        self._adapter = adapter

    def forward(self, batch: Batch) -> Tensor:
        return self._adapter.outputs(self.model, batch)


class _Student:
    """The float model twice, on the same tensors: as it is (the teacher), and rewritten and rounded (the student)."""

    def __init__(
        self,
        parts: Sequence[Turn | Stretch],
        online: Rewrite,
        topology: Topology,
        specs: Mapping[Site, QuantSpec],
        model: nn.Module,
        reader: TensorReader,
        lesson: Lesson,
        course: Course,
    ) -> None:
        self.parts, self.online, self.adapter, self.course = parts, online, lesson.adapter, course
        teacher = copy.deepcopy(model).eval()
        double = any(p.dtype is torch.float64 for p in model.parameters())
        self.dtype = torch.float64 if double else torch.float32
        native = course.dtype == "auto" and torch.cpu._is_avx512_bf16_supported()
        self.half = self.dtype is torch.float32 and (course.dtype == "bfloat16" or native)
        materialize(teacher, "", reader, self.dtype)
        teacher.requires_grad_(False)
        shared = {id(t): t for t in (*teacher.parameters(), *teacher.buffers())}
        student = copy.deepcopy(teacher, shared)
        place_inserts(student, online)
        self.teacher, self.student = _Outputs(teacher, lesson.adapter), _Outputs(student, lesson.adapter)
        self._round_activations(topology, specs)
        self.weights: dict[str, QuantSpec] = {}
        for site in topology.sites if course.weights else ():
            if site in specs and self.weights.setdefault(site.param, specs[site]) != specs[site]:
                raise SpecError(f"{site.param} is stored under several specs; learn with weights=False, or give it one rule")

    def objective(self, batch: Batch) -> Tensor:
        """The loss on one batch, differentiable in the numbers of the parts."""
        with running(self.adapter.context(batch)):
            with torch.no_grad(), self._precision():
                taught = self.teacher(batch)
            tensors = self._rewritten()
            with self._precision():
                said = torch.func.functional_call(self.student, tensors, (batch,))
        valid = self.adapter.context(batch).valid
        targets = _next_tokens(batch, said)
        rows = slice(None) if valid is None else valid.reshape(-1)
        said, taught = (t.flatten(0, -2)[rows].to(self.dtype) for t in (said, taught))
        return LOSSES[self.course.loss](said, taught, None if targets is None else targets.reshape(-1)[rows], self.course.k)

    @torch.no_grad()
    def loss(self, batches: Sequence[Batch]) -> float:
        """The mean loss over batches."""
        return sum(float(self.objective(batch)) for batch in batches) / len(batches)

    def _precision(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.half)

    def _rewritten(self) -> dict[str, Tensor]:
        """The student's weights, by name in `self.student`."""
        rewrite = compose(self.parts).then(self.online)
        base, tensors = self.student.model, {}
        for name in dict.fromkeys([*rewrite.edits, *rewrite.derived, *self.weights]):
            source = rewrite.source(name)
            owner, live = owner_of(base, name, source), live_name(self.online, name)
            path, _, own = live_name(self.online, source).rpartition(".")
            # what is added to the residual stream keeps its digits, matrices are rounded by their product anyway
            dtype = torch.bfloat16 if self.half and isinstance(owner, nn.Linear) and own == "weight" else self.dtype
            w = rewrite.tensor(name, getattr(base.get_submodule(path), own), owner, dtype)
            if name in self.weights:
                shape, lay = w.shape, layout(owner, name.rpartition(".")[2])
                w = lay.tensor(fake_quantize_through(lay.matrix(w.to(self.dtype)), self.weights[name]), shape)
            tensors[f"model.{live}"] = w
        return tensors

    def _round_activations(self, topology: Topology, specs: Mapping[Site, QuantSpec]) -> None:
        student = self.student.model
        for site in dict.fromkeys([*(s.input for s in topology.sites if s in specs), *topology.activations]):
            if site not in specs:
                continue
            module = student.get_submodule(site.module)
            if site.tensor == "input" and site.part is None:
                leaf = module.leaf if isinstance(module, Online) else module
                leaf.register_forward_pre_hook(_RoundInput(specs[site], self.dtype))
            else:
                attach(module, site.tensor, _RoundTap(specs[site], self.dtype), site.part)


class _RoundInput:
    """A forward pre-hook that rounds the first argument."""

    def __init__(self, spec: QuantSpec, dtype: torch.dtype) -> None:
        self.spec, self.dtype = spec, dtype

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (fake_quantize_through(args[0].to(self.dtype), self.spec), *args[1:])


class _RoundTap(Tap):
    def __init__(self, spec: QuantSpec, dtype: torch.dtype) -> None:
        super().__init__()
        self.spec, self.dtype = spec, dtype

    def forward(self, x: Tensor, rows: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        return fake_quantize_through(x.to(self.dtype), self.spec).to(x.dtype)


def lessons_of(batches: Sequence[Batch], course: Course) -> tuple[list[Batch], list[Batch]]:
    """(held out, to learn from): batches of `course.batch` sequences of `course.length` tokens, in an order that the seed draws, epoch after epoch.

    Batches that are no token ids are taken as they come; of tokens, sequences that are shorter (the starts of a language model) are left out.
    CalibrationError where nothing is left to learn from.
    """
    texts = [t for b in batches if (t := _token_ids(b)) is not None]
    if len(texts) < len(batches):
        whole = list(batches)
        if len(whole) < 2:
            raise CalibrationError("learning needs at least two batches, one of them held out; calibrate on more samples")
        return whole[-1:], whole[:-1]
    length = min(course.length, max((t.shape[1] for t in texts), default=0))
    pieces = [t[:, : t.shape[1] // length * length].reshape(-1, length) for t in texts if t.shape[1] >= max(length, 2)]
    rows = torch.cat(pieces) if pieces else torch.empty(0, 0, dtype=torch.long)
    if len(rows) < course.held_out + course.batch:
        raise CalibrationError(
            f"learning wants at least {course.held_out} held-out sequences and a batch of {course.batch}, there are {len(rows)} of {length} tokens; "
            "calibrate on more samples, or make the batch smaller"
        )

    def batch_of(ids: Tensor) -> Batch:
        return ids if isinstance(batches[0], Tensor) else {"input_ids": ids}

    generator = torch.Generator().manual_seed(course.seed)
    rows = rows[torch.randperm(len(rows), generator=generator)]
    kept, rest = rows[: course.held_out], rows[course.held_out :]
    order = torch.cat([torch.randperm(len(rest), generator=generator) for _ in range(-(-course.steps * course.batch // len(rest)))])
    return (
        [batch_of(ids) for ids in kept.split(course.batch)],
        [batch_of(rest[own]) for own in order[: course.steps * course.batch].split(course.batch)],
    )


def _token_ids(batch: Batch) -> Tensor | None:
    """[B, T] token ids of a batch that holds nothing else which must be cut along; None for any other batch."""
    if isinstance(batch, Mapping) and set(batch) <= {"input_ids", "row_weight", "labels"}:
        batch = batch["input_ids"]
    return batch if isinstance(batch, Tensor) and batch.ndim == 2 and not batch.is_floating_point() else None


def _next_tokens(batch: Batch, logits: Tensor) -> Tensor | None:
    """What follows each position, -1 after the last.  [B, T]"""
    ids = _token_ids(batch)
    if ids is None or logits.shape[:-1] != ids.shape:
        return None
    return torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -1)], 1)
