"""Topologies of small models of many families.  Sizes differ from the twin's everywhere: the proof must carry over."""

from functools import cache

import pytest
import torch
import transformers
from qcore.model.source import parameters_on_meta
from qcore.model.topology import Invariance, Link, Port, Topology
from qcore.testing import check_adapter
from qplug_llm.decoder import DecoderLM, learn
from qplug_llm.structure import find_blocks
from torch import Tensor, nn

SMALL = {"vocab_size": 97, "num_hidden_layers": 3, "max_position_embeddings": 48, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = {"hidden_size": 60, "intermediate_size": 76, "num_attention_heads": 6, "num_key_value_heads": 2}
GPT2 = {"n_embd": 36, "n_layer": 3, "n_head": 3, "n_positions": 48, "vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2}

# class name → config; the twin's heads are 8 wide (10 for phi), these are 10, 14, 12, 20 …
FAMILIES: dict[str, dict] = {
    "Llama": LLAMA | {"tie_word_embeddings": True},
    "Mistral": LLAMA | {"head_dim": 14},
    "Qwen2": {"hidden_size": 84, "intermediate_size": 76, "num_attention_heads": 7, "num_key_value_heads": 1},
    "Qwen3": LLAMA | {"head_dim": 14},
    "Gemma": LLAMA | {"num_key_value_heads": 1, "head_dim": 16},
    "Gemma2": LLAMA | {"head_dim": 16},
    "Phi": {"hidden_size": 60, "intermediate_size": 76, "num_attention_heads": 3, "partial_rotary_factor": 0.4},
    "Phi3": LLAMA,
    "OPT": {"hidden_size": 60, "ffn_dim": 76, "num_attention_heads": 3, "word_embed_proj_dim": 60},
    "OPT-projected": {"hidden_size": 60, "ffn_dim": 76, "num_attention_heads": 3, "word_embed_proj_dim": 28},
    "GPT2": GPT2,
    # named nowhere in our source
    "Olmo": LLAMA,
    "Olmo2": LLAMA,
    "StableLm": LLAMA | {"use_qkv_bias": True},
    "StableLm-parallel": LLAMA | {"use_parallel_residual": True},
    "Cohere": LLAMA,
    "GPTNeoX": {"hidden_size": 60, "intermediate_size": 76, "num_attention_heads": 3},
    "GPTJ": GPT2 | {"rotary_dim": 8},
    "Falcon": {"hidden_size": 60, "num_attention_heads": 6, "num_kv_heads": 2, "new_decoder_architecture": True},
    "Granite": LLAMA | {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.1, "logits_scaling": 8.0},
    "SmolLM3": LLAMA | {"num_hidden_layers": 5},
    "Mixtral": LLAMA | {"num_local_experts": 4},
}
EVERY = Invariance.PERMUTE | Invariance.SCALE | Invariance.ROTATE


@cache
def model_of(family: str) -> nn.Module:
    """A model with lively weights in float64, in evaluation mode."""
    name = family.split("-")[0]
    cls = getattr(transformers, f"{name}LMHeadModel", None) or getattr(transformers, f"{name}ForCausalLM")
    own = FAMILIES[family]
    config = cls.config_class(**(own if own.keys() >= GPT2.keys() else SMALL | own))
    config._experts_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = cls(config).double().eval().requires_grad_(False)
        for key, p in model.named_parameters():
            # gains away from 1 and of one sign, biases away from 0, matrices large enough that every nonlinearity bends
            p.copy_(0.6 + 0.8 * torch.rand_like(p) if p.ndim == 1 and "bias" not in key else torch.randn_like(p) * (0.2 if p.ndim == 1 else 0.13))
    return model


@cache
def topology_of(family: str) -> Topology:
    return DecoderLM().topology(model_of(family))


def ids() -> Tensor:
    return torch.randint(4, 97, (2, 11), generator=torch.Generator().manual_seed(5))


# the structures of these are those of others; the whole set runs with `-m slow`
_LIKE_ANOTHER = ("Mistral", "Gemma2", "Olmo", "StableLm-parallel", "Granite", "Falcon")


@pytest.mark.parametrize("family", [pytest.param(f, marks=pytest.mark.slow) if f in _LIKE_ANOTHER else f for f in FAMILIES])
def test_what_is_claimed_of_it_is_true_on_a_model_of_other_sizes(family):
    # transformers' norms, rotary tables and eager softmaxes pass through float32; a wrong link is off by 1e-2 and more
    check_adapter(DecoderLM(), model_of(family), ids(), rtol=1e-4)


def shape(family: str) -> dict[str, Invariance]:
    """Links of block 1 and of the model, by the end of their names."""
    found = {}
    for link in topology_of(family).links:
        for prefix in ("model.layers.1.", "model.decoder.layers.1.", "transformer.h.1.", "gpt_neox.layers.1."):
            if link.name.startswith(prefix):
                found[link.name.removeprefix(prefix)] = link.invariance
        if ".1." not in link.name and ".0." not in link.name and ".2." not in link.name:
            found[link.name] = link.invariance
    return found


def test_llama_has_the_links_that_its_structure_gives():
    found = shape("Llama")
    assert found == {
        "input_layernorm→q_proj·k_proj·v_proj": Invariance.SCALE,
        "post_attention_layernorm→gate_proj·up_proj": Invariance.SCALE,
        "v→o": EVERY,
        "k·q": Invariance.SCALE,
        "gate_proj·up_proj→down_proj": Invariance.PERMUTE,
        "up_proj→down_proj": Invariance.SCALE,
        "model.norm→lm_head": Invariance.SCALE,
        "residual": Invariance.PERMUTE | Invariance.ROTATE,
    }


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("Mixtral", "GPTJ", "Falcon")])
def test_attention_and_residual_links_are_found(family):
    found = shape(family)
    assert found["v→o"] == EVERY
    assert Invariance.SCALE in found["k·q"]
    rotates = family in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Phi3", "Granite", "SmolLM3")
    assert found["residual"] == (Invariance.PERMUTE | Invariance.ROTATE if rotates else Invariance.PERMUTE)


def test_a_relu_lets_positive_scales_through_and_a_gelu_does_not():
    assert shape("OPT")["fc1→fc2"] == Invariance.PERMUTE | Invariance.SCALE
    assert shape("GPT2")["c_fc→c_proj"] == Invariance.PERMUTE


def test_rotary_pairs_share_a_scale():
    def of(family: str) -> Link:
        return next(link for link in topology_of(family).links if link.name.endswith(".k·q"))

    assert (of("Llama").share, of("Llama").rotary_dims) == ("half", 0)
    assert (of("Phi").share, of("Phi").rotary_dims) == ("half", 8)  # 0.4 of 20
    assert of("Cohere").share == "interleaved"
    assert (of("GPT2").share, of("GPT2").invariance) == ("none", EVERY)  # learned positions turn nothing
    assert {p.param.rsplit(".", 2)[-2] for p in of("Qwen3").ports} == {"k_norm", "q_norm"}


def test_layers_without_rotary_embedding_are_links_of_their_own_kind():
    shares = [link.share for link in topology_of("SmolLM3").links if link.name.endswith(".k·q")]
    config = model_of("SmolLM3").config
    assert shares == ["half" if rope else "none" for rope in config.no_rope_layers]


def test_gemma_gains_are_one_plus_the_weight():
    port = next(link for link in topology_of("Gemma").links if link.name.endswith("gate_proj·up_proj")).writes[0]
    assert port.gain == 1.0
    assert next(link for link in topology_of("Llama").links if link.name.endswith("gate_proj·up_proj")).writes[0].gain == 0.0


def test_stages_follow_the_order_of_inputs():
    def stages(family: str) -> list[list[str]]:
        return [[site.module.rsplit(".", 1)[-1] for site in stage] for stage in topology_of(family).blocks[1].stages]

    assert stages("Llama") == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert stages("Phi") == [["q_proj", "k_proj", "v_proj", "fc1"], ["dense"], ["fc2"]]  # parallel: one input
    assert stages("GPT2") == [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]]


def test_fused_projections_are_slices():
    topology = topology_of("Phi3")
    up = next(link for link in topology.links if link.name.endswith("gate_up_proj[1]→down_proj"))
    assert up.writes[0].channels == (range(76, 152),)
    v = next(link for link in topology_of("GPTNeoX").links if link.name.endswith("v→o"))
    assert v.writes[0].channels == (range(40, 60), range(100, 120), range(160, 180))  # [q k v] of each head


def test_experts_are_sites_and_ports_of_the_residual_stream():
    topology = topology_of("Mixtral")
    of_layer = [str(site) for site in topology.blocks[1].sites if site.module.startswith("model.layers.1.mlp")]
    stack = "model.layers.1.mlp.experts"
    assert of_layer == [
        "model.layers.1.mlp.gate:router",
        *(f"{stack}:gate_up_proj[{e}]" for e in range(4)),
        *(f"{stack}:down_proj[{e}]" for e in range(4)),
    ]
    residual = next(link for link in topology.links if link.name == "residual")
    assert Port(f"{stack}.down_proj", "out") in residual.writes
    assert {Port(f"{stack}.gate_up_proj", "in"), Port("model.layers.1.mlp.gate.weight", "in")} <= set(residual.reads)
    assert residual.invariance == Invariance.PERMUTE | Invariance.ROTATE


def test_topology_needs_no_weights():
    config = model_of("Llama").config
    with parameters_on_meta():
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert DecoderLM().topology(model).links == topology_of("Llama").links


def test_learning_is_done_once_for_a_configuration():
    model = model_of("Qwen3")
    blocks = find_blocks(model)
    assert blocks == "model.layers"
    assert learn(model, blocks) is learn(model, blocks)


def test_a_block_that_was_rebuilt_is_refused_not_guessed():
    class Other(nn.Module):
        def __init__(self, of: nn.Linear) -> None:
            super().__init__()
            self.weight = of.weight

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.T

    config = model_of("Llama").config
    model = transformers.LlamaForCausalLM(config)
    model.model.layers[1].self_attn.v_proj = Other(model.model.layers[1].self_attn.v_proj)
    topology = DecoderLM().topology(model)
    assert not [link for link in topology.links if any("layers.1." in p.param for p in link.ports)]
    assert "none of the twin's" in topology.blocked[Port("model.layers.1.self_attn.o_proj.weight", "in")]
    assert [link for link in topology.links if link.name == "model.layers.0.v→o"]


class _Broken(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        raise ValueError("needs a GPU")


def test_a_model_whose_twin_does_not_run_keeps_its_sites_and_says_why():
    topology = DecoderLM().topology(_Broken(model_of("Llama").config))
    assert not topology.links
    assert len(topology.sites) == 21
    assert "needs a GPU" in topology.blocked[Port("model.layers.0.mlp.up_proj.weight", "in")]


def test_only_decoder_language_models_match():
    adapter = DecoderLM()
    assert adapter.matches(model_of("Llama"))
    assert not adapter.matches(nn.Linear(2, 2))
    t5 = transformers.T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2, vocab_size=32)
    assert not adapter.matches(transformers.T5ForConditionalGeneration(t5))
    mamba = transformers.MambaConfig(hidden_size=16, num_hidden_layers=2, state_size=4, vocab_size=32)
    assert not adapter.matches(transformers.MambaForCausalLM(mamba))


def test_outputs_and_context_take_ids_or_a_batch():
    adapter, model = DecoderLM(), model_of("Llama")
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[0, :4] = 0
    assert adapter.outputs(model, ids()).shape == (2, 11, 97)
    assert adapter.outputs(model, {"input_ids": ids(), "attention_mask": mask}).shape == (2, 11, 97)
    assert adapter.context(ids()).valid is None
    assert torch.equal(adapter.context({"input_ids": ids(), "attention_mask": mask}).valid, mask.bool())
