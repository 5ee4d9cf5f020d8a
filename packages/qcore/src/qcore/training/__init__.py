"""Training in few bits: products of integers in groups, what is saved for the backward pass, optimizer states, a loop that can be resumed."""

from qcore.training.levels import Levels, levels_of
from qcore.training.memory import LinearShape, TuningBytes, tuning_bytes
from qcore.training.optimizer import AdamW, AdamWSettings
from qcore.training.rows import CodedRows, accumulator_bits, code_rows, group_of, integer_product
from qcore.training.saved import SavedBytes, SavedRows, counting_saved, save_rows
from qcore.training.trainer import TrainLog, TrainSettings, train

__all__ = [
    "AdamW",
    "AdamWSettings",
    "CodedRows",
    "Levels",
    "LinearShape",
    "SavedBytes",
    "SavedRows",
    "TrainLog",
    "TrainSettings",
    "TuningBytes",
    "accumulator_bits",
    "code_rows",
    "counting_saved",
    "group_of",
    "integer_product",
    "levels_of",
    "save_rows",
    "train",
    "tuning_bytes",
]
