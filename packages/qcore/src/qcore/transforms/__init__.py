"""Rewrites that keep the function and ease the numbers."""

from qcore.transforms.apply import apply_rewrite, place_inserts, rewritten_tensors
from qcore.transforms.awq import AWQScale
from qcore.transforms.base import LearnedTransform, Lesson, Transform
from qcore.transforms.benefit import Benefit, IfBeneficial, benefit
from qcore.transforms.equalize import CrossLayerEqualize
from qcore.transforms.fold_batchnorm import FoldBatchNorm
from qcore.transforms.fold_norm import FoldNorm
from qcore.transforms.learn_rotations import LearnRotations
from qcore.transforms.low_rank import LowRank
from qcore.transforms.permute import Reorder
from qcore.transforms.rewrite import Rewrite, RewrittenReader, hadamard_link, permute_link, rewritten_topology, rotate_link, scale_link
from qcore.transforms.rotate import HadamardRotate
from qcore.transforms.smooth import SmoothQuant
from qcore.transforms.split import SplitColumns, split_columns, split_given, split_leaf

__all__ = [
    "AWQScale",
    "Benefit",
    "CrossLayerEqualize",
    "FoldBatchNorm",
    "FoldNorm",
    "HadamardRotate",
    "IfBeneficial",
    "LearnRotations",
    "LearnedTransform",
    "Lesson",
    "LowRank",
    "Reorder",
    "Rewrite",
    "RewrittenReader",
    "SmoothQuant",
    "SplitColumns",
    "Transform",
    "apply_rewrite",
    "benefit",
    "hadamard_link",
    "permute_link",
    "place_inserts",
    "rewritten_tensors",
    "rewritten_topology",
    "rotate_link",
    "scale_link",
    "split_columns",
    "split_given",
    "split_leaf",
]
