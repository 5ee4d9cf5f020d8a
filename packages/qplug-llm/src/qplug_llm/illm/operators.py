"""The dynamic integer-only operators of I-LLM: products, exponential, softmax, SwiGLU, norms, addition, rotary embedding, argmax.

Plain functions of integer tensors, row by row: a row's result depends on that row alone, whatever else is in the batch.

Source: I-LLM, https://arxiv.org/abs/2405.17849, equations 2 to 10 and algorithms 1 to 4.
"""

from typing import Literal

import torch
from torch import Tensor

from qplug_llm.illm.dyadic import Dyadic, Wide, aligned, limited, requantize, step
from qplug_llm.illm.rounding import divide_floor, divide_half_away, isqrt, msb, shift_floor, shift_right

ExpMode = Literal["paper", "q16"]

ROPE_BITS = 14  # cos and sin are int16 in units of 2^-14
_NORM_BITS = 20  # of a row before its squares are summed: 2^(2·20) times 2^20 channels stay inside int64
_MEAN_BITS = 36  # of a row before its mean is taken away
_NORM_UNIT = 15  # what a norm gives is in units of 2^-15, before the gain


# products --------------------------------------------------------------------------------------------------------------------------------


def product(x: Dyadic, w: Dyadic) -> Wide:
    """P = (X - zp_x)(W - zp_w)ᵀ, equation 2, in INT32 where K·2^(bits_x + bits_w) < 2^31.  [..., T, K], [..., N, K] → [..., T, N]

    W may have a scale for each of its rows (an output channel, a cached token): m and k of the result differ along its last axis then.
    """
    k = w.codes.shape[-1]
    dtype = torch.int32 if k << (x.bits + w.bits) < 2**31 else torch.int64
    p = x.centred().to(dtype) @ w.centred().to(dtype).mT
    return Wide(p.long(), x.m * w.m.mT, x.k + w.k.mT)


def di_matmul(x: Dyadic, w: Dyadic, bits: int, form: Literal["one-rounding", "paper"] = "one-rounding") -> Dyadic:
    """DI-MatMul, equations 2 to 8: the product, requantized to `bits` by the range of each of its rows."""
    return requantize(aligned(product(x, w)), bits, form)


def mix(p: Dyadic, v: Dyadic) -> Wide:
    """Σ_s p[t, s]·v[s, :] where each row s of v has a scale of its own: v's scales go into the weights first.  [..., T, S], [..., S, D] → [..., T, D]

    A place of weight 0 has no influence, whatever lies there.
    """
    share = aligned(Wide(p.centred(), p.m * v.m.mT, p.k + v.k.mT), 30)
    return Wide(share.x @ v.centred(), share.m, share.k)


# exponential and softmax -----------------------------------------------------------------------------------------------------------------


def di_exp(x: Tensor, m: Tensor, k: Tensor, mode: ExpMode = "q16") -> tuple[Tensor, Tensor]:
    """(e, unit) with e / unit ≈ exp(x·m / 2^k), for x ≤ 0.  x, m, k: broadcast;  |x·m| < 2^53

    Both write e^x as 2^-(p + r) and take 1 - r/2 for 2^-r, which is up to 6.15 % too much.

    mode: "paper": algorithm 1 to the letter.  log2 e ≈ 1.4375 (0.36 % low), and the result has a resolution of T = 2^k / (1.4375·m) alone: with 8-bit
          inputs clipped at 15 (m = 15, k = 8) T is 12, so that everything below e^-2.5 vanishes.
          "q16": log2 e ≈ 369/256, the result in units of 2^-16 whatever the scale of the input is.
    """
    if mode == "paper":
        slope = m + (m >> 1) - (m >> 4)
        # 2^k / slope ≥ 1 is the paper's assumption; a coarser input has a resolution of one
        unit = torch.where(k > 62, 2**62, divide_half_away(torch.ones_like(k) << k.clamp(0, 62), slope)).clamp(min=1)
        q = divide_floor(-x, unit)
        r = x + q * unit  # (-T, 0]
        return shift_floor((r >> 1) + unit, q), unit
    z, n = -x * m * 369, k + 8
    # more than 2^30 steps to a power of two are not told apart; fewer than one: everything but zero vanishes
    z, n = z >> (n - 30).clamp(0, 63), n.clamp(max=30)
    z = torch.minimum(z, torch.full_like(z, 64) << n.clamp(min=0)) << (-n).clamp(0, 16)
    n = n.clamp(min=0)
    p = z >> n
    r = z - (p << n)
    y, shift = (torch.ones_like(z) << n) - (r >> 1), n + p - 16
    return torch.where(shift >= 0, y >> shift.clamp(0, 63), y << (-shift).clamp(0, 16)), torch.full_like(n, 2**16)


def di_clipped_softmax(
    scores: Wide, valid: Tensor | None = None, clip: tuple[int, int] = (15, 0), bits: int = 8, p_out: int = 8, mode: ExpMode = "q16"
) -> Dyadic:
    """DI-ClippedSoftmax, algorithm 2 and equation 10.  scores: x [..., S], m and k [..., 1] → probabilities of scale 2^-(p_out - 1)

    The distance to the row's maximum is clipped at -c and *then* requantized to `bits`, so that one score of -200 does not eat the range of others.

    valid: [..., S] bool; places that are not valid neither move maximum and sum nor get a share, whatever is in them.  A row without any gives zeros
    clip:  c as (m, k), c = m / 2^k; between 10 and 20 the error is flat
    p_out: bits of a probability.  The paper's 8 dominate the error of long rows: 1/128 is more than an even share of 256 tokens
    """
    scores = limited(Wide(scores.x if valid is None else torch.where(valid, scores.x, 0), scores.m, scores.k), 30)
    everywhere = torch.ones_like(scores.x, dtype=torch.bool) if valid is None else valid
    top = torch.where(everywhere, scores.x, -(2**40)).amax(-1, keepdim=True)
    x = torch.where(everywhere, scores.x - top, 0)
    # -c in steps of the row, c·2^k / m; a shift of more than 44 leaves it beyond every distance
    c = shift_right(torch.full_like(scores.k, clip[0]), -(scores.k - clip[1]).clamp(max=44))
    lowest = -divide_floor(c, scores.m)
    x = torch.maximum(x, lowest)
    levels = 2**bits - 1
    delta = (-x.amin(-1, keepdim=True)).clamp(min=1)
    m, k = step(delta, scores.m, scores.k, levels)
    e, _ = di_exp(divide_half_away(x * levels, delta), m, k, mode)
    e = torch.where(everywhere, e, 0)
    total = e.sum(-1, keepdim=True).clamp(min=1)
    p = divide_half_away(e << (p_out - 1), total)
    zero = torch.zeros_like(total)
    return Dyadic(p, zero + 1, zero + p_out - 1, zero, p_out)


# between the products --------------------------------------------------------------------------------------------------------------------


def sigmoid(x: Wide, p_out: int = 16, mode: ExpMode = "q16", form: Literal["stable", "shared-maximum"] = "stable") -> Tensor:
    """σ(x) in units of 2^-(p_out - 1).  x: m and k [..., 1]

    form: "stable": with E = exp(-|x|), 1 / (1 + E) or E / (1 + E).
          "shared-maximum": the paper's e^(x-M) / (e^(x-M) + e^-M) with one maximum M for the row.  Both exponentials vanish where the row also holds
          something large, and σ is wrong by up to 1: kept to show it, and for parity
    """
    if form == "shared-maximum":
        top = x.x.amax(-1, keepdim=True).clamp(min=0)
        over, unit = di_exp(x.x - top, x.m, x.k, mode)
        under, _ = di_exp(-top, x.m, x.k, mode)
        total = over + under
        return torch.where(total > 0, divide_half_away(over << (p_out - 1), total.clamp(min=1)), 0)
    e, unit = di_exp(-x.x.abs(), x.m, x.k, mode)
    return divide_half_away(torch.where(x.x >= 0, unit, e) << (p_out - 1), unit + e)


def di_swiglu(
    gate: Dyadic,
    up: Dyadic,
    smooth: Wide | None = None,
    p_out: int = 16,
    mode: ExpMode = "q16",
    form: Literal["stable", "shared-maximum"] = "stable",
) -> Wide:
    """DI-SwiGLU, algorithm 3: gate ∘ σ(gate ∘ smooth) ∘ up.

    smooth: [C] what the gate is multiplied with inside σ alone: the 1/s that FSBR's split leaves (gate rows times s, up rows by s)
    """
    g, u = gate.centred(), up.centred()
    inside = gate.wide() if smooth is None else aligned(Wide(g * smooth.x, gate.m * smooth.m, gate.k + smooth.k), 24)
    share = sigmoid(inside, p_out, mode, form)
    return Wide(g * u * share, gate.m * up.m, gate.k + up.k + p_out - 1)


def di_norm(x: Wide, gain: Wide | None = None, bias: Wide | None = None, center: bool = False, eps: tuple[int, int] | None = None) -> Wide:
    """DI-Norm, algorithm 4: RMSNorm, or LayerNorm with `center`.  x: [..., C], m and k [..., 1];  gain, bias: x [C] of at most 16 bits, m = 1

    Each row is first shifted to 20 bits, so its squares sum up exactly and x << s gives the very same result.

    eps: ε as (m, k), m / 2^k; None drops it, as the paper does, with a root of at least 1.  A row as small as √ε comes out too large then
    """
    x = limited(x)
    values, k = x.x, x.k
    if center:
        values, up = _to_bits(values, _MEAN_BITS)
        values, k = values - divide_half_away(values.sum(-1, keepdim=True), values.shape[-1]), k + up
    values, up = _to_bits(values, _NORM_BITS)
    square = divide_half_away((values * values).sum(-1, keepdim=True), values.shape[-1])
    if eps is not None:
        # ε in squares of the row's steps, ε·2^2k / m²; 2^45 is a thousand times the largest mean square
        place = 2 * (k + up) - eps[1]
        square = square + divide_half_away(shift_right(torch.full_like(k, eps[0]), -place.clamp(max=45)), x.m * x.m)
    # ten bits more of the root: 2^42 << 20 is what int64 holds
    root = isqrt(square.clamp(max=2**42) << 20).clamp(min=1)
    weight, unit = (torch.ones_like(values[..., :1]), 0) if gain is None else (gain.x, gain.k)
    y = divide_half_away((values * weight) << (_NORM_UNIT + 10), root)
    k_y = torch.zeros_like(x.k) + _NORM_UNIT + unit
    if bias is not None:
        y = y + shift_right(bias.x, bias.k - k_y)
    return Wide(y, torch.ones_like(k_y), k_y)


def _to_bits(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Each row shifted so that its largest magnitude has its highest bit at `bits`, and by how much; to the left exactly."""
    up = bits - msb(x.abs().amax(-1, keepdim=True)).clamp(min=0)
    return shift_right(x, -up), up


def add(a: Wide, b: Wide) -> Wide:
    """a + b at the coarser of both steps, in INT32.  m, k: [..., 1]

    With terms of at most 24 bits (16-bit codes times m) a sum of n of them has at most 24 + log2 n bits: whichever term has the coarser step, all
    others are shifted down to it, and none is ever shifted up.
    """
    k = torch.minimum(a.k, b.k)
    return Wide(shift_right(a.x * a.m, a.k - k) + shift_right(b.x * b.m, b.k - k), torch.ones_like(k), k)


def rotate(x: Wide, cos: Tensor, sin: Tensor) -> Wide:
    """Rotary embedding of halves: x·cos + (-x₂, x₁)·sin.  x: [..., D];  cos, sin: [..., D] in units of 2^-14, |x| < 2^40"""
    half = x.x.shape[-1] // 2
    turned = torch.cat([-x.x[..., half:], x.x[..., :half]], -1)
    return Wide(x.x * cos + turned * sin, x.m, x.k + ROPE_BITS)


def argmax(x: Tensor) -> Tensor:
    """The place of the largest of each row; of equal ones the first.  [..., V] → [...]  (torch.argmax promises no order)"""
    places = torch.arange(x.shape[-1], device=x.device)
    return torch.where(x == x.amax(-1, keepdim=True), places, x.shape[-1]).amin(-1)
