"""The proof that `qcore quantize` writes comes from a process that shares nothing with the one that quantized."""

import json

import pytest
from qcore.cli import main


@pytest.mark.parametrize(("recipe", "loader"), [("w4a16-rtn", "transformers.LlamaForCausalLM.from_pretrained"), ("kv4", "qcore.checkpoint.load")])
def test_a_checkpoint_is_proved_by_another_process(capsys, tmp_path, monkeypatch, recipe, loader):
    monkeypatch.setenv("QCORE_FRESH_PROOF", "1")
    out = tmp_path / "out"
    assert main(["quantize", "zoo:tiny-llama", "-r", recipe, "--eval-tokens", "512", "-o", str(out)]) == 0
    proof = json.loads((out / "proof.json").read_text())
    assert proof["fresh"] and proof["level"] == "identical" and proof["loader"] == loader
    assert "in a process of its own" in " ".join(capsys.readouterr().out.replace("│", " ").split())
