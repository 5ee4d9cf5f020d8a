"""Laws that every observer keeps, then cases."""

import math

import pytest
import torch
from qcore.calibration import KL, MSE, AbsMax, Ema, Gram, Histogram, MinMax, Moments, Percentile, Spikes
from qcore.errors import CalibrationError, SpecError
from qcore.numbers import Codebook, Int, Offset, PerChannel, PerTensor, PerToken, QuantSpec, fake_quantize, scale_parts
from torch import Tensor

INT8 = QuantSpec(format=Int(8), granularity=PerTensor())
UINT4 = QuantSpec(format=Int(4, signed=False), granularity=PerTensor(), offset=Offset.CODE)

# all whose result does not depend on the order of float additions must agree bit by bit
EXACT = [
    AbsMax(),
    Spikes(),
    MinMax(),
    MinMax(granularity="channel"),
    Histogram(bins=256),
    Percentile(q=0.99, bins=512),
    MSE(bins=256, steps=20),
    MSE(bins=256, steps=20, spec=UINT4, p=2.0),
    KL(bins=256, bits=6),
]
SUMS = [Gram(), Gram(dtype="float64"), Moments(), Ema(momentum=0.9)]
RANGES = [MinMax(), Ema(), Percentile(), MSE(), KL()]


def rows_of(*shape: int, seed: int = 0) -> Tensor:
    """Rows whose channels and batches differ in size, so that histograms must widen on the way."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    return x * torch.linspace(0.01, 3, shape[-2]).unsqueeze(-1) * torch.linspace(0.5, 2, shape[-1])


def leaves(result) -> list[Tensor]:
    if isinstance(result, float):
        return [torch.tensor(result, dtype=torch.float64)]
    return [result] if isinstance(result, Tensor) else list(result)


def assert_same(prototype, a, b) -> None:
    for x, y in zip(leaves(a), leaves(b), strict=True):
        if prototype in EXACT:
            assert torch.equal(x, y)
        else:
            # the order of some hundred float32 additions (float64 for all but the Gram)
            torch.testing.assert_close(x, y, rtol=2e-6, atol=2e-6)


def watched(prototype, *batches: Tensor, weights=None):
    observer = prototype.fresh()
    for i, batch in enumerate(batches):
        observer.update(batch, None if weights is None else weights[i])
    return observer


@pytest.fixture(params=[*EXACT, *SUMS], ids=repr)
def prototype(request):
    return request.param


@pytest.fixture(params=[(96, 5), (3, 96, 4)], ids=["rows", "grouped rows"])
def rows(request):
    return rows_of(*request.param)


@pytest.mark.parametrize("sizes", [[96], [1] * 96, [1, 0, 30, 65], [50, 46]], ids=["one", "rows", "ragged", "two"])
def test_batches_do_not_matter(prototype, rows, sizes):
    together = watched(prototype, rows).result()
    assert_same(prototype, watched(prototype, *rows.split(sizes, dim=-2)).result(), together)


def test_a_loaded_state_goes_on_as_if_uninterrupted(prototype, rows):
    first, rest = rows.split([40, 56], dim=-2)
    interrupted = prototype.fresh()
    interrupted.load(watched(prototype, first).state())
    interrupted.update(rest)
    uninterrupted = watched(prototype, first, rest)
    assert interrupted.state().keys() == uninterrupted.state().keys()
    assert all(torch.equal(interrupted.state()[k], v) for k, v in uninterrupted.state().items())


def test_a_state_is_a_snapshot(prototype, rows):
    observer = watched(prototype, rows)
    state = observer.state()
    before = {k: v.clone() for k, v in state.items()}
    other = prototype.fresh()
    other.load(state)
    for o in (observer, other):
        o.update(rows * 100)
    assert all(torch.equal(state[k], v) for k, v in before.items())


def test_merged_ranks_are_one_observer(prototype, rows):
    parts = rows.split([10, 50, 36], dim=-2)
    first, *others = [watched(prototype, part) for part in parts]
    first.merge([prototype.fresh().state(), *[o.state() for o in others]])
    assert_same(prototype, first.result(), watched(prototype, rows).result())


def test_a_rank_that_saw_nothing_takes_in_the_others(prototype, rows):
    empty = prototype.fresh()
    empty.merge([watched(prototype, rows).state()])
    assert_same(prototype, empty.result(), watched(prototype, rows).result())


def test_weight_two_is_the_row_twice(prototype, rows):
    generator = torch.Generator().manual_seed(1)
    times = torch.randint(0, 4, (rows.shape[-2],), generator=generator)
    weighted = watched(prototype, *rows.split([40, 56], -2), weights=times.float().split([40, 56]))
    assert_same(prototype, weighted.result(), watched(prototype, rows.repeat_interleave(times, dim=-2)).result())


def test_a_row_of_weight_zero_was_never_there(prototype, rows):
    padded = torch.cat([rows, torch.full_like(rows[..., :3, :], torch.nan)], dim=-2)
    weight = torch.cat([torch.ones(rows.shape[-2]), torch.zeros(3)])
    assert_same(prototype, watched(prototype, padded, weights=[weight]).result(), watched(prototype, rows).result())


def test_half_precision_rows_are_their_float32_values(prototype, rows):
    half = rows.bfloat16()
    assert_same(prototype, watched(prototype, half).result(), watched(prototype, half.float()).result())


def test_strided_rows_are_seen_as_they_are(prototype, rows):
    strided = rows.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert_same(prototype, watched(prototype, strided).result(), watched(prototype, rows).result())


def test_equal_options_are_equal_prototypes_whatever_they_saw(prototype, rows):
    assert watched(prototype, rows) == prototype.fresh()
    assert not prototype.fresh().state()


@pytest.mark.parametrize("seen", [[], [rows_of(0, 5)], [rows_of(4, 5)]], ids=["nothing", "no rows", "only padding"])
def test_without_rows_there_is_no_result(prototype, seen):
    observer = watched(prototype, *seen, weights=[torch.zeros(len(s)) for s in seen])
    with pytest.raises(CalibrationError, match=f"observer '{prototype.name}' saw no rows; calibrate on more samples"):
        observer.result()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_that_are_no_numbers_are_counted(prototype, rows, bad):
    rows = rows.clone()
    rows[..., 7, 2] = rows[..., 9, 0] = rows[..., 9, 1] = bad
    count = 2 * rows[..., 0, 0].numel()
    with pytest.raises(CalibrationError, match=f"observer '{prototype.name}': {count} of {rows[..., 0].numel()} rows hold NaN or infinity"):
        watched(prototype, rows)


@pytest.mark.parametrize("weight", [torch.tensor([1.0, -1, 1]), torch.tensor([1.0, math.nan, 1]), torch.ones(2), torch.ones(3, 1)], ids=str)
def test_impossible_weights_are_refused(prototype, weight):
    with pytest.raises(CalibrationError, match="weights"):
        prototype.fresh().update(torch.ones(3, 5), weight)


def test_a_strange_state_is_refused(prototype):
    with pytest.raises(CalibrationError, match="go on from has something"):
        prototype.fresh().load({"something": torch.zeros(1)})


@pytest.mark.parametrize("prototype", [Gram(), Moments(), AbsMax(), MinMax(granularity="channel")], ids=repr)
def test_rows_of_another_width_are_refused(prototype):
    observer = watched(prototype, rows_of(8, 5))
    with pytest.raises(CalibrationError, match=f"observer '{prototype.name}' has"):
        observer.update(rows_of(8, 6))
    with pytest.raises(CalibrationError, match=f"observer '{prototype.name}' has"):
        observer.merge([watched(prototype, rows_of(8, 1)).state()])


# what the numbers are ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 127, 256, 300, 1100])
def test_gram_is_the_mean_outer_product(k):
    x, w = rows_of(40, k), torch.rand(40, generator=torch.Generator().manual_seed(3))
    expected = (x.double() * w.double().unsqueeze(1)).T @ x.double() / w.double().sum()
    gram = watched(Gram(), x, weights=[w]).result()
    assert gram.dtype == torch.float32
    assert torch.equal(gram, gram.T)
    # float32 sums of 40 products
    torch.testing.assert_close(gram.double(), expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


def test_gram_of_grouped_rows_is_one_for_each_group():
    x = rows_of(3, 20, 6)
    both = watched(Gram(), x).result()
    assert both.shape == (3, 6, 6)
    for p in range(3):
        torch.testing.assert_close(both[p], watched(Gram(), x[p]).result())


def test_gram_counts_its_rows():
    gram = watched(Gram(), rows_of(7, 3), rows_of(5, 3), weights=[torch.ones(7), torch.tensor([1.0, 0, 0, 2, 1])])
    assert (gram.rows, Gram().rows) == (10, 0)


def test_gram_in_float64_keeps_what_float32_loses():
    # 1 is below the last bit of 2^13 squared
    x = torch.tensor([[2.0**13, 1.0]])
    many = torch.cat([x, torch.tensor([[1.0, 1.0]]).expand(64, 2)])
    exact = (2.0**26 + 64) / 65
    assert watched(Gram(dtype="float64"), many.split(1)[0], *many[1:].split(1)).result()[0, 0] == torch.tensor(exact).float()


def test_gram_says_when_it_overflowed():
    with pytest.raises(CalibrationError, match="overflowed"):
        watched(Gram(), torch.full((1, 2), 1e25)).result()


def test_gram_refuses_products_in_half_precision():
    with pytest.raises(SpecError, match="bfloat16"):
        Gram(dtype="bfloat16")


def test_moments_are_the_means():
    x = rows_of(50, 4).double()
    n, mean, mean_abs, mean_square = watched(Moments(), x).result()
    assert n == 50
    for got, expected in [(mean, x.mean(0)), (mean_abs, x.abs().mean(0)), (mean_square, x.square().mean(0))]:
        torch.testing.assert_close(got, expected)


def test_extremes_are_exact():
    x = rows_of(50, 4)
    assert torch.equal(watched(AbsMax(), x).result(), x.abs().amax(0))
    low, high = watched(MinMax(), x).result()
    assert (low.item(), high.item(), tuple(low.shape)) == (x.min().item(), x.max().item(), (1,))
    low, high = watched(MinMax(granularity="channel"), x).result()
    assert torch.equal(low, x.amin(0))
    assert torch.equal(high, x.amax(0))


@pytest.mark.parametrize("observer", RANGES, ids=repr)
@pytest.mark.parametrize("sign", [1, -1])
def test_ranges_include_zero(observer, sign):
    low, high = watched(observer, sign * (rows_of(30, 4).abs() + 1)).result()
    assert (low if sign > 0 else high).item() == 0
    assert (high - low).item() > 1


@pytest.mark.parametrize("observer", RANGES, ids=repr)
@pytest.mark.parametrize("spec", [INT8, UINT4], ids=str)
def test_ranges_become_static_scales_of_any_activation(observer, spec):
    x = rows_of(64, 5)
    parts = scale_parts(*watched(observer, x).result(), spec)
    for shape in [(64, 5), (4, 16, 5), (320,)]:
        values = fake_quantize(x.reshape(shape), spec, parts)
        assert values.shape == shape
        assert torch.equal(values.flatten(), fake_quantize(x, spec, parts).flatten())


def test_ranges_of_channels_become_static_scales():
    spec = QuantSpec(format=Int(8), granularity=PerChannel(-1))
    x = rows_of(64, 5)
    parts = scale_parts(*watched(MinMax(granularity="channel"), x).result(), spec)
    assert torch.equal(fake_quantize(x, spec, parts), fake_quantize(x, spec))
    assert torch.equal(fake_quantize(x.view(2, 32, 5), spec, parts), fake_quantize(x, spec).view(2, 32, 5))


def test_ema_of_one_row_is_its_range():
    low, high = watched(Ema(), torch.tensor([[-1.0, 0.5, 3.0]])).result()
    torch.testing.assert_close((low.item(), high.item()), (-1.0, 3.0))


def test_ema_follows_the_recurrence():
    x = rows_of(30, 4)
    low, high, m = x[0].min().item(), x[0].max().item(), 0.8
    raw = [0.0, 0.0]
    for row in x:
        raw = [m * raw[0] + (1 - m) * row.min().item(), m * raw[1] + (1 - m) * row.max().item()]
    low, high = watched(Ema(momentum=m), x).result()
    torch.testing.assert_close(torch.cat([low, high]), torch.tensor(raw) / (1 - m**30))


@pytest.mark.parametrize("q", [0.9, 0.99, 0.999, 1.0])
def test_percentile_keeps_its_share_and_is_one_bin_wide_at_most(q):
    bins = 1024
    x = torch.randn(5000, 3, generator=torch.Generator().manual_seed(0)) + 0.3
    low, high = watched(Percentile(q=q, bins=bins), x).result()
    v = x.flatten().sort().values
    keep = math.ceil(q * len(v))
    bound = 2 * v.abs().max() / bins
    assert 0 <= high - v[keep - 1] <= bound
    assert 0 <= v[len(v) - keep] - low <= bound
    assert (x > high).sum() <= (1 - q) * len(v) + 1e-6
    assert (x < low).sum() <= (1 - q) * len(v) + 1e-6


def test_histogram_counts_every_value_once_however_far_it_widens():
    observer = Histogram(bins=8)
    for x in [torch.zeros(1, 2), torch.tensor([[1e-30, -1e-6]]), torch.tensor([[0.3, -1.7]]), torch.tensor([[3e38, -1.0]]), torch.zeros(1, 1)]:
        observer.update(x)
    edges, counts = observer.result()
    assert counts.sum() == 9
    assert edges[-1] == 2.0**128
    assert counts.nonzero().flatten().tolist() == [7, 8, 15]  # just below zero, from zero on, the end


def test_histogram_bins_are_what_they_say():
    x = torch.tensor([[-4.0, -3.0, -0.5, 0.0, 0.5, 1.0, 7.9]])
    edges, counts = watched(Histogram(bins=8), x).result()
    assert edges.tolist() == [float(i) for i in range(-8, 9)]
    assert counts.tolist() == [0, 0, 0, 1, 1, 0, 0, 1, 2, 1, 0, 0, 0, 0, 0, 1]


def test_another_number_of_bins_is_refused():
    with pytest.raises(CalibrationError, match="bins=512"):
        Histogram(bins=256).load(watched(Histogram(bins=512), rows_of(4, 4)).state())


def mse_of(x: Tensor, low: Tensor, high: Tensor, spec: QuantSpec, p: float) -> float:
    return float(((fake_quantize(x, spec, scale_parts(low, high, spec)) - x).double().abs() ** p).sum())


@pytest.mark.parametrize("spec", [INT8, QuantSpec(format=Int(4), granularity=PerTensor()), UINT4], ids=str)
def test_mse_finds_the_best_range_of_its_grid(spec):
    x = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0)) ** 3
    observer = watched(MSE(spec=spec, steps=25), x)
    got = mse_of(x, *observer.result(), spec, 2.4)
    low, high = watched(MinMax(), x).result()
    best = min(mse_of(x, low * (1 - i / 25), high * (1 - i / 25), spec, 2.4) for i in range(20))
    # it sees the middles of 16384 bins, not the values
    assert best <= got <= best * 1.01
    if spec.format.bits == 4:  # with 8 bits the cubes of normal values need no clipping
        assert got < mse_of(x, low, high, spec, 2.4)


def test_kl_clips_rare_outliers_and_keeps_a_uniform_range():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, 1, generator=generator)
    x[::5000] = 60.0
    low, high = watched(KL(), x).result()
    assert 2 < high.item() < 30
    assert low.item() == max(x.min().item(), -high.item())
    uniform = torch.rand(20_000, 1, generator=generator) * 2 - 1
    _, high = watched(KL(bits=8), uniform).result()
    assert high.item() > 0.9


def plain_kl(counts: Tensor, end: int, levels: int) -> float:
    """The definition, bin by bin."""
    p = counts[:end].clone()
    p[-1] += counts[end:].sum()
    q = torch.zeros(end, dtype=torch.float64)
    for level in range(levels):
        a, b = end * level // levels, end * (level + 1) // levels
        part = counts[a:b]
        q[a:b] = torch.where(part > 0, part.sum() / max(1, int((part > 0).sum())), 0.0)
    p, q = p / p.sum(), q / q.sum()
    return float(sum(pi * (pi / qi).log() if qi > 0 else math.inf for pi, qi in zip(p, q, strict=True) if pi > 0))


def test_kl_is_the_definition_in_running_sums():
    from qcore.calibration.observers import _divergence

    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 5, (64,), generator=generator).double() * torch.linspace(3, 0, 64).round()
    ends = torch.arange(8, 65)
    expected = torch.tensor([plain_kl(counts, int(e), 8) for e in ends], dtype=torch.float64)
    torch.testing.assert_close(_divergence(counts, ends, 8), expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda: MinMax(granularity="row"),
        lambda: Ema(momentum=1.0),
        lambda: Histogram(bins=100),
        lambda: Percentile(q=99.9),
        lambda: MSE(p=0),
        lambda: MSE(spec=QuantSpec(format=Int(8), granularity=PerToken())),
        lambda: MSE(spec=QuantSpec(format=Codebook(4), granularity=PerTensor())),
        lambda: KL(bits=1),
        lambda: KL(bins=64),
    ],
)
def test_impossible_options_are_refused(make):
    with pytest.raises(SpecError, match=r"observer '|fitted"):
        make()


def test_spikes_are_the_largest_token_over_the_median_one():
    x = torch.randn(501, 16, generator=torch.Generator().manual_seed(0))
    tokens = x.abs().amax(-1)
    x[7] *= 1000
    found = watched(Spikes(), x).result()
    assert found == pytest.approx(float(x.abs().max() / tokens.median()), rel=0.012)
    assert watched(Spikes(), x * 2.0**-10).result() == pytest.approx(found, rel=1e-6)
