"""The voxel tracker: voxels, masked convolutions, the flow, tracks, and the whole path through qcore."""

import json
from dataclasses import replace

import pytest
import torch
from qcore.cli import main
from qcore.errors import CalibrationError, CheckpointError, NotFound, SpecError
from qcore.model import load_source
from qcore.model.reader import materialize
from qcore.plugins import load_registry
from qcore.testing import check_adapter, check_source, check_task
from qcore.testing.models import randomize
from qplug_perception.mvctrack.adapter import MVCTrackAdapter
from qplug_perception.mvctrack.boxes import inside, precision, shifted, to_box_frame
from qplug_perception.mvctrack.data import Sequences, TrackingData, TrackingTask, training_pair
from qplug_perception.mvctrack.flow import RealNVP, residual_log_likelihood
from qplug_perception.mvctrack.sequences import made_sequence
from qplug_perception.mvctrack.source import MVCTrackSource
from qplug_perception.mvctrack.tracker import MaskedConv, MVCTracker, TrackerConfig, TrackingLoss, deviations, pair_batch, track
from qplug_perception.mvctrack.virtual_points import MVCPSettings
from qplug_perception.mvctrack.voxels import CAR, LARGE, PEDESTRIAN, CropGrid, crop, voxelize

TINY = TrackerConfig(voxel=(0.6, 0.6, 0.75), width=4, head=8)


@pytest.fixture(scope="module")
def tiny() -> MVCTracker:
    torch.manual_seed(0)
    return randomize(MVCTracker(TINY)).eval()


@pytest.fixture(scope="module")
def sequence():
    return Sequences(TINY, 0, frames=3).read(1)[0]


def test_the_crops_are_the_releases():
    assert CAR.shape[1:] == (128, 128) and PEDESTRIAN.shape[1:] == (128, 128) and LARGE.shape[1:] == (128, 128)
    assert CAR.shape[0] == LARGE.shape[0] == 20
    assert CropGrid((1.0, 1.0, 1.0), (0.3, 0.4, 2.0)).shape == (1, 5, 7)


def test_a_voxel_holds_the_mean_of_all_its_points():
    grid = CropGrid((1.0, 1.0, 1.0), (0.5, 0.5, 1.0))
    points = torch.tensor([[-0.9, -0.9, -0.5, 1.0], [-0.6, -0.7, -0.1, 3.0], [0.9, 0.2, 0.5, 5.0]])
    mean, mask = voxelize(points, grid)
    assert mean.shape == (4, 2, 4, 4) and int(mask.sum()) == 2
    torch.testing.assert_close(mean[:, 0, 0, 0], points[:2].mean(0))
    torch.testing.assert_close(mean[:, 1, 2, 3], points[2])
    # the order of points does not matter, and nothing is lost
    assert torch.equal(voxelize(points.flip(0), grid)[1], mask)
    many = torch.rand(500, 3) * 2 - 1
    cells = ((many + 1) / torch.tensor(grid.voxel)).floor().unique(dim=0)
    assert int(voxelize(many, grid)[1].sum()) == len(cells)


def test_a_crop_is_in_the_boxs_frame_and_never_empty():
    box = torch.tensor([10.0, 5.0, 0.0, 2, 4, 1.5, 0.8])
    near = shifted(box, torch.tensor([1.0, 0.5, 0.2]))[:3]
    own = crop(torch.stack([near, torch.tensor([50.0, 0, 0])]), box, CAR)
    torch.testing.assert_close(own, torch.tensor([[1.0, 0.5, 0.2]]), atol=1e-5, rtol=1e-5)
    assert crop(torch.tensor([[50.0, 0, 0]]), box, CAR).tolist() == [[0.0, 0.0, 0.0]]


def test_a_masked_convolution_is_the_sum_over_occupied_voxels_alone():
    torch.manual_seed(0)
    layer = randomize(MaskedConv(2, 3)).double().eval()
    mask = (torch.rand(1, 1, 4, 5, 6) < 0.3).double()
    x = torch.randn(1, 2, 4, 5, 6, dtype=torch.float64) * mask
    with torch.no_grad():
        y, after = layer(x, mask)
    assert torch.equal(after, mask) and float((y * (1 - mask)).abs().max()) == 0
    layer.requires_grad_(False)
    conv, norm = layer.layer[0], layer.layer[1]
    where = mask[0, 0].nonzero()
    for at in where[:: max(1, len(where) // 8)]:
        total = torch.zeros(3, dtype=torch.float64)
        for other in where:
            away = other - at + 1
            if ((away >= 0) & (away <= 2)).all():
                total += conv.weight[:, :, away[0], away[1], away[2]] @ x[0, :, other[0], other[1], other[2]]
        expected = torch.relu((total - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias)
        torch.testing.assert_close(y[0, :, at[0], at[1], at[2]], expected)


def test_batch_norms_in_training_see_occupied_voxels_alone():
    torch.manual_seed(0)
    layer = MaskedConv(2, 3).train()
    mask = (torch.rand(1, 1, 4, 5, 6) < 0.3).float()
    x = torch.randn(1, 2, 4, 5, 6) * mask
    y, _ = layer(x, mask)
    rows = layer.layer[0](x).movedim(1, -1)[mask.squeeze(1) > 0]
    torch.testing.assert_close(layer.layer[1].running_mean, 0.1 * rows.mean(0))
    normal = torch.relu((rows - rows.mean(0)) / (rows.var(0, unbiased=False) + 1e-5).sqrt())
    torch.testing.assert_close(y.movedim(1, -1)[mask.squeeze(1) > 0], normal, rtol=1e-4, atol=1e-5)


def test_a_stride_occupies_what_its_kernel_touches():
    layer = MaskedConv(1, 1, stride=2).eval()
    mask = torch.zeros(1, 1, 4, 8, 8)
    mask[0, 0, 0, 4, 4] = 1
    _, after = layer(mask, mask)
    # of a kernel of 3 with stride 2, voxel 4 is touched by output 2 alone
    assert after.shape == (1, 1, 2, 4, 4) and after.nonzero().tolist() == [[0, 0, 0, 2, 2]]


def test_the_flow_is_invertible_and_its_density_is_that_of_its_map():
    torch.manual_seed(0)
    flow = RealNVP(hidden=16).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    z, log_det = flow.to_base(x)
    torch.testing.assert_close(flow.from_base(z), x)
    for i in range(5):
        jacobian = torch.autograd.functional.jacobian(lambda v: flow.to_base(v.unsqueeze(0))[0].squeeze(0), x[i])
        torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], log_det[i])
    # it integrates to one
    g = torch.linspace(-7, 7, 57, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(g, g, g, indexing="ij"), -1).reshape(-1, 3)
    with torch.no_grad():
        assert float(flow.log_density(grid).exp().sum() * 0.25**3) == pytest.approx(1.0, abs=0.02)


def test_the_likelihood_of_a_better_guess_is_larger():
    torch.manual_seed(0)
    flow, truth = RealNVP(), torch.zeros(4, 3)
    sigma = torch.full((4, 3), 0.5)
    with torch.no_grad():
        far, near = (float(residual_log_likelihood(truth + d, sigma, truth, flow)) for d in (2.0, 0.1))
    assert near < far
    assert float(deviations(torch.tensor([-1e9]))) > 0


def test_a_few_steps_of_training_lower_the_loss(sequence):
    torch.manual_seed(0)
    model, loss_of = MVCTracker(TINY).train(), TrackingLoss()
    clouds, boxes = sequence
    g = torch.Generator().manual_seed(0)
    pairs, truth = zip(*(training_pair(clouds, boxes, 1 + i % 2, g, exact=i == 0) for i in range(8)), strict=True)
    batch, truth = pair_batch(pairs, TINY), torch.stack(truth)
    adam = torch.optim.Adam([*model.parameters(), *loss_of.parameters()], lr=3e-3)
    losses = []
    for _ in range(25):
        loss = loss_of(model(batch), truth)
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < sum(losses[:5]) - 1


def test_links_of_the_tracker_are_true(tiny, sequence):
    clouds, boxes = sequence
    check_adapter(MVCTrackAdapter(), tiny, pair_batch([(clouds[0], clouds[1], boxes[0]), (clouds[1], clouds[2], boxes[1])], TINY))


def test_a_perfect_forward_tracks_perfectly(sequence):
    clouds, boxes = sequence
    step = iter(range(1, 3))

    def oracle(batch):
        t = next(step)
        return torch.cat([to_box_frame(boxes[t, :3].unsqueeze(0), boxes[t - 1]), torch.zeros(1, 3)], 1)

    torch.testing.assert_close(track(oracle, clouds, boxes[0], TINY), boxes, rtol=1e-5, atol=1e-5)


def test_the_true_displacement_is_in_the_frame_of_the_box_it_starts_from(sequence):
    clouds, boxes = sequence
    (_, _, box), delta = training_pair(clouds, boxes, 1, torch.Generator().manual_seed(3), exact=False)
    torch.testing.assert_close(shifted(box, delta)[:3], boxes[1, :3], rtol=1e-4, atol=1e-4)
    assert 0 < float((box - boxes[0]).abs().max()) <= 0.3
    assert torch.equal(training_pair(clouds, boxes, 1, torch.Generator(), exact=True)[0][2], boxes[0])


def test_made_sequences_have_points_on_the_object_and_masks_of_it():
    first = made_sequence(3, frames=2)
    again = made_sequence(3, frames=2)
    assert torch.equal(first[1].points, again[1].points)
    assert int(inside(first[0].points[:, :3], first[0].box, 0.1).sum()) > 5
    assert int(first[0].views[0].masks.sum()) > 20
    assert not torch.equal(first[0].box, first[1].box)


def test_the_task_knows_a_tracker_from_a_noisy_one(tiny, sequence):
    scores = check_task(TrackingTask((sequence,), TINY), tiny)
    assert scores["drift"] == 0 and scores["success"] == scores["success_reference"]


def test_points_of_fifteen_features():
    config = replace(TINY, features=15)
    clouds, boxes = Sequences(config, 0, frames=2, virtual=MVCPSettings(fixed=30)).read(1)[0]
    assert clouds[0].shape[1] == 15
    with torch.no_grad():
        out = MVCTracker(config).eval()(pair_batch([(clouds[0], clouds[1], boxes[0])], config))
    assert out.shape == (1, 6)
    with pytest.raises(SpecError, match="reads 15"):
        pair_batch([(clouds[0][:, :3], clouds[1], boxes[0])], config)


def test_the_source_and_what_it_refuses(tmp_path):
    check_source(MVCTrackSource(), "mvctrack:random:2")
    with pytest.raises(NotFound, match="mvctrack:random"):
        MVCTrackSource().load("mvctrack:huge")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "mvctrack", "config": {"depth": 3}}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="'depth'"):
        MVCTrackSource().load(str(tmp_path))
    with pytest.raises(CalibrationError, match="made-up"):
        TrackingData.made(TINY).chosen(tmp_path, None)


def test_the_whole_path(tiny, tmp_path, monkeypatch):
    from qplug_perception.mvctrack import data
    from safetensors.torch import save_file

    monkeypatch.setattr(data, "EVALUATED", 2)
    folder = tmp_path / "net"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architecture": "mvctrack", "config": TINY.to_dict()}))
    save_file({k: v.contiguous() for k, v in tiny.state_dict().items()}, folder / "model.safetensors")
    out = tmp_path / "out"
    options = ["--recipe", "mvctrack-w8a8", "--set", "calibration.samples=14", "--set", "calibration.batch=7"]
    assert main(["quantize", str(folder), *options, "-o", str(out)]) == 0
    scores = json.loads((out / "report.json").read_text())["quality"]["scores"]
    assert scores["step_db"] > 15 and scores["frames"] == 14
    assert main(["verify", str(out), "--json"]) == 0


def test_the_shipped_tracker_beats_a_box_that_never_moves():
    loaded = load_source("mvctrack:tiny", load_registry().sources)
    materialize(loaded.model, "", loaded.reader, loaded.dtype)
    model, config = loaded.model.eval(), loaded.model.config
    moves, stays = [], []
    for clouds, boxes in loaded.data.evaluation.read(4):
        own = track(model, clouds, boxes[0], config)
        moves += (own[1:, :3] - boxes[1:, :3]).norm(dim=1).tolist()
        stays += (boxes[:1, :3] - boxes[1:, :3]).norm(dim=1).tolist()
    assert precision(moves) > precision(stays) + 10
