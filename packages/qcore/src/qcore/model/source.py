"""How a name, a folder or a file becomes a model: a skeleton without weights, and a reader for them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from qcore.errors import NotFound
from qcore.model.reader import TensorReader


@dataclass
class LoadedModel:
    """A model before quantization.

    model:     the skeleton; its parameters are on meta, its buffers are real
    reader:    the weights
    name:      what reports call it
    dtype:     the dtype in which the weights are stored and served
    tokenizer: encodes text, for language models: an object with `encode(text) -> list[int]`; None otherwise
    write_companions: writes the files that belong into a checkpoint beside the weights (config.json, tokenizer) into a folder; None: there are none
    notes:     what every table about this model must say, such as "weights are dequantized Q4_1"
    source:    name of the ModelSource; stands in a checkpoint's manifest, and its `skeleton` rebuilds the model there; "" = the user must pass one
    calibration, evaluation: files of data (text) that the source brings along
    data:      for models that do not read text: what they are calibrated and evaluated on, a `qcore.evaluation.ModelData`; None = text
    """

    model: nn.Module
    reader: TensorReader
    name: str
    dtype: torch.dtype = torch.float32
    tokenizer: Any = None
    source: str = ""
    write_companions: Callable[[Path], None] | None = None
    notes: tuple[str, ...] = ()
    calibration: Path | None = None
    evaluation: Path | None = None
    data: Any = None


class ModelSource(Protocol):
    """Turns one kind of address into a LoadedModel.

    name:     lower case, for messages
    help:     one line: what such an address looks like
    priority: where several match, the highest is asked
    """

    name: ClassVar[str]
    help: ClassVar[str]
    priority: ClassVar[int] = 0

    def matches(self, uri: str) -> bool:
        """Whether this source understands the address; cheap, imports nothing heavy."""

    def load(self, uri: str) -> LoadedModel:
        """The model behind the address; NotFound or CheckpointError when there is none."""

    def skeleton(self, folder: Path) -> nn.Module:
        """The float architecture of a checkpoint that qcore wrote, from its config alone: parameters on meta, buffers real."""
        raise NotFound(f"source {self.name!r} cannot rebuild a model from {folder}; pass the float model as `skeleton=`")

    def tokenizer(self, folder: Path) -> Any:
        """What `write_companions` put into a checkpoint to encode text: an object as `LoadedModel.tokenizer`, or None."""
        return None

    def data(self, folder: Path) -> Any:
        """What a checkpoint's model is evaluated on, as `LoadedModel.data`, or None where it reads text."""
        return None


def load_source(uri: str, sources: Mapping[str, type[Any]]) -> LoadedModel:
    """Ask every source in turn; NotFound lists what each would have taken, and which of them broke when they were asked."""
    broken = []
    for cls in sorted(sources.values(), key=lambda c: -getattr(c, "priority", 0)):
        source = cls()
        try:
            matches = source.matches(uri)
        except Exception as e:  # whatever a plug-in does there: others may know the address
            broken.append(f"  source {cls.name!r} broke when it was asked ({type(e).__name__}: {e}); `qcore plugins doctor` says whose it is")
            continue
        if matches:
            return source.load(uri)
    path = Path(uri)
    if path.is_file() or path.is_dir():
        llm = "" if "transformers" in sources else "; for transformers folders and GGUF files: pip install qplug-llm"
        hint = f"it exists, but no installed source can read it{llm}"
    elif path.exists():
        hint = "it is neither a file nor a folder"
    elif ":" in uri:
        zoo = "" if "zoo" in sources else "; for zoo: models: pip install qzoo"
        hint = f"no installed source knows the prefix {uri.split(':')[0]!r}{zoo}"
    else:
        hint = "no such file or folder"
    takes = "\n".join(f"  {cls.help}" for cls in sources.values()) or "  (no source is installed)"
    raise NotFound("\n".join([f"cannot load model {uri!r}: {hint}", *broken, "what can be loaded:", takes]))


class _NoInit(TorchFunctionMode):
    """Leaves out torch.nn.init of tensors on meta: there is nothing to fill, and the attempt imports torch's compiler, which takes seconds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            filled = kwargs["tensor"] if "tensor" in kwargs else args[0]
            if filled.is_meta:
                return filled
        return func(*args, **kwargs)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Inside, every parameter that a module registers goes to meta; buffers (rotary tables, running means) are made for real.

    A model built here costs no memory for weights, and its computed buffers are right, which `torch.device("meta")` would lose.
    """
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        original(self, name, param)
        if param is not None and not param.is_meta:  # one on meta may be tied: it stays the same object
            kept = self._parameters[name]
            assert kept is not None
            self._parameters[name] = nn.Parameter(kept.to("meta"), requires_grad=False)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        with _NoInit():
            yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]
