"""LAVT, the variant "lavt_one": a Swin transformer that looks at a sentence after each of its four stages, and a convolutional decoder.

Source: https://arxiv.org/abs/2112.02244; parameter names are those of the released checkpoints.  Swin's blocks are timm's, the sentence encoder is
transformers' BERT; the rest is here.  Every product of two activations is tapped (`qcore.model.attention`), so that it can be quantized.

Differs from the release: batch norms of the decoder are ordinary ones (the release's are synchronized over processes while it trains, the same
in eval mode); the pixels of `patch_embed` are padded to whole patches, as there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from qcore.errors import SpecError
from qcore.model.attention import attention
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock, WindowAttention
from torch import Tensor, nn

ATTENTION = "qcore-written-out"  # the name of our attention function in transformers' AttentionInterface


@dataclass(frozen=True, kw_only=True)
class LavtConfig:
    """The sizes of a LAVT.  The defaults are those of the released checkpoints: Swin-B with windows of 12, BERT-base.

    embed, depths, heads, window, patch: of Swin; stage i has embed · 2^i channels
    decoder: channels inside the decoder; 0 = half of the last stage's
    bert:    fields of transformers' BertConfig that differ from BERT-base
    """

    embed: int = 128
    depths: tuple[int, ...] = (2, 2, 18, 2)
    heads: tuple[int, ...] = (4, 8, 16, 32)
    window: int = 12
    patch: int = 4
    decoder: int = 0
    bert: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.depths) != 4 or len(self.heads) != 4:
            raise SpecError(f"LAVT has four stages, got depths={self.depths} and heads={self.heads}")
        for width, heads in zip(self.widths, self.heads, strict=True):
            if width % heads:
                raise SpecError(f"{heads} heads do not divide the {width} channels of their stage; got embed={self.embed}, heads={self.heads}")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return tuple(self.embed << i for i in range(4))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "LavtConfig":
        known = set(cls.__dataclass_fields__)
        if unknown := sorted(set(data) - known):
            raise SpecError(f"a LAVT has no field {unknown[0]!r}; it has: {', '.join(sorted(known))}")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in data.items()})  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


# Swin ------------------------------------------------------------------------------------------------------------------------------------


class TappedWindowAttention(WindowAttention):
    """timm's window attention, written out so that q, k, v and p can be tapped; the same parameters."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        windows, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(windows, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        bias = self._get_rel_pos_bias()
        if mask is not None:
            own = mask.unsqueeze(1).to(bias.dtype)  # [W, 1, n, n]
            bias = (bias + own).repeat(windows // mask.shape[0], 1, 1, 1)
        y = attention(self, q, k, v, scaling=self.scale, bias=bias)
        return self.proj_drop(self.proj(y.transpose(1, 2).reshape(windows, n, -1)))


def _swin_block(width: int, heads: int, window: int, shift: int) -> SwinTransformerBlock:
    # always_partition and dynamic_mask: windows keep their size on maps smaller than they are and the mask follows the map, as in the release
    block = SwinTransformerBlock(
        width, input_resolution=window, num_heads=heads, window_size=window, shift_size=shift, always_partition=True, dynamic_mask=True
    )
    block.attn = TappedWindowAttention(width, heads, window_size=window)
    return block


class PatchEmbed(nn.Module):
    """Pixels [B, 3, H, W] → a map of patches [B, h, w, C]."""

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(3, width, patch, patch)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, -x.shape[3] % self.patch, 0, -x.shape[2] % self.patch))
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


# fusion ----------------------------------------------------------------------------------------------------------------------------------


class SpatialImageLanguageAttention(nn.Module):
    """Every place of the map looks at the words.  x: [B, T, C], l: [B, L, N], mask: [B, N, 1] → [B, T, C]"""

    def __init__(self, width: int, words: int) -> None:
        super().__init__()
        self.f_key = nn.Sequential(nn.Conv1d(words, width, 1))
        self.f_query = nn.Sequential(nn.Conv1d(width, width, 1), nn.InstanceNorm1d(width))
        self.f_value = nn.Sequential(nn.Conv1d(words, width, 1))
        self.W = nn.Sequential(nn.Conv1d(width, width, 1), nn.InstanceNorm1d(width))
        self.scaling = width**-0.5

    def forward(self, x: Tensor, l: Tensor, mask: Tensor) -> Tensor:  # noqa: E741  (the release's name for language)
        there = mask.transpose(1, 2)  # [B, 1, N]
        q = self.f_query(x.transpose(1, 2)).transpose(1, 2)
        k, v = ((f(l) * there).transpose(1, 2) for f in (self.f_key, self.f_value))
        y = attention(self, q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), scaling=self.scaling, bias=(1e4 * there - 1e4).unsqueeze(1))
        return self.W(y.squeeze(1).transpose(1, 2)).transpose(1, 2)


class PWAM(nn.Module):
    """Pixel-word attention: what the sentence has to say at each place, in the channels of the map."""

    def __init__(self, width: int, words: int) -> None:
        super().__init__()
        self.vis_project = nn.Sequential(nn.Conv1d(width, width, 1), nn.GELU())
        self.image_lang_att = SpatialImageLanguageAttention(width, words)
        self.project_mm = nn.Sequential(nn.Conv1d(width, width, 1), nn.GELU())

    def forward(self, x: Tensor, l: Tensor, mask: Tensor) -> Tensor:  # noqa: E741
        vis = self.vis_project(x.transpose(1, 2))
        lang = self.image_lang_att(x, l, mask).transpose(1, 2)
        return self.project_mm(vis * lang).transpose(1, 2)


class Stage(nn.Module):
    """Swin blocks, then the sentence, then half the map.  x: [B, h, w, C] → (what the decoder reads, [B, h, w, C]; the next stage's x)"""

    def __init__(self, width: int, depth: int, heads: int, window: int, words: int, last: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_swin_block(width, heads, window, 0 if i % 2 == 0 else window // 2) for i in range(depth))
        self.fusion = PWAM(width, words)
        self.res_gate = nn.Sequential(nn.Linear(width, width, bias=False), nn.ReLU(), nn.Linear(width, width, bias=False), nn.Tanh())
        self.downsample = None if last else PatchMerging(width)

    def forward(self, x: Tensor, l: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:  # noqa: E741
        for block in self.blocks:
            x = block(x)
        mm = self.fusion(x.flatten(1, 2), l, mask).unflatten(1, x.shape[1:3])
        x = x + self.res_gate(mm) * mm
        return mm, x if self.downsample is None else self.downsample(x)


class Backbone(nn.Module):
    """Swin with a sentence: pixels and words → four maps [B, C_i, h_i, w_i]."""

    def __init__(self, config: LavtConfig, words: int) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(config.patch, config.embed)
        sizes = zip(config.widths, config.depths, config.heads, strict=True)
        self.layers = nn.ModuleList(Stage(c, d, h, config.window, words, last=i == 3) for i, (c, d, h) in enumerate(sizes))
        for i, width in enumerate(config.widths):
            self.add_module(f"norm{i}", nn.LayerNorm(width))

    def forward(self, x: Tensor, l: Tensor, mask: Tensor) -> list[Tensor]:  # noqa: E741
        x = self.patch_embed(x)
        maps = []
        for i, stage in enumerate(self.layers):
            mm, x = stage(x, l, mask)
            maps.append(self.get_submodule(f"norm{i}")(mm).permute(0, 3, 1, 2).contiguous())
        return maps


# decoder ---------------------------------------------------------------------------------------------------------------------------------


class SimpleDecoding(nn.Module):
    """Four maps, the deepest first, → logits of background and object [B, 2, h, w], at the size of the largest map."""

    def __init__(self, widths: Sequence[int], hidden: int) -> None:
        super().__init__()
        inputs = {4: widths[3] + widths[2], 3: hidden + widths[1], 2: hidden + widths[0]}
        for i, channels in inputs.items():
            for j, into in ((1, channels), (2, hidden)):
                self.add_module(f"conv{j}_{i}", nn.Conv2d(into, hidden, 3, padding=1, bias=False))
                self.add_module(f"bn{j}_{i}", nn.BatchNorm2d(hidden))
                self.add_module(f"relu{j}_{i}", nn.ReLU())
        self.conv1_1 = nn.Conv2d(hidden, 2, 1)

    def forward(self, c4: Tensor, c3: Tensor, c2: Tensor, c1: Tensor) -> Tensor:
        x = c4
        for i, finer in ((4, c3), (3, c2), (2, c1)):
            if x.shape[2:] != finer.shape[2:]:
                x = F.interpolate(x, finer.shape[2:], mode="bilinear", align_corners=True)
            x = torch.cat([x, finer], dim=1)
            for j in (1, 2):
                x = self.get_submodule(f"relu{j}_{i}")(self.get_submodule(f"bn{j}_{i}")(self.get_submodule(f"conv{j}_{i}")(x)))
        return self.conv1_1(x)

    def batchnorm_pairs(self) -> list[tuple[str, str]]:
        """(convolution, batch norm that alone reads it), by name."""
        return [(f"conv{j}_{i}", f"bn{j}_{i}") for i in (4, 3, 2) for j in (1, 2)]


# whole -----------------------------------------------------------------------------------------------------------------------------------


class Lavt(nn.Module):
    """An image and a sentence → logits of background and object for every pixel."""

    def __init__(self, config: LavtConfig) -> None:
        super().__init__()
        self.config = config
        text_encoder = _bert(config)
        self.text_encoder = text_encoder
        self.backbone = Backbone(config, text_encoder.config.hidden_size)
        self.classifier = SimpleDecoding(config.widths, config.decoder or config.widths[3] // 2)

    def forward(self, image: Tensor, ids: Tensor, words: Tensor) -> Tensor:
        """image: [B, 3, H, W] normalized; ids: [B, N] token ids; words: [B, N], 1 where there is a token, 0 for padding → [B, 2, H, W]"""
        l = self.text_encoder(ids, attention_mask=words)[0].transpose(1, 2)  # noqa: E741  [B, L, N]
        c1, c2, c3, c4 = self.backbone(image, l, words.unsqueeze(-1).to(l.dtype))
        return F.interpolate(self.classifier(c4, c3, c2, c1), image.shape[2:], mode="bilinear", align_corners=True)


def _bert(config: LavtConfig) -> Any:
    from transformers import BertConfig, BertModel

    register_attention()
    own = BertConfig(**config.bert)
    own._attn_implementation = ATTENTION
    return BertModel(own, add_pooling_layer=False)


def register_attention() -> None:
    """Make `ATTENTION` a name that transformers knows; safe to call again."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, _bert_attention)
    # without it the mask would come back None, and padding would be attended to
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def _bert_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`qcore.model.attention` as transformers calls it.  attention_mask: [B, 1, T, S] bool, True = attend, or None"""
    bias = attention_mask
    if bias is not None and bias.dtype == torch.bool:
        bias = torch.zeros_like(bias, dtype=query.dtype).masked_fill(~bias, torch.finfo(query.dtype).min)
    y = attention(module, query, key, value, scaling=query.shape[-1] ** -0.5 if scaling is None else scaling, bias=bias)
    return y.transpose(1, 2).contiguous(), None
