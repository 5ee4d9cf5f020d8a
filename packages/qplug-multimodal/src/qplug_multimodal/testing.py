"""Tiny vision-language models with random weights that hide nothing, and batches for them: for tests of adapters, transforms and policies."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from qcore.model.adapter import ModelAdapter
from qcore.model.reader import DictReader
from qcore.testing.models import randomize
from qcore.testing.transforms import fit_transform
from qcore.transforms.rewrite import Rewrite, RewrittenReader, rewritten_topology
from torch import Tensor, nn

from qplug_multimodal.adapter import VisionLanguage

IMAGE = 90
VOCABULARY = 96

# a pattern is text and images in turn: a number is so many words, "i" an image
Pattern = tuple[int | str, ...]


def tiny_llava(tower: Literal["clip", "siglip"] = "clip", feature_layer: int = -2, seed: int = 0) -> nn.Module:
    """LLaVA: a tower of 3 layers (d = 32, 4 heads), the projector, a Llama of 2 (d = 48, 4 heads over 2).  Images are 3 × 16 × 16: 4 visual tokens"""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

    make: Any = CLIPVisionConfig if tower == "clip" else SiglipVisionConfig
    vision = make(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=16, patch_size=8, hidden_act="gelu")
    text = LlamaConfig(
        hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=VOCABULARY,
        max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    llava: Any = LlavaConfig
    config = llava(
        vision_config=vision, text_config=text, image_token_id=IMAGE, vision_feature_layer=feature_layer, tie_word_embeddings=False,
        vision_feature_select_strategy="default" if tower == "clip" else "full", image_seq_length=4,
    )  # fmt: skip
    return _seeded(LlavaForConditionalGeneration(config), seed)


def tiny_qwen2_vl(seed: int = 0) -> nn.Module:
    """Qwen2-VL: a tower of 2 blocks (d = 32, 4 heads) whose merger joins 2 × 2 patches, a text model of 2 layers with M-RoPE, embeddings tied."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    config = Qwen2VLConfig(
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 48, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4, "temporal_patch_size": 2,
                       "spatial_merge_size": 2, "in_channels": 3, "hidden_act": "quick_gelu"},
        text_config={"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                     "vocab_size": VOCABULARY, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
                     "tie_word_embeddings": True,
                     "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}},
        image_token_id=IMAGE, video_token_id=IMAGE + 1, vision_start_token_id=IMAGE + 2, vision_end_token_id=IMAGE + 3, tie_word_embeddings=True,
    )  # fmt: skip
    return _seeded(Qwen2VLForConditionalGeneration(config), seed)


def tiny_clip(seed: int = 0) -> nn.Module:
    """CLIP: an image tower of 2 layers (d = 32, 16 × 16 pixels) and a text tower of 2 (d = 24)."""
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(
        vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
                       "patch_size": 8},
        text_config={"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY,
                     "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
        projection_dim=16,
    )  # fmt: skip
    return _seeded(CLIPModel(config), seed)


def clip_batch(images: int = 3, texts: int = 4, length: int = 7, seed: int = 0) -> dict[str, Tensor]:
    """Random images, and texts that end with id 2, padded on the right."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (texts, length), generator=g)
    ids[:, -1] = 2
    ids[0, -3:] = torch.tensor([2, 0, 0])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()} | _pixels(images, (3, 16, 16), seed)


class ExactRMSNorm(nn.Module):
    """g ∘ x / √(mean x² + ε) in the dtype of x.  transformers' own goes through float32, which hides what lies below 1e-7"""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


def _seeded(model: nn.Module, seed: int) -> nn.Module:
    """Lively weights, and norms that are as exact as the dtype."""
    for path, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            model.set_submodule(path, ExactRMSNorm(module.weight, module.variance_epsilon))
    return randomize(model, seed).eval()


def ids_of(pattern: Pattern, tokens: int, seed: int = 0) -> Tensor:
    """Ids of one sequence.  tokens: visual tokens of an image.  [T]"""
    g = torch.Generator().manual_seed(seed)
    parts = [torch.full((tokens,), IMAGE) if part == "i" else torch.randint(3, IMAGE, (int(part),), generator=g) for part in pattern]
    return torch.cat(parts)


def llava_batch(*patterns: Pattern, seed: int = 0, tokens: int = 4, size: int = 16) -> dict[str, Tensor]:
    """A batch of sequences, padded on the left, with one random image for each "i"."""
    ids = [ids_of(p, tokens, seed + i) for i, p in enumerate(patterns)]
    return _padded(ids) | _pixels(sum(p.count("i") for p in patterns), (3, size, size), seed)


def qwen_batch(*patterns: Pattern, seed: int = 0) -> dict[str, Tensor]:
    """The same for Qwen2-VL: every image is a grid of 4 × 4 patches, 4 visual tokens after merging."""
    ids = [ids_of(p, 4, seed + i) for i, p in enumerate(patterns)]
    images = sum(p.count("i") for p in patterns)
    batch = _padded(ids)
    batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE).int()
    if not images:
        return batch
    g = torch.Generator().manual_seed(seed + 1)
    return batch | {"pixel_values": torch.randn(images * 16, 3 * 2 * 4 * 4, generator=g), "image_grid_thw": torch.tensor([[1, 4, 4]] * images)}


def _padded(ids: list[Tensor]) -> dict[str, Tensor]:
    longest = max(map(len, ids))
    rows = torch.stack([torch.cat([torch.zeros(longest - len(row), dtype=torch.long), row]) for row in ids])
    mask = torch.stack([torch.arange(longest) >= longest - len(row) for row in ids]).long()
    return {"input_ids": rows, "attention_mask": mask}


def _pixels(images: int, shape: tuple[int, ...], seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed + 1)
    return {"pixel_values": torch.randn(images, *shape, generator=g)} if images else {}


def composed(
    transforms: Sequence[Any], model: nn.Module, batches: Sequence[Any] = (), specs: Any = None, adapter: ModelAdapter | None = None
) -> Rewrite:
    """The rewrite of several transforms of scope "model", each fitted on what the ones before leave."""
    adapter = VisionLanguage() if adapter is None else adapter
    topology, rewrite = adapter.topology(model), Rewrite()
    for transform in transforms:
        reader = RewrittenReader(DictReader(dict(model.state_dict())), rewrite, model)
        own = fit_transform(transform, adapter, model, batches, specs, topology=rewritten_topology(topology, rewrite), reader=reader)
        rewrite = rewrite.then(own)
    return rewrite
