"""Fused experts of every family: sites one by one, packed, run and stored without a change of the module's interface."""

import copy
from pathlib import Path

import pytest
import torch
from qcore.checkpoint import load, save
from qcore.model.tap import Tap, attach
from qcore.model.topology import Invariance
from qcore.modules.linear import QuantizedLinear
from qcore.numbers import int_activation, int_weight
from qcore.pipeline import Quantized, load_in_memory, quantize_model
from qcore.plugins import load_registry
from qcore.recipe import CalibrationSettings, Recipe, Rule
from qcore.solvers import GPTQ, RTN
from qcore.testing import check_adapter
from qplug_llm.decoder import DecoderLM
from qplug_llm.experts import ExpertStack, PackedMatrix, experts_forward, is_router, is_stack, stacks
from qplug_llm.testing import FAMILIES, ids, model_of
from torch import Tensor, nn

every_family = pytest.mark.parametrize("family", FAMILIES)
ROUTERS = Rule("*:router", int_weight(8, 16))


def recipe(*rules: Rule, **changes) -> Recipe:
    return Recipe(**{"rules": (Rule("*:weight", int_weight(4, 16)), *rules), "solver": RTN(clip="none"), **changes})


def quantized(family: str, own: Recipe, batches=(), model: nn.Module | None = None) -> Quantized:
    registry = load_registry()
    loaded = load_in_memory(copy.deepcopy(model_of(family)) if model is None else model)
    return quantize_model(loaded, own, batches, registry=registry, adapter=DecoderLM())


@torch.no_grad()
def logits(model: nn.Module, x: Tensor | None = None) -> Tensor:
    return DecoderLM().outputs(model, ids() if x is None else x)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@every_family
def test_what_is_claimed_of_its_links_and_sites_is_true(family):
    # norms, rotary tables and routers pass through float32; a wrong link is off by 1e-2 and more
    check_adapter(DecoderLM(), model_of(family, torch.float64), ids(), rtol=1e-4)


@every_family
def test_no_byte_of_an_expert_stays_float_and_each_expert_counts(family):
    result = quantized(family, recipe())
    floats = {n for n, p in result.model.named_parameters() if p.ndim > 1}
    assert not any("expert" in n and not n.endswith(("_bias", "shared_expert_gate.weight")) for n in floats), floats
    before = logits(result.model)
    assert relative(before, logits(model_of(family))) > 1e-4
    found = stacks(result.model)
    assert found
    for path, module in found.items():
        for name in ("gate_up_proj", "down_proj"):
            stack = getattr(module, name)
            for expert in range(len(stack)):
                leaf = stack.leaf(expert)
                assert isinstance(leaf, QuantizedLinear)
                kept = leaf.weight_scale.clone()
                leaf.weight_scale.zero_()
                leaf.parts_changed()
                assert not torch.equal(logits(result.model), before), f"{path}.{name}[{expert}] does not matter"
                leaf.weight_scale.copy_(kept)
                leaf.parts_changed()
    assert torch.equal(logits(result.model), before)


@every_family
def test_a_checkpoint_gives_back_the_same_model(family, tmp_path: Path):
    own = model_of(family)
    result = quantized(family, recipe(ROUTERS))
    manifest = save(result.model, tmp_path / "out", adapter="decoder-lm", registry=load_registry())
    assert manifest.layout == "qcore"
    again = load(tmp_path / "out", skeleton=copy.deepcopy(own), registry=load_registry())
    assert torch.equal(logits(again), logits(result.model))
    assert {type(m) for m in again.modules()} >= {ExpertStack, PackedMatrix, QuantizedLinear}


@every_family
def test_every_implementation_that_runs_here_computes_the_same(family):
    model = copy.deepcopy(model_of(family))
    float_eager = logits(model)
    q = quantized(family, recipe(ROUTERS), model=model).model
    assert q.config._experts_implementation == "qcore"
    mine = logits(q)
    for name in ("eager", "batched_mm", "grouped_mm"):
        q.set_experts_implementation(name)
        assert relative(logits(q), mine) < 2e-5, name  # sums in another order
    prepared = copy.deepcopy(model_of(family))
    DecoderLM().prepare(prepared)
    assert relative(logits(prepared), float_eager) < 2e-5


def test_the_stack_answers_as_the_parameter_would():
    for family in ("Mixtral", "GptOss"):
        module = next(iter(stacks(quantized(family, recipe()).model).values()))
        stack, plain = module.gate_up_proj, next(iter(stacks(model_of(family)).values())).gate_up_proj
        assert stack.shape == plain.shape and stack.dtype == plain.dtype and stack.device == plain.device and stack.ndim == 3
        assert relative(stack.dequantize(), plain) < 0.2
        assert torch.equal(stack[torch.tensor([4, 1, 4])], stack.dequantize()[[4, 1, 4]])
        assert torch.equal(stack[2], stack.dequantize()[2])


def test_rules_name_single_experts_and_some_may_stay_float(tmp_path):
    own = recipe(Rule("*.experts.1.*:weight", int_weight(8, 16)), Rule("*.layers.0.*.experts.2.down_proj:weight", None))
    result = quantized("Mixtral", own)
    first = result.model.get_submodule("model.layers.0.mlp.experts")
    assert [first.down_proj.leaf(e).spec.format.bits for e in (0, 1)] == [4, 8]
    assert type(first.down_proj.leaf(2)) is nn.Linear
    assert torch.equal(first.down_proj[2], model_of("Mixtral").model.layers[0].mlp.experts.down_proj[2])
    save(result.model, tmp_path / "out", adapter="decoder-lm", registry=load_registry())
    again = load(tmp_path / "out", skeleton=copy.deepcopy(model_of("Mixtral")), registry=load_registry())
    assert torch.equal(logits(again), logits(result.model))


def test_a_router_is_left_alone_by_rules_for_weights_and_quantized_by_its_own():
    for family in FAMILIES:
        result = quantized(family, recipe())
        assert any(is_router(m) for m in result.model.modules())
        assert not any(r.site.endswith(":router") for r in result.sites)
    records = [r.site for r in quantized("Qwen2Moe", recipe(ROUTERS)).sites]
    assert [r for r in records if r.endswith(":router")] == ["model.layers.0.mlp.gate:router", "model.layers.0.mlp.shared_expert_gate:router"]


def test_inputs_of_experts_are_quantized_where_a_rule_says_so():
    own = recipe(Rule("*:input", int_activation(8)))
    eight, float_ = (next(iter(stacks(quantized("Qwen3Moe", r).model).values())) for r in (own, recipe()))
    assert all(eight.down_proj.leaf(e).activation is not None for e in range(6))
    x, index = torch.randn(40, 64, generator=torch.Generator().manual_seed(0)), (torch.arange(80) % 6).view(40, 2)
    weights = torch.full((40, 2), 0.5)
    # 8 bits a token: 1/127 of the largest input, rounded, through two matrices
    assert 1e-4 < relative(experts_forward(eight, x, index, weights), experts_forward(float_, x, index, weights)) < 0.03


def test_taps_show_the_rows_of_each_expert_with_the_multiplier_that_the_model_uses():
    """Renormalised or not, scaled or not: what is tapped times what the expert makes of it is what the block adds."""
    for family in FAMILIES:
        model = copy.deepcopy(model_of(family, torch.float64))
        DecoderLM().prepare(model)
        module = next(iter(stacks(model).values()))
        chosen: list[tuple[Tensor, Tensor, Tensor]] = []
        module.register_forward_pre_hook(lambda m, args, chosen=chosen: chosen.append(args))
        seen: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

        class Note(Tap):
            def __init__(self, expert: int, seen=seen) -> None:
                super().__init__()
                self.expert, self.seen = expert, seen

            def forward(self, x: Tensor, rows: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
                self.seen[self.expert] = (x, rows, weight)
                return x

        for e in range(6):
            attach(module, "gate_up_proj.input", Note(e), e)
        logits(model)
        hidden, index, weights = chosen[0]
        assert sum(len(rows) for _, rows, _ in seen.values()) == index.numel()
        for e, (x, rows, weight) in seen.items():
            assert torch.equal(x, hidden[rows])
            assert torch.equal(weight, weights[index == e])


def test_tokens_that_go_nowhere_and_empty_batches_pass():
    module = next(iter(stacks(model_of("Mixtral")).values()))
    x = torch.randn(3, 64)
    nowhere = torch.full((3, 2), 6)
    assert torch.equal(experts_forward(module, x, nowhere, torch.rand(3, 2)), torch.zeros(3, 64))
    half = torch.tensor([[0, 6], [1, 6], [6, 2]])
    weights = torch.rand(3, 2)
    plain = type(module).forward.__wrapped__(module, x, half, weights)
    assert relative(experts_forward(module, x, half, weights), plain) < 1e-6


def test_inside_experts_up_scales_with_down_unless_they_clamp():
    kinds = {}
    for family in ("Mixtral", "GptOss", "DeepseekV2"):
        links = DecoderLM().topology(model_of(family, torch.float64)).links
        kinds[family] = {link.name.rsplit(".", 1)[-1]: link.invariance for link in links if "experts.0" in link.name}
        assert any(link.name == "residual" and Invariance.ROTATE in link.invariance for link in links)
    assert kinds["Mixtral"] == kinds["DeepseekV2"] == {"up→down": Invariance.SCALE, "gate·up→down": Invariance.PERMUTE}
    assert kinds["GptOss"] == {}


def test_gptq_solves_every_expert_on_its_own_rows():
    own = recipe(solver=GPTQ(), calibration=CalibrationSettings(samples=4, length=24))
    result = quantized("Mixtral", own, [ids(), ids(seed=6)])
    rows = {r.site: r for r in result.sites if "experts" in r.site}
    assert len(rows) == 2 * 2 * 6 and all(r.of == "output" for r in rows.values())
    nearest = {r.site: r for r in quantized("Mixtral", recipe(solver=RTN(weighted=True)), [ids(), ids(seed=6)]).sites}
    assert sum(r.error for r in rows.values()) < 0.8 * sum(nearest[s].error for s in rows)


def test_transformers_own_loader_opens_the_checkpoint(tmp_path):
    import qcore.hf  # noqa: F401
    from transformers import AutoModelForCausalLM

    for family in ("Mixtral", "GptOss"):
        result = quantized(family, recipe(ROUTERS))
        out = tmp_path / family
        save(result.model, out, adapter="decoder-lm", registry=load_registry(), companions=model_of(family).config.save_pretrained)
        again = AutoModelForCausalLM.from_pretrained(out, variant="qcore", dtype=torch.float32)
        assert torch.equal(logits(again), logits(result.model))


def test_stack_and_router_are_known_by_structure():
    model = model_of("Phimoe")
    assert is_router(model.model.layers[0].mlp.router) and not is_router(model.lm_head)
    assert is_stack(model.model.layers[0].mlp.experts) and not is_stack(model.model.layers[0].mlp)


def test_a_block_that_nobody_saw_run_still_has_all_its_sites():
    """The second layer is built like none of the twin: its sites come from its modules alone, the router before what it routes to."""
    model = copy.deepcopy(model_of("DeepseekV2"))
    model.model.layers[1].mlp.extra = nn.Linear(4, 4)
    sites = [str(s).removeprefix("model.layers.1.") for s in DecoderLM().topology(model).blocks[1].sites]
    assert sites.index("mlp.gate:router") < sites.index("mlp.experts:gate_up_proj[0]") < sites.index("mlp.experts:down_proj[5]")
    assert len(sites) == len(set(sites)) and "self_attn.o_proj:weight" in sites
