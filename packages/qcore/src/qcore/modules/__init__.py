"""What replaces a float leaf: modules that run from packed parts, and that a checkpoint can rebuild."""

from qcore.modules.conv import QuantizedConv
from qcore.modules.embedding import QuantizedEmbedding
from qcore.modules.linear import QuantizedLinear, as_stored
from qcore.modules.replace import Stored, leaf_by_type, quantized_leaf, register_leaf
from qcore.modules.runtime import RuntimeModule, module_name, place, rebuild
from qcore.modules.stored import StoredWeight, serve_in

__all__ = [
    "QuantizedConv",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "RuntimeModule",
    "Stored",
    "StoredWeight",
    "as_stored",
    "leaf_by_type",
    "module_name",
    "place",
    "quantized_leaf",
    "rebuild",
    "register_leaf",
    "serve_in",
]
