import pytest
import torch
from qcore.errors import SpecError
from qcore.model.reader import DictReader
from qcore.model.topology import Site
from qcore.testing import check_transform, fit_transform
from qcore.testing.models import TinyDecoderAdapter, tiny_decoder, tiny_gpt, tokens
from qcore.transforms import FoldNorm, HadamardRotate, apply_rewrite
from qcore.transforms.rotate import largest_block, online_rotation
from torch import nn

ADAPTER = TinyDecoderAdapter()


def folded(model):
    topology = ADAPTER.topology(model)
    return FoldNorm().fit(topology, {}, {}, model, DictReader(model.state_dict()))


VARIANTS = [{}, {"bias": True}, {"norm_offset": 1.0, "tied": True}, {"kv_heads": 1, "rotary": 0.5}, {"hidden": 48, "heads": 6, "kv_heads": 2}]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_rotating_residual_and_values_keeps_a_decoder(options):
    model = tiny_decoder(**options)
    fold = folded(model.double())
    rewrite = check_transform(HadamardRotate(), ADAPTER, model, [tokens()], after=fold)
    assert "model.embed_tokens.weight" in rewrite.edits and "model.layers.0.self_attn.v_proj.weight" in rewrite.edits


@pytest.mark.parametrize("intermediate", [48, 92])  # 92 has no Hadamard matrix here: padded to 96
def test_an_online_rotation_keeps_a_decoder(intermediate):
    model = tiny_decoder(intermediate=intermediate, bias=True).double()
    rotate = HadamardRotate(online=("*.down_proj:weight",))
    rewrite = check_transform(rotate, ADAPTER, model, [tokens()], after=folded(model))
    twin = apply_rewrite(model, rewrite)
    padded = {48: 48, 92: 96}[intermediate]
    assert twin.model.layers[0].mlp.down_proj.leaf.weight.shape == (32, padded)


def test_without_the_online_half_the_function_is_lost():
    model = tiny_decoder().double()
    rewrite = online_rotation(Site("model.layers.0.mlp.down_proj"), model, 0)
    rewrite.inserts.clear()
    assert not torch.allclose(apply_rewrite(model, rewrite)(tokens()), model(tokens()), rtol=1e-3)


def test_a_rotation_spreads_an_outlier_channel():
    model = tiny_decoder().double()
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 3] *= 50
    fold = folded(model)
    both = fold.then(fit_transform(HadamardRotate(), ADAPTER, apply_rewrite(model, fold), [tokens()]))

    def peak(m):
        e = m.model.embed_tokens.weight.detach()
        return float((e.abs().amax(1) / e.pow(2).mean(1).sqrt()).mean())

    assert peak(model) > 5 and peak(apply_rewrite(model, both)) < 2.5


def test_unfolded_gains_are_refused_by_name():
    with pytest.raises(SpecError, match=r"residual.*gains differ.*FoldNorm"):
        fit_transform(HadamardRotate(), ADAPTER, tiny_decoder(), [tokens()])


def test_a_layer_norm_model_rotates_only_its_values():
    rewrite = fit_transform(HadamardRotate(), ADAPTER, tiny_gpt(), [tokens()])
    assert "model.embed_tokens.weight" not in rewrite.edits and "not rotated" in rewrite.notes[0]


def test_nothing_to_rotate_is_an_error():
    with pytest.raises(SpecError, match="nothing to rotate"):
        fit_transform(HadamardRotate(inner=False), ADAPTER, tiny_gpt(), [tokens()])


def test_odd_sizes_are_rotated_in_blocks_or_refused():
    model = tiny_decoder(hidden=156, heads=3, kv_heads=1).double()  # 156 has no matrix here, its third has
    assert largest_block(156) == 52
    fold = folded(model)
    rewrite = check_transform(HadamardRotate(inner=False), ADAPTER, model, [tokens()], after=fold)
    assert "blocks of 52" in rewrite.notes[-1]
    with pytest.raises(SpecError, match=r"size 156.*blocks of 52"):
        fit_transform(HadamardRotate(odd_sizes="refuse", inner=False), ADAPTER, apply_rewrite(model, fold), [tokens()])


def test_the_seed_decides_the_signs():
    model = tiny_decoder()
    twin = apply_rewrite(model, folded(model))
    one, same, other = (
        fit_transform(HadamardRotate(seed=s), ADAPTER, twin, [tokens()]).edits["model.embed_tokens.weight"][0].signs for s in (0, 0, 1)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_online_patterns_must_match():
    model = tiny_decoder()
    with pytest.raises(SpecError, match=r"downproj.*matches no weight site"):
        fit_transform(HadamardRotate(online=("*.downproj:weight",)), ADAPTER, apply_rewrite(model, folded(model)), [tokens()])


def test_only_linear_inputs_are_rotated_online():
    with pytest.raises(SpecError, match="Conv2d"):
        online_rotation(Site("0"), nn.Sequential(nn.Conv2d(4, 4, 3)), 0)
