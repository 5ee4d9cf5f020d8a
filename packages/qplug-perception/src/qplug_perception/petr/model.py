"""PETR: images of a rig of cameras → boxes in space, by a decoder whose keys are image features with 3-D positions added.

| input | shape |
|---|---|
| images | [B, N, 3, H, W], normalized |
| lidar2img | [B, N, 4, 4], metres in the frame of the LiDAR → (u·d, v·d, d, 1) in pixels |
| padding | [B, N, H, W] bool, optional: True where an image was filled up |

Out come logits [B, Q, classes] and codes [B, Q, 10]: (cx, cy, log w, log l, cz, log h, sin, cos, vx, vy), centres in metres.

Source: PETR, https://arxiv.org/abs/2203.05625, and its release (megvii-research/PETR).  Where the two differ this is the release: all decoder
layers share one classification and one regression branch, for its list holds one object six times; the flag of pixels that look outside the range
is not used.
"""

from typing import Any

import torch
import torch.nn.functional as F
from qcore.errors import SpecError
from torch import Tensor, nn

from qplug_perception.petr.attention import Attention
from qplug_perception.petr.backbone import ImageBranch
from qplug_perception.petr.config import PETRConfig
from qplug_perception.petr.position import PETREmbedding, inverse_sigmoid, pointwise_mlp, sine_of_places, sine_of_points
from qplug_perception.petr.qfpe import QFPE

CODE = 10


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention, feed-forward, each added to its input and normalized behind."""

    def __init__(self, config: PETRConfig) -> None:
        super().__init__()
        width = config.width
        self.self_attn, self.cross_attn = (Attention(width, config.heads, config.dropout) for _ in range(2))
        self.up, self.down = nn.Linear(width, config.feedforward), nn.Linear(config.feedforward, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, place: Tensor, key: Tensor, value: Tensor, padding: Tensor | None) -> Tensor:
        """x: [B, Q, C];  place: [B, Q, C], added to queries;  key: [B, S, C] with positions, value: without"""
        at = x + place
        x = self.norms[0](x + self.dropout(self.self_attn(at, at, x)))
        x = self.norms[1](x + self.dropout(self.cross_attn(x + place, key, value, padding)))
        return self.norms[2](x + self.dropout(self.down(self.dropout(F.relu(self.up(x))))))


class PETR(nn.Module):
    """The whole detector; see the module's docstring."""

    def __init__(self, config: PETRConfig) -> None:
        super().__init__()
        self.config = config
        width, sine = config.width, config.width // 2
        self.image = ImageBranch(config)
        self.position: PETREmbedding | QFPE
        if config.embedding == "petr":
            self.position = PETREmbedding(width, config.depths, config.depth_start, config.position_range)
        else:
            self.position = QFPE(width, config.anchor_depth, config.anchors, config.anchor_width or sine, config.position_range)
        self.views = pointwise_mlp(3 * sine, 4 * width, width)
        self.reference = nn.Embedding(config.queries, 3)
        self.query = nn.Sequential(nn.Linear(3 * sine, width), nn.ReLU(), nn.Linear(width, width))
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width)
        classes = [m for _ in range(2) for m in (nn.Linear(width, width), nn.LayerNorm(width), nn.ReLU())]
        self.classify = nn.Sequential(*classes, nn.Linear(width, config.classes))
        self.regress = nn.Sequential(*[m for _ in range(2) for m in (nn.Linear(width, width), nn.ReLU())], nn.Linear(width, CODE))
        self.initialize()

    def initialize(self) -> None:
        """Weights as the release starts: Xavier in the decoder, reference points anywhere in the range, few classes likely."""
        for m in self.layers.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        nn.init.uniform_(self.reference.weight, 0, 1)
        last: Any = self.classify[-1]
        nn.init.constant_(last.bias, -4.595)  # log(0.01 / 0.99)

    def memory(self, images: Tensor, lidar2img: Tensor, padding: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Features and their positions, both [B, S, C], and the padding of them, [B, S]; S = N·rows·columns."""
        if images.ndim != 5 or images.shape[2] != 3 or lidar2img.shape != (*images.shape[:2], 4, 4):
            raise SpecError(f"PETR reads images [B, N, 3, H, W] and lidar2img [B, N, 4, 4], got {tuple(images.shape)} and {tuple(lidar2img.shape)}")
        b, n = images.shape[:2]
        features = self.image(images.flatten(0, 1)).unflatten(0, (b, n))  # [B, N, C, rows, columns]
        grid, size = (features.shape[-2], features.shape[-1]), (images.shape[-2], images.shape[-1])
        if padding is None:
            mask = torch.zeros(b, n, *grid, dtype=torch.bool, device=images.device)
        else:
            mask = F.interpolate(padding.float(), size=grid).bool()
        sine = sine_of_places(mask, self.config.width // 2).to(features.dtype)
        place = self.position(lidar2img, grid, size) + self.views(sine.flatten(0, 1)).unflatten(0, (b, n))
        flat = [x.permute(0, 1, 3, 4, 2).flatten(1, 3) for x in (features, place)]
        return flat[0], flat[1], None if padding is None else mask.flatten(1)

    def states(self, images: Tensor, lidar2img: Tensor, padding: Tensor | None = None) -> list[Tensor]:
        """What each decoder layer puts out, normalized.  [B, Q, C] each"""
        features, place, mask = self.memory(images, lidar2img, padding)
        query = self.query(sine_of_points(self.reference.weight, self.config.width // 2))
        query = query.expand(images.shape[0], -1, -1)
        x, key, out = torch.zeros_like(query), features + place, []
        for layer in self.layers:
            x = layer(x, query, key, features, mask)
            out.append(self.norm(x))
        return out

    def heads(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, Q, classes] and codes [B, Q, 10] of one layer's output."""
        code = self.regress(state)
        start = inverse_sigmoid(self.reference.weight).to(code.dtype)
        centre = (code[..., (0, 1, 4)] + start).sigmoid()
        low, high = code.new_tensor(self.config.pc_range[:3]), code.new_tensor(self.config.pc_range[3:])
        x, y, z = (centre * (high - low) + low).unbind(-1)
        code = torch.stack([x, y, *code[..., 2:4].unbind(-1), z, *code[..., 5:].unbind(-1)], -1)
        return self.classify(state), code

    def forward(self, images: Tensor, lidar2img: Tensor, padding: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits and codes of the last layer."""
        return self.heads(self.states(images, lidar2img, padding)[-1])
