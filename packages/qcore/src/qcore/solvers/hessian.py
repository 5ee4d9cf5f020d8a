"""Curvature of a model's loss in each of its weights: products with the Hessian, its trace, its largest eigenvalue."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from qcore.errors import CalibrationError
from qcore.model.topology import Site
from qcore.solvers.allocate import WholeModel


def sampled_loss(model: WholeModel, batch: int, weights: Mapping[Site, Tensor], seed: int) -> tuple[Tensor, int]:
    """The mean negative log-likelihood of labels drawn from the model's own softmax, and the number of rows.

    CalibrationError where nothing can be differentiated: outputs without a gradient, or of one column.
    """
    # attention's fast kernels have no second derivative
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        out = model.outputs(batch, weights)
    if not out.requires_grad or not out.is_floating_point():
        raise CalibrationError(
            "this metric needs gradients of the model's outputs with respect to its weights, and they have none, for a step inside cuts them off; "
            'take a metric that needs none: "kl", "output" or "mse"'
        )
    if out.shape[-1] < 2:
        raise CalibrationError(
            f'this metric draws labels from the model\'s softmax, and its outputs have {out.shape[-1]} column; take metric "output" or "mse"'
        )
    with torch.enable_grad():
        logs = torch.log_softmax(out.float() if out.dtype is not torch.float64 else out, -1)
        drawn = torch.multinomial(logs.detach().exp(), 1, generator=torch.Generator().manual_seed(seed + batch))
        return -logs.gather(-1, drawn).mean(), out.shape[0]


def traces(model: WholeModel, weights: Mapping[Site, Tensor], batches: Sequence[int], seed: int = 0) -> dict[Site, float]:
    """The trace of each weight's own block of the Hessian: v · Hv with random signs v, one draw a batch (Hutchinson).

    All weights share a draw: what they do to one another has mean zero.
    """
    generator = torch.Generator().manual_seed(seed)
    found = dict.fromkeys(weights, 0.0)
    for b in batches:
        signs = [torch.randint(0, 2, w.shape, generator=generator).to(w.dtype) * 2 - 1 for w in weights.values()]
        gradients = _gradients(model, b, weights, seed)
        with torch.enable_grad():
            along = sum((g * v).sum() for g, v in zip(gradients, signs, strict=True))
        for site, v, hv in zip(weights, signs, torch.autograd.grad(along, list(weights.values())), strict=True):  # type: ignore[arg-type]
            found[site] += float((v * hv).double().sum()) / len(batches)
    return found


def eigenvalues(
    model: WholeModel, weights: Mapping[Site, Tensor], batches: Sequence[int], seed: int = 0, steps: int = 30, tolerance: float = 1e-3
) -> dict[Site, list[float]]:
    """The eigenvalue of largest magnitude of each weight's own block of the Hessian, one for each batch, by power iteration.

    tolerance: relative change at which it stops; Q-BERT's released code stops at 1e-4, after more steps than a score is worth
    """
    found: dict[Site, list[float]] = {site: [] for site in weights}
    for b in batches:
        gradients = _gradients(model, b, weights, seed)
        for (site, w), g in zip(weights.items(), gradients, strict=True):
            generator = torch.Generator().manual_seed(seed)
            v = torch.randn(w.shape, generator=generator, dtype=w.dtype)
            v /= v.norm()
            value = 0.0
            for _ in range(steps):
                hv = torch.autograd.grad(g, w, v, retain_graph=True)[0]
                now = float((v * hv).double().sum())
                norm = hv.norm()
                settled = abs(now - value) <= tolerance * abs(now)
                value = now
                if settled or not norm:
                    break
                v = hv / norm
            found[site].append(value)
    return found


def _gradients(model: WholeModel, batch: int, weights: Mapping[Site, Tensor], seed: int) -> tuple[Tensor, ...]:
    """Of the loss, with a graph of their own."""
    loss, _ = sampled_loss(model, batch, weights, seed)
    with torch.enable_grad():
        return torch.autograd.grad(loss, list(weights.values()), create_graph=True)
