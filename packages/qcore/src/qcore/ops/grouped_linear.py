"""Kernels of one expert of a mixture, whose words lie where one launch for all experts reads them.

| kernel | weights | inputs | of all experts at once |
|---|---|---|---|
| triton-grouped-linear | integers of 2 to 8 bits in groups | float16, bfloat16 | one launch of qkernels' `grouped_linear` on a GPU |
| reference-grouped-linear | the same | float, on every device | the reference of that op: what the launch means, for tests; slow |

As the kernel of a layer each is `triton-weight-linear` (or its reference).  What `prepare` makes of the layer's parts it puts into a `GroupedParts`
that the layers of a mixture share, and it runs from its slice there: so the launch for all costs no memory beside that of the layers' own kernels,
and what changes a layer (another device, other parts) changes the slice.  They are not registered, as a layer alone has no use for them: who owns a
mixture binds its layers to them.  No Triton kernel has run on a GPU yet; kernels/README.md says what is proven without one.
"""

import weakref
from collections.abc import Mapping
from typing import ClassVar

import torch
from qkernels import int_pack
from torch import Tensor

from qcore.errors import SpecError
from qcore.ops.kernel import Job
from qcore.ops.triton_linear import SCALE, SHIFT, WORDS, TritonWeightLinear, _refuses_integers, _word_bits

# the tensors of all experts, in the prepared parts of each
_WHOLE = ".of-all"


class GroupedParts:
    """Words [E, N, K·b/32], scales [E, N, K/G] and shifts of E weights, filled expert by expert.

    The prepared parts of the experts keep the tensors alive, not this: where all of them went to another device or kernel, the memory is free again.
    A copy, or what comes out of a pickle, is empty until the experts put their own again, as a layer does.
    """

    def __init__(self, experts: int) -> None:
        self.experts = experts
        self._whole: dict[str, weakref.ref[Tensor]] = {}
        self._missing = set(range(experts))

    def put(self, expert: int, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy what belongs to one expert to its place; returns its slices, and what they are slices of.

        Where shapes, dtypes or the device are not those of the others, new tensors are begun: experts move one after the other.
        """
        whole = self.tensors()
        # in-place changes of what was made in inference mode are forbidden outside
        with torch.inference_mode(False), torch.no_grad():
            if whole.keys() != own.keys() or any(_kind(whole[name][expert]) != _kind(t) for name, t in own.items()):
                whole = {name: torch.empty(self.experts, *t.shape, dtype=t.dtype, device=t.device) for name, t in own.items()}
                self._whole = {name: weakref.ref(t) for name, t in whole.items()}
                self._missing = set(range(self.experts))
            for name, t in own.items():
                whole[name][expert].copy_(t)
            self._missing.discard(expert)
            return {name: t[expert] for name, t in whole.items()} | {name + _WHOLE: t for name, t in whole.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Those of all experts, as far as somebody still runs from them."""
        alive = {name: ref() for name, ref in self._whole.items()}
        return {name: t for name, t in alive.items() if t is not None}

    @property
    def complete(self) -> bool:
        """Whether every expert has put its own."""
        return not self._missing and len(self.tensors()) == len(self._whole)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors().values())

    def __getstate__(self) -> dict[str, int]:
        return {"experts": self.experts}

    def __setstate__(self, state: dict[str, int]) -> None:
        GroupedParts.__init__(self, state["experts"])


def _kind(t: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return t.shape, t.dtype, t.device


class TritonGroupedLinear(TritonWeightLinear):
    """One expert by `weight_linear`, or all of them by `grouped_linear`.

    parts:  of the whole mixture;  expert: whose kernel this is
    """

    name: ClassVar[str] = "triton-grouped-linear"
    rank: ClassVar[int] = 29

    def __init__(self, parts: GroupedParts, expert: int) -> None:
        self.parts, self.expert = parts, expert

    def prepare(self, parts: Mapping[str, Tensor], job: Job) -> dict[str, Tensor]:
        found = super().prepare(parts, job)
        return found | self.parts.put(self.expert, {name: found[name] for name in (WORDS, SCALE, SHIFT) if name in found})

    def of_all(self, x: Tensor, ends: Tensor, job: Job) -> Tensor:
        """Every row through the weight of its expert, in one launch; the host does not wait for the device.

        x:      [T, K], rows of expert 0 first, then those of expert 1 …; rows behind the last end go to no expert, and their y is 0
        ends:   [E] int32, where the rows of each expert end
        return: [T, N], x.dtype
        """
        try:
            return self._run_all(x, ends, self.parts.tensors(), job)
        except ValueError as e:
            raise SpecError(f"{self.name}: {e}") from e

    def _run_all(self, x: Tensor, ends: Tensor, whole: Mapping[str, Tensor], job: Job) -> Tensor:
        from qkernels.grouped_linear import triton

        return triton.grouped_linear(x, ends, whole[WORDS], whole[SCALE], whole.get(SHIFT), bits=_word_bits(job.weight))


class ReferenceGroupedLinear(TritonGroupedLinear):
    """What the launch means, in torch: float32 sums, the weight not rounded.  It unpacks all weights at every call, and reads `ends` on the host."""

    name: ClassVar[str] = "reference-grouped-linear"

    def refuses(self, job: Job) -> str | None:
        if job.device.type == "meta":
            return "runs on values, and the weight is on meta"
        if job.activation is not None:
            return f"needs float inputs, got {job.activation}"
        if job.unpack is None:
            return f"the job does not say how packing {job.packing!r} is unpacked"
        return _refuses_integers(job.weight, job.shape, self.least)

    def _run(self, x: Tensor, parts: Mapping[str, Tensor], job: Job) -> Tensor:
        from qkernels.weight_linear import reference

        return reference.weight_linear(x, _codes(parts, job), parts[SCALE], parts.get(SHIFT))

    def _run_all(self, x: Tensor, ends: Tensor, whole: Mapping[str, Tensor], job: Job) -> Tensor:
        from qkernels.grouped_linear import reference

        return reference.grouped_linear(x, ends, _codes(whole, job), whole[SCALE], whole.get(SHIFT))


def _codes(parts: Mapping[str, Tensor], job: Job) -> Tensor:
    """Signed codes out of words.  [..., N, K·b/32] int32 → [..., N, K] int8"""
    bits = _word_bits(job.weight)
    return (int_pack.unpack(parts[WORDS], bits, job.shape[1]).to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


GROUPED_KERNELS = (TritonGroupedLinear, ReferenceGroupedLinear)
