"""Photographs that the package scikit-image carries, as crops for networks that read ImageNet: for calibration, and others for evaluation.

The two splits share no photograph.  The pictures stay in their package: their rights are not all the package's own.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from qcore.errors import NotFound
from torch import Tensor

Split = Literal["calibration", "evaluation"]
FILES: dict[Split, tuple[str, ...]] = {
    "calibration": ("astronaut.png", "motorcycle_left.png", "motorcycle_right.png", "coins.png", "grass.png", "hubble_deep_field.jpg", "page.png"),
    "evaluation": ("chelsea.png", "coffee.png", "rocket.jpg", "camera.png", "brick.png", "retina.jpg", "ihc.png", "moon.png"),
}


def photographs(split: Split, count: int, *, side: int = 224, seed: int = 0) -> Tensor:
    """`count` square crops, drawn in turn from the split's photographs: (pixel - 127) / 128.  [count, 3, side, side] float32

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
    crops = []
    for i in range(count):
        picture = sources[i % len(sources)]
        size = int(min(picture.size) * generator.uniform(0.5, 1.0))
        left, top = (int(generator.integers(0, full - size + 1)) for full in picture.size)
        crop = picture.crop((left, top, left + size, top + size)).resize((side, side), Image.Resampling.BILINEAR)
        pixels = np.asarray(crop, dtype=np.float32)
        crops.append(pixels[:, ::-1] if generator.integers(0, 2) else pixels)
    return (torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2) - 127) / 128


def _folder() -> Path:
    # found without being imported: only its files are needed
    spec = find_spec("skimage")
    folder = Path(spec.submodule_search_locations[0]) / "data" if spec and spec.submodule_search_locations else None
    if folder is None or not all((folder / name).is_file() for names in FILES.values() for name in names):
        raise NotFound("the photographs live in the package scikit-image, which is not installed: pip install 'qzoo[efficientnet]'")
    return folder
