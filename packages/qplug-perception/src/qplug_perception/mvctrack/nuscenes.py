"""A nuScenes folder, read as it lies on disk: tables of JSON, point clouds of float32.  No pickle is opened, and the devkit is not needed.

    <root>/v1.0-mini/scene.json, sample.json, sample_data.json, calibrated_sensor.json, ego_pose.json, sensor.json,
                     sample_annotation.json, instance.json, category.json
    <root>/samples/LIDAR_TOP/….pcd.bin          x, y, z, intensity, ring as float32
    <root>/samples/LIDAR_TOP_VIRTUAL/….safetensors    virtual points, written by `write_virtual`

The release stores virtual points as pickled numpy objects; here they are safetensors.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from qcore.errors import CheckpointError, NotFound
from torch import Tensor

from qplug_perception.mvctrack.virtual_points import Counters, VirtualPoints

TABLES = ("scene", "sample", "sample_data", "calibrated_sensor", "ego_pose", "sensor", "sample_annotation", "instance", "category")
VIRTUAL = "LIDAR_TOP_VIRTUAL"
_TENSORS = ("xyz", "classes", "scores", "instance", "source", "pixel", "camera", "foreground", "foreground_classes", "foreground_scores")
# what a tracking class of the benchmark is called in the tables
CATEGORIES: Mapping[str, tuple[str, ...]] = {
    "car": ("vehicle.car",),
    "pedestrian": ("human.pedestrian.",),
    "truck": ("vehicle.truck",),
    "trailer": ("vehicle.trailer",),
    "bus": ("vehicle.bus.",),
}


@dataclass(frozen=True)
class CameraFile:
    """One image and how its camera stands.  intrinsics: [3, 3];  lidar_to_camera: [4, 4], through both moments' ego poses;  size: (H, W)"""

    channel: str
    path: Path
    intrinsics: Tensor
    lidar_to_camera: Tensor
    size: tuple[int, int]


@dataclass(frozen=True)
class Keyframe:
    """One sample: its point cloud's file, its cameras, and what is in it.

    boxes: instance token → (category, box [7] in the LiDAR's frame)
    """

    token: str
    lidar: Path
    cameras: tuple[CameraFile, ...]
    boxes: Mapping[str, tuple[str, Tensor]]


class NuScenes:
    """The tables of one version.  NotFound or CheckpointError, with the file, where one is missing or broken."""

    def __init__(self, root: Path, version: str = "v1.0-trainval") -> None:
        self.root, self.folder = Path(root), Path(root) / version
        if not self.folder.is_dir():
            have = sorted(p.name for p in self.root.glob("v1.0-*")) if self.root.is_dir() else []
            raise NotFound(f"{self.folder} does not exist; " + (f"{root} has {', '.join(have)}" if have else f"{root} is no nuScenes folder"))

    def table(self, name: str) -> dict[str, dict[str, Any]]:
        """Records by token."""
        path = self.folder / f"{name}.json"
        try:
            return {record["token"]: record for record in json.loads(path.read_text(encoding="utf-8"))}
        except FileNotFoundError:
            raise NotFound(f"{path} does not exist; a nuScenes version has {', '.join(f'{t}.json' for t in TABLES)}") from None
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise CheckpointError(f"{path} is no table of nuScenes ({type(e).__name__}: {e})") from e

    @cached_property
    def tables(self) -> dict[str, dict[str, dict[str, Any]]]:
        return {name: self.table(name) for name in TABLES}

    @cached_property
    def _by_sample(self) -> dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
        """(keyframe data, annotations) of each sample."""
        found: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {token: ([], []) for token in self.tables["sample"]}
        for record in self.tables["sample_data"].values():
            if record["is_key_frame"] and record["sample_token"] in found:
                found[record["sample_token"]][0].append(record)
        for record in self.tables["sample_annotation"].values():
            if record["sample_token"] in found:
                found[record["sample_token"]][1].append(record)
        return found

    def scenes(self) -> list[str]:
        """Names, in the table's order."""
        return [record["name"] for record in self.tables["scene"].values()]

    def frames(self, scene: str) -> Iterator[Keyframe]:
        """The keyframes of a scene, in order of time."""
        record = next((r for r in self.tables["scene"].values() if r["name"] == scene), None)
        if record is None:
            raise NotFound(f"there is no scene {scene!r} in {self.folder}; it has {', '.join(self.scenes()[:5])} …")
        token = record["first_sample_token"]
        while token:
            yield self.frame(token)
            token = self.tables["sample"][token]["next"]

    def frame(self, token: str) -> Keyframe:
        """One sample by its token."""
        data, annotations = self._by_sample[token]
        channel = {r["token"]: self._channel(r) for r in data}
        lidar = next((r for r in data if channel[r["token"]] == "LIDAR_TOP"), None)
        if lidar is None:
            raise CheckpointError(f"sample {token} of {self.folder} has no keyframe of LIDAR_TOP")
        to_world = self._to_world(lidar)
        cameras = []
        for r in data:
            own = self.tables["calibrated_sensor"][r["calibrated_sensor_token"]]
            if own["camera_intrinsic"]:
                # the camera fires at another moment, so its own ego pose counts
                pose = (torch.linalg.inv(self._to_world(r)) @ to_world).float()
                k = torch.tensor(own["camera_intrinsic"], dtype=torch.float32)
                cameras.append(CameraFile(channel[r["token"]], self.root / r["filename"], k, pose, (r["height"], r["width"])))
        inward = torch.linalg.inv(to_world)
        boxes = {a["instance_token"]: (self._category(a), _box(a, inward)) for a in annotations}
        return Keyframe(token, self.root / lidar["filename"], tuple(sorted(cameras, key=lambda c: c.channel)), boxes)

    def tracks(self, scene: str, category: str, least_points: int = 1) -> dict[str, list[tuple[Keyframe, Tensor]]]:
        """Instance → its keyframes and boxes, of one class of the benchmark; only those with `least_points` LiDAR points in their first box."""
        if category not in CATEGORIES:
            raise NotFound(f"{category!r} is no class that is tracked; have {', '.join(CATEGORIES)}")
        found: dict[str, list[tuple[Keyframe, Tensor]]] = {}
        points: dict[str, int] = {}
        for keyframe in self.frames(scene):
            counts = {a["instance_token"]: a["num_lidar_pts"] for a in self._by_sample[keyframe.token][1]}
            for instance, (name, box) in keyframe.boxes.items():
                if name.startswith(CATEGORIES[category]):
                    points.setdefault(instance, counts[instance])
                    found.setdefault(instance, []).append((keyframe, box))
        return {instance: own for instance, own in found.items() if points[instance] >= least_points}

    def _channel(self, record: Mapping[str, Any]) -> str:
        own = self.tables["calibrated_sensor"][record["calibrated_sensor_token"]]
        return str(self.tables["sensor"][own["sensor_token"]]["channel"])

    def _category(self, annotation: Mapping[str, Any]) -> str:
        own = self.tables["instance"][annotation["instance_token"]]
        return str(self.tables["category"][own["category_token"]]["name"])

    def _to_world(self, record: Mapping[str, Any]) -> Tensor:
        sensor = self.tables["calibrated_sensor"][record["calibrated_sensor_token"]]
        return _pose(self.tables["ego_pose"][record["ego_pose_token"]]) @ _pose(sensor)


def rotation(quaternion: list[float]) -> Tensor:
    """Of (w, x, y, z), made a unit one.  [3, 3] float64"""
    w, x, y, z = (torch.tensor(quaternion, dtype=torch.float64) / torch.tensor(quaternion, dtype=torch.float64).norm()).tolist()
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return torch.tensor(rows, dtype=torch.float64)


def _pose(record: Mapping[str, Any]) -> Tensor:
    pose = torch.eye(4, dtype=torch.float64)
    pose[:3, :3], pose[:3, 3] = rotation(record["rotation"]), torch.tensor(record["translation"], dtype=torch.float64)
    return pose


def _box(annotation: Mapping[str, Any], inward: Tensor) -> Tensor:
    """nuScenes' size is (w, l, h); the heading is that of the turned x axis."""
    pose = inward @ _pose(annotation)
    theta = torch.atan2(pose[1, 0], pose[0, 0])
    return torch.cat([pose[:3, 3], torch.tensor(annotation["size"], dtype=torch.float64), theta.reshape(1)]).float()


def read_points(path: Path) -> Tensor:
    """A `.pcd.bin` of nuScenes: [N, 5] float32, x, y, z, intensity, ring.  NotFound or CheckpointError where it is none"""
    if not path.is_file():
        raise NotFound(f"point cloud {path} does not exist")
    raw = path.read_bytes()
    if len(raw) % 20:
        raise CheckpointError(f"{path} has {len(raw)} bytes, which are no points of 5 float32; was it cut off?")
    return torch.frombuffer(bytearray(raw), dtype=torch.float32).reshape(-1, 5) if raw else torch.zeros(0, 5)


def virtual_path(lidar: Path) -> Path:
    """Where the virtual points of a point cloud lie: LIDAR_TOP_VIRTUAL beside LIDAR_TOP."""
    name = lidar.name.removesuffix(".bin").removesuffix(".pcd")
    return lidar.parent.with_name(VIRTUAL) / f"{name}.safetensors"


def write_virtual(lidar: Path, added: VirtualPoints) -> Path:
    """Write the virtual points of a point cloud, and return where."""
    from safetensors.torch import save_file

    path = virtual_path(lidar)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"counters": json.dumps(asdict(added.counters))}
    save_file({name: getattr(added, name).contiguous() for name in _TENSORS}, path, metadata=metadata)
    return path


def read_virtual(lidar: Path) -> VirtualPoints:
    """The virtual points of a point cloud.  NotFound where there is no file: going on with raw points would hide it."""
    from safetensors import SafetensorError, safe_open

    path = virtual_path(lidar)
    if not path.is_file():
        raise NotFound(f"{path} does not exist; make the virtual points of this frame first (`virtual_points`, `write_virtual`)")
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in _TENSORS}
            counters = Counters(**json.loads((file.metadata() or {})["counters"]))
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as e:
        raise CheckpointError(f"{path} holds no virtual points ({type(e).__name__}: {e})") from e
    return VirtualPoints(**tensors, counters=counters)
