"""The occupancy network through qcore: adapter, source, task, formats, compression, sweep, the whole path."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from qcore.checkpoint import load
from qcore.cli import main
from qcore.errors import CalibrationError, CheckpointError, NotFound, SpecError
from qcore.model import load_source
from qcore.model.reader import materialize
from qcore.model.topology import Invariance, Site
from qcore.plugins import load_registry
from qcore.recipe_file import load_recipe
from qcore.testing import check_adapter, check_format, check_observer, check_source, check_task
from qcore.testing.models import randomize
from qplug_perception.gsrender.adapter import GSRenderAdapter
from qplug_perception.gsrender.compress import Compression, compress, float_bytes, read_set
from qplug_perception.gsrender.data import OccupancyTask, SceneData, batch_of, made_sample, read_samples, write_samples
from qplug_perception.gsrender.formats import KnownRange, TwoRegion
from qplug_perception.gsrender.fusion import warp_volume
from qplug_perception.gsrender.gaussians import ATTRIBUTES, Attributes
from qplug_perception.gsrender.geometry import FREE, VoxelGrid, yaw_pose
from qplug_perception.gsrender.metrics import RayIoU, lidar_rays
from qplug_perception.gsrender.model import OccupancyConfig, OccupancyNet
from qplug_perception.gsrender.source import GSRenderSource
from qplug_perception.gsrender.sweep import sweep, table

TINY = OccupancyConfig(voxel=1.6, shape=(10, 10, 2), size=(16, 24), width=8, bins=8, step=1.0, threshold=0.25)


@pytest.fixture(scope="module")
def tiny() -> OccupancyNet:
    torch.manual_seed(0)
    return randomize(OccupancyNet(TINY)).eval()


@pytest.fixture(scope="module")
def samples():
    return tuple(made_sample(seed, TINY) for seed in range(3))


@pytest.fixture(scope="module")
def attributes(tiny, samples) -> Attributes:
    with torch.no_grad():
        return Attributes.from_rows(tiny(batch_of(samples))[0])


def test_links_of_the_network_are_true(tiny, samples):
    check_adapter(GSRenderAdapter(), tiny, batch_of(samples[:1]))


def test_a_network_that_fuses_the_frame_before_is_told_truly_too(samples):
    torch.manual_seed(0)
    model = randomize(OccupancyNet(replace(TINY, fuse=True))).eval()
    check_adapter(GSRenderAdapter(), model, batch_of(samples[:1], before=True))
    with pytest.raises(SpecError, match="before=True"), torch.no_grad():
        model(batch_of(samples[:1]))


def test_the_hook_points_are_the_four_attributes(tiny):
    topology = GSRenderAdapter().topology(tiny)
    assert [str(s) for s in topology.activations] == [f"head.{a}:value" for a in ATTRIBUTES]
    assert {site.module for site in topology.sites} >= {"lift.depth", "encoder.0", "volume.0", "head.semantic.conv"}
    assert topology.links_with(Invariance.PERMUTE)


def test_warping_by_nothing_is_the_volume_and_by_a_voxel_shifts_it():
    grid = VoxelGrid((0.0, 0.0, 0.0), 0.5, (4, 3, 2))
    volume = torch.randn(1, 5, 4, 3, 2)
    torch.testing.assert_close(warp_volume(volume, grid, torch.eye(4).unsqueeze(0)), volume)
    ahead = warp_volume(volume, grid, yaw_pose(0.0, (0.5, 0.0, 0.0)).unsqueeze(0))
    torch.testing.assert_close(ahead[:, :, :3], volume[:, :, 1:])
    assert float(ahead[:, :, 3].abs().max()) == 0


# numbers of the attributes -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", [TwoRegion(8, 0.3), TwoRegion(4, 0.7), TwoRegion(2, 0.5), TwoRegion(6, 0.25, below=50)], ids=str)
def test_two_regions_are_a_number_format(fmt):
    check_format(fmt)


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("threshold", [0.1, 1 / 3, 0.5, 0.85])
def test_the_threshold_the_ends_and_the_steps_are_exact(bits, threshold):
    fmt = TwoRegion(bits, threshold)
    points = torch.tensor([0.0, threshold, 1.0])
    assert torch.equal(fmt.decode(fmt.encode(points)), points)
    values = fmt.decode(torch.arange(2**bits).to(torch.uint8)).double()
    steps = values.diff()
    n = fmt.steps_below
    torch.testing.assert_close(steps[:n], torch.full((n,), threshold / n, dtype=torch.float64), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(
        steps[n:], torch.full((len(steps) - n,), (1 - threshold) / (len(steps) - n), dtype=torch.float64), rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_what_is_above_the_threshold_stays_above_it(bits):
    x = torch.cat([torch.rand(10_000), torch.tensor([0.3]).nextafter(torch.tensor([1.0])), torch.tensor([0.3])])
    keep, nearest = TwoRegion(bits, 0.3, keep_side=True), TwoRegion(bits, 0.3)
    tau = torch.tensor(0.3)
    assert torch.equal(keep.decode(keep.encode(x)) > tau, x > tau)
    assert not torch.equal(nearest.decode(nearest.encode(x)) > tau, x > tau)
    step = (1 - 0.3) / (2**bits - 1 - keep.steps_below)
    assert float((keep.decode(keep.encode(x)) - x).abs().max()) <= max(step, 0.3 / keep.steps_below / 2) + 1e-6


@pytest.mark.parametrize("wrong", [{"bits": 1}, {"bits": 9}, {"bits": 4, "threshold": 1.0}, {"bits": 4, "below": 15}], ids=str)
def test_two_regions_that_cannot_be(wrong):
    with pytest.raises(SpecError):
        TwoRegion(**wrong)


def test_a_known_range_is_checked_by_what_is_seen():
    check_observer(KnownRange(low=-1e6, high=1e6))
    own = KnownRange(low=-1.0, high=1.0)
    own.update(torch.tensor([[0.2, -0.1]]))
    assert [float(end) for end in own.result()] == [-1.0, 1.0]
    own.update(torch.tensor([[1.5, 0.0]]))
    with pytest.raises(CalibrationError, match=r"1\.5.*known range"):
        own.result()


# compression ---------------------------------------------------------------------------------------------------------------------------------


def test_a_compressed_set_is_small_and_what_it_says(attributes, tmp_path):
    settings = Compression(prune=0.05, threshold=TINY.threshold, codebook=5)
    stored = compress(attributes, TINY.grid, TINY.reach, settings)
    kept = attributes.opacity.squeeze(1) >= 0.05
    n = int(kept.sum())
    assert len(stored) == n > 20
    assert stored.nbytes == 25 + n * (6 + 3 + 1 + 1) + 32 * 17 * 2 + 4 + 1  # mask, Gaussians, codebook, scale and zero point of δs
    assert stored.nbytes < float_bytes(attributes) / 3
    back = stored.attributes()
    assert float((back.delta_mu - attributes.delta_mu)[kept].abs().max()) <= 0.5 / 32767 + 1e-7
    assert torch.equal(back.opacity > TINY.threshold, attributes.opacity > TINY.threshold)
    assert float(back.opacity[~kept].max() if (~kept).any() else 0.0) == 0
    stored.save(tmp_path / "set.safetensors")
    again = read_set(tmp_path / "set.safetensors")
    assert torch.equal(again.attributes().rows(), back.rows()) and again.settings == settings and again.grid == TINY.grid
    assert len(stored.gaussians()) == n


def test_as_many_vectors_as_there_are_have_no_error(attributes):
    few = Attributes(*(t[:8].repeat(25, 1) for t in (attributes.delta_mu, attributes.delta_s, attributes.opacity, attributes.semantic)))
    stored = compress(few, TINY.grid, TINY.reach, Compression(prune=0.0, threshold=TINY.threshold, codebook=4))
    torch.testing.assert_close(stored.attributes().semantic, few.semantic, rtol=1e-3, atol=1e-3)  # the book is float16


def test_what_cannot_be_compressed_says_why(attributes, tmp_path):
    with pytest.raises(SpecError, match="prune < threshold"):
        Compression(prune=0.6, threshold=0.5)
    nothing = Attributes(attributes.delta_mu, attributes.delta_s, torch.zeros_like(attributes.opacity), attributes.semantic)
    with pytest.raises(SpecError, match="no Gaussian"):
        compress(nothing, TINY.grid, TINY.reach)
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="no compressed set"):
        read_set(tmp_path / "x.safetensors")


# data, task, source --------------------------------------------------------------------------------------------------------------------------


def test_the_task_tells_a_network_from_a_noisy_one(tiny, samples):
    scores = check_task(OccupancyTask(samples[:2], TINY, azimuths=30), tiny)
    assert scores["kl"] == 0 and scores["top1"] == 1 and scores["flips"] == 0
    assert scores["depth_l1"] == scores["depth_l1_reference"] and 0 <= scores["rayiou"] <= 1
    assert scores["opacity_db"] == float("inf")


def test_samples_and_back(samples, tmp_path):
    write_samples(tmp_path / "s.safetensors", samples)
    again = read_samples(tmp_path / "s.safetensors", TINY)
    assert torch.equal(again[1].truth, samples[1].truth)
    assert torch.equal(again[2].frames[0].images, samples[2].frames[0].images)
    assert len(again[0].views()) == 12 and sum(v.neighbour for v in again[0].views()) == 8
    data = SceneData.made(TINY).chosen(None, tmp_path / "s.safetensors")
    assert len(data.task().samples) == 3
    with pytest.raises(CalibrationError, match="same file"):
        SceneData.made(TINY).chosen(tmp_path / "s.safetensors", tmp_path / "s.safetensors")
    with pytest.raises(CalibrationError, match="of this network"):
        read_samples(tmp_path / "s.safetensors", OccupancyConfig())
    with pytest.raises(NotFound, match="does not exist"):
        read_samples(tmp_path / "t.safetensors", TINY)


def test_the_source(tmp_path):
    check_source(GSRenderSource(), "gsrender:random:3")
    with pytest.raises(NotFound, match="gsrender:random"):
        GSRenderSource().load("gsrender:huge")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "gsrender", "config": {"depth": 3}}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="'depth'"):
        GSRenderSource().load(str(tmp_path))


def write_network(folder: Path, model: OccupancyNet) -> Path:
    from safetensors.torch import save_file

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architecture": "gsrender", "config": model.config.to_dict()}))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    return folder


def test_the_whole_path(tiny, samples, tmp_path, capsys):
    folder = write_network(tmp_path / "net", tiny)
    write_samples(tmp_path / "eval.safetensors", samples[:1])
    options = ["--recipe", "gsrender-w8a8", "--set", "calibration.samples=4", "--eval", str(tmp_path / "eval.safetensors")]
    out = tmp_path / "out"
    # the recipe's threshold is that of gsrender:tiny, the network's 0.25
    assert main(["quantize", str(folder), *options, "-o", str(out)]) == 2
    said = capsys.readouterr()
    assert "this network's threshold is 0.25; set threshold = 0.25 in the format" in " ".join(said.err.split())
    assert "before any computing" in said.err and "block" not in said.err and not out.exists()
    assert main(["quantize", str(folder), *options, "-o", str(out), "--set", "rules.4.format.threshold=0.25"]) == 0
    scores = json.loads((out / "report.json").read_text())["quality"]["scores"]
    assert min(scores[f"{a}_db"] for a in ATTRIBUTES) > 15 and scores["rayiou_reference"] >= 0
    registry = load_registry()
    model = load(out, registry=registry)
    own = {name: m.spec for name, m in model.named_modules() if type(m).__name__ == "QuantizedTap"}
    assert [name.split(".taps")[0] for name in own] == [f"head.{a}" for a in ATTRIBUTES]
    with torch.no_grad():
        values = Attributes.from_rows(model(batch_of(samples[:1]))[0])
    assert len(values.opacity.unique()) <= 256 and len(values.delta_mu.unique()) <= 256
    steps = values.delta_mu.double() * 127
    assert float((steps - steps.round()).abs().max()) < 1e-4  # the known range, whatever calibration saw
    assert main(["verify", str(out), "--json"]) == 0


def test_a_sweep_puts_one_attribute_at_a_time_on_fewer_bits(tiny, samples, tmp_path):
    loaded = load_source(str(write_network(tmp_path / "net", tiny)), load_registry().sources)
    materialize(loaded.model, "", loaded.reader, loaded.dtype)
    task = OccupancyTask(samples[:1], TINY, azimuths=12, render_every=4)
    points = sweep(loaded.model.eval(), [batch_of(samples[1:])], task, tmp_path / "ref", (8, 3))
    assert [(p.attribute, p.bits) for p in points] == [("float", 0), *((a, b) for a in ATTRIBUTES for b in (8, 3))]
    for attribute in ATTRIBUTES:
        fine, coarse = (next(p.scores for p in points if (p.attribute, p.bits) == (attribute, b)) for b in (8, 3))
        assert coarse[f"{attribute}_db"] < fine[f"{attribute}_db"] < float("inf")
        assert all(fine[f"{other}_db"] == float("inf") for other in ATTRIBUTES if other != attribute)
    assert all(p.scores["flips"] == 0 for p in points if p.attribute == "opacity")  # no side is changed
    assert len(table(points)) == 10
    assert "taps" not in loaded.model.head.opacity._modules


def test_the_commands(tiny, tmp_path, capsys):
    folder = write_network(tmp_path / "net", tiny)
    assert main(["gsrender", "compress", str(folder), "-o", str(tmp_path / "set.safetensors")]) == 0
    assert "Gaussians" in capsys.readouterr().out
    assert len(read_set(tmp_path / "set.safetensors").attributes().opacity) == TINY.grid.count
    assert main(["gsrender", "sweep", str(folder), "--bits", "9"]) == 2


def test_occupancy_is_the_class_where_the_opacity_is_above_the_threshold():
    own = Attributes(torch.zeros(3, 3), torch.zeros(3, 3), torch.tensor([[0.2], [0.5], [0.9]]), torch.eye(3))
    assert own.occupancy(0.5, FREE).tolist() == [FREE, FREE, 2]


def test_the_shipped_network_sees_streets_and_the_recipe_has_its_threshold():
    registry = load_registry()
    loaded = load_source("gsrender:tiny", registry.sources)
    config = loaded.model.config
    recipe = load_recipe("gsrender-w8a8", registry)
    rule = recipe.rule_for(Site("head.opacity", "value"))
    assert rule.spec.format == TwoRegion(8, config.threshold, keep_side=True)
    materialize(loaded.model, "", loaded.reader, loaded.dtype)
    rays = RayIoU(config.grid, FREE)
    for sample in loaded.data.evaluation.read(3):
        with torch.no_grad():
            own = Attributes.from_rows(loaded.model.eval()(batch_of([sample]))[0])
        labels = own.occupancy(config.threshold, FREE).reshape(config.shape)
        rays.add(labels, sample.truth, torch.tensor([0.0, 0.0, 1.6]), lidar_rays(60))
    assert rays.scores()["rayiou"] > 0.25  # 0.41 over twelve streets: docs/evidence/gsrender.md
