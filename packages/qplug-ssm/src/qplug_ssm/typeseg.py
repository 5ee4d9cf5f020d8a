"""The Mamba of the PyPI package `typeseg`: a trained bidirectional state-space model that labels every byte with one of 35 content types.

Six blocks read the bytes forwards and, with the same parameters, backwards: S6, width 256, 16 states, 1.36 million float32 parameters.  Not causal.
The weights are the package's own file, `typeseg/data/mamba_al.npz` (Apache-2.0), names as Flax gives them; nothing of the package's code is run.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from qcore.errors import CheckpointError, NotFound
from qcore.model.source import LoadedModel, ModelSource, parameters_on_meta
from torch import Tensor, nn

from qplug_ssm.byte_texts import ByteTexts
from qplug_ssm.mixer import SelectiveMixer

_KIND = "typeseg-mamba"
_PAD = 256
_PLACEHOLDER = 0xA4  # what stands for every byte that is neither printable ASCII nor a common blank


class Block(nn.Module):
    """x + mixer(norm(x))."""

    def __init__(self, width: int, rank: int, states: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mixer = SelectiveMixer.fresh(
            width, width, rank=rank, states=states, directions="mirror", bias=True, x_bias=True, same=True, delta_floor=1e-4
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixer(self.norm(x))


class TypeSeg(nn.Module):
    """Bytes [B, T], 256 for padding → logits [B, T, 35]."""

    def __init__(self, width: int = 256, layers: int = 6, rank: int = 16, states: int = 16, classes: int = 35, vocabulary: int = 130) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, rank, states) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        # 128 ASCII codes, one row for all other bytes, one for padding
        x = self.embed(torch.where(tokens < 128, tokens, torch.where(tokens < _PAD, 128, 129)))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def to_bytes(text: str) -> list[int]:
    """What the model reads of a text: its UTF-8 bytes, those that it does not know replaced by 0xA4."""
    known = {*range(0x20, 0x7F), 0x09, 0x0A, 0x0D, _PLACEHOLDER}
    return [b if b in known else _PLACEHOLDER for b in text.encode("utf-8", "ignore")]


class TypeSegFile(ModelSource):
    """`mamba_al.npz` of the package typeseg."""

    name: ClassVar[str] = "typeseg"
    help: ClassVar[str] = "path/to/mamba_al.npz the Mamba of the package typeseg"

    def matches(self, uri: str) -> bool:
        return Path(uri).name == "mamba_al.npz" and Path(uri).is_file()

    def load(self, uri: str) -> LoadedModel:
        reader = NpzReader(Path(uri))

        def write(target: Path) -> None:
            target.mkdir(parents=True, exist_ok=True)
            (target / "config.json").write_text(json.dumps({"model_type": _KIND}) + "\n", encoding="utf-8")

        return LoadedModel(
            model=_skeleton(),
            reader=reader,
            name=_KIND,
            dtype=torch.float32,
            source=self.name,
            write_companions=write,
            data=ByteTexts(to_bytes),
        )

    def skeleton(self, folder: Path) -> nn.Module:
        return _skeleton()


class NpzReader:
    """The Flax arrays under the names and in the layout of `TypeSeg`."""

    _LEAVES: ClassVar[dict[str, str]] = {
        "mixer.in_proj": "Dense_0",
        "mixer.conv1d": "Conv_0",
        "mixer.x_proj": "Dense_1",
        "mixer.dt_proj": "Dense_2",
        "mixer.out_proj": "Dense_3",
    }

    def __init__(self, path: Path) -> None:
        try:
            with np.load(path, allow_pickle=False) as arrays:
                self._arrays = {name: arrays[name] for name in arrays.files}
        except (OSError, ValueError) as e:
            raise CheckpointError(f"{path} cannot be read as plain arrays ({e}); reinstall the package typeseg") from e
        self._names = {name: _flax_name(name) for name in _skeleton().state_dict()}
        if missing := sorted(n for n in self._names.values() if n not in self._arrays):
            raise CheckpointError(f"{path} lacks {missing[0]!r}; it is of another version of typeseg than 0.2")

    def names(self) -> Iterable[str]:
        return self._names.keys()

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise NotFound(f"no tensor named {name!r}; there are {len(self._names)}, such as {', '.join(list(self._names)[:3])}")
        value = torch.from_numpy(self._arrays[self._names[name]].copy())
        if self._names[name].endswith("kernel"):
            # Flax: dense [K, N], convolution [k, 1, C]
            value = value.T if value.ndim == 2 else value.permute(2, 1, 0)
        return value.contiguous()


def _flax_name(name: str) -> str:
    path, _, own = name.rpartition(".")
    if path in ("embed", "norm", "head"):
        kinds = {"embed": "Embed_0__embedding", "norm": f"LayerNorm_0__{'scale' if own == 'weight' else 'bias'}"}
        return kinds.get(path, f"Dense_0__{'kernel' if own == 'weight' else 'bias'}")
    _, index, rest = name.split(".", 2)
    block = f"CheckpointMambaBlock1D_{index}__"
    leaf, _, own = rest.rpartition(".")
    if leaf == "mixer":
        return block + own
    if leaf == "norm":
        return f"{block}LayerNorm_0__{'scale' if own == 'weight' else 'bias'}"
    return f"{block}{NpzReader._LEAVES[leaf]}__{'kernel' if own == 'weight' else 'bias'}"


def _skeleton() -> Any:
    with parameters_on_meta():
        return TypeSeg().eval()
