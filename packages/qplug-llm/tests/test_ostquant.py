"""Rotations and scales on real families: outputs stay, to 1e-9 in float64, each alone and all together, merged or not, prefilled or step by step.

transformers' norms compute in float32 whatever the model's dtype is; here they are told that float32 is float64.
"""

import copy
import sys
from functools import cache
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from qcore.checkpoint import load, save
from qcore.checkpoint.journal import Journal
from qcore.model import adapter_for, load_source
from qcore.model.reader import DictReader
from qcore.model.topology import Invariance, Topology
from qcore.numbers import Int, Offset, PerGroup, PerToken, QuantSpec
from qcore.numbers.spec import int_weight
from qcore.pipeline import load_in_memory, quantize_model
from qcore.plan import make_plan
from qcore.plugins import load_registry
from qcore.recipe_file import dump, load_recipe, parse_recipe
from qcore.transforms import FoldNorm, HadamardRotate, LearnRotations, Rewrite, RewrittenReader, apply_rewrite, rewritten_tensors, rewritten_topology
from qcore.transforms.apply import place_inserts
from qcore.transforms.learn import Stretch, Turn, compose
from qcore.transforms.rewrite import cut_ties, scale_link
from qplug_llm.decoder import DecoderLM
from torch import Tensor, nn

SMALL = {
    "vocab_size": 97, "num_hidden_layers": 2, "max_position_embeddings": 48, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "hidden_size": 60, "num_attention_heads": 6, "num_key_value_heads": 2,
}  # fmt: skip
# intermediate sizes stand for real ones: 48 = 12·2² for 1536 = 12·2⁷, 344 for 11008 = 344·2⁵, 428 = 107·2² for 13696 = 107·2⁷, which must be padded
FAMILIES: dict[str, dict] = {
    "Llama": {"intermediate_size": 48, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "Mistral": {"intermediate_size": 344, "head_dim": 12},
    "Qwen2": {"intermediate_size": 428},
    "Qwen3": {"intermediate_size": 48, "head_dim": 14, "tie_word_embeddings": True},
    "Gemma": {"intermediate_size": 48, "num_key_value_heads": 1, "head_dim": 16},
    "Gemma2": {"intermediate_size": 48, "head_dim": 16, "query_pre_attn_scalar": 16},
}


class _DoubleTorch(ModuleType):
    """torch, but for its name of float32."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture(autouse=True)
def norms_in_float64(monkeypatch):
    for family in FAMILIES:
        module = sys.modules[getattr(transformers, f"{family}ForCausalLM").__module__]
        monkeypatch.setattr(module, "torch", _DoubleTorch("torch"))
        norm = next(v for n, v in vars(module).items() if n.endswith("RMSNorm"))
        if "Gemma" in family:  # its norm says x.float()
            monkeypatch.setattr(norm, "forward", lambda self, x: self._norm(x) * (1.0 + self.weight))


@cache
def model_of(family: str) -> nn.Module:
    """A model with lively weights in float64, in evaluation mode; do not change it."""
    cls = getattr(transformers, f"{family}ForCausalLM")
    config = cls.config_class(**(SMALL | FAMILIES[family]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = cls(config).double().eval().requires_grad_(False)
        for key, p in model.named_parameters():
            p.copy_(0.6 + 0.8 * torch.rand_like(p) if p.ndim == 1 and "bias" not in key else torch.randn_like(p) * (0.2 if p.ndim == 1 else 0.13))
    DecoderLM().prepare(model)
    return model


@cache
def topology_of(family: str) -> Topology:
    return DecoderLM().topology(model_of(family))


@cache
def pieces(family: str) -> tuple[Rewrite, tuple[Turn | Stretch, ...], Rewrite]:
    """Folded norms, every rotation and scale that the family allows with lively numbers, and what is rotated at run time."""
    model, topology = model_of(family), topology_of(family)
    reader = DictReader(dict(model.state_dict()))
    fold = FoldNorm().fit(topology, {}, {}, model, reader)
    topology, folded = rewritten_topology(topology, fold), RewrittenReader(reader, fold, model)
    act = QuantSpec(format=Int(4), granularity=PerToken(), offset=Offset.CODE, when="dynamic")
    head = QuantSpec(format=Int(4), granularity=PerGroup(2), offset=Offset.CODE, when="dynamic")
    specs = {s: int_weight(4) for s in topology.sites} | {s.input: act for s in topology.sites}
    specs |= {s: head for s in topology.activations if s.tensor in "kv"}
    course = LearnRotations()
    parts = course.learnables(topology, specs, {}, model, folded, [])
    generator = torch.Generator().manual_seed(0)
    for part in parts:
        if isinstance(part, Turn):
            part.matrix = part.matrix @ torch.linalg.qr(torch.randn(part.matrix.shape, generator=generator, dtype=torch.float64)).Q
        else:
            part.log = 0.4 * torch.randn(part.log.shape, generator=generator, dtype=torch.float64)
    online = course.at_run_time(rewritten_topology(topology, compose(parts)), specs, {}, model, folded, [])
    return fold, tuple(parts), online


def ids() -> Tensor:
    return torch.randint(4, 97, (2, 9), generator=torch.Generator().manual_seed(5))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids(), use_cache=False).logits


def gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_each_alone_and_all_together_leave_the_logits_alone(family):
    model, topology = model_of(family), topology_of(family)
    fold, parts, online = pieces(family)
    reference = logits(model)
    names = {p.link.name.rpartition(".")[2] + type(p).__name__: p for p in parts}  # one of each kind
    for part in (*names.values(), *(p for p in parts if p.link.name == "residual")):
        rewrite = cut_ties(fold.then(part.rewrite()), model, topology.ties)
        assert gap(logits(apply_rewrite(model, rewrite)), reference) < 1e-9, part.link.name
    assert gap(logits(apply_rewrite(model, cut_ties(fold.then(online), model, topology.ties))), reference) < 1e-9
    whole = cut_ties(fold.then(compose(parts)).then(online), model, topology.ties)
    merged = apply_rewrite(model, whole)
    assert gap(logits(merged), reference) < 1e-9
    # step by step, with a cache: three tokens, then one at a time
    with torch.no_grad():
        out = merged(input_ids=ids()[:, :3], use_cache=True)
        steps = [out.logits]
        for t in range(3, ids().shape[1]):
            out = merged(input_ids=ids()[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
            steps.append(out.logits)
    assert gap(torch.cat(steps, 1), reference) < 1e-9


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_the_form_that_learns_is_the_form_that_is_merged(family):
    model, topology = model_of(family), topology_of(family)
    fold, parts, online = pieces(family)
    whole = cut_ties(fold.then(compose(parts)).then(online), model, topology.ties)
    live = copy.deepcopy(model)
    live.lm_head.weight = nn.Parameter(live.lm_head.weight.clone(), requires_grad=False)
    place_inserts(live, whole)
    with torch.no_grad():
        trained = torch.func.functional_call(live, rewritten_tensors(model, whole), kwargs={"input_ids": ids(), "use_cache": False}).logits
    assert torch.equal(trained, logits(apply_rewrite(model, whole)))


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Mistral"])
def test_a_scale_of_its_own_for_each_channel_of_a_rotary_pair_breaks_the_model(family):
    model = model_of(family)
    link = next(link for link in topology_of(family).links if link.name.endswith("k·q"))
    free = torch.rand(link.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    assert link.share == "half"
    assert gap(logits(apply_rewrite(model, scale_link(link, free))), logits(model)) > 1e-3


def test_scales_of_q_and_k_live_on_the_gains_of_their_norms_on_qwen3():
    _fold, parts, _ = pieces("Qwen3")
    touched = {name for p in parts if isinstance(p, Stretch) and p.link.name.endswith("k·q") for name in p.rewrite().edits}
    assert touched and all(name.endswith(("q_norm.weight", "k_norm.weight")) for name in touched)


def test_the_scale_of_the_values_divides_the_input_axis_of_o():
    _, parts, _ = pieces("Llama")
    rewrite = next(p for p in parts if isinstance(p, Stretch) and p.link.name.endswith("v→o")).rewrite()
    ports = {name: [e.port.axis for e in edits] for name, edits in rewrite.edits.items()}
    assert {own for name, axes in ports.items() if "o_proj" in name for own in axes} == {"in"}
    assert {own for name, axes in ports.items() if "v_proj" in name for own in axes} == {"out"}


def test_padding_appends_zeros_and_no_bias_that_was_not_there():
    model = model_of("Qwen2")
    fold, parts, online = pieces("Qwen2")
    merged = apply_rewrite(model, cut_ties(fold.then(compose(parts)).then(online), model, topology_of("Qwen2").ties))
    down = merged.model.layers[0].mlp.down_proj
    assert down.leaf.weight.shape[1] == 432 > 428 and down.leaf.bias is None
    back = online.undo("model.layers.0.mlp.down_proj.weight", down.leaf.weight, model.model.layers[0].mlp.down_proj)
    assert float(back[:, 428:].abs().max()) < 1e-12


def test_tied_embeddings_are_untied_where_the_head_takes_the_last_gain():
    model = model_of("Llama")
    fold, parts, online = pieces("Llama")
    whole = cut_ties(fold.then(compose(parts)).then(online), model, topology_of("Llama").ties)
    assert "lm_head.weight" in whole.unties
    merged = apply_rewrite(model, whole)
    assert merged.lm_head.weight is not merged.model.embed_tokens.weight


def test_gemma2_has_no_rotation_of_the_stream_and_says_so_and_has_the_other_pairs():
    topology, model = topology_of("Gemma2"), model_of("Gemma2")
    assert not any(link.through for link in topology.links_with(Invariance.ROTATE))
    _, parts, _ = pieces("Gemma2")
    kinds = {(p.link.name.rpartition(".")[2], type(p).__name__) for p in parts}
    assert ("v→o", "Turn") in kinds and ("k·q", "Stretch") in kinds and ("up_proj→down_proj", "Stretch") in kinds
    for transform in (LearnRotations(), HadamardRotate()):
        notes = transform.foresee(topology, {}, model)
        assert any("residual stream is not rotated" in n and "other pairs" in n for n in notes)


def test_sizes_without_a_hadamard_matrix_are_foreseen_with_the_fallback():
    model, topology = model_of("Qwen2"), topology_of("Qwen2")
    act = QuantSpec(format=Int(4), granularity=PerToken(), when="dynamic")
    specs = {s: int_weight(4) for s in topology.sites} | {s.input: act for s in topology.sites}
    notes = HadamardRotate(rest=True).foresee(topology, specs, model)
    assert any("428 channels" in n and "padded with zeros to 432" in n for n in notes)
    assert any("no Hadamard matrix of size 10 is known, rotated in blocks of 2" in n for n in notes)


@pytest.mark.parametrize("name", ["quarot-w4a4kv4", "spinquant-w4a4kv4", "ostquant-w4a4", "ostquant-w4a4kv4", "w4a16-ostquant"])
def test_a_recipe_plans_on_the_trained_llama_and_survives_a_dump(name):
    registry = load_registry()
    recipe = load_recipe(name, registry)
    assert parse_recipe(dump(recipe), registry, name) == recipe
    loaded = load_source("zoo:tiny-llama", registry.sources)
    plan = make_plan(loaded, recipe, adapter_for(loaded.model, registry.adapters), registry)
    assert plan.problems == () and plan.needs_data
    assert len(plan.decisions) == 4 * 7


def test_a_plan_of_gemma2_says_what_is_not_rotated():
    registry = load_registry()
    recipe = load_recipe("ostquant-w4a4", registry, ("rules.0.granularity.size=2",))
    plan = make_plan(load_in_memory(model_of("Gemma2")), recipe, DecoderLM(), registry)
    assert any("learn-rotations" in n and "residual stream is not rotated" in n for n in plan.notes)


def test_a_learned_checkpoint_computes_what_was_quantized_streamed_or_not(tmp_path):
    registry = load_registry()
    settings = ["rules.0.granularity.size=4", "calibration.starts=0", "transforms.1.steps=3", "transforms.1.length=9", "transforms.1.held_out=2"]
    recipe = load_recipe("ostquant-w4a4kv4", registry, settings)
    text = [torch.randint(4, 97, (8, 9), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    batches = [{"input_ids": t} for t in text]
    said = []
    for stream in (False, True):
        model = copy.deepcopy(model_of("Llama")).float()
        journal = Journal(tmp_path / f"journal-{stream}", {"run": 1})
        q = quantize_model(load_in_memory(model), recipe, batches, registry=registry, adapter=DecoderLM(), journal=journal, stream=stream)
        out = tmp_path / f"out-{stream}"
        save(q.model, out, adapter="decoder-lm", registry=registry, values=q.values)
        again = load(out, skeleton=copy.deepcopy(model_of("Llama")).float(), registry=registry)
        said.append(logits(again))
        if not stream:
            assert torch.equal(said[0], logits(q.model))
    assert torch.equal(said[0], said[1])
    assert (tmp_path / "out-False/model.qcore.safetensors").read_bytes() == (tmp_path / "out-True/model.qcore.safetensors").read_bytes()
