"""Virtual points, boxes, scores, and nuScenes' files."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from qcore.errors import CheckpointError, NotFound, SpecError
from qplug_perception.mvctrack.boxes import from_mmdet3d, inside, iou3d, precision, shifted, success, to_box_frame
from qplug_perception.mvctrack.nuscenes import TABLES, NuScenes, read_points, read_virtual, rotation, virtual_path, write_virtual
from qplug_perception.mvctrack.sequences import made_sequence
from qplug_perception.mvctrack.virtual_points import Counters, MVCPSettings, View, eroded, merged, project, unproject, virtual_points


def view(masks: torch.Tensor, classes=None, pose: torch.Tensor | None = None) -> View:
    """A camera that looks along the LiDAR's x."""
    k = torch.tensor([[40.0, 0, 32.0], [0, 40.0, 24.0], [0, 0, 1]])
    own = torch.tensor([[0.0, -1, 0, 0.1], [0, 0, -1, -0.2], [1, 0, 0, 0.05], [0, 0, 0, 1]]) if pose is None else pose
    return View(
        k, own, masks, torch.zeros(len(masks), dtype=torch.long) if classes is None else torch.tensor(classes), torch.full((len(masks),), 0.8)
    )


def box_mask(top: int, left: int, height: int = 12, width: int = 14) -> torch.Tensor:
    mask = torch.zeros(48, 64, dtype=torch.bool)
    mask[top : top + height, left : left + width] = True
    return mask


def points_in(mask: torch.Tensor, depths: list[float], own: View, seed: int = 0) -> torch.Tensor:
    """LiDAR points that fall on pixels of a mask."""
    where = mask.nonzero().flip(-1)
    pick = torch.randperm(len(where), generator=torch.Generator().manual_seed(seed))[: len(depths)]
    xyz = unproject(where[pick], torch.tensor(depths), own).float()
    return torch.cat([xyz, torch.ones(len(depths), 1)], 1)


def test_project_and_unproject_are_inverse():
    own = view(torch.zeros(0, 48, 64, dtype=torch.bool))
    pixel = torch.tensor([[0, 0], [63, 47], [10, 20]])
    xyz = unproject(pixel, torch.tensor([3.0, 7.0, 20.0]), own)
    back, depth, index = project(xyz, own)
    assert torch.equal(back, pixel) and index.tolist() == [0, 1, 2]
    torch.testing.assert_close(depth, torch.tensor([3.0, 7.0, 20.0], dtype=torch.float64))


def test_points_behind_and_beside_the_image_are_left_out():
    own = view(torch.zeros(0, 48, 64, dtype=torch.bool))
    xyz = torch.tensor([[-5.0, 0, 0], [5.0, 0, 0], [5.0, 50.0, 0], [5.0, 0, 50.0]])
    assert project(xyz, own)[2].tolist() == [1]


def test_virtual_points_fall_back_into_their_mask_and_have_a_depth_of_their_instance():
    masks = torch.stack([box_mask(5, 5), box_mask(25, 30)])
    own = view(masks, [2, 7])
    points = torch.cat([points_in(masks[0], [6.0, 6.2, 6.5], own), points_in(masks[1], [15.0, 15.1], own)])
    made = virtual_points(points, [own], MVCPSettings(fixed=120))
    assert len(made) == 240 and made.instance.bincount().tolist() == [120, 120]
    pixel, depth, index = project(made.xyz, own)
    assert index.tolist() == list(range(240))
    assert float((pixel - made.pixel).abs().max()) < 1  # the very pixel
    assert bool(masks[made.instance, made.pixel[:, 1], made.pixel[:, 0]].all())
    source = project(points, own)[1][made.source]
    torch.testing.assert_close(depth, source, rtol=1e-5, atol=1e-5)
    assert bool(((made.source < 3) == (made.instance == 0)).all())
    assert set(made.classes[made.instance == 1].tolist()) == {7}
    assert made.foreground.tolist() == [0, 1, 2, 3, 4] and made.foreground_classes.tolist() == [2, 2, 2, 7, 7]


def test_the_nearest_point_on_the_image_gives_the_depth():
    mask = box_mask(0, 0, 20, 40)
    own = view(mask.unsqueeze(0))
    points = unproject(torch.tensor([[2, 10], [37, 10]]), torch.tensor([5.0, 9.0]), own).float()
    made = virtual_points(points, [own], MVCPSettings(fixed=200))
    left = made.pixel[:, 0] < 19
    assert set(made.source[left].tolist()) == {0} and set(made.source[made.pixel[:, 0] > 20].tolist()) == {1}


def test_no_depth_crosses_from_one_camera_or_mask_to_another():
    mask = box_mask(10, 20)
    front = view(mask.unsqueeze(0), [1])
    turned = front.lidar_to_camera.clone()
    turned[0, 3] += 0.4  # stands beside the first and sees the same things a little further to the right
    beside = view(box_mask(10, 24).unsqueeze(0), [5], turned)
    near, far = points_in(mask, [5.0, 5.1, 5.2, 5.3], front), points_in(box_mask(10, 24), [30.0, 30.5], beside, seed=5)
    made = virtual_points(torch.cat([near, far]), [front, beside], MVCPSettings(fixed=60))
    seen = []
    for camera, own in enumerate((front, beside)):
        mine = made.camera == camera
        lies = project(torch.cat([near, far]), own)
        in_mask = {int(i) for p, i in zip(lies[0], lies[2], strict=True) if own.masks[0, p[1], p[0]]}
        assert set(made.source[mine].tolist()) <= in_mask
        seen.append(in_mask)
    assert made.counters.twice == len(seen[0] & seen[1]) and made.counters.densified == 2


def test_overlapping_masks_share_no_point():
    first, second = box_mask(10, 10), box_mask(14, 14)
    own = view(torch.stack([first, second]))
    points = points_in(first & second, [4.0, 4.1], own)
    made = virtual_points(points, [own])
    assert set(made.instance.tolist()) == {0} and made.counters == Counters(instances=2, densified=1, without_points=1)


def test_an_instance_without_points_gives_none_and_is_counted():
    own = view(box_mask(5, 5).unsqueeze(0))
    made = virtual_points(torch.zeros(0, 4), [own])
    assert len(made) == 0 and made.counters == Counters(instances=1, without_points=1) and len(made.foreground) == 0
    assert len(virtual_points(torch.zeros(5, 4), [])) == 0
    assert merged(torch.ones(2, 4), made, 15).shape == (2, 15)


def test_a_small_mask_repeats_its_first_pixel():
    mask = box_mask(5, 5, 2, 3)
    own = view(mask.unsqueeze(0))
    made = virtual_points(points_in(mask, [4.0], own), [own], MVCPSettings(fixed=120))
    assert len(made) == 120 and made.counters.padded == 1
    assert bool((made.pixel[6:] == made.pixel[0]).all()) and len(made.pixel.unique(dim=0)) == 6


def test_density_grows_with_distance_in_metres():
    settings = MVCPSettings()
    counts = [settings.count(d, 20.0) for d in (2.0, 10.0, 20.0, 30.0, 500.0)]
    assert counts == sorted(counts) and counts[0] == 50 and counts[2] == 80 and counts[3] == 120 and counts[-1] == 240
    assert {MVCPSettings(fixed=120).count(d, 20.0) for d in (2.0, 500.0)} == {120}
    masks = torch.stack([box_mask(2, 2, 20, 20), box_mask(25, 30, 20, 20)])
    own = view(masks)
    points = torch.cat([points_in(masks[0], [5.0, 5.0], own), points_in(masks[1], [25.0, 25.0], own)])
    made = virtual_points(points, [own])
    d = [float(points[i : i + 2, :3].norm(dim=1).median()) for i in (0, 2)]
    assert made.instance.bincount().tolist() == [settings.count(x, sum(d) / 2) for x in d]


def test_a_generator_makes_it_the_same_and_another_seed_does_not():
    mask = box_mask(5, 5, 30, 30)
    own = view(mask.unsqueeze(0))
    points = points_in(mask, [4.0, 5.0], own)
    draw = lambda seed: virtual_points(points, [own], generator=torch.Generator().manual_seed(seed)).pixel
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert torch.equal(virtual_points(points, [own]).xyz, virtual_points(points, [own]).xyz)


def test_erosion_takes_off_the_edge_where_depths_bleed():
    mask = box_mask(10, 10, 12, 14)
    thin = eroded(mask.unsqueeze(0), 2)[0]
    assert int(thin.sum()) == 8 * 10 and bool(mask[thin].all())
    own = view(mask.unsqueeze(0))
    inner = points_in(thin, [5.0], own)
    edge = unproject(torch.tensor([[10, 10]]), torch.tensor([40.0]), own).float()  # a background point that shines past the corner
    both = torch.cat([inner, torch.cat([edge, torch.ones(1, 1)], 1)])
    bled = virtual_points(both, [own], MVCPSettings(fixed=100))
    clean = virtual_points(both, [own], MVCPSettings(fixed=80, erosion=2))
    assert 1 in bled.source.tolist() and set(clean.source.tolist()) == {0}
    gone = virtual_points(both, [own], MVCPSettings(erosion=10))
    assert gone.counters == Counters(instances=1, eroded_away=1)


def test_features_are_dropped_or_kept():
    mask = box_mask(5, 5)
    own = view(mask.unsqueeze(0), [4])
    points = torch.cat([points_in(mask, [4.0], own), torch.tensor([[-9.0, 0, 0, 1]])])
    made = virtual_points(points, [own], MVCPSettings(fixed=10))
    assert merged(points, made).shape == (12, 3)
    full = merged(points, made, 15)
    assert full.shape == (12, 15)
    assert full[0, 3:].tolist() == pytest.approx([0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0.8, 0.0])
    assert full[1, 3:].tolist() == [1.0] * 12
    assert full[2, 3:].tolist() == pytest.approx([0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0.8, -1.0])
    with pytest.raises(SpecError, match="3 or 15"):
        merged(points, made, 4)


def test_a_sparse_cuboid_gains_points_that_lie_on_it():
    gained, distances = [], []
    for seed in range(12):
        for now in made_sequence(seed, frames=1):
            on_it = inside(now.points[:, :3], now.box, margin=0.1).nonzero().squeeze(1)
            if len(on_it) < 5 or not len(now.views[0].masks):
                continue
            # five points of the object, close to one another in depth, are all that is left of it
            depth = now.points[on_it, 0]
            few = on_it[(depth - depth.median()).abs().argsort()[:5]]
            made = virtual_points(now.points[few], now.views, MVCPSettings(erosion=1))
            gained.append(len(made))
            own = to_box_frame(made.xyz, now.box).abs() - torch.stack([now.box[4], now.box[3], now.box[5]]) / 2
            distances.append(float(own.clamp(min=0).norm(dim=1).median()))
    assert len(gained) == 12 and min(gained) >= 50
    # one voxel of the car's grid is 0.075 m; a car is seen from two sides, and one depth stands for both
    assert max(distances) < 0.075, distances


@pytest.mark.parametrize("wrong", [{"fixed": 0}, {"low": 9, "high": 3}, {"erosion": -1}, {"growth": -1.0}], ids=str)
def test_settings_that_cannot_be(wrong):
    with pytest.raises(SpecError):
        MVCPSettings(**wrong)


def test_a_class_beyond_the_ten_is_an_error_that_says_so():
    with pytest.raises(SpecError, match="class 12"):
        view(box_mask(5, 5).unsqueeze(0), [12])
    with pytest.raises(SpecError, match="bool"):
        view(box_mask(5, 5).unsqueeze(0).float())


# boxes ---------------------------------------------------------------------------------------------------------------------------------------


def test_iou_of_boxes_is_that_of_random_points():
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        a = torch.cat([torch.rand(3, generator=g), 1 + 3 * torch.rand(3, generator=g), 6.3 * torch.rand(1, generator=g)])
        b = torch.cat([torch.rand(3, generator=g) * 2, 1 + 3 * torch.rand(3, generator=g), 6.3 * torch.rand(1, generator=g)])
        points = (torch.rand(200_000, 3, generator=g) - 0.5) * 12
        one, two = inside(points, a), inside(points, b)
        union = int((one | two).sum())
        assert iou3d(a, b) == pytest.approx(int((one & two).sum()) / union, abs=4 / math.sqrt(union))


def test_iou_of_known_boxes():
    a = torch.tensor([0.0, 0, 0, 2, 4, 1, 0.7])
    assert iou3d(a, a) == pytest.approx(1.0)
    assert iou3d(a, replace_at(a, 6, 0.7 + math.pi)) == pytest.approx(1.0)
    straight = replace_at(a, 6, 0.0)
    assert iou3d(straight, replace_at(straight, 0, 2.0)) == pytest.approx(1 / 3)
    assert iou3d(straight, replace_at(straight, 2, 5.0)) == 0
    assert iou3d(straight, replace_at(straight, 6, math.pi / 2)) == pytest.approx(4 / 12)
    with pytest.raises(SpecError, match="positive"):
        iou3d(a, replace_at(a, 3, 0.0))


def replace_at(box: torch.Tensor, i: int, value: float) -> torch.Tensor:
    box = box.clone()
    box[i] = value
    return box


def test_a_perfect_track_has_a_hundred():
    assert success([1.0] * 7) == pytest.approx(100.0) and precision([0.0] * 7) == pytest.approx(100.0)
    # never overlapping still passes t = 0
    assert success([0.0]) == pytest.approx(2.5) and precision([9.0]) == 0
    assert success([0.5]) == pytest.approx(100 * (0.5 + 0.025)) and precision([1.0]) == pytest.approx(100 * (1.0 + 0.05) / 2)
    with pytest.raises(SpecError):
        success([])


def test_a_box_moves_in_its_own_frame():
    box = torch.tensor([1.0, 2.0, 0.0, 2, 4, 1, math.pi / 2])
    moved = shifted(box, torch.tensor([1.0, 0.0, 0.5]))
    assert moved[:3].tolist() == pytest.approx([1.0, 3.0, 0.5], abs=1e-6) and moved[3:].tolist() == box[3:].tolist()
    torch.testing.assert_close(to_box_frame(moved[:3].unsqueeze(0), box), torch.tensor([[1.0, 0.0, 0.5]]))


def test_boxes_of_mmdet3d():
    theirs = SimpleNamespace(gravity_center=torch.tensor([[1.0, 2, 3]]), dims=torch.tensor([[4.0, 2, 1.5]]), yaw=torch.tensor([0.3]))
    assert from_mmdet3d(theirs)[0].tolist() == pytest.approx([1, 2, 3, 2, 4, 1.5, 0.3])
    with pytest.raises(SpecError, match="gravity_center"):
        from_mmdet3d(SimpleNamespace(dims=0, yaw=0))


# nuScenes' files -----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A scene of two keyframes: one LiDAR, one camera that fires a little later, one car."""
    identity = {"rotation": [1.0, 0, 0, 0], "translation": [0.0, 0, 0]}
    turned = [math.cos(0.25), 0, 0, math.sin(0.25)]
    tables = {
        "scene": [{"token": "s", "name": "scene-0001", "first_sample_token": "a"}],
        "sample": [{"token": "a", "next": "b"}, {"token": "b", "next": ""}],
        "sensor": [{"token": "L", "channel": "LIDAR_TOP"}, {"token": "C", "channel": "CAM_FRONT"}],
        "calibrated_sensor": [
            {"token": "l", "sensor_token": "L", "camera_intrinsic": [], **identity, "translation": [0.0, 0, 1.8]},
            {"token": "c", "sensor_token": "C", "camera_intrinsic": [[50.0, 0, 32], [0, 50.0, 24], [0, 0, 1]], **identity},
        ],
        "ego_pose": [
            {"token": "p0", "rotation": turned, "translation": [10.0, 5.0, 0.0]},
            {"token": "p1", "rotation": turned, "translation": [11.0, 5.0, 0.0]},
        ],
        "category": [{"token": "k", "name": "vehicle.car"}],
        "instance": [{"token": "i", "category_token": "k"}],
        "sample_annotation": [
            {
                "token": f"n{s}",
                "sample_token": s,
                "instance_token": "i",
                "size": [2.0, 4.0, 1.5],
                "num_lidar_pts": 3,
                "rotation": turned,
                "translation": at,
            }
            for s, at in (("a", [10.0, 5.0, 1.8]), ("b", [11.0, 6.0, 1.8]))
        ],
    }
    tables["sample_data"] = [
        {"token": f"{s}{c}", "sample_token": s, "calibrated_sensor_token": c, "ego_pose_token": p, "is_key_frame": True}
        | {"filename": f"samples/{'LIDAR_TOP' if c == 'l' else 'CAM_FRONT'}/{s}.{'pcd.bin' if c == 'l' else 'jpg'}", "height": 48, "width": 64}
        for s in ("a", "b")
        for c, p in (("l", "p0"), ("c", "p1"))
    ]
    (tmp_path / "v1.0-mini").mkdir()
    for name, records in tables.items():
        (tmp_path / "v1.0-mini" / f"{name}.json").write_text(json.dumps(records))
    (tmp_path / "samples" / "LIDAR_TOP").mkdir(parents=True)
    points = torch.arange(15, dtype=torch.float32).reshape(3, 5)
    (tmp_path / "samples" / "LIDAR_TOP" / "a.pcd.bin").write_bytes(points.numpy().tobytes())
    assert set(tables) == set(TABLES)
    return tmp_path


def test_a_nuscenes_folder_is_read(folder):
    data = NuScenes(folder, "v1.0-mini")
    assert data.scenes() == ["scene-0001"]
    one, two = data.frames("scene-0001")
    assert torch.equal(read_points(one.lidar), torch.arange(15, dtype=torch.float32).reshape(3, 5))
    name, box = one.boxes["i"]
    assert name == "vehicle.car" and box.tolist() == pytest.approx([0, 0, 0, 2, 4, 1.5, 0], abs=1e-5)
    # a metre along the world's y is sin, cos of the ego's turn of half a radian; the LiDAR stands at p0 in both frames
    own = two.boxes["i"][1]
    assert own[:2].tolist() == pytest.approx([math.cos(0.5) + math.sin(0.5), math.cos(0.5) - math.sin(0.5)], abs=1e-5)
    camera = one.cameras[0]
    assert camera.channel == "CAM_FRONT" and camera.size == (48, 64)
    # the ego went a metre along the world's x before the camera fired
    torch.testing.assert_close(camera.lidar_to_camera[:3, 3], torch.tensor([-math.cos(0.5), math.sin(0.5), 1.8]), atol=1e-5, rtol=0)
    tracks = data.tracks("scene-0001", "car")
    assert list(tracks) == ["i"] and len(tracks["i"]) == 2
    assert data.tracks("scene-0001", "car", least_points=4) == {} and data.tracks("scene-0001", "bus") == {}


def test_quaternions_are_turns():
    torch.testing.assert_close(rotation([1.0, 0, 0, 0]), torch.eye(3, dtype=torch.float64))
    quarter = rotation([math.cos(math.pi / 4), 0, 0, math.sin(math.pi / 4)])
    torch.testing.assert_close(quarter @ torch.tensor([1.0, 0, 0], dtype=torch.float64), torch.tensor([0.0, 1, 0], dtype=torch.float64))
    own = rotation([0.3, -0.5, 0.2, 0.7])
    torch.testing.assert_close(own @ own.T, torch.eye(3, dtype=torch.float64))


def test_what_is_missing_or_broken_says_where(folder):
    with pytest.raises(NotFound, match=r"v1\.0-mini"):
        NuScenes(folder, "v1.0-trainval")
    with pytest.raises(NotFound, match="no nuScenes folder"):
        NuScenes(folder / "samples", "v1.0-mini")
    data = NuScenes(folder, "v1.0-mini")
    with pytest.raises(NotFound, match="scene-0001"):
        list(data.frames("scene-9"))
    with pytest.raises(NotFound, match="pedestrian"):
        data.tracks("scene-0001", "bicycle")
    cut = folder / "samples" / "LIDAR_TOP" / "b.pcd.bin"
    cut.write_bytes(b"123")
    with pytest.raises(CheckpointError, match="3 bytes"):
        read_points(cut)
    (folder / "v1.0-mini" / "ego_pose.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"ego_pose\.json"):
        NuScenes(folder, "v1.0-mini").frame("a")


def test_virtual_points_are_kept_in_files_and_a_missing_one_is_an_error(folder):
    lidar = folder / "samples" / "LIDAR_TOP" / "a.pcd.bin"
    with pytest.raises(NotFound, match="LIDAR_TOP_VIRTUAL"):
        read_virtual(lidar)
    mask = box_mask(5, 5)
    own = view(mask.unsqueeze(0))
    made = virtual_points(points_in(mask, [4.0, 5.0], own), [own])
    path = write_virtual(lidar, made)
    assert path == virtual_path(lidar) == folder / "samples" / "LIDAR_TOP_VIRTUAL" / "a.safetensors"
    again = read_virtual(lidar)
    assert torch.equal(again.xyz, made.xyz) and again.counters == made.counters and replace(made.counters) == again.counters
    path.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="no virtual points"):
        read_virtual(lidar)
