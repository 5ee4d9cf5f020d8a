"""Scenes by seed, the task on them, and where models come from."""

import json

import pytest
import torch
from qcore.errors import CalibrationError, CheckpointError, NotFound, SpecError
from qcore.recipe import CalibrationSettings
from qcore.testing import check_source, check_task
from qplug_perception.petr.data import Detection, Made, SceneFile, ScenePair
from qplug_perception.petr.model import PETR
from qplug_perception.petr.scenes import CAMERAS, EVALUATION, corners, make_scene, rig
from qplug_perception.petr.source import PETRSource
from qplug_perception.petr.testing import SMALL, small_petr
from safetensors.torch import save_file


def test_a_seed_is_a_scene():
    one, again, other = make_scene(3, 32, 48), make_scene(3, 32, 48), make_scene(4, 32, 48)
    assert torch.equal(one.images, again.images) and torch.equal(one.boxes, again.boxes)
    assert not torch.equal(one.images, other.images)
    assert one.images.shape == (CAMERAS, 3, 32, 48) and one.images.dtype is torch.uint8


def test_blobs_stand_where_boxes_are_seen():
    scene = make_scene(0)
    centre = torch.cat([scene.boxes[:, :3], torch.ones(len(scene.boxes), 1)], 1)
    found = 0
    for camera, matrix in enumerate(scene.lidar2img):
        u, v, depth, _ = (centre @ matrix.T).unbind(1)
        nearest = depth.argsort()
        for i in nearest.tolist():
            x, y = (u[i] / depth[i]).int(), (v[i] / depth[i]).int()
            if depth[i] > 1 and 0 <= x < 112 and 0 <= y < 64:
                colour = scene.images[camera, :, y, x].float()
                assert colour.max() - colour.min() > 60  # ground and sky are grey
                found += 1
                break
    assert found


def test_every_direction_is_seen_by_a_camera():
    angle = torch.linspace(0, 6.28, 100)
    points = torch.stack([10 * angle.cos(), 10 * angle.sin(), torch.zeros(100), torch.ones(100)], 1)
    seen = torch.einsum("nij,pj->npi", rig(64, 112), points)
    inside = (seen[..., 2] > 0) & (seen[..., 0] >= 0) & (seen[..., 0] <= 112 * seen[..., 2])
    assert inside.any(0).all()


def test_corners_of_a_box():
    box = torch.tensor([[1.0, 2.0, 3.0, 2.0, 4.0, 6.0, 0.0, 0.0, 0.0]])
    found = corners(box)[0]
    assert found.amin(0).tolist() == [0.0, 0.0, 0.0] and found.amax(0).tolist() == [2.0, 4.0, 6.0]


def test_detection_is_a_task():
    model = small_petr()
    with torch.no_grad():
        check_task(Detection(Made(EVALUATION, 3, 32, 48).read(), SMALL, batch=2), lambda b: torch.cat(model(**b), -1))


def test_calibration_and_evaluation_share_no_scene():
    pair = ScenePair.made(SMALL)
    assert pair.calibration.first + pair.calibration.count <= EVALUATION <= pair.evaluation.first


def test_scenes_come_from_files_too(tmp_path):
    made = Made(0, 4, 32, 48).read()
    file = tmp_path / "scenes.safetensors"
    save_file({n: getattr(made, n) for n in ("images", "lidar2img", "boxes", "labels", "counts")}, file)
    pair = ScenePair(None, None, SMALL).chosen(file, None)
    batches = pair.batches(CalibrationSettings(samples=4, batch=2))
    assert [b["images"].shape for b in batches] == [(2, 6, 3, 32, 48)] * 2
    assert all(torch.equal(a, b) for a, b in zip(made.truth()[0], SceneFile(file).read().truth()[0], strict=True))
    with pytest.raises(CalibrationError, match="the same"):
        pair.chosen(file, file)
    with pytest.raises(CalibrationError, match="4 scenes"):
        pair.batches(CalibrationSettings(samples=8))
    save_file({"images": made.images[:, :, :1].contiguous()}, file)
    with pytest.raises(CalibrationError, match="no scenes"):
        SceneFile(file).read()


# models ----------------------------------------------------------------------------------------------------------------------------------


def described(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({"model_type": "petr", "petr": {**SMALL.to_dict(), **changes}}))
    return file


def test_a_config_with_random_weights_is_a_source(tmp_path):
    check_source(PETRSource(), f"petr:{described(tmp_path)}@random:3")


def test_a_folder_is_a_source(tmp_path):
    described(tmp_path)
    save_file(small_petr().state_dict(), tmp_path / "model.safetensors")
    check_source(PETRSource(), str(tmp_path))


def test_what_does_not_fit_is_refused_by_name(tmp_path):
    source = PETRSource()
    with pytest.raises(NotFound, match="names no model"):
        source.load("petr:huge")
    with pytest.raises(SpecError, match="no entry 'depth'"):
        source.load(f"petr:{described(tmp_path, depth=3)}@random")
    config = described(tmp_path)
    state = small_petr().state_dict()
    state.pop("norm.bias")
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"norm\.bias"):
        source.load(f"petr:{config}@{tmp_path / 'w.pth'}")


def test_weights_of_another_shape_are_refused(tmp_path):
    torch.save(PETR(SMALL).state_dict() | {"norm.bias": torch.zeros(3)}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"norm\.bias.*\(3,\)"):
        PETRSource().load(f"petr:{described(tmp_path)}@{tmp_path / 'w.pth'}")
