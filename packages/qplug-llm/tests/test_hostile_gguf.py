"""GGUF files that mean harm: a CheckpointError, or the tensors themselves; never a crash, a hang, or memory beyond twice the file.

QCORE_FUZZ_EXAMPLES sets how many damaged files are tried.
"""

import os
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qcore.errors import CheckpointError
from qplug_llm.gguf import GGUFFile

fuzz = settings(
    max_examples=int(os.environ.get("QCORE_FUZZ_EXAMPLES", "60")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> bytes:
    import gguf

    path = tmp_path_factory.mktemp("gguf") / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_token_list(["a", "b", "c"])
    writer.add_token_types([1, 1, 3])
    rows = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    for name, kind in (("f32", gguf.GGMLQuantizationType.F32), ("f16", gguf.GGMLQuantizationType.F16), ("q8", gguf.GGMLQuantizationType.Q8_0)):
        writer.add_tensor(name, gguf.quants.quantize(rows, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def read(path: Path) -> None:
    """Everything in the file."""
    file = GGUFFile(path)
    for name, entry in file.tensors.items():
        assert file.values(name).shape == entry.shape
    assert set(file.quantized_types()) <= {e.kind for e in file.tensors.values()}


def header(*pairs: tuple[str, int, bytes], tensors: bytes = b"", count: int = 0) -> bytes:
    """A file of metadata alone.  pairs: (key, type, value)"""
    kv = b"".join(struct.pack("<Q", len(k)) + k.encode() + struct.pack("<I", t) + v for k, t, v in pairs)
    return b"GGUF" + struct.pack("<IQQ", 3, count, len(pairs)) + kv + tensors


ARCHITECTURE = ("general.architecture", 8, struct.pack("<Q", 5) + b"llama")


def test_the_undamaged_file_is_read(good, tmp_path):
    (tmp_path / "x.gguf").write_bytes(good)
    read(tmp_path / "x.gguf")


@fuzz
@given(data=st.data())
def test_a_file_with_other_bytes(good, tmp_path, data):
    content = bytearray(good)
    head = len(content) - 8 * 64 * 7  # most of the damage where lengths, counts and offsets are
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.integers(4, max(head, 5)) | st.integers(4, len(content) - 1))
        new = data.draw(st.binary(min_size=1, max_size=8) | st.sampled_from([b"\xff" * 8, b"\x00" * 8, struct.pack("<Q", 2**62)]))
        content[at : at + len(new)] = new
    content = content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        read(path)
    except CheckpointError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2 * len(content) + 400_000  # Python's own objects beside


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (header(("general.architecture", 4, struct.pack("<I", 7))), "names no architecture"),
        (header(ARCHITECTURE, ("general.alignment", 4, struct.pack("<I", 0))), "general.alignment is 0"),
        (header(ARCHITECTURE, ("general.alignment", 8, struct.pack("<Q", 1) + b"x")), "general.alignment is 'x'"),
        (header(ARCHITECTURE, ("a", 9, struct.pack("<IQ", 9, 1) * 2000)), "arrays in arrays"),
        (header(ARCHITECTURE, ("a", 9, struct.pack("<IQ", 0, 2**60))), "ends in the middle"),
        (header(ARCHITECTURE, ("a", 9, struct.pack("<IQ", 8, 2**60))), "ends in the middle"),
        (header(ARCHITECTURE, count=2**60), "ends in the middle"),
        (header(ARCHITECTURE, tensors=struct.pack("<Q", 1) + b"t" + struct.pack("<IQIQ", 1, 2**60, 0, 0), count=1), "ends at byte"),
        (header(ARCHITECTURE, tensors=struct.pack("<Q", 1) + b"t" + struct.pack("<IQIQ", 1, 32, 0, 2**63), count=1), "ends at byte"),
        (header(ARCHITECTURE, tensors=struct.pack("<Q", 1) + b"t" + struct.pack("<IQIQ", 1, 32, 77, 0), count=1), "ggml type 77"),
        (
            header(ARCHITECTURE, tensors=struct.pack("<Q", 1) + b"t" + struct.pack("<IQQIQ", 2, 0, 8, 8, 0), count=1),
            r"shape \(8, 0\), which holds nothing",
        ),
        (header(("k", 42, b"")), "metadata of unknown type 42"),
    ],
)
def test_what_files_may_claim(tmp_path, content, said):
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=said):
        read(tmp_path / "x.gguf")
