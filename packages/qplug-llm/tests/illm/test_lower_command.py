"""`qcore lower`: from a checkpoint on disk to the integer program, audited and measured."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from qcore.cli import main
from qcore.cli.lower import audited, chosen
from qcore.errors import NotFound, SpecError
from torch import nn


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lower") / "out"
    assert main(["quantize", "zoo:tiny-llama", "-r", "illm-w8a8", "--eval-tokens", "128", "--window", "64", "-o", str(out)]) == 0
    return out


def test_a_checkpoint_runs_in_integers_alone_and_says_what_that_changes(checkpoint, capsys):
    capsys.readouterr()
    argv = ["lower", str(checkpoint), "--to", "i-llm", "--reference", "zoo:tiny-llama", "--eval-tokens", "256", "--window", "64", "--json"]
    assert main(argv) == 0
    float_model, fake, program = json.loads(capsys.readouterr().out)
    assert (float_model["name"], fake["name"], program["name"]) == ("zoo:tiny-llama", str(checkpoint), f"{checkpoint} as i-llm")
    assert 0 < fake["scores"]["kl"] < 0.002 and 0 < program["scores"]["kl"] < 0.005 and program["scores"]["tokens"] == 252
    (said,) = program["notes"]
    assert said.startswith("integers alone: none of ") and int(said.split()[4]) > 1000


def test_what_cannot_be_lowered_ends_with_the_reasons(checkpoint, tmp_path, capsys):
    assert main(["lower", str(tmp_path / "nothing")]) == 2
    assert "no checkpoint of qcore; make one first" in " ".join(capsys.readouterr().err.split())
    assert main(["lower", str(checkpoint), "--to", "vhdl"]) == 2
    assert "no lowering named 'vhdl'" in capsys.readouterr().err
    groups = tmp_path / "groups"
    assert main(["quantize", "zoo:tiny-llama", "-r", "w4a16-rtn", "--eval-tokens", "128", "--window", "64", "-o", str(groups)]) == 0
    assert main(["lower", str(groups)]) == 2
    assert "cannot be lowered to integers" in capsys.readouterr().err


def test_a_float_in_a_program_is_named():
    assert audited(nn.Linear(2, 2), torch.ones(1, 2)).startswith("not integers alone: weight is kept as torch.float32")

    class Hidden(nn.Module):
        def forward(self, x):
            return (x * 0.5).long()

    assert "makes a tensor of torch.float32" in audited(Hidden(), torch.ones(2, dtype=torch.long))


def test_one_of_several_lowerings_is_named():
    both = SimpleNamespace(lowerings={"a": int, "b": int})
    with pytest.raises(SpecError, match="name one with --to: a, b"):
        chosen(None, both)
    with pytest.raises(NotFound, match="pip install qplug-llm"):
        chosen(None, SimpleNamespace(lowerings={}))
