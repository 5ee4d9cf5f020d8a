"""Small models quantized by hand, a registry of plain dicts, and a source that rebuilds transformers models from their config."""

from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from qcore.model import parameters_on_meta
from qcore.model.layers import layout
from qcore.modules import QuantizedConv, QuantizedEmbedding, QuantizedLinear, Stored, quantized_leaf, serve_in
from qcore.numbers import Codebook, Float, Int, PowerOfTwo, QuantSpec, quantize
from qcore.ops import KERNELS
from qcore.packing import Bits, CompressedFloat, CompressedInt, CompressedPack, first_that_accepts
from torch import nn


class Shelf(dict):
    def __init__(self, classes: Iterable[type], origin: str = "qcore") -> None:
        super().__init__({c.name: c for c in classes})
        self.origin = dict.fromkeys(self, origin)


class HfSource:
    name = "hf-config"

    def skeleton(self, folder: Path) -> nn.Module:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(folder)
        with parameters_on_meta():
            return AutoModelForCausalLM.from_config(config)


@pytest.fixture
def registry() -> SimpleNamespace:
    return SimpleNamespace(
        formats=Shelf([Int, Float, PowerOfTwo, Codebook]),
        packings=Shelf([CompressedPack, CompressedInt, CompressedFloat, Bits]),
        modules=Shelf([QuantizedLinear, QuantizedConv, QuantizedEmbedding]),
        # the reference alone: what is written and read is compared bit by bit here, and each kernel rounds its sums in its own way
        kernels=Shelf(k for k in KERNELS if k.name.startswith("reference")),
        adapters=Shelf([]),
        sources=Shelf([HfSource]),
    )


def quantize_leaves(model: nn.Module, spec: QuantSpec, registry: Any, *, activation: QuantSpec | None = None, skip: Iterable[str] = ()) -> nn.Module:
    """Round to nearest, in place: every linear layer and convolution but those named."""
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear | nn.Conv2d) and path not in skip:
            q = quantize(layout(module).matrix(module.weight.detach()), spec)
            packing = first_that_accepts([p() for p in registry.packings.values()], spec, q.shape, activation)
            model.set_submodule(path, quantized_leaf(module, Stored(weight=q, packing=packing, activation=activation)))
    bind_all(model, registry)
    return model.eval()


def bind_all(model: nn.Module, registry: Any, dtype: torch.dtype | None = None) -> None:
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.bind([k() for k in registry.kernels.values()], dtype=dtype)


def tiny_llama(dtype: torch.dtype = torch.float32, *, tied: bool = False, bias: bool = False, seed: int = 0) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        attention_bias=bias,
        dtype=dtype,
        architectures=["LlamaForCausalLM"],
    )
    # initial weights have a standard deviation of 0.02: logits near zero, in which no error would show
    config.initializer_range = 0.2
    model = LlamaForCausalLM(config).eval()
    serve_in(model, dtype)
    return model


def write_config(model: nn.Module) -> Callable[[Path], None]:
    """The companions of a transformers model."""
    return lambda folder: model.config.save_pretrained(folder)


def tokens(seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 100, (2, 16), generator=torch.Generator().manual_seed(seed))
