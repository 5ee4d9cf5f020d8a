"""Affinity-guided quantization and coverage of experts, on whole runs of the pipeline.  Source of the laws: https://arxiv.org/abs/2505.03804"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from qcore.calibration import Gram
from qcore.checkpoint.journal import Journal
from qcore.errors import CalibrationError
from qcore.numbers import QTensor, QuantSpec, int_weight
from qcore.pipeline import Quantized, load_in_memory, quantize_model
from qcore.plugins import load_registry
from qcore.recipe import CalibrationSettings, Recipe, Rule
from qcore.solvers import GPTQ, RTN
from qcore.transforms import AWQScale
from qplug_llm.decoder import DecoderLM
from qplug_llm.experts import stacks
from qplug_llm.testing import ids, model_of
from torch import Tensor, nn


def run(model: nn.Module, batches: list, solver=None, journal=None, transforms=(), rules=(), **calibration) -> Quantized:
    own = Recipe(
        rules=(Rule("*:weight", int_weight(3, 16)), Rule("*:router", int_weight(8, 16)), *rules),
        solver=solver or GPTQ(),
        transforms=transforms,
        calibration=CalibrationSettings(**calibration),
    )
    loaded = load_in_memory(copy.deepcopy(model))
    return quantize_model(loaded, own, batches, registry=load_registry(), adapter=DecoderLM(), journal=journal)


def values(result: Quantized) -> dict[str, Tensor]:
    """The values of every expert's weights."""
    return {f"{path}.{name}": getattr(m, name).dequantize() for path, m in stacks(result.model).items() for name in ("gate_up_proj", "down_proj")}


@dataclass(frozen=True)
class KeepsSeen:
    """Rounds to nearest, and keeps what it saw at each weight."""

    name: ClassVar[str] = "keeps-seen"
    grams: list[tuple[tuple[int, ...], Tensor]]

    @property
    def observes(self) -> tuple[Gram]:
        return (Gram(),)

    def solve(self, weight: Tensor, spec: QuantSpec, seen: Mapping[str, Any], frozen: Tensor | None = None) -> QTensor:
        self.grams.append((tuple(weight.shape), seen["gram"]))
        return RTN().solve(weight, spec, {})


# affinity ---------------------------------------------------------------------------------------------------------------------------------------


def test_where_the_affinity_is_constant_it_changes_nothing():
    # one expert for a token, its weight renormalised: what is multiplied with is 1
    model = copy.deepcopy(model_of("Mixtral"))
    for layer in model.model.layers:
        layer.mlp.gate.top_k = 1
    batches = [ids(), ids(seed=6), ids(seed=7)]
    plain, guided = (values(run(model, batches, affinity=a, below="layer")) for a in (0.0, 1.0))
    for name in plain:
        # the weights are sums of one softmax divided by themselves: 1 up to an ulp
        torch.testing.assert_close(guided[name], plain[name], rtol=1e-5, atol=1e-6)


def test_a_constant_factor_of_all_affinities_changes_no_code():
    rows, w = torch.randn(60, 16, generator=torch.Generator().manual_seed(0)), torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    found = []
    for weight in (None, torch.full((60,), 0.25), torch.full((60,), 4.0)):  # powers of two: no rounding differs
        gram = Gram()
        gram.update(rows, weight)
        found.append(GPTQ().solve(w, int_weight(3, 8), {"gram": gram.result()}).dequantize())
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_a_token_that_comes_r_times_counts_as_one_of_r_times_the_affinity():
    rows, c = torch.randn(30, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.rand(30, dtype=torch.float64)
    times = torch.arange(30) % 4
    often, heavy = Gram(dtype="float64"), Gram(dtype="float64")
    often.update(rows.repeat_interleave(times, 0), c.repeat_interleave(times))
    heavy.update(rows, c * times)
    torch.testing.assert_close(often.result(), heavy.result(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
def test_all_three_matrices_of_an_expert_see_the_multiplier_that_the_model_uses(exponent):
    """DeepSeek-V3's weights are sigmoids, renormalised, times 2.5: none of it may be lost."""
    model = model_of("DeepseekV3")
    solver = KeepsSeen([])
    run(model, [ids()], solver=solver, affinity=exponent, rules=(Rule("*:router", None), Rule("*.self_attn.*", None), Rule("*.layers.0.*", None)))
    prepared = copy.deepcopy(model)
    DecoderLM().prepare(prepared)
    module = prepared.model.layers[1].mlp.experts
    calls = []
    module.register_forward_pre_hook(lambda m, args: calls.append(args))
    DecoderLM().outputs(prepared, ids())
    hidden, index, weights = calls[0]
    assert float(weights.sum(1).mean()) == pytest.approx(2.5, rel=1e-4)
    found = [g for shape, g in solver.grams if shape in ((64, 64), (64, 32))][:12]  # [2I, H] of six experts, then [H, I]
    ups = [g for g in found if g.shape[0] == 64]
    downs = [g for g in found if g.shape[0] == 32]
    for e in range(6):
        x, c = hidden[(index == e).any(1)], weights[index == e] ** exponent
        torch.testing.assert_close(ups[e], (x * c[:, None]).T @ x / c.sum(), rtol=1e-4, atol=1e-5)
        assert downs[e].shape == (32, 32)
    # up is rounded before down is observed: only its trace is compared, with the float model's
    x, c = hidden[(index == 0).any(1)], weights[index == 0] ** exponent
    h = module._apply_gate(x @ module.gate_up_proj[0].T)
    wanted = (h * c[:, None]).T @ h / c.sum()
    assert float(downs[0].trace()) == pytest.approx(float(wanted.trace()), rel=0.2)


def test_guided_codes_lose_less_of_what_tokens_of_high_affinity_need():
    """Two clusters of tokens, one of high affinity: 3 bits, d = 64; MoEQuant's notes give a mean ratio of 0.865."""
    ratios = []
    for seed in range(10):
        g = torch.Generator().manual_seed(seed)
        mix = [torch.randn(64, 64, generator=g) / 8 for _ in range(2)]
        x = torch.cat([torch.randn(256, 64, generator=g) @ m for m in mix])
        c = torch.cat([torch.rand(256, generator=g) * 0.2 + 0.8, torch.rand(256, generator=g) * 0.15])
        w = torch.randn(96, 64, generator=g)
        losses = []
        for weight in (None, c):
            gram = Gram()
            gram.update(x, weight)
            delta = GPTQ().solve(w, int_weight(3, 64), {"gram": gram.result()}).dequantize() - w
            losses.append(float(((x @ delta.T).square().sum(1) * c).sum()))
        ratios.append(losses[1] / losses[0])
    assert max(ratios) < 1 and sum(ratios) / 10 < 0.95


def test_awq_reads_the_weighted_moments_of_experts():
    batches = [ids(), ids(seed=6)]
    own = {"solver": RTN(weighted=True), "transforms": (AWQScale(),)}
    plain, guided = (run(model_of("Mixtral"), batches, affinity=a, **own) for a in (0.0, 1.0))
    scaled = [p for p in guided.rewrite.edits if "experts" in p]
    assert len(scaled) == 4  # both matrices of both layers
    assert any(not torch.equal(values(plain)[n], values(guided)[n]) for n in values(plain))
    # exact up to rounding of the codes: the rewritten model before rounding is the same function
    assert all("norm" in p or "proj" in p or "gate" in p for p in guided.rewrite.edits)


def test_a_block_is_calibrated_on_what_the_quantized_block_before_it_puts_out():
    """A stack has two matrices in one module: it is final only when both are solved."""
    solver = KeepsSeen([])
    batches = [ids(), ids(seed=6)]
    result = run(model_of("Mixtral"), batches, solver=solver)
    inputs: list[Tensor] = []
    result.model.model.layers[1].input_layernorm.register_forward_hook(lambda m, args, out: inputs.append(out.flatten(0, 1)))
    for batch in batches:
        DecoderLM().outputs(result.model, batch)
    x = torch.cat(inputs)
    second = [g for shape, g in solver.grams if shape == (128, 64)][1]  # q, k and v of layer 1 are solved as one
    torch.testing.assert_close(second, x.T @ x / len(x), rtol=1e-4, atol=1e-5)


# coverage ---------------------------------------------------------------------------------------------------------------------------------------


def starved() -> nn.Module:
    """Expert 2 of layer 0 and expert 5 of layer 1 are never chosen; the router's rows point away from every token."""
    model = copy.deepcopy(model_of("GptOss"))
    for layer, expert in ((0, 2), (1, 5)):
        model.model.layers[layer].mlp.router.bias[expert] = -1e4
    return model


def test_an_expert_that_nobody_calls_fails_the_run_with_the_list_before_anything_is_solved():
    solver = KeepsSeen([])
    with pytest.raises(CalibrationError) as e:
        run(starved(), [ids()], solver=solver)
    assert "2 experts saw no row" in str(e.value)
    assert "model.layers.0.mlp.experts: 2" in str(e.value) and "model.layers.1.mlp.experts: 5" in str(e.value)
    assert solver.grams == []


@pytest.mark.parametrize("below", ["layer", "nearest"])
def test_with_a_policy_its_weights_stay_finite_and_far_from_zero(below):
    model = starved()
    result = run(model, [ids()], below=below)
    for layer, expert in ((0, 2), (1, 5)):
        before, after = model.model.layers[layer].mlp.experts, result.model.model.layers[layer].mlp.experts
        for name in ("gate_up_proj", "down_proj"):
            w, q = getattr(before, name)[expert], getattr(after, name)[expert]
            assert torch.isfinite(q).all() and 0 < float((q - w).norm() / w.norm()) < 0.35
    counts = result.coverage.to_dict()["stacks"]["model.layers.0.mlp.experts"]
    assert sum(counts["gate_up_proj"]["rows"]) == 4 * 24 * 2 and counts["gate_up_proj"]["rows"][2] == 0
    assert counts["down_proj"]["instead"] == {"2": "rounded to nearest"}
    wanted = "filled up with the layer's average" if below == "layer" else "rounded to nearest"
    assert counts["gate_up_proj"]["instead"] == {"2": wanted}


def test_a_minimum_treats_experts_with_few_rows_too():
    result = run(model_of("Mixtral"), [ids()], below="nearest", minimum=30)
    table = result.coverage.to_dict()["stacks"]
    for own in table.values():
        for stack in own.values():
            assert sorted(map(int, stack["instead"])) == [i for i, n in enumerate(stack["rows"]) if n < 30]
    assert any(stack["instead"] for own in table.values() for stack in own.values())
    treated = {f"{m}:{t}[{p}]" for m, own in table.items() for t, stack in own.items() for p in stack["instead"]}
    assert all(r.solver.startswith("RTN" if r.site in treated else "GPTQ") for r in result.sites if "experts" in r.site)


def test_awq_passes_over_an_expert_without_rows():
    own = {"solver": RTN(weighted=True), "transforms": (AWQScale(),), "below": "nearest"}
    result = run(starved(), [ids()], **own)
    assert all(torch.isfinite(v).all() for v in values(result).values())


def test_padding_counts_for_no_expert():
    mask = torch.ones(4, 24, dtype=torch.long)
    mask[:, 20:] = 0
    result = run(model_of("Qwen3Moe"), [{"input_ids": ids(), "attention_mask": mask}], below="layer")
    for own in result.coverage.to_dict()["stacks"].values():
        assert sum(own["gate_up_proj"]["rows"]) == 4 * 20 * 2


def test_the_ledger_survives_a_run_that_was_resumed(tmp_path):
    batches = [ids()]
    whole = run(model_of("Mixtral"), batches, solver=KeepsSeen([]), below="layer")

    class Stop(Exception): ...

    class Breaks(KeepsSeen):
        def solve(self, weight: Tensor, spec: QuantSpec, seen: Mapping[str, Any], frozen: Tensor | None = None) -> QTensor:
            if len(self.grams) > 14:  # in the second block
                raise Stop
            return super().solve(weight, spec, seen)

    place = tmp_path / "journal"
    with pytest.raises(Stop):
        run(model_of("Mixtral"), batches, solver=Breaks([]), below="layer", journal=Journal(place, {"run": 1}))
    again = run(model_of("Mixtral"), batches, solver=KeepsSeen([]), below="layer", journal=Journal(place, {"run": 1}))
    first = [s for s in whole.coverage.counts if s.module.startswith("model.layers.0.")]
    assert first and all(again.coverage.counts[s] == whole.coverage.counts[s] for s in first)
    assert set(again.coverage.counts) == set(whole.coverage.counts)


def test_the_routers_scores_are_recorded_again_once_it_is_quantized():
    """With a router of 2 bits other tokens come to an expert; its Gram must be theirs."""
    solver = KeepsSeen([])
    coarse = Rule("*:router", replace(int_weight(2, 16)))
    result = run(model_of("Mixtral"), [ids()], solver=solver, rules=(coarse,), below="layer")
    calls = []
    result.model.model.layers[0].mlp.experts.register_forward_pre_hook(lambda m, args: calls.append(args))
    DecoderLM().outputs(result.model, ids())
    index = calls[0][1]
    counted = [
        result.coverage.counts[s].rows for s in sorted(result.coverage.counts, key=str) if str(s).startswith("model.layers.0.mlp.experts:gate")
    ]
    assert counted == torch.bincount(index.flatten(), minlength=6).tolist()
    float_index = []
    plain = copy.deepcopy(model_of("Mixtral"))
    plain.model.layers[0].mlp.gate.register_forward_hook(lambda m, args, out: float_index.append(out[2]))
    DecoderLM().outputs(plain, ids())
    assert torch.bincount(float_index[0].flatten(), minlength=6).tolist() != counted
