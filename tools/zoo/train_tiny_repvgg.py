"""Train tiny-repvgg: timm's RepVGG blocks, branches kept, on Fashion-MNIST; also write the image sets of the zoo.

Run: ``python tools/zoo/train_tiny_repvgg.py`` (Debian with apt; needs timm and torchvision beside torch).
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from torch.nn import functional

from common import WORK, command_line, file_table, install, staging_folder, status, train, versions, write_json

PACKAGE = "dataset-fashion-mnist"
PAD = 2
EVAL_IMAGES = 1000
CALIB_IMAGES = 256

CONFIG: dict[str, Any] = {
    "architecture": "timm.models.byobnet.ByobNet",
    "cfg": {
        "blocks": [
            {"type": "rep", "d": 2, "c": 32, "s": 1, "gs": 0},
            {"type": "rep", "d": 3, "c": 64, "s": 2, "gs": 0},
            {"type": "rep", "d": 3, "c": 128, "s": 2, "gs": 0},
            {"type": "rep", "d": 1, "c": 256, "s": 2, "gs": 0},
        ],
        "stem_type": "rep",
        "stem_chs": 32,
    },
    "num_classes": 10,
    "in_chans": 1,
    "input_size": [1, 32, 32],
    "classes": ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"],
}


def build(config: dict[str, Any]) -> ByobNet:
    """The model of a ``config.json``."""
    cfg = dict(config["cfg"])
    blocks = tuple(ByoBlockCfg(**block) for block in cfg.pop("blocks"))
    return ByobNet(ByoModelCfg(blocks=blocks, **cfg), num_classes=config["num_classes"], in_chans=config["in_chans"])


def fetch(folder: Path) -> tuple[Path, str]:
    """Download and unpack the Debian package; return the data's folder and the version."""
    folder.mkdir(parents=True, exist_ok=True)
    if not list(folder.glob(f"{PACKAGE}_*.deb")):
        subprocess.run(["apt-get", "download", PACKAGE], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    deb = sorted(folder.glob(f"{PACKAGE}_*.deb"))[-1]
    subprocess.run(["dpkg-deb", "-x", deb, folder / PACKAGE], check=True)
    version = subprocess.run(["dpkg-deb", "-f", deb, "Version"], check=True, capture_output=True, text=True).stdout.strip()
    return folder / PACKAGE / "usr/share/datasets/fashion-mnist", version


def read_split(folder: Path, prefix: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images uint8 [n, 28, 28] and labels int64 [n] of a split in the MNIST file format."""
    images = gzip.decompress((folder / f"{prefix}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / f"{prefix}-labels-idx1-ubyte.gz").read_bytes())
    pixels = torch.from_numpy(np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28).copy())
    return pixels, torch.from_numpy(np.frombuffer(labels, np.uint8, offset=8).astype(np.int64))


def prepare(images: torch.Tensor, mean: float, std: float) -> torch.Tensor:
    """uint8 [n, 28, 28] to the model's input, float32 [n, 1, 32, 32]: pad with zeros, scale to [0, 1], normalize."""
    padded = functional.pad(images, (PAD, PAD, PAD, PAD))
    return ((padded.float() / 255 - mean) / std).unsqueeze(1)


def augment(images: torch.Tensor, mean: float, std: float, rng: np.random.Generator) -> torch.Tensor:
    """Random shifts by up to PAD pixels and random mirroring, then ``prepare``'s scaling."""
    count = len(images)
    canvas = functional.pad(images, (2 * PAD,) * 4)
    shifts = torch.from_numpy(rng.integers(0, 2 * PAD + 1, (2, count)))
    rows = shifts[0][:, None] + torch.arange(32)
    columns = shifts[1][:, None] + torch.arange(32)
    flip = torch.from_numpy(rng.random(count) < 0.5)
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    moved = canvas[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return ((moved.float() / 255 - mean) / std).unsqueeze(1)


def accuracy(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, mean: float, std: float) -> dict[str, Any]:
    """Accuracy and mean cross-entropy."""
    hits, loss = 0, 0.0
    with torch.no_grad():
        for first in range(0, len(images), 500):
            target = labels[first : first + 500]
            logits = model(prepare(images[first : first + 500], mean, std))
            hits += int((logits.argmax(1) == target).sum())
            loss += float(functional.cross_entropy(logits, target, reduction="sum"))
    return {"images": len(images), "accuracy": round(hits / len(images), 4), "loss": round(loss / len(images), 5)}


def main() -> None:
    """Train, evaluate, write the image sets, install."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch", type=int, default=200)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    source, version = fetch(WORK / "debs")
    train_images, train_labels = read_split(source, "train")
    test_images, test_labels = read_split(source, "t10k")
    mean, std = round(float(train_images.float().mean()) / 255, 4), round(float(train_images.float().std()) / 255, 4)
    steps_per_epoch = len(train_images) // args.batch

    model = build(CONFIG).to(memory_format=torch.channels_last)
    orders: dict[int, np.ndarray] = {}

    def loss_of(step: int) -> torch.Tensor:
        epoch, position = divmod(step, steps_per_epoch)
        if epoch not in orders:
            orders.clear()
            orders[epoch] = np.random.default_rng([args.seed, epoch]).permutation(len(train_images))
        rows = torch.from_numpy(orders[epoch][position * args.batch : (position + 1) * args.batch])
        inputs = augment(train_images[rows], mean, std, np.random.default_rng([args.seed, 1, step]))
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(inputs.to(memory_format=torch.channels_last))
        return functional.cross_entropy(logits.float(), train_labels[rows])

    run = train(
        "tiny-repvgg", model, loss_of, steps=args.epochs * steps_per_epoch, peak=args.lr, warmup=args.warmup,
        weight_decay=args.weight_decay,
    )  # fmt: skip

    images = staging_folder("fashion_mnist", with_tokenizer=False)
    chosen = torch.from_numpy(np.sort(np.random.default_rng([args.seed, 2]).choice(len(train_images), CALIB_IMAGES, replace=False)))
    sets = {
        "eval": (test_images[:EVAL_IMAGES], test_labels[:EVAL_IMAGES], f"the first {EVAL_IMAGES} images of the test split"),
        "calib": (train_images[chosen], train_labels[chosen], f"{CALIB_IMAGES} images of the train split, chosen by the seed"),
    }
    for name, (pixels, labels, _) in sets.items():
        save_file({"images": pixels.contiguous(), "labels": labels.contiguous()}, images / f"{name}.safetensors")
    origin = {"package": PACKAGE, "version": version, "licence": "Expat (MIT), Copyright 2017 Zalando SE"}
    notice = (WORK / "debs" / PACKAGE / "usr/share/doc" / PACKAGE / "copyright").read_text("utf-8")
    (images / "NOTICE.txt").write_text(notice, "utf-8")
    table = file_table(images)
    write_json(images / "SOURCES.json", {"source": origin, "sets": {n: s[2] for n, s in sets.items()}, "files": table})
    install(images, "fashion_mnist")

    folder = staging_folder("tiny-repvgg", with_tokenizer=False)
    preprocessing = {"pad": PAD, "scale": "1/255", "mean": [mean], "std": [std]}
    write_json(folder / "config.json", CONFIG | {"preprocessing": preprocessing})
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    loaded = build(json.loads((folder / "config.json").read_text("utf-8"))).eval()
    loaded.load_state_dict(load_file(folder / "model.safetensors"))
    record = {
        "name": "tiny-repvgg",
        "architecture": CONFIG["architecture"],
        "parameters": sum(p.numel() for p in loaded.parameters()),
        "command": command_line(),
        "arguments": vars(args),
        "steps": args.epochs * steps_per_epoch,
        "images_seen": args.epochs * steps_per_epoch * args.batch,
        "compute": "float32 weights, bfloat16 autocast",
        "augmentation": f"shifts by up to {PAD} pixels, mirroring",
        **run,
        "data": origin,
        "weights_dtype": "float32",
        "evaluation": {
            "eval": accuracy(loaded, test_images, test_labels, mean, std),
            "shipped_eval": accuracy(loaded, *sets["eval"][:2], mean, std),
        },
        "versions": versions("torch", "torchvision", "timm", "safetensors", "numpy"),
        "files": file_table(folder),
    }
    write_json(folder / "record.json", record)
    target = install(folder, "tiny-repvgg")
    size = sum(p.stat().st_size for p in target.iterdir())
    status(
        f"tiny-repvgg finished: {record['parameters']} parameters, {record['evaluation']}, {record['seconds']} s, "
        f"{size} bytes in data/tiny-repvgg; data/fashion_mnist written"
    )


if __name__ == "__main__":
    main()
