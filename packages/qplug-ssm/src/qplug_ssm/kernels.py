"""The kernel of GPTVQ's weights: codes are looked up a few hundred rows at a time, and the float weight is never held whole."""

from collections.abc import Mapping
from typing import ClassVar

from qcore.numbers import LowRankCodebook, UnscaledTile
from qcore.ops import Job, Kernel
from qkernels.codebook_linear import codebook_linear
from torch import Tensor


class CodebookLinear(Kernel):
    """y = x Ŵᵀ for a codebook of single numbers in every tile.

    Costs codes of a byte each beside the packed ones, unpacked once, and the books in float32; 256 rows of the weight during a call.
    """

    name: ClassVar[str] = "codebook-linear"
    op: ClassVar[str] = "linear"
    rank: ClassVar[int] = 900

    def refuses(self, job: Job) -> str | None:
        if not isinstance(job.weight.format, LowRankCodebook) or not isinstance(job.weight.granularity, UnscaledTile):
            return f"needs a low-rank codebook for every unscaled tile, got {job.weight}"
        if job.activation is not None:
            return f"needs float inputs, got {job.activation}"
        if job.unpack is None:
            return f"the job does not say how packing {job.packing!r} is unpacked"
        return None

    def prepare(self, parts: Mapping[str, Tensor], job: Job) -> dict[str, Tensor]:
        assert job.unpack is not None and isinstance(job.weight.format, LowRankCodebook)
        q = job.unpack(parts)
        return {"codes": q.codes, "books": job.weight.format.books(q.params())}

    def __call__(self, x: Tensor, parts: Mapping[str, Tensor], job: Job) -> Tensor:
        rows, columns = job.weight.granularity.block(job.shape)
        return codebook_linear(x, parts["codes"], parts["books"], rows, columns)
