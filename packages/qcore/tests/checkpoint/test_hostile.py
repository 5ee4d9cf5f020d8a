"""Checkpoints, indices and recipes that mean harm: a QcoreError, or the model itself; never a crash, a path outside, or memory without end.

QCORE_FUZZ_EXAMPLES sets how many damaged files each test tries.
"""

import copy
import json
import os
import shutil
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qcore.checkpoint import MANIFEST, Manifest, load, save
from qcore.errors import CheckpointError, QcoreError
from qcore.model.reader import SafetensorsReader
from qcore.numbers import int_activation, int_weight
from qcore.pipeline import load_in_memory, quantize_model
from qcore.plugins.registry import Registry
from qcore.recipe import Recipe, Rule
from qcore.recipe_file import parse_recipe
from qcore.solvers import RTN
from qcore.testing.models import TinyDecoderAdapter, tiny_decoder, tokens

EXAMPLES = int(os.environ.get("QCORE_FUZZ_EXAMPLES", "60"))
fuzz = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
REGISTRY = Registry("")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    recipe = Recipe(rules=(Rule("*:weight", int_weight(4, 16)), Rule("*:input", int_activation(8))), solver=RTN(clip="none"))
    q = quantize_model(load_in_memory(tiny_decoder()), recipe, registry=REGISTRY, adapter=TinyDecoderAdapter())
    folder = tmp_path_factory.mktemp("checkpoint") / "out"
    save(q.model, folder, registry=REGISTRY, adapter="")
    return folder


def opened(folder: Path) -> torch.nn.Module:
    return load(folder, skeleton=tiny_decoder(seed=1), adapter=TinyDecoderAdapter(), registry=REGISTRY)


def damaged(checkpoint: Path, folder: Path, name: str, content: bytes) -> Path:
    shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
    (folder / name).write_bytes(content)
    return folder


# other values, of every kind that JSON knows
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.sampled_from(["", "..", "../x", "/etc/passwd", "int", "bits", "float32", "a\x00b", "x" * 1000]),
    st.just([]),
    st.just({}),
    st.just([[[]]]),
    st.lists(st.integers(-5, 5), max_size=3),
)


def places(value: object, path: tuple = ()) -> list[tuple]:
    """The path of every value inside a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [p for k, v in inside for p in places(v, (*path, k))]


def put(value: object, path: tuple, new: object) -> None:
    for step in path[:-1]:
        value = value[step]  # type: ignore[index]
    value[path[-1]] = copy.deepcopy(new)  # type: ignore[index]


@fuzz
@given(data=st.data())
def test_a_manifest_with_other_values(checkpoint, tmp_path_factory, data):
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        put(manifest, data.draw(st.sampled_from(places(manifest))), data.draw(VALUES))
    folder = damaged(checkpoint, tmp_path_factory.mktemp("m") / "out", MANIFEST, json.dumps(manifest).encode())
    try:
        model = opened(folder)
    except QcoreError:
        return
    finally:
        shutil.rmtree(folder)
    with torch.no_grad():
        assert model(tokens()).shape == (2, 12, 64)


@fuzz
@given(data=st.data())
def test_a_manifest_with_other_bytes(checkpoint, tmp_path_factory, data):
    content = bytearray((checkpoint / MANIFEST).read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    folder = damaged(checkpoint, tmp_path_factory.mktemp("b") / "out", MANIFEST, bytes(content))
    try:
        opened(folder)
    except QcoreError:
        pass
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"manifest": 1e999}', b'{"manifest": true}', b"{" * 9999]
)
def test_what_is_no_manifest(checkpoint, tmp_path, content):
    with pytest.raises(CheckpointError):
        opened(damaged(checkpoint, tmp_path / "out", MANIFEST, content))


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/../../x", ".", ""])
def test_no_file_outside_the_folder_is_opened(checkpoint, tmp_path, name):
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest["files"] = {name: 8}
    with pytest.raises(CheckpointError, match="outside its folder"):
        opened(damaged(checkpoint, tmp_path / "out", MANIFEST, json.dumps(manifest).encode()))


def test_a_link_among_the_files_is_refused(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "out")
    file = next((tmp_path / "out").glob("*.safetensors"))
    (tmp_path / "elsewhere").mkdir()
    file.rename(tmp_path / "elsewhere" / file.name)
    file.symlink_to(tmp_path / "elsewhere" / file.name)
    with pytest.raises(CheckpointError, match="symbolic link"):
        opened(tmp_path / "out")


def index_of(value: object) -> bytes:
    return json.dumps({"weight_map": value}).encode()


INDICES = st.one_of(st.binary(max_size=200), st.text(max_size=200).map(str.encode), VALUES.map(index_of), VALUES.map(lambda v: index_of({"x": v})))


@fuzz
@given(content=INDICES)
def test_an_index_that_is_none(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("index")
    (folder / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(QcoreError):
        SafetensorsReader(folder)["x"]


RECIPE = """
description = "x"
[[rules]]
sites = "*:weight"
format = { name = "int", bits = 4 }
granularity = { name = "group", size = 16 }
scale = "auto"
[solver]
name = "gptq"
damp = 0.01
[calibration]
samples = 8
"""


@fuzz
@given(data=st.data())
def test_recipes_with_other_words(data):
    text = list(RECIPE)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(text) - 1))
        text[at : at + data.draw(st.integers(0, 12))] = list(data.draw(st.text(max_size=8)))
    try:
        recipe = parse_recipe("".join(text), REGISTRY)
    except QcoreError:
        return
    assert isinstance(recipe, Recipe)


def test_a_shape_without_end_allocates_nothing(checkpoint, tmp_path):
    """Sizes come from files: what the manifest claims is compared with the stored headers before a byte is allocated."""
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    entry = next(e for e in manifest["modules"].values() if e["type"] == "quantized-linear")
    entry["config"]["shape"] = [1 << 20, 1 << 19]
    for part in entry["config"]["parts"].values():
        part[1] = [1 << 20, 1 << 19]
    folder = damaged(checkpoint, tmp_path / "out", MANIFEST, json.dumps(manifest).encode())
    tracemalloc.start()
    with pytest.raises(CheckpointError):
        opened(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50_000_000


def test_a_manifest_is_read_without_running_anything(checkpoint, tmp_path):
    """Names in a manifest choose among registered classes; nothing is imported or called by name."""
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    next(iter(manifest["modules"].values()))["type"] = "os.system"
    with pytest.raises(CheckpointError, match=r"os\.system"):
        opened(damaged(checkpoint, tmp_path / "out", MANIFEST, json.dumps(manifest).encode()))
    assert Manifest.read(checkpoint).layout == "qcore"
