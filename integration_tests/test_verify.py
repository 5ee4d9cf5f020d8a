"""`qcore verify` on a real checkpoint: whole, made again to the byte, and damaged."""

import json

import pytest
from qcore.cli import main

SMALL = ["--set", "calibration.samples=8", "--set", "calibration.length=128", "--set", "calibration.starts=8", "--eval-tokens", "512"]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify") / "out"
    assert main(["quantize", "zoo:tiny-llama", "-r", "w4a16-gptq", "-o", str(folder), *SMALL]) == 0
    return folder


def test_a_checkpoint_is_read_through_and_made_again(out, capsys):
    assert main(["verify", str(out), "--reproduce", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["packed_weights_decoded"] == 28
    assert found["files_reproduced"] == len([f for f in out.iterdir() if f.name not in ("report.json", "report.html", "proof.json")])


def test_a_changed_byte_is_found_by_making_it_again(out, capsys):
    file = out / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(content)
    assert main(["verify", str(out), "--reproduce"]) == 2
    assert "model.safetensors came out different" in capsys.readouterr().err


def test_a_cut_file_is_found_by_reading(out, capsys):
    file = out / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    assert main(["verify", str(out)]) == 2
    assert "truncated or was changed" in capsys.readouterr().err
