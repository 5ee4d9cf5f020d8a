"""Streamed, resumed and in memory: one result, to the byte."""

import copy
import hashlib
import json
from pathlib import Path

import pytest
import torch
from qcore.checkpoint import save
from qcore.checkpoint.journal import Journal
from qcore.checkpoint.rewrite_file import write_rewrite
from qcore.errors import CalibrationError, CheckpointError, SpecError
from qcore.model.reader import DictReader
from qcore.model.source import LoadedModel
from qcore.modules import serve_in
from qcore.numbers import Int, PerTensor, QuantSpec, int_activation, int_weight
from qcore.pipeline import load_in_memory, quantize_model, streamed_float
from qcore.plugins.registry import Registry
from qcore.recipe import CalibrationSettings, Recipe, Rule
from qcore.solvers import GPTQ, RTN
from qcore.testing.models import TinyDecoderAdapter, tiny_decoder, tokens
from qcore.transforms import AWQScale, FoldNorm, HadamardRotate, SplitColumns

BATCHES = [tokens(seed=s) for s in range(3)]
INT8 = QuantSpec(format=Int(8), granularity=PerTensor())
RECIPES = {
    "rtn, no data": Recipe(rules=(Rule("*:weight", int_weight(4, 16)), Rule("*:input", int_activation(8))), solver=RTN()),
    "gptq": Recipe(rules=(Rule("*:weight", int_weight(3, 16)),), solver=GPTQ()),
    "static inputs and taps": Recipe(
        rules=(Rule("*:weight", int_weight(4, 16)), Rule("*:input", INT8), Rule("*:k", INT8)), solver=RTN(), propagate="all"
    ),
    "rotated, then awq": Recipe(
        rules=(Rule("*:weight", int_weight(4, 16)),),
        transforms=(FoldNorm(), HadamardRotate(online=("*.down_proj:weight",)), AWQScale(grid=3)),
        solver=RTN(),
    ),
    "split": Recipe(rules=(Rule("*:weight", int_weight(4)),), transforms=(SplitColumns(sites=("*.down_proj:weight",), channels=2),), solver=RTN()),
    "float propagation": Recipe(
        rules=(Rule("*:weight", int_weight(3, 16)),), solver=GPTQ(), propagate="float", calibration=CalibrationSettings(samples=1)
    ),
}


def loaded(tied=True, dtype=torch.bfloat16) -> LoadedModel:
    """A model as a source gives it: values behind a reader, the skeleton on meta."""
    model = tiny_decoder(tied=tied, layers=3)
    model = copy.deepcopy(model).to(dtype)
    made = load_in_memory(model)
    from qcore.model.reader import release, retie, tied_groups

    ties = tied_groups(model)
    release(model)
    retie(model, ties)
    return made


def run(recipe, folder: Path, out: Path, *, stream: bool, progress=None, dtype=torch.bfloat16) -> dict[str, str]:
    """Quantize and save; file → sha256 of all that was written."""
    torch.manual_seed(0)
    source = loaded(dtype=dtype)
    journal = Journal(folder, {"recipe": repr(recipe)})
    try:
        with torch.no_grad():
            q = quantize_model(
                source, recipe, BATCHES, registry=Registry(""), adapter=TinyDecoderAdapter(), journal=journal, stream=stream, progress=progress
            )
            serve_in(q.model, source.dtype)
            save(q.model, out, registry=Registry(""), adapter="", values=q.values, shard_bytes=6_000)
            write_rewrite(out, q.rewrite)
    finally:
        journal.close()
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(out.iterdir())}


@pytest.mark.parametrize("name", RECIPES)
def test_streamed_in_memory_and_resumed_write_the_same_bytes(name, tmp_path):
    recipe = RECIPES[name]
    whole = run(recipe, tmp_path / "a", tmp_path / "out-a", stream=False)
    assert sum(f.endswith(".safetensors") for f in whole) > 1  # several shards
    assert run(recipe, tmp_path / "b", tmp_path / "out-b", stream=True) == whole

    class Killed(Exception):
        pass

    def kill(phase, done, total):
        if phase == "block" and done == 2:
            raise Killed

    for stream in (False, True):
        with pytest.raises(Killed):
            run(recipe, tmp_path / f"c{stream}", tmp_path / f"out-c{stream}", stream=stream, progress=kill)
        assert not (tmp_path / f"out-c{stream}").exists()
        # what was interrupted in one mode goes on in the other
        assert run(recipe, tmp_path / f"c{stream}", tmp_path / f"out-c{stream}", stream=not stream) == whole


def test_a_streamed_model_holds_no_weights(tmp_path):
    source = loaded()
    journal = Journal(tmp_path / "run", {})
    q = quantize_model(source, RECIPES["gptq"], BATCHES, registry=Registry(""), adapter=TinyDecoderAdapter(), journal=journal, stream=True)
    assert all(t.is_meta for t in q.model.state_dict().values())
    assert q.values is not None
    assert all(name in q.values for name in q.model.state_dict())


def test_streaming_needs_a_journal():
    with pytest.raises(CalibrationError, match="journal"):
        quantize_model(loaded(), RECIPES["gptq"], BATCHES, registry=Registry(""), adapter=TinyDecoderAdapter(), stream=True)


def test_a_second_run_into_the_same_folder_is_refused(tmp_path):
    first = Journal(tmp_path / "run", {})
    with pytest.raises(CheckpointError, match="another process is writing"):
        Journal(tmp_path / "run", {})
    first.close()
    Journal(tmp_path / "run", {}).close()


def test_another_content_is_named(tmp_path):
    Journal(tmp_path / "run", {"seed": 0, "recipe": "a"}).close()
    with pytest.raises(CheckpointError, match="seed: the run has 0, now 1"):
        Journal(tmp_path / "run", {"seed": 1, "recipe": "a"})
    # and the refusal does not lock it
    Journal(tmp_path / "run", {"seed": 0, "recipe": "a"}).close()


def test_a_damaged_journal_says_what_to_do(tmp_path):
    run(RECIPES["gptq"], tmp_path / "run", tmp_path / "out", stream=True)
    (tmp_path / "run" / "block-00001.json").write_text("{")
    with pytest.raises(CheckpointError, match="start again"):
        run(RECIPES["gptq"], tmp_path / "run", tmp_path / "out2", stream=True)
    assert json.loads((tmp_path / "run" / "run.json").read_text())


def test_the_streamed_reference_stops_at_the_first_weight_that_is_not_finite():
    made = loaded()
    values = {name: made.reader[name].clone() for name in made.reader.names()}
    name = next(n for n in values if n.endswith("2.mlp.up_proj.weight"))
    values[name][0, 0] = float("nan")
    spoilt = LoadedModel(made.model, DictReader(values), made.name, made.dtype)
    forward = streamed_float(spoilt, TinyDecoderAdapter())
    with pytest.raises(SpecError, match=name.replace(".", r"\.")):
        list(forward.each([tokens()]))
