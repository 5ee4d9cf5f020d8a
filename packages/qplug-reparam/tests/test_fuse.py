"""Fusing branches: the same function in float64, for every kind of block, and what is refused."""

import copy

import pytest
import torch
from qcore.errors import SpecError
from qcore.model.reader import DictReader
from qplug_reparam.branches import find_branches
from qplug_reparam.fuse import FusedReader, fold, fuse, fuse_structure, require_fused
from timm.models.byobnet import MobileOneBlock, RepVggBlock
from timm.models.repvit import RepVggDw, RepViTBlock
from torch import nn


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """In float64 and eval mode, with batch norms that do something."""
    g = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.3, generator=g)
            m.running_var.uniform_(0.2, 2, generator=g)
            m.weight.data.normal_(1, 0.3, generator=g)
            m.bias.data.normal_(0, 0.3, generator=g)
    return model


class Official(nn.Module):
    """The block of DingXiaoH/RepVGG, which timm does not have."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.rbr_identity = nn.BatchNorm2d(channels)
        self.rbr_dense = self.pair(channels, 3, groups)
        self.rbr_1x1 = self.pair(channels, 1, groups)
        self.nonlinearity = nn.ReLU()

    @staticmethod
    def pair(channels: int, kernel: int, groups: int) -> nn.Sequential:
        pair = nn.Sequential()
        pair.add_module("conv", nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=groups, bias=False))
        pair.add_module("bn", nn.BatchNorm2d(channels))
        return pair

    def forward(self, x):
        return self.nonlinearity(self.rbr_dense(x) + self.rbr_1x1(x) + self.rbr_identity(x))


class Several(nn.Module):
    """5×5, dilated 3×3, two 1×1 and x twice, over a strided grouped convolution; an asymmetric kernel beside; a residual around it all."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Conv2d(4, 6, k, stride=2, padding=k // 2, groups=2, bias=k == 3) for k in (5, 3, 1, 1))
        self.wide = nn.Conv2d(6, 6, (1, 3), padding=(0, 2), dilation=(1, 2))
        self.point = nn.Conv2d(6, 6, 1)
        self.norm = nn.BatchNorm2d(6)
        self.act = nn.SiLU()

    def forward(self, x):
        y = self.act(sum(conv(x) for conv in self.down))
        return y * self.norm(self.wide(y) + self.point(y) + y)


BLOCKS = {
    "repvgg": lambda: RepVggBlock(4, 4),
    "repvgg-stride": lambda: RepVggBlock(3, 8, stride=2),
    "repvgg-grouped": lambda: RepVggBlock(8, 8, group_size=4),
    "repvgg-depthwise": lambda: RepVggBlock(6, 6, group_size=1),
    "mobileone": lambda: MobileOneBlock(6, 6, num_conv_branches=3),
    "mobileone-depthwise": lambda: MobileOneBlock(6, 6, group_size=1, num_conv_branches=4),
    "mobileone-1x1": lambda: MobileOneBlock(6, 6, kernel_size=1, num_conv_branches=2),
    "repvit": lambda: RepVggDw(6, 3),
    "repvit-legacy": lambda: RepVggDw(6, 3, legacy=True),
    "repvit-5x5": lambda: RepVggDw(6, 5, legacy=True),
    "official": lambda: Official(4, 1),
    "official-grouped": lambda: Official(8, 2),
    "several": Several,
}


@pytest.mark.parametrize("name", BLOCKS)
def test_fused_block_is_the_same_function_in_float64(name):
    torch.manual_seed(0)
    block = randomized(BLOCKS[name]())
    fused = fuse(block)
    channels = next(m for m in block.modules() if isinstance(m, nn.Conv2d))
    x = torch.randn(2, channels.in_channels, 9, 8, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), block(x), rtol=1e-12, atol=1e-12)  # sums in another order
    assert not find_branches(fused)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    assert sum(isinstance(m, nn.Conv2d) for m in fused.modules()) < sum(isinstance(m, nn.Conv2d) for m in block.modules())


def test_fusing_leaves_the_model_itself_alone():
    block = randomized(RepVggBlock(4, 4))
    before = copy.deepcopy(block.state_dict())
    fuse(block)
    assert list(before) == list(block.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), block.state_dict().values(), strict=True))


def test_fusing_twice_changes_nothing():
    fused = fuse(randomized(RepVggBlock(4, 4)))
    again = fuse(fused)
    assert all(torch.equal(a, b) for a, b in zip(fused.state_dict().values(), again.state_dict().values(), strict=True))


def test_structure_is_fused_on_meta_and_the_reader_gives_the_same_values():
    block = randomized(nn.Sequential(RepVggBlock(4, 4), RepViTBlock(4, 2, 3, use_se=True, act_layer=nn.GELU)))
    reader = DictReader(block.state_dict())
    skeleton, done = fuse_structure(copy.deepcopy(block).to("meta"))
    values = FusedReader(reader, done)
    fused = fuse(block).state_dict()
    assert set(values.names()) == set(fused) == set(skeleton.state_dict())
    assert all(torch.equal(values[name], t) for name, t in fused.items())
    assert "0.conv_kxk.conv.weight" not in values


def test_branches_add_up_and_have_names():
    block = randomized(nn.Sequential(MobileOneBlock(6, 6, num_conv_branches=2)))
    (found,) = find_branches(block)
    folded = fold(found, DictReader(block.state_dict()))
    assert list(folded.kernels) == ["conv_scale", "conv_kxk.0", "conv_kxk.1", "identity"]
    torch.testing.assert_close(folded.kernel, fuse(block).state_dict()["0.reparam_conv.weight"], rtol=0, atol=0)


# wrong variants: each differs from the fused block by far more than rounding


def test_identity_branch_of_a_grouped_convolution_is_indexed_inside_its_group():
    block = randomized(nn.Sequential(Official(8, 2)))
    (found,) = find_branches(block)
    kernel = fold(found, DictReader(block.state_dict())).kernels["rbr_identity"]
    at = kernel.nonzero()
    assert at[:, 0].tolist() == list(range(8))
    assert at[:, 1].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]  # i mod (C_in / groups); i itself is out of range
    assert (at[:, 2:] == 1).all()


@pytest.mark.parametrize("variant", ["norm without eps", "norm by the variance", "1×1 in the corner", "bias without the mean"])
def test_wrong_fusions_are_told_apart(variant):
    block = randomized(RepVggBlock(4, 4))
    x = torch.randn(1, 4, 6, 6, dtype=torch.float64)
    fused = fuse(block)
    kernel, bias = fused.reparam_conv.weight.data, fused.reparam_conv.bias.data
    bn = block.conv_1x1.bn
    gain = bn.weight / (bn.running_var + bn.eps).sqrt()
    point = block.conv_1x1.conv.weight[:, :, 0, 0] * gain[:, None]
    if variant == "norm without eps":
        kernel[:, :, 1, 1] += point * (((bn.running_var + bn.eps) / bn.running_var).sqrt() - 1)[:, None]
    elif variant == "norm by the variance":
        kernel[:, :, 1, 1] += block.conv_1x1.conv.weight[:, :, 0, 0] * (bn.weight / (bn.running_var + bn.eps))[:, None] - point
    elif variant == "1×1 in the corner":
        kernel[:, :, 1, 1] -= point
        kernel[:, :, 0, 0] += point
    else:
        bias += bn.running_mean * gain
    with torch.no_grad():
        assert (fused(x) - block(x)).abs().max() > 1e-7


# what is refused


def test_training_mode_is_refused_by_name():
    model = randomized(nn.Sequential(RepVggBlock(4, 4)))
    model[0].conv_1x1.bn.train()
    with pytest.raises(SpecError, match=r"0\.conv_1x1\.bn is in training mode"):
        fuse(model)


def test_branches_in_a_model_that_is_called_deployed_are_named():
    with pytest.raises(SpecError, match=r"2 blocks have branches .* 0 first \(conv_1x1, conv_kxk, x itself\)"):
        require_fused(nn.Sequential(RepVggBlock(4, 4), RepVggBlock(4, 4)).eval())
    require_fused(fuse(randomized(RepVggBlock(4, 4))))


def test_a_variance_of_zero_is_exact_and_told():
    block = randomized(nn.Sequential(RepVggBlock(4, 4)))
    block[0].identity.running_var[2] = 0
    x = torch.randn(1, 4, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(fuse(block)(x), block(x), rtol=1e-12, atol=1e-10)
    (found,) = find_branches(block)
    assert fold(found, DictReader(block.state_dict())).silent == {"0.identity": (2,)}


def test_a_division_by_zero_is_refused_with_the_channel():
    block = randomized(nn.Sequential(RepVggBlock(4, 4)))
    block[0].identity.running_var[2], block[0].identity.eps = 0, 0.0
    with pytest.raises(SpecError, match=r"0\.identity: the running variance of channel 2 is 0 and eps is 0"):
        fuse(block)


def test_what_is_no_sum_of_branches_stays_as_it_is():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

        def forward(self, x):
            return x + self.bn(self.two(torch.relu(self.one(x))))

    class Uneven(nn.Module):
        """Outputs of two sizes are never added, and taps of two grids are no kernel."""

        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(4, 4, 3, padding=2, dilation=2), nn.Conv2d(4, 4, 5, padding=2)

        def forward(self, x):
            return self.one(x) + self.two(x)

    model = nn.Sequential(Residual(), Uneven()).eval()
    assert find_branches(model) == ()
    assert fuse_structure(model) == (model, ())
