"""A loop of optimizer steps that can be stopped anywhere and gone on with to the same bytes.

Nothing about a step depends on how the loop got there: which samples it takes, and every random number inside it, follow from the seed and the
step's number. So the file that a run leaves holds parameters, moments and losses, and no state of a generator.

Left out: several processes; mixed precision (the loss brings its own numbers); early stopping, which wants a third text.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from qcore.errors import CalibrationError, CheckpointError, SpecError
from qcore.model.safetensors_file import SafetensorsFile, write_safetensors
from qcore.training.optimizer import AdamW, AdamWSettings

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How long and how fast.

    steps:        of the optimizer
    batch:        samples of one forward pass;  accumulation: forward passes of one step, whose gradients are averaged
    rate:         of learning, at its highest;  warmup: steps over which it rises from zero
    schedule:     what follows the warm-up: "constant", "linear" or "cosine", the latter two down to zero
    clip:         the largest norm of all gradients together; None = no limit
    seed:         of the order of samples, and of stochastic rounding
    keep_every:   steps between two writings of the file to go on from
    """

    steps: int
    batch: int = 4
    accumulation: int = 1
    rate: float = 1e-3
    warmup: int = 0
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    clip: float | None = 1.0
    seed: int = 0
    keep_every: int = 50
    optimizer: AdamWSettings = field(default_factory=AdamWSettings)

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulation", "keep_every"):
            if getattr(self, name) < 1:
                raise SpecError(f"training.{name} is at least 1, got {getattr(self, name)}")
        if not (self.rate > 0 and math.isfinite(self.rate)) or self.warmup < 0 or (self.clip is not None and self.clip <= 0):
            raise SpecError(f"training wants a positive rate and clip and a warm-up of 0 or more, got {self.rate}, {self.clip} and {self.warmup}")
        if self.schedule not in ("constant", "linear", "cosine"):
            raise SpecError(f"training.schedule is constant, linear or cosine, got {self.schedule!r}")

    def rate_at(self, step: int) -> float:
        """The rate of step 0, 1, …"""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(self.steps - self.warmup, 1)
        return self.rate * {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[self.schedule]


@dataclass
class TrainLog:
    """What a run did.  losses, norms: one a step, the norm before clipping;  resumed: the step that a resumed run began with"""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    resumed: int = 0


class Order:
    """Which samples each forward pass takes: a new permutation for every epoch."""

    def __init__(self, count: int, settings: TrainSettings) -> None:
        self.count, self.settings = count, settings
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def indices(self, step: int, part: int) -> Tensor:
        """[batch] of the forward pass `part` of a step."""
        s = self.settings
        begin = (step * s.accumulation + part) * s.batch
        return torch.stack([self._at(i) for i in range(begin, begin + s.batch)])

    def _at(self, position: int) -> Tensor:
        epoch, place = divmod(position, self.count)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, torch.randperm(self.count, generator=seeded(self.settings.seed, epoch, 0x0D))
        return self._order[place]


def seeded(*numbers: int) -> torch.Generator:
    """A generator that follows from some small numbers, different for every list of them."""
    state = 0x9E3779B97F4A7C15
    for n in numbers:
        # splitmix64
        state = (state + n + 0x9E3779B97F4A7C15) & (2**64 - 1)
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        state ^= state >> 31
    return torch.Generator().manual_seed(state & (2**63 - 1))


def train(
    parameters: Mapping[str, Tensor],
    loss: Callable[[Tensor], Tensor],
    samples: int,
    settings: TrainSettings,
    *,
    begin: Callable[[int, int], None] = lambda step, part: None,
    file: Path | None = None,
    content: str = "",
    resume: bool = False,
    progress: Progress = lambda phase, done, total: None,
) -> TrainLog:
    """Change `parameters` in place, step by step, so that the mean loss over samples falls.

    loss:    [batch] sample numbers → a scalar, to be differentiated
    begin:   told step and part before each forward pass; seeds whatever rounds by chance
    file:    where the run is kept every `keep_every` steps, and at its end; whole or not there
    content: says what the run is of (model, data, recipe): a file of another one is refused
    resume:  go on from `file`, where there is one
    CalibrationError where the loss is not finite; CheckpointError where `file` is of another run, or damaged.
    """
    optimizer = AdamW(parameters, settings.optimizer)
    order, log, done = Order(samples, settings), TrainLog(), 0
    what = f"{settings!r}; {samples} samples; {content}"
    if resume and file is not None and file.exists():
        done = _read(file, parameters, optimizer, log, what)
        log.resumed = done
    for step in range(done, settings.steps):
        total, gradients = 0.0, {name: torch.zeros_like(p) for name, p in parameters.items()}
        for part in range(settings.accumulation):
            begin(step, part)
            value = loss(order.indices(step, part))
            if not bool(torch.isfinite(value)):
                raise CalibrationError(
                    f"the loss of step {step} is {float(value.detach())}; lower the rate (it is {settings.rate_at(step):.3g}), or warm it up longer"
                )
            for into, g in zip(gradients.values(), torch.autograd.grad(value, list(parameters.values())), strict=True):
                into.add_(g, alpha=1 / settings.accumulation)
            total += float(value.detach()) / settings.accumulation
        norm = float(torch.stack([g.double().norm() for g in gradients.values()]).norm())
        if settings.clip is not None and norm > settings.clip:
            for g in gradients.values():
                g.mul_(settings.clip / norm)
        optimizer.step(gradients, settings.rate_at(step), seeded(settings.seed, step, 0x0F))
        log.losses.append(total)
        log.norms.append(norm)
        progress("train", step + 1, settings.steps)
        if file is not None and ((step + 1) % settings.keep_every == 0 or step + 1 == settings.steps):
            _write(file, parameters, optimizer, log, what)
    return log


def _write(file: Path, parameters: Mapping[str, Tensor], optimizer: AdamW, log: TrainLog, what: str) -> None:
    tensors = {f"parameter/{n}": p.detach().contiguous() for n, p in parameters.items()}
    tensors |= {f"optimizer/{n}": t.contiguous() for n, t in optimizer.state().items()}
    tensors |= {"log/losses": torch.tensor(log.losses, dtype=torch.float64), "log/norms": torch.tensor(log.norms, dtype=torch.float64)}
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.part")
    write_safetensors(part, tensors, {"content": what})
    part.replace(file)


@torch.no_grad()
def _read(file: Path, parameters: Mapping[str, Tensor], optimizer: AdamW, log: TrainLog, what: str) -> int:
    reader = SafetensorsFile(file)
    tensors = {name: reader[name] for name in reader.names()}
    wanted = {f"parameter/{n}": p.shape for n, p in parameters.items()}
    if reader.metadata.get("content") != what or {n: t.shape for n, t in tensors.items() if n.startswith("parameter/")} != wanted:
        raise CheckpointError(f"{file} is of another run (other data, model, recipe or settings); go on with the settings of that run, or delete it")
    optimizer.load_state({n.removeprefix("optimizer/"): t for n, t in tensors.items() if n.startswith("optimizer/")})
    for name, p in parameters.items():
        p.copy_(tensors[f"parameter/{name}"])
    log.losses, log.norms = tensors["log/losses"].tolist(), tensors["log/norms"].tolist()
    return len(log.losses)
