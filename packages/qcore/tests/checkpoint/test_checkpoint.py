import copy
import json
import struct
import subprocess
import sys
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from qcore.checkpoint import MANIFEST, Manifest, load, prove, save
from qcore.errors import CheckpointError, SpecError
from qcore.model import Tap, parameters_on_meta, tap
from qcore.model.tap import attach
from qcore.modules import QuantizedEmbedding, QuantizedLinear, Stored, quantized_leaf, serve_in
from qcore.numbers import Codebook, PerGroup, QuantSpec, int_activation, int_weight, mx, nvfp4, quantize
from qcore.packing import Bits
from safetensors.torch import load_file
from torch import nn


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 32)
        self.conv = nn.Conv1d(32, 32, 3, padding=1, groups=4)
        self.norm = nn.BatchNorm1d(32)
        self.mix = nn.Linear(32, 32)
        self.head = nn.Linear(32, 20, bias=False)
        self.register_buffer("positions", torch.arange(8.0), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) + self.positions[: ids.shape[1], None]
        x = self.norm(self.conv(x.transpose(1, 2))).transpose(1, 2)
        return self.head(torch.relu(tap(self, "hidden", self.mix(x))))


IDS = torch.randint(0, 20, (2, 8), generator=torch.Generator().manual_seed(0))


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().eval()


W4 = int_weight(4, 8)


def quantized_net(spec: QuantSpec = W4, activation: QuantSpec | None = None) -> Net:
    model = net()
    with torch.no_grad():
        model.train()(IDS)  # running statistics that are not the initial ones
        model.eval()
        for path in ("embed", "conv", "mix"):
            module = model.get_submodule(path)
            q = quantize(module.weight.detach().flatten(1), spec)
            own = activation if path == "mix" else None
            model.set_submodule(path, quantized_leaf(module, Stored(weight=q, packing=Bits(), activation=own)))
    return model


def run(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS)


@pytest.mark.parametrize(
    "spec",
    [int_weight(4, 8), int_weight(3, 8, asymmetric=True), mx(group=8), QuantSpec(format=Codebook(3), granularity=PerGroup(8)), int_weight(1)],
    ids=str,
)
def test_a_reloaded_model_is_the_saved_one_bit_for_bit(spec, registry, tmp_path):
    model = quantized_net(spec, int_activation())
    manifest = save(model, tmp_path / "out", registry=registry)
    assert manifest.layout == "qcore" and list(manifest.files) == ["model.qcore.safetensors"]
    back = load(tmp_path / "out", skeleton=net(5), registry=registry)
    assert torch.equal(run(back), run(model))
    assert back.state_dict().keys() == model.state_dict().keys()
    assert all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in zip(back.state_dict().values(), model.state_dict().values(), strict=True)
        if a.ndim
    )
    assert not back.training and not any(p.requires_grad for p in back.parameters())
    assert back.mix.explain().kernel.name in registry.kernels


def test_the_skeleton_may_be_on_meta(registry, tmp_path):
    model = quantized_net()
    save(model, tmp_path / "out", registry=registry)
    with parameters_on_meta():
        skeleton = Net()
    assert torch.equal(run(load(tmp_path / "out", skeleton=skeleton, registry=registry)), run(model))


def test_computed_buffers_on_meta_are_named(registry, tmp_path):
    save(quantized_net(), tmp_path / "out", registry=registry)
    with torch.device("meta"):
        skeleton = Net()
    with pytest.raises(CheckpointError, match="1 tensors have no values: positions"):
        load(tmp_path / "out", skeleton=skeleton, registry=registry)


def test_the_same_model_gives_the_same_bytes(registry, tmp_path):
    for name in ("a", "b"):
        save(quantized_net(), tmp_path / name, registry=registry, record={"recipe": "x", "seed": 0})
    for file in ("model.qcore.safetensors", MANIFEST, "README.md"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_served_in_bfloat16_it_is_stored_and_reloaded_so(registry, tmp_path):
    model = quantized_net(nvfp4_of_8())
    serve_in(model, torch.bfloat16)
    assert model.positions.dtype == torch.float32 and model.head.weight.dtype == torch.bfloat16
    model.positions = model.positions.bfloat16()
    manifest = save(model, tmp_path / "out", registry=registry)
    assert manifest.dtype == "bfloat16"
    skeleton = net(5)
    skeleton.positions = skeleton.positions.bfloat16()
    back = load(tmp_path / "out", skeleton=skeleton, registry=registry)
    assert run(back).dtype == torch.bfloat16 and torch.equal(run(back), run(model))


def nvfp4_of_8() -> QuantSpec:
    return QuantSpec(format=nvfp4().format, granularity=PerGroup(8), scale=nvfp4().scale)


# ties, shared modules, taps, modules inside modules --------------------------------------------------------------------------------------


class Online(nn.Module):
    """A run-time module that transforms the input of a leaf; its sign is a stored buffer."""

    name: ClassVar[str] = "test-sign"

    def __init__(self, n: int) -> None:
        super().__init__()
        self.register_buffer("sign", torch.ones(n))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.sign

    def config(self) -> dict[str, Any]:
        return {"n": self.sign.shape[0]}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Online":
        return cls(config["n"])


class Clip(Tap):
    name: ClassVar[str] = "test-clip"

    def __init__(self, high: float) -> None:
        super().__init__()
        self.high = high

    def forward(self, x: torch.Tensor, rows: Any = None, weight: Any = None) -> torch.Tensor:
        return x.clamp(max=self.high)

    def config(self) -> dict[str, Any]:
        return {"high": self.high}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Clip":
        return cls(**config)


@pytest.fixture
def more(registry):
    for cls in (Online, Clip):
        registry.modules[cls.name] = cls
        registry.modules.origin[cls.name] = "qplug-test"
    return registry


def test_modules_inside_modules_and_at_taps_come_back_in_their_order(more, tmp_path):
    model = quantized_net()
    online = Online(32)
    online.sign[::2] = -1
    model.mix.online = online
    for high in (0.5, 0.25, 2.0):
        attach(model, "hidden", Clip(high))
    save(model, tmp_path / "out", registry=more)
    back = load(tmp_path / "out", skeleton=net(5), registry=more)
    assert torch.equal(run(back), run(model))
    assert [h.high for h in back.taps["hidden"].handlers] == [0.5, 0.25, 2.0]
    assert isinstance(back.mix.online, Online)


def test_an_online_module_keeps_the_model_out_of_the_portable_layout(more, tmp_path):
    from qcore.checkpoint import layout_for
    from qcore.packing import CompressedPack

    model = nn.Sequential(nn.Linear(32, 8))
    q = quantize(model[0].weight.detach(), int_weight(4, 8))
    model[0] = quantized_leaf(model[0], Stored(weight=q, packing=CompressedPack()))
    assert layout_for(model, more.modules).name == "compressed-tensors"
    model[0].online = Online(32)
    layout = layout_for(model, more.modules)
    assert layout.name == "qcore" and "an online Online stands before it" in layout.reasons[0]


def test_ties_of_parameters_and_of_stored_parts_are_stored_once(registry, tmp_path):
    model = quantized_net()
    q = model.embed.qtensor()
    model.head = QuantizedLinear(model.embed.stored(), q.spec, q.shape, Bits())
    model.extra = nn.Linear(32, 20, bias=False)
    model.extra.weight = nn.Parameter(torch.randn(20, 32))
    model.twice = nn.Linear(32, 20, bias=False)
    model.twice.weight = model.extra.weight
    save(model, tmp_path / "out", registry=registry)
    stored = load_file(tmp_path / "out" / "model.qcore.safetensors")
    assert "embed.codes" in stored and "head.codes" not in stored and "twice.weight" not in stored
    skeleton = net(5)
    skeleton.extra, skeleton.twice = nn.Linear(32, 20, bias=False), nn.Linear(32, 20, bias=False)
    back = load(tmp_path / "out", skeleton=skeleton, registry=registry)
    assert back.head.codes is back.embed.codes and back.twice.weight is back.extra.weight
    assert torch.equal(run(back), run(model))


def test_a_module_at_two_paths_stays_one_module(registry, tmp_path):
    def build() -> nn.Module:
        leaf = nn.Linear(8, 8)
        return nn.Sequential(leaf, nn.ReLU(), leaf)

    torch.manual_seed(0)
    model = build()
    q = quantize(model[0].weight.detach(), int_weight(3))
    model[0] = model[2] = quantized_leaf(model[0], Stored(weight=q, packing=Bits()))
    manifest = save(model, tmp_path / "out", registry=registry)
    assert manifest.shared == {"2": "0"} and list(manifest.modules) == ["0"]
    back = load(tmp_path / "out", skeleton=build(), registry=registry)
    x = torch.randn(3, 8)
    assert back[2] is back[0] and torch.equal(back(x), model(x))


def test_the_whole_model_may_be_one_leaf(registry, tmp_path):
    torch.manual_seed(0)
    leaf = nn.Linear(8, 4)
    model = quantized_leaf(leaf, Stored(weight=quantize(leaf.weight.detach(), int_weight(3)), packing=Bits()))
    save(model, tmp_path / "out", registry=registry)
    x = torch.randn(2, 8)
    assert torch.equal(load(tmp_path / "out", skeleton=nn.Linear(8, 4), registry=registry)(x), model(x))


def test_an_unregistered_module_is_refused_when_saving(registry, tmp_path):
    model = quantized_net()
    model.mix.online = Online(32)
    with pytest.raises(SpecError, match="hook qcore_modules"):
        save(model, tmp_path / "out", registry=registry)
    assert list(tmp_path.iterdir()) == []


def test_what_a_checkpoint_cannot_rebuild_is_refused_when_saving(more, tmp_path):
    from qcore.modules.online import Online as Wrapper

    model = quantized_net()
    model.head = Wrapper(model.head, Online(32))
    with pytest.raises(CheckpointError, match="head: Online stands before a layer that is not quantized"):
        save(model, tmp_path / "out", registry=more)
    model = quantized_net()
    attach(model, "hidden", Tap())
    with pytest.raises(CheckpointError, match=r"taps\.hidden\.handlers\.0: Tap is attached, but no registered module"):
        save(model, tmp_path / "out", registry=more)
    assert list(tmp_path.iterdir()) == []


# damage ----------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(registry, tmp_path):
    folder = tmp_path / "out"
    save(quantized_net(), folder, registry=registry)
    return folder


def edit(folder, change) -> None:
    data = json.loads((folder / MANIFEST).read_text())
    change(data)
    (folder / MANIFEST).write_text(json.dumps(data))


def test_a_cut_weights_file_is_named(saved, registry):
    file = saved / "model.qcore.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"model\.qcore\.safetensors has \d+ bytes, the manifest says \d+"):
        load(saved, skeleton=net(), registry=registry)


def test_a_changed_bit_in_the_header_is_never_taken_for_weights(saved, registry):
    file = saved / "model.qcore.safetensors"
    whole = file.read_bytes()
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    first = whole.index(b'"conv') if whole.index(b'"conv') < whole.index(b'"embed') else whole.index(b'"embed')
    for at in (0, 7, 8, *range(first, len(whole[:end].rstrip()), 41)):
        raw = bytearray(whole)
        raw[at] ^= 0x10
        file.write_bytes(raw)
        with pytest.raises(CheckpointError):
            load(saved, skeleton=net(), registry=registry)


def test_a_missing_weights_file_is_named(saved, registry):
    (saved / "model.qcore.safetensors").unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        load(saved, skeleton=net(), registry=registry)


def test_a_folder_without_a_manifest_is_no_checkpoint(tmp_path, registry):
    with pytest.raises(CheckpointError, match="no qcore checkpoint"):
        load(tmp_path, skeleton=net(), registry=registry)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"manifest": "1"}', '{"manifest": true}', '{"manifest": 0}', "[" * 100_000], ids=lambda t: t[:20])
def test_a_manifest_that_is_none_is_refused(text, saved, registry):
    (saved / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError):
        load(saved, skeleton=net(), registry=registry)


def test_a_newer_manifest_says_upgrade(saved, registry):
    edit(saved, lambda d: d.update(manifest=2, qcore="9.0"))
    with pytest.raises(CheckpointError, match=r"written by qcore 9\.0 as manifest version 2.*upgrade qcore"):
        load(saved, skeleton=net(), registry=registry)


def test_missing_plug_ins_are_named(more, tmp_path):
    model = quantized_net()
    model.mix.online = Online(32)
    save(model, tmp_path / "out", registry=more)
    del more.modules["test-sign"]
    with pytest.raises(CheckpointError, match=r"needs the module 'test-sign' of qplug-test.*pip install qplug-test"):
        load(tmp_path / "out", skeleton=net(), registry=more)


@pytest.mark.parametrize(("kind", "name"), [("formats", "int"), ("packings", "bits")])
def test_missing_formats_and_packings_are_named(kind, name, saved, registry):
    edit(saved, lambda d: d["origins"][kind].update({name: "qplug-hardware"}))
    getattr(registry, kind).pop(name)
    with pytest.raises(CheckpointError, match=f"needs the {kind[:-1]} '{name}' of qplug-hardware.*pip install qplug-hardware"):
        load(saved, skeleton=net(), registry=registry)


def test_a_missing_source_is_named(registry, tmp_path):
    save(quantized_net(), tmp_path / "out", registry=registry, source="gone")
    with pytest.raises(CheckpointError, match=r"source 'gone'.*skeleton=model"):
        load(tmp_path / "out", registry=registry)
    save(quantized_net(), tmp_path / "none", registry=registry)
    with pytest.raises(CheckpointError, match="skeleton=model"):
        load(tmp_path / "none", registry=registry)


HOSTILE = {
    "a file outside": lambda d: d.update(files={"../../etc/passwd": 1}),
    "an absolute file": lambda d: d.update(files={"/etc/passwd": 1}),
    "sizes as text": lambda d: d.update(files={"model.qcore.safetensors": "many"}),
    "no files": lambda d: d.update(files={}),
    "modules as a list": lambda d: d.update(modules=[]),
    "a module as text": lambda d: d["modules"].update(mix="x"),
    "a type as a number": lambda d: d["modules"]["mix"].update(type=3),
    "a huge shape": lambda d: d["modules"]["mix"]["config"].update(shape=[1 << 60, 32]),
    "a large shape": lambda d: d["modules"]["mix"]["config"].update(shape=[1 << 39, 1 << 20]),
    "a huge part": lambda d: d["modules"]["mix"]["config"]["parts"].update(codes=["uint8", [1 << 60, 16]]),
    "a large part": lambda d: d["modules"]["mix"]["config"]["parts"].update(codes=["uint8", [1 << 39, 16]]),
    "a part as text": lambda d: d["modules"]["mix"]["config"].update(parts="codes"),
    "another dtype": lambda d: d["modules"]["mix"]["config"]["parts"].update(scale=["float32", [32, 4]]),
    "a part too few": lambda d: d["modules"]["mix"]["config"]["parts"].pop("scale"),
    "a part too many": lambda d: d["modules"]["mix"]["config"]["parts"].update(more=["uint8", [1]]),
    "a config without spec": lambda d: d["modules"]["mix"]["config"].pop("spec"),
    "an unknown granularity": lambda d: d["modules"]["mix"]["config"]["spec"]["granularity"].update(name="odd"),
    "a number of bits": lambda d: d["modules"]["mix"]["config"]["spec"]["format"].update(bits=64),
    "a place that is not there": lambda d: d["modules"].update({"a.b.c": d["modules"]["mix"]}),
    "a tie to nothing": lambda d: d.update(ties={"head.weight": "nothing.weight"}),
    "a tie of nothing": lambda d: d.update(ties={"head.nothing": "mix.bias"}),
    "a shared place that is not there": lambda d: d.update(shared={"a.b": "mix"}),
    "a dtype that is none": lambda d: d.update(dtype="object"),
    "an unknown layout": lambda d: d.update(layout="other"),
    "an adapter that is not there": lambda d: d.update(adapter="os"),
}


@pytest.mark.parametrize("damage", HOSTILE)
def test_a_hostile_manifest_is_refused(damage, saved, registry):
    edit(saved, HOSTILE[damage])
    with pytest.raises(CheckpointError):
        load(saved, skeleton=net(), registry=registry)


def test_another_architecture_is_refused_with_the_names_that_differ(saved, registry):
    skeleton = net()
    skeleton.more = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match=r"2 missing: more\.bias, more\.weight"):
        load(saved, skeleton=skeleton, registry=registry)
    skeleton = net()
    del skeleton.head
    with pytest.raises(CheckpointError, match=r"1 unexpected: head\.weight"):
        load(saved, skeleton=skeleton, registry=registry)
    skeleton = net()
    skeleton.head = nn.Linear(32, 21, bias=False)
    with pytest.raises(CheckpointError, match=r"head\.weight has shape \(20, 32\), the model expects \(21, 32\)"):
        load(saved, skeleton=skeleton, registry=registry)


def test_swapped_tensors_of_one_size_are_noticed_by_the_proof(saved, registry):
    model = quantized_net()
    assert prove(saved, model, [IDS], skeleton=net(5), registry=registry).level == "identical"
    file = saved / "model.qcore.safetensors"
    raw = bytearray(file.read_bytes())
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    raw[start : start + 200] = bytes(200)
    file.write_bytes(raw)
    assert prove(saved, model, [IDS], skeleton=net(5), registry=registry).level == "different"


# all or nothing --------------------------------------------------------------------------------------------------------------------------


def test_a_full_folder_is_not_overwritten_unless_asked(saved, registry):
    (saved / "mine.txt").write_text("x")
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    with pytest.raises(CheckpointError, match="not empty; choose another folder, or pass overwrite=True"):
        save(quantized_net(), saved, registry=registry)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    save(quantized_net(int_weight(3, 8)), saved, registry=registry, overwrite=True)
    assert not (saved / "mine.txt").exists()
    assert torch.equal(run(load(saved, skeleton=net(), registry=registry)), run(quantized_net(int_weight(3, 8))))
    assert [p.name for p in saved.parent.iterdir()] == ["out"]


def test_a_file_is_not_a_folder(registry, tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(CheckpointError, match="is a file"):
        save(quantized_net(), tmp_path / "out", registry=registry, overwrite=True)


@pytest.mark.parametrize("there", [False, True])
def test_a_full_disk_leaves_nothing_behind(there, registry, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    if there:
        save(quantized_net(), folder, registry=registry)
    before = sorted(p.name for p in tmp_path.rglob("*"))

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys.modules["qcore.checkpoint.save"], "write_safetensors", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save(quantized_net(int_weight(3, 8)), folder, registry=registry, overwrite=there)
    assert sorted(p.name for p in tmp_path.rglob("*")) == before
    if there:
        assert torch.equal(run(load(folder, skeleton=net(), registry=registry)), run(quantized_net()))


def test_a_rename_that_fails_puts_the_old_one_back(saved, registry, monkeypatch):
    from pathlib import Path

    rename = Path.rename

    def refusing(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refusing)
    with pytest.raises(CheckpointError, match="Input/output error"):
        save(quantized_net(int_weight(3, 8)), saved, registry=registry, overwrite=True)
    monkeypatch.undo()
    assert torch.equal(run(load(saved, skeleton=net(), registry=registry)), run(quantized_net()))
    assert [p.name for p in saved.parent.iterdir()] == ["out"]


def test_companions_that_fail_leave_nothing_behind(registry, tmp_path):
    def failing(folder) -> None:
        (folder / "config.json").write_text("{}")
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        save(quantized_net(), tmp_path / "out", registry=registry, companions=failing)
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_values_cannot_be_saved(registry, tmp_path):
    with parameters_on_meta():
        model = Net()
    with pytest.raises(CheckpointError, match=r"embed\.weight has no values"):
        save(model, tmp_path / "out", registry=registry)


# the manifest ----------------------------------------------------------------------------------------------------------------------------


def test_the_manifest_is_plain_data_that_comes_back(saved, registry):
    manifest = Manifest.read(saved)
    assert Manifest.from_dict(json.loads(json.dumps(manifest.to_dict())), "x") == manifest
    assert manifest.modules["embed"].type == QuantizedEmbedding.name
    assert manifest.origins["packings"] == {"bits": "qcore"}


def test_loading_imports_nothing_of_calibration_or_solvers(saved):
    upper = ("qcore.calibration", "qcore.solvers", "qcore.recipe", "qcore.transforms")
    code = f"import sys, qcore.checkpoint.load; print([m for m in sys.modules if m.startswith({upper})])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_view_is_stored_as_its_own_tensor(registry, tmp_path):
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            whole = torch.arange(12.0).reshape(4, 3)
            self.register_buffer("top", whole[:2])
            self.register_buffer("turned", whole.T)

    model = Views()
    save(model, tmp_path / "out", registry=registry)
    back = load(tmp_path / "out", skeleton=copy.deepcopy(model), registry=registry)
    assert torch.equal(back.top, model.top) and torch.equal(back.turned, model.turned)


def test_registries_need_no_origin():
    from qcore.checkpoint.manifest import origins_of

    assert origins_of({"formats": {"int"}, "modules": set()}, SimpleNamespace(formats={})) == {"formats": {"int": ""}}
