"""Quantized inputs of a layer, on rows [T, K].

A layer's input of any rank is seen as rows: "per token" is one scale a row, "per channel" (axis 1) one a column, and static parts are those of
a matrix, [1, 1] or [1, K].  So a spec means the same for [B, T, K] and for [T, K], and for the positions of a convolution's input.
"""

from collections.abc import Mapping

from torch import Tensor

from qcore.errors import SpecError
from qcore.numbers import QuantSpec, fake_quantize

PREFIX = "input."


def static_parts(parts: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The stored parts of a static activation, out of all that a kernel is given; None where there are none."""
    own = {name.removeprefix(PREFIX): t for name, t in parts.items() if name.startswith(PREFIX)}
    return own or None


def quantize_input(x: Tensor, spec: QuantSpec | None, parts: Mapping[str, Tensor] | None) -> Tensor:
    """`x` [..., K] on the spec's grid; `x` itself without a spec."""
    if spec is None or x.numel() == 0:
        return x
    if spec.when == "static" and spec.scaled and not parts:
        raise SpecError(f"{spec} is static, but its scale was not given; calibrate, or use when='dynamic'")
    rows = x.reshape(-1, x.shape[-1])
    return fake_quantize(rows, spec, None if spec.when == "dynamic" else parts).reshape(x.shape)
