"""Which samples are calibrated on, where there are more than are used."""

from collections.abc import Sequence
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from qcore.errors import CalibrationError

DIMENSIONS = 256
_CHUNK = 64  # windows whose token counts are held at once


class Selector(Protocol):
    """Chooses k samples out of many by their embeddings: calibration windows and few-shot examples alike.

    Its fields are its options; one that draws at random has a field `seed`, and chooses the same for the same seed.
    """

    name: ClassVar[str]

    def select(self, embeddings: Tensor, k: int, scores: Tensor | None = None) -> Sequence[int]:
        """k different row indices, in order of choice.

        embeddings: [n, d], left as they are
        scores:     [n], a model's confidence in each sample, for those that go by it; they raise CalibrationError where there are none
        """


def window_embeddings(windows: Tensor, dimensions: int = DIMENSIONS) -> Tensor:
    """What windows of token ids are about, without a model: their tokens' tf-idf weights, projected to few dimensions at random.

    The projection keeps cosines up to about 1 / sqrt(dimensions) (Johnson and Lindenstrauss 1984); its seed is fixed.  A window of tokens that all
    windows have is a zero row.

    windows: [n, T] ids → [n, dimensions] float32, rows of length 1
    """
    n = len(windows)
    ids, place = windows.unique(return_inverse=True)  # [V], [n, T]
    there = torch.zeros(len(ids))
    for part in place.split(_CHUNK):
        there += (_counts(part, len(ids)) > 0).sum(0)
    rare = torch.log(n / there)
    project = torch.randn(len(ids), dimensions, generator=torch.Generator().manual_seed(0)) * rare.unsqueeze(1)
    out = [torch.where(c > 0, 1 + c.clamp(min=1).log(), 0.0) @ project for c in (_counts(part, len(ids)) for part in place.split(_CHUNK))]
    return torch.nn.functional.normalize(torch.cat(out), dim=1)


def _counts(place: Tensor, size: int) -> Tensor:
    """[m, T] indices → [m, size] how often each occurs."""
    return torch.zeros(len(place), size).scatter_add_(1, place, torch.ones(place.shape))


def choose_windows(windows: Tensor, k: int, selector: Selector) -> Tensor:
    """[n, T] → [k, T] windows in the selector's order; CalibrationError where it returns anything but k different indices."""
    chosen = [int(i) for i in selector.select(window_embeddings(windows), k)]
    if len(chosen) != k or len(set(chosen)) != k or not all(0 <= i < len(windows) for i in chosen):
        asked = f"{k} different windows of {len(windows)}"
        raise CalibrationError(f"selector {selector.name!r} was asked for {asked} and returned {chosen[:8]} …; tell its author")
    return windows[chosen]
