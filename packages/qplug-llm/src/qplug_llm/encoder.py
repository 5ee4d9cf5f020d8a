"""Encoders of text (BERT and its kin, sentence embedders): what shares channels is found and proven as for decoders, on a small twin.

What they put out are hidden states, so nothing may turn or reorder the last of them.  A BERT-like block norms what it adds to its stream: the stream
is no plain sum, and it is refused as a link, with that reason; values, keys and the inner layer are links as everywhere.
"""

from typing import Any, ClassVar

from torch import Tensor, nn

from qplug_llm import twin
from qplug_llm.decoder import DecoderLM
from qplug_llm.structure import find_blocks


class EncoderLM(DecoderLM):
    """Models of transformers that read token ids and give hidden states, without a language model's head."""

    name: ClassVar[str] = "encoder-lm"
    priority: ClassVar[int] = -5  # whoever knows a family better goes first

    def matches(self, model: nn.Module) -> bool:
        config = getattr(model, "config", None)
        if config is None or getattr(config, "is_encoder_decoder", False) or getattr(config, "num_attention_heads", None) is None:
            return False
        if getattr(model, "main_input_name", "") != "input_ids" or model.get_output_embeddings() is not None:  # type: ignore[operator]
            return False
        return isinstance(model.get_input_embeddings(), nn.Embedding) and find_blocks(model) is not None  # type: ignore[operator]

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        """Last hidden states [B, T, C]."""
        inputs = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
        for key in ("labels", "row_weight"):
            inputs.pop(key, None)
        return twin.outputs_of(model(**inputs))
