"""A rotation is a choice: where rounding loses less with it, and nowhere else."""

import pytest
import torch
from qcore.calibration import Sample
from qcore.errors import CalibrationError
from qcore.model.reader import DictReader
from qcore.model.topology import Site
from qcore.modules.hadamard import HeadHadamard
from qcore.numbers import Int, PerToken, QuantSpec
from qcore.numbers.spec import int_weight
from qcore.testing import check_transform
from qcore.testing.models import TinyDecoderAdapter, tiny_decoder, tokens
from qcore.transforms import HadamardRotate, Rewrite
from qcore.transforms.rotate import online_rotation
from qcore.transforms.rotation_choice import choice_wants, rotation_errors
from torch import nn

INT4 = QuantSpec(format=Int(4), granularity=PerToken(), when="dynamic")


def values(kind: str, *shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if kind == "uniform":
        return torch.rand(shape, generator=generator) * 2 - 1
    normal = torch.randn(shape, generator=generator)
    if kind == "outliers":  # a few channels are always large, as those of language models are
        normal[:, ::64] *= 20
    return normal


def one_linear(kind: str):
    """A linear layer whose weights and inputs are alike, what was seen of it, and its online rotation."""
    from qcore.model.topology import Block, Topology

    model = nn.Sequential(nn.Linear(256, 64, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(values(kind, 64, 256))
    site = Site("0")
    topology = Topology((Block("0", ((site,),)),))
    specs = {site: int_weight(4), site.input: INT4}
    seen = {site.input: {"sample": values(kind, 100, 256, seed=1)}}
    return model, topology, specs, seen, online_rotation(site, model, 0), DictReader(dict(model.state_dict()))


@pytest.mark.parametrize(("kind", "helps"), [("outliers", True), ("uniform", False)])
def test_a_rotation_helps_outliers_and_hurts_values_that_fill_their_range(kind, helps):
    model, topology, specs, seen, rotation, reader = one_linear(kind)
    plain, rotated = rotation_errors(rotation, specs, seen, model, reader, topology)
    assert (rotated < 0.5 * plain) if helps else (rotated > 1.2 * plain)


@pytest.mark.parametrize(("kind", "helps"), [("outliers", True), ("uniform", False)])
def test_chosen_rotations_are_never_worse_and_always_rotating_is(kind, helps):
    model, topology, specs, seen, rotation, reader = one_linear(kind)
    plain, rotated = rotation_errors(rotation, specs, seen, model, reader, topology)
    chosen = HadamardRotate(rest=True, choose=True).fit(topology, specs, seen, model, reader)
    always = HadamardRotate(rest=True).fit(topology, specs, seen, model, reader)
    assert chosen.empty is not helps and not always.empty
    assert (rotated if not chosen.empty else plain) == min(plain, rotated)
    if not helps:
        assert rotated > plain  # what "always" gets
        assert any("is not rotated: the relative error" in note for note in chosen.notes)


def test_choosing_is_exact_whatever_is_chosen():
    check_transform(HadamardRotate(residual=False, choose=True), TinyDecoderAdapter(), tiny_decoder(), [tokens()])


def test_everything_that_will_be_rounded_is_looked_at():
    topology = TinyDecoderAdapter().topology(tiny_decoder())
    tap = topology.activations[2]
    specs = {s: int_weight(4) for s in topology.sites} | {tap: INT4}
    wanted = choice_wants(topology, specs)
    assert set(wanted) == {s.input for s in topology.sites} | {tap}
    assert HadamardRotate(choose=True).wants(topology, specs) and not HadamardRotate().wants(topology, specs)


def test_heads_of_queries_and_keys_are_rotated_alike_and_the_function_stays():
    from dataclasses import replace

    from qcore.numbers import PerGroup
    from qcore.transforms import apply_rewrite

    model, adapter = tiny_decoder().double(), TinyDecoderAdapter()
    topology = adapter.topology(model)
    specs = {s: replace(INT4, granularity=PerGroup(8)) for s in topology.activations if s.tensor == "k"}
    rewrite = HadamardRotate(residual=False, inner=False, heads=True).fit(topology, specs, {}, model, DictReader(dict(model.state_dict())))
    assert {i.place for i in rewrite.inserts.values()} == {"tap:q,k"} and len(rewrite.inserts) == 2
    again = Rewrite.from_state(*rewrite.state())
    with torch.no_grad():
        torch.testing.assert_close(apply_rewrite(model, again)(tokens()), model(tokens()), rtol=0, atol=1e-12)
        alone = apply_rewrite(model, rewrite)
        del alone.model.layers[0].self_attn.taps["q"]
        assert float((alone(tokens()) - model(tokens())).abs().max()) > 1e-3  # one side alone does change it


def test_head_hadamard_rotates_each_head_by_itself():
    tap = HeadHadamard(12, 4)
    x = values("outliers", 3, 24).double()
    y = tap(x)
    torch.testing.assert_close(y.unflatten(-1, (2, 12)).norm(dim=-1), x.unflatten(-1, (2, 12)).norm(dim=-1))
    torch.testing.assert_close(tap(y), x)  # Sylvester's matrix is its own inverse
    assert HeadHadamard.from_config(tap.config()).config() == tap.config()


# the sample that a choice looks at -------------------------------------------------------------------------------------------------------


def test_a_sample_is_evenly_spaced_whatever_the_batches_are():
    rows = torch.arange(1000.0).unsqueeze(1)
    whole, pieces = Sample(rows=50), Sample(rows=50)
    whole.update(rows)
    for part in rows.split(40):
        pieces.update(part)
    for sample in (whole.result(), pieces.result()):
        assert 50 <= len(sample) < 100
        assert 450 < float(sample.mean()) < 550


def test_a_sample_of_nothing_is_an_error():
    with pytest.raises(CalibrationError, match="saw no rows"):
        Sample().result()
