"""Mixed precision: budgets are those of packed bytes, scores find what counts, and what cannot work is said before anything is computed."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qcore.errors import CalibrationError, PlanError, SpecError
from qcore.model.plain import PlainCNN, PlainMLP
from qcore.numbers import FP4_E2M1, PerGroup, QuantSpec, int_weight
from qcore.pipeline import load_in_memory, quantize_model
from qcore.plan import make_plan
from qcore.plugins import load_registry
from qcore.processes import Alone
from qcore.recipe import Recipe, Rule
from qcore.recipe_file import dump, load_recipe, parse_recipe
from qcore.solvers import GPTQ, RTN, Candidate, Mixed
from qcore.solvers.hessian import eigenvalues, traces
from qcore.solvers.sensitivity import METRICS, canonical_correlation, kl
from qcore.testing.models import TinyDecoderAdapter, tiny_cnn, tiny_decoder, tiny_mlp, tokens
from torch import nn

CANDIDATES = tuple(Candidate(spec=int_weight(b, 8)) for b in (2, 3, 4, 8))
DATA_FREE = Mixed(bits=6.0, candidates=CANDIDATES, metric="mse", solver=RTN())


@pytest.fixture(scope="module")
def registry():
    return load_registry()


def recipe(allocator: Mixed) -> Recipe:
    return Recipe(rules=(Rule("*:weight", int_weight(4, 8)),), solver=RTN(), allocator=allocator)


def rows(seed: int = 0, n: int = 96) -> torch.Tensor:
    return torch.randn(n, 16, generator=torch.Generator().manual_seed(seed))


def run(model, allocator, registry, inputs=(), adapter=None):
    return quantize_model(load_in_memory(model), recipe(allocator), inputs, registry=registry, adapter=adapter or PlainMLP())


def effective_bits(done) -> float:
    return 8 * sum(r.nbytes for r in done.sites) / sum(r.shape[0] * r.shape[1] for r in done.sites)


@settings(max_examples=12, deadline=None)
@given(st.floats(4.75, 12), st.sampled_from(["knapsack", "greedy", "prefix"]), st.integers(0, 3))
def test_the_packed_bytes_never_exceed_the_budget(bits, choose, seed):
    done = run(tiny_mlp(seed=seed), replace(DATA_FREE, bits=bits, choose=choose), load_registry())
    assert effective_bits(done) <= bits
    assert len(done.choices) == len(done.sites) == 3


def test_more_bits_are_never_a_larger_sum_of_scores(registry):
    errors = []
    for bits in (4.8, 6.0, 8.0, 12.0):
        done = run(tiny_mlp(), replace(DATA_FREE, bits=bits), registry)
        errors.append(sum(float(why.split("mse ")[1].split(" ")[0]) for why in done.choices.values()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.1 * errors[0]


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_allocates_a_decoder(metric, registry):
    inputs = [tokens(batch=4, length=48, seed=i) for i in range(2)]
    done = run(tiny_decoder(), replace(DATA_FREE, bits=5.3, metric=metric, batches=2), registry, inputs, TinyDecoderAdapter())
    assert effective_bits(done) <= 5.3
    assert len({r.spec for r in done.sites}) > 1, done.choices
    assert all(metric in why for why in done.choices.values())


@pytest.mark.parametrize("metric", ["output", "kl", "fisher", "hessian-trace"])
def test_convolutions_are_allocated_too(metric, registry):
    candidates = tuple(Candidate(spec=int_weight(b)) for b in (2, 4, 8))
    inputs = [torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    allocator = replace(DATA_FREE, bits=6.0, candidates=candidates, metric=metric)
    loaded = load_in_memory(tiny_cnn())
    plain = Recipe(rules=(Rule("*:weight", int_weight(4)),), solver=RTN(), allocator=allocator)
    done = quantize_model(loaded, plain, inputs, registry=registry, adapter=PlainCNN())
    assert effective_bits(done) <= 6.0 and len({r.spec for r in done.sites}) > 1


def test_the_keep_list_of_one_spike_is_exactly_that_layer(registry):
    model = tiny_mlp()
    x = rows()
    x[5] = 0
    with torch.no_grad():
        # a unit of the first layer that fires for one token alone, and nowhere else
        x[5, 0] = 50.0
        x[:5, 0] = x[6:, 0] = 0.0
        model[0].weight[0] = 0
        model[0].weight[0, 0] = 100.0
        model[2].weight[:, 0] = 0  # what the second layer makes of it is nothing
    allocator = replace(DATA_FREE, bits=9.0, metric="spikes", choose="threshold", limit=100.0, candidates=(CANDIDATES[1], CANDIDATES[3]))
    done = run(model, allocator, registry, [x])
    wide = [r.site for r in done.sites if r.spec.startswith("int8")]
    assert wide == ["2:weight"]


def deep_mlp(seed: int) -> nn.Sequential:
    """Layers of very different weight in the output."""
    g = torch.Generator().manual_seed(seed)
    model = nn.Sequential(*(layer for _ in range(7) for layer in (nn.Linear(16, 16), nn.Tanh())), nn.Linear(16, 8))
    with torch.no_grad():
        for layer in model[::2]:
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=g) * 0.35 * torch.rand((), generator=g).mul(3).exp() ** 0.5)
            layer.bias.zero_()
    return model


@pytest.mark.parametrize("metric", ["fisher", "taylor", "hessian-trace", "kl"])
def test_scores_order_layers_as_their_true_damage_does(metric, registry):
    from qcore.pipeline.look import RunLook
    from qcore.pipeline.run import _Run
    from qcore.solvers.sensitivity import Trial, score

    correlations = []
    for seed in range(3):
        model, inputs = deep_mlp(seed), [rows(seed * 10 + i, 256) for i in range(6)]
        with torch.no_grad():
            reference = model(torch.cat(inputs))
            true = {}
            for i in range(0, 15, 2):
                kept = model[i].weight.clone()
                model[i].weight.copy_(RTN().solve(kept, int_weight(3, 8), {}).dequantize())
                true[f"{i}:weight"] = kl(reference, model(torch.cat(inputs)))
                model[i].weight.copy_(kept)
            step = _Run(load_in_memory(model), recipe(DATA_FREE), inputs, registry, PlainMLP(), lambda *a: None, None, False, 1 << 30, Alone())
            look = RunLook(step.skeleton, step.wishes, step.adapter, inputs, step._observed_blocks, False)
            found = score(metric, list(step.topology.sites), look, Trial((int_weight(3, 8),), RTN(), batches=6))
        ranks = [torch.tensor([own[k] for k in true]).argsort().argsort().double() for own in (true, {str(s): v[0] for s, v in found.items()})]
        correlations.append(float(torch.corrcoef(torch.stack(ranks))[0, 1]))
    assert sum(correlations) / 3 >= 0.6, correlations


class Quadratic:
    """Logits of a softmax regression, whose Hessian is known: a `WholeModel` without a model."""

    batches = 1

    def __init__(self) -> None:
        self.x = torch.randn(40, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def outputs(self, batch, matrices):
        return self.x @ next(iter(matrices.values())).T


def test_power_iteration_and_hutchinson_agree_with_the_dense_hessian():
    """20 parameters.  The Hessian of a softmax regression does not depend on the labels."""
    model, w = Quadratic(), torch.randn(4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def loss(flat):
        logs = torch.log_softmax(model.outputs(0, {"w": flat.view(4, 5)}), -1)
        return -logs[:, 0].mean()

    dense = torch.autograd.functional.hessian(loss, w.flatten())
    weights = {"w": w.clone().requires_grad_()}
    found = eigenvalues(model, weights, [0], steps=500, tolerance=1e-9)["w"][0]
    assert found == pytest.approx(float(torch.linalg.eigvalsh(dense)[-1]), rel=1e-3)
    estimate = traces(model, weights, [0] * 200)["w"]
    assert estimate == pytest.approx(float(dense.trace()), rel=0.1)  # 200 draws of signs


def test_canonical_correlation_knows_copies_and_strangers():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(2000, 8, generator=g), torch.randn(2000, 8, generator=g)
    assert canonical_correlation(x, x @ torch.randn(8, 8, generator=g)) == pytest.approx(1, abs=1e-6)
    assert canonical_correlation(x, y) < 0.1
    with pytest.raises(CalibrationError, match="more rows"):
        canonical_correlation(x[:16], y[:16])


# what cannot work ------------------------------------------------------------------------------------------------------------------------


def test_a_budget_below_the_smallest_choice_is_refused_in_the_plan(registry):
    plan = make_plan(load_in_memory(tiny_mlp()), recipe(replace(DATA_FREE, bits=2.5)), PlainMLP(), registry)
    with pytest.raises(PlanError, match=r"2\.5 bits per weight is below the smallest choice, 4\.7222 bits"):
        plan.require()
    make_plan(load_in_memory(tiny_mlp()), recipe(DATA_FREE), PlainMLP(), registry).require()
    with pytest.raises(SpecError, match="below the smallest choice"):
        run(tiny_mlp(), replace(DATA_FREE, bits=2.5), registry)


def test_a_weight_that_no_candidate_fits_is_named(registry):
    odd = Mixed(bits=4, candidates=(Candidate(spec=int_weight(4, 7)),), metric="mse")
    plan = make_plan(load_in_memory(tiny_mlp()), recipe(odd), PlainMLP(), registry)
    assert any("no candidate that fits 0:weight" in p for p in plan.problems)


class RoundedAdapter(PlainMLP):
    """Of a model whose outputs have no gradient."""

    def outputs(self, model, batch):
        return model(batch).detach()


@pytest.mark.parametrize("metric", ["taylor", "fisher", "hessian-trace", "hessian-eigenvalue"])
def test_a_model_without_gradients_is_told_which_metrics_need_none(metric, registry):
    allocator = replace(DATA_FREE, metric=metric)
    with pytest.raises(CalibrationError, match=r"needs gradients .* take a metric that needs none"):
        run(tiny_mlp(), allocator, registry, [rows()], RoundedAdapter())


def test_metrics_of_inputs_want_calibration_data(registry):
    for metric in ("output", "kl"):
        with pytest.raises(CalibrationError, match="calibration data"):
            run(tiny_mlp(), replace(DATA_FREE, metric=metric), registry)
        assert make_plan(load_in_memory(tiny_mlp()), recipe(replace(DATA_FREE, metric=metric)), PlainMLP(), registry).needs_data
    assert not make_plan(load_in_memory(tiny_mlp()), recipe(DATA_FREE), PlainMLP(), registry).needs_data


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 0}, "positive number of bits"),
        ({"candidates": ()}, "at least one candidate"),
        ({"choose": "threshold"}, "a limit goes with"),
        ({"limit": 3.0}, "a limit goes with"),
        ({"metric": "guess"}, "unknown metric"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(SpecError, match=message):
        replace(DATA_FREE, **options)


def test_the_recipe_survives_its_file(registry):
    own = load_recipe("mixed", registry, ("allocator.bits=3.25",))
    assert own.allocator.bits == 3.25 and own.allocator.needs == "model"
    custom = recipe(Mixed(candidates=(Candidate(spec=QuantSpec(format=FP4_E2M1, granularity=PerGroup(32)), solver=RTN()), CANDIDATES[0])))
    assert parse_recipe(dump(custom), registry, "recipe") == custom
    assert own.allocator.solver == GPTQ()


def test_bits_on_the_command_line_are_the_allocators_budget(registry):
    from qcore.cli._options import with_budget

    assert with_budget("mixed", registry, ("calibration.seed=1",), 3.25) == ("calibration.seed=1", "allocator.bits=3.25")
    assert with_budget("w4a16-gptq", registry, (), None) == ()
    with pytest.raises(SpecError, match=r"no allocator with a budget; take --recipe mixed"):
        with_budget("w4a16-gptq", registry, (), 3.25)


def test_a_streamed_run_refuses_metrics_of_the_whole_model_in_its_plan(registry):
    for metric, refused in (("kl", True), ("output", False)):
        plan = make_plan(load_in_memory(tiny_decoder()), recipe(replace(DATA_FREE, metric=metric)), TinyDecoderAdapter(), registry, stream=True)
        assert any("runs the whole float model in memory" in p for p in plan.problems) == refused
