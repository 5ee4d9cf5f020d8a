"""codebook_linear and selective_scan against their definitions."""

import pytest
import torch
from qkernels.codebook_linear import codebook_linear
from qkernels.selective_scan import int8_readout, selective_scan, selective_scan_int8


@pytest.mark.parametrize(("n", "k", "rows", "columns"), [(1, 16, 2, 32), (7, 130, 2, 32), (513, 64, 4, 64)])
def test_codebook_linear_multiplies_with_what_the_codes_stand_for(n, k, rows, columns):
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 8, (n, k), generator=g, dtype=torch.uint8)
    books = torch.randn(-(-n // rows), -(-k // columns), 8, generator=g)
    x = torch.randn(3, 5, k, generator=g)
    weight = torch.stack([torch.stack([books[i // rows, j // columns, codes[i, j].long()] for j in range(k)]) for i in range(n)])
    torch.testing.assert_close(codebook_linear(x, codes, books, rows, columns), x @ weight.T, rtol=1e-4, atol=1e-4)  # float32 sums
    assert codebook_linear(x.bfloat16(), codes, books, rows, columns).dtype is torch.bfloat16


def problem():
    g = torch.Generator().manual_seed(1)
    u, delta = torch.randn(2, 9, 4, generator=g).double(), torch.rand(2, 9, 4, generator=g).double()
    A, B, C = -torch.rand(4, 3, generator=g).double(), torch.randn(2, 9, 3, generator=g).double(), torch.randn(2, 9, 3, generator=g).double()
    return u, delta, A, B, C


def test_selective_scan_in_two_parts_is_the_scan_of_the_whole():
    u, delta, A, B, C = problem()
    y, last = selective_scan(u, delta, A, B, C)
    first, state = selective_scan(u[:, :4], delta[:, :4], A, B[:, :4], C[:, :4])
    second, end = selective_scan(u[:, 4:], delta[:, 4:], A, B[:, 4:], C[:, 4:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), y)
    torch.testing.assert_close(end, last)


def test_one_channel_with_one_state_is_a_geometric_sum():
    ones = torch.ones(1, 6, 1).double()
    y, _ = selective_scan(ones, ones, torch.tensor([[-0.5]]).double(), ones, ones)
    r = torch.exp(torch.tensor(-0.5)).double()
    torch.testing.assert_close(y[0, :, 0], torch.stack([(1 - r ** (t + 1)) / (1 - r) for t in range(6)]))


def test_the_integer_readout_is_exact_on_its_grid_and_near_elsewhere():
    g = torch.Generator().manual_seed(2)
    h, c = torch.randint(-127, 128, (2, 4, 16), generator=g).float(), torch.randint(-127, 128, (2, 16), generator=g).float()
    s, t = torch.tensor(0.5), torch.tensor(0.25)
    assert torch.equal(int8_readout(h * s, c * t, s, t), (h @ c.unsqueeze(-1)).squeeze(-1) * (s * t))
    u, delta, A, B, C = problem()
    y, state = selective_scan(u, delta, A, B, C)
    rounded, same = selective_scan_int8(u, delta, A, B, C, torch.tensor(8.0 / 127), torch.tensor(4.0 / 127))
    torch.testing.assert_close(same, state)  # the state is not rounded
    assert 0 < float((rounded - y).abs().max()) < 0.02 * float(y.abs().max()) + 0.3
