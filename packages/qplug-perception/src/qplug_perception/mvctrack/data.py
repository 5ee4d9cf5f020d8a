"""Calibration and evaluation of the tracker: made-up sequences by seed.  Training below 50,000, evaluation from 100,000 on."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from qcore.calibration.text import Amount, data_hash
from qcore.errors import CalibrationError, QcoreError
from qcore.evaluation.metrics import sqnr_db
from qcore.evaluation.store import Reference, write_reference
from qcore.evaluation.task import Batch, Forward, Progress, Scores, check_outputs, counted, same_data
from torch import Tensor

from qplug_perception.mvctrack.boxes import iou3d, precision, success, to_box_frame
from qplug_perception.mvctrack.sequences import Moment, made_sequence
from qplug_perception.mvctrack.tracker import TrackerConfig, pair_batch, track
from qplug_perception.mvctrack.virtual_points import MVCPSettings, merged, virtual_points

CALIBRATION_SEED, EVALUATION_SEED = 0, 100_000
EVALUATED = 16
VIRTUAL = MVCPSettings(erosion=1)


def cloud(moment: Moment, config: TrackerConfig, virtual: MVCPSettings | None) -> Tensor:
    """The points of a frame, with virtual ones or without."""
    points = moment.points[:, :3] if config.features == 3 else moment.points
    if virtual is None:
        return points
    return merged(moment.points, virtual_points(moment.points, moment.views, virtual), config.features)


@dataclass(frozen=True)
class Sequences:
    """Made-up sequences from a seed on.  virtual: how virtual points are made, None = raw points"""

    config: TrackerConfig
    first: int
    frames: int = 8
    virtual: MVCPSettings | None = VIRTUAL

    @property
    def name(self) -> str:
        return f"made-up sequences from seed {self.first}, {'with' if self.virtual is not None else 'without'} virtual points"

    def read(self, count: int) -> list[tuple[list[Tensor], Tensor]]:
        """(point clouds, true boxes [T, 7]) of each."""
        found = []
        for i in range(count):
            moments = made_sequence(self.first + i, self.frames)
            found.append(([cloud(m, self.config, self.virtual) for m in moments], torch.stack([m.box for m in moments])))
        return found


def training_pair(
    clouds: Sequence[Tensor], boxes: Tensor, t: int, generator: torch.Generator, exact: bool
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """((points before, points now, a box near the true one), how far the object is from it in that box's frame).

    exact: the true box before, the release's candidate 0; else moved by up to 0.3 m on each axis
    """
    box = boxes[t - 1].clone()
    if not exact:
        box[:3] += (torch.rand(3, generator=generator) - 0.5) * 0.6 * torch.tensor([1.0, 1.0, 0.3])
    return (clouds[t - 1], clouds[t], box), to_box_frame(boxes[t, :3].unsqueeze(0), box)[0]


@dataclass(frozen=True)
class TrackingTask:
    """Tracks of a quantized tracker beside those of its float self and the truth.

    success, precision: of whole tracks, each box built on the one before;  drift: mean distance of the two trackers' centres, metres
    step_db: signal-to-noise ratio of single steps from the true box before
    """

    name: ClassVar[str] = "single-object-tracking"
    better: ClassVar[dict[str, bool]] = {"success": True, "precision": True, "drift": False, "step_db": True}
    sequences: tuple[tuple[list[Tensor], Tensor], ...]
    config: TrackerConfig

    def __post_init__(self) -> None:
        if not self.sequences or any(len(boxes) < 2 for _, boxes in self.sequences):
            raise QcoreError("a tracking task wants sequences of at least two frames")

    def data(self) -> str:
        return data_hash(*(t for clouds, boxes in self.sequences for t in (*clouds, boxes)))

    def sample(self) -> Batch:
        return self._steps(*self.sequences[0])

    def _steps(self, clouds: Sequence[Tensor], boxes: Tensor) -> Batch:
        return pair_batch([(clouds[t - 1], clouds[t], boxes[t - 1]) for t in range(1, len(boxes))], self.config)

    def _outputs(self, forward: Forward) -> Iterator[Tensor]:
        """Single steps and the centres of the whole track.  [T - 1, 9]"""
        for clouds, boxes in self.sequences:
            with torch.no_grad():
                steps = forward(self._steps(clouds, boxes)).float().cpu()
            yield torch.cat([steps, track(forward, clouds, boxes[0], self.config)[1:, :3]], 1)

    def reference(self, forward: Forward, folder: Path, progress: Progress | None = None) -> Reference:
        rows = sum(len(boxes) - 1 for _, boxes in self.sequences)
        outputs = counted(self._outputs(forward), "float model", len(self.sequences), progress)
        return write_reference(folder, outputs, rows, self.data(), largest=1 << 62)

    def evaluate(self, forward: Forward, reference: Reference, progress: Progress | None = None) -> Scores:
        same_data(self, reference)
        at, signal, noise = 0, 0.0, 0.0
        own: list[tuple[float, float]] = []
        float_own: list[tuple[float, float]] = []
        drift: list[float] = []
        outputs = counted(self._outputs(forward), "evaluate", len(self.sequences), progress)
        for i, (rows, (_, boxes)) in enumerate(zip(outputs, self.sequences, strict=True)):
            check_outputs(rows, reference, f"sequence {i}")
            kept = reference.read(at, at + len(rows))
            at += len(rows)
            signal += float(kept[:, :3].double().square().sum())
            noise += float((kept[:, :3].double() - rows[:, :3].double()).square().sum())
            drift += (rows[:, 6:] - kept[:, 6:]).norm(dim=1).tolist()
            own += _judged(rows[:, 6:], boxes)
            float_own += _judged(kept[:, 6:], boxes)
        scores = {"drift": sum(drift) / len(drift), "step_db": sqnr_db(signal, noise), "frames": len(own)}
        for name, measure, column in (("success", success, 0), ("precision", precision, 1)):
            scores |= {name: measure([o[column] for o in own]), f"{name}_reference": measure([o[column] for o in float_own])}
        return scores


def _judged(centres: Tensor, boxes: Tensor) -> list[tuple[float, float]]:
    """(IoU, distance of the centres) of the frames behind the first.  centres: [T - 1, 3]"""
    found = []
    for centre, truth in zip(centres, boxes[1:], strict=True):
        # sides and heading are those of the first box
        box = torch.cat([centre, boxes[0, 3:]])
        found.append((iou3d(box, truth), float((centre - truth[:3]).norm())))
    return found


@dataclass(frozen=True)
class TrackingData:
    """The `ModelData` of a tracker."""

    config: TrackerConfig
    calibration: Sequences
    evaluation: Sequences

    @classmethod
    def made(cls, config: TrackerConfig) -> "TrackingData":
        return cls(config, Sequences(config, CALIBRATION_SEED), Sequences(config, EVALUATION_SEED))

    def chosen(self, calibration: Path | None, evaluation: Path | None) -> "TrackingData":
        if calibration or evaluation:
            raise CalibrationError("a tracker is calibrated and evaluated on made-up sequences here; leave out --calib and --eval")
        return self

    def batches(self, settings: Amount) -> list[Batch]:
        """`settings.samples` pairs of frames, one batch for `settings.batch` of them; boxes before are near the true ones."""
        generator = torch.Generator().manual_seed(settings.seed)
        steps = self.calibration.frames - 1
        sequences = self.calibration.read(-(-settings.samples // steps))
        pairs = [training_pair(*s, t, generator, exact=t % 4 == 1)[0] for s in sequences for t in range(1, steps + 1)][: settings.samples]
        size = min(settings.batch, settings.samples)
        if settings.samples % size:
            raise CalibrationError(f"{settings.samples} pairs do not fill batches of {size}; --set calibration.batch to a divisor")
        return [pair_batch(pairs[i : i + size], self.config) for i in range(0, len(pairs), size)]

    def task(self) -> TrackingTask:
        return TrackingTask(tuple(self.evaluation.read(EVALUATED)), self.config)

    def note(self, *, calibrated: bool = True, source: str = "") -> str:
        before = f"calibrated on {self.calibration.name}" if calibrated else "no calibration data was needed"
        return f"{before}, evaluated on {self.evaluation.name}"

    def record(self, batches: Sequence[Batch], task: Any) -> Mapping[str, Any]:
        clouds = [b["current"] for b in batches]
        calibration = {"file": self.calibration.name, "pairs": sum(map(len, clouds)), "sha256": data_hash(*clouds)} if clouds else None
        evaluation = None
        if isinstance(task, TrackingTask):
            evaluation = {"file": self.evaluation.name, "sequences": len(task.sequences), "sha256": task.data()}
        return {"calibration": calibration, "evaluation": evaluation}
