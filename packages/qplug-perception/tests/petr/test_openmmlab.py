"""mmdet3d builds PETR, and gets its own boxes back."""

import importlib.util
import math

import pytest
import torch
from qcore.errors import NotFound, SpecError
from qplug_perception.petr import openmmlab
from qplug_perception.petr.openmmlab import from_lidar_boxes, lidar_to_image, register, to_lidar_boxes
from qplug_perception.petr.scenes import corners, make_scene
from qplug_perception.petr.testing import SMALL, small_batch

MISSING = importlib.util.find_spec("mmdet3d") is None
needs_mmdet3d = pytest.mark.skipif(MISSING, reason="mmdet3d is not installed: pip install 'qplug-perception[mmdet3d]'")


@pytest.mark.skipif(not MISSING, reason="mmdet3d is installed")
def test_without_mmdet3d_it_says_what_to_install():
    with pytest.raises(NotFound, match=r"qplug-perception\[mmdet3d\]"):
        register()


def test_matrices_come_whole_or_in_two_parts():
    inner, outer = torch.tensor([[2.0, 0, 3], [0, 4, 5], [0, 0, 1]]), torch.eye(4)
    outer[0, 3] = 7.0
    both = lidar_to_image({"cam2img": [inner.numpy()], "lidar2cam": [outer.numpy()]})
    wanted = torch.eye(4)
    wanted[:3, :3] = inner
    torch.testing.assert_close(both[0], wanted @ outer)
    torch.testing.assert_close(lidar_to_image({"lidar2img": [both[0].numpy()]}), both)
    with pytest.raises(SpecError, match="neither lidar2img"):
        lidar_to_image({"img_shape": 3})


def samples(count: int) -> list:
    data_sample = importlib.import_module("mmdet3d.structures").Det3DDataSample
    instances = importlib.import_module("mmengine.structures").InstanceData
    out = []
    for i in range(count):
        scene = make_scene(i, 32, 48)
        sample = data_sample(metainfo={"lidar2img": list(small_batch()["lidar2img"][0].numpy())})
        sample.gt_instances_3d = instances(bboxes_3d=to_lidar_boxes(scene.boxes), labels_3d=scene.labels)
        out.append(sample)
    return out


@needs_mmdet3d
def test_boxes_keep_their_corners():
    boxes = make_scene(5).boxes
    boxes[:, 6] = torch.linspace(-3, 3, len(boxes))
    theirs = to_lidar_boxes(boxes)
    for mine, other in zip(corners(boxes), theirs.corners, strict=True):
        assert torch.cdist(mine, other).min(1).values.max().item() < 1e-4
    torch.testing.assert_close(theirs.gravity_center, boxes[:, :3])
    again = from_lidar_boxes(theirs)
    again[:, 6] = boxes[:, 6] + torch.remainder(again[:, 6] - boxes[:, 6] + math.pi, 2 * math.pi) - math.pi
    torch.testing.assert_close(again, boxes, rtol=1e-5, atol=1e-5)


@needs_mmdet3d
def test_a_config_of_mmengine_is_built_and_predicts(tmp_path):
    if openmmlab.stand_in_for_mmcv_ops():
        with pytest.raises(NotImplementedError, match="install the full mmcv"):
            importlib.import_module("mmcv._ext").box_iou_rotated()
    config_file = tmp_path / "petr.py"
    config_file.write_text(f"model = dict(type='QPETR', petr={SMALL.to_dict() | {'embedding': 'qfpe'}!r})\n")
    config = importlib.import_module("mmengine.config").Config.fromfile(str(config_file))
    assert register() is register()
    model = importlib.import_module("mmdet3d.registry").MODELS.build(config.model).eval()
    images = small_batch()["images"]
    found = model({"imgs": images}, samples(2), mode="predict")
    assert len(found) == 2 and type(found[0].pred_instances_3d.bboxes_3d).__name__ == "LiDARInstance3DBoxes"
    kept = found[0].pred_instances_3d
    assert len(kept.scores_3d) == len(kept.bboxes_3d) <= SMALL.keep
    losses = model.train()({"imgs": images}, samples(2), mode="loss")
    assert set(losses) == {"d0.loss", "d1.loss"}
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.detector.layers.parameters())


@needs_mmdet3d
def test_each_sample_of_a_batch_has_its_own_cameras():
    model = register()(petr=SMALL.to_dict()).eval()
    images, (one, other) = small_batch()["images"], samples(2)
    other.set_metainfo({"lidar2img": [m[[0, 1, 2, 3]] * 1.0 for m in reversed(one.metainfo["lidar2img"])]})
    with torch.no_grad():
        both = model(images, [one, other])[1]
        alone = torch.cat([model(images[i : i + 1], [s])[1] for i, s in enumerate((one, other))])
    torch.testing.assert_close(both, alone, rtol=1e-4, atol=1e-4)
