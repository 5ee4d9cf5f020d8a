"""At least float32: recurrences and norms are computed so, whatever the model is served in."""

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """x in float32, or as it is where that is wider."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
