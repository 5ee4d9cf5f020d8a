import pytest
import torch
from qcore.errors import SpecError
from qcore.modules.leaves import build_leaf, leaf_config
from qcore.modules.sum import Sum
from qcore.testing import check_module
from torch import nn

LEAVES = [
    nn.Linear(4, 6),
    nn.Linear(4, 6, bias=False),
    nn.Conv1d(4, 6, 3, padding="same"),
    nn.Conv2d(4, 6, (3, 1), stride=2, groups=2, padding_mode="reflect", padding=(1, 0)),
    nn.Conv3d(4, 6, 2, dilation=2),
    nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 6)),
]


@pytest.mark.parametrize("leaf", LEAVES, ids=str)
def test_a_leaf_is_rebuilt_from_its_config(leaf):
    import json

    twin = build_leaf(json.loads(json.dumps(leaf_config(leaf))))
    assert str(twin) == str(leaf)
    twin.load_state_dict(leaf.state_dict())


def test_other_modules_are_no_leaves():
    with pytest.raises(SpecError, match="GRU"):
        leaf_config(nn.GRU(2, 2))
    with pytest.raises(SpecError, match="no field 'colour'"):
        build_leaf({"type": "linear", "in_features": 1, "out_features": 1, "bias": True, "colour": 3})


def test_a_sum_adds_its_leaves():
    coarse, fine = nn.Linear(4, 3), nn.Linear(2, 3, bias=False)
    module = Sum(coarse, fine, torch.tensor([3, 0]))
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(module(x), coarse(x) + fine(x[:, [3, 0]]))
    check_module(module, x)


def test_a_sum_of_convolutions_selects_channels():
    module = Sum(nn.Conv2d(4, 3, 3, padding=1), nn.Conv2d(1, 3, 3, padding=1, bias=False), torch.tensor([2]), channel_axis=1)
    check_module(module, torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0)))
    check_module(Sum(nn.Conv2d(4, 3, 3, padding=1), nn.Conv2d(4, 3, 1), channel_axis=1), torch.ones(1, 4, 5, 5))


def test_the_config_outlives_the_replacement_of_a_child():
    module = Sum(nn.Linear(4, 3), nn.Linear(4, 3))
    config = module.config()
    module.set_submodule("coarse", nn.Identity())
    assert module.config() == config
