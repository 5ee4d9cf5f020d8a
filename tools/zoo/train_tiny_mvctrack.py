"""Train the small voxel tracker of qplug-perception on made-up sequences; about five minutes of one core.

    python tools/zoo/train_tiny_mvctrack.py

Sequences 0 … 39,999 train; 100,000 and above are for evaluation and are not touched here.  Half of the sequences have virtual
points.  What a step sees depends on the seed and the step only.
"""

import argparse
import json
from pathlib import Path

import torch
from qplug_perception.mvctrack.data import cloud, training_pair
from qplug_perception.mvctrack.sequences import made_sequence
from qplug_perception.mvctrack.tracker import MVCTracker, TrackerConfig, TrackingLoss, pair_batch
from qplug_perception.mvctrack.virtual_points import MVCPSettings
from safetensors.torch import save_file

from common import ROOT, command_line, train, versions, write_json

OUT = ROOT / "packages/qplug-perception/src/qplug_perception/mvctrack/weights/tiny"
TRAIN, FRAMES = 40_000, 3


def drawn_pairs(config: TrackerConfig, generator: torch.Generator) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Pairs of frames of six sequences, every other one with virtual points, and how far the boxes moved."""
    pairs, truths = [], []
    for i in range(6):
        moments = made_sequence(int(torch.randint(0, TRAIN, (), generator=generator)), FRAMES)
        virtual = MVCPSettings(erosion=1) if i % 2 else None
        clouds = [cloud(m, config, virtual) for m in moments]
        boxes = torch.stack([m.box for m in moments])
        for t in range(1, FRAMES):
            pair, truth = training_pair(clouds, boxes, t, generator, exact=t == 1 and i % 3 == 0)
            pairs.append(pair)
            truths.append(truth)
    return pair_batch(pairs, config), torch.stack(truths)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    a = parser.parse_args()
    torch.manual_seed(a.seed)
    torch.set_num_threads(1)
    config = TrackerConfig()
    model, likelihood = MVCTracker(config), TrackingLoss()
    errors: list[float] = []

    def loss_of(step: int) -> torch.Tensor:
        batch, truth = drawn_pairs(config, torch.Generator().manual_seed(a.seed * 1_000_003 + step))
        out = model(batch)
        errors.append(float((out[:, :3] - truth).norm(dim=1).mean().detach()))
        return likelihood(out, truth)

    # the flow of the likelihood learns with the tracker, and is left behind
    both = torch.nn.ModuleList([model, likelihood])
    run = train("tiny-mvctrack", both, loss_of, steps=a.steps, peak=a.lr, warmup=20, weight_decay=0.01, clip=5.0, checkpoint_every=200)
    a.out.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.eval().state_dict().items()}, a.out / "model.safetensors")
    (a.out / "config.json").write_text(json.dumps({"architecture": "mvctrack", "config": config.to_dict()}, indent=1) + "\n")
    record = {
        "command": command_line(),
        "seed": a.seed,
        "steps": a.steps,
        "threads": 1,
        **run,
        "error_metres_of_the_last_steps": round(sum(errors[-100:]) / len(errors[-100:]), 4),
        "versions": versions("torch"),
    }
    write_json(a.out / "record.json", record)


if __name__ == "__main__":
    main()
