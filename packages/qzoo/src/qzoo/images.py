"""Photographs that the package scikit-image carries, as crops for networks that read ImageNet: for calibration, and others for evaluation.

The two splits share no photograph.  The pictures stay in their package: their rights are not all the package's own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from qcore.calibration.images import Preprocessing
from qcore.calibration.text import Amount, data_hash
from qcore.errors import NotFound
from qcore.evaluation import ImageClassification, ImagePair
from torch import Tensor

Split = Literal["calibration", "evaluation"]
FILES: dict[Split, tuple[str, ...]] = {
    "calibration": ("astronaut.png", "motorcycle_left.png", "motorcycle_right.png", "coins.png", "grass.png", "hubble_deep_field.jpg", "page.png"),
    "evaluation": ("chelsea.png", "coffee.png", "rocket.jpg", "camera.png", "brick.png", "retina.jpg", "ihc.png", "moon.png"),
}


# (pixel - 127) / 128, as the published weights want it
PREPROCESSING = Preprocessing((3, 224, 224), mean=(127 / 255,), std=(128 / 255,))
EVALUATED = 64


def crops(split: Split, count: int, *, side: int = 224, seed: int = 0) -> Tensor:
    """`count` square crops, drawn in turn from the split's photographs.  [count, 3, side, side] uint8

    A crop covers between half and all of the shorter side, and is mirrored every other time; grey photographs are repeated for the three colours.
    NotFound where scikit-image or Pillow is not installed.
    """
    folder = _folder()
    try:
        from PIL import Image
    except ModuleNotFoundError as e:
        raise NotFound("pictures are read by Pillow, which is not installed: pip install 'qzoo[efficientnet]'") from e
    generator = np.random.default_rng([seed, 0 if split == "calibration" else 1])
    sources = [Image.open(folder / name).convert("RGB") for name in FILES[split]]
    found = []
    for i in range(count):
        picture = sources[i % len(sources)]
        size = int(min(picture.size) * generator.uniform(0.5, 1.0))
        left, top = (int(generator.integers(0, full - size + 1)) for full in picture.size)
        crop = picture.crop((left, top, left + size, top + size)).resize((side, side), Image.Resampling.BILINEAR)
        pixels = np.asarray(crop)
        found.append(pixels[:, ::-1] if generator.integers(0, 2) else pixels)
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).contiguous()


def photographs(split: Split, count: int, *, side: int = 224, seed: int = 0) -> Tensor:
    """The same crops as (pixel - 127) / 128.  [count, 3, side, side] float32"""
    return (crops(split, count, side=side, seed=seed).float() - 127) / 128


@dataclass(frozen=True)
class Photographs:
    """The `ModelData` of networks that read ImageNet: scikit-image's photographs, without labels, or the user's own pictures."""

    calibration: str = "photographs of scikit-image"
    evaluation: str = "other photographs of scikit-image"

    def chosen(self, calibration: Path | None, evaluation: Path | None) -> "Photographs | ImagePair":
        if calibration is None and evaluation is None:
            return self
        return ImagePair(None, None, PREPROCESSING).chosen(calibration, evaluation)

    def batches(self, settings: Amount) -> list[Tensor]:
        return list(photographs("calibration", settings.samples, seed=settings.seed).split(settings.batch))

    def task(self) -> ImageClassification | None:
        return ImageClassification(crops("evaluation", EVALUATED), PREPROCESSING, batch=16) if self.evaluation else None

    def note(self, *, calibrated: bool = True, source: str = "") -> str:
        before = f"calibrated on {self.calibration}" if calibrated else "no calibration data was needed"
        return before + (f", compared on {self.evaluation}; there are no labels" if self.evaluation else ", not evaluated")

    def record(self, batches: Sequence[Any], task: Any) -> Mapping[str, Any]:
        calibration = None
        if batches:
            images = [b for b in batches if isinstance(b, Tensor)]
            calibration = {"file": self.calibration, "images": sum(map(len, images)), "sha256": data_hash(*images)}
        evaluation = {"file": self.evaluation, "images": len(task.pixels), "sha256": task.data()} if task is not None else None
        return {"calibration": calibration, "evaluation": evaluation}


def _folder() -> Path:
    # found without being imported: only its files are needed
    spec = find_spec("skimage")
    folder = Path(spec.submodule_search_locations[0]) / "data" if spec and spec.submodule_search_locations else None
    if folder is None or not all((folder / name).is_file() for names in FILES.values() for name in names):
        raise NotFound("the photographs live in the package scikit-image, which is not installed: pip install 'qzoo[efficientnet]'")
    return folder
