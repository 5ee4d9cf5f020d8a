"""Shapes and packed sizes, on meta tensors."""

from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import nn

from qcore.errors import QcoreError
from qcore.model.layers import layout
from qcore.model.topology import Site
from qcore.numbers import QuantSpec, quantize
from qcore.numbers.granularity import Shape


def context_length(model: nn.Module) -> int | None:
    """How many tokens the model can see, where its config says so."""
    return getattr(getattr(model, "config", None), "max_position_embeddings", None)


def experts_per_token(model: nn.Module) -> int | None:
    """How many experts a token is sent to, where the model's config says so."""
    found = getattr(getattr(model, "config", None), "num_experts_per_tok", None)
    return found if isinstance(found, int) and found > 0 else None


def matrix_shape(module: nn.Module, site: Site) -> Shape:
    """[N, K] of a weight, of one part of a fused stack, or of a slice of its channels; works on meta."""
    param = getattr(module, site.tensor)
    rows, inputs = layout(module, site.tensor).matrix(param).shape
    if site.part is not None:
        rows //= param.shape[0]
    elif site.channels:
        rows = sum(len(r) for r in site.channels)
    return rows, inputs


def packed_bytes(packing: Any, spec: QuantSpec, shape: Shape) -> int:
    """Bytes of the packed parts of such a weight, counted on a few rows of noise and drawn out: packed sizes are linear in rows.

    (Packing on meta would do as well, but torch's arithmetic on meta tensors imports its compiler, which takes longer than a whole plan.)
    """
    n, k = shape
    if getattr(spec.format, "iterations", 1) > 1:  # a codebook is as large after one round of k-means as after a hundred
        spec = replace(spec, format=replace(spec.format, iterations=1))  # type: ignore[type-var]
    height = spec.granularity.block(shape)[0]
    step = 32 * (height if height < n else 1)  # whole blocks, whole words

    def count(rows: int) -> int:
        noise = torch.randn(rows, k, generator=torch.Generator().manual_seed(0))
        return sum(t.numel() * t.element_size() for t in packing.pack(quantize(noise, spec)).values())

    try:
        if n <= 2 * step:
            return count(n)
        one, two = count(step), count(2 * step)
        return round(one + (two - one) * (n - step) / step)
    except QcoreError:
        return round(spec.bits_per_value(shape) * prod(shape) / 8)
