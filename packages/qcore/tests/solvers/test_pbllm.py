"""PB-LLM: two numbers for most weights and 8 bits for the salient ones; what is counted is what is stored."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qcore.calibration import Gram
from qcore.checkpoint import load, save
from qcore.errors import CalibrationError, SpecError
from qcore.model.plain import PlainMLP
from qcore.numbers import Codebook, QTensor, QuantSpec, UnscaledTile, int_weight, quantize, spec_from_dict, spec_to_dict
from qcore.numbers.partly_binary import PartlyBinary, effective_bits, topmost
from qcore.packing import Bits, first_that_accepts
from qcore.packing.partly_binary import PartlyBinaryBits
from qcore.pipeline import load_in_memory, quantize_model
from qcore.plan import packed_bytes
from qcore.plugins import load_registry
from qcore.recipe_file import dump, load_recipe, parse_recipe
from qcore.solvers import GPTQ, RTN
from qcore.solvers.pbllm import PBLLM
from qcore.testing import check_solver
from qcore.testing.models import TinyDecoderAdapter, tiny_decoder, tiny_mlp, tokens


def spec(salient: float = 0.1, cols: int = 128) -> QuantSpec:
    return QuantSpec(format=PartlyBinary(salient), granularity=UnscaledTile(1, cols))


@pytest.fixture(scope="module")
def registry():
    return load_registry()


def heavy_tailed(n: int, k: int, seed: int = 0) -> torch.Tensor:
    """Student's t with 5 degrees of freedom."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=g) / (torch.randn(n, k, 5, generator=g).square().mean(-1)).sqrt()


def correlated_gram(k: int, rows: int = 1024, seed: int = 1) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, k, generator=g) @ torch.randn(k, k, generator=g) / k**0.5 * torch.logspace(-1, 0.5, k)
    seen = Gram().fresh()
    seen.update(x)
    return seen.result()


def loss(w: torch.Tensor, q: QTensor, gram: torch.Tensor) -> float:
    d = (w - q.dequantize()).double()
    return float((d @ gram.double() * d).sum())


# the format ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("salient", "decibels"), [(0.05, 6.8), (0.1, 8.5), (0.2, 11.2), (0.5, 18.9)])
def test_signal_to_noise_of_heavy_tailed_weights_is_that_of_statistics_over_the_rest_alone(salient, decibels):
    # with means over the zeros in the salient places too, half of them salient, it would be 16.8
    w = heavy_tailed(256, 512)
    q = quantize(w, spec(salient))
    noise = (w - q.dequantize()).square().sum()
    assert float(10 * torch.log10(w.square().sum() / noise)) == pytest.approx(decibels, abs=0.2)


@settings(max_examples=25, deadline=None)
@given(st.floats(0, 0.9), st.sampled_from([(3, 40), (8, 128), (5, 150)]), st.integers(0, 99))
def test_rounding_twice_is_rounding_once_and_no_more_are_salient_than_allowed(salient, shape, seed):
    w, s = heavy_tailed(*shape, seed), spec(salient, 64)
    q = quantize(w, s)
    assert int((q.codes >= 2).sum()) <= s.format.count(w.numel())
    assert q.codes.unique().numel() <= 2**s.format.bits
    again = quantize(q.dequantize(), s, q.params())
    assert torch.equal(again.dequantize(), q.dequantize())


def test_salient_values_are_kept_to_half_a_step():
    w, s = heavy_tailed(16, 256), spec(0.2)
    q = quantize(w, s)
    step = q.parts["step"].float().repeat_interleave(128, 1)
    far = ((w - q.dequantize()).abs() / step)[q.codes >= 2]
    assert far.max() <= 0.5 + 1e-4
    assert (w.abs().unflatten(1, (-1, 128)).amax(-1) / q.parts["step"].float()).max() <= 126 + 1e-3


def test_the_spread_is_the_least_squares_one():
    w = heavy_tailed(8, 128).double()
    fmt, salient = PartlyBinary(0.1), topmost(w.abs(), 102)
    parts = fmt.fit_around(w, salient)
    signs = torch.where(w >= parts["mean"].double().unsqueeze(1), 1.0, -1.0)

    def error(factor: float) -> torch.Tensor:
        off = w - parts["mean"].double().unsqueeze(1) - factor * parts["spread"].double().unsqueeze(1) * signs
        return torch.where(salient, 0.0, off).square().sum(1)

    assert (error(1.0) < error(0.99)).all() and (error(1.0) < error(1.01)).all()


def test_values_that_only_fill_up_a_block_count_for_nothing():
    w = heavy_tailed(4, 72) + 3.0
    short = quantize(w, spec(0.0, 64)).parts["mean"][:, 1].float()
    assert torch.allclose(short, w[:, 64:].mean(1), rtol=1e-3)


def test_blocks_of_zeros_stay_zero_and_what_does_not_fit_is_refused():
    w = torch.zeros(3, 64)
    assert not quantize(w, spec(0.25, 32)).dequantize().any()
    with pytest.raises(SpecError, match="65504"):
        quantize(torch.full((2, 64), 1e6), spec())
    with pytest.raises(SpecError, match=r"salient=1\.0"):
        PartlyBinary(1.0)


def test_a_spec_survives_being_written_down():
    s = spec(0.2)
    assert spec_from_dict(spec_to_dict(s), {"partly-binary": PartlyBinary}) == s


# what is stored --------------------------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.floats(0, 0.9), st.sampled_from([(3, 40), (8, 128), (5, 150)]), st.integers(0, 99))
def test_what_is_packed_comes_back_bit_for_bit(salient, shape, seed):
    q = quantize(heavy_tailed(*shape, seed), spec(salient, 64))
    back = PartlyBinaryBits().unpack(PartlyBinaryBits().pack(q), q.spec, q.shape)
    assert set(back.parts) == set(q.parts)
    assert all(torch.equal(back.parts[name], part) and back.parts[name].dtype == part.dtype for name, part in q.parts.items())


@pytest.mark.parametrize("salient", [0.05, 0.1, 0.2, 0.5])
def test_effective_bits_are_those_of_the_packed_bytes_also_in_a_plan(salient):
    w, s = heavy_tailed(64, 384), spec(salient)
    q = PBLLM(saliency="magnitude").solve(w, s, {"gram": torch.eye(384)})
    nbytes = sum(t.numel() * t.element_size() for t in PartlyBinaryBits().pack(q).values())
    bitmap, entropy = effective_bits(s.format, (64, 384), 128)
    assert 8 * nbytes / w.numel() == pytest.approx(bitmap, abs=1e-3)  # the last byte of the signs
    assert entropy < bitmap or salient == 0.5
    assert packed_bytes(PartlyBinaryBits(), s, (64, 384)) == pytest.approx(nbytes, rel=2e-3)
    on_meta = PartlyBinaryBits().pack(QTensor(s, {n: t.to("meta") for n, t in q.parts.items()}, q.shape))
    assert abs(sum(t.numel() * t.element_size() for t in on_meta.values()) - nbytes) <= 8


def test_a_tenth_in_eight_bits_is_three_bits_with_the_mask():
    bitmap, entropy = effective_bits(PartlyBinary(0.1), (4096, 4096), 128)
    assert bitmap == pytest.approx(1.7 + 1 + 48 / 128, abs=1e-3)
    assert entropy == pytest.approx(1.7 + 0.469 + 48 / 128, abs=1e-3)


def test_the_packing_is_chosen_for_its_format_and_refuses_damage(registry):
    s, packings = spec(), [cls() for cls in registry.packings.values()]
    assert first_that_accepts(packings, s, (8, 128)).name == "partly-binary"
    assert "partly-binary" in PartlyBinaryBits().refuses(int_weight(4), (8, 128))
    q = quantize(heavy_tailed(8, 128), s)
    assert torch.equal(Bits().unpack(Bits().pack(q), s, q.shape).dequantize(), q.dequantize())
    parts = PartlyBinaryBits().pack(q)
    parts["mask"] = parts["mask"] ^ 1
    with pytest.raises(SpecError, match="damaged"):
        PartlyBinaryBits().unpack(parts, s, q.shape)


# the solver ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("saliency", ["hessian", "magnitude"])
def test_the_solver_keeps_the_contract(saliency):
    check_solver(PBLLM(saliency=saliency), spec(0.1, 32))


def test_error_feedback_beats_rounding_and_hessian_saliency_is_no_worse_than_magnitude():
    for seed in range(3):
        w, gram = heavy_tailed(64, 256, seed), correlated_gram(256, seed=seed + 10)
        nearest = loss(w, RTN().solve(w, spec(), {}), gram)
        magnitude, hessian = (loss(w, PBLLM(saliency=s).solve(w, spec(), {"gram": gram}), gram) for s in ("magnitude", "hessian"))
        assert hessian <= magnitude < nearest


def test_more_salient_weights_are_less_error_and_the_share_is_kept():
    w, gram = heavy_tailed(32, 256), correlated_gram(256)
    errors = []
    for f in (0.0, 0.05, 0.1, 0.2, 0.5):
        q = PBLLM().solve(w, spec(f), {"gram": gram})
        assert int((q.codes >= 2).sum()) == sum(int(f * 32 * 128 + 1e-9) for _ in range(2))
        errors.append(loss(w, q, gram))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.1 * errors[0]


def test_without_correlation_the_solver_is_rounding_of_each_group():
    w = heavy_tailed(16, 96)
    q = PBLLM(saliency="magnitude").solve(w, spec(0.1, 96), {"gram": torch.eye(96)})
    assert torch.equal((q.codes >= 2), topmost(w.abs(), 153))
    values = PartlyBinary(0.1).fit_around(w, q.codes >= 2)
    assert all(torch.equal(values[n], q.parts[n][:, 0]) for n in values)


def test_rows_that_see_inputs_of_their_own_are_solved_with_their_own_gram():
    w = heavy_tailed(8, 64)
    grams = torch.stack([correlated_gram(64, seed=s) for s in (1, 2)])
    both = PBLLM().solve(w, spec(0.0, 64), {"gram": grams})
    apart = [PBLLM().solve(w[4 * i : 4 * i + 4], spec(0.0, 64), {"gram": grams[i]}).codes for i in range(2)]
    assert torch.equal(both.codes, torch.cat(apart))


def test_what_cannot_work_is_said():
    w = heavy_tailed(4, 64)
    with pytest.raises(CalibrationError, match="gram"):
        PBLLM().solve(w, spec(), {})
    with pytest.raises(SpecError, match="partly-binary"):
        PBLLM().solve(w, QuantSpec(format=Codebook(2), granularity=UnscaledTile(1, 64)), {"gram": torch.eye(64)})
    with pytest.raises(SpecError, match="rows = 1"):
        PBLLM().solve(w, QuantSpec(format=PartlyBinary(), granularity=UnscaledTile(2, 64)), {"gram": torch.eye(64)})
    with pytest.raises(SpecError, match="frozen"):
        PBLLM().solve(w, spec(), {"gram": torch.eye(64)}, torch.full_like(w, torch.nan))
    with pytest.raises(SpecError, match="saliency"):
        PBLLM(saliency="gradient")  # type: ignore[arg-type]


# the recipe ------------------------------------------------------------------------------------------------------------------------------


def test_a_model_is_saved_and_loaded_with_what_was_counted(registry, tmp_path):
    recipe = load_recipe("w2a16-pbllm", registry)
    assert parse_recipe(dump(recipe), registry, name=recipe.name) == recipe
    x = torch.randn(96, 16, generator=torch.Generator().manual_seed(0))
    done = quantize_model(load_in_memory(tiny_mlp()), recipe, [x], registry=registry, adapter=PlainMLP())
    assert {r.packing for r in done.sites} == {"partly-binary"}
    save(done.model, tmp_path / "out", registry=registry, adapter="plain-mlp")
    back = load(tmp_path / "out", skeleton=tiny_mlp(seed=5), registry=registry, adapter=PlainMLP())
    assert torch.equal(back(x), done.model(x))
    assert (done.model(x) - tiny_mlp()(x)).norm() < 0.7 * tiny_mlp()(x).norm()


def test_a_decoder_goes_through_whole_and_more_salient_weights_bring_it_nearer(registry):
    recipe = load_recipe("w2a16-pbllm", registry)
    inputs = [tokens(batch=4, length=24, seed=i) for i in range(2)]
    target = tiny_decoder()(inputs[0]).detach()
    gaps = []
    for f in (0.1, 0.5):
        own = replace(recipe, rules=(replace(recipe.rules[0], spec=spec(f)),))
        done = quantize_model(load_in_memory(tiny_decoder()), own, inputs, registry=registry, adapter=TinyDecoderAdapter())
        gaps.append(float((done.model(inputs[0]) - target).norm() / target.norm()))
    assert gaps[1] < 0.5 * gaps[0]


def test_other_solvers_take_the_format_too():
    # column by column, each column having its share of salient codes
    w, gram = heavy_tailed(64, 128), correlated_gram(128)
    q = GPTQ(sweeps=0).solve(w, spec(), {"gram": gram})
    assert int((q.codes >= 2).sum()) <= PartlyBinary(0.1).count(w.numel())
    assert loss(w, q, gram) < loss(w, RTN().solve(w, spec(), {}), gram)
