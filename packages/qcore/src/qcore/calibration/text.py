"""Text as token windows, for calibration and for evaluation.

Windows do not overlap, and every batch has one shape, so that the same seed gives the same bits.  A text is encoded whole, without special
tokens in between.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from qcore.calibration.selectors import Selector, choose_windows
from qcore.errors import CalibrationError, NotFound

TokenBatch = dict[str, Tensor]


class Amount(Protocol):
    """How much data is used, and which: `qcore.recipe.CalibrationSettings` is one."""

    @property
    def samples(self) -> int: ...
    @property
    def length(self) -> int: ...
    @property
    def batch(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def starts(self) -> int: ...
    @property
    def starts_weight(self) -> float: ...
    @property
    def select(self) -> Selector | None: ...
    @property
    def candidates(self) -> int: ...


@dataclass(frozen=True)
class TextFile:
    """Calibration text from a file, in windows chosen by seed over the whole of it.

    path:  a UTF-8 text file
    start: where the part that may be used begins, as a share of the text; the cut is moved to the next line end
    stop:  where it ends; 0.8 leaves the last 20 % to the evaluation
    """

    name: ClassVar[str] = "text"
    path: Path
    start: float = 0.0
    stop: float = 1.0

    def text(self) -> str:
        """The part of the file that may be used."""
        return part(read_text(self.path), self.start, self.stop)

    def tokens(self, tokenizer: Any) -> Tensor:
        """[n] token ids of that part."""
        return encode(tokenizer, self.text(), str(self.path))

    def batches(self, tokenizer: Any, settings: Amount) -> list[TokenBatch]:
        """`settings.samples` windows as {"input_ids": [batch, length]}; CalibrationError when the text is too short for them."""
        windows = self.windows(tokenizer, settings)
        return to_batches(windows, settings.batch) + start_batches(windows, settings.starts, settings.starts_weight, settings.seed)

    def windows(self, tokenizer: Any, settings: Amount) -> Tensor:
        """[samples, length] token ids, in the order in which the seed, or the selector, chose them."""
        ids = self.tokens(tokenizer)
        there = cut(ids, settings.length)
        if len(there) < settings.samples:
            full = len(there) // settings.batch * settings.batch or len(there)
            fits = f"--set calibration.samples={full}" if full else f"--set calibration.length={max(len(ids) // 2, 1)}"
            raise CalibrationError(
                f"calibration text {self.path} is too short: {len(ids)} tokens found, {settings.samples * settings.length} needed "
                f"({settings.samples} windows of {settings.length}); pass a longer text, or {fits}"
            )
        order = torch.randperm(len(there), generator=torch.Generator().manual_seed(settings.seed))
        if settings.select is None:
            return there[order[: settings.samples]]
        # sorted: what a selector does with ties hangs on the text alone
        pool = there[order[: max(settings.candidates, settings.samples)].sort().values]
        return choose_windows(pool, settings.samples, settings.select)


def read_text(path: Path) -> str:
    """The text of a file; NotFound or CalibrationError, with the path, where there is none."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise NotFound(f"text file {path} {what}; pass the path of a UTF-8 text file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise CalibrationError(f"{path} is not UTF-8 text (byte {e.start}: {e.reason}); convert it, or pass another file") from e
    if not text.strip():
        raise CalibrationError(f"text file {path} is empty; pass a text of a few hundred kilobytes in the model's languages")
    return text


def part(text: str, start: float, stop: float) -> str:
    """The text between two shares of its length, both cuts moved to the next line end (parts that share a cut do not overlap)."""
    return text[_cut_at(text, start) : _cut_at(text, stop)]


def _cut_at(text: str, share: float) -> int:
    at = round(len(text) * share)
    if at in (0, len(text)):
        return at
    end = text.find("\n", at - 1)
    # a text of one line has no better place
    return at if end < 0 or end + 1 == len(text) else end + 1


def encode(tokenizer: Any, text: str, where: str) -> Tensor:
    """[n] token ids of a text.  tokenizer: an object with `encode(text) -> list[int]`"""
    if tokenizer is None:
        raise CalibrationError(f"{where} is text, but this model has no tokenizer; its source cannot turn text into tokens")
    return torch.tensor(list(tokenizer.encode(text)), dtype=torch.long)


def cut(ids: Tensor, length: int) -> Tensor:
    """[n] → [n // length, length]: consecutive windows; what is left over at the end is not used."""
    count = len(ids) // length
    return ids[: count * length].reshape(count, length)


def to_batches(windows: Tensor, batch: int) -> list[TokenBatch]:
    """[n, length] → batches of one shape.  A batch larger than n is n; otherwise it must divide n."""
    size = min(batch, len(windows))
    if len(windows) % size:
        raise CalibrationError(
            f"{len(windows)} windows do not fill batches of {size}, and a batch of another shape would change bits; "
            f"--set calibration.samples={len(windows) // size * size}, or a batch that divides {len(windows)}"
        )
    return [{"input_ids": b.contiguous()} for b in windows.split(size)]


def start_batches(windows: Tensor, count: int, weight: float, seed: int) -> list[TokenBatch]:
    """One batch of `count` sequences of one token, drawn from the windows' own different tokens; [] for none.

    windows: [n, length]
    weight:  what its rows weigh together, against those of the windows together
    → {"input_ids": [count, 1], "row_weight": weight of each row}
    """
    if not count:
        return []
    different = windows.unique()
    order = torch.randperm(len(different), generator=torch.Generator().manual_seed(seed))
    tokens = different[order[:count]]
    return [{"input_ids": tokens.unsqueeze(1).contiguous(), "row_weight": torch.tensor(weight * windows.numel() / len(tokens))}]


def data_hash(*tensors: Tensor) -> str:
    """sha256 over dtype, shape and bytes of each tensor: names the data in a report."""
    digest = hashlib.sha256()
    for t in tensors:
        digest.update(f"{t.dtype} {tuple(t.shape)};".encode())
        digest.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
