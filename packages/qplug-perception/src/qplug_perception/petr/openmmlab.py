"""PETR in mmdet3d's registry, and its boxes as mmdet3d's.

    from qplug_perception.petr.openmmlab import register
    register()
    model = MODELS.build(dict(type="QPETR", petr=dict(embedding="qfpe"), checkpoint="petr.pth"))

`register` imports mmdet3d; nothing here does when it is imported itself.  It works with mmcv-lite: where mmcv's compiled operators are missing, a
stand-in lets mmdet3d's structures be imported, and says so when one of them is called (rotated IoU, for instance).  PETR needs none of them.

Two things are otherwise than in mmdet3d's own projects/PETR: there the list of lidar2img grows over the samples of a batch, and only the first
sample's boxes are turned for the loss, so batches of more than one are wrong.  Here each sample has its own.
"""

import importlib
import importlib.util
import math
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from qcore.errors import NotFound, SpecError
from torch import Tensor

from qplug_perception.petr.boxes import Detections, detections
from qplug_perception.petr.config import PETRConfig
from qplug_perception.petr.loss import loss
from qplug_perception.petr.model import PETR
from qplug_perception.petr.released import read_weights

NAME = "QPETR"
_INSTALL = "pip install 'qplug-perception[mmdet3d]'"


def register() -> type:
    """Make "QPETR" a name that `mmdet3d.registry.MODELS` builds; safe to call again.  → the class;  NotFound without mmdet3d"""
    registry = _module("mmdet3d.registry").MODELS
    if NAME not in registry.module_dict:
        registry.register_module(name=NAME, module=_detector())
    return registry.module_dict[NAME]


def to_lidar_boxes(boxes: Tensor) -> Any:
    """[n, 9] as PETR has them → LiDARInstance3DBoxes of mmdet3d 1.x: the bottom's centre, (length, width, height), yaw from +x."""
    x, y, z, w, length, h, yaw, vx, vy = boxes.unbind(-1)
    turned = torch.stack([x, y, z - h / 2, length, w, h, _wrapped(-yaw - math.pi / 2), vx, vy], -1)
    return _structures().LiDARInstance3DBoxes(turned, box_dim=9)


def from_lidar_boxes(boxes: Any) -> Tensor:
    """The inverse.  Boxes without velocities stand still.  [n, 9]"""
    t = boxes.tensor
    x, y, z, length, w, h, yaw = t[:, :7].unbind(-1)
    v = t[:, 7:9] if t.shape[1] >= 9 else torch.zeros_like(t[:, :2])
    return torch.cat([torch.stack([x, y, z + h / 2, w, length, h, _wrapped(-yaw - math.pi / 2)], -1), v], -1)


def to_instances(found: Detections) -> Any:
    """InstanceData with bboxes_3d, scores_3d and labels_3d."""
    data = _module("mmengine.structures").InstanceData
    return data(bboxes_3d=to_lidar_boxes(found.boxes), scores_3d=found.scores, labels_3d=found.labels)


def lidar_to_image(metainfo: Mapping[str, Any]) -> Tensor:
    """Of one sample: its "lidar2img", or the product of "cam2img" and "lidar2cam".  [N, 4, 4]"""
    if "lidar2img" in metainfo:
        return torch.stack([torch.as_tensor(m, dtype=torch.float64) for m in metainfo["lidar2img"]]).float()
    if "cam2img" not in metainfo or "lidar2cam" not in metainfo:
        raise SpecError(
            f"a data sample has neither lidar2img nor cam2img and lidar2cam; its metainfo holds {', '.join(sorted(metainfo)) or 'nothing'}"
        )
    out = []
    for inner, outer in zip(metainfo["cam2img"], metainfo["lidar2cam"], strict=True):
        matrix, own = torch.eye(4, dtype=torch.float64), torch.as_tensor(inner, dtype=torch.float64)
        matrix[: own.shape[0], : own.shape[1]] = own
        out.append(matrix @ torch.as_tensor(outer, dtype=torch.float64))
    return torch.stack(out).float()


def _detector() -> type:
    base: Any = _module("mmengine.model").BaseModel

    class QPETR(base):
        """PETR or Q-PETR as mmengine's Runner calls it.

        petr:       fields of PETRConfig;  checkpoint: weights, see released.py
        """

        def __init__(
            self, petr: Mapping[str, Any] | None = None, checkpoint: str | None = None, data_preprocessor: Any = None, init_cfg: Any = None
        ) -> None:
            super().__init__(data_preprocessor=data_preprocessor, init_cfg=init_cfg)
            config = PETRConfig.from_dict(dict(petr or {}))
            self.detector = PETR(config)
            if checkpoint is not None:
                reader = read_weights(Path(checkpoint))
                own = self.detector.state_dict()
                if missing := sorted(n for n in own if n not in reader):
                    raise SpecError(f"{checkpoint} lacks {len(missing)} tensors of this config, {missing[0]} first")
                self.detector.load_state_dict({n: reader[n] for n in own})

        def forward(self, inputs: Any, data_samples: Sequence[Any] | None = None, mode: str = "tensor") -> Any:
            """inputs: {"imgs": [B, N, 3, H, W]}, normalized;  data_samples: with lidar2img, for "loss" with gt_instances_3d"""
            if data_samples is None:
                raise SpecError("PETR needs data_samples: where the cameras look stands in their metainfo")
            images = inputs["imgs"] if isinstance(inputs, Mapping) else inputs
            matrices = torch.stack([lidar_to_image(s.metainfo) for s in data_samples]).to(images)
            if mode == "loss":
                return self._loss(images, matrices, data_samples)
            logits, codes = self.detector(images, matrices)
            if mode == "tensor":
                return logits, codes
            if mode != "predict":
                raise SpecError(f"mode is 'loss', 'predict' or 'tensor', got {mode!r}")
            config = self.detector.config
            for sample, found in zip(data_samples, detections(logits, codes, config.keep, config.post_range), strict=True):
                sample.pred_instances_3d = to_instances(found)
            return data_samples

        def _loss(self, images: Tensor, matrices: Tensor, data_samples: Sequence[Any]) -> dict[str, Tensor]:
            boxes = [from_lidar_boxes(s.gt_instances_3d.bboxes_3d).to(images) for s in data_samples]
            labels = [s.gt_instances_3d.labels_3d for s in data_samples]
            states = self.detector.states(images, matrices)
            return {f"d{i}.loss": loss(*self.detector.heads(state), boxes, labels) for i, state in enumerate(states)}

    return QPETR


def _wrapped(angle: Tensor) -> Tensor:
    """In [-π, π)."""
    return torch.remainder(angle + math.pi, 2 * math.pi) - math.pi


def _structures() -> Any:
    _module("mmcv")
    stand_in_for_mmcv_ops()
    return _module("mmdet3d.structures")


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise NotFound(f"{name} cannot be imported ({e}): {_INSTALL}; which packages it can do without stands in this package's README") from e


def stand_in_for_mmcv_ops() -> bool:
    """Put a module in the place of mmcv's compiled operators where there are none; every operator of it raises.  → whether it was needed"""
    if "mmcv._ext" in sys.modules or importlib.util.find_spec("mmcv._ext") is not None:
        return False
    module = _Missing("mmcv._ext")
    module.__file__ = __file__
    sys.modules["mmcv._ext"] = module
    return True


class _Missing(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError(f"mmcv.ops.{name} is compiled code, which mmcv-lite does not have; install the full mmcv")

        return missing
