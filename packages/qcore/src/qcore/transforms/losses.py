"""What a learned transform brings down: distances between the outputs of the quantized model and of the float one."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from qcore.errors import SpecError


class Loss(Protocol):
    """student, teacher: logits [T, V];  targets: [T] class numbers, or None where nobody knows them;  k: classes that count, at most V"""

    def __call__(self, student: Tensor, teacher: Tensor, targets: Tensor | None, k: int) -> Tensor: ...


def kl_top(student: Tensor, teacher: Tensor, targets: Tensor | None, k: int) -> Tensor:
    """Σ p (log p - log q) over the teacher's k likeliest classes, both normalized over all classes; a mean over rows.

    It may be negative: p = (.6, .4), q = (.8, .2), k = 1 gives .6·ln(.6/.8) = -.1726.  Classes outside are felt through q's normalizer: the
    gradient with respect to the student's logits is (Σ p)·q - p·[among the k].

    Source: https://arxiv.org/abs/2501.13987 (OSTQuant), equation 11, as its scripts run it (--post_attn).
    """
    p, chosen = teacher.log_softmax(-1).topk(min(k, teacher.shape[-1]), -1)
    q = student.log_softmax(-1).gather(-1, chosen)
    return (p.exp() * (p - q)).sum(-1).mean()


def kl_top_renormalized(student: Tensor, teacher: Tensor, targets: Tensor | None, k: int) -> Tensor:
    """KL(p ‖ q) with both normalized over the teacher's k likeliest classes alone: never negative, and blind to all others."""
    logits, chosen = teacher.topk(min(k, teacher.shape[-1]), -1)
    p, q = logits.log_softmax(-1), student.gather(-1, chosen).log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()


def kl(student: Tensor, teacher: Tensor, targets: Tensor | None, k: int) -> Tensor:
    """KL(p ‖ q) over all classes; `k` does not count."""
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()


def next_token(student: Tensor, teacher: Tensor, targets: Tensor | None, k: int) -> Tensor:
    """Cross-entropy with what the text says, as SpinQuant learns; the teacher and `k` do not count."""
    if targets is None:
        raise SpecError("the loss 'next-token' is for language models: batches with 'input_ids' and outputs [B, T, V]; take 'kl-top'")
    known = targets >= 0
    return torch.nn.functional.cross_entropy(student[known], targets[known])


LOSSES: Mapping[str, Loss] = {"kl-top": kl_top, "kl-top-renormalized": kl_top_renormalized, "kl": kl, "next-token": next_token}
