"""Boxes as numbers: (x, y, z, w, l, h, yaw, vx, vy), and the ten that PETR regresses.

x, y, z: the centre of gravity in metres, in the frame of the LiDAR;  w, l, h: width, length and height in metres;  yaw: radians;  vx, vy: m/s.
Conventions are those of mmdet3d before 1.0, for which PETR was trained: at yaw 0 a box looks along -y, and
yaw grows clockwise, seen from above.  `openmmlab.py` turns them into today's.
"""

from dataclasses import dataclass

import torch
from qcore.errors import SpecError
from torch import Tensor

BOX = 9


@dataclass(frozen=True)
class Detections:
    """Of one sample, the likeliest first.  boxes: [n, 9];  scores: [n], 0 … 1;  labels: [n]"""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


def encode(boxes: Tensor) -> Tensor:
    """[..., 9] → (cx, cy, log w, log l, cz, log h, sin, cos, vx, vy), [..., 10]"""
    if boxes.shape[-1] != BOX:
        raise SpecError(f"boxes are (x, y, z, w, l, h, yaw, vx, vy), got {boxes.shape[-1]} numbers each")
    x, y, z, w, length, h, yaw, vx, vy = boxes.unbind(-1)
    return torch.stack([x, y, w.log(), length.log(), z, h.log(), yaw.sin(), yaw.cos(), vx, vy], -1)


def decode(codes: Tensor) -> Tensor:
    """The inverse; sine and cosine need not be normalized.  [..., 10] → [..., 9], yaw in (-π, π]"""
    x, y, w, length, z, h, sin, cos, vx, vy = codes.unbind(-1)
    return torch.stack([x, y, z, w.exp(), length.exp(), h.exp(), torch.atan2(sin, cos), vx, vy], -1)


def detections(logits: Tensor, codes: Tensor, keep: int, post_range: tuple[float, ...]) -> list[Detections]:
    """The `keep` likeliest (query, class) pairs of each sample, without those whose centre lies outside the range.  There is no suppression.

    logits: [B, Q, classes];  codes: [B, Q, 10]

    Differs from the release, whose `topk` fails where there are fewer pairs than `keep`.
    """
    low, high = codes.new_tensor(post_range[:3]), codes.new_tensor(post_range[3:])
    out = []
    for own_logits, own_codes in zip(logits, codes, strict=True):
        flat = own_logits.sigmoid().flatten()
        scores, at = flat.topk(min(keep, len(flat)))
        boxes = decode(own_codes[at // logits.shape[-1]])
        inside = ((boxes[:, :3] >= low) & (boxes[:, :3] <= high)).all(-1)
        out.append(Detections(boxes[inside], scores[inside], (at % logits.shape[-1])[inside]))
    return out
