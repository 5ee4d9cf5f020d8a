"""What PETR is trained by: focal loss and L1, queries matched to boxes by the Hungarian method.

Source: the release's PETRHead.loss_single and HungarianAssigner3D: weights 2 and 0.25, code weights 1 but 0.2 for velocities, the matching cost
over the first eight numbers alone.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from qcore.errors import NotFound
from torch import Tensor

from qplug_perception.petr.boxes import encode

ALPHA, GAMMA = 0.25, 2.0
CLASS_WEIGHT, BOX_WEIGHT = 2.0, 0.25
MATCHED = 8  # velocities do not decide who is whose


def focal(logits: Tensor, target: Tensor) -> Tensor:
    """Sigmoid focal loss, element by element.  logits, target: [...], target 0 or 1"""
    p = logits.sigmoid()
    toward = p * target + (1 - p) * (1 - target)
    alpha = ALPHA * target + (1 - ALPHA) * (1 - target)
    return alpha * (1 - toward) ** GAMMA * F.binary_cross_entropy_with_logits(logits, target, reduction="none")


@torch.no_grad()
def matching(logits: Tensor, codes: Tensor, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Which query is which box's: (queries [m], boxes [m]), m = min(Q, number of boxes), of the least total cost.

    logits: [Q, classes];  codes: [Q, 10];  boxes: [n, 9];  labels: [n]
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as e:
        raise NotFound("queries are matched to boxes by scipy, which is not installed: pip install 'qplug-perception[train]'") from e
    p = logits.double().sigmoid().clamp(1e-12, 1 - 1e-12)
    positive = ALPHA * (1 - p) ** GAMMA * -p.log()
    negative = (1 - ALPHA) * p**GAMMA * -(1 - p).log()
    cost = CLASS_WEIGHT * (positive - negative)[:, labels]
    cost = cost + BOX_WEIGHT * torch.cdist(codes[:, :MATCHED].double(), encode(boxes)[:, :MATCHED].double(), p=1)
    rows, columns = linear_sum_assignment(cost.cpu().nan_to_num(1e6).numpy())
    return torch.as_tensor(rows), torch.as_tensor(columns)


def loss(logits: Tensor, codes: Tensor, boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> Tensor:
    """2 · focal + 0.25 · L1 of one decoder layer, both divided by the number of boxes.

    logits: [B, Q, classes];  codes: [B, Q, 10];  boxes, labels: [n, 9] and [n] of each sample
    """
    target, wanted, got = torch.zeros_like(logits), [], []
    for i, (own, kinds) in enumerate(zip(boxes, labels, strict=True)):
        queries, mine = matching(logits[i], codes[i], own, kinds)
        target[i, queries, kinds[mine]] = 1
        wanted.append(encode(own[mine]))
        got.append(codes[i, queries])
    count = max(sum(map(len, wanted)), 1)
    weights = codes.new_tensor([1.0] * MATCHED + [0.2, 0.2])
    distance = (torch.cat(got) - torch.cat(wanted).to(codes)).abs() * weights
    return CLASS_WEIGHT * focal(logits, target).sum() / count + BOX_WEIGHT * distance.sum() / count
