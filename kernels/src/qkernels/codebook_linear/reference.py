"""Codes are looked up tile by tile, a few rows of tiles at a time; the whole weight is never made."""

import torch
from torch import Tensor

from qkernels._check import FLOATING, require


def codebook_linear(x: Tensor, codes: Tensor, books: Tensor, rows: int, columns: int, chunk: int = 256) -> Tensor:
    """y[t, n] = Σ_k x[t, k] · books[n // rows, k // columns, codes[n, k]]

    x:       [..., K] float
    codes:   [N, K] uint8
    books:   [ceil(N / rows), ceil(K / columns), 2^bits] float32
    rows, columns: of a tile; those at the edges may be smaller
    chunk:   rows of the weight that are looked up at once: chunk · K values of x's dtype are held
    return:  [..., N] of x's dtype
    """
    if min(rows, columns, chunk) < 1:
        raise ValueError(f"rows, columns, chunk: got {rows}, {columns}, {chunk}; allowed: 1 or more of each")
    require("codes", codes, (None, None), (torch.uint8,))
    N, K = codes.shape
    require("x", x, (..., K), FLOATING, codes)
    require("books", books, (-(-N // rows), -(-K // columns), None), FLOATING, codes)
    step = max(chunk // rows, 1) * rows
    column = torch.arange(K, device=codes.device) // columns
    outputs = []
    for a in range(0, N, step):
        own = codes[a : a + step].long()
        row = (torch.arange(a, a + len(own), device=codes.device) // rows).unsqueeze(1)
        outputs.append(torch.nn.functional.linear(x, books[row, column, own].to(x.dtype)))
    return torch.cat(outputs, -1)
