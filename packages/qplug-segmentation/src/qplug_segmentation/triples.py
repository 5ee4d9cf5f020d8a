"""(image, sentence, mask) triples: what a referring segmentation model is calibrated and judged on.

Always whole triples.  The released calibration appends an image once for each object and a sentence once for each sentence, and then cuts both lists
to the same length: behind the first object with two sentences, images and sentences no longer belong together.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from qcore.calibration.text import data_hash
from qcore.errors import CalibrationError, NotFound
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MAX_TOKENS = 20  # of one sentence, [CLS] and [SEP] counted; longer ones are cut, as in the release

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Triples:
    """m sentences about n images.

    images:    [n, 3, H, W] uint8
    image_of:  [m] int64, which image each sentence is about
    sentences: [m]
    masks:     [m, H, W] bool, what each sentence refers to
    """

    images: Tensor
    image_of: Tensor
    sentences: tuple[str, ...]
    masks: Tensor

    def __post_init__(self) -> None:
        m, size = len(self.sentences), self.images.shape[2:]
        if self.images.dtype is not torch.uint8 or self.images.ndim != 4 or self.images.shape[1] != 3:
            raise CalibrationError(f"images are uint8 [n, 3, H, W], got {self.images.dtype} of shape {tuple(self.images.shape)}")
        if self.image_of.shape != (m,) or self.masks.shape != (m, *size) or self.masks.dtype is not torch.bool:
            raise CalibrationError(
                f"{m} sentences want an image index [{m}] and bool masks [{m}, {size[0]}, {size[1]}], got {tuple(self.image_of.shape)} and "
                f"{self.masks.dtype} of shape {tuple(self.masks.shape)}"
            )
        if m and not (int(self.image_of.min()) >= 0 and int(self.image_of.max()) < len(self.images)):
            raise CalibrationError(f"a sentence is about image {int(self.image_of.max())}, and there are {len(self.images)}")

    def __len__(self) -> int:
        return len(self.sentences)

    def take(self, chosen: Sequence[int]) -> "Triples":
        """The triples of these numbers, in that order."""
        index = torch.as_tensor(list(chosen), dtype=torch.long)
        return Triples(self.images, self.image_of[index], tuple(self.sentences[i] for i in index.tolist()), self.masks[index])

    def digest(self) -> str:
        """sha256 of images, masks and sentences."""
        text = torch.frombuffer(bytearray("\n".join(self.sentences).encode() or b"\n"), dtype=torch.uint8)
        return data_hash(self.images, self.image_of, self.masks.to(torch.uint8), text)


class SentenceEncoder:
    """BERT's word pieces, from a `vocab.txt`: sentences → ids and a mask, padded to one length."""

    def __init__(self, vocabulary: Path, tokens: int = MAX_TOKENS) -> None:
        if not vocabulary.is_file():
            raise NotFound(f"vocabulary {vocabulary} does not exist; it is the vocab.txt of BERT, one piece a line")
        from tokenizers.implementations import BertWordPieceTokenizer

        self.tokens = tokens
        self._pieces = BertWordPieceTokenizer(str(vocabulary), lowercase=True)
        self._pad = self._pieces.token_to_id("[PAD]") or 0

    def __call__(self, sentences: Sequence[str]) -> tuple[Tensor, Tensor]:
        """→ (ids [m, tokens], mask [m, tokens]: 1 where there is a token), int64"""
        ids = torch.full((len(sentences), self.tokens), self._pad)
        mask = torch.zeros_like(ids)
        for i, sentence in enumerate(sentences):
            own = self._pieces.encode(sentence).ids[: self.tokens]
            ids[i, : len(own)] = torch.tensor(own)
            mask[i, : len(own)] = 1
        return ids, mask


def normalized(pixels: Tensor, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> Tensor:
    """uint8 [B, 3, H, W] → what the model reads, float32."""
    m, s = (torch.tensor(v).view(1, 3, 1, 1) for v in (mean, std))
    return (pixels.float() / 255 - m) / s


def model_batch(triples: Triples, encode: SentenceEncoder) -> Batch:
    """All of them as one batch: "image", "ids", "words" (the mask of the sentence), "target" (what is referred to)."""
    ids, words = encode(triples.sentences)
    return {"image": normalized(triples.images[triples.image_of]), "ids": ids, "words": words, "target": triples.masks}


def model_batches(triples: Triples, encode: SentenceEncoder, size: int) -> Iterator[Batch]:
    """Batches of at most `size`, one in memory at a time."""
    for start in range(0, len(triples), size):
        yield model_batch(triples.take(range(start, min(start + size, len(triples)))), encode)


class Triplets(Protocol):
    """Where triples come from.

    name:  what reports call it
    split: "train", "val", "testA" …
    """

    @property
    def name(self) -> str: ...

    @property
    def split(self) -> str: ...

    def __len__(self) -> int:
        """How many sentences."""

    def read(self, chosen: Sequence[int] | None = None) -> Triples:
        """The triples of these sentences, in that order; None = of all."""


@dataclass(frozen=True)
class ReferringData:
    """The `ModelData` of referring segmentation: triples to calibrate on, of a training split, and others to evaluate on.

    encode:    of the model
    open:      makes a `Triplets` of the user's path and a default split
    """

    encode: SentenceEncoder
    open: Any
    calibration: Triplets | None = None
    evaluation: Triplets | None = None
    batch: int = 16

    def __post_init__(self) -> None:
        if self.calibration is not None and self.calibration.split != "train":
            raise CalibrationError(
                f"calibration data is of the split {self.calibration.split!r} of {self.calibration.name}; a model is calibrated on training data. "
                'The release\'s default (--split "test") calibrates on what it then reports; pass the training split'
            )
        a, b = self.calibration, self.evaluation
        if a is not None and b is not None and (a.name, a.split) == (b.name, b.split):
            raise CalibrationError(f"calibration and evaluation triples are the same: {a.name}, split {a.split}; pass another --eval")

    def chosen(self, calibration: Path | None, evaluation: Path | None) -> "ReferringData":
        """The same with the user's own folders; a path that ends in a split's name, refcoco/testA, means that split of the folder."""
        return replace(
            self,
            calibration=self.open(calibration, "train") if calibration else self.calibration,
            evaluation=self.open(evaluation, "val") if evaluation else self.evaluation,
        )

    def batches(self, settings: Any) -> list[Batch]:
        """`settings.samples` triples that the seed chooses, in batches of one shape."""
        if self.calibration is None:
            return []
        count = len(self.calibration)
        if count < settings.samples:
            raise CalibrationError(
                f"{self.calibration.name} holds {count} sentences in split {self.calibration.split!r}, and "
                f"calibration.samples={settings.samples}; pass more, or --set calibration.samples={count}"
            )
        size = min(settings.batch, settings.samples)
        if settings.samples % size:
            raise CalibrationError(
                f"{settings.samples} triples do not fill batches of {size}; --set calibration.samples={settings.samples // size * size}, or a batch "
                f"that divides {settings.samples}"
            )
        chosen = torch.randperm(count, generator=torch.Generator().manual_seed(settings.seed))[: settings.samples]
        return list(model_batches(self.calibration.read(chosen.tolist()), self.encode, size))

    def task(self) -> Any:
        if self.evaluation is None:
            return None
        from qplug_segmentation.task import ReferringSegmentation

        return ReferringSegmentation(self.evaluation.read(), self.encode, self.batch)

    def note(self, *, calibrated: bool = True, source: str = "") -> str:
        tested = "not evaluated: there are no evaluation triples, pass --eval"
        if self.evaluation is not None:
            tested = f"evaluated on {self.evaluation.name}, split {self.evaluation.split}"
        if self.calibration is None or not calibrated:
            return f"no calibration data was needed, {tested}"
        return f"calibrated on {self.calibration.name}, split {self.calibration.split}, {tested}"

    def record(self, batches: Sequence[Any], task: Any) -> dict[str, Any]:
        """Of both: where from, which split, how many sentences, and sha256."""
        calibration = None
        if batches and self.calibration is not None:
            tensors = [b[key] for b in batches for key in ("image", "ids", "target")]
            count = sum(len(b["ids"]) for b in batches)
            calibration = {"file": self.calibration.name, "split": self.calibration.split, "sentences": count, "sha256": data_hash(*tensors)}
        evaluation = None
        if task is not None and self.evaluation is not None:
            evaluation = {
                "file": self.evaluation.name,
                "split": self.evaluation.split,
                "sentences": len(task.triples),
                "images": len(task.triples.images),
                "sha256": task.data(),
            }
        return {"calibration": calibration, "evaluation": evaluation}
