"""The float model: whole in memory, or one block of it at a time."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from qcore.calibration.stream import StreamedModel
from qcore.errors import at
from qcore.model.adapter import Batch, ModelAdapter
from qcore.model.reader import DictReader, materialize, materialize_outside, retie, tied_groups
from qcore.model.source import LoadedModel
from qcore.model.topology import Block
from qcore.numbers.tensor import require_finite


def load_in_memory(model: nn.Module, name: str = "model") -> LoadedModel:
    """A model that is in memory already, as a source would have loaded it."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    dtype = next(iter(dtypes)) if len(dtypes) == 1 else torch.float32
    return LoadedModel(model, DictReader({n: p.detach() for n, p in model.state_dict().items()}), name, dtype)


def float_forward(loaded: LoadedModel, adapter: ModelAdapter) -> Callable[[Batch], Tensor]:
    """The float model, all of it in memory: batch → outputs."""
    adapter.prepare(loaded.model)
    ties = tied_groups(loaded.model)
    materialize(loaded.model, "", loaded.reader, compute_dtype(loaded.dtype))
    retie(loaded.model, ties)
    loaded.model.eval()

    @torch.no_grad()
    def forward(batch: Batch) -> Tensor:
        return adapter.outputs(loaded.model, batch)

    return forward


def streamed_float(loaded: LoadedModel, adapter: ModelAdapter) -> StreamedModel:
    """The float model, one block of it in memory at a time.  SpecError names the first weight with a NaN or an infinity, when its block is read."""
    adapter.prepare(loaded.model)
    model, dtype = loaded.model.eval(), compute_dtype(loaded.dtype)
    blocks = adapter.topology(model).blocks
    ties = tied_groups(model)
    materialize_outside(model, [model.get_submodule(b.module) for b in blocks], loaded.reader, dtype)
    retie(model, ties)
    require_finite_weights(model)

    def fill(block: Block) -> None:
        module = model.get_submodule(block.module)
        materialize(module, block.module, loaded.reader, dtype)
        require_finite_weights(module, block.module)

    return StreamedModel(model, adapter, blocks, fill)


def require_finite_weights(module: nn.Module, prefix: str = "") -> None:
    """SpecError that names the first weight with a NaN or an infinity; it would spoil every output, and the reference with it."""
    for name, parameter in module.named_parameters(prefix=prefix):
        if not parameter.is_meta:
            with at(name):
                require_finite(parameter)


def compute_dtype(stored: torch.dtype) -> torch.dtype:
    """What a model of this dtype is computed in while it is quantized: float32, or float64 where the model is."""
    return torch.float64 if stored is torch.float64 else torch.float32
