"""The ledger: counts are counts, too few rows are an error or are mended as the recipe says, and no weight becomes zero."""

import pytest
import torch
from qcore.calibration import Gram, Ledger, RowCount, Rows
from qcore.calibration.coverage import filled_up, share_inputs
from qcore.errors import CalibrationError, SpecError
from qcore.model.topology import Invariance, Link, Port, Site, Topology
from qcore.numbers import int_weight
from qcore.recipe import CalibrationSettings, Recipe, Rule
from qcore.solvers import GPTQ, RTN
from qcore.solvers.rtn import nearest_like


def stack(*counts: int, module: str = "layers.0.experts", tensor: str = "up") -> dict[Site, RowCount]:
    return {Site(module, tensor, part=i): RowCount(n, float(n)) for i, n in enumerate(counts)}


def grams(*counts: int) -> dict[Site, dict]:
    """What experts with so many random rows saw; none: no Gram."""
    seen = {}
    for i, n in enumerate(counts):
        g = Gram(dtype="float64")
        if n:
            g.update(torch.randn(n, 4, generator=torch.Generator().manual_seed(i), dtype=torch.float64))
        seen[Site("layers.0.experts", "up", part=i)] = {"rows": RowCount(n, float(n))} | ({"gram": g.result()} if n else {})
    return seen


def test_rows_add_up_whatever_the_batches_and_none_is_an_answer():
    x, w = torch.randn(12, 3), torch.rand(12)
    whole, pieces = Rows(), Rows()
    whole.update(x, w)
    for a, b in ((0, 5), (5, 5), (5, 12)):
        pieces.update(x[a:b], w[a:b])
    assert whole.result().rows == pieces.result().rows == 12
    assert pieces.result().weight == pytest.approx(whole.result().weight, rel=1e-12)
    again = Rows()
    again.load(pieces.state())
    assert again.result() == pieces.result()
    assert Rows().result() == RowCount(0, 0.0)
    padded = Rows()
    padded.update(x, torch.tensor([0.0] * 4 + [1.0] * 8))
    assert padded.result() == RowCount(8, 8.0)


def test_an_expert_without_rows_is_named_and_so_is_the_way_out():
    ledger = Ledger(counts=stack(5, 0, 7) | stack(0, 1, 0, module="layers.3.experts"))
    with pytest.raises(CalibrationError) as e:
        ledger.require()
    text = str(e.value)
    assert "3 experts saw no row" in text
    assert "layers.0.experts: 1" in text and "layers.3.experts: 0, 2" in text
    assert "--set calibration.below=layer" in text and "ebss" in text


def test_a_minimum_counts_the_rows_that_are_missing():
    ledger = Ledger(minimum=6, counts=stack(5, 6, 700))
    assert ledger.short() == [Site("layers.0.experts", "up", part=0)]
    with pytest.raises(CalibrationError, match=r"fewer than 6 rows.*\n.*experts: 0 \(5 rows\)"):
        ledger.require()
    Ledger(minimum=6, below="layer", counts=stack(5)).require()


def test_the_layers_average_fills_up_what_is_missing():
    counts = (40, 0, 10, 200)
    seen, rows = grams(*counts), stack(*counts)
    sites = list(seen)
    everything = Gram(dtype="float64")
    for i, n in enumerate(counts):
        if n:
            everything.update(torch.randn(n, 4, generator=torch.Generator().manual_seed(i), dtype=torch.float64))
    # the average is the Gram of all that was routed to the layer
    torch.testing.assert_close(filled_up(seen, rows, sites[1], 30), everything.result(), rtol=1e-6, atol=1e-6)
    third = filled_up(seen, rows, sites[2], 30)
    torch.testing.assert_close(third, (10 * seen[sites[2]]["gram"] + 20 * everything.result()) / 30, rtol=1e-6, atol=1e-6)
    # monotone: with more rows of its own it is nearer to its own
    assert filled_up(grams(0, 0), stack(0, 0), sites[0], 5) is None


def test_parts_share_inputs_where_a_link_reads_the_stack_as_a_whole():
    up, down = Site("e", "up", part=1), Site("e", "down", part=1)
    norm = Link("norm→up", 4, (Port("n.weight", "out"),), (Port("e.up", "in"),), Invariance.SCALE)
    inner = Link("up→down", 4, (Port("e.up", "out", part=1),), (Port("e.down", "in", part=1),), Invariance.SCALE)
    topology = Topology((), (norm, inner))
    assert share_inputs(topology, up) and not share_inputs(topology, down)


def test_the_ledger_is_plain_data_and_comes_back_from_the_journal():
    ledger = Ledger(minimum=2, below="layer", counts=stack(5, 0), instead={Site("layers.0.experts", "up", part=1): "rounded to nearest"})
    assert ledger.to_dict()["stacks"] == {"layers.0.experts": {"up": {"rows": [5, 0], "weight": [5.0, 0.0], "instead": {"1": "rounded to nearest"}}}}
    again = Ledger(minimum=2, below="layer")
    again.restore(ledger.records(ledger.counts))
    assert again == ledger


def test_rounding_to_nearest_keeps_the_options_of_the_search():
    found = nearest_like(GPTQ(clip="none", steps=5))
    assert found == RTN(clip="none", steps=5)
    weight = torch.randn(8, 16)
    spec = int_weight(4, 8)
    assert torch.equal(found.solve(weight, spec, {}).dequantize(), RTN(clip="none", steps=5).solve(weight, spec, {}).dequantize())


@pytest.mark.parametrize(("name", "value"), [("affinity", -1.0), ("affinity", float("nan")), ("below", "zero"), ("minimum", 0)])
def test_settings_that_mean_nothing_are_refused(name, value):
    with pytest.raises(SpecError, match=f"calibration.{name}"):
        CalibrationSettings(**{name: value})


def test_parts_have_the_names_that_they_had_unfused_and_roles_are_no_weights():
    spec = int_weight(4, 8)
    expert, router = Site("layers.0.experts", "down_proj", part=3), Site("layers.0.gate", role="router")
    assert expert.names == ("layers.0.experts:down_proj[3]", "layers.0.experts.3.down_proj:weight")
    assert expert.input.names == ("layers.0.experts:down_proj.input[3]", "layers.0.experts.3.down_proj:input")
    assert str(router) == "layers.0.gate:router" and str(router.input) == "layers.0.gate:router.input"
    assert router == Site("layers.0.gate")  # a role is no identity
    recipe = Recipe(rules=(Rule("*:weight", spec),), solver=RTN())
    assert recipe.specs_for([expert, router]) == {expert: spec}
    assert recipe.unmatched([expert]) == [] and recipe.unmatched([router]) == list(recipe.rules)
