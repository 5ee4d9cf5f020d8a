"""GSQ-Tuning: low-rank fine-tuning with all matrix products, backward too, in integers under shared exponents.  Registration only."""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcore.plugins import hookimpl

if TYPE_CHECKING:
    from qplug_llm.gsq.adapters import load_tuned
    from qplug_llm.gsq.layer import GSQLinear
    from qplug_llm.gsq.model import TunedModel, adapt
    from qplug_llm.gsq.step import FLOAT, Numbers

_WHERE = {"FLOAT": "step", "GSQLinear": "layer", "Numbers": "step", "TunedModel": "model", "adapt": "model", "load_tuned": "adapters"}

__all__ = ["FLOAT", "GSQLinear", "Numbers", "TunedModel", "adapt", "load_tuned"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)


@hookimpl
def qcore_recipes():
    files = sorted((Path(__file__).parent / "recipes").glob("*.toml"))
    # the formats of these are qplug-hardware's: without it they cannot be read, and `qcore plugins doctor` would call them broken
    return [file for file in files if find_spec("qplug_hardware") or not file.stem.startswith("gsq")]


@hookimpl
def qcore_commands():
    from qplug_llm.gsq.commands import tune

    return [tune]
