"""What was seen: observers of the rows that pass a site."""

from qcore.calibration.coverage import Ledger, RowCount, Rows
from qcore.calibration.observer import Observer, Seen
from qcore.calibration.observers import (
    KL,
    MSE,
    AbsMax,
    ChannelMoments,
    Ema,
    Gram,
    Histogram,
    MinMax,
    Moments,
    Percentile,
    Spikes,
    StreamingObserver,
)
from qcore.calibration.sample import Sample
from qcore.calibration.selectors import Selector

__all__ = [
    "KL",
    "MSE",
    "AbsMax",
    "ChannelMoments",
    "Ema",
    "Gram",
    "Histogram",
    "Ledger",
    "MinMax",
    "Moments",
    "Observer",
    "Percentile",
    "RowCount",
    "Rows",
    "Sample",
    "Seen",
    "Selector",
    "Spikes",
    "StreamingObserver",
]
