import pytest
import torch
from qkernels.int8_conv import cpu, reference


@pytest.mark.skipif(cpu.missing() is not None, reason=str(cpu.missing()))
@pytest.mark.parametrize(
    ("c", "n", "k", "groups", "stride", "padding", "dilation", "zero"),
    [(3, 16, 3, 1, 2, 1, 1, 114), (16, 16, 5, 16, 1, 2, 1, 3), (32, 24, 1, 1, 1, 0, 1, 255), (32, 64, 3, 4, 1, 2, 2, 0), (7, 5, 3, 1, 1, 1, 1, 128)],
)  # stem · depthwise · pointwise · grouped, dilated · nothing divides
def test_int8_conv_on_cpu_equals_the_reference(c, n, k, groups, stride, padding, dilation, zero):
    g = torch.Generator().manual_seed(c + n)
    x = torch.randint(0, 256, (2, c, 11, 9), generator=g).to(torch.uint8)
    bits = 63 if cpu.saturates() else 127
    w = torch.randint(-bits, bits + 1, (n, c // groups, k, k), generator=g).to(torch.int8)
    scale = torch.rand(n, generator=g) * 0.01 + 0.001
    geometry = ([stride] * 2, [padding] * 2, [dilation] * 2, groups)
    want = reference.int8_conv(x, w, 0.03, zero, scale, *geometry)
    got = cpu.int8_conv(x, cpu.prepack(w, scale, 0.03, zero, *geometry), 0.03, zero, scale, *geometry)
    # sums of up to 2^24 are exact in float32; beyond, and where the scales are multiplied in another order, one or two ulps
    torch.testing.assert_close(got, want, rtol=3e-7, atol=1e-6)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_the_reference_is_the_convolution_of_the_numbers(axes):
    g = torch.Generator().manual_seed(axes)
    x = torch.randint(0, 256, (2, 4, *[6] * axes), generator=g).to(torch.uint8)
    w = torch.randint(-127, 128, (6, 2, *[3] * axes), generator=g).to(torch.int8)
    scale = torch.rand(6, generator=g)
    conv = getattr(torch.nn.functional, f"conv{axes}d")
    want = conv((x.double() - 9) * 0.5, w.double() * scale.double().reshape(-1, 1, *[1] * axes), None, 1, 1, 1, 2)
    got = reference.int8_conv(x, w, 0.5, 9, scale, [1] * axes, [1] * axes, [1] * axes, 2)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)


def test_sums_do_not_saturate():
    if cpu.missing() or cpu.saturates():
        pytest.skip("this processor adds pairs of products in 16 bits, and the kernel refuses 8-bit weights there")
    x, w, one = torch.full((1, 512, 4, 4), 255, dtype=torch.uint8), torch.full((8, 512, 3, 3), 127, dtype=torch.int8), torch.ones(8)
    geometry = ([1, 1], [0, 0], [1, 1], 1)
    y = cpu.int8_conv(x, cpu.prepack(w, one, 1.0, 0, *geometry), 1.0, 0, one, *geometry)
    assert y.unique().tolist() == [512 * 9 * 255 * 127]
