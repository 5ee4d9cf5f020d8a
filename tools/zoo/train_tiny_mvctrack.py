"""Train the small voxel tracker of qplug-perception on made-up sequences; a few minutes of one core.

    python tools/zoo/train_mvctrack_tiny.py --minutes 3

Sequences 0 … 39,999 train; 100,000 and above are for evaluation and are not touched here.  Half of the sequences have virtual points.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from qplug_perception.mvctrack.data import cloud, training_pair
from qplug_perception.mvctrack.sequences import made_sequence
from qplug_perception.mvctrack.tracker import MVCTracker, TrackerConfig, TrackingLoss, pair_batch
from qplug_perception.mvctrack.virtual_points import MVCPSettings
from safetensors.torch import save_file

OUT = Path(__file__).resolve().parents[2] / "packages/qplug-perception/src/qplug_perception/mvctrack/weights/tiny"
TRAIN, FRAMES = 40_000, 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3.0, help="of processor time")
    parser.add_argument("--wall", type=float, default=1e9, help="minutes by the clock, on a machine that others use too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1500, help="at most, and the length of the learning rate's slope")
    parser.add_argument("--out", type=Path, default=OUT)
    a = parser.parse_args()
    torch.manual_seed(a.seed)
    generator = torch.Generator().manual_seed(a.seed)
    config = TrackerConfig()
    model, loss_of = MVCTracker(config), TrackingLoss()
    adam = torch.optim.AdamW([*model.parameters(), *loss_of.parameters()], lr=2e-3, weight_decay=0.01)
    begun, started, losses, errors, done = time.process_time(), time.monotonic(), [], [], 0
    for step in range(a.steps):
        spent = max((time.process_time() - begun) / (60 * a.minutes), (time.monotonic() - started) / (60 * a.wall))
        if spent >= 1:
            break
        for group in adam.param_groups:
            group["lr"] = 2e-3 * (1 - max(spent, step / a.steps)) + 2e-5
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
        out, truth = model(pair_batch(pairs, config)), torch.stack(truths)
        loss = loss_of(out, truth)
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        adam.step()
        losses.append(float(loss.detach()))
        errors.append(float((out[:, :3] - truth).norm(dim=1).mean().detach()))
        done = step + 1
        if step % 50 == 0:
            shown = sum(errors[-50:]) / len(errors[-50:])
            print(
                f"{step:5} loss {sum(losses[-50:]) / len(losses[-50:]):.3f} error {shown:.3f} m  {time.process_time() - begun:.0f} s",
                flush=True,
            )
    a.out.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.eval().state_dict().items()}, a.out / "model.safetensors")
    (a.out / "config.json").write_text(json.dumps({"architecture": "mvctrack", "config": config.to_dict()}, indent=1) + "\n")
    record = {
        "command": f"python tools/zoo/train_mvctrack_tiny.py --minutes {a.minutes:g} --wall {a.wall:g} --seed {a.seed}",
        "steps": done,
        "processor_seconds": round(time.process_time() - begun),
        "loss": round(sum(losses[-100:]) / len(losses[-100:]), 4),
        "error_metres": round(sum(errors[-100:]) / len(errors[-100:]), 4),
        "torch": torch.__version__,
    }
    (a.out / "record.json").write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
