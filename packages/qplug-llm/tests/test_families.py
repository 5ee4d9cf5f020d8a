"""Families end to end: a tiny random model of each is quantized, saved, loaded, and refused link by link where its structure says so."""

import copy
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from qcore.checkpoint import load, save
from qcore.model import parameters_on_meta
from qcore.model.topology import Port, Topology
from qcore.numbers import int_activation, int_weight
from qcore.pipeline import load_in_memory, quantize_model
from qcore.plugins import load_registry
from qcore.recipe import Recipe, Rule
from qcore.solvers import GPTQ
from qcore.testing import check_adapter
from qcore.transforms import FoldNorm, SmoothQuant
from qplug_llm.decoder import DecoderLM
from qplug_llm.encoder import EncoderLM
from qplug_llm.linears import is_linear_in_disguise
from torch import Tensor, nn

SMALL = {"vocab_size": 97, "num_hidden_layers": 2, "max_position_embeddings": 48, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GATED = SMALL | {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 6, "num_key_value_heads": 2}
PLAIN = SMALL | {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 6}
OWN_ATTENTION = {"vocab_size": 97, "hidden_size": 48, "n_layer": 2, "n_head": 6, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

DECODERS = {
    "Gemma2": GATED | {"head_dim": 16, "sliding_window": 6},
    "Gemma3": GATED | {"head_dim": 16, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "Phi3": GATED,
    "Cohere": GATED,
    "Cohere2": GATED | {"sliding_window": 6},
    "Olmo2": GATED,
    "StableLm": GATED | {"use_qkv_bias": True},
    "Falcon": {k: v for k, v in PLAIN.items() if k != "intermediate_size"} | {"num_kv_heads": 2, "new_decoder_architecture": True},
    "Falcon-alibi": {k: v for k, v in PLAIN.items() if k != "intermediate_size"} | {"alibi": True, "multi_query": False, "bias": True},
    "Bloom": OWN_ATTENTION,
}
ENCODERS = {
    "Bert": PLAIN,
    "Roberta": PLAIN,
    "DistilBert": {"vocab_size": 97, "dim": 48, "hidden_dim": 80, "n_heads": 6, "n_layers": 2, "max_position_embeddings": 48},
    "MPNet": PLAIN,
    "ModernBert": PLAIN | {"cls_token_id": 1, "sep_token_id": 2},
    "Electra": PLAIN | {"embedding_size": 20},
}
FAMILIES = DECODERS | ENCODERS
# their code differs from another one's here in details that the topology tests look at; the whole set runs with `-m slow`
_LIKE_ANOTHER = ("Cohere", "Falcon-alibi", "Roberta", "StableLm", "Electra")


def adapter_of(family: str) -> DecoderLM:
    return EncoderLM() if family in ENCODERS else DecoderLM()


def class_of(family: str) -> type:
    return getattr(transformers, f"{family.split('-')[0]}{'Model' if family in ENCODERS else 'ForCausalLM'}")


@cache
def model_of(family: str) -> nn.Module:
    """With lively weights, float32, in evaluation mode; do not change it, copy it."""
    cls = class_of(family)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = cls(cls.config_class(**FAMILIES[family])).eval().requires_grad_(False)
        for key, p in model.named_parameters():
            p.copy_(0.6 + 0.8 * torch.rand_like(p) if p.ndim == 1 and "bias" not in key else torch.randn_like(p) * (0.2 if p.ndim == 1 else 0.13))
    return model


@cache
def topology_of(family: str) -> Topology:
    return adapter_of(family).topology(model_of(family))


def ids(seed: int = 5) -> Tensor:
    return torch.randint(4, 97, (2, 11), generator=torch.Generator().manual_seed(seed))


def every(*, whole: bool = False) -> list:
    return [pytest.param(f, marks=pytest.mark.slow) if f in _LIKE_ANOTHER and not whole else f for f in FAMILIES]


@pytest.mark.parametrize("family", every())
def test_it_is_quantized_saved_and_loaded(family: str, tmp_path: Path) -> None:
    adapter, model, registry = adapter_of(family), model_of(family), load_registry()
    rules = (Rule("*:weight", int_weight(8)), Rule("*:input", int_activation(8)))
    recipe = Recipe(rules=rules, solver=GPTQ(), transforms=(FoldNorm(), SmoothQuant()))
    batches = [{"input_ids": ids(seed)} for seed in range(2)]
    quantized = quantize_model(load_in_memory(copy.deepcopy(model)), recipe, batches, registry=registry, adapter=adapter)
    save(quantized.model, tmp_path / "out", adapter=adapter.name, registry=registry)
    with parameters_on_meta():
        skeleton = class_of(family)(model.config).eval()
    loaded = load(tmp_path / "out", skeleton=skeleton, registry=registry)
    with torch.no_grad():
        reference, ours, theirs = (adapter.outputs(m, {"input_ids": ids()}) for m in (model, quantized.model, loaded))
    assert torch.equal(ours, theirs)
    off = float((ours - reference).norm() / reference.norm())
    assert 1e-5 < off < 0.06  # 8 bits, and random weights with outliers: plain rounding is off by 0.01 to 0.04
    assert len(quantized.sites) == len(topology_of(family).sites) > 0


@pytest.mark.parametrize("family", ["Bloom", "Gemma3", "Cohere2", *(f for f in ENCODERS if f not in _LIKE_ANOTHER)])
def test_what_is_claimed_of_its_structure_is_true(family: str) -> None:
    check_adapter(adapter_of(family), copy.deepcopy(model_of(family)).double(), ids(), rtol=1e-4)


def names(family: str) -> set[str]:
    return {link.name.partition(".1.")[2] for link in topology_of(family).links if ".1." in link.name} - {""}


@pytest.mark.parametrize("family", ["Bert", "DistilBert", "ModernBert"])
def test_an_encoder_has_the_links_inside_its_blocks_and_none_along_its_stream(family: str) -> None:
    found = names(family)
    assert {"v→o", "k·q"} <= found
    assert not [link for link in topology_of(family).links if link.name == "residual"]


@pytest.mark.parametrize(
    ("family", "port", "reason"),
    [
        ("Bert", Port("encoder.layer.0.attention.self.query.weight", "in"), "the residual stream could not be followed"),
        ("ModernBert", Port("layers.0.mlp.Wo.weight", "out"), "residual: failed the numeric proof"),
        ("Bloom", Port("transformer.h.0.self_attention.query_key_value.weight", "out"), "not routed through transformers' AttentionInterface"),
        ("Falcon", Port("transformer.h.0.self_attention.dense.weight", "in"), "failed the numeric proof"),
    ],
)
def test_what_is_refused_is_refused_with_its_reason(family: str, port: Port, reason: str) -> None:
    assert reason in topology_of(family).blocked[port]


def test_encoders_and_decoders_are_told_apart() -> None:
    for family in FAMILIES:
        assert EncoderLM().matches(model_of(family)) is (family in ENCODERS)
        assert DecoderLM().matches(model_of(family)) is (family in DECODERS)
    assert not EncoderLM().matches(nn.Linear(2, 2))
    # its layers are one module run several times, which is no list of blocks
    albert = transformers.AlbertConfig(hidden_size=48, num_attention_heads=6, num_hidden_layers=2, vocab_size=97)
    assert not EncoderLM().matches(transformers.AlbertModel(albert))


class _Twice(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class _Plain(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


@pytest.mark.parametrize(("cls", "bias", "known"), [(_Plain, True, True), (_Plain, False, True), (_Twice, True, False), (nn.Linear, True, False)])
def test_a_linear_layer_under_another_class_is_known_by_what_it_computes(cls: type, bias: bool, known: bool) -> None:
    assert is_linear_in_disguise(cls(4, 3, bias=bias, device="meta")) is known


def test_a_family_that_nobody_knows_is_named_with_what_to_do() -> None:
    from qcore.errors import NotFound
    from qcore.model import adapter_for

    with pytest.raises(NotFound, match=r"no adapter understands T5Model; have: .*decoder-lm.*\n.*docs/add/adapter.md"):
        t5 = transformers.T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2, vocab_size=32)
        adapter_for(transformers.T5Model(t5), load_registry().adapters)


def test_a_folder_of_an_encoder_is_read_as_what_it_is(tmp_path: Path) -> None:
    from qplug_llm.sources import TransformersFolder

    model_of("Bert").save_pretrained(tmp_path)
    loaded = TransformersFolder().load(str(tmp_path))
    assert type(loaded.model) is transformers.BertModel
    assert set(loaded.reader.names()) == set(model_of("Bert").state_dict())
