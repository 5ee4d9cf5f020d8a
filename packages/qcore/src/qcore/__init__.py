"""qcore: quantization of neural networks.

The names below are the public surface; each is imported when it is first asked for, so `import qcore` costs nothing and imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "Block": "qcore.model",
    "CalibrationSettings": "qcore.recipe",
    "Invariance": "qcore.model",
    "Link": "qcore.model",
    "ModelAdapter": "qcore.model",
    "Offset": "qcore.numbers",
    "Port": "qcore.model",
    "QTensor": "qcore.numbers",
    "QcoreError": "qcore.errors",
    "QuantSpec": "qcore.numbers",
    "Quantized": "qcore.pipeline",
    "Recipe": "qcore.recipe",
    "Rewrite": "qcore.transforms.rewrite",
    "Rule": "qcore.recipe",
    "Site": "qcore.model",
    "Topology": "qcore.model",
    "fake_quantize": "qcore.numbers",
    "hookimpl": "qcore.plugins",
    "load": "qcore.checkpoint",
    "load_recipe": "qcore.recipe_file",
    "load_registry": "qcore.plugins",
    "quantize": "qcore.numbers",
    "quantize_model": "qcore.pipeline",
    "save": "qcore.checkpoint",
}

if TYPE_CHECKING:
    from qcore.checkpoint import load, save
    from qcore.errors import QcoreError
    from qcore.model import Block, Invariance, Link, ModelAdapter, Port, Site, Topology
    from qcore.numbers import Offset, QTensor, QuantSpec, fake_quantize, quantize
    from qcore.pipeline import Quantized, quantize_model
    from qcore.plugins import hookimpl, load_registry
    from qcore.recipe import CalibrationSettings, Recipe, Rule
    from qcore.recipe_file import load_recipe
    from qcore.transforms.rewrite import Rewrite


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'qcore' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return [*_WHERE, "__version__"]


__all__ = [
    "Block",
    "CalibrationSettings",
    "Invariance",
    "Link",
    "ModelAdapter",
    "Offset",
    "Port",
    "QTensor",
    "QcoreError",
    "QuantSpec",
    "Quantized",
    "Recipe",
    "Rewrite",
    "Rule",
    "Site",
    "Topology",
    "fake_quantize",
    "hookimpl",
    "load",
    "load_recipe",
    "load_registry",
    "quantize",
    "quantize_model",
    "save",
]
