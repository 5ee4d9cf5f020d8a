"""Coarse and fine weight splitting: the centre of a fused kernel gets a scale of its own, and its rounding error goes where scales are small.

After fusion the centre tap of a 3 × 3 kernel holds the 1 × 1 branch and x itself, and is much larger than its eight neighbours; one scale for all of
them rounds the neighbours away.  The centre c is cut in two, with g = max|c| / qmax:

    c_coarse = floor(c / g + 1/2)·g        c_fine = c - c_coarse,  |c_fine| ≤ g / 2
    W_coarse = a 1 × 1 kernel of c_coarse  W_fine = the ring, with c_fine in its middle
    y = conv(x, Ŵ_coarse, bias) + conv(x, Ŵ_fine)

The coarse weights are multiples of g: where the stored scale is g itself (a spec of `bits` bits, the same granularity, float32 scales) their codes
have no error at all.

Source: https://arxiv.org/abs/2312.10588, and the released code, whose default is mode "centre"; "kernel" is its ablation without centre extraction.
Differs: the coarse part is a 1 × 1 convolution here, 1/9 of the products of the released one, which convolves 3 × 3 kernels with one tap that is not
zero; biases stay float where the release stores 16-bit integers; and qmax is 2^(bits-1) - 1, where its `set_conv_16bit` takes 2^(bits-1), one more
than the largest code.  An input with a scale for each channel, which the release folds into W, does not occur: inputs have one scale.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

import torch
from qcore.calibration.observer import Observer, Seen
from qcore.errors import SpecError
from qcore.model.reader import TensorReader
from qcore.model.topology import Port, Site, Topology
from qcore.modules.leaves import leaf_config
from qcore.numbers import Int, QuantSpec
from qcore.transforms.base import Transform
from qcore.transforms.rewrite import Put, Rewrite, Shift
from qcore.transforms.split import Part, split_leaf
from torch import Tensor, nn


def coarse_of(c: Tensor, bits: int, granularity: Literal["channel", "tensor"]) -> tuple[Tensor, Tensor]:
    """The coarse part of weights, and its step.  c: [N, …] → ([N, …], g: [N, 1, …] or one number), float64

    Rounded to the weights' own dtype, so that coarse + fine = c in that dtype too, not only in float64.  All-zero channels have step 0 and stay zero.
    """
    w = c.double()
    largest = w.abs().flatten(1).amax(1) if granularity == "channel" else w.abs().amax()
    step = largest.reshape(-1, *(1,) * (w.ndim - 1)) / ((1 << (bits - 1)) - 1)
    coarse = torch.where(step > 0, torch.floor(w / torch.where(step > 0, step, 1.0) + 0.5) * step, 0.0)
    return coarse.to(c.dtype).double(), step


@dataclass(frozen=True)
class CFWS(Transform):
    """Split convolutions into a coarse and a fine part, each with codes of its own.

    Rules for "*.coarse:weight" and "*.fine:weight" may say how each part is stored; without them both are stored as the rule of the whole says.
    Put it last: sums of leaves have no links.

    sites:       shell patterns over weight sites
    mode:        "centre": the middle tap alone, coarse as a 1 × 1 convolution; kernels of one tap, or of an even size, are left whole.
                 "kernel": the whole kernel, coarse of the same size (the ablation)
    granularity: of the step g: one for each output channel, or one for all
    """

    name: ClassVar[str] = "cfws"
    parts: ClassVar[tuple[str, ...]] = ("coarse", "fine")
    sites: tuple[str, ...] = ("*:weight",)
    mode: Literal["centre", "kernel"] = "centre"
    granularity: Literal["channel", "tensor"] = "channel"

    def __post_init__(self) -> None:
        for name, value, known in (("mode", self.mode, ("centre", "kernel")), ("granularity", self.granularity, ("channel", "tensor"))):
            if value not in known:
                raise SpecError(f"cfws has {name} {' or '.join(known)}, got {value!r}")

    def wants(self, topology: Topology, specs: Mapping[Site, QuantSpec]) -> Mapping[Site, tuple[Observer, ...]]:
        return {}

    def fit(self, topology: Topology, specs: Mapping[Site, QuantSpec], seen: Mapping[Site, Seen], model: nn.Module, reader: TensorReader) -> Rewrite:
        rewrite = Rewrite()
        for site in topology.sites:
            if site not in specs or not any(fnmatchcase(str(site), pattern) for pattern in self.sites):
                continue
            module: Any = model.get_submodule(site.module)
            if not isinstance(module, nn.Conv2d):
                continue
            fmt = specs[site].format
            if not isinstance(fmt, Int) or fmt.bits < 2:
                raise SpecError(
                    f"{site}: cfws cuts weights at steps of an integer grid of 2 bits or more, got {specs[site]}; leave the site out, or use int"
                )
            weight = reader[site.param]
            if self.mode == "kernel":
                rewrite = rewrite.then(_whole(site, module, weight, fmt.bits, self.granularity))
            elif (why := not_centred(module)) is None:
                rewrite = rewrite.then(_centre(site, module, weight, fmt.bits, self.granularity))
            else:
                rewrite = rewrite.then(Rewrite(notes=(f"{site} is left whole: {why}",)))
        return rewrite


def not_centred(conv: Any) -> str | None:
    """Why a kernel has no middle tap that a 1 × 1 convolution could be; None where it has."""
    if all(k == 1 for k in conv.kernel_size):
        return "its kernel has one tap, there is no ring around it"
    if any(k % 2 == 0 for k in conv.kernel_size):
        return f"a kernel of {'×'.join(map(str, conv.kernel_size))} has no middle tap"
    if conv.padding == "same":
        return None
    paddings = (0, 0) if conv.padding == "valid" else conv.padding
    reach = [d * (k // 2) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    if any(p < r for p, r in zip(paddings, reach, strict=True)):
        return f"padding {tuple(paddings)} is less than the kernel's reach {tuple(reach)}: its middle tap does not see the border, as a 1 × 1 would"
    if conv.padding_mode != "zeros" and any(p != r for p, r in zip(paddings, reach, strict=True)):
        return f"it pads with {conv.padding_mode} beyond its reach"
    return None


def _centre(site: Site, conv: Any, weight: Tensor, bits: int, granularity: Literal["channel", "tensor"]) -> Rewrite:
    rows, columns = (k // 2 for k in conv.kernel_size)
    coarse, _ = coarse_of(weight[:, :, rows : rows + 1, columns : columns + 1], bits, granularity)
    inside = torch.zeros(weight.shape, dtype=torch.float64)
    inside[:, :, rows : rows + 1, columns : columns + 1] = coarse
    leaf = leaf_config(conv)
    reach = [d * (k // 2) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    beyond = [0, 0] if isinstance(conv.padding, str) else [p - r for p, r in zip(conv.padding, reach, strict=True)]
    point = {**leaf, "kernel_size": [1, 1], "dilation": [1, 1], "padding": beyond}
    return split_leaf(
        site.module,
        conv,
        Part(point, {"weight": (Put(Port("", "out"), coarse),)}, bias=leaf["bias"]),
        Part({**leaf, "bias": False}, {"weight": (Shift(Port("", "out"), -inside),)}),
    )


def _whole(site: Site, conv: Any, weight: Tensor, bits: int, granularity: Literal["channel", "tensor"]) -> Rewrite:
    coarse, _ = coarse_of(weight, bits, granularity)
    leaf = leaf_config(conv)
    return split_leaf(
        site.module,
        conv,
        Part(leaf, {"weight": (Put(Port("", "out"), coarse),)}, bias=leaf["bias"]),
        Part({**leaf, "bias": False}, {"weight": (Shift(Port("", "out"), -coarse),)}),
    )
