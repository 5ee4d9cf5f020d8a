"""What was seen: observers of the rows that pass a site."""

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
    StreamingObserver,
)
from qcore.calibration.selectors import Selector

__all__ = [
    "KL",
    "MSE",
    "AbsMax",
    "ChannelMoments",
    "Ema",
    "Gram",
    "Histogram",
    "MinMax",
    "Moments",
    "Observer",
    "Percentile",
    "Seen",
    "Selector",
    "StreamingObserver",
]
