"""PETR's position encoder against the release's formulas spelled out, and the laws of QFPE."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qcore.errors import SpecError
from qplug_perception.petr.position import (
    PETREmbedding,
    image_to_lidar,
    inverse_sigmoid,
    lid_depths,
    pixel_points,
    sine_of_places,
    sine_of_points,
)
from qplug_perception.petr.qfpe import QFPE, AnchorEmbedding
from qplug_perception.petr.scenes import rig

RANGE = (-61.2, -61.2, -10.0, 61.2, 61.2, 10.0)
GRID, IMAGE = (3, 5), (48, 80)


def matrices(samples: int = 1) -> torch.Tensor:
    return rig(*IMAGE).double().expand(samples, -1, -1, -1).contiguous()


def test_depths_grow_linearly_from_the_first_and_stop_short_of_the_end():
    d = lid_depths(64, 1.0, 61.2)
    assert d[0] == 1 and len(d) == 64
    steps = d.diff()
    torch.testing.assert_close(steps.diff(), torch.full((62,), 2 * 60.2 / (64 * 65), dtype=torch.float64))
    assert d[-1].item() == pytest.approx(1 + 63 * 64 * 60.2 / (64 * 65))


def test_points_are_seen_where_they_come_from():
    depths = lid_depths(4, 1.0, 61.2)
    lidar2img = matrices(2)
    points = pixel_points(lidar2img, GRID, IMAGE, depths)
    seen = torch.einsum("bnij,bnhwdj->bnhwdi", lidar2img, torch.cat([points, torch.ones_like(points[..., :1])], -1))
    u = torch.arange(5).double() * 16
    v = torch.arange(3).double() * 16
    torch.testing.assert_close(seen[..., 2], depths.expand_as(seen[..., 2]))
    torch.testing.assert_close(seen[..., 0] / seen[..., 2], u[None, None, None, :, None].expand_as(seen[..., 0]))
    torch.testing.assert_close(seen[..., 1] / seen[..., 2], v[None, None, :, None, None].expand_as(seen[..., 1]))


def test_the_encoder_reads_what_the_release_computes():
    """One pixel at a time, one depth at a time, as its code says."""
    encoder, lidar2img = PETREmbedding(16, 6, 1.0, RANGE).double(), matrices()
    found, outside = encoder.coordinates(lidar2img, GRID, IMAGE)
    assert found.shape == (1, 6, 18, *GRID) and outside.shape == (1, 6, *GRID)
    for n, h, w in ((0, 0, 0), (3, 2, 4), (5, 1, 2)):
        inverse, out = torch.linalg.inv(lidar2img[0, n]), 0
        for i in range(6):
            d = 1 + i * (i + 1) * (61.2 - 1) / (6 * 7)
            point = inverse @ torch.tensor([w * 80 / 5 * d, h * 48 / 3 * d, d, 1.0], dtype=torch.float64)
            for axis in range(3):
                share = (float(point[axis]) - RANGE[axis]) / (RANGE[axis + 3] - RANGE[axis])
                out += share > 1 or share < 0
                x = min(max(share, 0.0), 1.0)
                assert found[0, n, 3 * i + axis, h, w].item() == pytest.approx(math.log(max(x, 1e-5) / max(1 - x, 1e-5)), abs=1e-9)
        assert bool(outside[0, n, h, w]) == (out > 3)


def test_inverse_sigmoid_is_bounded_and_inverts():
    x = torch.linspace(-3, 3, 101, dtype=torch.float64)
    torch.testing.assert_close(inverse_sigmoid(x.sigmoid()), x)
    assert inverse_sigmoid(torch.tensor([-1e9, 1e9], dtype=torch.float64)).abs().max().item() == pytest.approx(math.log(1e5), rel=1e-9)


def test_a_matrix_without_an_inverse_is_an_error():
    with pytest.raises(SpecError, match="singular"):
        image_to_lidar(torch.zeros(1, 1, 4, 4))
    with pytest.raises(SpecError, match="4 × 4"):
        image_to_lidar(torch.eye(3).expand(1, 1, 3, 3))


def test_sine_features_say_camera_row_and_column():
    mask = torch.zeros(1, 2, 3, 4, dtype=torch.bool)
    mask[0, 1, :, 3] = True  # the last column of the second camera is padding
    found = sine_of_places(mask, 8)
    assert found.shape == (1, 2, 24, 3, 4)
    # the third of three columns counts 3 of 3 where one is padding, 3 of 4 where none is
    for camera, share in ((0, 3 / 4), (1, 1.0)):
        assert found[0, camera, 16, 0, 2].item() == pytest.approx(math.sin(2 * math.pi * share), abs=1e-4)
        assert found[0, camera, 17, 0, 2].item() == pytest.approx(math.cos(2 * math.pi * share), abs=1e-4)


def test_sine_features_of_points_begin_with_y():
    found = sine_of_points(torch.tensor([[0.1, 0.2, 0.3]]), 4)
    wanted = [math.sin(2 * math.pi * 0.2), math.cos(2 * math.pi * 0.2), math.sin(2 * math.pi * 0.2 / 100), math.cos(2 * math.pi * 0.2 / 100)]
    torch.testing.assert_close(found[0, :4], torch.tensor(wanted))
    assert found[0, 4].item() == pytest.approx(math.sin(2 * math.pi * 0.1), abs=1e-6)


# QFPE ------------------------------------------------------------------------------------------------------------------------------------


def anchors(channels: int = 5, count: int = 3) -> AnchorEmbedding:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return AnchorEmbedding.uniform(RANGE, count, channels).double()


@settings(deadline=None, max_examples=60)
@given(point=st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=3), count=st.integers(2, 5))
def test_embeddings_are_no_larger_than_the_largest_vector(point, count):
    own = anchors(count=count)
    e = own(torch.tensor([point], dtype=torch.float64)).view(3, -1)
    for axis in range(3):
        v = own.vectors[axis].detach()
        assert (e[axis] <= v.amax(0) + 1e-12).all() and (e[axis] >= v.amin(0) - 1e-12).all()  # one rounding of the interpolation


def test_at_an_anchor_stands_its_vector_from_both_sides():
    own = anchors()
    for i in range(3):
        at = own.locations[:, i]
        wanted = own.vectors[:, i].flatten()
        for nudge in (-1e-9, 0.0, 1e-9):
            torch.testing.assert_close(own((at + nudge)[None])[0], wanted, rtol=0, atol=1e-8)


def test_between_anchors_it_is_the_formula():
    own, p = anchors(), torch.tensor([[-20.0, 30.0, 4.0]], dtype=torch.float64)
    for axis, (low, high, i) in enumerate(((-61.2, 0.0, 0), (0.0, 61.2, 1), (0.0, 10.0, 1))):
        x, v = float(p[0, axis]), own.vectors[axis]
        wanted = ((x - low) * v[i + 1] + (high - x) * v[i]) / (high - low)
        torch.testing.assert_close(own(p)[0, 5 * axis : 5 * axis + 5], wanted)


def test_gradients_reach_the_two_anchors_around_a_point_and_no_other():
    own = anchors(count=4)
    own(torch.tensor([[-50.0, 0.0, 1e6]], dtype=torch.float64)).sum().backward()
    touched = (own.vectors.grad != 0).any(-1)
    # x lies between the first two, y between the middle ones, z beyond the last one, which it takes whole
    assert touched.tolist() == [[True, True, False, False], [False, True, True, False], [False, False, False, True]]


def test_it_drops_in_for_the_position_encoder():
    one, other = PETREmbedding(16, 6, 1.0, RANGE), QFPE(16, 30.0, 3, 8, RANGE)
    lidar2img = matrices(2).float()
    a, b = one(lidar2img, GRID, IMAGE), other(lidar2img, GRID, IMAGE)
    assert a.shape == b.shape == (2, 6, 16, *GRID)
    masks = [e.coordinates(lidar2img, GRID, IMAGE)[1] for e in (one, other)]
    assert masks[0].shape == masks[1].shape and all(m.dtype is torch.bool for m in masks)


def test_it_looks_at_one_point_a_pixel_thirty_metres_away():
    points = pixel_points(matrices(), GRID, IMAGE, QFPE(16, 30.0, 3, 8, RANGE).depths).squeeze(-2)
    depth = torch.einsum("bnj,bnhwj->bnhw", matrices()[:, :, 2, :3], points) + matrices()[:, :, 2, 3, None, None]
    torch.testing.assert_close(depth, torch.full_like(depth, 30.0))


def test_anchors_must_rise():
    with pytest.raises(SpecError, match="rising"):
        AnchorEmbedding(torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]), 4)
