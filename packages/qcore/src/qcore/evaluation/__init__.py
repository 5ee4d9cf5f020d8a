"""What quantization cost: tasks, metrics, comparisons, and the report beside a checkpoint."""

from qcore.evaluation.attribution import Attribution, FloatAgain, ModuleCost, attribute
from qcore.evaluation.compare import Candidate, Row, compare, pareto, part_of
from qcore.evaluation.data import (
    ImagePair,
    ModelData,
    TextPair,
    choose_data,
    choose_text,
    default_window,
    evaluation_windows,
    inputs_of,
    windows_record,
)
from qcore.evaluation.images import ImageClassification
from qcore.evaluation.labelled import Labelled, LabelledFile, LabelledTexts
from qcore.evaluation.memory import MemoryMeter
from qcore.evaluation.report import Report, read_report
from qcore.evaluation.store import Reference
from qcore.evaluation.task import Agreement, LanguageModeling, Task

__all__ = [
    "Agreement",
    "Attribution",
    "Candidate",
    "FloatAgain",
    "ImageClassification",
    "ImagePair",
    "Labelled",
    "LabelledFile",
    "LabelledTexts",
    "LanguageModeling",
    "MemoryMeter",
    "ModelData",
    "ModuleCost",
    "Reference",
    "Report",
    "Row",
    "Task",
    "TextPair",
    "attribute",
    "choose_data",
    "choose_text",
    "compare",
    "default_window",
    "evaluation_windows",
    "inputs_of",
    "pareto",
    "part_of",
    "read_report",
    "windows_record",
]
