"""Running from packed parts: codebooks by their kernel, h·C in integers."""

import torch
from qcore.model.tap import attach
from qcore.modules import QuantizedLinear
from qcore.modules.tapped import QuantizedTap
from qcore.numbers import Int, PerTensor, QuantSpec, quantize
from qcore.ops import ReferenceLinear
from qcore.packing import Bits
from qcore.testing import check_kernel
from qkernels.selective_scan import int8_readout, selective_scan_int8
from qplug_ssm.kernels import CodebookLinear
from qplug_ssm.readout import Readout, RotatedReadout, hadamard_inverse, scan
from qplug_ssm.rwkvquant import vector_spec


def test_the_codebook_kernel_keeps_the_contract():
    check_kernel(CodebookLinear(), Bits(), vector_spec())


def test_it_is_chosen_and_the_weight_of_a_linear_layer_runs_from_its_codes():
    q = quantize(torch.randn(66, 100, generator=torch.Generator().manual_seed(0)), vector_spec())
    layer = QuantizedLinear(Bits().pack(q), q.spec, q.shape, Bits()).bind([CodebookLinear(), ReferenceLinear()])
    assert layer.explain().kernel.name == "codebook-linear"
    x = torch.randn(4, 7, 100, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer(x), x @ q.dequantize().T, rtol=1e-4, atol=1e-4)  # float32 sums of 100


def test_quantized_taps_of_a_readout_compute_what_the_integer_scan_does():
    g = torch.Generator().manual_seed(2)
    u, delta = torch.randn(2, 40, 6, generator=g), torch.rand(2, 40, 6, generator=g)
    A, B, C = -torch.rand(6, 4, generator=g), torch.randn(2, 40, 4, generator=g), torch.randn(2, 40, 4, generator=g)
    readout, spec = Readout(), QuantSpec(format=Int(8), granularity=PerTensor())
    scales = {"h": torch.tensor([[0.04]]), "c": torch.tensor([[0.02]])}
    for tensor, scale in scales.items():
        attach(readout, tensor, QuantizedTap(spec, {"scale": scale}))
    y, _ = scan(u, delta, A, B.unsqueeze(2), C.unsqueeze(2), readout)
    expected, _ = selective_scan_int8(u, delta, A, B, C, scales["h"][0, 0], scales["c"][0, 0])
    # one code may differ where the two scans' last float32 bit decides a rounding
    assert float((y - expected).abs().max()) <= 0.04 * 0.02 * 128 + 1e-4
    assert float(((y - expected).abs() > 1e-4).float().mean()) < 0.01


def test_a_rotated_readout_multiplies_what_the_integer_readout_does():
    """Between the rotations stands the same product of 8-bit codes: qkernels' reference on the rotated state gives the same y."""
    g = torch.Generator().manual_seed(3)
    h, c = torch.randn(2, 5, 12, 8, generator=g), torch.randn(2, 5, 1, 8, generator=g)
    readout, spec = RotatedReadout(12, 8), QuantSpec(format=Int(8), granularity=PerTensor())
    readout.scale.uniform_(0.5, 2, generator=g)
    assert readout.over_channels is not None and readout.over_states is not None
    rotated = readout.over_states(readout.over_channels((h / readout.scale.unsqueeze(-1)).mT).mT)
    scales = {"h": torch.tensor([[0.04]]), "c": torch.tensor([[0.02]])}
    for tensor, scale in scales.items():
        attach(readout, tensor, QuantizedTap(spec, {"scale": scale}))
    y = int8_readout(rotated, c.squeeze(2), scales["h"][0, 0], scales["c"][0, 0])
    expected = hadamard_inverse(y, readout.over_channels.signs) * readout.scale
    torch.testing.assert_close(readout(h, c), expected, rtol=1e-5, atol=1e-5)  # float32: products of codes and scales, then a rotation of 12
