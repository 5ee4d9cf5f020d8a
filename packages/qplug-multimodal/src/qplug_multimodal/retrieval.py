"""Which text belongs to a picture: what models of two towers are calibrated and judged on.

A file of pairs has one JSON object a line, {"images": ["a.png"], "text": "a photo of a dog"}; pictures lie beside the file.  Evaluated, each picture
is compared with all texts of the file.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from qcore.calibration.text import data_hash
from qcore.errors import CalibrationError, NotFound
from qcore.evaluation.metrics import Distance
from qcore.evaluation.store import LARGEST_FLOAT32, Reference, write_reference
from qcore.evaluation.task import Batch, Forward, Progress, Scores, Task, check_outputs, counted, run_each, same_data, tensors_of
from torch import Tensor

from qplug_multimodal.pairs import PairData, open_picture

_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # open_clip's, where a model names none
_VOCABULARY = 49408


@dataclass(frozen=True)
class OpenClipProcessor:
    """open_clip's own transform of pictures and its own tokenizer."""

    image_size: int
    context: int
    mean: tuple[float, ...] = _MEAN
    std: tuple[float, ...] = _STD

    def __call__(self, images: Sequence[Sequence[Path]], texts: Sequence[str], answers: Sequence[str]) -> dict[str, Tensor]:
        try:
            from open_clip.tokenizer import SimpleTokenizer
            from open_clip.transform import image_transform
        except ModuleNotFoundError as e:
            raise NotFound("pictures and texts are prepared by open_clip, which is not installed: pip install 'qplug-multimodal[open-clip]'") from e
        for paths, text in zip(images, texts, strict=True):
            if len(paths) != 1:
                raise CalibrationError(f"a pair is one picture and its text; {text!r} has {len(paths)} pictures")
        prepare: Any = image_transform(self.image_size, is_train=False, mean=self.mean, std=self.std)
        pixels = torch.stack([prepare(open_picture(paths[0])) for paths in images])
        return {"pixel_values": pixels, "input_ids": SimpleTokenizer(context_length=self.context)(list(texts))}


@dataclass(frozen=True)
class Retrieval:
    """The text that belongs to each picture, of all texts: share of pictures that find theirs, and how far the model is from its float self.

    pixels: [N, 3, H, W];  texts: [M, T] ids, all different;  own: [N], the text of each picture
    """

    name: ClassVar[str] = "retrieval"
    better: ClassVar[dict[str, bool]] = {"accuracy": True, "top1": True, "kl": False, "sqnr_db": True}
    pixels: Tensor
    texts: Tensor
    own: Tensor
    batch: int = 16
    largest: int = LARGEST_FLOAT32

    def __post_init__(self) -> None:
        if len(self.texts) < 2:
            raise CalibrationError("an evaluation wants at least two different texts: of one alone every picture finds it")

    @property
    def batches(self) -> list[Batch]:
        return [{"pixel_values": pixels, "input_ids": self.texts} for pixels in self.pixels.split(self.batch)]

    def data(self) -> str:
        return data_hash(self.pixels, self.texts, self.own)

    def sample(self) -> Batch:
        return self.batches[0]

    def reference(self, forward: Forward, folder: Path, progress: Progress | None = None) -> Reference:
        outputs = counted(self._outputs(forward), "float model", len(self.batches), progress)
        return write_reference(folder, outputs, len(self.pixels), self.data(), self.largest)

    def evaluate(self, forward: Forward, reference: Reference, progress: Progress | None = None) -> Scores:
        same_data(self, reference)
        distance, at = Distance(), 0
        for i, scores in enumerate(counted(self._outputs(forward), "evaluate", len(self.batches), progress)):
            check_outputs(scores, reference, f"batch {i}")
            distance.add(reference.read(at, at + len(scores)), scores, self.own[at : at + len(scores)])
            at += len(scores)
        return {
            "accuracy": distance.hits.mean,
            "accuracy_reference": distance.hits_reference.mean,
            "kl": distance.kl.mean,
            "kl_standard_error": distance.kl.standard_error,
            "top1": distance.top1.mean,
            "sqnr_db": distance.sqnr_db,
            "rows": at,
        }

    @torch.no_grad()
    def _outputs(self, forward: Forward) -> Any:
        for scores in run_each(forward, self.batches):
            yield scores.cpu()


@dataclass(frozen=True)
class RetrievalData(PairData):
    """Pairs of one picture and its text."""

    def task(self) -> Task | None:
        if self.evaluation is None:
            return None
        batches = self.evaluation.batches(10**9, 50, 0)
        texts, own = torch.cat([b["input_ids"] for b in batches]).unique(dim=0, return_inverse=True)
        return Retrieval(torch.cat([b["pixel_values"] for b in batches]), texts, own)

    def record(self, batches: Sequence[Batch], task: Task | None) -> Mapping[str, Any]:
        """Of both: where from, how many pairs, sha256."""
        used = tested = None
        if batches and self.calibration is not None:
            tensors = [t for b in batches for t in tensors_of(b)]
            used = {"file": self.calibration.label, "pairs": sum(len(b["input_ids"]) for b in batches), "sha256": data_hash(*tensors)}
        if isinstance(task, Retrieval) and self.evaluation is not None:
            tested = {"file": self.evaluation.label, "pairs": len(task.pixels), "sha256": task.data()}
        return {"calibration": used, "evaluation": tested}


def data_of(settings: Mapping[str, Any]) -> RetrievalData:
    """What a model of open_clip reads.  settings: model_cfg and preprocess_cfg"""
    vision, text = settings["model_cfg"]["vision_cfg"], settings["model_cfg"]["text_cfg"]
    if text.get("vocab_size", _VOCABULARY) != _VOCABULARY:
        return RetrievalData(None, None, None, f"its vocabulary of {text['vocab_size']} words is not that of open_clip's tokenizer")
    own = settings["preprocess_cfg"]
    mean, std = tuple(own.get("mean") or _MEAN), tuple(own.get("std") or _STD)
    return RetrievalData(None, None, OpenClipProcessor(int(vision.get("image_size", 224)), int(text.get("context_length", 77)), mean, std))
