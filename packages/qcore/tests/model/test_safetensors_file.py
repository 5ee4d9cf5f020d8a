"""Our reader and writer of safetensors against the library's, and against files that mean harm."""

import json
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qcore.errors import CheckpointError, QcoreError
from qcore.model.safetensors_file import DTYPES, SafetensorsFile, write_safetensors
from safetensors.torch import load_file, save_file


def tensors(seed=0):
    g = torch.Generator().manual_seed(seed)
    made = {f"t.{n}": (torch.randn(3, 5, generator=g) * 10).to(d) for n, d in DTYPES.items()}
    return made | {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4), "ä": torch.arange(7)}


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def test_what_we_write_the_library_reads(tmp_path):
    made = tensors()
    write_safetensors(tmp_path / "x.safetensors", made, {"format": "pt"})
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == made.keys()
    assert all(same(read[n], made[n]) for n in made)


def test_what_the_library_writes_we_read(tmp_path):
    made = tensors()
    save_file(made, tmp_path / "x.safetensors", metadata={"format": "pt"})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert set(file.names()) == set(made)
    assert file.metadata == {"format": "pt"}
    assert all(same(file[n], made[n]) for n in made)
    assert file.info("t.F32").shape == (3, 5)


def test_views_and_values_on_meta_are_written_whole(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    write_safetensors(tmp_path / "x.safetensors", {"view": base[:, ::2], "turned": base.T})
    assert torch.equal(load_file(tmp_path / "x.safetensors")["turned"], base.T)
    assert torch.equal(load_file(tmp_path / "x.safetensors")["view"], base[:, ::2])
    meta = {"a": torch.empty(2, 2, device="meta"), "b": torch.empty(3, device="meta")}
    asked = []
    write_safetensors(tmp_path / "y.safetensors", meta, value=lambda n: (asked.append(n), torch.ones(meta[n].shape))[1])
    assert sorted(asked) == ["a", "b"]
    with pytest.raises(CheckpointError, match="was announced"):
        write_safetensors(tmp_path / "z.safetensors", meta, value=lambda n: torch.ones(5))


def test_a_read_is_of_its_own(tmp_path):
    write_safetensors(tmp_path / "x.safetensors", {"a": torch.ones(4)})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    file["a"].zero_()
    assert torch.equal(file["a"], torch.ones(4))


def raw(tmp_path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data", "length"),
    [
        (b"", b"", 1 << 62),  # longer than the file
        (b"{", b"", None),
        (b"[" * 50_000, b"", None),  # nested beyond the parser's depth
        (b"[1]", b"", None),
        (b'{"a": 1, "a": 2}', b"", None),
        ({"a": []}, b"", None),
        ({"a": ENTRY}, b"1234", None),  # cut
        ({"a": ENTRY}, b"123456789", None),  # bytes that belong to nobody
        ({"a": ENTRY | {"shape": [3]}}, b"12345678", None),
        ({"a": ENTRY | {"shape": [-2]}}, b"12345678", None),
        ({"a": ENTRY | {"shape": [True]}}, b"12345678", None),
        ({"a": ENTRY | {"dtype": "F99"}}, b"12345678", None),
        ({"a": ENTRY | {"dtype": ["F32"]}}, b"12345678", None),
        ({"a": ENTRY | {"data_offsets": [8, 0]}}, b"12345678", None),
        ({"a": ENTRY | {"data_offsets": [-8, 0]}}, b"12345678", None),
        ({"a": ENTRY, "b": ENTRY}, b"12345678", None),  # two tensors in one place
        ({"a": ENTRY, "b": ENTRY | {"data_offsets": [16, 24]}}, b"1" * 24, None),  # a hole
        ({"a": ENTRY | {"shape": [1 << 61], "data_offsets": [0, 1 << 63]}}, b"12345678", None),
        ({"__metadata__": {"a": 1}, "a": ENTRY}, b"12345678", None),
    ],
)
def test_what_is_no_whole_file_is_refused(tmp_path, header, data, length):
    with pytest.raises(CheckpointError, match="is not a whole safetensors file"):
        SafetensorsFile(raw(tmp_path, header, data, length))


@settings(max_examples=int(os.environ.get("QCORE_FUZZ_EXAMPLES", "300")), deadline=None)
@given(data=st.data())
def test_damaged_files_are_read_right_or_refused(data, tmp_path_factory):
    """One byte changed, or the end cut: a QcoreError, or the very tensors that the header now describes; never a crash."""
    folder = tmp_path_factory.mktemp("fuzz")
    path = folder / "x.safetensors"
    write_safetensors(path, {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4, dtype=torch.int8)}, {"format": "pt"})
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        file = SafetensorsFile(path)
        read = {n: file[n] for n in file.names()}
    except QcoreError:
        return
    assert sum(t.numel() * t.element_size() for t in read.values()) == 28
