"""What transforms leave in a model to be computed at run time, as far as it is known before they are fitted.

A checkpoint with such a module is in qcore's own layout; no other program's format has a word for it.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from qcore.errors import QcoreError
from qcore.model.reader import TensorReader
from qcore.model.topology import Site, Topology
from qcore.numbers import QuantSpec
from qcore.transforms import HadamardRotate, IfBeneficial
from qcore.transforms.learn_static import LearnStatic
from qcore.transforms.split_merge import SplitMerge


def left_at_run_time(transform: Any, topology: Topology, specs: Mapping[Site, QuantSpec], model: nn.Module, reader: TensorReader) -> str:
    """In words; "" = nothing, or nothing that is known beforehand."""
    if isinstance(transform, IfBeneficial):
        return left_at_run_time(transform.transform, topology, specs, model, reader)
    if getattr(transform, "parts", ()):
        return "sums of layers"
    if isinstance(transform, SplitMerge):
        return "a choice of channels before layers"
    if isinstance(transform, LearnStatic) and transform.ranges:
        return "ranges before layers"
    if isinstance(transform, HadamardRotate):
        # whether a rotation is worth it is measured later; here: whether there is one to choose
        try:
            rotations = replace(transform, choose=False).at_run_time(topology, specs, {}, model, reader, [])
        except QcoreError:  # the run will say it, with its place
            return ""
        return "" if rotations.empty else "rotations"
    return ""
