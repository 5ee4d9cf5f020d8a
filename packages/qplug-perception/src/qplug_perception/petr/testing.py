"""Small PETRs of both position embeddings, with random weights, for tests."""

from dataclasses import replace
from typing import Any

import torch
from qcore.testing.models import randomize

from qplug_perception.petr.config import PETRConfig
from qplug_perception.petr.model import PETR
from qplug_perception.petr.scenes import rig

SMALL = PETRConfig(
    classes=3,
    queries=6,
    width=16,
    heads=2,
    layers=2,
    feedforward=24,
    dropout=0.1,
    cameras=2,
    depths=4,
    anchor_depth=10.0,
    position_range=(-20.0, -20.0, -4.0, 20.0, 20.0, 4.0),
    pc_range=(-20.0, -20.0, -3.0, 20.0, 20.0, 3.0),
    post_range=(-20.0, -20.0, -4.0, 20.0, 20.0, 4.0),
    keep=10,
    stem=6,
    channels=(6, 8, 10, 12),
    blocks=(1, 1, 1, 1),
    bottleneck=False,
    caffe=False,
    deformable=(False, False, False, False),
)


def small_petr(**changes: Any) -> PETR:
    """Weights that hide nothing: no gain is 1, no bias 0."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = PETR(replace(SMALL, **changes)).eval()
        randomize(model)
        return model


def small_batch(samples: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    """Noise before two cameras of the rig."""
    images = torch.randn(samples, 2, 3, 32, 48, generator=torch.Generator().manual_seed(seed))
    return {"images": images, "lidar2img": rig(32, 48)[:2].expand(samples, -1, -1, -1).contiguous()}
