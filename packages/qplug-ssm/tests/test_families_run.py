"""Every family goes through the whole path: 8-bit weights solved by GPTQ, block by block, outputs near the float model's."""

import copy
from functools import partial

import pytest
import torch
from qcore.model import adapter_for
from qcore.numbers import int_weight
from qcore.pipeline import load_in_memory, quantize_model
from qcore.plugins import load_registry
from qcore.recipe import Recipe, Rule
from qcore.solvers import GPTQ
from qcore.testing.models import randomize
from qplug_ssm.mixer import SelectiveMixer
from qplug_ssm.rwkv6 import RWKV6, RWKV6Config
from qplug_ssm.testing import TinyMamba, VimMixer
from torch import nn

COMMON = {"vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
JAMBA = COMMON | {"num_hidden_layers": 4, "mamba_d_state": 8, "mamba_dt_rank": 5, "num_attention_heads": 4, "num_key_value_heads": 2}
JAMBA |= {
    "intermediate_size": 32,
    "attn_layer_period": 4,
    "attn_layer_offset": 2,
    "expert_layer_period": 8,
    "expert_layer_offset": 7,
    "num_experts": 2,
}
MAMBA2 = COMMON | {"state_size": 8, "num_heads": 6, "head_dim": 8, "expand": 2, "n_groups": 2, "chunk_size": 8}


def make(name: str) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    if name == "RWKV6":
        model: nn.Module = RWKV6(RWKV6Config(vocab_size=40, n_layer=2, n_embd=32, head_size=16, ffn_size=48, mix_lora=4, decay_lora=4))
    elif name == "Vim":
        model = TinyMamba(partial(VimMixer, 24, 32, rank=5, states=8), vocabulary=40)
    elif name == "mirror":
        model = TinyMamba(partial(SelectiveMixer.fresh, 24, 32, rank=5, states=8, directions="mirror", same=True), vocabulary=40)
    else:
        own = {
            "Mamba": COMMON | {"state_size": 8, "time_step_rank": 5, "tie_word_embeddings": True},
            "FalconMamba": COMMON | {"state_size": 8, "time_step_rank": 5},
            "Mamba2": MAMBA2,
            "Jamba": JAMBA,
            "Rwkv": COMMON | {"attention_hidden_size": 24, "intermediate_size": 40, "context_length": 32, "tie_word_embeddings": False},
        }[name]
        cls = getattr(transformers, f"{name}ForCausalLM")
        model = cls(cls.config_class(**own))
    return randomize(model).eval().requires_grad_(False)


@pytest.mark.parametrize("name", ["Mamba", "FalconMamba", "Mamba2", "Jamba", "Rwkv", "RWKV6", "Vim", "mirror"])
def test_eight_bit_weights_go_through_the_whole_path(name):
    model, registry = make(name), load_registry()
    adapter = adapter_for(model, registry.adapters)
    g = torch.Generator().manual_seed(0)
    batches = [torch.randint(3, 40, (4, 16), generator=g) for _ in range(2)]
    adapter.prepare(model)
    with torch.no_grad():
        expected = adapter.outputs(model, batches[0])
        recipe = Recipe(rules=(Rule("*:weight", int_weight(8)),), solver=GPTQ())
        done = quantize_model(load_in_memory(copy.deepcopy(model)), recipe, batches, registry=registry, adapter=adapter)
        got = adapter.outputs(done.model, batches[0])
    assert {s.site for s in done.sites} == {str(s) for s in adapter.topology(model).sites if s.tensor == "weight"}
    assert 0 < float((got - expected).norm() / expected.norm()) < 0.1
