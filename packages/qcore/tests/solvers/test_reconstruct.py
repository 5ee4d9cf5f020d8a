"""Learned rounding: never worse than its start on what it learned from, exact at the start, and the same for linear layers and convolutions."""

from dataclasses import replace

import pytest
import torch
from qcore.checkpoint.journal import Journal
from qcore.errors import CalibrationError, PlanError, SpecError
from qcore.model.plain import PlainCNN, PlainMLP
from qcore.model.topology import Site
from qcore.numbers import FP4_E2M1, Int, Offset, PerGroup, QuantSpec, int_weight
from qcore.pipeline import load_in_memory, quantize_model
from qcore.plan import make_plan
from qcore.plugins import load_registry
from qcore.processes import Alone
from qcore.recipe import Recipe, Rule
from qcore.recipe_file import dump, parse_recipe
from qcore.solvers import GPTQ, RTN, AdaRound, LearnedClipping, SignRound
from qcore.solvers.reconstruct import Grid, _error
from qcore.testing.models import TinyDecoderAdapter, tiny_cnn, tiny_decoder, tiny_mlp, tokens

SPECS = {
    "symmetric": int_weight(2, 8, scale="float16"),
    "zero-point": int_weight(3, 8, asymmetric=True),
    "offset": QuantSpec(format=Int(2), granularity=PerGroup(8), offset=Offset.VALUE, scale="float16"),
}
SOLVERS = [SignRound(steps=40, lr=0.02), AdaRound(steps=40, lr=0.1), LearnedClipping(steps=40)]
A, B = Site("a"), Site("b")


class TwoLayers:
    """y = relu(x Aᵀ) Bᵀ, a block without a model."""

    def __init__(self, spec: QuantSpec, solver=None) -> None:
        g = torch.Generator().manual_seed(0)
        self.inputs = [torch.randn(32, 16, generator=g) @ torch.randn(16, 16, generator=g) for _ in range(3)]
        self.weights = {A: torch.randn(24, 16, generator=g), B: torch.randn(8, 24, generator=g)}
        self.shares = [1.0, 1.0, 0.25]
        self.start = {s: (solver or RTN()).solve(w, spec, {"gram": torch.eye(w.shape[1])}) for s, w in self.weights.items()}

    def run(self, batch, matrices):
        return (self.inputs[batch] @ matrices[A].T).relu() @ matrices[B].T

    def target(self, batch):
        return self.run(batch, self.weights)

    def error(self, found) -> float:
        return _error(self, {s: {**self.start, **found}[s].dequantize() for s in self.weights})


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: s.name)
@pytest.mark.parametrize("name", SPECS)
def test_learning_lowers_the_blocks_error_and_keeps_the_spec(name, solver):
    view = TwoLayers(SPECS[name])
    found = solver.solve_block(view)
    assert view.error(found) < 0.9 * view.error({})
    for site, q in found.items():
        assert q.spec == SPECS[name] and q.misfit() is None
        assert q.codes.dtype == view.start[site].codes.dtype
        assert int(q.codes.min()) >= q.spec.format.lo and int(q.codes.max()) <= q.spec.format.hi
        assert torch.equal(q.scale(), q.scale().half().float())  # as stored


@pytest.mark.parametrize("solver", [SignRound(), AdaRound()], ids=lambda s: s.name)
@pytest.mark.parametrize("name", SPECS)
def test_nothing_learned_is_the_start(name, solver):
    view = TwoLayers(SPECS[name], GPTQ())
    for site, q in view.start.items():
        grid = Grid(view.weights[site], q)
        final = solver.final(grid, solver.learned(grid))
        assert torch.equal(final.codes, q.codes)
        torch.testing.assert_close(final.dequantize(), q.dequantize(), rtol=0, atol=0)


def test_shifted_codes_move_by_one_at_most():
    view = TwoLayers(SPECS["symmetric"], GPTQ())
    found = SignRound(steps=60, lr=0.05).solve_block(view)
    assert max(int((found[s].codes.int() - view.start[s].codes.int()).abs().max()) for s in found) == 1


def test_the_same_seed_gives_the_same_bits():
    first, second = (SOLVERS[0].solve_block(TwoLayers(SPECS["symmetric"])) for _ in range(2))
    assert all(torch.equal(first[s].codes, second[s].codes) for s in (A, B))


def test_a_start_that_cannot_be_bettered_stays():
    view = TwoLayers(SPECS["symmetric"])
    view.weights = {s: q.dequantize() for s, q in view.start.items()}
    assert SignRound().solve_block(view) == {}


def test_what_has_no_even_grid_is_refused_and_left_alone():
    fp4 = QuantSpec(format=FP4_E2M1, granularity=PerGroup(8))
    assert "even grid" in SignRound().refuses(fp4)
    assert SignRound().solve_block(TwoLayers(fp4)) == {}
    with pytest.raises(SpecError, match="at least one step"):
        SignRound(steps=0)


@pytest.fixture(scope="module")
def registry():
    return load_registry()


def recipe(block_solver=None, bits: int = 2, **more) -> Recipe:
    return Recipe(rules=(Rule("*:weight", int_weight(bits, 8)),), solver=GPTQ(), block_solver=block_solver, **more)


@pytest.mark.parametrize(
    ("make", "adapter", "inputs"),
    [
        (lambda: tiny_mlp(), PlainMLP(), [torch.randn(16, 16, generator=torch.Generator().manual_seed(i)) for i in range(2)]),
        (lambda: tiny_cnn(), PlainCNN(), [torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(i)) for i in range(2)]),
        (lambda: tiny_decoder(), TinyDecoderAdapter(), [tokens(seed=i) for i in range(2)]),
    ],
    ids=["mlp", "cnn", "decoder"],
)
def test_whole_models_get_nearer_to_their_float_selves(make, adapter, inputs, registry):
    float_model = make()
    solver = SignRound(steps=60, lr=0.02)
    group = 8 if not isinstance(adapter, PlainCNN) else 9
    spec = int_weight(2, group) if not isinstance(adapter, PlainCNN) else int_weight(2)
    errors, found = [], []
    for own in (None, solver):
        plain = Recipe(rules=(Rule("*:weight", spec),), solver=GPTQ(), block_solver=own)
        done = quantize_model(load_in_memory(make()), plain, inputs, registry=registry, adapter=adapter)
        errors.append(sum(float((adapter.outputs(done.model, x) - adapter.outputs(float_model, x)).detach().square().sum()) for x in inputs))
        found.append(done)
    assert errors[1] < errors[0]
    assert any("+ SignRound" in r.solver for r in found[1].sites)
    assert sum(r.nbytes for r in found[0].sites) == sum(r.nbytes for r in found[1].sites)


def test_a_block_solver_wants_data_and_a_plan_says_what_it_refuses(registry):
    loaded = load_in_memory(tiny_mlp())
    with pytest.raises(CalibrationError, match="calibration"):
        quantize_model(loaded, recipe(SignRound()), registry=registry, adapter=PlainMLP())
    assert make_plan(load_in_memory(tiny_mlp()), recipe(SignRound()), PlainMLP(), registry).needs_data
    codebook = Recipe(rules=(Rule("*:weight", QuantSpec(format=FP4_E2M1, granularity=PerGroup(8))),), solver=RTN(), block_solver=SignRound())
    with pytest.raises(PlanError, match="even grid"):
        make_plan(load_in_memory(tiny_mlp()), codebook, PlainMLP(), registry).require()


def test_a_plan_says_that_biases_are_corrected_for_the_codes_before(registry):
    for correct in (False, True):
        notes = make_plan(load_in_memory(tiny_mlp()), replace(recipe(SignRound()), correct_bias=correct), PlainMLP(), registry).notes
        assert any("changes codes after biases were corrected" in n for n in notes) is correct


def test_recipes_with_block_solvers_survive_their_files(registry):
    own = parse_recipe(dump(recipe(SignRound(steps=7), name="r")), registry, "r")
    assert own.block_solver == SignRound(steps=7)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("stream", [False, True], ids=["in memory", "streamed"])
def test_a_killed_run_goes_on_towards_the_same_float_outputs(stream, registry, tmp_path):
    """What the float model's next block reads is in the journal."""

    def run(folder, die_at=None):
        def progress(phase, done, total):
            if phase == "block" and done == die_at:
                raise Killed

        made = recipe(SignRound(steps=10, lr=0.05), propagate="weights")
        inputs = [tokens(seed=i) for i in range(2)]
        done = quantize_model(
            load_in_memory(tiny_decoder()),
            made,
            inputs,
            registry=registry,
            adapter=TinyDecoderAdapter(),
            progress=progress,
            journal=Journal(folder, {}),
            stream=stream,
        )
        values = done.values
        return dict(done.model.state_dict()) if values is None else {n: values[n] for n in values.names()}

    whole = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "killed", die_at=1)
    again = run(tmp_path / "killed")
    assert whole.keys() == again.keys() and all(torch.equal(whole[k], again[k]) for k in whole)


def test_several_processes_are_told_that_a_block_solver_wants_one(registry):
    class Two(Alone):
        count = 2

    with pytest.raises(CalibrationError, match="start one process"):
        quantize_model(
            load_in_memory(tiny_mlp()), recipe(SignRound()), [torch.randn(4, 16)] * 2, registry=registry, adapter=PlainMLP(), processes=Two()
        )
