"""What a kernel is, and how one is chosen: once, when a module is built or loaded, never per call."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from qcore.errors import NotFound
from qcore.numbers import QTensor, QuantSpec
from qcore.numbers.granularity import Shape

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Job:
    """What a kernel is asked to run.

    op:         "linear": y = x Ŵᵀ
    packing:    name of the packing in which the weight is stored
    weight:     its spec;  shape: [N, K]
    activation: the spec of the input, or None for float inputs
    device, dtype: where it runs, and the dtype of x
    unpack:     the packing's own way back from stored parts: what the reference runs on, and kernels that want another layout
    """

    op: str
    packing: str
    weight: QuantSpec
    shape: Shape
    activation: QuantSpec | None = None
    device: torch.device = CPU
    dtype: torch.dtype = torch.float32
    unpack: Callable[[Mapping[str, Tensor]], QTensor] | None = None


class Kernel(Protocol):
    """One way to run an op straight from packed parts.

    rank:    the lowest that does not refuse is chosen; the reference has 1000
    by_wish: it changes results beyond rounding, so it is chosen only by its name
    """

    name: ClassVar[str]
    op: ClassVar[str]
    rank: ClassVar[int]
    by_wish: ClassVar[bool] = False

    def refuses(self, job: Job) -> str | None:
        """Why it cannot run the job, or None when it can."""

    def prepare(self, parts: Mapping[str, Tensor], job: Job) -> dict[str, Tensor]:
        """The parts as this kernel wants them, made once; they are not saved.  The default is the stored parts themselves.

        parts: the packing's, by its local names; for static activations also "input.scale" and "input.offset" (see `ops.activation`)
        """
        return dict(parts)

    def __call__(self, x: Tensor, parts: Mapping[str, Tensor], job: Job) -> Tensor:
        """x [..., K] float → y [..., N] of x's dtype, from prepared parts; quantizes x first where the job has an activation spec."""


@dataclass(frozen=True)
class Choice:
    """The kernel that was chosen, and why each better-ranked one was not."""

    kernel: Kernel
    refused: tuple[tuple[str, str], ...] = ()


def choose(kernels: Iterable[Kernel], job: Job, wish: str | None = None) -> Choice:
    """The best kernel that can run the job; NotFound lists why none can.

    wish: name of a kernel that is taken first, if it does not refuse; one with `by_wish` is never taken without
    """
    refused: list[tuple[str, str]] = []
    for kernel in sorted((k for k in kernels if k.op == job.op), key=lambda k: (k.name != wish, k.rank, k.name)):
        reason = kernel.refuses(job)
        if reason is None and getattr(kernel, "by_wish", False) and kernel.name != wish:
            reason = f"changes results; it runs only where it is asked for: kernel={kernel.name!r}"
        if reason is None:
            return Choice(kernel, tuple(refused))
        refused.append((kernel.name, reason))
    reasons = "\n".join(f"  {name}: {why}" for name, why in refused) or f"  no kernel is registered for op {job.op!r}"
    raise NotFound(
        f"no kernel runs {job.op} on packing {job.packing!r}, {job.weight}, on {job.device}\n{reasons}\n"
        "repack the checkpoint, or install the plug-in that brings a kernel for it"
    )
