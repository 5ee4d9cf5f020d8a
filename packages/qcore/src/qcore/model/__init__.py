"""Where tensors live: layouts of layers, topologies of models, adapters of families, sources and readers of weights."""

from qcore.model.adapter import ModelAdapter, adapter_for
from qcore.model.reader import DictReader, SafetensorsReader, TensorReader, materialize, release
from qcore.model.source import LoadedModel, ModelSource, load_source, parameters_on_meta
from qcore.model.tap import RunContext, Tap, running, tap
from qcore.model.topology import Block, Invariance, Link, Port, Site, Topology

__all__ = [
    "Block",
    "DictReader",
    "Invariance",
    "Link",
    "LoadedModel",
    "ModelAdapter",
    "ModelSource",
    "Port",
    "RunContext",
    "SafetensorsReader",
    "Site",
    "Tap",
    "TensorReader",
    "Topology",
    "adapter_for",
    "load_source",
    "materialize",
    "parameters_on_meta",
    "release",
    "running",
    "tap",
]
