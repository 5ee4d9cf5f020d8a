"""Whole models: adapters over quantized weights, and the command from its checks to its files."""

import copy
import json

import pytest
import torch
import typer
from qcore.calibration.text import cut, encode
from qcore.errors import CheckpointError, PlanError, SpecError
from qcore.model import adapter_for, load_source
from qcore.model.safetensors_file import SafetensorsFile
from qcore.modules.linear import QuantizedLinear
from qcore.pipeline import load_in_memory, quantize_model
from qcore.plugins import load_registry
from qcore.training import LinearShape, TrainSettings, train, tuning_bytes
from qcore.training.memory import shared_exponent_bits
from qplug_llm.decoder import DecoderLM
from qplug_llm.gsq import adapters
from qplug_llm.gsq.commands import tune
from qplug_llm.gsq.model import adapt, linear_sites, next_token_loss, recipe_problems, weights_alone
from qplug_llm.gsq.run import MARK, Job, execute, kept_bytes, prepare
from typer.testing import CliRunner


def silent(phase: str, done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(3, 61, (16, 12), generator=torch.Generator().manual_seed(1))


def tuned_of(make, model, recipe, **options):
    """A random model, quantized and adapted; and its adapter."""
    adapter, model = DecoderLM(), copy.deepcopy(model)
    adapter.prepare(model)
    topology = adapter.topology(model)
    paths, left = linear_sites(topology)
    own = weights_alone(recipe, topology)
    if own is not None:
        quantize_model(load_in_memory(model), own, registry=load_registry(), adapter=adapter)
    return adapt(model, paths, recipe, **({"rank": 4, "alpha": 4.0} | options)), adapter, left


@pytest.mark.parametrize("family", ["Llama", *(pytest.param(f, marks=pytest.mark.slow) for f in ("GPT2LMHeadModel", "GPTNeoX"))])
def test_every_linear_layer_of_a_decoder_is_adapted_and_the_loss_falls(make, ids, family):
    changes = {"n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 40} if family.startswith("GPT2") else {}
    tuned, adapter, left = tuned_of(make, make.model(family, **changes), make.recipe("gsq-w4a8g8"))
    assert len(tuned.layers) == {"Llama": 14, "GPT2LMHeadModel": 8, "GPTNeoX": 8}[family] and not left
    assert all(isinstance(layer.leaf, QuantizedLinear) for layer in tuned.layers.values())
    log = train(
        tuned.parameters(),
        lambda i: next_token_loss(adapter.outputs(tuned.model, {"input_ids": ids[i]}), ids[i]),
        len(ids),
        TrainSettings(steps=20, batch=8, rate=0.01),
    )
    assert sum(log.losses[-3:]) < 0.9 * sum(log.losses[:3])
    assert not any(p.requires_grad for n, p in tuned.model.named_parameters() if "lora_" not in n)


def test_an_adapter_of_zeros_leaves_the_quantized_model_as_it_was(make, ids):
    recipe = make.recipe("qlora-nf4")
    model, adapter = make.model(), DecoderLM()
    adapter.prepare(model)
    topology = adapter.topology(model)
    paths, _ = linear_sites(topology)
    quantize_model(load_in_memory(model), weights_alone(recipe, topology), registry=load_registry(), adapter=adapter)
    with torch.no_grad():
        before = adapter.outputs(model, ids)
        tuned = adapt(model, paths, recipe, rank=4, alpha=4.0)
        assert torch.allclose(adapter.outputs(tuned.model, ids), before, atol=1e-4)


def test_experts_stay_frozen_and_the_attention_beside_them_learns(make):
    from qplug_llm.testing import ids as tokens
    from qplug_llm.testing import model_of

    tuned, adapter, left = tuned_of(make, model_of("Mixtral"), make.recipe("gsq-w4a8g8"))
    assert len(tuned.layers) == 8 and set(left.values()) == {"experts are frozen", "a router is frozen"}
    some = tokens(2, 12)
    loss = next_token_loss(adapter.outputs(tuned.model, some), some)
    gradients = torch.autograd.grad(loss, [layer.lora_B for layer in tuned.layers.values()])
    assert all(float(x.abs().max()) > 0 for x in gradients)


@pytest.mark.parametrize("bits", [8, 6, 5])
def test_what_is_kept_is_the_closed_form(make, ids, bits):
    tuned, adapter, _ = tuned_of(make, make.model(), make.recipe(f"gsq-w4a{bits}g{bits}"), rank=32, alpha=32.0)
    some = ids[:8]  # 96 tokens, three whole groups
    kept = kept_bytes(tuned, adapter, some)
    heads = [LinearShape(48, 48), LinearShape(16, 48, alone=False), LinearShape(16, 48, alone=False), LinearShape(48, 48)]
    block = [*heads, LinearShape(80, 48), LinearShape(80, 48, alone=False), LinearShape(48, 80)]
    wanted = tuning_bytes(block * 2, 32, 96, weight_bits=4, saved_bits=shared_exponent_bits(bits)).saved
    assert wanted <= kept["adapted_layers"] <= 1.02 * wanted  # exponents of a row end on a byte: 3 · 5 bits take two
    assert kept["whole_model"] > kept["adapted_layers"]


def test_a_recipe_for_quantize_that_tune_cannot_run_is_refused_with_every_reason(make):
    model, adapter = make.model(), DecoderLM()
    adapter.prepare(model)
    topology = adapter.topology(model)
    bad = make.recipe(
        "gsq-w4a8g8",
        "transforms=[{name='hadamard'}]",
        'rules.1.granularity="tensor"',
        'rules.2.sites="*:gradient"',
    )
    found = recipe_problems(bad, topology, model)
    assert len(found) == 3
    assert "transforms" in found[0] and "'*:gradient'" in found[1] and "inside a row" in found[2]
    static = make.recipe("gsq-w4a8g8", 'rules.1.when="static"')
    assert any("dynamic" in line for line in recipe_problems(static, topology, model))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A training text and a held-out one, in capitals: of a kind that tiny-llama never saw, so that a few steps tell."""
    loaded = load_source("zoo:tiny-llama", load_registry().sources)
    folder = tmp_path_factory.mktemp("texts")
    text = loaded.evaluation.read_text(encoding="utf-8").upper()
    (folder / "train.txt").write_text(text[:6000])
    (folder / "held.txt").write_text(text[200_000:202_000])
    return folder


def job(make, texts, out, **changes) -> Job:
    given = {
        "uri": "zoo:tiny-llama", "recipe": str(make.recipes / "gsq-w4a6g6.toml"), "data": texts / "train.txt", "evaluation": texts / "held.txt",
        "out": out, "rank": 8, "alpha": 8.0, "steps": 4, "batch": 2, "window": 32, "eval_tokens": 64, "keep_every": 2,
        "rate": 0.003, "warmup": 0, "rounding": "stochastic",
    }  # fmt: skip
    return Job(**(given | changes))


@pytest.fixture(scope="module")
def done(make, texts, tmp_path_factory):
    """One whole run, and its record."""
    out = tmp_path_factory.mktemp("run") / "out"
    own = job(make, texts, out, merge=True)
    return out, execute(own, prepare(own), silent)


def test_the_whole_path_on_a_trained_model(done):
    out, record = done
    p = record["perplexity"]
    assert {"adapter_config.json", "adapter_model.safetensors", "base", "merged", "tune.json"} == {f.name for f in out.iterdir()}
    assert not (out.parent / "out.tune").exists()
    assert p["after_coded"] < p["before_coded"] and len(record["losses"]) == 4 and len(record["layers"]) == 28
    assert set(record["all_zero_gradient_groups"]) == {"dY along out", "dY along n", "dH along n", "dH along r"}


def test_adapters_have_pefts_names_and_shapes(done):
    out, _ = done
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and (config["r"], config["lora_alpha"]) == (8, 8.0)
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    file = SafetensorsFile(out / "adapter_model.safetensors")
    assert len(list(file.names())) == 56
    assert file.info("base_model.model.model.layers.3.mlp.down_proj.lora_A.weight").shape == (8, 768)
    assert file.info("base_model.model.model.layers.0.self_attn.k_proj.lora_B.weight").shape == (128, 8)


def test_the_folder_opens_again_and_the_merged_model_computes_the_same(done, texts):
    out, _ = done
    tuned = adapters.load_tuned(out)
    merged = load_source(str(out / "merged"), load_registry().sources)
    adapter = adapter_for(merged.model, load_registry().adapters)
    from qcore.pipeline import float_forward

    some = cut(encode(merged.tokenizer, (texts / "held.txt").read_text(), "held"), 32)[:2]
    with torch.no_grad():
        one, other = adapter.outputs(tuned.model, some), float_forward(merged, adapter)(some)
        coded = adapter.outputs(adapters.load_tuned(out, as_trained=True).model, some)
    assert (one - other).norm() < 0.01 * one.norm()  # the merged weights are bfloat16, 8 bits of mantissa
    assert 0 < (coded - one).norm() < 0.3 * one.norm()


def test_peft_reads_what_was_written(done, texts):
    peft = pytest.importorskip("peft")
    import transformers

    out, _ = done
    tuned = adapters.load_tuned(out)
    plain = transformers.AutoModelForCausalLM.from_pretrained(out / "merged", dtype=torch.float32)
    with torch.no_grad():
        for path, layer in tuned.layers.items():
            plain.get_submodule(path).weight.copy_(layer.base())
        some = torch.arange(64).reshape(2, 32)
        one = tuned.model(some, use_cache=False).logits
        other = peft.PeftModel.from_pretrained(plain, out)(some, use_cache=False).logits
    assert torch.allclose(one, other, atol=2e-3)


def test_a_run_that_is_interrupted_and_resumed_writes_the_same_adapters(make, texts, done, tmp_path):
    out, _ = done

    def stop(phase, at, total):
        if phase == "train" and at == 3:
            raise KeyboardInterrupt

    own = job(make, texts, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        execute(own, prepare(own), stop)
    assert not (tmp_path / "out").exists()
    with pytest.raises(PlanError, match="--resume"):
        prepare(own)
    again = job(make, texts, tmp_path / "out", resume=True)
    assert execute(again, prepare(again), silent)["counted_from_step"] == 2
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == (out / "adapter_model.safetensors").read_bytes()


def test_a_run_that_was_killed_before_its_first_steps_were_kept_is_begun_again(make, texts, tmp_path):
    own = job(make, texts, tmp_path / "out")
    (own.work / "result").mkdir(parents=True)
    with pytest.raises(PlanError, match="no run made it"):
        prepare(own)
    (own.work / MARK).touch()
    assert prepare(own).windows is not None
    own.state.touch()
    with pytest.raises(PlanError, match="--resume"):
        prepare(own)


def test_every_problem_is_named_before_anything_is_computed(make, texts, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    wrong = job(
        make, texts, tmp_path / "full", force=True, rank=0, data=texts / "absent.txt", steps=0, rounding="up", overrides=("rules.1.when=static",)
    )  # fmt: skip
    with pytest.raises(PlanError) as e:
        prepare(wrong)
    said = "\n".join(e.value.problems)
    for part in ("training.steps", "--rank", "absent.txt", "--rounding", "dynamic", "tune.json"):
        assert part in said
    for changes, part in (({"window": 100_000}, "--window"), ({"window": 4000}, "--window"), ({"evaluation": texts / "train.txt"}, "are the same")):
        with pytest.raises(PlanError, match=part):
            prepare(job(make, texts, tmp_path / "new", **changes))
    with pytest.raises(PlanError, match="too short"):
        prepare(job(make, texts, tmp_path / "new", window=256, batch=512))


def test_the_command_ends_with_two_and_no_traceback_for_what_the_user_can_mend(make, texts, tmp_path):
    from qcore.cli import boundary

    app = typer.Typer()

    @app.command()
    def other() -> None: ...

    app.command("tune")(tune)
    arguments = [
        "tune",
        "zoo:tiny-llama",
        "-r",
        str(make.recipes / "gsq-w4a6g6.toml"),
        "--data",
        str(texts / "train.txt"),
        "-o",
        str(tmp_path / "out"),
    ]

    def call(*more: str):
        def inside() -> None:
            app(args=[*arguments, *more], standalone_mode=False)

        with pytest.raises(typer.Exit) as e, boundary():
            inside()
        return e.value.exit_code

    assert call("--rank", "0", "--steps", "0", "--window", "32") == 2
    runner = CliRunner().invoke(app, [*arguments, "--dry-run", "--window", "32", "--eval-tokens", "64"])
    assert runner.exit_code == 0 and not (tmp_path / "out").exists()


def test_adapters_of_another_model_are_refused(make, done, tmp_path):
    out, _ = done
    tuned, _, _ = tuned_of(make, make.model(), make.recipe("qlora-nf4"))
    with pytest.raises(CheckpointError, match="another model"):
        adapters.read_adapters(tuned, out)
    with pytest.raises(CheckpointError, match="no folder of"):
        adapters.load_tuned(tmp_path)


def test_a_model_without_such_layers_is_refused(make):
    with pytest.raises(SpecError, match="no linear layer"):
        adapt(torch.nn.Sequential(torch.nn.Embedding(3, 4)), ["0"], make.recipe("qlora-nf4"), rank=2, alpha=2.0)
