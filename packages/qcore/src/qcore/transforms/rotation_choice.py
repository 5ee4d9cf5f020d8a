"""Is a rotation worth it here?  What rounding does to the outputs, measured on a sample of rows, with and without it.

Values with a few outliers gain (Student's t with 4 degrees of freedom: 11.5 → 18.1 dB at 4 bits and 512 channels), Gaussian ones do not care, and
values that fill their range already (uniform, two-valued) lose: a rotation makes everything Gaussian.  So it is a choice.

Source: https://arxiv.org/abs/2502.09003 (RoSTE), section 4, which compares the errors of weights and activations; here the error of their product is
measured, relative to its size, because that is what both are for.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from qcore.calibration.observer import Seen
from qcore.calibration.sample import Sample
from qcore.model.reader import TensorReader
from qcore.model.topology import Site, Topology
from qcore.numbers import QuantSpec, fake_quantize
from qcore.transforms.channels import site_matrix
from qcore.transforms.rewrite import Hadamard, Rewrite, Rotate, owner_of

Specs = Mapping[Site, QuantSpec]


def choice_wants(topology: Topology, specs: Specs) -> dict[Site, tuple[Sample, ...]]:
    """What must be seen for a choice: rows at the inputs of all weights that are to be quantized, and at the taps."""
    inputs = [site.input for site in topology.sites if site in specs]
    return {site: (Sample(),) for site in dict.fromkeys([*inputs, *(s for s in topology.activations if s in specs)])}


def rotation_errors(
    rewrite: Rewrite, specs: Specs, seen: Mapping[Site, Seen], model: nn.Module, reader: TensorReader, topology: Topology
) -> tuple[float, float]:
    """(without, with): the sum over all weights and taps that the rewrite touches of ‖Q(X)Q(W)ᵀ - XWᵀ‖² / ‖XWᵀ‖², X and W as they are and as rotated.

    rewrite: rotations alone.  Weights whose input nobody saw, and fused experts, are left out.
    """
    plain, rotated = 0.0, 0.0
    for site in topology.sites:
        rows = seen.get(site.input, {}).get(Sample.name)
        edits = [e for e in rewrite.edits.get(site.param, ()) if isinstance(e, Rotate | Hadamard)]
        if site not in specs or site.part is not None or not edits or rows is None:
            continue
        w, owner, x = reader[rewrite.source(site.param)], owner_of(model, site.param), rows.float()
        turned = x
        for edit in edits:
            # x·R meets W·R: the same edit, on the input's channels
            turned = edit.apply(turned.double()).float() if edit.port.axis == "in" and not edit.port.channels else turned
        plain += _product_error(x, site_matrix(site, w, owner).float(), site, specs)
        rotated += _product_error(turned, site_matrix(site, rewrite.tensor(site.param, w, owner), owner).float(), site, specs)
    for site, edit in _values(rewrite, topology, specs):
        rows = seen.get(site, {}).get(Sample.name)
        if rows is not None:
            plain += relative(fake_quantize(rows.float(), specs[site]), rows.float())
            turned = edit.apply(rows.double()).float()
            rotated += relative(fake_quantize(turned, specs[site]), turned)
    return plain, rotated


def _values(rewrite: Rewrite, topology: Topology, specs: Specs) -> list[tuple[Site, Rotate | Hadamard]]:
    """Taps of values that the rewrite rotates as they are written: v, after v_proj."""
    found = []
    for site in topology.activations:
        for edits in (own for name, own in rewrite.edits.items() if name.startswith(f"{site.module}.") and name.endswith(".weight")):
            for e in edits:
                if site in specs and site.tensor == "v" and isinstance(e, Rotate | Hadamard) and e.port.axis == "out" and not e.port.channels:
                    found.append((site, e))
    return found


def _product_error(x: Tensor, w: Tensor, site: Site, specs: Specs) -> float:
    rounded = fake_quantize(x, specs[site.input]) if site.input in specs else x
    return relative(rounded @ fake_quantize(w, specs[site]).T, x @ w.T)


def relative(a: Tensor, b: Tensor) -> float:
    """‖a - b‖² / ‖b‖²"""
    return float((a - b).double().square().sum() / b.double().square().sum().clamp(min=1e-300))
