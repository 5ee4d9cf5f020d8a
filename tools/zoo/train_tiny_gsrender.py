"""Train the small occupancy network of qplug-perception on made-up streets, from 2D labels alone; about seven minutes of one core.

    python tools/zoo/train_tiny_gsrender.py

Labels: depth and class at a tenth of the pixels of four cameras, and (weight 0.3, without dynamic classes) of two cameras of a
neighbouring moment.  Scenes 0 … 39,999 train; 50,000 … 50,015 choose the threshold τ; 100,000 and above are for evaluation and are
not touched here.  No voxel label is used but for choosing τ.  What a step sees depends on the seed and the step only.
"""

import argparse
import json
from pathlib import Path

import torch
from qplug_perception.gsrender.gaussians import Attributes
from qplug_perception.gsrender.geometry import FREE
from qplug_perception.gsrender.losses import LossSettings, View, lift_depth_loss, supervise, views_of
from qplug_perception.gsrender.metrics import RayIoU, lidar_rays
from qplug_perception.gsrender.model import STRIDE, OccupancyConfig, OccupancyNet
from qplug_perception.gsrender.scenes import Frame, Rig, frame, occupancy, random_scene
from safetensors.torch import save_file

from common import ROOT, command_line, train, versions, write_json

OUT = ROOT / "packages/qplug-perception/src/qplug_perception/gsrender/weights/tiny"
TRAIN, CHOOSE = 40_000, range(50_000, 50_016)
RAYS = 160
DEPTH_WEIGHT = 0.05


def stacked(frames: list[Frame]) -> dict[str, torch.Tensor]:
    """What the network reads of some frames."""
    return {
        "images": torch.stack([f.images for f in frames]),
        "intrinsics": torch.stack([f.intrinsics for f in frames]),
        "to_vehicle": torch.stack([f.to_vehicle for f in frames]),
    }


def drawn(views: list[View], generator: torch.Generator) -> list[View]:
    """RAYS pixels of each view that have a label."""
    few = []
    for v in views:
        pick = torch.randint(0, len(v.depth), (RAYS,), generator=generator)
        few.append(View(v.camera, v.depth[pick], v.labels[pick], v.camera.pixels()[pick], v.weight, v.neighbour))
    return few


def batch_loss(model: OccupancyNet, config: OccupancyConfig, rig: Rig, generator: torch.Generator) -> torch.Tensor:
    """The loss of two streets, each in its own cameras and two of a neighbouring moment."""
    scenes = [random_scene(int(s)) for s in torch.randint(0, TRAIN, (2,), generator=generator)]
    now = [frame(s, 0.0, rig) for s in scenes]
    volume, logits = model.features(stacked(now))
    own = model.head(volume)
    loss = torch.zeros(())
    for i, (scene, here) in enumerate(zip(scenes, now, strict=True)):
        sign = 1 if torch.rand((), generator=generator) < 0.5 else -1
        other = frame(scene, sign * float(torch.randint(1, 4, (), generator=generator)), rig)
        views = views_of(here.cameras(), here.depth, here.labels, here.pose, here.pose)
        beside = views_of(other.cameras(), other.depth, other.labels, here.pose, other.pose)
        views += [beside[int(j)] for j in torch.randperm(len(beside), generator=generator)[:2]]
        attributes = Attributes(own.delta_mu[i], own.delta_s[i], own.opacity[i], own.semantic[i])
        gaussians = attributes.gaussians(config.grid, config.reach)
        loss = loss + supervise(gaussians, drawn(views, generator), LossSettings(entropy=0.05)) / 8
        at = here.depth.reshape(-1, *config.size)[:, STRIDE // 2 :: STRIDE, STRIDE // 2 :: STRIDE].flatten()
        bins = logits[i].permute(0, 2, 3, 1).flatten(0, 2)
        loss = loss + DEPTH_WEIGHT * lift_depth_loss(bins, at, config.start, config.step)
    return loss


@torch.no_grad()
def thresholds(model: OccupancyNet, config: OccupancyConfig, rig: Rig) -> dict[float, float]:
    """RayIoU of each threshold τ, on the scenes that choose it."""
    rows = [(model(stacked([frame(random_scene(s), 0.0, rig)]))[0], occupancy(random_scene(s), config.grid)) for s in CHOOSE]
    scores = {}
    for threshold in [round(0.1 * k, 1) for k in range(1, 10)]:
        metric = RayIoU(config.grid, FREE)
        for own_rows, truth in rows:
            labels = Attributes.from_rows(own_rows).occupancy(threshold, FREE).reshape(config.shape)
            metric.add(labels, truth, torch.tensor([[0.0, 0.0, 1.6]]), lidar_rays(180))
        scores[threshold] = metric.scores()["rayiou"]
        print(f"τ = {threshold}: RayIoU {scores[threshold]:.4f}", flush=True)
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    a = parser.parse_args()
    torch.manual_seed(a.seed)
    torch.set_num_threads(1)
    config = OccupancyConfig()
    model = OccupancyNet(config)
    with torch.no_grad():
        model.head.opacity.conv.bias.fill_(-1.0)
    rig = Rig(size=config.size)

    def loss_of(step: int) -> torch.Tensor:
        return batch_loss(model, config, rig, torch.Generator().manual_seed(a.seed * 1_000_003 + step))

    run = train("tiny-gsrender", model, loss_of, steps=a.steps, peak=a.lr, warmup=50, weight_decay=0.01, clip=5.0, checkpoint_every=500)
    scores = thresholds(model.eval(), config, rig)
    best = max(scores, key=lambda k: scores[k])
    a.out.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, a.out / "model.safetensors")
    settings = {**config.to_dict(), "threshold": best}
    (a.out / "config.json").write_text(json.dumps({"architecture": "gsrender", "config": settings}, indent=1) + "\n")
    record = {
        "command": command_line(),
        "seed": a.seed,
        "steps": a.steps,
        "threads": 1,
        **run,
        "rayiou_of_thresholds": {str(k): round(v, 4) for k, v in scores.items()},
        "versions": versions("torch"),
    }
    write_json(a.out / "record.json", record)


if __name__ == "__main__":
    main()
