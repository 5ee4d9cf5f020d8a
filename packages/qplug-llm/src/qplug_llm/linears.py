"""Linear layers under another class: Falcon's computes x·Wᵀ + b in a forward of its own, and a quantized linear layer may stand in its place.

Nobody is believed by name: the forward is run with small random weights and compared with a linear layer's.
"""

from typing import Any

import torch
import torch.nn.functional as F
from qcore.modules.replace import Stored, quantized_leaf, register_leaf
from torch import Tensor, nn


@torch.no_grad()
def is_linear_in_disguise(module: nn.Module) -> bool:
    """Whether a subclass of nn.Linear with a forward of its own computes what nn.Linear does; looks at no weight of the module."""
    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
        return False
    if next(module.children(), None) is not None or set(module._parameters) != {"weight", "bias"} or any(True for _ in module.buffers()):
        return False
    g = torch.Generator().manual_seed(0)
    given: dict[str, Tensor] = {"weight": torch.randn(7, 5, generator=g, dtype=torch.float64)}
    if module.bias is not None:
        given["bias"] = torch.randn(7, generator=g, dtype=torch.float64)
    x = torch.randn(2, 3, 5, generator=g, dtype=torch.float64)
    try:
        y: Any = torch.func.functional_call(module, given, (x,))
    except Exception:  # whatever a foreign forward makes of other sizes: it is more than a linear layer
        return False
    expected = F.linear(x, given["weight"], given.get("bias"))
    return isinstance(y, Tensor) and y.shape == expected.shape and torch.allclose(y, expected, rtol=1e-12, atol=1e-12)


def _as_linear(module: nn.Linear, stored: Stored) -> nn.Module:
    plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
    plain.weight, plain.bias = module.weight, module.bias
    return quantized_leaf(plain, stored)


register_leaf(is_linear_in_disguise, _as_linear)
