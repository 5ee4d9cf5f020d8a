"""Losses, ray compensation and RayIoU, on scenes whose truth is known."""

import math

import pytest
import torch
from qcore.errors import SpecError
from qplug_perception.gsrender.gaussians import Gaussians
from qplug_perception.gsrender.geometry import FREE, Camera, VoxelGrid, invert, looking
from qplug_perception.gsrender.losses import (
    DYNAMIC,
    IGNORED,
    LossSettings,
    View,
    balance_weights,
    class_weights,
    lift_depth_loss,
    opacity_entropy,
    semantic_loss,
    silog,
    supervise,
    views_of,
)
from qplug_perception.gsrender.metrics import RayIoU, cast, lidar_rays, ray_iou
from qplug_perception.gsrender.render import render
from qplug_perception.gsrender.scenes import SMALL_GRID, Rig, Scene, frame, occupancy, random_scene, sparse, trace
from torch import Tensor


def test_silog_is_zero_at_the_truth_and_forgives_a_factor_only_in_part():
    d = torch.rand(50, dtype=torch.float64) + 1
    everywhere = torch.ones(50, dtype=torch.bool)
    assert float(silog(d, d, everywhere)) < 1e-5
    assert float(silog(2 * d, d, everywhere)) == pytest.approx(math.sqrt(0.15) * math.log(2))
    assert float(silog(2 * d, d, everywhere, focus=1.0)) < 1e-5
    assert float(silog(d, 2 * d, torch.zeros(50, dtype=torch.bool))) == 0
    with pytest.raises(SpecError, match="focus"):
        silog(d, d, everywhere, focus=2.0)


def test_silog_has_a_finite_slope_where_all_is_right():
    d = torch.rand(5).add(1).requires_grad_()
    silog(d, d.detach(), torch.ones(5, dtype=torch.bool)).backward()
    assert torch.isfinite(d.grad).all()


def test_class_and_ray_weights_are_those_of_the_formulas():
    counts = torch.tensor([10, 1000])
    assert class_weights(counts).tolist() == pytest.approx([1 / math.log(10), 1 / math.log(1000)])
    assert balance_weights(counts.float()).tolist() == pytest.approx([math.exp(0.005 * 99), 1.0])
    with pytest.raises(SpecError, match="class 1"):
        class_weights(torch.tensor([10, 1]))


def test_entropy_and_lift_terms():
    assert float(opacity_entropy(torch.tensor([0.5]))) == pytest.approx(math.log(2))
    assert float(opacity_entropy(torch.tensor([0.0, 1.0]))) < 1e-4
    logits = torch.zeros(3, 4)
    logits[0, 1] = 20.0
    # depth 1.7 lies in the second bin of half a metre from 1; the others are unknown or beyond
    assert float(lift_depth_loss(logits, torch.tensor([1.7, 0.0, 50.0]), 1.0, 0.5)) < 1e-6


def test_ignored_pixels_do_not_count():
    logits = torch.randn(3, 4)
    labels = torch.tensor([0, 2, IGNORED, IGNORED])
    other = logits.clone()
    other[:, 2:] += 5
    assert torch.equal(semantic_loss(logits, labels), semantic_loss(other, labels))
    assert float(semantic_loss(logits, torch.full((4,), IGNORED))) == 0


# ray compensation ------------------------------------------------------------------------------------------------------------------------


def cloud(n: int = 30, classes: int = 17) -> Gaussians:
    g = torch.Generator().manual_seed(0)
    means = torch.rand(n, 3, generator=g) * torch.tensor([6.0, 6.0, 2.0]) - torch.tensor([3.0, 3.0, 0.0])
    return Gaussians(means, torch.full((n, 3), 0.4), torch.rand(n, generator=g), torch.randn(n, classes, generator=g))


def test_neighbours_at_the_same_pose_are_the_plain_loss():
    now = frame(random_scene(1), rig=Rig(size=(8, 12)))
    own = views_of(now.cameras(), now.depth, now.labels, now.pose, now.pose)
    plain = [View(c, d, s) for c, d, s in zip(now.cameras(), now.depth, now.labels, strict=True)]
    assert torch.equal(supervise(cloud(), own), supervise(cloud(), plain))
    assert all(v.weight == 1 and not v.neighbour for v in own)


def test_another_moment_moves_the_camera_as_it_would_move_the_gaussians():
    scene = random_scene(2)
    now, later = frame(scene, 0.0, Rig(size=(8, 12))), frame(scene, 2.0, Rig(size=(8, 12)))
    view = views_of(later.cameras(), later.depth, later.labels, now.pose, later.pose)[0]
    here = cloud()
    between = invert(later.pose) @ now.pose
    moved = Gaussians(here.means @ between[:3, :3].T + between[:3, 3], here.scales, here.opacity, here.semantics, between[:3, :3].expand(30, 3, 3))
    torch.testing.assert_close(render(here, view.camera).depth, render(moved, later.cameras()[0]).depth, rtol=1e-4, atol=1e-4)
    assert view.neighbour and view.weight == 0.3


@pytest.mark.parametrize("label", [2, 6, 4], ids=["bicycle", "motorcycle", "car"])
def test_labels_of_dynamic_pixels_of_a_neighbour_change_nothing(label):
    scene = random_scene(3)
    now, later = frame(scene, rig=Rig(size=(8, 12))), frame(scene, 1.0, Rig(size=(8, 12)))
    labels = later.labels.clone()
    labels[:, 20:40] = label
    others = labels.clone()
    others[:, 20:40] = DYNAMIC[-1]
    depth = later.depth.clone()
    depth[:, 20:40] += 3.0
    views = [views_of(later.cameras(), d, s, now.pose, later.pose) for d, s in ((later.depth, labels), (depth, others))]
    losses = [float(supervise(cloud(), v)) for v in views]
    assert losses[0] == losses[1]
    # barriers stand still: RenderOcc's list would leave them out
    barrier = labels.clone()
    barrier[:, 20:40] = 1
    assert float(supervise(cloud(), views_of(later.cameras(), later.depth, barrier, now.pose, later.pose))) != losses[0]
    # and in a view of the same moment they do count
    own = [views_of(later.cameras(), d, s, later.pose, later.pose) for d, s in ((later.depth, labels), (depth, others))]
    assert float(supervise(cloud(), own[0])) != float(supervise(cloud(), own[1]))


def test_the_list_of_dynamic_classes_is_the_corrected_one():
    assert set(DYNAMIC) == {2, 3, 4, 5, 6, 7, 9, 10}
    assert LossSettings().dynamic == DYNAMIC


def panel() -> Scene:
    """A panel across the road ahead, and long walls to the left, to the right and far behind it."""
    boxes = [
        ((4.0, 0.0, 1.0), (0.8, 4.0, 2.8)),
        ((6.0, 5.6, 1.0), (16.0, 0.8, 2.8)),
        ((6.0, -9.6, 1.0), (30.0, 0.8, 2.8)),
        ((13.2, 0.0, 1.0), (0.8, 30.0, 2.8)),
    ]
    centre, size = (torch.tensor([b[i] for b in boxes]) for i in (0, 1))
    n = len(boxes)
    return Scene(centre, size, torch.zeros(n), torch.full((n,), 15), torch.zeros(n, 3), torch.ones(n, 3), 0.0, 0)


def see(scene: Scene, position: tuple[float, float, float], yaw: float) -> View:
    k = torch.tensor([[10.0, 0, 12.0], [0, 10.0, 5.0], [0, 0, 1]])
    to_vehicle = looking(yaw, position)
    camera = Camera(k, invert(to_vehicle), (10, 24))
    rays = torch.cat([camera.pixels(), torch.ones(240, 1)], -1) @ torch.linalg.inv(k).T
    depth, _, _ = trace(scene, to_vehicle[:3, 3], rays @ to_vehicle[:3, :3].T, 0.0)
    depth = torch.where(torch.isfinite(depth), depth, 0.0)
    return View(camera, depth, torch.where(depth > 0, 15, IGNORED))


def fit(views: list[View], steps: int = 60) -> Tensor:
    """Opacities of Gaussians on a grid around the panel, fitted to views.  [X, Y, Z]"""
    grid = VoxelGrid((3.6, -1.6, 0.0), 0.8, (5, 4, 2))
    walls = VoxelGrid((3.6, 5.2, 0.0), 0.8, (5, 1, 2))
    opacity = torch.zeros(grid.count).requires_grad_()
    means = torch.cat([grid.centres(), walls.centres()])
    semantics = torch.zeros(len(means), 17)
    semantics[:, 15] = 8.0
    adam = torch.optim.Adam([opacity], lr=0.2)
    for _ in range(steps):
        # the far wall is known: what is asked is the space before it
        o = torch.cat([torch.sigmoid(opacity + 0.8), torch.ones(walls.count) * 0.99])
        loss = supervise(Gaussians(means, torch.full((len(means), 3), 0.4), o, semantics), views, LossSettings(semantic=0.1))
        adam.zero_grad()
        loss.backward()
        adam.step()
    return torch.sigmoid(opacity.detach() + 0.8).reshape(grid.shape)


def test_a_second_pose_removes_the_duplicate_that_one_view_leaves():
    scene = panel()
    front = see(scene, (0.0, 0.0, 1.0), 0.0)
    side = see(scene, (6.4, -4.0, 1.0), math.pi / 2)
    alone, both = fit([front]), fit([front, side])
    behind = slice(2, None)  # the panel fills the first voxel; the second touches it
    assert float(alone[0].min()) > 0.5 and float(both[0].min()) > 0.5
    single, twice = int((alone[behind] > 0.5).sum()), int((both[behind] > 0.5).sum())
    assert single > 0 and twice == 0, (single, twice)


# RayIoU ----------------------------------------------------------------------------------------------------------------------------------


def test_rays_are_sparseoccs():
    rays = lidar_rays()
    pitches = sorted({round(math.asin(float(z)), 6) for z in rays[:, 2]})
    assert len(rays) == 360 * len(pitches)
    assert pitches[0] == pytest.approx(-math.pi / 4, abs=1e-5) and pitches[9] == pytest.approx(-(math.pi / 2 - math.atan(10)), abs=1e-5)
    assert pitches[-2] < 0.21 <= pitches[-1]
    assert pitches[-1] - pitches[-2] == pytest.approx(math.atan(10) - math.atan(9), abs=1e-5)
    torch.testing.assert_close(rays.norm(dim=1), torch.ones(len(rays)))


def test_a_ray_meets_the_first_voxel_at_its_face():
    grid = VoxelGrid((0.0, 0.0, 0.0), 0.5, (10, 4, 4))
    labels = torch.full(grid.shape, 3)
    labels[6, 1, 1], labels[8, 1, 1] = 1, 2
    label, at = cast(labels, grid, torch.tensor([0.1, 0.7, 0.7]), torch.tensor([[1.0, 0, 0], [-1.0, 0, 0]]), 3)
    assert label.tolist() == [1, 3] and float(at[0]) == pytest.approx(2.9) and math.isinf(float(at[1]))
    # from outside, and from behind
    label, at = cast(labels, grid, torch.tensor([9.0, 0.7, 0.7]), torch.tensor([[-1.0, 0, 0]]), 3)
    assert label.tolist() == [2] and float(at[0]) == pytest.approx(4.5)


def test_casting_agrees_with_small_steps_along_the_ray():
    grid = VoxelGrid((-2.0, -2.0, -1.0), 0.5, (8, 8, 4))
    g = torch.Generator().manual_seed(0)
    labels = torch.where(torch.rand(grid.shape, generator=g) < 0.1, 1, 5)
    rays = torch.nn.functional.normalize(torch.randn(200, 3, generator=g), dim=1)
    label, at = cast(labels, grid, torch.tensor([0.13, 0.21, 0.02]), rays, 5)
    steps = torch.arange(0, 6, 0.002, dtype=torch.float64)
    for ray, own, distance in zip(rays.double(), label, at, strict=True):
        start = torch.tensor([0.13, 0.21, 0.02], dtype=torch.float64)
        flat, inside = grid.index(start + steps.unsqueeze(1) * ray)
        met = (labels.reshape(-1)[flat] != 5) & inside
        first = float(steps[met.nonzero()[0, 0]]) if met.any() else math.inf
        assert float(distance) <= first + 1e-9  # steps of 2 mm may pass over a corner, never see one that is not there
        if int(own) != 5:
            entered = grid.index((start + (distance + 1e-6) * ray).unsqueeze(0))
            assert bool(entered[1]) and int(labels.reshape(-1)[entered[0]]) == int(own)


def test_ray_iou_of_the_truth_with_itself_is_one():
    truth = occupancy(random_scene(0))
    scores = ray_iou(truth, truth, SMALL_GRID, FREE, torch.tensor([[0.0, 0.0, 1.5], [1.0, 0.0, 1.5]]), lidar_rays(60))
    assert scores == {"rayiou": 1.0, "rayiou_1": 1.0, "rayiou_2": 1.0, "rayiou_4": 1.0}


def test_a_wall_moved_back_four_voxels_is_wrong_within_a_metre_and_right_within_two():
    grid = VoxelGrid((0.0, -4.0, -1.0), 0.4, (20, 20, 8))
    truth, moved = torch.full(grid.shape, FREE), torch.full(grid.shape, FREE)
    truth[10], moved[14] = 15, 15
    origins = torch.tensor([[0.1, y, 0.3] for y in (-3.1, -0.7, 1.3)])
    scores = ray_iou(moved, truth, grid, FREE, origins, torch.tensor([[1.0, 0.0, 0.0]]))
    assert (scores["rayiou_1"], scores["rayiou_2"], scores["rayiou_4"]) == (0.0, 1.0, 1.0)


def test_another_class_is_wrong_and_rays_into_free_truth_do_not_count():
    grid = VoxelGrid((0.0, -4.0, -1.0), 0.4, (20, 20, 8))
    truth, other, empty = (torch.full(grid.shape, FREE) for _ in range(3))
    truth[10, :, :4], other[10] = 15, 15
    ray, origins = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.1, 0.1, -0.5], [0.1, 0.1, 1.5]])
    assert ray_iou(other, truth, grid, FREE, origins, ray)["rayiou"] == 1.0  # the upper ray meets nothing in truth
    assert ray_iou(empty, truth, grid, FREE, origins, ray)["rayiou"] == 0.0
    other[10] = 16
    assert ray_iou(other, truth, grid, FREE, origins, ray)["rayiou"] == 0.0
    with pytest.raises(SpecError, match="labels to"):
        RayIoU(grid, FREE).add(truth + 5, truth, origins, ray)


# scenes ----------------------------------------------------------------------------------------------------------------------------------


def test_labelled_depths_lie_on_occupied_voxels():
    scene = random_scene(5)
    now = frame(scene)
    truth = occupancy(scene).reshape(-1)
    near, checked = 0, 0
    for camera, depth, labels in zip(now.cameras(), now.depth, now.labels, strict=True):
        rays = torch.cat([camera.pixels(), torch.ones(len(depth), 1)], -1) @ torch.linalg.inv(camera.intrinsics).T
        to_vehicle = invert(camera.world_to_camera)
        points = (rays * (depth + 0.05).unsqueeze(1)) @ to_vehicle[:3, :3].T + to_vehicle[:3, 3]  # a little inside the surface
        flat, inside = SMALL_GRID.index(points)
        known = inside & (depth > 0)
        near += int((truth[flat[known]] != FREE).sum())
        checked += int(known.sum())
        assert set(labels[depth == 0].tolist()) <= {IGNORED}
    # a surface voxel that its box fills to less than a quarter is free
    assert checked > 500 and near / checked > 0.85


def test_scenes_are_the_same_for_a_seed_and_the_vehicle_moves():
    a, b = frame(random_scene(7)), frame(random_scene(7))
    assert torch.equal(a.images, b.images) and torch.equal(a.depth, b.depth)
    later = frame(random_scene(7), 1.0)
    assert not torch.equal(a.pose, later.pose) and not torch.equal(a.depth, later.depth)


def test_sparse_labels_are_a_share_of_all():
    now = frame(random_scene(8))
    few = sparse(now, 0.2, seed=0)
    share = float((few.depth > 0).sum() / (now.depth > 0).sum())
    assert 0.17 < share < 0.23 and torch.equal(few.depth[few.depth > 0], now.depth[few.depth > 0])
    assert torch.equal(few.depth, sparse(now, 0.2, seed=0).depth)
