"""Transforms in a row, each fitted on what the one before leaves, block by block: what a recipe does."""

import copy
import json

import pytest
import torch
from qcore.errors import SpecError
from qcore.model.reader import DictReader
from qcore.testing import fit_transform
from qcore.testing.models import TinyDecoderAdapter, tiny_decoder, tiny_gpt, tokens
from qcore.transforms import (
    AWQScale,
    CrossLayerEqualize,
    FoldNorm,
    HadamardRotate,
    Reorder,
    Rewrite,
    RewrittenReader,
    SmoothQuant,
    SplitColumns,
    apply_rewrite,
    rewritten_topology,
)

ADAPTER = TinyDecoderAdapter()
VARIANTS = [{}, {"bias": True, "kv_heads": 1}, {"norm_offset": 1.0, "tied": True}, {"rotary": 0.5, "hidden": 48, "heads": 6, "intermediate": 92}]


def chain(model, transforms):
    rewrite = Rewrite()
    for transform in transforms:
        reader = RewrittenReader(DictReader(model.state_dict()), rewrite, model)
        now = rewritten_topology(ADAPTER.topology(model), rewrite)
        seen_on = apply_rewrite(model, rewrite)
        rewrite = rewrite.then(fit_transform(transform, ADAPTER, seen_on, [tokens()], topology=now, reader=reader))
    return rewrite


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_fold_rotate_smooth_equalize_reorder_and_split_keep_the_function(options):
    model = tiny_decoder(**options).double()
    before = copy.deepcopy(model.state_dict())
    split = SplitColumns(sites=("*.o_proj:weight",), channels=2)
    rewrite = chain(model, [FoldNorm(), HadamardRotate(), SmoothQuant(), CrossLayerEqualize(), Reorder(), AWQScale(grid=4), split])
    torch.testing.assert_close(apply_rewrite(model, rewrite)(tokens()), model(tokens()), rtol=1e-9, atol=1e-9)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    tensors, data = rewrite.state()
    back = Rewrite.from_state(tensors, json.loads(json.dumps(data)))
    assert torch.equal(apply_rewrite(model, back)(tokens()), apply_rewrite(model, rewrite)(tokens()))


def test_a_layer_norm_model_goes_through_the_same_row():
    model = tiny_gpt(tied=True).double()
    rewrite = chain(model, [FoldNorm(), HadamardRotate(), SmoothQuant(), CrossLayerEqualize(), Reorder()])
    torch.testing.assert_close(apply_rewrite(model, rewrite)(tokens()), model(tokens()), rtol=1e-9, atol=1e-9)


def test_the_order_of_fold_and_smooth_does_not_matter_for_the_function():
    model = tiny_decoder(norm_offset=1.0, tied=True).double()
    for row in ([FoldNorm(), SmoothQuant()], [SmoothQuant(), FoldNorm()]):
        torch.testing.assert_close(apply_rewrite(model, chain(model, row))(tokens()), model(tokens()), rtol=1e-9, atol=1e-9)


def test_a_rotation_after_smoothing_is_refused_because_gains_differ_again():

    model = tiny_decoder().double()
    with pytest.raises(SpecError, match="gains differ"):
        chain(model, [FoldNorm(), SmoothQuant(), HadamardRotate()])


def test_links_that_end_behind_an_online_rotation_are_left_alone():
    model = tiny_decoder(intermediate=92).double()
    rewrite = chain(model, [FoldNorm(), HadamardRotate(online=("*.down_proj:weight",))])
    topology = ADAPTER.topology(model)
    after = rewritten_topology(topology, rewrite)
    assert {link.name for link in topology.links} - {link.name for link in after.links} == {
        f"model.layers.{i}.{name}" for i in range(2) for name in ("up→down", "gate,up→down")
    }
    later = fit_transform(
        CrossLayerEqualize(), ADAPTER, model, [], topology=after, reader=RewrittenReader(DictReader(model.state_dict()), rewrite, model)
    )
    torch.testing.assert_close(apply_rewrite(model, rewrite.then(later))(tokens()), model(tokens()), rtol=1e-9, atol=1e-9)


def test_editing_inputs_behind_an_inserted_module_is_refused():
    model = tiny_decoder().double()
    rewrite = chain(model, [FoldNorm(), HadamardRotate(online=("*.down_proj:weight",))])
    careless = fit_transform(CrossLayerEqualize(), ADAPTER, model, [])
    with pytest.raises(SpecError, match=r"inputs of 'model\.layers\.0\.mlp\.down_proj\.weight'.*rewritten_topology"):
        rewrite.then(careless)
