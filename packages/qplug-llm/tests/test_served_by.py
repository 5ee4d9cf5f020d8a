"""`qcore plan --engine`: what is to serve the checkpoint is asked before it is made."""

import json

import pytest
from qcore.cli import main


def test_a_plan_says_who_can_serve_it_and_an_engine_that_cannot_is_a_problem(capsys):
    assert main(["plan", "zoo:tiny-llama", "-r", "w4a16-rtn", "--json"]) == 0
    engines = {e["engine"]: e for e in json.loads(capsys.readouterr().out)["engines"]}
    assert engines["vLLM"]["loads"] and engines["vLLM"]["parallel"]["4"] == [] != engines["vLLM"]["parallel"]["8"]
    assert main(["plan", "zoo:tiny-llama", "-r", "w4a16-rtn", "--engine", "vllm", "--tensor-parallel", "8"]) == 2
    assert "256 inputs over 8 devices leave 32 each, which groups of 64 do not divide" in capsys.readouterr().err


def test_quantize_refuses_what_the_engine_cannot_load_before_it_computes(capsys, tmp_path):
    out = tmp_path / "out"
    assert main(["quantize", "zoo:tiny-llama", "-r", "w2a16-gptq", "--engine", "vllm", "-o", str(out)]) == 2
    assert "vLLM serves weight-only integers of 4 or 8 bits, got 2" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


HADAMARD = 'transforms=[{name="fold-norm"},{name="hadamard",rest=true,heads=true}]'
LEFT = {
    ("zoo:tiny-moe", "w4a16-rtn"): "model.layers.0.mlp.experts:gate_up_proj[0]",
    ("zoo:tiny-llama", "w2a16-lowrank"): "transform 'low-rank' leaves sums of layers",
    ("zoo:tiny-llama", "rtn-w8a8", "--set", HADAMARD): "transform 'hadamard' leaves rotations",
    ("zoo:tiny-llama", "smoothquant-w8a8"): "",
    ("zoo:tiny-llama", "w4a16-ostquant"): "",
}


@pytest.mark.parametrize(("run", "said"), LEFT.items(), ids=lambda v: v[1] if isinstance(v, tuple) else "")
def test_what_only_qcore_runs_is_no_checkpoint_for_others(capsys, run, said):
    model, recipe, *more = run
    assert main(["plan", model, "-r", recipe, *more, "--json"]) == 0
    for engine in json.loads(capsys.readouterr().out)["engines"][:2]:
        reasons = [r for r in engine["reasons"] if "vLLM serves" not in r]
        assert engine["loads"] == (not engine["reasons"])
        assert bool(reasons) == bool(said) and all(said in r for r in reasons), reasons


def test_an_allocator_may_choose_what_others_cannot_load(capsys):
    assert main(["plan", "zoo:tiny-llama", "-r", "mixed", "--bits", "3.5", "--json"]) == 0
    assert "allocator 'mixed' may choose" in json.loads(capsys.readouterr().out)["engines"][0]["notes"][-1]


def test_devices_without_a_program_are_refused_not_ignored(capsys):
    assert main(["plan", "zoo:tiny-llama", "-r", "w4a16-rtn", "--tensor-parallel", "4"]) == 2
    assert "--tensor-parallel 4 is about the program that is to serve the checkpoint; name it with --engine" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["plan"], ["quantize", "-o", "out"]])
def test_an_unknown_engine_lists_those_that_are_known(capsys, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([command[0], "zoo:tiny-llama", "-r", "w4a16-rtn", "--engine", "tgi", *command[1:]]) == 2
    assert "there is no engine 'tgi'; have: transformers, vllm, llama.cpp, onnxruntime" in capsys.readouterr().err
