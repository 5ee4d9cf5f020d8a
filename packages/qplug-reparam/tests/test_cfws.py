"""CFWS: the laws of the split, what it is for, its wrong variants, and the metrics of activations."""

import pytest
import torch
from qcore.calibration import KL, MSE, MinMax
from qcore.errors import SpecError
from qcore.model.plain import PlainCNN
from qcore.model.reader import DictReader
from qcore.numbers import Int, Offset, PerChannel, PerTensor, QuantSpec, fake_quantize, quantize, scale_parts
from qcore.transforms.apply import apply_rewrite
from qplug_reparam.cfws import CFWS, coarse_of
from qplug_reparam.metrics import ImprovedKL
from torch import nn

INT8 = QuantSpec(format=Int(8), granularity=PerChannel())
CONVS = {
    "stem": {"in_channels": 3, "out_channels": 8, "kernel_size": 3, "stride": 2, "padding": 1},
    "grouped": {"in_channels": 8, "out_channels": 8, "kernel_size": 3, "padding": 1, "groups": 2},
    "depthwise": {"in_channels": 6, "out_channels": 6, "kernel_size": 3, "padding": 1, "groups": 6, "stride": 2},
    "5x5": {"in_channels": 4, "out_channels": 4, "kernel_size": 5, "padding": 2},
    "dilated": {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "padding": 2, "dilation": 2},
    "more padding": {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "padding": 2},
    "reflect": {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "same": {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "padding": "same"},
}


def fused_kernel(n: int = 32, k: int = 32, seed: int = 0) -> torch.Tensor:
    """As fusing leaves one: a ring of deviation 0.02, and an identity of 1 to 4 in the middle."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, 3, 3, generator=g) * 0.02
    i = torch.arange(n)
    w[i, i % k, 1, 1] += 1 + 3 * torch.rand(n, generator=g)
    return w


def net(**conv) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(**conv), nn.ReLU()).eval()


def split(model: nn.Module, transform: CFWS, spec: QuantSpec = INT8):
    topology = PlainCNN().topology(model)
    specs = dict.fromkeys(topology.sites, spec)
    rewrite = transform.fit(topology, specs, {}, model, DictReader(model.state_dict()))
    return rewrite, apply_rewrite(model, rewrite)


@pytest.mark.parametrize("mode", ["centre", "kernel"])
@pytest.mark.parametrize("name", CONVS)
def test_coarse_and_fine_are_the_convolution(name, mode):
    model = net(**CONVS[name]).double()
    _, twin = split(model, CFWS(mode=mode))
    x = torch.randn(2, CONVS[name]["in_channels"], 9, 10, dtype=torch.float64)
    torch.testing.assert_close(twin(x), model(x), rtol=1e-12, atol=1e-12)
    coarse = twin[0].coarse
    assert coarse.kernel_size == ((1, 1) if mode == "centre" else model[0].kernel_size)
    assert (coarse.bias is None, twin[0].fine.bias is None) == (False, True)


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_sum_is_exact_in_the_weights_own_dtype(dtype, granularity):
    model = net(**CONVS["grouped"]).to(dtype)
    w = model[0].weight.detach()
    _, twin = split(model, CFWS(granularity=granularity))
    whole = twin[0].fine.weight.detach().clone()
    whole[:, :, 1:2, 1:2] += twin[0].coarse.weight.detach()
    assert torch.equal(whole, w)


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_fine_centre_is_at_most_half_a_step(bits, granularity):
    c = torch.randn(16, 8, 1, 1, dtype=torch.float64)
    coarse, step = coarse_of(c, bits, granularity)
    assert ((c - coarse).abs() <= step / 2 * (1 + 1e-12)).all()
    codes = coarse / step
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-9)
    assert codes.abs().max().round() == (1 << (bits - 1)) - 1  # the largest code, and not one more


def test_coarse_codes_have_no_error():
    coarse, _ = coarse_of(fused_kernel()[:, :, 1:2, 1:2], 8, "channel")
    q = quantize(coarse.float().flatten(1), INT8)
    torch.testing.assert_close(q.dequantize(), coarse.float().flatten(1), rtol=1e-6, atol=0)  # one ulp of the product code · scale


def rounded(w: torch.Tensor, mode: str | None) -> torch.Tensor:
    """The kernel that int8 codes per channel stand for, split or not."""
    if mode is None:
        return fake_quantize(w.flatten(1), INT8).view_as(w)
    model = nn.Sequential(nn.Conv2d(w.shape[1], w.shape[0], 3, padding=1), nn.ReLU()).eval()
    model[0].weight.data = w
    _, twin = split(model, CFWS(mode=mode))
    coarse, fine = (fake_quantize(p.weight.detach().flatten(1), INT8).view_as(p.weight) for p in (twin[0].coarse, twin[0].fine))
    whole = fine.clone()
    whole[:, :, 1:2, 1:2] += coarse if mode == "centre" else coarse[:, :, 1:2, 1:2]
    if mode == "kernel":
        whole = fine + coarse
    return whole


def ring_error(w: torch.Tensor, rounded_w: torch.Tensor) -> float:
    ring = torch.ones(3, 3, dtype=torch.bool)
    ring[1, 1] = False
    return float((rounded_w - w)[:, :, ring].square().sum() / w[:, :, ring].square().sum())


def test_ring_error_of_a_fused_kernel_is_hundreds_of_times_smaller_than_per_channel():
    w = fused_kernel()
    plain, cfws = ring_error(w, rounded(w, None)), ring_error(w, rounded(w, "centre"))
    assert plain > 0.02  # the specification measures 8.9e-2
    assert cfws < 1e-4  # 5.7e-5
    assert plain / cfws > 100


def test_splitting_the_whole_kernel_is_as_fine():
    w = fused_kernel()
    assert ring_error(w, rounded(w, "kernel")) < ring_error(w, rounded(w, None)) / 100


@pytest.mark.parametrize("seed", range(4))
def test_without_reparameterisation_it_is_not_worse_than_per_channel(seed):
    w = torch.randn(32, 32, 3, 3, generator=torch.Generator().manual_seed(seed)) * 0.02
    plain, cfws = ((rounded(w, mode) - w).square().sum() for mode in (None, "centre"))
    # the coarse codes are exact and the fine part's scale is never larger; where it is equal, errors are those of the same grid
    assert cfws <= plain * 1.001


def test_qmax_of_the_release_is_told_apart():
    """2^(bits-1) instead of 2^(bits-1) - 1: the largest coarse weight is then a code that int8 does not have on both sides."""
    c = fused_kernel()[:, :, 1:2, 1:2].double()
    wrong = c.abs().flatten(1).amax(1).view(-1, 1, 1, 1) / 128
    assert (torch.floor(c / wrong + 0.5).abs().amax() == 128) & (coarse_of(c, 8, "channel")[0] / coarse_of(c, 8, "channel")[1]).abs().amax().lt(127.5)


def test_a_channel_of_zeros_stays_zero_and_finite():
    model = net(**CONVS["grouped"])
    model[0].weight.data[3] = 0
    _, twin = split(model, CFWS())
    assert not twin[0].coarse.weight[3].any()
    assert not twin[0].fine.weight[3].any()
    assert torch.isfinite(fake_quantize(twin[0].coarse.weight.detach().flatten(1), INT8)).all()


def test_kernels_without_a_middle_are_left_whole_and_named():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 4), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()
    rewrite, _ = split(model, CFWS())
    assert not rewrite.inserts
    assert [note.partition(":")[0] for note in rewrite.notes] == ["0", "2", "4"]
    assert "no ring" in rewrite.notes[0]
    assert "no middle tap" in rewrite.notes[1]
    assert "less than the kernel's reach" in rewrite.notes[2]


def test_only_the_sites_that_are_named_are_split():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)).eval()
    rewrite, _ = split(model, CFWS(sites=("2:weight",)))
    assert list(rewrite.inserts) == ["2"]


def test_options_that_are_not_there_are_refused():
    with pytest.raises(SpecError, match="mode centre or kernel, got 'center'"):
        CFWS(mode="center")


# metrics of activations


SPEC = QuantSpec(format=Int(8), granularity=PerTensor(), offset=Offset.CODE)


def seen_by(observer, x):
    observer = observer.for_spec(SPEC).fresh()
    observer.update(x)
    return observer.result()


def error(x, found):
    low, high = (t.reshape(1, 1) for t in found)
    return float((fake_quantize(x, SPEC, scale_parts(low, high, SPEC)) - x).square().mean())


@pytest.fixture(scope="module")
def rare():
    """What a fused network's ReLU gives: half a normal, and a few values a hundred times as large."""
    x = torch.randn(4096, 16, generator=torch.Generator().manual_seed(0)).relu()
    x[0, :3] = 80.0
    return x


def test_improved_kl_clips_where_the_tail_is_not_worth_it(rare):
    rare = rare.clone()
    rare[0, :3] = 8.0  # one lone outlier bin that costs levels and is hardly there
    low, high = seen_by(ImprovedKL(guard=False), rare)
    assert float(low) == 0
    assert float(high) <= 8.0


def test_the_guard_never_errs_more_than_min_max(rare):
    for x in (rare, torch.rand(4096, 4), torch.randn(2048, 8)):
        assert error(x, seen_by(ImprovedKL(), x)) <= error(x, seen_by(MinMax(), x)) * (1 + 1e-3)  # histogram bins stand for their middles


def test_the_tail_in_its_own_bins_clips_less_than_tensorrt():
    """TensorRT adds what is clipped to the last bin, so that clipping one value in a hundred costs nothing there."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(8192, 16, generator=g).relu()
    x = torch.where(torch.rand(8192, 16, generator=g) < 0.01, 5 + 20 * torch.rand(8192, 16, generator=g), x)
    trt, improved = (float(seen_by(o, x)[1]) for o in (KL(), ImprovedKL(guard=False)))
    assert trt < 3
    assert improved > 5  # the bulk ends at 4.6


def test_uniform_values_keep_their_whole_range():
    x = torch.rand(8192, 4)
    assert float(seen_by(ImprovedKL(), x)[1]) > 0.97 * float(x.max())


def test_positive_alone_ignores_what_a_relu_cuts_off():
    x = torch.randn(4096, 4, generator=torch.Generator().manual_seed(0))
    x[:, 0] -= 50
    low, high = seen_by(ImprovedKL(positive=True), x)
    assert float(low) == 0
    assert 0 < float(high) < 6


def test_a_tensor_of_zeros_has_a_range():
    low, high = seen_by(ImprovedKL(), torch.zeros(64, 4))
    assert (float(low), float(high)) == (0, 0)


def test_batches_in_any_cut_give_the_same_range(rare):
    whole, cut = ImprovedKL().for_spec(SPEC).fresh(), ImprovedKL().for_spec(SPEC).fresh()
    whole.update(rare)
    for part in rare.split(1000):
        cut.update(part)
    assert all(torch.equal(a, b) for a, b in zip(whole.result(), cut.result(), strict=True))


def test_squares_are_the_metric_mse_of_the_paper(rare):
    assert error(rare, seen_by(MSE(p=2.0), rare)) <= error(rare, seen_by(MinMax(), rare))


def test_formats_without_levels_are_refused():
    with pytest.raises(SpecError, match="finds one range"):
        ImprovedKL().for_spec(QuantSpec(format=Int(8), granularity=PerChannel(1)))
