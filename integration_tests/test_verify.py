"""`qcore verify` on a real checkpoint: whole, made again to the byte, and damaged."""

import hashlib
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
    assert found["packed_weights_decoded"] == 28 and found["files_hashed"] == 1
    assert found["files_reproduced"] == len([f for f in out.iterdir() if f.name not in ("report.json", "report.html", "proof.json")])


def test_a_changed_bit_is_found_by_its_hash_and_by_making_it_again(out, capsys):
    file, manifest = out / "model.safetensors", out / "qcore.json"
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(content)
    assert main(["verify", str(out)]) == 2
    assert "model.safetensors has SHA-256" in capsys.readouterr().err
    said = manifest.read_text()
    older = json.loads(said)
    del older["sha256"]
    manifest.write_text(json.dumps(older))
    assert main(["verify", str(out), "--json"]) == 0, "without a hash every bit pattern is a number"
    assert json.loads(capsys.readouterr().out)["files_hashed"] == 0
    manifest.write_text(said)
    content[-1000] ^= 1
    file.write_bytes(content)
    assert main(["verify", str(out)]) == 0


def test_codes_of_another_recipe_are_found_by_making_it_again(out, capsys):
    file, manifest = out / "model.safetensors", out / "qcore.json"
    content, said = file.read_bytes(), manifest.read_text()
    changed = bytearray(content)
    changed[-1000] ^= 1
    file.write_bytes(changed)
    rewritten = json.loads(said)
    rewritten["sha256"][file.name] = hashlib.sha256(changed).hexdigest()
    manifest.write_text(json.dumps(rewritten))
    assert main(["verify", str(out), "--reproduce"]) == 2
    err = capsys.readouterr().err
    assert "model.safetensors" in err and "came out different" in err
    file.write_bytes(content)
    manifest.write_text(said)


def test_a_cut_file_is_found_by_reading(out, capsys):
    file = out / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    assert main(["verify", str(out)]) == 2
    assert "truncated or was changed" in capsys.readouterr().err
