"""The main job, step by step: plan, float reference, quantize, save, prove, evaluate what was saved, report."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcore.cli._options import window_length
from qcore.cli._records import content_of, kernels_of, make_report, record_of
from qcore.processes import Alone

if TYPE_CHECKING:
    from qcore.checkpoint.journal import Journal
    from qcore.evaluation import ModelData, Report, TextPair
    from qcore.model import LoadedModel, ModelAdapter
    from qcore.plan import Plan
    from qcore.plugins import Registry
    from qcore.processes import Processes
    from qcore.recipe import Recipe

# of the evaluation text, on which each module is float again once
ATTRIBUTE_TOKENS = 512


@dataclass
class Steps:
    """The parts of the pipeline that this command strings together; tests put others in their place."""

    float_forward: Callable[..., Any]
    quantize_model: Callable[..., Any]
    save: Callable[..., Any]
    prove: Callable[..., Any]
    load: Callable[..., Any]
    streamed_float: Callable[..., Any]
    prove_structure: Callable[..., Any]
    stream: Callable[..., Any]

    @classmethod
    def real(cls) -> "Steps":
        from qcore import checkpoint, pipeline
        from qcore.checkpoint.stream import stream

        return cls(
            pipeline.float_forward,
            pipeline.quantize_model,
            _serve_and_save,
            checkpoint.prove,
            checkpoint.load,
            pipeline.streamed_float,
            checkpoint.prove_structure,
            stream,
        )


def _serve_and_save(model: Any, folder: Path, *, dtype: Any, **options: Any) -> None:
    """Give the model in place the dtype in which it is served, and write it."""
    from qcore.checkpoint import save
    from qcore.modules import serve_in

    serve_in(model, dtype)
    save(model, folder, **options)


@dataclass
class Job:
    """What is to be done, all inputs checked and in hand."""

    loaded: "LoadedModel"
    recipe: "Recipe"
    adapter: "ModelAdapter"
    registry: "Registry"
    text: "TextPair | ModelData"
    eval_tokens: int = 4096
    window: int | None = None
    overrides: Sequence[str] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    meter: Any = None
    max_ram: int | None = None
    stream: bool = False
    resume: bool = False
    uri: str = ""
    attribute: bool = False
    steps: Steps | None = None
    processes: "Processes" = field(default_factory=Alone)
    engine: str | None = None
    tensor_parallel: int = 1
    fresh_proof: bool = False
    dry_run: bool = False

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        from qcore.budget import return_freed_memory

        started = time.perf_counter()
        with nullcontext() if self.meter is None else self.meter.during(phase):
            yield
            return_freed_memory()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started
        if self.meter is not None:
            self.meter.sample()


def run_quantize(
    job: Job, out: Path, progress: Callable[[str, int, int], None] = lambda phase, done, total: None, show: Callable[[Any], None] = lambda plan: None
) -> "Report | None":
    """The main job.  Returns the report that it wrote into `out`; when anything stops it, `out` is as it was.

    None in all processes but the first, which help to quantize and are done then, and of a dry run, which ends before anything is computed.
    """
    from qcore.cli._data import data_problems
    from qcore.cli._run_folder import running_into
    from qcore.plan import make_plan
    from qcore.reporting import render

    loaded = job.loaded
    plan = make_plan(
        loaded,
        job.recipe,
        job.adapter,
        job.registry,
        has_data=has_data(job.recipe, job.text),
        max_ram=job.max_ram,
        stream=job.stream,
        processes=job.processes.count,
        engine=job.engine,
        tensor_parallel=job.tensor_parallel,
        eval_tokens=job.eval_tokens if job.text.evaluation is not None else 0,
    )
    found = data_problems(loaded, job.recipe, job.text, calibrates=plan.needs_data, eval_tokens=job.eval_tokens, window=job.window)
    if job.attribute and job.text.evaluation is None:
        found.append("--attribute cannot be done: there is no evaluation text: pass --eval")
    if job.attribute and plan.budget is not None and plan.budget.stream:
        found.append("--attribute cannot be done: this run is streamed, and each module is put back in a whole model in memory")
    replace(plan, problems=(*plan.problems, *found)).require()
    with job.timed("data"):
        batches = calibration_batches(job, streamed=plan.budget is not None and plan.budget.stream, progress=progress) if plan.needs_data else []
        task = evaluation_task(job)
    show(plan)
    if job.dry_run:
        return None
    run = _Run(job, plan, batches, task, progress)
    with running_into(out, content_of(job, batches), resume=job.resume, processes=job.processes) as (journal, folder):
        if job.processes.rank:
            run.solved(journal)
            return None
        reference = run.reference(journal.folder / "reference")
        result, proof = run.quantized(journal, folder)
        rows, phases, notes, ledger = list(result.sites), dict(result.seconds), list(result.notes), result.coverage.to_dict()
        del result
        quality, kernels = run.quality(folder, reference, [row.site for row in rows])
        report = make_report(job, plan, rows, phases, notes, batches, task, quality, proof, kernels, folder, ledger, run.histograms, run.attribution)
        report.write(folder / "report.json")
        (folder / "report.html").write_text(render(report.to_dict()), encoding="utf-8")
    return report


class _Run:
    """The steps of one job, with the model in memory or streamed, as the plan says."""

    def __init__(self, job: Job, plan: "Plan", batches: Sequence[Any], task: Any, progress: Callable[[str, int, int], None]) -> None:
        self.job, self.plan, self.batches, self.task, self.progress = job, plan, batches, task, progress
        self.steps = job.steps or Steps.real()
        self.stream = plan.budget is not None and plan.budget.stream
        self.histograms: dict[str, Any] = {}
        self.attribution: dict[str, Any] = {}
        if self.stream:
            from qcore.budget import return_freed_memory

            return_freed_memory(always=True)

    def reference(self, place: Path) -> Any:
        """What the float model puts out; that of an interrupted run is used again."""
        from qcore.cli._weights import require_finite_floats
        from qcore.evaluation import Reference
        from qcore.evaluation.histograms import Magnitudes, leaves_of, to_data, watching_inputs
        from qcore.pipeline.floats import require_finite_weights

        if self.task is None:
            require_finite_floats(self.job.loaded, self.plan)
            return None
        seen = place / "histograms.json"
        with self.job.timed("reference"):
            if (place / "reference.json").is_file() and (kept := Reference.open(place)).data == self.task.data():
                self.histograms = json.loads(seen.read_text()) if seen.is_file() else {}
                return kept
            loaded = self.job.loaded
            if self.stream:
                forward: Any = self.steps.streamed_float(loaded, self.job.adapter)
            else:
                forward = self.steps.float_forward(loaded, self.job.adapter)
                require_finite_weights(loaded.model)
            inputs: dict[str, Magnitudes] = {}
            with watching_inputs(loaded.model, leaves_of(d.site for d in self.plan.decisions), inputs):
                reference = self.task.reference(forward, place, self.progress)
            self.histograms = to_data(input_before=inputs)
            seen.write_text(json.dumps(self.histograms))
            del forward
            free(loaded.model)
            return reference

    def solved(self, journal: "Journal") -> Any:
        """Quantize the model in place."""
        from qcore.pipeline.allocation import with_kept_allocation

        with self.job.timed("quantize"):
            result = self.steps.quantize_model(
                self.job.loaded,
                with_kept_allocation(self.job.recipe, journal, self.job.registry),
                self.batches,
                registry=self.job.registry,
                adapter=self.job.adapter,
                progress=self.progress,
                journal=journal,
                stream=self.stream,
                keep=self.plan.budget.keep if self.plan.budget is not None else 2 << 30,
                processes=self.job.processes,
            )
            self.job.processes.part()
            return result

    def quantized(self, journal: "Journal", folder: Path) -> tuple[Any, Mapping[str, Any]]:
        """Quantize, save, and prove what was saved."""
        from qcore.checkpoint.rewrite_file import KEPT, NONE, write_rewrite

        job, loaded = self.job, self.job.loaded
        result = self.solved(journal)
        kept = NONE if result.rewrite.empty else KEPT
        with job.timed("save"):
            self.steps.save(
                result.model,
                folder,
                source=loaded.source,
                adapter=job.adapter.name,
                companions=loaded.write_companions,
                dtype=loaded.dtype,
                record=record_of(job, self.batches) | {"coverage": result.coverage.to_dict(), "rewrite": kept},
                registry=job.registry,
                values=result.values,
            )
            if kept == KEPT:
                write_rewrite(folder, result.rewrite)
        proof: Mapping[str, Any] = {"level": "not proved: there is no data to run"}
        with job.timed("prove"):
            if self.stream:
                proof = asdict(self.steps.prove_structure(folder, result.values, registry=job.registry))
            elif samples := proof_batches(self.task, self.batches, loaded.tokenizer):
                proof = proved(
                    self.steps.prove(folder, result.model, samples, outputs=job.adapter.outputs, registry=job.registry, fresh=job.fresh_proof)
                )
        return result, proof

    def quality(self, folder: Path, reference: Any, sites: Sequence[str]) -> tuple[Mapping[str, Any] | None, dict[str, Any]]:
        """How far what was saved is from the float model, and which kernels run it; histograms and attribution on the way."""
        from qcore.evaluation.histograms import Magnitudes, leaves_of, to_data, watching_inputs
        from qcore.modules import serve_in
        from qcore.pipeline import compute_dtype

        job = self.job
        # in the dtype of the reference: what is measured is the quantization, not another rounding of sums
        computed = compute_dtype(job.loaded.dtype)
        forward: Any
        with job.timed("reload"):
            if self.stream:
                forward = self.steps.stream(folder, job.adapter, registry=job.registry)
                model = forward.model
            else:
                model = self.steps.load(folder, registry=job.registry)
                forward = partial(job.adapter.outputs, model)
        kernels = kernels_of(model)
        leaves = leaves_of(sites)
        with job.timed("histograms"):
            self._weights(folder, model, leaves)
        if self.task is None or reference is None:
            return None, kernels
        if self.stream:
            forward.serve(computed)
        else:
            serve_in(model, computed)
        inputs: dict[str, Magnitudes] = {}
        with job.timed("evaluate"), watching_inputs(model, leaves, inputs):
            scores = self.task.evaluate(forward, reference, self.progress)
        self._add(to_data(input_after=inputs))
        if job.attribute:
            with job.timed("attribute"):
                self.attribution = self._attributed(folder, model, reference)
        computed_in = str(computed).removeprefix("torch.")
        return {"task": self.task.name, "computed_in": computed_in, "reference_precision": reference.precision, "scores": scores}, kernels

    def _add(self, data: Mapping[str, Any]) -> None:
        for kind, own in data.items():
            self.histograms[kind] = {**self.histograms.get(kind, {}), **own}

    def _weights(self, folder: Path, model: Any, leaves: Sequence[Any]) -> None:
        """Histograms of the weights, float and stored."""
        from qcore.checkpoint import MANIFEST, Manifest
        from qcore.checkpoint.load import open_shards
        from qcore.evaluation.histograms import float_weights, stored_weights, to_data

        if (folder / MANIFEST).is_file():
            after = stored_weights(model, leaves, open_shards(folder, Manifest.read(folder)))
            self._add(to_data(weight_before=float_weights(self.job.loaded.reader, leaves), weight_after=after))

    def _attributed(self, folder: Path, model: Any, reference: Any) -> dict[str, Any]:
        """Which modules the loss comes from."""
        from qcore.checkpoint import Manifest
        from qcore.checkpoint.load import skeleton_of
        from qcore.cli._models import float_again
        from qcore.evaluation import attribute, part_of

        job = self.job
        skeleton = skeleton_of(folder, Manifest.read(folder), job.registry)
        again = float_again(folder, model, skeleton, job.loaded.reader, job.adapter, job.registry)
        return attribute(again, *part_of(self.task, reference, ATTRIBUTE_TOKENS), self.progress).to_dict()


def evaluation_task(job: Job) -> Any:
    """What the float model and the quantized one are compared on; None without evaluation data."""
    from qcore.evaluation import LanguageModeling, TextPair, evaluation_windows

    if not isinstance(job.text, TextPair):
        return job.text.task()
    if job.text.evaluation is None:
        return None
    length = window_length(job.window, job.loaded.model)
    return LanguageModeling(evaluation_windows(job.text.evaluation, job.loaded.tokenizer, job.eval_tokens, length))


def has_data(recipe: "Recipe", text: "TextPair | ModelData") -> bool:
    """Whether there will be calibration batches: a text, or a source that needs none."""
    source = recipe.calibration.source
    return text.calibration is not None or (source is not None and not source.needs_text())


def calibration_batches(job: Job, streamed: bool, progress: Callable[[str, int, int], None]) -> list[Any]:
    """Windows of the calibration text, or what the recipe's source makes with the float model, which is in memory only meanwhile."""
    from qcore.calibration.text import start_batches, to_batches
    from qcore.errors import CalibrationError
    from qcore.evaluation import TextPair
    from qcore.pipeline.floats import require_finite_weights

    settings, model = job.recipe.calibration, job.loaded.model
    if not isinstance(job.text, TextPair):
        return job.text.batches(settings)
    text = job.text.calibration
    if settings.source is None:
        return list(text.batches(job.loaded.tokenizer, settings)) if text else []
    windows = settings.source.kept(model, settings)
    if windows is None and streamed:
        raise CalibrationError(
            f"calibration source {settings.source.name!r} makes its data with the whole float model in memory, and this run is streamed; "
            "make it once where the model fits (calibration.source.path names the file that keeps it), or use text: --set calibration.source=none"
        )
    if windows is None:
        own = text.windows(job.loaded.tokenizer, settings) if text is not None and settings.source.needs_text() else None
        (job.steps or Steps.real()).float_forward(job.loaded, job.adapter)
        require_finite_weights(model)
        windows = settings.source.windows(model, settings, own, progress)
        free(model)
    return [*to_batches(windows, settings.batch), *start_batches(windows, settings.starts, settings.starts_weight, settings.seed)]


def free(model: Any) -> None:
    """Give back the memory of a float model in place; tied parameters stay tied."""
    from qcore.model.reader import release, retie, tied_groups

    ties = tied_groups(model)
    release(model)
    retie(model, ties)


def proof_batches(task: Any, batches: Sequence[Any], tokenizer: Any) -> list[Any]:
    """One batch to run the saved and the reopened model on; for a language model without any text, some first ids of its vocabulary."""
    import torch

    if task is not None:
        return [task.sample()]
    if batches:
        return [batches[0]]
    return [{"input_ids": torch.arange(1, 17).unsqueeze(0)}] if tokenizer is not None else []


def proved(proof: Any) -> dict[str, Any]:
    """The proof as data; CheckpointError when the reopened model is another one than the one that was saved."""
    from qcore.errors import CheckpointError

    if proof.level == "different":
        raise CheckpointError(
            f"the checkpoint loads with {proof.loader}, but its outputs differ from the saved model's by {proof.max_difference:.3g} "
            f"(largest output {proof.max_output:.3g}, tolerance {proof.tolerance:g}); nothing was written. "
            "This is a defect: report it with `qcore plan --json` of this run"
        )
    return asdict(proof)
