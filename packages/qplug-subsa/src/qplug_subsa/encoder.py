"""Text encoders as qcore sees them: the embedding model itself can be quantized, and its vectors compared."""

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

import torch
from qcore.model import Block, DictReader, LoadedModel, ModelAdapter, Port, Site, Topology
from qcore.model.tap import RunContext
from torch import Tensor, nn

_WHY = "no rewrite is known to keep a post-norm encoder's function here; its linears are only rounded"


class TextEncoder(ModelAdapter):
    """BERT and its like: `embeddings`, then `encoder.layer` of attention and two linears; LayerNorm behind every residual sum.

    Batches are {"input_ids": [B, T], "attention_mask": [B, T]}; padding is left out of what observers see.
    """

    name: ClassVar[str] = "text-encoder"

    def matches(self, model: nn.Module) -> bool:
        layers = getattr(getattr(model, "encoder", None), "layer", None)
        # word embeddings, for vision transformers have embeddings and encoder.layer too
        words = getattr(getattr(model, "embeddings", None), "word_embeddings", None)
        return isinstance(layers, nn.ModuleList) and len(layers) > 0 and isinstance(words, nn.Embedding) and bool(_linears(layers[0]))

    def topology(self, model: nn.Module) -> Topology:
        layers: Any = model.get_submodule("encoder.layer")
        blocks = []
        for i, layer in enumerate(layers):
            path = f"encoder.layer.{i}"
            # linears of one parent (query, key, value) see one input
            groups = groupby(_linears(layer), lambda name: name.rpartition(".")[0])
            blocks.append(Block(path, tuple(tuple(Site(f"{path}.{name}") for name in names) for _, names in groups)))
        axes = ("out", "in")
        blocked = {Port(n, axis): _WHY for n, p in model.named_parameters() if p.ndim > 1 for axis in axes}  # type: ignore[arg-type]
        return Topology(tuple(blocks), blocked=blocked)

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        """[B, T, d] last hidden states, 0 at padding."""
        hidden = model(**batch).last_hidden_state
        return hidden * batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)

    def context(self, batch: Mapping[str, Tensor]) -> RunContext:
        return RunContext(valid=batch["attention_mask"].bool())


def _linears(layer: nn.Module) -> list[str]:
    return [name for name, m in layer.named_modules() if isinstance(m, nn.Linear)]


def load_encoder(folder: Path) -> LoadedModel:
    """An encoder in a folder, for `qcore.pipeline.quantize_model`; what comes out embeds through `qplug_subsa.embed.embed_with`."""
    from qplug_subsa.embed import LocalModel

    model = LocalModel(folder).model
    return LoadedModel(model, DictReader({n: t.detach().clone() for n, t in model.state_dict().items()}), folder.name, dtype=torch.float32)


def batches_of(tokenizer: Any, texts: list[str], length: int, batch: int = 16) -> list[dict[str, Tensor]]:
    """Calibration batches of one shape, [batch, length]."""
    tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    kept = len(texts) // batch * batch
    parts = [tokens[key][:kept].split(batch) for key in ("input_ids", "attention_mask")]
    return [{"input_ids": ids, "attention_mask": mask} for ids, mask in zip(*parts, strict=True)]
