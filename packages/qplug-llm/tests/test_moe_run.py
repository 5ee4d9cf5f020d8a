"""The whole path for mixtures of experts: recipes, plan, command, report, checkpoint; and a plan of a model that is not there."""

import json
import time
from pathlib import Path

import pytest
import torch
from qcore.checkpoint import MANIFEST, load, save
from qcore.checkpoint.journal import Journal
from qcore.cli import main
from qcore.cli._records import leaf_of
from qcore.cli._show import heat_map
from qcore.errors import CheckpointError
from qcore.model import adapter_for, load_source
from qcore.pipeline import load_in_memory, quantize_model
from qcore.plan import make_plan
from qcore.plugins import load_registry
from qcore.recipe_file import dump, load_recipe, parse_recipe
from qplug_llm.decoder import DecoderLM
from qplug_llm.ebss import EBSS
from qplug_llm.testing import ids, model_of

# DeepSeek-V2-Lite: 15.7 billion parameters
SIXTEEN_BILLION = {
    "model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408,
    "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16, "n_shared_experts": 2, "n_routed_experts": 64,
    "num_experts_per_tok": 6, "first_k_dense_replace": 1, "q_lora_rank": None, "kv_lora_rank": 512, "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128, "v_head_dim": 128, "max_position_embeddings": 163840, "topk_method": "greedy", "n_group": 1, "topk_group": 1,
    "dtype": "bfloat16",
}  # fmt: skip
RECIPES = ("w4a16-moequant", "w3a16-moequant", "w4a16-moequant-awq")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_plans_on_the_trained_mixture_and_survives_a_dump(name):
    registry = load_registry()
    recipe = load_recipe(name, registry)
    assert recipe.calibration.source == EBSS() and recipe.calibration.affinity == 1 and recipe.calibration.below == "layer"
    assert parse_recipe(dump(recipe), registry, name) == recipe
    loaded = load_source("zoo:tiny-moe", registry.sources)
    plan = make_plan(loaded, recipe, adapter_for(loaded.model, registry.adapters), registry)
    assert plan.problems == ()
    assert not any("experts" in n or "gate" in n for n in plan.left_float)
    assert plan.coverage["experts"] == 32 and plan.coverage["stacks"] == 4 and plan.coverage["rows_if_even"] == 64 * 512 * 2 // 8
    assert {k["kernel"] for k in plan.kinds() if "experts" in k["kind"]} != {"–"}


def test_a_plan_says_when_the_data_cannot_be_enough():
    registry = load_registry()
    loaded = load_source("zoo:tiny-moe", registry.sources)
    changes = ("calibration.samples=2", "calibration.length=8", "calibration.minimum=100", 'calibration.below="fail"')
    plan = make_plan(loaded, load_recipe("w4a16-moequant", registry, changes), DecoderLM(), registry)
    assert any("about 4 rows, fewer than calibration.minimum=100" in p and "calibration.samples=50" in p for p in plan.problems)


def test_sixteen_billion_parameters_are_planned_without_a_weight(tmp_path):
    path = tmp_path / "deepseek-16b.json"
    path.write_text(json.dumps(SIXTEEN_BILLION))
    registry = load_registry()
    loaded = load_source(str(path), registry.sources)
    assert all(p.is_meta for p in loaded.model.parameters())
    started = time.process_time()
    plan = make_plan(loaded, load_recipe("w4a16-moequant", registry), DecoderLM(), registry, max_ram=200_000_000_000)
    assert time.process_time() - started < 30  # 2.3 s on one core of the machine that this was written on
    assert plan.problems == ()
    assert 15.6e9 < plan.bytes_before / 2 < 15.8e9
    experts = [d for d in plan.decisions if "experts:" in d.site]
    assert len(experts) == 26 * 64 * 2 and {k["count"] for k in plan.kinds() if "[*]" in k["kind"]} == {26 * 64}
    assert 3.4 < plan.bytes_before / plan.bytes_after < 3.6 and plan.effective_bits < 4.3
    assert plan.budget is not None and plan.budget.estimate > 0 and plan.seconds > 0
    streamed = make_plan(loaded, load_recipe("w4a16-moequant", registry), DecoderLM(), registry, stream=True)
    assert len(streamed.problems) == 1 and "'ebss' makes its data with the whole float model in memory" in streamed.problems[0]
    with pytest.raises(CheckpointError, match="a configuration alone"):
        loaded.reader["model.norm.weight"]


def test_the_command_writes_the_ledger_into_report_and_checkpoint(tmp_path, capsys):
    out = tmp_path / "out"
    settings = {"samples": 8, "length": 32, "batch": 4, "starts": 8, "source.path": f'"{tmp_path / "set.safetensors"}"'}
    given = [arg for k, v in settings.items() for arg in ("--set", f"calibration.{k}={v}")]
    command = ["quantize", "zoo:tiny-moe", "-r", "w4a16-moequant", "-o", str(out), *given, "--eval-tokens", "512"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    ledger = report["coverage"]["experts"]
    assert len(ledger["stacks"]) == 4
    for stack in ledger["stacks"].values():
        assert sum(stack["gate_up_proj"]["rows"]) == sum(stack["down_proj"]["rows"]) == 2 * (8 * 32 + 8)
    assert json.loads((out / MANIFEST).read_text())["record"]["coverage"] == ledger
    assert report["data"]["calibration"]["source"].startswith("EBSS(") and "file" not in report["data"]["calibration"]
    assert "calibrated on what ebss made with the float model" in report["data"]["note"]
    assert report["proof"]["level"] == "identical"
    assert "rows that each expert saw:" in printed and "model.layers.3.mlp.experts" in printed
    expert = next(s for s in report["sites"] if s["site"] == "model.layers.0.mlp.experts:down_proj[3]")
    assert expert["kernel"] != "–"
    assert report["quality"]["scores"]["kl"] < 0.1
    # the sampled set is reused: no model is needed for it
    kept = EBSS(path=str(tmp_path / "set.safetensors"))
    assert kept.path and Path(kept.path).is_file()


def test_a_streamed_run_writes_the_bytes_of_a_run_in_memory(tmp_path):
    import copy

    registry = load_registry()
    settings = ('calibration.source="none"', "calibration.starts=0", "rules.0.granularity.size=16", "rules.1.granularity.size=16")
    recipe = load_recipe("w4a16-moequant", registry, settings)
    files = []
    for stream in (False, True):
        loaded = load_in_memory(copy.deepcopy(model_of("DeepseekV2")))
        journal = Journal(tmp_path / f"journal-{stream}", {"run": 1})
        q = quantize_model(loaded, recipe, [ids(), ids(seed=6)], registry=registry, adapter=DecoderLM(), journal=journal, stream=stream)
        out = tmp_path / f"out-{stream}"
        save(q.model, out, adapter="decoder-lm", registry=registry, values=q.values)
        files.append((out / "model.qcore.safetensors").read_bytes())
    assert files[0] == files[1]
    again = load(tmp_path / "out-True", skeleton=copy.deepcopy(model_of("DeepseekV2")), registry=registry)
    assert torch.isfinite(DecoderLM().outputs(again, ids())).all()


def test_the_heat_map_shows_who_saw_nothing():
    ledger = {"stacks": {"layers.0.experts": {"up": {"rows": [0, 1, 50, 100], "weight": [], "instead": {"0": "rounded to nearest"}}}}}
    assert heat_map(ledger) == ["layers.0.experts  ·▁▄█  0 to 100 rows; too few, mended: 0"]


def test_the_path_that_runs_a_site():
    assert leaf_of("layers.0.experts:up_proj[3]") == "layers.0.experts.up_proj.3"
    assert leaf_of("layers.0.q_proj:weight") == "layers.0.q_proj"
    assert leaf_of("mixer.in_proj:weight[0:64]") == "mixer.in_proj"
