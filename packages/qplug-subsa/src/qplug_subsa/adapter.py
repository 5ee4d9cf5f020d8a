"""The adapter as it is registered: `TextEncoder`, where no other plug-in knows the model better, for batches without a mask too."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from qcore.model.tap import RunContext
from torch import Tensor, nn

from qplug_subsa.encoder import TextEncoder


class AnyTextEncoder(TextEncoder):
    """BERT and its like: `embeddings`, then `encoder.layer` of attention and two linears; LayerNorm behind every residual sum.

    A batch without "attention_mask" has no padding.  Adapters that find links in such models (qplug-llm's `encoder-lm`) go first.
    """

    priority: ClassVar[int] = -10

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        """[B, T, d] last hidden states, 0 at padding."""
        return super().outputs(model, _masked(batch))

    def context(self, batch: Mapping[str, Tensor]) -> RunContext:
        return RunContext(valid=_masked(batch)["attention_mask"].bool(), weight=float(batch.get("row_weight", 1.0)))


def _masked(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the model takes of a batch, with a mask."""
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "row_weight")}
    return {"attention_mask": torch.ones_like(inputs["input_ids"]), **inputs}
