"""Images for calibration and for evaluation: from files of pixels to the tensors that a model reads.

Two kinds of files: a safetensors file with `images` (uint8, [n, H, W], or [n, C, H, W]) and, if they are known, `labels` ([n] integers); and a
folder of pictures, in one folder for each class, or all together without labels.  Pixels stay uint8 until a batch of them is asked for.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from qcore.calibration.text import Amount
from qcore.errors import CalibrationError, NotFound

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


@dataclass(frozen=True)
class Preprocessing:
    """From pixels to what a model reads: pad, scale to [0, 1], subtract the mean, divide by the deviation.

    size: (C, H, W) of the result
    mean, std: of each channel, for pixels in [0, 1]
    pad:  pixels of value zero that are added on each side first
    crop: for picture files: the share of the shorter side that the square in the centre keeps, before it is resized to H × W
    """

    size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pad: int = 0
    crop: float = 0.875

    def __post_init__(self) -> None:
        channels = self.size[0]
        if len(self.mean) not in (1, channels) or len(self.std) not in (1, channels):
            raise CalibrationError(f"preprocessing of {channels} channels has {len(self.mean)} means and {len(self.std)} deviations")
        if any(s <= 0 for s in self.std):
            raise CalibrationError(f"a channel's deviation is positive, got {self.std}")

    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 [n, C, H', W'] → float32 [n, C, H, W]; CalibrationError where the size is not the model's."""
        x = F.pad(pixels, (self.pad,) * 4).float() / 255
        if tuple(x.shape[1:]) != self.size:
            found = "×".join(map(str, pixels.shape[1:]))
            padded = f" and {self.pad} pixels of padding" if self.pad else ""
            raise CalibrationError(
                f"images of {found}{padded} are no input of this model, which reads {'×'.join(map(str, self.size))} (channels, height, width); "
                "pass images of that size, or a folder of pictures, which are resized"
            )
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (self.mean, self.std))
        return (x - mean) / std


@dataclass(frozen=True)
class ImageFile:
    """Images from a safetensors file or a folder of pictures.

    path: of the file or folder
    preprocessing: what the model wants
    """

    name: ClassVar[str] = "images"
    path: Path
    preprocessing: Preprocessing

    def read(self) -> tuple[Tensor, Tensor | None]:
        """(pixels uint8 [n, C, H', W'], labels int64 [n] or None); NotFound or CalibrationError, with the path, where there are none."""
        if self.path.is_dir():
            return _read_folder(self.path, self.preprocessing)
        if not self.path.is_file():
            raise NotFound(f"image file {self.path} does not exist; pass a safetensors file with `images`, or a folder of pictures")
        return _read_safetensors(self.path)

    def batches(self, settings: Amount) -> list[Tensor]:
        """`settings.samples` images that the seed chooses, in batches of one shape; CalibrationError where there are too few."""
        pixels, _ = self.read()
        if len(pixels) < settings.samples:
            raise CalibrationError(
                f"{self.path} holds {len(pixels)} images, and calibration.samples={settings.samples}; "
                f"pass more images, or --set calibration.samples={len(pixels)}"
            )
        size = min(settings.batch, settings.samples)
        if settings.samples % size:
            raise CalibrationError(
                f"{settings.samples} images do not fill batches of {size}, and a batch of another shape would change bits; "
                f"--set calibration.samples={settings.samples // size * size}, or a batch that divides {settings.samples}"
            )
        chosen = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(settings.seed))[: settings.samples]
        return [self.preprocessing(part) for part in pixels[chosen].split(size)]


def prepared(pixels: Tensor, preprocessing: Preprocessing, batch: int) -> Iterator[Tensor]:
    """Batches of what the model reads, one in memory at a time."""
    return (preprocessing(part) for part in pixels.split(batch))


def _read_safetensors(path: Path) -> tuple[Tensor, Tensor | None]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as e:
        raise CalibrationError(f"{path} cannot be read as safetensors ({e}); images come as a safetensors file or a folder of pictures") from e
    images, labels = tensors.get("images"), tensors.get("labels")
    if images is None or images.dtype is not torch.uint8 or images.ndim not in (3, 4) or not len(images):
        found = "no tensor `images`" if images is None else f"`images` of {images.dtype} and shape {tuple(images.shape)}"
        raise CalibrationError(f"{path} has {found}; images are uint8 of shape [n, H, W] or [n, C, H, W], n > 0")
    if labels is not None and (labels.shape != images.shape[:1] or labels.dtype.is_floating_point):
        raise CalibrationError(
            f"{path}: labels are integers, one an image; got {labels.dtype} of shape {tuple(labels.shape)} for {len(images)} images"
        )
    return (images.unsqueeze(1) if images.ndim == 3 else images), (None if labels is None else labels.long())


def _read_folder(folder: Path, preprocessing: Preprocessing) -> tuple[Tensor, Tensor | None]:
    classes = sorted(p for p in folder.iterdir() if p.is_dir())
    files = [(f, i) for i, c in enumerate(classes) for f in _pictures(c)] or [(f, -1) for f in _pictures(folder)]
    if not files:
        raise CalibrationError(f"{folder} holds no pictures ({', '.join(PICTURES)}), nor do its folders, one a class")
    pixels = torch.stack([_picture(file, preprocessing) for file, _ in files])
    labels = torch.tensor([label for _, label in files])
    return pixels, (None if (labels < 0).any() else labels)


def _pictures(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURES)


def _picture(path: Path, preprocessing: Preprocessing) -> Tensor:
    """The square in the centre of a picture, resized.  uint8 [C, H, W] without the padding"""
    try:
        from PIL import Image
    except ImportError as e:
        raise CalibrationError("pictures are read by Pillow, which is not installed: pip install pillow; or pass a safetensors file of images") from e
    channels, height, width = preprocessing.size
    with Image.open(path) as picture:
        own = picture.convert("L" if channels == 1 else "RGB")
    side = round(min(own.size) * preprocessing.crop)
    left, top = (own.width - side) // 2, (own.height - side) // 2
    target = (width - 2 * preprocessing.pad, height - 2 * preprocessing.pad)
    resized = own.resize(target, Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    values = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8)
    return values.view(target[1], target[0], channels).permute(2, 0, 1).contiguous()
