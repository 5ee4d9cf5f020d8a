import pytest
import torch
from qkernels.dequant_linear import dequant_linear, dequantize_blocks
from qkernels.int8_linear import cpu, reference


@pytest.mark.parametrize(
    ("n", "k", "block"), [(6, 8, (1, 4)), (5, 7, (1, 7)), (5, 7, (2, 3)), (4, 4, (4, 4))]
)  # group · channel · ragged tile · tensor
def test_every_value_uses_the_scale_of_its_block(n, k, block):
    torch.manual_seed(0)
    values = torch.randint(-8, 8, (n, k))
    blocks = (-(-n // block[0]), -(-k // block[1]))
    scale, zero, offset = torch.rand(blocks), torch.randint(-8, 8, blocks), torch.rand(blocks)
    got = dequantize_blocks(values, scale, block, zero, offset)
    for i in range(n):
        for j in range(k):
            at = (i // block[0], j // block[1])
            want = (values[i, j].float() - zero[at]) * scale[at] + offset[at]
            assert got[i, j] == want


def test_linear_is_the_product_with_the_rounded_weight():
    torch.manual_seed(0)
    values, scale = torch.randint(-8, 8, (16, 32)), torch.rand(16, 4)
    w = values * scale.repeat_interleave(8, 1)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(3, 2, 32, dtype=dtype)
        y = dequant_linear(x, values, scale, (1, 8))
        assert y.dtype == dtype and y.shape == (3, 2, 16)
        assert torch.equal(y, torch.nn.functional.linear(x, w.to(dtype)))


@pytest.mark.parametrize(("t", "n", "k"), [(1, 16, 32), (7, 130, 191), (1, 1, 1)])  # decode · nothing divides · smallest
def test_int8_linear_on_cpu_equals_the_reference_bit_for_bit(t, n, k):
    g = torch.Generator().manual_seed(t + n + k)
    x = torch.randint(-128, 128, (t, k), generator=g, dtype=torch.int8)
    w = torch.randint(-128, 128, (n, k), generator=g, dtype=torch.int8)
    scales = torch.rand(t, 1, generator=g), torch.rand(n, generator=g)
    assert torch.equal(cpu.int8_linear(x, w, *scales), reference.int8_linear(x, w, *scales))


def test_int8_sums_do_not_saturate():
    x = torch.full((1, 4096), -128, dtype=torch.int8)
    one = torch.ones(1)
    assert cpu.int8_linear(x, x, one.reshape(1, 1), one).item() == 4096 * 128 * 128 == reference.int8_linear(x, x, one.reshape(1, 1), one).item()
