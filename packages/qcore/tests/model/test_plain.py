import pytest
import torch
import torch.nn.functional as F
from qcore.errors import NotFound
from qcore.model.adapter import adapter_for
from qcore.model.plain import PlainCNN, PlainMLP
from qcore.model.topology import Invariance
from qcore.testing import check_adapter
from qcore.testing.models import randomize, tiny_cnn, tiny_decoder, tiny_mlp
from torch import nn

P, S, R = Invariance.PERMUTE, Invariance.SCALE, Invariance.ROTATE
ADAPTERS = {a.name: a for a in (PlainMLP, PlainCNN)}


def rows(n=5, k=16):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(0))


def images():
    return torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def links(net):
    return {link.name: link for link in adapter_for(net, ADAPTERS).topology(net).links}


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.a, self.abn = nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.b = nn.Conv2d(12, 8, 3, padding=1)
        self.head = nn.Linear(8 * 9, 5)

    def forward(self, x):
        x = F.relu(self.bn(self.stem(x)))
        x = x + self.b(F.gelu(self.abn(self.a(x))))
        return self.head(torch.flatten(F.max_pool2d(F.relu(x), 4), 1))


class Branching(nn.Module):
    """Its forward depends on its data: it cannot be traced."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = self.a(x)
        return self.b(x * 2 if x.sum() > 0 else x)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.b(self.a(self.a(x).relu()).relu())


class Concatenated(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 8), nn.Linear(16, 8), nn.Linear(16, 4)

    def forward(self, x):
        return self.c(torch.cat([self.a(x), self.b(x)], -1))


@pytest.mark.parametrize(("act", "allows"), [(nn.ReLU, P | S), (nn.GELU, P), (nn.SiLU, P), (nn.LeakyReLU, P | S), (nn.Identity, P | S | R)])
def test_what_stands_between_two_layers_decides(act, allows):
    net = tiny_mlp(act)
    assert {name: link.invariance for name, link in links(net).items()} == {"0→2": allows, "2→4": allows}
    check_adapter(PlainMLP(), net, rows())


@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_a_cnn_with_depthwise_and_grouped_convolutions_is_true(act, batch_norm):
    check_adapter(PlainCNN(), tiny_cnn(act, batch_norm=batch_norm), images())


def test_permutations_pass_depthwise_convolutions_and_stay_inside_groups():
    found = links(tiny_cnn(batch_norm=False))
    assert found["0.0+1.0→2.0"].invariance == P and found["0.0+1.0→2.0"].heads == 1
    assert found["2.0→3.0"].invariance == P | S and found["2.0→3.0"].heads == 4


def test_a_batch_norm_moves_with_a_permutation_and_writes_the_scale():
    found = links(tiny_cnn())
    assert [str(p) for p in found["2.1→3.0"].writes] == ["2.1.weight.out", "2.1.bias.out"] and found["2.1→3.0"].invariance == S
    assert "2.1.running_var" in {p.param for p in found["2.0+2.1→3.0"].writes}


def test_a_flattened_image_is_scaled_channel_by_channel():
    net = randomize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(200, 6))).eval()
    link = links(net)["0→4"]
    assert (link.invariance, link.heads, link.reads[0].repeat) == (S, 8, 25)
    check_adapter(PlainCNN(), net, images())


def test_pooling_to_one_value_keeps_permutations_through_flatten():
    net = randomize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6))).eval()
    assert links(net)["0→3"].invariance == P | S | R
    check_adapter(PlainCNN(), net, images())


def test_an_addition_makes_one_link_of_many_writers():
    net = randomize(Residual()).eval()
    found = links(net)
    assert {p.param for p in found["bn+b→a+head"].writes} == {"bn.weight", "bn.bias", "b.weight", "b.bias"}
    check_adapter(PlainCNN(), net, images())


def test_norms_of_linear_stacks():
    net = nn.Sequential(
        *(nn.Linear(16, 24), nn.LayerNorm(24), nn.GELU(), nn.Linear(24, 12), nn.BatchNorm1d(12), nn.ReLU()),
        *(nn.Linear(12, 12), nn.RMSNorm(12), nn.Linear(12, 3)),
    )
    found = links(randomize(net).eval())
    assert found["0+1→3"].invariance == P and found["4→6"].invariance == S and found["7→8"].invariance == S
    check_adapter(PlainMLP(), net, rows())


@pytest.mark.parametrize(
    ("net", "reason"),
    [(Branching(), "cannot trace Branching"), (Recurrent(), "a is used 2 times"), (Concatenated(), "passes cat")],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else None,
)
def test_what_is_no_chain_has_sites_and_reasons(net, reason):
    net = randomize(net).eval()
    topology = PlainMLP().topology(net)
    assert topology.sites and not topology.links
    assert any(reason in why for why in topology.blocked.values())
    check_adapter(PlainMLP(), net, rows())


def test_stages_follow_the_order_of_execution():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = nn.Linear(8, 4), nn.Linear(16, 8)

        def forward(self, x):
            return self.last(self.first(x).relu())

    (block,) = PlainMLP().topology(Backwards()).blocks
    assert [str(s) for stage in block.stages for s in stage] == ["first:weight", "last:weight"]


def test_what_is_not_plain_is_left_to_others():
    assert adapter_for(tiny_mlp(), ADAPTERS).name == "plain-mlp"
    assert adapter_for(tiny_cnn(), ADAPTERS).name == "plain-cnn"
    for net in (tiny_decoder(), nn.Sequential(nn.MultiheadAttention(8, 2)), nn.Sequential(nn.GRU(4, 4)), nn.Sequential(nn.ReLU()), nn.Linear(2, 2)):
        with pytest.raises(NotFound):
            adapter_for(net, ADAPTERS)
