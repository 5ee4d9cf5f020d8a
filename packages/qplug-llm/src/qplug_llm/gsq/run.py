"""The whole of `qcore tune`: every problem first, then measure, quantize, tune, measure, write.

The result is built beside its folder, in <out>.tune/, and takes its place at the end; an interrupted run leaves there what --resume goes on from.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from qcore.calibration.text import TextFile, cut, data_hash
from qcore.checkpoint import save
from qcore.cli.kit import take_place
from qcore.errors import CalibrationError, NotFound, PlanError, QcoreError
from qcore.evaluation import choose_text, default_window, evaluation_windows
from qcore.evaluation.metrics import nll_rows, perplexity
from qcore.model import adapter_for, load_source
from qcore.model.adapter import ModelAdapter
from qcore.model.reader import weights_fingerprint
from qcore.model.source import LoadedModel
from qcore.modules import serve_in
from qcore.pipeline import compute_dtype, float_forward, quantize_model
from qcore.plan import context_length
from qcore.plugins import load_registry
from qcore.recipe import Recipe
from qcore.recipe_file import dump, load_recipe
from qcore.training import AdamWSettings, TrainLog, TrainSettings, counting_saved, train
from torch import Tensor

from qplug_llm.gsq import adapters
from qplug_llm.gsq.model import TunedModel, adapt, linear_sites, next_token_loss, recipe_problems, weights_alone

Report = Callable[[str, int, int], None]
MARK = "run"  # a file that tells the folder of a run, also of one that was killed before it had anything to go on from


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the command line asked for; see `commands.tune`."""

    uri: str
    recipe: str
    data: Path
    out: Path
    overrides: tuple[str, ...] = ()
    evaluation: Path | None = None
    rank: int = 64
    alpha: float = 64.0
    steps: int = 200
    batch: int = 4
    accumulation: int = 1
    rate: float = 1e-3
    warmup: int = 10
    window: int | None = None
    eval_tokens: int = 4096
    seed: int = 0
    rounding: str = "spec"
    state_bits: int = 32
    hold: bool = False
    merge: bool = False
    keep_every: int = 50
    resume: bool = False
    force: bool = False

    @property
    def work(self) -> Path:
        """The folder beside the result in which a run works."""
        real = Path(os.path.realpath(self.out))
        return real.parent / f"{real.name}.tune"

    @property
    def state(self) -> Path:
        """The file that an interrupted run goes on from."""
        return self.work / "state.safetensors"

    def settings(self) -> TrainSettings:
        return TrainSettings(
            steps=self.steps,
            batch=self.batch,
            accumulation=self.accumulation,
            rate=self.rate,
            warmup=self.warmup,
            seed=self.seed,
            keep_every=self.keep_every,
            optimizer=AdamWSettings(state_bits=cast(Literal[32, 8], self.state_bits)),
        )


@dataclass(frozen=True)
class Prepared:
    """A job whose inputs were opened and found sound."""

    loaded: LoadedModel
    adapter: ModelAdapter
    recipe: Recipe
    settings: TrainSettings
    windows: Tensor
    held_out: Tensor
    note: str
    registry: Any


def prepare(job: Job) -> Prepared:
    """Open recipe and model, and find everything that stands against the job, all at once: PlanError lists it."""
    problems: list[str] = []

    def trial(make: Callable[[], Any]) -> Any:
        try:
            return make()
        except QcoreError as e:
            problems.append(str(e))
            return None

    registry = load_registry()
    recipe = trial(lambda: _recipe(job, registry))
    settings = trial(job.settings)
    loaded = trial(lambda: load_source(job.uri, registry.sources))
    adapter = None if loaded is None else trial(lambda: adapter_for(loaded.model, registry.adapters))
    problems += _out_problems(job)
    if job.rank < 1 or not job.alpha > 0:
        problems.append(f"--rank is at least 1 and --alpha positive, got {job.rank} and {job.alpha:g}")
    if job.rounding not in ("spec", "stochastic"):
        problems.append(f"--rounding is spec or stochastic, got {job.rounding!r}")
    if job.eval_tokens < 2:
        problems.append(f"--eval-tokens is at least 2, got {job.eval_tokens}")
    texts = trial(lambda: choose_text(job.data, job.evaluation))
    windows = held_out = None
    if loaded is not None and adapter is not None:
        if not hasattr(loaded.model, "get_output_embeddings"):
            problems.append(f"{loaded.name} is no language model of transformers, which is what can be tuned")
        else:
            adapter.prepare(loaded.model)
            topology = trial(lambda: adapter.topology(loaded.model))
            if topology is not None and not linear_sites(topology)[0]:
                problems.append(f"{loaded.name} has no linear layer in its blocks that can be adapted")
            elif topology is not None and recipe is not None:
                problems += recipe_problems(recipe, topology, loaded.model)
        context = context_length(loaded.model)
        if job.window is not None and (job.window < 2 or (context is not None and job.window > context)):
            problems.append(f"--window is 2 to {context or 'any number of'} tokens, got {job.window}")
        elif texts is not None:
            length = job.window or default_window(sum(p.numel() for p in loaded.model.parameters()), context)
            windows = trial(lambda: _training_windows(texts.calibration, loaded.tokenizer, length, job.batch))
            if job.eval_tokens >= 2:
                held_out = trial(lambda: evaluation_windows(texts.evaluation, loaded.tokenizer, max(job.eval_tokens, length), length))
    if problems or adapter is None or windows is None or held_out is None:
        raise PlanError(list(dict.fromkeys(problems)))
    note = f"trained on {texts.calibration.path.name}, evaluated on {texts.evaluation.path.name}" + (", its last 20 %" if texts.held_out else "")
    return Prepared(loaded, adapter, recipe, settings, windows, held_out, note, registry)


def _recipe(job: Job, registry: Any) -> Recipe:
    try:
        return load_recipe(job.recipe, registry, job.overrides)
    except NotFound as e:
        if not job.recipe.startswith("gsq") or "bfp" in registry.formats:
            raise
        raise NotFound(f"recipe {job.recipe!r} takes its formats from qplug-hardware, which is not installed: pip install qplug-hardware") from e


def _training_windows(text: TextFile, tokenizer: Any, length: int, batch: int) -> Tensor:
    windows = cut(text.tokens(tokenizer), length)
    if len(windows) < max(batch, 1):
        raise CalibrationError(
            f"training text {text.path} is too short: {len(windows)} windows of {length} tokens, {max(batch, 1)} in a batch; pass a longer text, "
            "a shorter --window or a smaller --batch"
        )
    return windows


def _out_problems(job: Job) -> list[str]:
    given, out = job.out, Path(os.path.realpath(job.out))
    if not job.out.name:
        return [f"-o {str(given)!r} has no name of its own; name a folder, as -o out/"]
    if out.is_file() or any(p.is_file() for p in out.parents):
        return [f"-o {given} is a file, or lies in one; name a folder"]
    if os.path.ismount(out):
        return [f"-o {given} is a mount point, and the result takes its place by a rename; name a folder inside it"]
    found = []
    if out.is_dir() and (there := sorted(p.name for p in out.iterdir())):
        if not job.force:
            found.append(f"-o {given} is not empty; name another folder, or pass --force to replace it")
        elif adapters.RECORD not in there:
            found.append(
                f"-o {given} holds no {adapters.RECORD}: this command did not write it, and --force does not replace it; name another folder"
            )
        used = [Path.cwd(), job.data, *([job.evaluation] if job.evaluation else []), Path(job.uri)]
        if job.force and any(Path(os.path.realpath(p)).is_relative_to(out) for p in used):
            found.append(f"-o {given} --force would delete what this run reads; name another folder")
    if job.work.exists() and not (job.work / MARK).exists() and any(job.work.iterdir()):
        found.append(f"{job.work} is where a run into {given} works, and no run made it; move it away, or name another folder")
    elif job.state.exists() and not (job.resume or job.force):
        found.append(f"{job.work.name}/ beside {given.name} holds an unfinished run; go on with --resume, or start anew with --force")
    return found


@torch.no_grad()
def score(forward: Callable[[Tensor], Tensor], windows: Tensor, report: Report, phase: str) -> float:
    """Perplexity of the tokens of each window after its first."""
    total, count = 0.0, 0
    for i, ids in enumerate(windows.split(4)):
        logits = forward(ids)
        rows = nll_rows(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        total, count = total + float(rows.sum()), count + len(rows)
        report(phase, min(4 * (i + 1), len(windows)), len(windows))
    return perplexity(total / count)


def quantize_base(ready: Prepared) -> bool:
    """Quantize the weights in place, as the recipe says, and say whether it says anything; else the float model is in memory."""
    own = weights_alone(ready.recipe, ready.adapter.topology(ready.loaded.model))
    if own is None:
        float_forward(ready.loaded, ready.adapter)
        return False
    solvers = [own.solver, *(r.solver for r in own.rules if r.solver is not None)]
    batches: list[Any] = []
    if any(s.observes for s in solvers):
        settings = own.calibration
        order = torch.randperm(len(ready.windows), generator=torch.Generator().manual_seed(settings.seed))
        batches = [{"input_ids": w} for w in ready.windows[order[: settings.samples]].split(settings.batch) if len(w) == settings.batch]
    quantize_model(ready.loaded, own, batches, registry=ready.registry, adapter=ready.adapter)
    return True


def kept_bytes(tuned: TunedModel, adapter: ModelAdapter, ids: Tensor) -> dict[str, int]:
    """Bytes that one forward pass keeps: of adapted layers, and of the whole model (each storage once; parameters and buffers not counted)."""
    tuned.tally.kept = 0
    with counting_saved(*tuned.model.parameters(), *tuned.model.buffers()) as seen:
        loss = next_token_loss(adapter.outputs(tuned.model, {"input_ids": ids}), ids)
    total = seen.total
    del loss
    return {"adapted_layers": tuned.tally.kept, "whole_model": total, "tokens": ids.numel()}


def execute(job: Job, ready: Prepared, report: Report) -> dict[str, Any]:
    """Everything after the checks; returns what `tune.json` holds, and leaves the result at `job.out`."""
    loaded, adapter = ready.loaded, ready.adapter
    if not job.resume:
        shutil.rmtree(job.work, ignore_errors=True)
    job.work.mkdir(parents=True, exist_ok=True)
    (job.work / MARK).touch()
    building = job.work / "result"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()

    def outputs(ids: Tensor) -> Tensor:
        return adapter.outputs(loaded.model, {"input_ids": ids})

    exact = float_forward(loaded, adapter)
    scores = {"float": score(lambda ids: exact({"input_ids": ids}), ready.held_out, report, "float model")}
    topology = adapter.topology(loaded.model)
    paths, frozen = linear_sites(topology)
    stored = quantize_base(ready)
    if stored:
        serve_in(loaded.model, loaded.dtype)
        save(
            loaded.model,
            building / adapters.BASE,
            registry=ready.registry,
            source=loaded.source,
            adapter=adapter.name,
            companions=loaded.write_companions,
            record={"recipe": ready.recipe.name},
        )
        serve_in(loaded.model, compute_dtype(loaded.dtype))
    rounding = cast(Literal["spec", "stochastic"], job.rounding)
    tuned = adapt(loaded.model, paths, ready.recipe, rank=job.rank, alpha=job.alpha, seed=job.seed, rounding=rounding, hold=job.hold)
    scores |= _scores(tuned, outputs, ready.held_out, report, "before")
    kept = kept_bytes(tuned, adapter, ready.windows[: job.batch])
    log = train(
        tuned.parameters(),
        lambda i: next_token_loss(outputs(ready.windows[i]), ready.windows[i]),
        len(ready.windows),
        ready.settings,
        begin=tuned.dither.begin,
        file=job.state,
        content=f"{loaded.name} {weights_fingerprint(loaded.reader)}; {dump(ready.recipe)}; rank {job.rank}, alpha {job.alpha}, {job.rounding}; "
        + data_hash(ready.windows),
        resume=job.resume,
        progress=report,
    )
    zero = tuned.tally.fractions()
    scores |= _scores(tuned, outputs, ready.held_out, report, "after")
    adapters.write_adapters(tuned, building, alpha=job.alpha, base=job.uri, transposed=adapters.turned(tuned))
    if job.merge:
        adapters.write_merged(tuned, loaded, building / adapters.MERGED)
    record = _record(job, ready, tuned, log, scores, kept, zero, frozen)
    (building / adapters.RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    take_place(building, Path(os.path.realpath(job.out)))
    shutil.rmtree(job.work, ignore_errors=True)
    return record


def _scores(tuned: TunedModel, outputs: Callable[[Tensor], Tensor], windows: Tensor, report: Report, when: str) -> dict[str, float]:
    """Perplexity in the recipe's numbers, and with float products over the same weights and adapters."""
    own = score(outputs, windows, report, f"{when}, coded")
    with tuned.in_float():
        return {f"{when}_coded": own, f"{when}_float": score(outputs, windows, report, f"{when}, float")}


def _record(
    job: Job,
    ready: Prepared,
    tuned: TunedModel,
    log: TrainLog,
    scores: dict[str, float],
    kept: dict[str, int],
    zero: dict[str, float],
    frozen: dict[str, str],
) -> dict[str, Any]:
    return {
        "model": job.uri,
        "adapter": ready.adapter.name,
        "recipe": {"name": ready.recipe.name, "text": dump(ready.recipe)},
        "rank": job.rank,
        "alpha": job.alpha,
        "seed": job.seed,
        "rounding": job.rounding,
        "settings": repr(ready.settings),
        "data": {
            "note": ready.note,
            "training_windows": len(ready.windows),
            "window": ready.windows.shape[1],
            "training_sha256": data_hash(ready.windows),
            "evaluation_sha256": data_hash(ready.held_out),
        },
        "perplexity": scores,
        "losses": log.losses,
        "kept_for_backward": kept,
        "all_zero_gradient_groups": zero,
        "counted_from_step": log.resumed,
        "frozen": frozen | tuned.left,
        "layers": list(tuned.layers),
    }


def run(job: Job, *, dry_run: bool, as_json: bool) -> None:
    """Do the job and print what came out."""
    from qcore.cli.kit import progress, remark, table

    with progress() as report:
        ready = prepare(job)
        if dry_run:
            sites, left = linear_sites(ready.adapter.topology(ready.loaded.model))
            remark(f"{ready.loaded.name}: {len(sites)} layers to adapt, {len(left)} frozen; {ready.note}; nothing stands against the run")
            return
        try:
            record = execute(job, ready, report)
        except KeyboardInterrupt:
            if job.state.exists():
                remark(f"{job.work.name}/ holds the run; the same command with --resume goes on")
            else:
                shutil.rmtree(job.work, ignore_errors=True)
            raise
        except (QcoreError, OSError):
            if not job.state.exists():
                shutil.rmtree(job.work, ignore_errors=True)
            raise
    if as_json:
        print(json.dumps(record))
        return
    p = record["perplexity"]
    rows = [
        ("float model", f"{p['float']:.3f}", ""),
        ("quantized, not tuned", f"{p['before_float']:.3f}", f"{p['before_coded']:.3f}"),
        ("tuned", f"{p['after_float']:.3f}", f"{p['after_coded']:.3f}"),
    ]
    table(("perplexity on held-out text", "products in float", f"in {record['recipe']['name']}"), rows, right=(1, 2))
    kept = record["kept_for_backward"]
    remark(f"{record['data']['note']}; kept for backward by adapted layers: {kept['adapted_layers'] / kept['tokens']:,.0f} bytes a token")
    if record["all_zero_gradient_groups"]:
        remark("all-zero groups of gradients: " + ", ".join(f"{k} {100 * v:.2f} %" for k, v in record["all_zero_gradient_groups"].items()))
    print(f"written: {job.out}/")
