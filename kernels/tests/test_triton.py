"""Triton kernels under its interpreter against their references: sizes that nothing divides, one row, no row, strided inputs, bad input."""

from itertools import pairwise

import pytest
import torch

pytest.importorskip("triton")

from qkernels import _gpu, fp4_linear, grouped_linear, hadamard_quantize, int_linear, int_pack, kv_attention, quantize_rows, weight_linear
from qkernels.fp4_linear import triton as fp4_gpu
from qkernels.grouped_linear import triton as grouped_gpu
from qkernels.hadamard_quantize import triton as hadamard_gpu
from qkernels.int_linear import triton as int_gpu
from qkernels.int_pack import triton as pack_gpu
from qkernels.kv_attention import triton as attention_gpu
from qkernels.quantize_rows import triton as rows_gpu
from qkernels.weight_linear import triton as weight_gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALVES = [torch.float16, torch.bfloat16]
EPS = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@pytest.fixture
def rand():
    g = torch.Generator().manual_seed(0)

    def make(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=g).to(DEVICE, dtype)

    return make


def a_weight(rand, bits, *shape, group):
    half = 1 << (bits - 1)
    codes = (rand(*shape) * half / 3).round().clamp(-half, half - 1).to(torch.int8)
    words = int_pack.pack(codes.to(torch.int32) + half, bits, torch.int32)
    return codes, words, rand(*shape[:-1], shape[-1] // group).abs() * 0.02 + 1e-3


def close(y, want, x, w, dtype):
    """Weights and the result are rounded to the dtype of x, each product by half a step of it."""
    size = x.float().abs().reshape(-1, x.shape[-1]) @ w.abs().T
    assert ((y.float() - want.float()).abs().reshape(size.shape) <= 2 * EPS[dtype] * size + 1e-6).all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("t", "n", "k", "group"), [(1, 64, 64, 64), (21, 70, 192, 64), (3, 33, 96, 32), (65, 16, 144, 48)])
def test_weight_linear(rand, t, n, k, group, bits, dtype):
    codes, words, scale = a_weight(rand, bits, n, k, group=group)
    x = rand(t, k, dtype=dtype)
    for shift in (None, rand(n, k // group) * 0.1):
        w = weight_linear.reference.dequantize(codes, scale, shift)
        close(weight_gpu.weight_linear(x, words, scale, shift, bits=bits), weight_linear.reference.weight_linear(x, codes, scale, shift), x, w, dtype)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("t", "n", "k", "group"), [(1, 64, 64, 64), (21, 70, 192, 96), (65, 33, 128, 128)])
def test_int_linear(rand, t, n, k, group, bits):
    codes, words, scale = a_weight(rand, bits, n, k, group=group)
    x = rand(t, k)
    q, x_scale = rows_gpu.quantize_rows(x)
    for shift in (None, rand(n, k // group) * 0.1):
        y = int_gpu.int_linear(q, x_scale, words, scale, shift, bits=bits, dtype=torch.float32)
        want = int_linear.reference.int_linear(x, codes, scale, shift)
        # integer sums are exact: what remains is float32 rounding of the groups
        torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_quantize_rows_bit_for_bit(rand, dtype):
    x = (rand(12, 577) * torch.logspace(-12, 4, 12, device=DEVICE)[:, None]).to(dtype)
    x[3], x[4] = 0, -x[4].abs()
    for scale in (None, torch.tensor(0.037, device=DEVICE)):
        for got, want in zip(rows_gpu.quantize_rows(x, scale), quantize_rows.reference.quantize_rows(x, scale), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("t", "n", "k"), [(1, 64, 64), (21, 70, 160)])
def test_fp4_linear(rand, t, n, k, dtype):
    g = torch.Generator().manual_seed(1)
    packed = torch.randint(0, 256, (n, k // 2), generator=g, dtype=torch.uint8).to(DEVICE)
    mx = torch.randint(120, 130, (n, k // 32), generator=g, dtype=torch.uint8).to(DEVICE)
    mx[0, 0] = 0  # 2^-127
    nv = (rand(n, k // 16).abs() * 100).to(torch.float8_e4m3fn)
    nv[1] = 0.003  # subnormal
    x = rand(t, k, dtype=dtype)
    for scale, tensor_scale in ((mx, None), (nv, torch.tensor(0.01, device=DEVICE))):
        w = fp4_linear.reference.dequantize(packed, scale, tensor_scale)
        want = fp4_linear.reference.fp4_linear(x, packed, scale, tensor_scale)
        close(fp4_gpu.fp4_linear(x, packed, scale, tensor_scale), want, x, w, dtype)


def test_every_scale_of_e4m3_and_every_code_of_e2m1_is_decoded(rand):
    codes = torch.arange(127, dtype=torch.uint8).repeat_interleave(1)  # all finite numbers that are not negative
    scale = codes.view(torch.float8_e4m3fn)[:, None].to(DEVICE)
    packed = (torch.arange(8, dtype=torch.uint8) * 2 + (torch.arange(8, dtype=torch.uint8) * 2 + 1) * 16).repeat(127, 1).to(DEVICE)
    x = torch.eye(16, dtype=torch.bfloat16, device=DEVICE)
    y = fp4_gpu.fp4_linear(x, packed, scale, torch.ones((), device=DEVICE))
    # a product of two and four bits of mantissa fits the eight of bfloat16
    assert torch.equal(y.float().T, fp4_linear.reference.dequantize(packed, scale, torch.ones((), device=DEVICE)))


def paley(n):
    """A Hadamard matrix of 12, by quadratic residues modulo 11."""
    q = n - 1
    squares = {i * i % q for i in range(1, q)}
    chi = torch.tensor([[0 if i == j else 1 if (j - i) % q in squares else -1 for j in range(q)] for i in range(q)])
    h = torch.ones(n, n)
    h[1:, 1:] = chi + torch.eye(q)
    h[1:, 0] = -1
    assert torch.equal(h @ h.T, n * torch.eye(n))
    return h


@pytest.mark.parametrize(("k", "m"), [(64, 1), (1024, 1), (192, 12)])
def test_hadamard_quantize(rand, k, m):
    small = None if m == 1 else paley(m).to(DEVICE)
    x = rand(5, k)
    x[1] = 0
    q, scale = hadamard_gpu.hadamard_quantize(x, small)
    want, want_scale = hadamard_quantize.reference.hadamard_quantize(x, small)
    torch.testing.assert_close(scale, want_scale, rtol=1e-5, atol=0)
    # sums in another order: a value in the middle between two codes may go to the other
    assert (q.int() - want.int()).abs().max() <= 1 and (q != want).float().mean() < 1e-2


@pytest.mark.parametrize("bits", [4, 8])
def test_words_bit_for_bit(rand, bits):
    w, scale = rand(7, 96), rand(7, 3).abs() * 0.3
    scale[2] = 0
    words = pack_gpu.quantize_pack(w, scale, bits=bits)
    assert torch.equal(words, int_pack.quantize_pack(w, scale, bits=bits))
    values = pack_gpu.dequantize(words, scale, bits=bits, dtype=torch.float32)
    assert torch.equal(values, int_pack.dequantize(words, scale, bits=bits, count=96))


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("counts", [[1, 0, 3], [0, 0, 5], [70, 1, 0], [0, 0, 0]])
def test_grouped_linear(rand, counts, bits, shifted):
    codes, words, scale = a_weight(rand, bits, len(counts), 20, 64, group=32)
    shift = rand(len(counts), 20, 2) * 0.1 if shifted else None
    # two rows of no expert at the end
    x = rand(sum(counts) + 2, 64, dtype=torch.bfloat16)
    ends = torch.tensor(counts, dtype=torch.int32, device=DEVICE).cumsum(0).to(torch.int32)
    y = grouped_gpu.grouped_linear(x, ends, words, scale, shift, bits=bits)
    want = grouped_linear.reference.grouped_linear(x, ends, codes, scale, shift)
    assert not y[-2:].any() and not want[-2:].any()
    dequantized = [weight_linear.reference.dequantize(codes[e], scale[e], None if shift is None else shift[e]) for e in range(len(counts))]
    close(y, want, x, torch.stack(dequantized).abs().amax(0), torch.bfloat16)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("heads", "cached"), [(4, 4), (9, 3)])
def test_kv_attention(rand, heads, cached, bits):
    b, s, d = 2, 70, 32
    q = rand(b, heads, d, dtype=torch.float16)
    k, v = (
        torch.randint(0, 256, (b, cached, s, d * bits // 8), generator=torch.Generator().manual_seed(i), dtype=torch.uint8).to(DEVICE) for i in (1, 2)
    )
    k_scale, v_scale = (rand(b, cached, s).abs() / (1 << (bits - 1)) for _ in range(2))
    lengths = torch.tensor([70, 1], dtype=torch.int32, device=DEVICE)
    y = attention_gpu.kv_attention(q, k, k_scale, v, v_scale, lengths, bits=bits)
    want = kv_attention.reference.kv_attention(q, k, k_scale, v, v_scale, lengths, bits=bits)
    # attention weights rounded to 11 bits, values up to a few units
    torch.testing.assert_close(y.float(), want.float(), rtol=0, atol=4 * 2.0**-11 * float(want.float().abs().max()))


def strided(t):
    """The same numbers, with a stride of 2 in the last axis."""
    return torch.stack([t, t], -1)[..., 0]


def arguments(rand):
    """Of each op: a call, what it is called with, which of those have a row for each row of the result."""
    g = torch.Generator().manual_seed(3)

    def codes(*shape, dtype=torch.uint8, high=256):
        return torch.randint(0, high, shape, generator=g).to(DEVICE, dtype)

    _, words, scale = a_weight(rand, 4, 20, 64, group=32)
    _, stack, scales = a_weight(rand, 4, 3, 20, 64, group=32)
    x = rand(3, 64, dtype=torch.float16)
    q, x_scale = rows_gpu.quantize_rows(x)
    cache = {name: codes(3, 2, 5, 32) for name in ("k", "v")} | {name: rand(3, 2, 5).abs() / 128 for name in ("k_scale", "v_scale")}
    cache["lengths"] = torch.tensor([5, 1, 3], dtype=torch.int32, device=DEVICE)
    ends = torch.tensor([1, 1, 3], dtype=torch.int32, device=DEVICE)
    return {
        "weight_linear": (weight_gpu.weight_linear, {"x": x, "words": words, "scale": scale, "bits": 4}, ("x",)),
        "int_linear": (int_gpu.int_linear, {"q": q, "x_scale": x_scale, "words": words, "scale": scale, "bits": 4}, ("q", "x_scale")),
        "quantize_rows": (rows_gpu.quantize_rows, {"x": x}, ("x",)),
        "fp4_linear": (fp4_gpu.fp4_linear, {"x": x, "packed": codes(20, 32), "scale": codes(20, 2, high=130)}, ("x",)),
        "hadamard_quantize": (hadamard_gpu.hadamard_quantize, {"x": x}, ("x",)),
        "grouped_linear": (grouped_gpu.grouped_linear, {"x": x, "ends": ends, "words": stack, "scale": scales, "bits": 4}, ("x",)),
        "kv_attention": (
            attention_gpu.kv_attention,
            {"q": rand(3, 4, 32, dtype=torch.float16), **cache, "bits": 8},
            ("q", *cache),
        ),
        "quantize_pack": (pack_gpu.quantize_pack, {"w": rand(3, 64), "scale": rand(3, 2).abs(), "bits": 4}, ("w", "scale")),
        "dequantize": (pack_gpu.dequantize, {"words": words[:3], "scale": scale[:3], "bits": 4}, ("words", "scale")),
    }


def outputs(y):
    return y if isinstance(y, tuple) else (y,)


LINEARS = ["weight_linear", "int_linear", "fp4_linear", "grouped_linear"]
EVERY_OP = [*LINEARS, "quantize_rows", "hadamard_quantize", "kv_attention", "quantize_pack", "dequantize"]


@pytest.mark.parametrize("name", EVERY_OP)
def test_tensors_may_be_strided(rand, name):
    call, given, _ = arguments(rand)[name]
    spread = {key: strided(t) if isinstance(t, torch.Tensor) else t for key, t in given.items()}
    assert not any(t.is_contiguous() for t in spread.values() if isinstance(t, torch.Tensor))
    for got, want in zip(outputs(call(**spread)), outputs(call(**given)), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", EVERY_OP)
def test_there_may_be_no_rows_or_one(rand, name):
    call, given, by_row = arguments(rand)[name]
    whole = outputs(call(**given))
    none = {key: t[:0] if key in by_row else t for key, t in given.items()}
    one = {key: t[:1] if key in by_row else t for key, t in given.items()}
    if name == "grouped_linear":
        none["ends"], one["ends"] = given["ends"] * 0, given["ends"].clamp(max=1)
    for got, first, want in zip(outputs(call(**none)), outputs(call(**one)), whole, strict=True):
        assert got.shape == (0, *want.shape[1:]) and got.dtype == want.dtype
        assert torch.equal(first, want[:1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w, s: weight_gpu.weight_linear(x, w, s, bits=3), "bits: got 3; allowed: 4, 8"),
        (lambda x, w, s: weight_gpu.weight_linear(x.float(), w, s, bits=4), "x: has shape .* float32; allowed: .* float16, bfloat16"),
        (lambda x, w, s: weight_gpu.weight_linear(x, w[:, 1:], s, bits=4), r"words: has shape \[16, 7\], int32; allowed: \[any, 8\]"),
        (
            lambda x, w, s: weight_gpu.weight_linear(x, w, s.repeat(1, 4), bits=4),
            "scale: has 8 groups of 8 inputs; allowed: .* multiples of 16",
        ),
        (lambda x, w, s: weight_gpu.weight_linear(x, w, s.repeat(1, 3), bits=4), "scale: has 6 groups; allowed: a divisor of K=64"),
        (lambda x, w, s: weight_gpu.weight_linear(x, w.to("meta"), s, bits=4), "words: is on meta; allowed: "),
        (lambda x, w, s: fp4_gpu.fp4_linear(x, w.view(torch.uint8), torch.zeros(16, 4)), "scale: has shape"),
        (lambda x, w, s: hadamard_gpu.hadamard_quantize(x[:, :48]), "x: has K=48 with a small matrix of 1; allowed: K = m · 2"),
    ],
)
def test_bad_input_is_named(rand, call, message):
    _, words, scale = a_weight(rand, 4, 16, 64, group=32)
    with pytest.raises(ValueError, match=message):
        call(rand(2, 64, dtype=torch.float16), words, scale)


# more rows than 32 bits can count the elements of -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "widths"), [(1, (64, 64)), (2**19, (8192, 4096)), (700_001, (4096, 14336)), (5, (2**31, 1))])
def test_pieces_are_all_rows_in_order_and_no_offset_needs_more_than_32_bits(rows, widths):
    found = _gpu.pieces(rows, *widths)
    assert found[0].start == 0 and found[-1].stop == rows and all(a.stop == b.start for a, b in pairwise(found))
    assert all((s.stop - s.start) * max(widths) <= 2**31 - 1 or s.stop - s.start == 1 for s in found)


def test_linear_layers_in_pieces_are_those_in_one(rand, monkeypatch):
    _, words, scale = a_weight(rand, 4, 48, 64, group=32)
    x = rand(150, 64, dtype=torch.bfloat16)
    q, x_scale = quantize_rows.reference.quantize_rows(x.float())
    packed = torch.randint(0, 256, (48, 32), dtype=torch.uint8, device=DEVICE)
    sizes = torch.randint(120, 130, (48, 2), dtype=torch.uint8, device=DEVICE)

    def results():
        return (
            weight_gpu.weight_linear(x, words, scale, bits=4),
            int_gpu.int_linear(q, x_scale, words, scale, bits=4, dtype=torch.float32),
            fp4_gpu.fp4_linear(x, packed, sizes),
        )

    whole = results()
    monkeypatch.setattr(_gpu, "LARGEST", 64 * 64)
    assert len(_gpu.pieces(150, 64, 48)) == 3
    for a, b in zip(whole, results(), strict=True):
        assert torch.equal(a, b)
