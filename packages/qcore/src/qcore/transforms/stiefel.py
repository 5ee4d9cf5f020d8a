"""Gradient descent on rotations, which stay rotations."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def cayley(a: Tensor) -> Tensor:
    """(I - A/2)⁻¹(I + A/2): orthogonal for skew A, and I + A + O(A²).  [..., n, n]"""
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    return torch.linalg.solve(eye - a / 2, eye + a / 2)


def nearest_rotation(r: Tensor) -> Tensor:
    """The orthogonal matrix nearest to r: the rounding of many steps taken away.  [..., n, n] float64"""
    u, _, v = torch.linalg.svd(r.double())
    return u @ v


class RotationAdam:
    """Adam on orthogonal matrices [h, n, n], in place: moments of the gradient in the Lie algebra, steps by the Cayley transform.

    The gradient G of R is seen as the skew matrix (RᵀG - GᵀR)/2, the direction in which R·exp(Ω) may move.  These matrices mean the same at every R,
    so the moments are never transported.  The first moment is divided by the root mean square of the whole matrix: entry by entry, as Adam does, the
    noise of rounding in directions of no slope would become steps as large as any.  R·cayley(Ω) is orthogonal to rounding: in float64 no
    re-orthonormalisation is needed after a hundred steps.

    lr of `step`: the angle, in radians, by which a basis vector turns, whatever n is (Ω is divided by √n).

    Source: https://arxiv.org/abs/2002.01113 (Cayley Adam).  geoopt's RiemannianAdam, which OSTQuant's scripts use, transports its moments and drifts
    off the manifold between two "stabilize" calls; nothing else of that package would be used here.
    """

    def __init__(self, rotations: Sequence[Tensor], betas: tuple[float, float] = (0.9, 0.99), eps: float = 1e-12) -> None:
        self.rotations, self.betas, self.eps = list(rotations), betas, eps
        self.first = [torch.zeros_like(r) for r in self.rotations]
        self.second = [torch.zeros_like(r) for r in self.rotations]
        self.count = 0

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One step along the gradients in `.grad`; a rotation without one stays."""
        self.count += 1
        for r, m, v in zip(self.rotations, self.first, self.second, strict=True):
            if r.grad is None:
                continue
            g = r.grad.to(r)
            omega = r.mT @ g
            omega = (omega - omega.mT) / 2
            m.mul_(self.betas[0]).add_(omega, alpha=1 - self.betas[0])
            v.mul_(self.betas[1]).addcmul_(omega, omega, value=1 - self.betas[1])
            unbiased = m / (1 - self.betas[0] ** self.count)
            size = (v.mean((-1, -2), keepdim=True) / (1 - self.betas[1] ** self.count)).sqrt_().add_(self.eps)
            r.copy_(r @ cayley(unbiased.div_(size).mul_(-lr / r.shape[-1] ** 0.5)))

    def state(self) -> dict[str, Tensor]:
        """The rotations and all moments, under names of their own."""
        parts = {"rotation": self.rotations, "first": self.first, "second": self.second}
        return {f"{name}.{i}": t.detach().clone() for name, own in parts.items() for i, t in enumerate(own)}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor], count: int) -> None:
        """Go on from `state` after `count` steps."""
        self.count = count
        for name, own in {"rotation": self.rotations, "first": self.first, "second": self.second}.items():
            for i, t in enumerate(own):
                t.copy_(state[f"{name}.{i}"])
