"""One adapter for vision-language models of transformers: a vision tower, a connector, a language model.

Blocks are those of the tower (as far as the connector reads them), the connector, and those of the language model.  They are fed by passes
of the model itself ("rerun"): the first block of the language model does not read what the tower's last one puts out.
The convolution that embeds patches and the output head stay float.
"""

from typing import Any, ClassVar

from qcore.errors import NotFound
from qcore.model.adapter import ModelAdapter, tied_names
from qcore.model.tap import RunContext
from qcore.model.topology import Block, Site, Topology
from torch import Tensor, nn

from qplug_multimodal.anatomy import find_anatomy
from qplug_multimodal.links import Links
from qplug_multimodal.modality import watch_modalities


class VisionLanguage(ModelAdapter):
    """LLaVA, Qwen2-VL and models built like them: what shares channels is found by structure, and refused link by link where it is not known."""

    name: ClassVar[str] = "vision-language"

    def matches(self, model: nn.Module) -> bool:
        config = getattr(model, "config", None)
        if getattr(config, "vision_config", None) is None or not callable(getattr(model, "get_output_embeddings", None)):
            return False
        try:
            return bool(find_anatomy(model).head)
        except NotFound:
            return False

    def prepare(self, model: nn.Module) -> None:
        """Let the model say which of its tokens are visual while it runs, and follow an order of tokens (`aifs.py`), in place."""
        watch_modalities(model, find_anatomy(model))

    def topology(self, model: nn.Module) -> Topology:
        anatomy = find_anatomy(model)
        links = Links(model, anatomy)
        blocks = [self._block(b.path, b.stages) for b in anatomy.vision.blocks]
        blocks.append(self._block(anatomy.connector.path, tuple((p,) for p in anatomy.connector.layers)))
        blocks += [self._block(b.path, b.stages) for b in anatomy.language.blocks]
        return Topology(tuple(blocks), tuple(links.links), links.blocked(), ties=tied_names(model))

    @staticmethod
    def _block(path: str, stages: tuple[tuple[str, ...], ...]) -> Block:
        sites = (tuple(Site(p) for p in stage if p) for stage in stages)
        return Block(path, tuple(stage for stage in sites if stage), feed="rerun")

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        """Logits [B, T, V]."""
        inputs = {name: value for name, value in dict(batch).items() if name not in ("labels", "row_weight", "answers")}
        return model(**inputs, use_cache=False).logits

    def context(self, batch: Any) -> RunContext:
        mask = batch.get("attention_mask")
        return RunContext(valid=None if mask is None else mask.bool(), weight=float(batch.get("row_weight", 1.0)))
