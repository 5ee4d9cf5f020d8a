"""Calibration and evaluation data of the occupancy network, and the task on which two of them are compared.

Samples are made-up streets (`scenes.py`) by seed, or come from a safetensors file: what `write_samples` writes.  Training uses seeds below 50,000 and
evaluation those from 100,000, so neither calibration nor training ever sees an evaluated scene.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from qcore.calibration.text import Amount, data_hash
from qcore.errors import CalibrationError, NotFound, QcoreError
from qcore.evaluation.metrics import Mean, kl_rows, sqnr_db
from qcore.evaluation.store import Reference, write_reference
from qcore.evaluation.task import Batch, Forward, Progress, Scores, check_outputs, counted, run_each, same_data
from torch import Tensor

from qplug_perception.gsrender.gaussians import ATTRIBUTES, Attributes
from qplug_perception.gsrender.geometry import FREE, invert
from qplug_perception.gsrender.losses import IGNORED, View, views_of
from qplug_perception.gsrender.metrics import RayIoU, lidar_rays
from qplug_perception.gsrender.model import OccupancyConfig
from qplug_perception.gsrender.render import render
from qplug_perception.gsrender.scenes import Frame, Rig, frame, occupancy, random_scene

CALIBRATION_SEED, EVALUATION_SEED = 0, 100_000
EVALUATED = 12
TIMES = (-1.0, 0.0, 1.0)
_FIELDS = ("images", "intrinsics", "to_vehicle", "pose", "depth", "labels")


@dataclass(frozen=True)
class Sample:
    """One moment with its neighbours.

    frames: at the times before, now and after;  truth: [X, Y, Z] voxels of now, or None
    """

    frames: tuple[Frame, Frame, Frame]
    truth: Tensor | None

    @property
    def now(self) -> Frame:
        return self.frames[1]

    def views(self) -> list[View]:
        """The labels of all three moments, for Gaussians of now."""
        return [v for f in self.frames for v in views_of(f.cameras(), f.depth, f.labels, self.now.pose, f.pose)]


def made_sample(seed: int, config: OccupancyConfig) -> Sample:
    """The street of a seed."""
    scene, rig = random_scene(seed), Rig(size=config.size)
    before, now, after = (frame(scene, t, rig) for t in TIMES)
    return Sample((before, now, after), occupancy(scene, config.grid))


def batch_of(samples: Sequence[Sample], before: bool = False) -> Batch:
    """What the network reads.  before: also the frame before, which a network with `fuse` wants"""
    batch = {name: torch.stack([getattr(s.now, name) for s in samples]) for name in ("images", "intrinsics", "to_vehicle")}
    if before:
        batch |= {f"before_{name}": torch.stack([getattr(s.frames[0], name) for s in samples]) for name in batch}
        batch["now_to_before"] = torch.stack([invert(s.frames[0].pose) @ s.now.pose for s in samples])
    return batch


@dataclass(frozen=True)
class Samples:
    """Where samples come from: made-up streets from a seed on, or a file.

    first: the first seed;  path: a file instead
    """

    config: OccupancyConfig
    first: int = 0
    path: Path | None = None

    @property
    def name(self) -> str:
        return f"made-up streets from seed {self.first}" if self.path is None else self.path.name

    def read(self, count: int | None = None, seed: int = 0) -> list[Sample]:
        """The first `count` samples, None = as many as the file has (EVALUATED of streets); CalibrationError where there are fewer.

        seed: streets begin 500 further on for each, so that several calibrations share none
        """
        if self.path is None:
            return [made_sample(self.first + 500 * seed + i, self.config) for i in range(EVALUATED if count is None else count)]
        found = read_samples(self.path, self.config)
        if count is not None and len(found) < count:
            raise CalibrationError(f"{self.path} holds {len(found)} samples, and {count} are wanted; --set calibration.samples={len(found)}")
        return found if count is None else found[:count]


def write_samples(path: Path, samples: Sequence[Sample]) -> None:
    """A safetensors file: images [s, 3, n, 3, H, W] and so on, of the three moments, and `truth` [s, X, Y, Z] where all have it."""
    from safetensors.torch import save_file

    tensors = {name: torch.stack([torch.stack([getattr(f, name) for f in s.frames]) for s in samples]) for name in _FIELDS}
    if all(s.truth is not None for s in samples):
        tensors["truth"] = torch.stack([s.truth for s in samples if s.truth is not None]).to(torch.uint8)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path)


def read_samples(path: Path, config: OccupancyConfig) -> list[Sample]:
    """The inverse of `write_samples`; NotFound or CalibrationError, with the path, where it cannot be."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise NotFound(f"sample file {path} does not exist; pass a safetensors file with {', '.join(_FIELDS)}")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as e:
        raise CalibrationError(f"{path} cannot be read as safetensors ({e}); samples come as a safetensors file with {', '.join(_FIELDS)}") from e
    if missing := [name for name in _FIELDS if name not in tensors]:
        raise CalibrationError(f"{path} has no tensor {missing[0]!r}; samples are {', '.join(_FIELDS)}, and `truth`")
    shape = tuple(tensors["images"].shape)
    if len(shape) != 6 or shape[1] != 3 or shape[-2:] != tuple(config.size) or not shape[0]:
        raise CalibrationError(f"{path}: images are [samples, 3, cameras, 3, {config.size[0]}, {config.size[1]}] of this network, got {shape}")
    truth = tensors.get("truth")
    if truth is not None and tuple(truth.shape[1:]) != config.shape:
        raise CalibrationError(f"{path}: truth is [samples, {', '.join(map(str, config.shape))}] of this network, got {tuple(truth.shape)}")
    frames = [tuple(Frame(**{name: tensors[name][i, t] for name in _FIELDS}) for t in range(3)) for i in range(shape[0])]
    return [Sample(f, None if truth is None else truth[i].long()) for i, f in enumerate(frames)]  # type: ignore[arg-type]


@dataclass(frozen=True)
class OccupancyTask:
    """Gaussians of a quantized network beside those of its float self, and both beside the truth.

    | score | |
    |---|---|
    | depth_l1 | mean |rendered - true depth| of labelled pixels within the grid's reach, metres |
    | semantic_ce | cross-entropy of rendered logits |
    | rayiou, rayiou_1, _2, _4 | of occupied voxels, where the truth is known |
    | delta_mu_db … semantic_db | signal-to-noise ratio of each attribute against the float network's |
    | kl, top1 | of the class of each voxel; top1 compares the labels, free ones too |
    | flips | share of voxels that become free or occupied |
    | gaussians | how many are above the threshold, for a sample |
    """

    name: ClassVar[str] = "gaussian-occupancy"
    better: ClassVar[dict[str, bool]] = {
        "depth_l1": False,
        "semantic_ce": False,
        "rayiou": True,
        "rayiou_1": True,
        "rayiou_2": True,
        "rayiou_4": True,
        "kl": False,
        "top1": True,
        "flips": False,
        **{f"{a}_db": True for a in ATTRIBUTES},
    }
    samples: tuple[Sample, ...]
    config: OccupancyConfig
    azimuths: int = 180
    render_every: int = 1

    def __post_init__(self) -> None:
        if not self.samples:
            raise QcoreError("an occupancy task wants at least one sample")

    def data(self) -> str:
        truths = [s.truth for s in self.samples if s.truth is not None]
        return data_hash(*(getattr(f, name) for s in self.samples for f in s.frames for name in _FIELDS), *truths)

    def sample(self) -> Batch:
        return batch_of(self.samples[:1], self.config.fuse)

    def reference(self, forward: Forward, folder: Path, progress: Progress | None = None) -> Reference:
        outputs = counted(self._outputs(forward), "float model", len(self.samples), progress)
        # rows are attributes, not logits: they must stay float32
        return write_reference(folder, outputs, len(self.samples) * self.config.grid.count, self.data(), largest=1 << 62)

    def evaluate(self, forward: Forward, reference: Reference, progress: Progress | None = None) -> Scores:
        same_data(self, reference)
        voxels = self.config.grid.count
        own, float_own = _Judge(self), _Judge(self)
        signal, noise = dict.fromkeys(ATTRIBUTES, 0.0), dict.fromkeys(ATTRIBUTES, 0.0)
        kl, same, flips = Mean(), Mean(), Mean()
        for i, rows in enumerate(counted(self._outputs(forward), "evaluate", len(self.samples), progress)):
            check_outputs(rows, reference, f"sample {i}")
            a, r = Attributes.from_rows(rows), Attributes.from_rows(reference.read(i * voxels, (i + 1) * voxels))
            for name in ATTRIBUTES:
                x, y = getattr(r, name).double(), getattr(a, name).double()
                signal[name] += float(x.square().sum())
                noise[name] += float((x - y).square().sum())
            kl.add(kl_rows(r.semantic, a.semantic))
            labels, expected = own.add(a, self.samples[i]), float_own.add(r, self.samples[i])
            same.add((labels == expected).double())
            flips.add(((labels == FREE) != (expected == FREE)).double())
        scores = {"kl": kl.mean, "kl_standard_error": kl.standard_error, "top1": same.mean, "flips": flips.mean}
        scores |= {f"{name}_db": sqnr_db(signal[name], noise[name]) for name in ATTRIBUTES}
        float_scores = float_own.scores()
        for name, value in own.scores().items():
            scores |= {name: value, f"{name}_reference": float_scores[name]}
        return {**scores, "samples": len(self.samples)}

    @torch.no_grad()
    def _outputs(self, forward: Forward) -> Iterator[Tensor]:
        for rows in run_each(forward, (batch_of([s], self.config.fuse) for s in self.samples)):
            yield (rows.flatten(0, 1) if rows.ndim == 3 else rows).float().cpu()


class _Judge:
    """What one network's Gaussians are worth by the labels."""

    def __init__(self, task: OccupancyTask) -> None:
        self.task, self.config = task, task.config
        self.depth, self.semantic = Mean(), Mean()
        self.rays = RayIoU(task.config.grid, FREE)
        self.count, self.judged = 0, False
        self.directions = lidar_rays(task.azimuths)

    def add(self, attributes: Attributes, sample: Sample) -> Tensor:
        """Judge one sample; → the labels of its voxels"""
        config = self.config
        gaussians = attributes.gaussians(config.grid, config.reach)
        farthest = max(abs(v) for v in (*config.grid.low[:2], *config.grid.high[:2]))
        now = sample.now
        for camera, depth, labels in zip(now.cameras(), now.depth, now.labels, strict=True):
            pixels = torch.arange(0, len(depth), self.task.render_every)
            seen = render(gaussians, camera, pixels=camera.pixels()[pixels])
            depth, labels = depth[pixels], labels[pixels]
            known = (depth > 0) & (depth <= farthest)
            if known.any():
                self.depth.add((seen.mean_depth - depth).abs()[known])
            if (labels != IGNORED).any():
                self.semantic.add(F.cross_entropy(seen.features.T, labels, ignore_index=IGNORED, reduction="none")[labels != IGNORED])
        labels = attributes.occupancy(config.threshold, FREE)
        self.count += int((labels != FREE).sum())
        if sample.truth is not None:
            self.judged = True
            self.rays.add(labels.reshape(config.shape), sample.truth, _origins(now), self.directions)
        return labels

    def scores(self) -> Scores:
        own = {"depth_l1": self.depth.mean, "semantic_ce": self.semantic.mean, "gaussians": self.count / len(self.task.samples)}
        return own | (self.rays.scores() if self.judged else {})


def _origins(now: Frame) -> Tensor:
    """Where the rays begin: above the vehicle, as a LiDAR stands, at the height of its cameras.  [1, 3]"""
    return torch.tensor([[0.0, 0.0, float(now.to_vehicle[:, 2, 3].mean())]])


@dataclass(frozen=True)
class SceneData:
    """The `ModelData` of an occupancy network."""

    config: OccupancyConfig
    calibration: Samples
    evaluation: Samples

    @classmethod
    def made(cls, config: OccupancyConfig) -> "SceneData":
        """Streets of seeds that no other split uses."""
        return cls(config, Samples(config, CALIBRATION_SEED), Samples(config, EVALUATION_SEED))

    def chosen(self, calibration: Path | None, evaluation: Path | None) -> "SceneData":
        if calibration and evaluation and calibration.exists() and evaluation.exists() and calibration.samefile(evaluation):
            raise CalibrationError(f"calibration and evaluation samples are the same file, {calibration}; pass another --eval")
        mine = self
        if calibration:
            mine = replace(mine, calibration=Samples(self.config, path=calibration))
        if evaluation:
            mine = replace(mine, evaluation=Samples(self.config, path=evaluation))
        return mine

    def batches(self, settings: Amount) -> list[Batch]:
        samples, size = self.calibration.read(settings.samples, settings.seed), min(settings.batch, settings.samples)
        if settings.samples % size:
            raise CalibrationError(f"{settings.samples} samples do not fill batches of {size}; --set calibration.batch to a divisor")
        return [batch_of(samples[i : i + size], self.config.fuse) for i in range(0, len(samples), size)]

    def task(self) -> OccupancyTask:
        return OccupancyTask(tuple(self.evaluation.read()), self.config)

    def note(self, *, calibrated: bool = True, source: str = "") -> str:
        before = f"calibrated on {self.calibration.name}" if calibrated else "no calibration data was needed"
        return f"{before}, evaluated on {self.evaluation.name}"

    def record(self, batches: Sequence[Batch], task: Any) -> Mapping[str, Any]:
        images = [b["images"] for b in batches]
        calibration = {"file": self.calibration.name, "samples": sum(map(len, images)), "sha256": data_hash(*images)} if images else None
        evaluation = None
        if isinstance(task, OccupancyTask):
            evaluation = {"file": self.evaluation.name, "samples": len(task.samples), "sha256": task.data()}
        return {"calibration": calibration, "evaluation": evaluation}
