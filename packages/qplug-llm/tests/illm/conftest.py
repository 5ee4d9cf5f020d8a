"""Tiny random decoders, runs over them, and one that is quantized and lowered, for the tests of this folder."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers
from qcore.pipeline import load_in_memory, quantize_model
from qcore.plugins import load_registry
from qcore.recipe import Recipe
from qcore.recipe_file import parse_recipe
from qplug_llm.decoder import DecoderLM
from torch import nn

SMALL = {
    "vocab_size": 61, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip

RULES = """
[[rules]]
sites = "*:weight"
format = {{ name = "int", bits = {bits} }}
granularity = "channel"
scale = "{scale}"

[[rules]]
sites = "*:input"
format = {{ name = "int", bits = {bits} }}
granularity = "token"
offset = "{offset}"
when = "dynamic"

[solver]
name = "rtn"
clip = "none"
"""


def recipe(bits: int = 8, scale: str = "bfloat16", offset: str = "code", transforms: tuple = ()) -> Recipe:
    return replace(parse_recipe(RULES.format(bits=bits, scale=scale, offset=offset), load_registry()), transforms=transforms)


def small_model(cls: str = "Llama", **changes) -> nn.Module:
    """Lively random weights in float32."""
    own = getattr(transformers, f"{cls}ForCausalLM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = own(own.config_class(**(SMALL | changes))).float().eval().requires_grad_(False)
        for p in model.parameters():
            p.copy_(0.6 + 0.8 * torch.rand_like(p) if p.ndim == 1 else torch.randn_like(p) * 0.15)
    DecoderLM().prepare(model)
    return model


def quantized(model: nn.Module, own: Recipe, batches: list | None = None):
    return quantize_model(load_in_memory(copy.deepcopy(model)), own, batches or [], registry=load_registry(), adapter=DecoderLM())


@pytest.fixture(scope="session")
def build() -> SimpleNamespace:
    """The three functions above, for tests (a test module cannot import another one here)."""
    return SimpleNamespace(model=small_model, recipe=recipe, quantized=quantized)


@pytest.fixture(scope="session")
def model() -> nn.Module:
    return small_model()


@pytest.fixture(scope="session")
def run(model):
    """The quantized model, with its record."""
    return quantized(model, recipe())


@pytest.fixture(scope="session")
def program(run):
    from qplug_llm.illm import lower

    return lower(run)


@pytest.fixture(scope="session")
def ids() -> torch.Tensor:
    return torch.randint(3, 61, (3, 12), generator=torch.Generator().manual_seed(1))
