"""Models of two towers, one for images and one for text, whose embeddings are compared: CLIP as transformers has it.

The towers share nothing but the space of their embeddings.  Those are what users keep and compare, so their channels stay as they are, and the
projections into it stay float.
"""

from typing import Any, ClassVar

from qcore.model.adapter import ModelAdapter, tied_names
from qcore.model.tap import RunContext
from qcore.model.topology import Axis, Block, Link, Site, Topology
from torch import Tensor, nn

from qplug_multimodal.anatomy import Anatomy, Connector, Tower, _blocks_of, _tower, is_norm
from qplug_multimodal.links import Links
from qplug_multimodal.modality import ForgetTokens, Leave

IMAGES, TEXT = ("vision_model", "visual_projection"), ("text_model", "text_projection")


class TwoTowerLinks(Links):
    """The links of two towers, each with a norm behind its blocks that one projection reads."""

    def _connector(self) -> None:
        """There is none."""

    def _vision_stream(self) -> None:
        self._tower_stream("image residual", self.anatomy.vision, IMAGES[1])

    def _language_stream(self) -> None:
        self._tower_stream("text residual", self.anatomy.language, TEXT[1])

    def _tower_stream(self, name: str, tower: Tower, projection: str) -> None:
        norm = last_norm(self.model, tower)
        writes, reads, through = self._stream(tower)
        if tower.strange or not norm:
            why = tower.strange or f"no norm was found behind the blocks of {tower.path}"
            self._refuse((*writes, *reads, *self._reads(projection)), f"the residual stream could not be followed: {why}")
            return
        self._norm(norm, (projection,))
        through = (*through, norm)
        size = self._size(norm)
        self.links.append(Link(name, size, writes, (*reads, *self._reads(projection)), self._invariance(through), through))

    def _reason(self, path: str, module: nn.Module, axis: Axis) -> str:
        if path in (IMAGES[1], TEXT[1]) and axis == "out":
            return "embeddings, which users keep and compare: their channels stay"
        return super()._reason(path, module, axis)


def last_norm(model: nn.Module, tower: Tower) -> str:
    """The norm behind the blocks: the last child of the tower that is one, and stands in no stream; "" without."""
    found = [f"{tower.path}.{n}" for n, m in model.get_submodule(tower.path).named_children() if is_norm(m)]
    return next((p for p in reversed(found) if p not in tower.passes), "")


class TwoTower(ModelAdapter):
    """CLIP of transformers: an image tower and a text tower, each with a projection into one space."""

    name: ClassVar[str] = "two-tower"
    priority: ClassVar[int] = 5

    def matches(self, model: nn.Module) -> bool:
        children = dict(model.named_children())

        def has_blocks(tower: str) -> bool:
            return tower in children and any(isinstance(m, nn.ModuleList) for m in children[tower].modules())

        return all(has_blocks(tower) and isinstance(children.get(projection), nn.Linear) for tower, projection in (IMAGES, TEXT))

    def prepare(self, model: nn.Module) -> None:
        """Rows of the image tower are patches: what the context says of padding is of the text, in place."""
        tower = model.get_submodule(IMAGES[0])
        if not any(type(hook) is ForgetTokens for hook in tower._forward_pre_hooks.values()):
            tower.register_forward_pre_hook(ForgetTokens(), with_kwargs=True)
            tower.register_forward_hook(Leave(), with_kwargs=True, always_call=True)

    def topology(self, model: nn.Module) -> Topology:
        images, text = (_tower(model, path, _blocks_of(model, path), None, "") for path in (IMAGES[0], TEXT[0]))
        links = TwoTowerLinks(model, Anatomy(images, Connector("", "", ()), text, "", ""))
        blocks = []
        for block in (*images.blocks, *text.blocks):
            stages = tuple(sites for stage in block.stages if (sites := tuple(Site(p) for p in stage if p)))
            blocks.append(Block(block.path, stages, feed="rerun"))
        return Topology(tuple(blocks), tuple(links.links), links.blocked(), ties=tied_names(model))

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        """Scores of each image with each text, [images, texts]."""
        return model(**batch).logits_per_image

    def context(self, batch: Any) -> RunContext:
        mask = batch.get("attention_mask")
        return RunContext(valid=None if mask is None else mask.bool())
