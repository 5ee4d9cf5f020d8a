"""Pairs of images and text: what vision-language models are calibrated and judged on.

A file of pairs has one JSON object a line: {"images": ["a.png"], "text": "<image> what is this ?", "answer": "circle"}.  Pictures lie beside the
file. The folder's own processor (`AutoProcessor`) makes what the model reads; for tiny-llava, whose folder has words.txt, text is a line of its
words.  Without a file, tiny-llava takes drawn scenes: one seed to calibrate on and another one to evaluate on.

A picture that stands in both files is an error: MQuant's released code calibrates on the very data that it evaluates on.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from qcore.calibration.text import Amount, data_hash
from qcore.errors import CalibrationError, NotFound
from qcore.evaluation.metrics import Distance
from qcore.evaluation.store import LARGEST_FLOAT32, Reference, write_reference
from qcore.evaluation.task import Batch, Forward, Progress, Scores, Task, check_outputs, counted, run_each, same_data, tensors_of
from torch import Tensor

from qplug_multimodal import scenes

# (pictures, texts, answers) of some pairs → a batch, with "answers" [B, T] bool where answers stand
Processor = Callable[[Sequence[Sequence[Path]], Sequence[str], Sequence[str]], dict[str, Tensor]]


class Pairs(Protocol):
    """Where pairs come from."""

    @property
    def label(self) -> str:
        """What reports call it."""

    def batches(self, samples: int, batch: int, seed: int) -> list[Batch]:
        """So many pairs as the model reads them."""


@dataclass(frozen=True)
class Drawn:
    """Scenes that are drawn by seed, each with four questions."""

    seed: int
    size: int = 400

    @property
    def label(self) -> str:
        return f"drawn scenes of seed {self.seed}"

    def batches(self, samples: int, batch: int, seed: int) -> list[Batch]:
        d = scenes.dialogues(min(samples, self.size), self.seed + 4 * seed)
        parts = [t.split(batch) for t in (d.input_ids, d.pixel_values, d.answers)]
        return [
            {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, "answers": answers}
            for ids, pixels, answers in zip(*parts, strict=True)
        ]


@dataclass(frozen=True)
class PairFile:
    """A file of pairs, one JSON object a line."""

    path: Path
    processor: Processor

    @property
    def label(self) -> str:
        return self.path.name

    def read(self) -> list[tuple[tuple[Path, ...], str, str]]:
        """(pictures, text, answer) of each line; NotFound or CalibrationError names the line that is wrong."""
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise NotFound(f"file of pairs {self.path} cannot be read ({e})") from e
        found = []
        for number, line in enumerate(lines, 1):
            if line.strip():
                found.append(self._pair(number, line))
        if not found:
            raise CalibrationError(f'{self.path} holds no pairs; one JSON object a line: {{"images": ["a.png"], "text": "…", "answer": "…"}}')
        return found

    def _pair(self, number: int, line: str) -> tuple[tuple[Path, ...], str, str]:
        where = f"{self.path}, line {number}"
        try:
            data = json.loads(line)
        except ValueError as e:
            raise CalibrationError(f'{where} is no JSON ({e}); pairs come one a line, {{"images": ["a.png"], "text": "…", "answer": "…"}}') from e
        images, text = (data.get("images", []), data.get("text")) if isinstance(data, dict) else (None, None)
        if not isinstance(text, str) or not isinstance(images, list) or not all(isinstance(i, str) for i in images):
            raise CalibrationError(f'{where}: want {{"images": ["a.png"], "text": "…", "answer": "…"}}, got {line[:60]!r}')
        paths = tuple(self.path.parent / i for i in images)
        if missing := [p for p in paths if not p.is_file()]:
            raise CalibrationError(f"{where}: picture {missing[0]} does not exist")
        return paths, text, str(data.get("answer", ""))

    def pictures(self) -> dict[str, Path]:
        """sha256 of every picture's bytes → its path."""
        return {hashlib.sha256(p.read_bytes()).hexdigest(): p for paths, _, _ in self.read() for p in paths}

    def batches(self, samples: int, batch: int, seed: int) -> list[Batch]:
        pairs = self.read()
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()[:samples]
        groups = [[pairs[i] for i in order[s : s + batch]] for s in range(0, len(order), batch)]
        return [self.processor([p[0] for p in g], [p[1] for p in g], [p[2] for p in g]) for g in groups]


@dataclass(frozen=True)
class PairData:
    """Pairs to calibrate and to evaluate on; None = there are none.

    processor: for files that the user passes; None = the folder has none
    why:       why there is none
    """

    calibration: Pairs | None
    evaluation: Pairs | None
    processor: Processor | None = None
    why: str = ""

    def chosen(self, calibration: Path | None, evaluation: Path | None) -> "PairData":
        mine = replace(
            self,
            calibration=self._file(calibration) if calibration else self.calibration,
            evaluation=self._file(evaluation) if evaluation else self.evaluation,
        )
        a, b = mine.calibration, mine.evaluation
        if isinstance(a, PairFile) and isinstance(b, PairFile) and a.path.is_file() and b.path.is_file():
            both = a.pictures()
            if shared := [path for key, path in b.pictures().items() if key in both]:
                raise CalibrationError(
                    f"{len(shared)} pictures stand in {a.path.name} and in {b.path.name}, such as {shared[0].name}; "
                    "a model looks better on pictures it was calibrated on. Calibrate on training data"
                )
        return mine

    def _file(self, path: Path) -> PairFile:
        if self.processor is None:
            raise CalibrationError(f"{path} cannot be read: {self.why or 'the model has no processor'}")
        return PairFile(path, self.processor)

    def batches(self, settings: Amount) -> list[Batch]:
        return [] if self.calibration is None else self.calibration.batches(settings.samples, settings.batch, settings.seed)

    def task(self) -> Task | None:
        if self.evaluation is None:
            return None
        return VisualQuestions(tuple(self.evaluation.batches(10**9, 50, 0)))

    def note(self, *, calibrated: bool = True, source: str = "") -> str:
        tested = f"evaluated on {self.evaluation.label}" if self.evaluation else "not evaluated: there are no evaluation pairs, pass --eval"
        if self.calibration is None or not calibrated:
            return f"no calibration data was needed, {tested}"
        return f"calibrated on {self.calibration.label}, {tested}"

    def record(self, batches: Sequence[Batch], task: Task | None) -> Mapping[str, Any]:
        """Of both: where from, how many pairs, sha256."""
        used = None
        if batches and self.calibration is not None:
            tensors = [t for b in batches for t in tensors_of(b)]
            used = {"file": self.calibration.label, "pairs": sum(len(b["input_ids"]) for b in batches), "sha256": data_hash(*tensors)}
        tested = None
        if isinstance(task, VisualQuestions) and self.evaluation is not None:
            tested = {"file": self.evaluation.label, "pairs": sum(len(b["input_ids"]) for b in task.pairs), "sha256": task.data()}
        return {"calibration": used, "evaluation": tested}


@dataclass(frozen=True)
class VisualQuestions:
    """Answers to questions about pictures, the words before each given: share of words that are right, and how far the model is from its float self.

    pairs: batches with "answers" [B, T] bool; the position before each is what counts.  Without any, all positions count and there is no accuracy
    """

    name: ClassVar[str] = "visual-questions"
    better: ClassVar[dict[str, bool]] = {"accuracy": True, "top1": True, "kl": False, "sqnr_db": True, "lost": False, "gained": True}
    pairs: tuple[Batch, ...]
    largest: int = LARGEST_FLOAT32

    def __post_init__(self) -> None:
        if not self.pairs:
            raise CalibrationError("an evaluation wants at least one pair of image and text")

    @property
    def answered(self) -> bool:
        return any(bool(b["answers"].any()) for b in self.pairs)

    def data(self) -> str:
        return data_hash(*(t for batch in self.pairs for t in tensors_of(batch)))

    def sample(self) -> Batch:
        return self.pairs[0]

    def reference(self, forward: Forward, folder: Path, progress: Progress | None = None) -> Reference:
        rows = sum(int(self._where(b).sum()) for b in self.pairs)
        return write_reference(folder, counted(self._outputs(forward), "float model", len(self.pairs), progress), rows, self.data(), self.largest)

    def evaluate(self, forward: Forward, reference: Reference, progress: Progress | None = None) -> Scores:
        same_data(self, reference)
        distance, at, lost, gained = Distance(), 0, 0, 0
        for i, logits in enumerate(counted(self._outputs(forward), "evaluate", len(self.pairs), progress)):
            check_outputs(logits, reference, f"batch {i}")
            float_logits = reference.read(at, at + len(logits))
            batch = self.pairs[i]
            targets = batch["input_ids"][:, 1:][self._where(batch)] if self.answered else None
            distance.add(float_logits, logits, targets)
            if targets is not None:
                before, after = float_logits.argmax(-1) == targets, logits.argmax(-1) == targets
                lost, gained = lost + int((before & ~after).sum()), gained + int((after & ~before).sum())
            at += len(logits)
        scores = {
            "kl": distance.kl.mean,
            "kl_standard_error": distance.kl.standard_error,
            "top1": distance.top1.mean,
            "sqnr_db": distance.sqnr_db,
            "rows": at,
        }
        if self.answered:
            scores |= {"accuracy": distance.hits.mean, "accuracy_reference": distance.hits_reference.mean, "lost": lost / at, "gained": gained / at}
        return scores

    def _where(self, batch: Batch) -> Tensor:
        """[B, T - 1] bool: positions that predict what counts."""
        mask = batch.get("attention_mask")
        if self.answered:
            return batch["answers"][:, 1:]
        return torch.ones_like(batch["input_ids"][:, 1:], dtype=torch.bool) if mask is None else mask[:, :-1].bool() & mask[:, 1:].bool()

    @torch.no_grad()
    def _outputs(self, forward: Forward) -> Any:
        for batch, logits in zip(self.pairs, run_each(forward, self.pairs), strict=True):
            yield logits[:, :-1][self._where(batch)].cpu()


# processors ------------------------------------------------------------------------------------------------------------------------------


def data_of(folder: Path) -> PairData:
    """What a model's folder brings along."""
    if (folder / "words.txt").is_file():
        own = Words((folder / "words.txt").read_text(encoding="utf-8").split())
        return PairData(Drawn(scenes.CALIBRATION), Drawn(scenes.EVALUATION), own)
    if any((folder / f).is_file() for f in ("preprocessor_config.json", "processor_config.json")):
        return PairData(None, None, OwnProcessor(folder))
    return PairData(None, None, None, f"{folder} has no preprocessor_config.json, so nothing says how its model reads pictures")


@dataclass(frozen=True)
class Words:
    """tiny-llava's: text is a line of its words, one picture of 32 × 32 a line, "<image>" stands for its 16 tokens."""

    words: Sequence[str]

    def __call__(self, images: Sequence[Sequence[Path]], texts: Sequence[str], answers: Sequence[str]) -> dict[str, Tensor]:
        ids = {word: i for i, word in enumerate(self.words)}

        def encode(text: str) -> list[int]:
            found: list[int] = []
            for word in text.split():
                if word not in ids:
                    raise CalibrationError(f"{word!r} is none of the {len(ids)} words of this model")
                found += [ids[word]] * (16 if word == "<image>" else 1)
            return found

        rows = [(encode(f"<bos> {text}"), encode(answer)) for text, answer in zip(texts, answers, strict=True)]
        longest = max(len(a) + len(b) for a, b in rows)
        padding = [longest - len(a) - len(b) for a, b in rows]
        batch = {
            "input_ids": torch.tensor([[ids["<pad>"]] * p + a + b for p, (a, b) in zip(padding, rows, strict=True)]),
            "attention_mask": torch.tensor([[0] * p + [1] * (longest - p) for p in padding]),
            "answers": torch.tensor([[False] * (p + len(a)) + [True] * len(b) for p, (a, b) in zip(padding, rows, strict=True)]),
        }
        pictures = [_pixels(path) for paths in images for path in paths]
        return batch | ({"pixel_values": torch.stack(pictures)} if pictures else {})


def _pixels(path: Path) -> Tensor:
    """[3, 32, 32], as tiny-llava reads it."""
    picture = open_picture(path)
    if picture.size != (32, 32):
        raise CalibrationError(f"{path} is {picture.size[0]} × {picture.size[1]}; tiny-llava reads pictures of 32 × 32")
    raw = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(32, 32, 3)
    return scenes.normalized(raw.permute(2, 0, 1).float() / 255)


def open_picture(path: Path) -> Any:
    """A picture in RGB, by Pillow."""
    try:
        from PIL import Image
    except ImportError as e:
        raise NotFound("pictures are read by Pillow, which is not installed: pip install 'qplug-multimodal[pictures]'") from e
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except OSError as e:
        raise CalibrationError(f"{path} is no picture that Pillow reads ({e})") from e


@dataclass(frozen=True)
class OwnProcessor:
    """The processor that a folder brings (transformers' AutoProcessor), padded on the left; it is loaded when it is first needed."""

    folder: Path

    def __call__(self, images: Sequence[Sequence[Path]], texts: Sequence[str], answers: Sequence[str]) -> dict[str, Tensor]:
        return processed(self._load(), images, texts, answers)

    def _load(self) -> Any:
        from transformers import AutoProcessor

        try:
            return AutoProcessor.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)
        except Exception as e:  # transformers raises what it likes
            raise CalibrationError(f"{self.folder}: its processor cannot be loaded ({str(e).splitlines()[0][:200] if str(e) else e!r})") from e


def processed(processor: Any, images: Sequence[Sequence[Path]], texts: Sequence[str], answers: Sequence[str]) -> dict[str, Tensor]:
    """What a transformers processor makes of pairs, and where their answers stand: the last tokens of each row, as many as the answer has alone."""
    processor.tokenizer.padding_side = "left"
    pictures = [[open_picture(p) for p in paths] for paths in images]
    whole = [f"{text}{answer}" for text, answer in zip(texts, answers, strict=True)]
    batch = dict(processor(images=pictures if any(pictures) else None, text=whole, padding=True, return_tensors="pt"))
    ids = batch["input_ids"]
    where = torch.zeros_like(ids, dtype=torch.bool)
    for row, answer in enumerate(answers):
        count = len(processor.tokenizer(answer, add_special_tokens=False)["input_ids"]) if answer else 0
        where[row, ids.shape[1] - count :] = count > 0
    return {name: value for name, value in batch.items() if isinstance(value, Tensor)} | {"answers": where}
