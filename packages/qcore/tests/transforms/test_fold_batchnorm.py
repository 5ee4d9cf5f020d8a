import pytest
import torch
from qcore.errors import SpecError
from qcore.model.plain import PlainCNN, PlainMLP
from qcore.model.reader import DictReader
from qcore.model.topology import Invariance
from qcore.modules.leaves import FloatConv2d, Nothing
from qcore.testing import check_transform
from qcore.testing.models import randomize, tiny_cnn
from qcore.transforms import CrossLayerEqualize, FoldBatchNorm, Rewrite, apply_rewrite, rewritten_topology
from qcore.transforms.fold_batchnorm import batchnorm_pairs
from qcore.transforms.rewrite import RewrittenReader
from torch import nn

IMAGE = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
LAYERS = {
    "conv1d": (lambda bias: nn.Conv1d(6, 8, 3, bias=bias), nn.BatchNorm1d, (2, 6, 9)),
    "conv2d": (lambda bias: nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=bias), nn.BatchNorm2d, (2, 6, 7, 7)),
    "conv3d": (lambda bias: nn.Conv3d(6, 8, 3, bias=bias), nn.BatchNorm3d, (2, 6, 5, 5, 5)),
    "grouped": (lambda bias: nn.Conv2d(6, 8, 3, groups=2, bias=bias), nn.BatchNorm2d, (2, 6, 7, 7)),
    "depthwise": (lambda bias: nn.Conv2d(8, 8, 3, groups=8, bias=bias), nn.BatchNorm2d, (2, 8, 7, 7)),
    "transposed": (lambda bias: nn.ConvTranspose2d(6, 8, 3, stride=2, bias=bias), nn.BatchNorm2d, (2, 6, 5, 5)),
    "transposed and grouped": (
        lambda bias: nn.ConvTranspose2d(6, 8, 3, stride=2, groups=2, output_padding=1, bias=bias),
        nn.BatchNorm2d,
        (2, 6, 5, 5),
    ),
    "linear": (lambda bias: nn.Linear(6, 8, bias=bias), nn.BatchNorm1d, (5, 6)),
}


def fold(net, **options):
    return FoldBatchNorm(**options).fit(None, {}, {}, net, DictReader(net.state_dict()))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_fold_is_exact_in_float64(kind, bias, affine):
    make, norm, shape = LAYERS[kind]
    net = randomize(nn.Sequential(make(bias), norm(8, affine=affine), nn.ReLU())).double().eval()
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rewrite = fold(net)
    twin = apply_rewrite(net, rewrite)
    assert not rewrite.notes and isinstance(twin[1], Nothing) and type(twin[0]).forward is type(net[0]).forward
    torch.testing.assert_close(twin(x), net(x), rtol=1e-12, atol=1e-13)
    assert set(twin.state_dict()) == {"0.weight", "0.bias"}
    tensors, data = rewrite.state()
    again = apply_rewrite(net, Rewrite.from_state(tensors, data))
    assert torch.equal(again(x), twin(x))


def test_every_batch_norm_of_a_network_is_folded_and_the_fold_keeps_the_transform_contract():
    rewrite = check_transform(FoldBatchNorm(), PlainCNN(), tiny_cnn(), [IMAGE])
    assert not rewrite.notes and len([i for i in rewrite.inserts.values() if i.module.type == "nothing"]) == 4
    folded = apply_rewrite(tiny_cnn(), rewrite)
    assert fold(folded).empty
    mlp = randomize(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))).eval()
    check_transform(FoldBatchNorm(), PlainMLP(), mlp, [torch.randn(4, 6)])


def test_links_of_the_folded_model_are_those_of_the_network_without_batch_norms():
    net = tiny_cnn()
    inherited = rewritten_topology(PlainCNN().topology(net), fold(net))
    bare = PlainCNN().topology(apply_rewrite(net, fold(net)))
    for kind in (Invariance.SCALE, Invariance.PERMUTE):
        mine, theirs = ({(frozenset(k.writes), frozenset(k.reads)) for k in t.links_with(kind)} for t in (inherited, bare))
        assert mine == theirs and mine


def test_equalization_follows_the_fold():
    net = tiny_cnn()
    after = fold(net)
    rewrite = check_transform(CrossLayerEqualize(), PlainCNN(), net, [IMAGE], after=after)
    assert rewrite.edits and not rewrite.notes
    # and composed on the topology that the fold leaves, without building the folded model
    topology = rewritten_topology(PlainCNN().topology(net), after)
    both = after.then(CrossLayerEqualize().fit(topology, {}, {}, net, RewrittenReader(DictReader(net.state_dict()), after, net)))
    double = tiny_cnn().double()
    x = IMAGE.double()
    torch.testing.assert_close(apply_rewrite(double, both)(x), double(x), rtol=1e-9, atol=1e-9)
    assert len(both.edits["0.0.weight"]) > len(after.edits["0.0.weight"])


def test_what_is_not_folded_is_named():
    class Odd(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    class PreActivation(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 4, 1)
            self.bn = nn.BatchNorm2d(4)
            self.odd = Odd(4)
            self.last = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            y = self.first(x)
            return y + self.last(self.odd(self.bn(y)))

    pairs, notes = batchnorm_pairs(PreActivation().eval())
    assert not pairs
    assert any(n.startswith("bn: no layer of its own") for n in notes) and any(n.startswith("odd: a Odd may do more") for n in notes)


def test_a_layer_or_batch_norm_that_is_used_twice_is_left_alone():
    conv, bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
    for net in (nn.Sequential(conv, bn, conv, nn.BatchNorm2d(4)), nn.Sequential(nn.Conv2d(4, 4, 1), bn, nn.ReLU(), nn.Conv2d(4, 4, 1), bn)):
        assert not batchnorm_pairs(net.eval())[0]


def test_without_a_trace_neighbours_in_a_sequential_are_folded():
    class Untraceable(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

        def forward(self, x):
            return self.body(x) if x.sum() > 0 else self.body(-x)

    net = randomize(Untraceable()).double().eval()
    rewrite = fold(net)
    assert "cannot trace" in rewrite.notes[0]
    torch.testing.assert_close(apply_rewrite(net, rewrite)(IMAGE.double()), net(IMAGE.double()), rtol=1e-12, atol=1e-13)


def test_training_mode_and_batch_statistics_are_refused():
    net = tiny_cnn().train()
    with pytest.raises(SpecError, match=r"0\.1 is in training mode.*model\.eval\(\)"):
        fold(net)
    with pytest.raises(SpecError, match="no running statistics"):
        fold(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)).eval())


def test_zero_variance():
    net = tiny_cnn()
    with torch.no_grad():
        net[0][1].running_var[5] = 0
    with pytest.raises(SpecError, match=r"0\.1: the variance of channel 5 is 0, but its weights.*zero_variance"):
        fold(net)
    double = net.double()
    x = IMAGE.double()
    torch.testing.assert_close(apply_rewrite(double, fold(double, zero_variance="fold"))(x), double(x))
    # a channel whose weights are all zero cannot vary: nothing to refuse
    with torch.no_grad():
        double[0][0].weight[5] = 0
    torch.testing.assert_close(apply_rewrite(double, fold(double))(x), double(x))
    net[0][1].eps = 0.0
    with pytest.raises(SpecError, match=r"channel 5 has mean .* variance 0 and eps 0"):
        fold(net, zero_variance="fold")
    with pytest.raises(SpecError, match="error or fold"):
        FoldBatchNorm(zero_variance="keep")


def test_a_layer_that_got_a_bias_can_be_saved_and_rebuilt():
    conv = FloatConv2d(4, 6, 3, groups=2, padding=1)
    again = FloatConv2d.from_config(conv.config())
    assert type(again) is FloatConv2d and again.config() == conv.config() and again.bias is not None
