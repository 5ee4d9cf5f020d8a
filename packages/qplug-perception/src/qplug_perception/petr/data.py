"""What a PETR is calibrated and judged on: scenes of several cameras with their boxes, from a file or made by seed."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from qcore.calibration.text import Amount, data_hash
from qcore.errors import CalibrationError, NotFound, QcoreError
from qcore.evaluation import Reference
from qcore.evaluation.store import write_reference
from qcore.evaluation.task import check_outputs, counted, run_each, same_data
from torch import Tensor

from qplug_perception.petr.boxes import BOX, detections
from qplug_perception.petr.config import PETRConfig
from qplug_perception.petr.detection import mean_average_precision
from qplug_perception.petr.scenes import EVALUATION, make_scenes

Progress = Any
_MADE_FOR_CALIBRATION, _MADE_FOR_EVALUATION = 256, 200
FORMAT = (
    "a safetensors file with `images` uint8 [n, N, 3, H, W], `lidar2img` [n, N, 4, 4], and, to be judged by, "
    "`boxes` [m, 9], `labels` [m] and `counts` [n]"
)


@dataclass(frozen=True)
class Scenes:
    """n samples.

    images:    uint8 [n, N, 3, H, W], N cameras;  lidar2img: [n, N, 4, 4] float32
    boxes, labels: [m, 9] and [m] of all samples behind each other, or None where there are none;  counts: [n], how many are each sample's
    """

    images: Tensor
    lidar2img: Tensor
    boxes: Tensor | None = None
    labels: Tensor | None = None
    counts: Tensor | None = None

    def truth(self) -> tuple[list[Tensor], list[Tensor]]:
        """Boxes and labels, sample by sample."""
        assert self.boxes is not None and self.labels is not None and self.counts is not None
        sizes = self.counts.tolist()
        return list(self.boxes.split(sizes)), list(self.labels.split(sizes))

    def batches(self, config: PETRConfig, size: int, chosen: Tensor | None = None) -> Iterable[dict[str, Tensor]]:
        """What the model reads, one batch at a time.  chosen: indices of samples, None = all"""
        index = torch.arange(len(self.images)) if chosen is None else chosen
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in (config.mean, config.std))
        return ({"images": (self.images[i].float() - mean) / std, "lidar2img": self.lidar2img[i]} for i in index.split(size))


class Place(Protocol):
    """Where scenes come from.  name: for reports"""

    @property
    def name(self) -> str: ...

    def read(self) -> Scenes: ...


@dataclass(frozen=True)
class Made:
    """Scenes of `qplug_perception.petr.scenes`, by their seeds."""

    first: int
    count: int
    height: int = 64
    width: int = 112

    @property
    def name(self) -> str:
        return f"{self.count} made scenes from seed {self.first}"

    def read(self) -> Scenes:
        scenes = make_scenes(range(self.first, self.first + self.count), self.height, self.width)
        return Scenes(
            torch.stack([s.images for s in scenes]),
            torch.stack([s.lidar2img for s in scenes]),
            torch.cat([s.boxes for s in scenes]),
            torch.cat([s.labels for s in scenes]),
            torch.tensor([len(s.boxes) for s in scenes]),
        )


@dataclass(frozen=True)
class SceneFile:
    """Scenes out of a file."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    def read(self) -> Scenes:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if not self.path.is_file():
            raise NotFound(f"scene file {self.path} does not exist; pass {FORMAT}")
        try:
            t = load_file(self.path)
        except (SafetensorError, OSError) as e:
            raise CalibrationError(f"{self.path} cannot be read as safetensors ({e}); pass {FORMAT}") from e
        images, matrices = t.get("images"), t.get("lidar2img")
        if images is None or matrices is None or images.dtype is not torch.uint8 or images.ndim != 5 or images.shape[2] != 3 or not len(images):
            raise CalibrationError(f"{self.path} holds no scenes, its tensors are {', '.join(sorted(t))}; pass {FORMAT}")
        if matrices.shape != (*images.shape[:2], 4, 4):
            raise CalibrationError(f"{self.path}: lidar2img is {tuple(matrices.shape)}, for images {tuple(images.shape)}; it is [n, N, 4, 4]")
        boxes, labels, counts = t.get("boxes"), t.get("labels"), t.get("counts")
        if boxes is None:
            return Scenes(images, matrices.float())
        if labels is None or counts is None or boxes.shape != (len(labels), BOX) or len(counts) != len(images) or int(counts.sum()) != len(boxes):
            raise CalibrationError(f"{self.path}: boxes, labels and counts do not belong together; pass {FORMAT}")
        return Scenes(images, matrices.float(), boxes.float(), labels.long(), counts.long())


@dataclass(frozen=True)
class Detection:
    """Boxes in space: mean average precision on known boxes, and agreement with the float model.

    agreement:  share of queries whose likeliest class stays
    centre:     how far centres move, metres, over the tenth of a sample's queries that the float model finds likeliest; the mean
    logit_sqnr_db: signal-to-noise ratio of the logits
    map, map_reference: by centres within 0.5, 1, 2 and 4 m, as nuScenes counts; without boxes there is none

    scenes: what is looked at
    config: of the model
    batch:  samples of one forward pass
    """

    name: ClassVar[str] = "detection"
    better: ClassVar[dict[str, bool]] = {"map": True, "agreement": True, "centre": False, "logit_sqnr_db": True}
    scenes: Scenes
    config: PETRConfig
    batch: int = 8

    def __post_init__(self) -> None:
        if self.scenes.labels is not None and len(self.scenes.labels) and int(self.scenes.labels.max()) >= self.config.classes:
            raise QcoreError(f"a box has label {int(self.scenes.labels.max())}, but the model knows {self.config.classes} classes")

    def data(self) -> str:
        s = self.scenes
        return data_hash(s.images, s.lidar2img, *(t for t in (s.boxes, s.labels, s.counts) if t is not None))

    def sample(self) -> dict[str, Tensor]:
        return next(iter(self.scenes.batches(self.config, 1)))

    def reference(self, forward: Any, folder: Path, progress: Progress | None = None) -> Reference:
        rows = len(self.scenes.images) * self.config.queries
        return write_reference(folder, (o.flatten(0, 1) for o in self._outputs(forward, "float model", progress)), rows, self.data())

    def evaluate(self, forward: Any, reference: Reference, progress: Progress | None = None) -> dict[str, float]:
        same_data(self, reference)
        n, classes, q = len(self.scenes.images), self.config.classes, self.config.queries
        noise = signal = moved = 0.0
        same = sure = at = 0
        tenth = max(1, q // 10)
        found, found_reference = [], []
        for i, out in enumerate(self._outputs(forward, "evaluate", progress)):
            check_outputs(out, reference, f"batch {i}")
            kept = reference.read(at, at + len(out) * q).view(len(out), q, -1)
            at += len(out) * q
            one, other = kept[..., :classes], out[..., :classes].float()
            signal, noise = signal + float(one.square().sum()), noise + float((one - other).square().sum())
            same += int((one.argmax(-1) == other.argmax(-1)).sum())
            likeliest = one.amax(-1).topk(tenth).indices
            away = (kept[..., classes : classes + 2] - out[..., classes : classes + 2].float()).norm(dim=-1).gather(1, likeliest)
            moved, sure = moved + float(away.sum()), sure + away.numel()
            found += detections(other, out[..., classes:].float(), self.config.keep, self.config.post_range)
            found_reference += detections(one, kept[..., classes:], self.config.keep, self.config.post_range)
        db = 10 * float(torch.log10(torch.tensor(signal / noise, dtype=torch.float64))) if noise else 200.0
        scores = {"agreement": same / (n * q), "centre": moved / sure, "logit_sqnr_db": db, "samples": n}
        if self.scenes.boxes is not None:
            truth = self.scenes.truth()
            scores["map"] = mean_average_precision(found, *truth, classes)
            scores["map_reference"] = mean_average_precision(found_reference, *truth, classes)
        return scores

    def _outputs(self, forward: Any, phase: str, progress: Progress | None) -> Iterable[Tensor]:
        total = -(-len(self.scenes.images) // self.batch)
        with torch.no_grad():
            yield from counted(run_each(forward, self.scenes.batches(self.config, self.batch)), phase, total, progress)


@dataclass(frozen=True)
class ScenePair:
    """The `ModelData` of a PETR.

    calibration, evaluation: where scenes come from; None = there are none
    config: of the model
    """

    calibration: Place | None
    evaluation: Place | None
    config: PETRConfig

    @classmethod
    def made(cls, config: PETRConfig) -> "ScenePair":
        """Scenes by seed, those of training to calibrate on."""
        return cls(Made(0, _MADE_FOR_CALIBRATION), Made(EVALUATION, _MADE_FOR_EVALUATION), config)

    def chosen(self, calibration: Path | None, evaluation: Path | None) -> "ScenePair":
        mine = replace(
            self,
            calibration=SceneFile(calibration) if calibration else self.calibration,
            evaluation=SceneFile(evaluation) if evaluation else self.evaluation,
        )
        a, b = mine.calibration, mine.evaluation
        if isinstance(a, SceneFile) and isinstance(b, SceneFile) and a.path.exists() and b.path.exists() and a.path.samefile(b.path):
            raise CalibrationError(f"calibration and evaluation scenes are the same: {a.path}; a model looks better on what it was calibrated on")
        return mine

    def batches(self, settings: Amount) -> list[dict[str, Tensor]]:
        """As many samples as the settings ask for, drawn by their seed; CalibrationError where there are too few."""
        if self.calibration is None:
            return []
        scenes = self.calibration.read()
        n, size = len(scenes.images), min(settings.batch, settings.samples)
        if n < settings.samples:
            raise CalibrationError(
                f"{self.calibration.name}: {n} scenes, and calibration.samples={settings.samples}; pass more, or --set calibration.samples={n}"
            )
        if settings.samples % size:
            raise CalibrationError(
                f"{settings.samples} scenes do not fill batches of {size}, and a batch of another shape would change bits; "
                f"--set calibration.samples={settings.samples // size * size}"
            )
        chosen = torch.randperm(n, generator=torch.Generator().manual_seed(settings.seed))[: settings.samples]
        return list(scenes.batches(self.config, size, chosen))

    def task(self) -> Detection | None:
        return None if self.evaluation is None else Detection(self.evaluation.read(), self.config)

    def note(self, *, calibrated: bool = True, source: str = "") -> str:
        tested = f"evaluated on {self.evaluation.name}" if self.evaluation else f"not evaluated: there are no scenes, pass --eval with {FORMAT}"
        if self.calibration is None or not calibrated:
            return f"no calibration data was needed, {tested}"
        return f"calibrated on samples of {self.calibration.name}, {tested}"

    def record(self, batches: Sequence[Any], task: Any) -> Mapping[str, Any]:
        """Of both: where from, how many, and sha256."""
        calibration = evaluation = None
        if batches and self.calibration is not None:
            used = [t for batch in batches for t in (batch["images"], batch["lidar2img"])]
            calibration = {"file": self.calibration.name, "samples": sum(map(len, used[::2])), "sha256": data_hash(*used)}
        if isinstance(task, Detection) and self.evaluation is not None:
            evaluation = {"file": self.evaluation.name, "samples": len(task.scenes.images), "sha256": task.data()}
        return {"calibration": calibration, "evaluation": evaluation}
