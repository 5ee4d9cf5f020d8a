"""Train the two small PETRs of qplug-perception, one with each position embedding, and write weights, config and record as package data.

    python tools/zoo/train_tiny_petr.py                      both, about 4 minutes of one core
    python tools/zoo/train_tiny_petr.py --only qfpe --steps 50

The two differ in `embedding` alone: same seed, same scenes in the same order, same steps.  Every step sees new scenes of training seeds,
so nothing is seen twice; the score is that of evaluation seeds.
"""

import argparse
import json
import math
import time
from dataclasses import replace
from pathlib import Path

import torch
from qcore.model.tap import Tap, attach
from qplug_perception.petr.boxes import detections
from qplug_perception.petr.config import PETRConfig
from qplug_perception.petr.detection import average_precision, mean_average_precision
from qplug_perception.petr.loss import focal, loss
from qplug_perception.petr.model import PETR
from qplug_perception.petr.scenes import EVALUATION, KINDS, Scene, make_scenes
from safetensors.torch import save_file
from torch import Tensor

from common import ROOT, command_line, sha256_file, versions, write_json

PLACE = ROOT / "packages/qplug-perception/src/qplug_perception/petr/zoo"
CONFIG = PETRConfig(
    classes=len(KINDS),
    queries=64,
    width=64,
    heads=4,
    layers=2,
    feedforward=128,
    dropout=0.0,
    anchor_depth=10.0,
    position_range=(-20.0, -20.0, -4.0, 20.0, 20.0, 4.0),
    pc_range=(-20.0, -20.0, -3.0, 20.0, 20.0, 3.0),
    post_range=(-20.0, -20.0, -4.0, 20.0, 20.0, 4.0),
    keep=64,
    stem=16,
    channels=(16, 24, 40, 64),
    blocks=(1, 1, 1, 1),
    bottleneck=False,
    caffe=False,
    deformable=(False, False, False, False),
    mean=(110.0, 110.0, 100.0),
    std=(50.0, 50.0, 50.0),
)


def inputs(scenes: list[Scene], config: PETRConfig) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (config.mean, config.std))
    return torch.stack([(s.images.float() - mean) / std for s in scenes]), torch.stack([s.lidar2img for s in scenes])


@torch.no_grad()
def score(model: PETR, scenes: list[Scene]) -> dict[str, float]:
    model.eval()
    found = []
    for i in range(0, len(scenes), 16):
        found += detections(*model(*inputs(scenes[i : i + 16], model.config)), model.config.keep, model.config.post_range)
    model.train()
    boxes, labels = [s.boxes for s in scenes], [s.labels for s in scenes]
    out = {"map": mean_average_precision(found, boxes, labels, len(KINDS))}
    for d in (0.5, 1.0, 2.0, 4.0):
        out[f"ap_{d}m"] = sum(average_precision(found, boxes, labels, k, d) for k in range(len(KINDS))) / len(KINDS)
    return {k: round(v, 4) for k, v in out.items()}


def begin(config: PETRConfig) -> PETR:
    """A PETR whose embeddings start at the size of its features, and whose queries start evenly around the rig."""
    model = PETR(config)
    for part in (model.position.mlp, model.views, model.query):
        for layer in (part[0], part[2]):
            torch.nn.init.xavier_uniform_(layer.weight, gain=2**0.5)
    rings, rays = 4, config.queries // 4
    radius = torch.linspace(5.0, 12.0, rings)[:, None] * torch.ones(rays)
    angle = (torch.arange(rays) + torch.arange(rings)[:, None] / rings) * 2 * math.pi / rays
    points = torch.stack([radius * angle.cos(), radius * angle.sin(), torch.full_like(radius, -0.7)], -1).flatten(0, 1)
    low, high = torch.tensor(config.pc_range[:3]), torch.tensor(config.pc_range[3:])
    with torch.no_grad():
        model.reference.weight.copy_((points - low) / (high - low))
    return model.train()


class Hints(torch.nn.Module):
    """A second head on the features, for training alone, as Focal-PETR and StreamPETR have: class, depth and place of the box whose
    centre a cell sees.
    """

    def __init__(self, config: PETRConfig) -> None:
        super().__init__()
        self.classes = config.classes
        self.head = torch.nn.Conv2d(config.width, config.classes + 3, 1)
        torch.nn.init.constant_(self.head.bias, -2.0)

    def forward(self, features: Tensor, scenes: list[Scene]) -> Tensor:
        """features: [B·6, C, rows, columns] → the loss"""
        out = self.head(features)
        rows, columns = out.shape[2:]
        height, width = scenes[0].images.shape[2:]
        target, wanted, got = torch.zeros_like(out[:, : self.classes]), [], []
        for b, scene in enumerate(scenes):
            centres = torch.cat([scene.boxes[:, :3], torch.ones(len(scene.boxes), 1)], 1)
            for camera, matrix in enumerate(scene.lidar2img):
                u, v, depth, _ = (centres @ matrix.T).unbind(1)
                x, y = u / depth * columns / width, v / depth * rows / height
                seen = ((depth > 1) & (x >= 0) & (x < columns) & (y >= 0) & (y < rows)).nonzero().flatten()
                for k in seen[depth[seen].argsort(descending=True)].tolist():
                    i, j, image = int(y[k]), int(x[k]), b * len(scene.lidar2img) + camera
                    target[image, scene.labels[k], i, j] = 1
                    wanted.append(torch.stack([depth[k].log(), x[k] - j, y[k] - i]))
                    got.append(out[image, self.classes :, i, j])
        count = max(len(wanted), 1)
        near = (torch.stack(got) - torch.stack(wanted)).abs().sum() if wanted else 0.0
        return (focal(out[:, : self.classes], target).sum() + near) / count


class Scores(Tap):
    """Keeps the logits of an attention."""

    def __init__(self, kept: list[Tensor]) -> None:
        super().__init__()
        self.kept = kept

    def forward(self, x: Tensor, rows: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        self.kept.append(x)
        return x


def aim(model: PETR, scores: list[Tensor], lidar2img: Tensor, grid: tuple[int, int], image: tuple[int, int]) -> Tensor:
    """How little a query's first heads look at the cells in which its reference point lies: a cross entropy.  For the beginning of
    training alone: a decoder finds out by itself where to look, but not in minutes.

    scores: [B, heads, Q, S] of each layer;  lidar2img: [6, 4, 4], of one sample, for all have the same
    """
    config = model.config
    low, high = torch.tensor(config.pc_range[:3]), torch.tensor(config.pc_range[3:])
    with torch.no_grad():
        points = model.reference.weight.clamp(0, 1) * (high - low) + low
        u, v, depth, _ = torch.einsum("nij,qj->nqi", lidar2img, torch.cat([points, torch.ones(len(points), 1)], 1)).unbind(-1)
        column, row = (u / depth * grid[1] / image[1]).floor(), (v / depth * grid[0] / image[0]).floor()
        seen = (depth > 0.5) & (column >= 0) & (column < grid[1]) & (row >= 0) & (row < grid[0])
        camera = torch.arange(len(lidar2img))[:, None].expand_as(seen)
        cell = ((camera * grid[0] + row) * grid[1] + column).long()
        target = torch.zeros(len(points), len(lidar2img) * grid[0] * grid[1])
        query = torch.arange(len(points)).expand_as(seen)
        target[query[seen], cell[seen]] = 1
        target = target / target.sum(1, keepdim=True).clamp(min=1)
    half = config.heads // 2
    return torch.stack([-(target * own[:, :half].log_softmax(-1)).sum(-1).mean() for own in scores]).mean()


def train(config: PETRConfig, a: argparse.Namespace) -> None:
    torch.manual_seed(a.seed)
    model, hints = begin(config), Hints(config)
    seen: list[Tensor] = []
    model.image.register_forward_hook(lambda module, args, output: seen.append(output))
    model.image.to(memory_format=torch.channels_last)  # a fifth faster on a CPU
    outer = [p for n, p in model.named_parameters() if p.ndim < 2 or "reference" in n or "vectors" in n]
    inner = [p for p in model.parameters() if all(p is not o for o in outer)]
    optimizer = torch.optim.AdamW(
        [{"params": inner, "weight_decay": 0.01}, {"params": [*outer, *hints.parameters()], "weight_decay": 0.0}], lr=a.lr
    )
    looks: list[Tensor] = []
    for layer in model.layers:
        attach(layer.cross_attn, "scores", Scores(looks))
    begun, trail = time.perf_counter(), []
    for step in range(a.steps):
        rate = min(1.0, (step + 1) / 60) * (0.02 + 0.98 * (1 + math.cos(math.pi * step / a.steps)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = a.lr * rate
        scenes = make_scenes(range(step * a.batch, (step + 1) * a.batch))
        boxes, labels = [s.boxes for s in scenes], [s.labels for s in scenes]
        seen.clear()
        looks.clear()
        boxed = sum(loss(*model.heads(state), boxes, labels) for state in model.states(*inputs(scenes, config)))
        hinted = hints(seen[0], scenes)
        total = boxed + hinted
        if step < a.steps // 2:
            aimed = aim(model, looks, scenes[0].lidar2img, tuple(seen[0].shape[2:]), tuple(scenes[0].images.shape[2:]))
            total = total + (1 - 2 * step / a.steps) * aimed
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        trail.append(float(boxed.detach()))
        if step % 100 == 99:
            parts = {"loss": sum(trail[-100:]) / 100, "hints": float(hinted.detach()), "aim": float(aimed.detach())}
            shown = " ".join(f"{name} {value:.3f}" for name, value in parts.items())
            print(f"{config.embedding} {step + 1} {shown} {time.perf_counter() - begun:.0f} s", flush=True)
    seconds = time.perf_counter() - begun
    scores = score(model, make_scenes(range(EVALUATION, EVALUATION + 200)))
    print(config.embedding, scores, f"{seconds:.0f} s", flush=True)
    out = (a.out or PLACE) / f"tiny-{config.embedding}"
    out.mkdir(parents=True, exist_ok=True)
    tensors = {n: t.contiguous() for n, t in model.eval().state_dict().items()}  # taps have none
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    write_json(out / "config.json", {"model_type": "petr", "petr": config.to_dict()})
    record = {
        "command": command_line(),
        "seed": a.seed,
        "steps": a.steps,
        "batch": a.batch,
        "learning_rate": a.lr,
        "seconds": round(seconds),
        "threads": torch.get_num_threads(),
        "training_seeds": [0, a.steps * a.batch],
        "evaluation_seeds": [EVALUATION, EVALUATION + 200],
        "parameters": sum(p.numel() for p in model.parameters()),
        "last_loss": round(sum(trail[-100:]) / len(trail[-100:]), 4),
        "scores": scores,
        "sha256": sha256_file(out / "model.safetensors"),
        "versions": versions("torch"),
    }
    write_json(out / "record.json", record)
    print(json.dumps(record), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("petr", "qfpe"))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    for embedding in (a.only,) if a.only else ("petr", "qfpe"):
        train(replace(CONFIG, embedding=embedding), a)


if __name__ == "__main__":
    main()
