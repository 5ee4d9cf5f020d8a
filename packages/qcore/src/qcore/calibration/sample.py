"""A few of the rows themselves, for methods that must round them."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qcore.calibration.observers import State, StreamingObserver


@dataclass(kw_only=True)
class Sample(StreamingObserver):
    """About `rows` rows, evenly spaced over all that came: whenever there are twice as many, every other one is dropped.  [n, K], n < 2·rows

    Row weights only say which rows count at all.
    """

    name: ClassVar[str] = "sample"
    parts: ClassVar[tuple[str, ...]] = ("rows", "stride")
    rows: int = 128

    def _summarize(self, rows: Tensor, weight: Tensor | None) -> State:
        flat = rows.flatten(0, -2)
        stride = 1
        while flat.shape[0] // stride >= 2 * self.rows:
            stride *= 2
        return {"rows": flat[::stride].clone(), "stride": torch.tensor(stride)}

    def _join(self, a: State, b: State) -> State:
        stride = max(int(a["stride"]), int(b["stride"]))
        kept = torch.cat([part["rows"][:: stride // int(part["stride"])] for part in (a, b)])
        while kept.shape[0] >= 2 * self.rows:
            kept, stride = kept[::2], stride * 2
        return {"rows": kept, "stride": torch.tensor(stride)}

    def _take(self, new: State) -> None:
        # the number of rows differs from batch to batch
        self._state = self._join(self._state, new) if self._state else new

    def _finish(self, state: State) -> Tensor:
        return state["rows"]
