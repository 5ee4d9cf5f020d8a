"""Numbers of GSQ-Tuning by the names of their formats, a layer in them, and a tiny random decoder."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from qcore.model.topology import Site
from qcore.plugins import load_registry
from qcore.recipe_file import load_recipe
from qplug_llm import gsq
from qplug_llm.gsq.layer import GSQLinear
from qplug_llm.gsq.model import numbers_for
from qplug_llm.gsq.step import FLOAT, Numbers
from torch import Tensor, nn

RECIPES = Path(gsq.__file__).parent / "recipes"
SMALL = {
    "vocab_size": 61, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def recipe(name: str, *overrides: str):
    """A recipe by its file: the entry point may not be installed where these tests run."""
    if "bfp" not in load_registry().formats:
        pytest.skip("qplug-hardware is not installed")
    return load_recipe(RECIPES / f"{name}.toml", load_registry(), overrides)


def numbers(activation: int | None, gradient: int | None = None, **options) -> Numbers:
    """A{activation}G{gradient}; None = float"""

    def of(bits: int | None):
        if bits is None:
            return FLOAT
        return numbers_for(recipe("gsq-w4a8g8", *(f"rules.{i}.format.mantissa={bits - 1}" for i in (1, 2))), Site("x"))

    return Numbers(activation=of(activation).activation, gradient=of(gradient).gradient, **options)


def linear(out: int = 40, into: int = 50, seed: int = 0, bias: bool = False) -> nn.Linear:
    leaf = nn.Linear(into, out, bias=bias)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in leaf.parameters():
            p.copy_(torch.randn(p.shape, generator=g) / into**0.5)
    return leaf.requires_grad_(False)


def layer(own: Numbers, *, out: int = 40, into: int = 50, rank: int = 8, alpha: float = 8.0, bias: bool = False) -> GSQLinear:
    """A layer with an adapter that is not zero."""
    made = GSQLinear(linear(out, into, bias=bias), rank, alpha, own)
    with torch.no_grad():
        made.lora_B.copy_(torch.randn(out, rank, generator=torch.Generator().manual_seed(1)) / rank**0.5)
    return made


def gradients(made: GSQLinear, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Y, dX, dA, dB."""
    x = x.clone().requires_grad_()
    y = made(x)
    return y.detach(), *torch.autograd.grad(y, (x, made.lora_A, made.lora_B), dy)


def model(cls: str = "Llama", **changes) -> nn.Module:
    """Lively random weights in float32."""
    own = getattr(transformers, cls if cls.endswith("Model") else f"{cls}ForCausalLM")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        made = own(own.config_class(**(SMALL | changes))).float().eval().requires_grad_(False)
        for p in made.parameters():
            p.copy_(0.6 + 0.8 * torch.rand_like(p) if p.ndim == 1 else torch.randn_like(p) * 0.15)
    return made


@pytest.fixture(scope="session")
def make() -> SimpleNamespace:
    """The functions above, for tests (a test module cannot import another one here)."""
    return SimpleNamespace(recipe=recipe, numbers=numbers, linear=linear, layer=layer, gradients=gradients, model=model, recipes=RECIPES)
