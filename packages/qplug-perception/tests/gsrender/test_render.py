"""The rasterizer: what one Gaussian looks like, laws, gradients, and the slow reference."""

import pytest
import torch
from qcore.errors import SpecError
from qplug_perception.gsrender.gaussians import Attributes, Gaussians
from qplug_perception.gsrender.geometry import OCC3D, Camera, VoxelGrid, invert, looking, transform, yaw_pose
from qplug_perception.gsrender.render import render
from qplug_perception.gsrender.render_reference import render_reference


def camera(height: int = 9, width: int = 13, focal: float = 10.0, dtype=torch.float64) -> Camera:
    k = torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]], dtype=dtype)
    return Camera(k, torch.eye(4, dtype=dtype), (height, width))


def some(n: int = 12, seed: int = 0, classes: int = 4, turned: bool = False) -> Gaussians:
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    means = torch.stack([draw(n), 0.7 * draw(n), 3 + 2 * torch.rand(n, generator=g, dtype=torch.float64)], -1)
    rotations = torch.linalg.qr(draw(n, 3, 3))[0] if turned else None
    return Gaussians(means, 0.2 + 0.3 * draw(n, 3).abs(), torch.sigmoid(draw(n)), draw(n, classes), rotations)


def test_one_gaussian_on_the_optical_axis_renders_its_own_depth_and_class():
    one = Gaussians(torch.tensor([[0.0, 0.0, 4.0]]), torch.full((1, 3), 0.2), torch.tensor([0.8]), torch.tensor([[0.0, 5.0, 0.0]]))
    seen = render(one, camera(dtype=torch.float32))
    middle = 4 * 13 + 6  # row 4, column 6: the pixel whose centre is the principal point
    assert float(seen.mean_depth[middle]) == pytest.approx(4.0, abs=1e-6)
    assert float(seen.depth[middle]) == pytest.approx(0.8 * 4.0, rel=1e-6)
    assert int(seen.features[:, middle].argmax()) == 1
    assert float(seen.alpha[middle]) == pytest.approx(0.8, rel=1e-6)


def test_behind_the_camera_nothing_is_seen():
    behind = Gaussians(torch.tensor([[0.0, 0.0, -4.0]]), torch.full((1, 3), 0.2), torch.ones(1), torch.ones(1, 2))
    seen = render(behind, camera(dtype=torch.float32))
    assert float(seen.alpha.max()) == 0 and float(seen.mean_depth.max()) == 0 and seen.features.shape == (2, 117)


@pytest.mark.parametrize("turned", [False, True], ids=["round", "turned"])
def test_it_is_the_slow_reference(turned):
    scene, view = some(turned=turned), camera()
    fast, slow = render(scene, view), render_reference(scene, view)
    for name in ("features", "depth", "alpha"):
        torch.testing.assert_close(getattr(fast, name), getattr(slow, name), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tile", [1, 4, 5, 64])
def test_tiles_change_nothing(tile):
    scene, view = some(30), camera(14, 17)
    whole, tiled = render(scene, view), render(scene, view, tile=tile)
    for name in ("features", "depth", "alpha"):
        torch.testing.assert_close(getattr(tiled, name), getattr(whole, name), rtol=1e-12, atol=1e-14)


def test_the_order_in_which_gaussians_are_given_does_not_matter():
    scene, view = some(20), camera()
    # equal depths too: a wall of voxels before a camera has them
    scene = Gaussians(torch.cat([scene.means[:, :2], scene.means[:, 2:].round()], -1), scene.scales, scene.opacity, scene.semantics)
    mixed = scene.kept(torch.randperm(20, generator=torch.Generator().manual_seed(1)))
    a, b = render(scene, view), render(mixed, view)
    torch.testing.assert_close(a.features, b.features, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(a.depth, b.depth, rtol=1e-12, atol=1e-14)


def test_weights_never_exceed_one_and_an_opaque_front_hides_what_is_behind():
    assert float(render(some(40), camera()).alpha.max()) <= 1 + 1e-12
    means = torch.tensor([[0.0, 0.0, 3.0], [0.0, 0.0, 5.0]])
    two = Gaussians(means, torch.full((2, 3), 0.2), torch.ones(2), torch.eye(2))
    seen = render(two, camera(dtype=torch.float32))
    middle = 4 * 13 + 6
    assert float(seen.depth[middle]) == pytest.approx(3.0) and seen.features[:, middle].tolist() == pytest.approx([1.0, 0.0])


def test_chosen_pixels_are_those_of_the_whole_image():
    scene, view = some(), camera()
    chosen = torch.tensor([3, 50, 77])
    part = render(scene, view, pixels=view.pixels()[chosen])
    torch.testing.assert_close(part.features, render(scene, view).features[:, chosen])


@pytest.mark.parametrize("turned", [False, True], ids=["round", "turned"])
def test_gradients_are_those_of_finite_differences(turned):
    scene, view = some(4, seed=3, classes=2, turned=turned), camera(3, 4, 4.0)
    leaves = [t.clone().requires_grad_() for t in (scene.means, scene.scales, scene.opacity, scene.semantics)]

    def seen(means, scales, opacity, semantics):
        out = render(Gaussians(means, scales, opacity, semantics, scene.rotations), view)
        return out.features, out.depth, out.alpha

    assert torch.autograd.gradcheck(seen, leaves, eps=1e-7, atol=1e-5)


def test_half_precision_is_near_and_not_the_same():
    scene, view = some(20), camera()
    full, half = render(scene, view), render(scene, view, precision="float16")
    gap = float((full.features - half.features).abs().max())
    # 20 weights and features, each rounded to 11 bits
    assert 0 < gap < 20 * 2**-11 * 2 * float(scene.semantics.abs().max())


def test_moving_camera_and_scene_together_changes_nothing():
    scene, view = some(10), camera()
    turn = yaw_pose(0.7, (1.0, -2.0, 0.5)).double()
    moved = Gaussians(transform(turn, scene.means), scene.scales, scene.opacity, scene.semantics, turn[:3, :3].expand(10, 3, 3))
    other = Camera(view.intrinsics, invert(turn), view.size)
    torch.testing.assert_close(render(scene, view).features, render(moved, other).features, rtol=1e-5, atol=1e-6)


def test_a_camera_looks_where_it_is_said_to():
    pose = looking(0.0, (0.0, 0.0, 1.5))
    ahead = transform(invert(pose), torch.tensor([[10.0, 0.0, 1.5], [10.0, 1.0, 1.5], [10.0, 0.0, 2.5]]))
    # ahead; to the left is negative x; up is negative y
    torch.testing.assert_close(ahead, torch.tensor([[0.0, 0.0, 10.0], [-1.0, 0.0, 10.0], [0.0, -1.0, 10.0]]), atol=1e-5, rtol=0)


def test_a_zero_shift_is_the_voxels_centre_and_half_a_voxel():
    grid = VoxelGrid((0.0, 0.0, 0.0), 0.4, (2, 3, 2))
    zero = Attributes(torch.zeros(12, 3), torch.zeros(12, 3), torch.full((12, 1), 0.5), torch.zeros(12, 2))
    own = zero.gaussians(grid, reach=1.0)
    torch.testing.assert_close(own.means, grid.centres())
    torch.testing.assert_close(own.scales, torch.full((12, 3), 0.2))
    assert grid.index(grid.centres())[0].tolist() == list(range(12))
    ends = Attributes(torch.ones(12, 3), torch.zeros(12, 3), zero.opacity, zero.semantic).gaussians(grid, reach=1.0)
    torch.testing.assert_close(ends.means - grid.centres(), torch.full((12, 3), 0.2))


def test_rows_and_back():
    rows = torch.randn(5, 24)
    assert torch.equal(Attributes.from_rows(rows).rows(), rows)


def test_the_grid_of_occ3d():
    assert OCC3D.count == 640_000 and OCC3D.high == pytest.approx((40.0, 40.0, 5.4))


def test_tiles_and_pixels_exclude_one_another():
    with pytest.raises(SpecError, match="whole image"):
        render(some(), camera(), tile=4, pixels=torch.zeros(1, 2))
