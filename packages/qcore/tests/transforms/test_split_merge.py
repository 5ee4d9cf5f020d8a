"""QLLM: disassembly is exact, the loss of assembly is known, θ has an optimum inside, and a checkpoint computes what was quantized."""

import copy

import pytest
import torch
from qcore.checkpoint import load, save
from qcore.errors import SpecError
from qcore.model.plain import PlainMLP
from qcore.model.topology import Site
from qcore.modules.reassemble import ReassembleChannels
from qcore.numbers import Int, PerToken, QuantSpec, fake_quantize, int_weight
from qcore.pipeline import load_in_memory, quantize_model
from qcore.plan import make_plan
from qcore.plugins import load_registry
from qcore.recipe import Recipe, Rule
from qcore.recipe_file import dump, load_recipe, parse_recipe
from qcore.solvers import RTN
from qcore.solvers.low_rank_tuning import LowRankTuning
from qcore.testing import check_module, check_transform
from qcore.testing.conformance import fit_transform
from qcore.testing.models import TinyDecoderAdapter, tiny_decoder, tiny_mlp, tokens
from qcore.transforms.split_merge import SplitMerge, assemble, candidates, copies_of, merge_errors

INPUT = QuantSpec(format=Int(6), granularity=PerToken(), when="dynamic")


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spiked(channels: int = 64, spikes: int = 2, by: float = 40.0) -> torch.Tensor:
    x = rand(96, channels)
    x[:, 5 : 5 + spikes] *= by
    return x


class WithInputs(SplitMerge):
    """The contract test tells a transform of weights alone; this one hears that their inputs are rounded too."""

    def wants(self, topology, specs):
        return super().wants(topology, specs | {s.input: INPUT for s in specs})

    def fit(self, topology, specs, seen, model, reader):
        return super().fit(topology, specs | {s.input: INPUT for s in specs}, seen, model, reader)


@pytest.mark.parametrize("theta", [1000.0, 40.0, 7.3, 1.0, 0.21])
def test_disassembly_is_exact_for_any_threshold(theta):
    x, w = spiked(), rand(24, 64, seed=1)
    found = assemble(copies_of(x.abs().amax(0), theta), None)
    assert found.copies.shape[0] >= 64
    torch.testing.assert_close(found.inputs(x) @ found.weight(w).mT, x @ w.mT, rtol=1e-12, atol=1e-10)
    assert float(found.inputs(x).abs().max()) <= theta * (1 + 1e-12)


def test_the_module_computes_what_the_assembly_says():
    x = spiked()
    copies = copies_of(x.abs().amax(0), 30.0)
    found = assemble(copies, candidates(merge_errors(x, rand(24, 64, seed=1))))
    module = ReassembleChannels(64, 64, found.pairs, found.copies)
    assert torch.equal(module(x), found.inputs(x))
    check_module(module, x)
    with pytest.raises(SpecError, match="got 63"):
        module(x[:, :63])


def test_what_a_merge_loses_is_known_without_outputs():
    x, w = rand(50, 6), rand(7, 6, seed=1)
    errors = merge_errors(x, w)
    copies = torch.tensor([2, 1, 1, 1, 1, 1])
    found = assemble(copies, candidates(errors))
    a, b = found.pairs
    pair = [(int(i), int(j)) for i, j in zip(a, b, strict=True) if i != j]
    assert len(pair) == 1
    i, j = pair[0]
    lost = x @ w.mT - found.inputs(x) @ found.weight(w).mT
    torch.testing.assert_close(lost, torch.outer(x[:, i] - x[:, j], w[:, i] - w[:, j]) / 2, rtol=1e-10, atol=1e-12)
    assert float(lost.square().sum()) == pytest.approx(float(errors[i // 2, j // 2]))
    assert i % 2 == 0 and j % 2 == 1 and float(errors[i // 2, j // 2]) == float(errors[1:].min())  # channel 0 was taken apart


@pytest.mark.parametrize("theta", [39.0, 20.0, 9.0])
def test_assembly_keeps_the_width_and_never_merges_what_was_taken_apart(theta):
    x, w = spiked(), rand(24, 64, seed=1)
    copies = copies_of(x.abs().amax(0), theta)
    found = assemble(copies, candidates(merge_errors(x, w)))
    a, b = found.pairs
    merged = torch.cat([a[a != b], b[a != b]])
    assert found.copies.shape[0] == 64 and len(merged) == 2 * int((copies - 1).sum())
    assert len(set(merged.tolist())) == len(merged) and int(copies[merged].max()) == 1
    assert set(torch.cat([a, b]).tolist()) == set(range(64))


def test_too_few_ordinary_channels_are_no_assembly():
    assert assemble(torch.tensor([5, 1, 1]), candidates(torch.ones(2, 1))) is None
    assert assemble(torch.tensor([5, 1, 1]), None) is not None


def test_the_best_threshold_lies_inside():
    """Outputs at 6 bits, exact disassembly: more copies help, until ordinary channels are taken apart too and copies share one rounding error."""
    x, w = spiked(256, 4), rand(64, 256, seed=1)
    y, decibels = x @ w.mT, []
    for theta in (1e6, 80.0, 40.0, 20.0, 10.0, 1.0):
        found = assemble(copies_of(x.abs().amax(0), theta), None)
        error = fake_quantize(found.inputs(x), INPUT) @ found.weight(w).mT - y
        decibels.append(float(10 * torch.log10(y.square().sum() / error.square().sum())))
    best = decibels.index(max(decibels))
    assert 1 < best < 5 and decibels[best] > decibels[0] + 6 and decibels[best] > decibels[-1] + 1


def test_the_search_never_does_worse_than_nothing_and_does_nothing_to_even_channels():
    site = Site("fc")
    specs = {site: int_weight(8), site.input: INPUT}
    for x in (spiked(128, 1), torch.ones(96, 128, dtype=torch.float64)):
        found, before, after, _ = SplitMerge().search(x.abs().amax(0), x, {site: rand(16, 128, seed=1)}, specs)
        assert after <= before and (found is None) == (after == before)
    found, before, after, theta = SplitMerge().search(spiked(128, 1).abs().amax(0), spiked(128, 1), {site: rand(16, 128, seed=1)}, specs)
    assert found is not None and after < 0.5 * before and found.copies.shape[0] == 128
    assert float(spiked(128, 1).abs().max()) * 0.01 < theta < float(spiked(128, 1).abs().max())


def spiky_decoder():
    model = tiny_decoder()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[3] *= 30
            layer.post_attention_layernorm.weight[7] *= 30
    return model


def test_disassembly_alone_leaves_the_function_of_a_decoder():
    adapter, model = TinyDecoderAdapter(), spiky_decoder()
    transform = WithInputs(assemble=False, ratio=0.5)
    assert transform.exact and not SplitMerge().exact
    modules = load_registry().modules
    found = check_transform(transform, adapter, model, [tokens()], modules=modules)
    assert found.inserts and not any("o_proj" in path for path in found.inserts)
    assert any(path.endswith("q_proj") for path in found.inserts) and any(path.endswith("up_proj") for path in found.inserts)


def test_layers_that_read_one_norm_get_the_same_channels_and_weights_alone_get_none():
    adapter, model = TinyDecoderAdapter(), spiky_decoder()
    found = fit_transform(WithInputs(), adapter, model.double(), [tokens()])
    first = "model.layers.0.self_attn."
    pairs = [found.inserts[f"{first}{n}_proj"].module.tensors["pairs"] for n in "qkv"]
    assert torch.equal(pairs[0], pairs[1]) and torch.equal(pairs[0], pairs[2])
    assert 0 < found.exact < 1 and any("θ = " in n for n in found.notes)
    assert fit_transform(SplitMerge(), adapter, model, [tokens()]).empty


def whole(recipe: Recipe, model, batches, registry):
    return quantize_model(load_in_memory(copy.deepcopy(model)), recipe, batches, registry=registry, adapter=TinyDecoderAdapter())


def test_a_checkpoint_of_the_recipe_computes_what_was_quantized(tmp_path):
    registry, model = load_registry(), spiky_decoder()
    batches = [tokens(seed=s) for s in range(3)]
    recipe = load_recipe("qllm-w4a8", registry, ["block_solver.steps=20"])
    assert recipe.transforms == (SplitMerge(),) and recipe.block_solver == LowRankTuning(steps=20)
    assert parse_recipe(dump(recipe), registry, "qllm-w4a8") == recipe
    assert not make_plan(load_in_memory(model), recipe, TinyDecoderAdapter(), registry).problems
    done = whole(recipe, model, batches, registry)
    inserted = [m for m in done.model.modules() if isinstance(m, ReassembleChannels)]
    assert inserted and all(m.width == m.size for m in inserted)
    save(done.model, tmp_path / "out", adapter="tiny-decoder", registry=registry, values=done.values)
    again = load(tmp_path / "out", skeleton=tiny_decoder(), registry=registry, adapter=TinyDecoderAdapter())
    x = tokens(seed=9)
    with torch.no_grad():
        assert torch.equal(again(x), done.model(x))


def test_reassembly_lowers_the_error_of_rounded_inputs():
    registry, model = load_registry(), spiky_decoder()
    batches, x = [tokens(4, seed=s) for s in range(3)], tokens(4, seed=9)
    act = QuantSpec(format=Int(4), granularity=PerToken(), when="dynamic")
    rules, errors = (Rule("*:weight", int_weight(8)), Rule("*:input", act)), []
    for transforms in ((), (SplitMerge(),)):
        done = whole(Recipe(rules=rules, solver=RTN(), transforms=transforms), model, batches, registry)
        with torch.no_grad():
            errors.append(float((done.model(x) - model(x)).square().sum()))
    assert errors[1] < errors[0]


def test_a_correction_is_absorbed_and_leaves_no_module():
    registry, errors, shapes = load_registry(), [], []
    x = rand(64, 16).float()
    wanted = tiny_mlp()(x)
    for solver in (None, LowRankTuning(steps=80, rank=2)):
        recipe = Recipe(rules=(Rule("*:weight", int_weight(3)),), solver=RTN(), block_solver=solver)
        done = quantize_model(load_in_memory(tiny_mlp()), recipe, [x], registry=registry, adapter=PlainMLP())
        errors.append(float((done.model(x) - wanted).detach().square().sum()))
        shapes.append({n: (t.shape, t.dtype) for n, t in done.model.state_dict().items()})
    assert shapes[0] == shapes[1]
    assert errors[1] < errors[0]


def test_what_cannot_be_is_refused():
    for options in ({"ratio": 0.0}, {"ratio": 0.6}, {"steps": 0}, {"rows": 0}):
        with pytest.raises(SpecError):
            SplitMerge(**options)
    with pytest.raises(SpecError, match="rank of at least 1"):
        LowRankTuning(rank=0)
    with pytest.raises(SpecError, match="positive θ"):
        copies_of(torch.ones(3), 0.0)
