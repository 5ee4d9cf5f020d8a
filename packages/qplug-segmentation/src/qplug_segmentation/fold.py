"""Fold the decoder's batch norms, which qcore's own search finds only in traced graphs and inside nn.Sequential."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from qcore.calibration.observer import Observer, Seen
from qcore.errors import SpecError
from qcore.model.reader import TensorReader
from qcore.model.topology import Site, Topology
from qcore.numbers import QuantSpec
from qcore.transforms.base import Transform
from qcore.transforms.fold_batchnorm import fold_pairs
from qcore.transforms.rewrite import Rewrite
from torch import nn


@dataclass(frozen=True)
class FoldDecoder(Transform):
    """W' = t·W, b' = β - t·mean in LAVT's decoder, by the names of its layers; exact."""

    name: ClassVar[str] = "fold-decoder"
    scope: ClassVar[Literal["block", "model"]] = "model"

    def wants(self, topology: Topology, specs: Mapping[Site, QuantSpec]) -> Mapping[Site, tuple[Observer, ...]]:
        return {}

    def fit(self, topology: Topology, specs: Mapping[Site, QuantSpec], seen: Mapping[Site, Seen], model: nn.Module, reader: TensorReader) -> Rewrite:
        decoder = getattr(model, "classifier", None)
        if decoder is None or not hasattr(decoder, "batchnorm_pairs"):
            raise SpecError(f"transform 'fold-decoder' folds LAVT's decoder, and {type(model).__name__} has none; take 'fold-batchnorm'")
        return fold_pairs(model, reader, [(f"classifier.{conv}", f"classifier.{norm}") for conv, norm in decoder.batchnorm_pairs()])
