"""Hadamard matrices for the widths of real models, and the fast transform."""

import pytest
import torch
from qcore.errors import SpecError
from qcore.numbers.hadamard import core_size, hadamard, padded_size, random_signs, transform

CORES = [12, 20, 28, 36, 44, 60, 76, 108, 140, 148, 300, 924]
PRIME_POWERS = [52, 100, 244, 252, 344]  # fields of 25, 49, 121, 125 and 343 elements
# widths of published models and the orders of their cores
WIDTHS = {
    1408: 44,
    2816: 44,
    3584: 28,
    4864: 76,
    5632: 44,
    8960: 140,
    9728: 76,
    11008: 344,
    13824: 108,
    14336: 28,
    15360: 60,
    17920: 140,
    18944: 148,
    22016: 344,
    27648: 108,
    28672: 28,
    29568: 924,
}


@pytest.mark.parametrize("n", [1, 2, 4, 64, 1024, 2048, *CORES, *PRIME_POWERS, 24, 96, 1408, 1536, 1920])
def test_rows_are_orthogonal_and_entries_are_signs(n):
    h = hadamard(n, normalize=False)
    assert h.abs().eq(1).all()
    assert torch.equal(h @ h.T, n * torch.eye(n, dtype=torch.float64))
    torch.testing.assert_close(hadamard(n), h / n**0.5)


@pytest.mark.parametrize("n", [1, 2, 64, 12, 24, 28, 56, 300, 344, 600, 1408])
def test_the_fast_transform_is_the_matrix(n):
    x = torch.randn(3, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(transform(x), x @ hadamard(n).T)
    torch.testing.assert_close(transform(x.reshape(3, 1, n)), transform(x).reshape(3, 1, n))


@pytest.mark.parametrize(("n", "core"), WIDTHS.items(), ids=str)
def test_widths_of_models_have_an_orthogonal_transform(n, core):
    assert core_size(n) == core
    assert padded_size(n) == n
    x = torch.randn(4, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    # inner products, and so norms and angles, stay
    torch.testing.assert_close(transform(x) @ transform(x).T, x @ x.T, rtol=1e-10, atol=1e-9 * n**0.5)


def test_rotating_inputs_and_weights_leaves_the_product():
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(5, 1408, generator=generator), torch.randn(7, 1408, generator=generator)
    # float32 sums of 1408 products
    torch.testing.assert_close(transform(x) @ transform(w).T, x @ w.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_transform_keeps_the_dtype(dtype):
    x = torch.randn(4, 56, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = transform(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), transform(x.double()), rtol=0, atol=32 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(("n", "padded"), [(13696, 13824), (4304, 4352), (3, 4), (172, 176), (7, 8)])
def test_other_widths_are_padded(n, padded):
    assert core_size(n) is None
    assert padded_size(n) == padded


@pytest.mark.parametrize("n", [5000, 6001, 13696, 20003, 100_000])
def test_usual_groups_divide_padded_widths_and_padding_is_small(n):
    assert padded_size(n) % 128 == 0
    assert padded_size(n) <= 1.05 * n


def test_a_width_without_a_matrix_is_refused_with_the_next_that_has_one():
    with pytest.raises(SpecError, match=r"no Hadamard matrix of size 13696 .*pad with zeros to 13824"):
        transform(torch.zeros(1, 13696))
    with pytest.raises(SpecError, match="pad with zeros to 176"):
        hadamard(172)


def test_random_signs_repeat_and_are_signs():
    signs = random_signs(1000, 3)
    assert signs.abs().eq(1).all()
    assert abs(signs.mean()) < 0.2
    assert torch.equal(signs, random_signs(1000, 3))
    assert not torch.equal(signs, random_signs(1000, 4))
