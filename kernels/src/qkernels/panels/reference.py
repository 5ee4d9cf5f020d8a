"""Lay an integer weight out in panels, and back.  The drawing is in README.md."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qkernels._check import FLOATING, require, require_choice

LANES = 16
SCALES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Panels:
    """A weight [N, K] whose values are code · scale + shift.

    codes: [P, K/8, 16, 4] uint8 for 4 bits, [P, K/4, 16, 4] for 8; P = ceil(N / 16)
    scale: [P, K/G, 16] float32, float16 or bfloat16
    shift: [P, K/G, 16] float32, or None
    """

    codes: Tensor
    scale: Tensor
    shift: Tensor | None
    shape: tuple[int, int]
    group: int
    bits: int

    def __post_init__(self) -> None:
        # the native kernels read these by address
        n, k = self.shape
        require_choice("bits", self.bits, (4, 8))
        step, panels = 32 // self.bits, -(-n // LANES)
        if self.group <= 0 or k % self.group or self.group % step:
            raise ValueError(f"group: got {self.group} with K={k}; allowed: divisors of K that are multiples of {step} for {self.bits} bits")
        require("codes", self.codes, (panels, k // step, LANES, 4), (torch.uint8,))
        require("scale", self.scale, (panels, k // self.group, LANES), SCALES, self.codes)
        if self.shift is not None:
            require("shift", self.shift, (panels, k // self.group, LANES), (torch.float32,), self.codes)
        for name, t in (("codes", self.codes), ("scale", self.scale), ("shift", self.shift)):
            if t is not None and not t.is_contiguous():
                raise ValueError(f"{name}: has strides {list(t.stride())}; allowed: contiguous tensors")

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scale, self.shift) if t is not None)


def pack(codes: Tensor, scale: Tensor, shift: Tensor | None = None, *, bits: int) -> Panels:
    """The panels of a weight.

    codes: [N, K] int8, -2^(bits-1) … 2^(bits-1) - 1
    scale: [N, K/G] float; G is a multiple of 32 / bits
    shift: [N, K/G] float, added to code · scale; None = nothing
    bits:  4 or 8
    """
    if bits not in (4, 8):
        raise ValueError(f"bits: got {bits}; allowed: 4, 8")
    if codes.dim() != 2 or codes.dtype is not torch.int8:
        raise ValueError(f"codes: has shape {list(codes.shape)}, {codes.dtype}; allowed: [N, K] int8")
    n, k = codes.shape
    if scale.dim() != 2 or scale.shape[0] != n or scale.dtype not in SCALES or not scale.shape[1] or k % scale.shape[1]:
        raise ValueError(f"scale: has shape {list(scale.shape)}, {scale.dtype}; allowed: [{n}, groups of K={k}] of float32, float16, bfloat16")
    require("scale", scale, (n, None), SCALES, codes)
    if shift is not None:
        require("shift", shift, tuple(scale.shape), FLOATING, codes)
    group, step = k // scale.shape[1], 32 // bits
    if group % step:
        raise ValueError(f"scale: {scale.shape[1]} groups of K={k} are {group} inputs each; allowed: multiples of {step} for {bits} bits")
    half = 1 << (bits - 1)
    if codes.numel() and (int(codes.min()) < -half or int(codes.max()) >= half):
        raise ValueError(f"codes: run from {int(codes.min())} to {int(codes.max())}; allowed: {-half} … {half - 1}")
    raised = (_whole_panels(codes).to(torch.int16) + half).to(torch.uint8)
    panels = -(-n // LANES)
    if bits == 4:
        halves = raised.reshape(panels, LANES, k // 8, 2, 4)
        raised = halves[..., 0, :] | (halves[..., 1, :] << 4)
    return Panels(
        codes=raised.reshape(panels, LANES, k // step, 4).transpose(1, 2).contiguous(),
        scale=_lanes_last(scale),
        shift=None if shift is None else _lanes_last(shift.float()),
        shape=(n, k),
        group=group,
        bits=bits,
    )


def unpack(panels: Panels) -> tuple[Tensor, Tensor, Tensor | None]:
    """(codes [N, K] int8, scale [N, K/G], shift [N, K/G] or None): what was packed."""
    n, k = panels.shape
    lanes = panels.codes.transpose(1, 2)  # [P, 16, K/step, 4]
    if panels.bits == 4:
        lanes = torch.stack([lanes & 15, lanes >> 4], -2)
    codes = (lanes.reshape(-1, k).to(torch.int16) - (1 << (panels.bits - 1))).to(torch.int8)

    def rows(t: Tensor) -> Tensor:
        return t.transpose(1, 2).reshape(-1, t.shape[1])[:n]

    return codes[:n], rows(panels.scale), None if panels.shift is None else rows(panels.shift)


def _whole_panels(t: Tensor) -> Tensor:
    """Rows of zeros below, up to a multiple of 16."""
    return torch.nn.functional.pad(t, (0, 0, 0, -t.shape[0] % LANES))


def _lanes_last(t: Tensor) -> Tensor:
    """[N, K/G] → [P, K/G, 16]"""
    t = _whole_panels(t)
    return t.reshape(-1, LANES, t.shape[1]).transpose(1, 2).contiguous()
