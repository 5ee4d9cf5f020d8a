"""The formats as ordinary ones of qcore: packing, modules, checkpoints, recipes, plans and lists."""

import copy
import json

import pytest
import torch
from qcore.checkpoint import load, save
from qcore.errors import SpecError
from qcore.modules import QuantizedLinear
from qcore.numbers import PerGroup, QTensor, QuantSpec, Tile, fake_quantize, int_weight, mx, quantize, spec_from_dict, spec_to_dict
from qcore.ops import ReferenceLinear
from qcore.packing import Bits, first_that_accepts
from qcore.pipeline import load_in_memory, quantize_model
from qcore.plan import make_plan
from qcore.plugins import load_registry
from qcore.recipe_file import dump, load_recipe, parse_recipe
from qcore.solvers import GPTQ, RTN
from qcore.testing import check_kernel, check_packing
from qcore.testing.models import TinyDecoderAdapter, tiny_decoder, tokens
from qplug_hardware.block_float import BBFP, BFP, bbfp, bfp, gse
from qplug_hardware.stream import ROW, BlockStream, from_stream, to_stream
from torch import nn

RECIPES = ["bbfp3-w5a5", "bbfp4-w6a6", "bbfp6-w8a8", "bfp4-w5a5", "bfp5-w6a6", "bfp7-w8a8"]
PAIRS = [(1, 0), (3, 1), (4, 2), (6, 3), (8, 4), (12, 6)]


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def decoder() -> nn.Module:
    return tiny_decoder(hidden=64, intermediate=96)


def odd(spec: QuantSpec) -> QuantSpec:
    return QuantSpec(format=spec.format, granularity=Tile(1, 32), scale=spec.scale)


# packing --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_streams_give_every_part_back(pair):
    check_packing(BlockStream(), bbfp(*pair))
    check_packing(BlockStream(), bfp(pair[0]))


@pytest.mark.parametrize("shape", [(1, 1), (3, 45), (7, 33), (5, 31), (1, 97), (13, 5)])
def test_odd_lengths_come_back_bit_for_bit(shape):
    for pair in PAIRS:
        check_packing(BlockStream(), odd(bbfp(*pair)), shape)


@pytest.mark.parametrize("bits", range(2, 15))
@pytest.mark.parametrize("count", [0, 1, 7, ROW - 1, ROW, ROW + 3, 2 * ROW])
def test_long_streams_are_those_of_one_row(bits, count):
    from qkernels.int_pack import pack

    codes = torch.randint(0, 1 << bits, (count,), generator=torch.Generator().manual_seed(bits), dtype=torch.int32)
    stream = to_stream(codes, bits)
    assert torch.equal(stream, pack(codes, bits))
    assert torch.equal(from_stream(stream, bits, (count,)).int(), codes)


def test_a_stream_holds_exactly_m_plus_two_and_five_32nds_bits():
    for m, o in PAIRS:
        packed = BlockStream().pack(quantize(rand(16, 256), bbfp(m, o)))
        assert sum(8 * t.numel() * t.element_size() for t in packed.values()) == 16 * 256 * (m + 2 + 5 / 32)
    # rows of three exponents: 15 bits, which `bits` makes 16
    q = quantize(rand(16, 96), bbfp(4, 2))
    size = {p.name: sum(t.numel() for t in p.pack(q).values()) for p in (BlockStream(), Bits())}
    assert size == {"block-stream": 16 * 96 * 6 // 8 + 16 * 3 * 5 // 8, "bits": 16 * 96 * 6 // 8 + 16 * 2}


def test_streams_are_what_is_taken_and_refuse_what_they_do_not_hold():
    packings = [cls() for cls in load_registry().packings.values()]
    assert first_that_accepts(packings, bbfp(4, 2), (8, 64)).name == "block-stream"
    for spec, words in [
        (int_weight(4, 32), "holds bfp and bbfp"),
        (bbfp(4, 2, when="dynamic"), "dynamic"),
        (QuantSpec(format=BBFP(4, 2), granularity=PerGroup(32), scale="float16"), "needs shared exponents"),
        (gse(5, bias="tensor"), "needs shared exponents"),
    ]:
        assert words in (BlockStream().refuses(spec, (8, 64)) or ""), spec
    assert "does not divide K=45" in (BlockStream().refuses(bbfp(4, 2), (8, 45)) or "")
    assert BlockStream().refuses(mx(BBFP(4, 2)), (8, 64)) is None


def test_codes_beyond_their_bits_and_streams_of_another_length_are_refused():
    q = quantize(rand(2, 32), bbfp(4, 2))
    with pytest.raises(SpecError, match=r"codes run from .* to 64, which 6 bits cannot hold"):
        BlockStream().pack(QTensor(q.spec, {**q.parts, "codes": torch.full_like(q.codes, 64)}, q.shape))
    packed = BlockStream().pack(q)
    with pytest.raises(SpecError, match="the stored stream does not fit"):
        BlockStream().unpack({**packed, "codes": packed["codes"][:-1]}, q.spec, q.shape)


def test_every_other_packing_of_the_core_that_accepts_them_is_exact_too():
    for spec in (bbfp(4, 2), bbfp(8, 4), gse(6, bias="tensor")):
        check_packing(Bits(), spec)


# running --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [bbfp(4, 2), bbfp(8, 4), bfp(5)], ids=str)
def test_the_reference_kernel_runs_the_packed_weight(spec):
    check_kernel(ReferenceLinear(), BlockStream(), spec)
    dynamic = QuantSpec(format=spec.format, granularity=spec.granularity, scale=spec.scale, when="dynamic")
    check_kernel(ReferenceLinear(), BlockStream(), spec, activation=dynamic)


def test_a_linear_layer_multiplies_what_both_sides_stand_for():
    w, x = quantize(rand(16, 64), bbfp(4, 2)), rand(2, 5, 64, seed=1)
    layer = QuantizedLinear(BlockStream().pack(w), w.spec, w.shape, BlockStream(), activation=bbfp(6, 3, when="dynamic"))
    torch.testing.assert_close(layer(x), fake_quantize(x, bbfp(6, 3)) @ w.dequantize().T)
    half = layer.to(torch.bfloat16)
    assert torch.equal(half.qtensor().codes, w.codes)


def test_inputs_with_nan_are_refused_when_the_layer_runs():
    w = quantize(rand(4, 32), bbfp(4, 2))
    layer = QuantizedLinear(BlockStream().pack(w), w.spec, w.shape, BlockStream(), activation=bbfp(4, 2, when="dynamic"))
    with pytest.raises(SpecError, match="NaN or infinite"):
        layer(torch.full((1, 32), torch.nan))


def test_solvers_of_the_core_work_on_it():
    """GPTQ's loss tr(ΔW G ΔWᵀ) is below that of nearest rounding, on inputs that are correlated."""
    x = rand(512, 64) @ rand(64, 64, seed=1)
    gram, w = x.T @ x, rand(24, 64, seed=2)
    loss = {}
    for name, solver in {"nearest": RTN(clip="none"), "searched": RTN(), "gptq": GPTQ()}.items():
        delta = solver.solve(w, bbfp(4, 2), {"gram": gram}).dequantize() - w
        loss[name] = float((delta @ gram @ delta.T).trace())
    assert loss["gptq"] < 0.7 * loss["nearest"], loss


def test_specs_are_plain_data():
    formats = load_registry().formats
    for spec in (bbfp(4, 2), bfp(5, when="dynamic"), gse(6, bias="tensor", rounding="truncate")):
        assert spec_from_dict(json.loads(json.dumps(spec_to_dict(spec))), formats) == spec


# recipes --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_a_whole_run_is_planned_counted_saved_and_loaded_again(name, tmp_path):
    registry = load_registry()
    recipe = load_recipe(name, registry)
    assert parse_recipe(dump(recipe), registry, name) == recipe
    model = decoder()
    plan = make_plan(load_in_memory(copy.deepcopy(model)), recipe, TinyDecoderAdapter(), registry)
    assert not plan.problems, plan.problems
    done = quantize_model(load_in_memory(copy.deepcopy(model)), recipe, [tokens()], registry=registry, adapter=TinyDecoderAdapter())
    leaves = [m for m in done.model.modules() if isinstance(m, QuantizedLinear)]
    assert leaves and all(m.packing.name == "block-stream" and m.activation is not None for m in leaves)
    fmt = leaves[0].spec.format
    assert isinstance(fmt, BFP | BBFP)
    weights = sum(s.shape[0] * s.shape[1] for s in done.sites)
    assert sum(8 * s.nbytes for s in done.sites) == weights * (fmt.bits + 5 / 32)
    save(done.model, tmp_path / "out")
    back = load(tmp_path / "out", skeleton=copy.deepcopy(model))
    with torch.no_grad():
        assert torch.equal(back(tokens(seed=9)), done.model(tokens(seed=9)))
    for path, m in done.model.named_modules():
        if isinstance(m, QuantizedLinear):
            other = back.get_submodule(path)
            assert other.spec == m.spec and other.activation == m.activation and torch.equal(other.qtensor().codes, m.qtensor().codes)
            assert torch.equal(other.dequantize(), fake_quantize(model.get_submodule(path).weight.detach(), m.spec))


def test_recipes_at_one_size_differ_in_the_format_alone():
    registry = load_registry()
    for ours, plain in [("bbfp3-w5a5", "bfp4-w5a5"), ("bbfp4-w6a6", "bfp5-w6a6"), ("bbfp6-w8a8", "bfp7-w8a8")]:
        specs = [[r.spec for r in load_recipe(n, registry).rules] for n in (ours, plain)]
        for a, b in zip(*specs, strict=True):
            assert a is not None and b is not None
            assert a.bits_per_value((64, 256)) == b.bits_per_value((64, 256)) and (a.granularity, a.scale, a.when) == (b.granularity, b.scale, b.when)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rules.0.format.overlap=4", r"rules.0.format: .*use format 'bfp'"),
        ("rules.0.format.mantisa=4", "mantisa"),
        ("rules.1.format.corner=wrap", r"rules.1.format.*promote.*clip"),
        ("rules.0.scale.format.bits=9", r"2 to 7 bits"),
    ],
)
def test_a_recipe_with_an_impossible_format_is_refused_by_its_place(override, words):
    with pytest.raises(SpecError, match=words):
        load_recipe("bbfp4-w6a6", load_registry(), (override,))


def test_a_plan_says_that_blocks_do_not_divide_before_any_computing():
    recipe = load_recipe("bbfp4-w6a6", load_registry())
    plan = make_plan(load_in_memory(tiny_decoder(hidden=48, intermediate=80)), recipe, TinyDecoderAdapter(), load_registry())
    assert any("group size 32 does not divide K=" in str(p) for p in plan.problems), plan.problems


def test_everything_is_found_in_the_list_of_methods():
    from qcore.cli.methods import described

    found = {(r["kind"], r["name"]) for r in described(load_registry()) if r["from"] == "qplug-hardware"}
    assert {("format", "bbfp"), ("format", "bfp"), ("format", "shared-exponent"), ("packing", "block-stream")} <= found
