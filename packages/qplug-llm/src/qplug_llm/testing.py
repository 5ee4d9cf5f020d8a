"""Small random mixtures of experts, one of each family that transformers has another code for."""

from functools import cache

import torch
import transformers
from torch import Tensor, nn

SMALL = {
    "vocab_size": 97, "num_hidden_layers": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "hidden_size": 64, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2,
}  # fmt: skip
_LATENT = {
    "n_routed_experts": 6, "n_shared_experts": 1, "moe_intermediate_size": 32, "first_k_dense_replace": 1, "num_key_value_heads": 4,
    "kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "n_group": 2, "topk_group": 1,
}  # fmt: skip
_SIX = {"num_experts": 6, "moe_intermediate_size": 32}

FAMILIES: dict[str, dict] = {
    "Mixtral": {"num_local_experts": 6},
    "Qwen2Moe": _SIX | {"shared_expert_intermediate_size": 48, "mlp_only_layers": [1]},
    "Qwen3Moe": _SIX | {"head_dim": 16, "norm_topk_prob": True},
    "DeepseekV2": _LATENT | {"topk_method": "group_limited_greedy"},
    "DeepseekV3": _LATENT | {"routed_scaling_factor": 2.5},
    "Olmoe": {"num_experts": 6},
    "GraniteMoe": {"num_local_experts": 6},
    "Phimoe": {"num_local_experts": 6, "lm_head_bias": True, "attention_bias": True},
    "GptOss": {"num_local_experts": 6, "head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
}


@cache
def model_of(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model with lively weights, in evaluation mode; do not change it, copy it."""
    cls = getattr(transformers, f"{family}ForCausalLM")
    config = cls.config_class(**(SMALL | FAMILIES[family]))
    config._experts_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = cls(config).to(dtype).eval().requires_grad_(False)
        for key, p in model.named_parameters():
            # gains away from 1 and of one sign, matrices large enough that routers choose and nonlinearities bend
            p.copy_(0.6 + 0.8 * torch.rand_like(p) if p.ndim == 1 and "bias" not in key else torch.randn_like(p) * (0.2 if p.ndim == 1 else 0.13))
    return model


def ids(batch: int = 4, length: int = 24, seed: int = 5) -> Tensor:
    """Enough tokens that every expert of these models sees some."""
    return torch.randint(4, 97, (batch, length), generator=torch.Generator().manual_seed(seed))
