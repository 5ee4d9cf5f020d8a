import pytest
import torch
from qcore.errors import SpecError
from qcore.model.plain import PlainCNN, PlainMLP
from qcore.model.topology import Port
from qcore.modules.leaves import leaf_config
from qcore.testing import check_transform, fit_transform
from qcore.testing.models import TinyDecoderAdapter, randomize, tiny_cnn, tiny_decoder, tiny_mlp, tokens
from qcore.transforms import FoldNorm, HadamardRotate, SplitColumns, apply_rewrite, split_columns, split_given, split_leaf
from qcore.transforms.rewrite import Put, Shift
from qcore.transforms.split import Part
from torch import nn

LEAVES = {
    "linear": (nn.Linear(12, 6), (5, 12)),
    "no bias": (nn.Linear(12, 6, bias=False), (2, 3, 12)),
    "conv1d": (nn.Conv1d(12, 6, 3, padding=1), (2, 12, 9)),
    "conv2d": (nn.Conv2d(12, 6, 3, stride=2, padding=1), (2, 12, 9, 9)),
}


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kind", LEAVES)
def test_columns_apart_are_exact(kind):
    leaf, shape = LEAVES[kind]
    net = randomize(nn.Sequential(leaf)).double().eval()
    rewrite = split_columns("0", net[0], torch.tensor([1, 7]))
    twin = apply_rewrite(net, rewrite)
    x = rand(*shape)
    torch.testing.assert_close(twin(x), net(x), rtol=1e-12, atol=1e-12)
    assert twin[0].fine.weight.shape[1] == 2
    assert twin[0].coarse.weight[:, [1, 7]].abs().max() == 0
    assert twin[0].fine.bias is None


@pytest.mark.parametrize("kind", LEAVES)
def test_a_given_coarse_part_leaves_the_rest_to_the_fine_one(kind):
    leaf, shape = LEAVES[kind]
    net = randomize(nn.Sequential(leaf)).double().eval()
    coarse = (net[0].weight.detach() * 4).round() / 4
    twin = apply_rewrite(net, split_given("0", net[0], coarse))
    x = rand(*shape)
    torch.testing.assert_close(twin(x), net(x), rtol=1e-12, atol=1e-12)
    assert torch.equal(twin[0].coarse.weight, coarse)
    assert twin[0].fine.weight.abs().max() <= 0.125 + 1e-12


def test_a_pointwise_centre_beside_a_three_by_three_kernel_is_exact():
    """The shape of CFWS: the coarse part is the centre alone, as a 1 × 1 convolution."""
    net = randomize(nn.Sequential(nn.Conv2d(6, 6, 3, padding=1))).double().eval()
    w = net[0].weight.detach()
    centre = (w[:, :, 1:2, 1:2] * 8).round() / 8
    kernel = torch.zeros_like(w)
    kernel[:, :, 1:2, 1:2] = centre
    leaf = leaf_config(net[0])
    own = Port("", "out")
    rewrite = split_leaf(
        "0",
        net[0],
        Part({**leaf, "kernel_size": [1, 1], "padding": [0, 0]}, {"weight": (Put(own, centre),)}, bias=True),
        Part({**leaf, "bias": False}, {"weight": (Shift(own, -kernel),)}),
    )
    x = rand(2, 6, 8, 8)
    torch.testing.assert_close(apply_rewrite(net, rewrite)(x), net(x), rtol=1e-12, atol=1e-12)


def test_a_low_rank_correction_is_exact():
    net = randomize(nn.Sequential(nn.Linear(12, 10))).double().eval()
    u, s, v = torch.linalg.svd(net[0].weight.detach(), full_matrices=False)
    up, down = u[:, :3] * s[:3], v[:3]
    own = Port("", "out")
    low_rank = leaf_config(nn.Sequential(nn.Linear(12, 3, bias=False), nn.Linear(3, 10, bias=False)))
    rewrite = split_leaf(
        "0",
        net[0],
        Part(leaf_config(net[0]), {"weight": (Shift(own, -up @ down),)}, bias=True),
        Part(low_rank, {"0.weight": (Put(own, down),), "1.weight": (Put(own, up),)}),
    )
    x = rand(5, 12)
    torch.testing.assert_close(apply_rewrite(net, rewrite)(x), net(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("by", ["input", "weight"])
def test_splitting_keeps_networks(by):
    x = rand(2, 3, 12, 12).float()
    split = SplitColumns(sites=("2.0:weight", "6:weight"), channels=2, by=by)
    assert len(check_transform(split, PlainCNN(), tiny_cnn(), [x]).inserts) == 2
    split = SplitColumns(sites=("*.down_proj:weight",), channels=3, by=by)
    assert len(check_transform(split, TinyDecoderAdapter(), tiny_decoder(bias=True), [tokens()]).inserts) == 2


def test_the_hardest_columns_go():
    net = tiny_mlp()
    x = rand(64, 16).float()
    with torch.no_grad():
        net[0].bias[5] += 100
        net[0].bias[11] += 100
    rewrite = fit_transform(SplitColumns(sites=("2:weight",), channels=2), PlainMLP(), net, [x])
    assert rewrite.inserts["2"].module.tensors["fine_channels"].tolist() == [5, 11]


def test_a_split_after_a_rotation_is_exact():
    adapter, model = TinyDecoderAdapter(), tiny_decoder(bias=True).double()
    fold = fit_transform(FoldNorm(), adapter, model, [])
    both = fold.then(fit_transform(HadamardRotate(), adapter, apply_rewrite(model, fold), []))
    path = "model.layers.1.mlp.down_proj"
    twin = apply_rewrite(model, both.then(split_columns(path, model.get_submodule(path), torch.tensor([0, 9]))))
    torch.testing.assert_close(twin(tokens()), model(tokens()), rtol=1e-10, atol=1e-10)


def test_grouped_convolutions_are_refused():
    with pytest.raises(SpecError, match="grouped"):
        split_columns("0", nn.Conv2d(8, 8, 3, groups=4), torch.tensor([0]))


def test_all_columns_cannot_go():
    with pytest.raises(SpecError, match="4 of 4"):
        split_columns("0", nn.Linear(4, 4), torch.arange(4))
