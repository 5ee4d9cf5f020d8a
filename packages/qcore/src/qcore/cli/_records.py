"""What a run leaves behind in words: what it is made of, how a checkpoint was made, and the report."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qcore.cli._job import Job
    from qcore.evaluation import Report


def content_of(job: "Job", batches: Sequence[Any]) -> dict[str, Any]:
    """All that decides the bytes of a run, so that a resumed one is known to be the same."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    import qcore
    from qcore.calibration.text import data_hash
    from qcore.evaluation import inputs_of
    from qcore.model.reader import weights_fingerprint
    from qcore.recipe_file import dump

    versions = {"qcore": qcore.__version__, "torch": torch.__version__}
    for record in getattr(job.registry, "plugins", ()):
        versions[record.distribution] = record.version
    for name in ("transformers", "compressed-tensors", "qcore-kernels"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "model": job.loaded.name,
        "weights": weights_fingerprint(job.loaded.reader),
        "dtype": str(job.loaded.dtype).removeprefix("torch."),
        "adapter": job.adapter.name,
        "recipe": dump(job.recipe),
        "calibration": data_hash(*(t for b in batches for t in inputs_of(b))) if batches else None,
        "threads": torch.get_num_threads(),
        "processes": job.processes.count,
        "versions": dict(sorted(versions.items())),
    }


def record_of(job: "Job", batches: Sequence[Any]) -> dict[str, Any]:
    """What a checkpoint's manifest says about how it was made."""
    import torch

    from qcore.calibration.text import data_hash
    from qcore.evaluation import inputs_of
    from qcore.model.reader import weights_fingerprint
    from qcore.recipe_file import dump

    return {
        "model": job.uri or job.loaded.name,
        "weights": weights_fingerprint(job.loaded.reader),
        "threads": torch.get_num_threads(),
        "processes": job.processes.count,
        "recipe": job.recipe.name,
        "toml": dump(job.recipe),
        "seed": job.recipe.calibration.seed,
        "calibration_sha256": data_hash(*(t for b in batches for t in inputs_of(b))) if batches else None,
    }


def make_report(
    job: "Job",
    plan: Any,
    records: Sequence[Any],
    phases: Mapping[str, float],
    notes: Sequence[str],
    batches: Sequence[Any],
    task: Any,
    quality: Mapping[str, Any] | None,
    proof: Any,
    kernels: Mapping[str, tuple[str, tuple[tuple[str, str], ...]]],
    folder: Path,
    ledger: Mapping[str, Any],
    histograms: Mapping[str, Any],
    attribution: Mapping[str, Any],
) -> "Report":
    """Everything that was learnt, in one record."""
    import platform

    import torch

    import qcore
    from qcore.evaluation.report import Report, SiteRow
    from qcore.recipe_file import dump

    sites = []
    for r in records:
        kernel, refused = kernels.get(leaf_of(r.site), ("–", ()))
        values = 1
        for n in r.shape:
            values *= n
        sites.append(SiteRow(r.site, r.spec, r.solver, r.packing, kernel, refused, r.error, r.of, r.bits, r.nbytes, values, r.seconds, r.remarks))
    quantized = sum(row.values for row in sites)
    packed = sum(row.bytes for row in sites)
    parameters = sum(p.numel() for p in job.loaded.model.parameters()) if not records else plan.bytes_before // job.loaded.dtype.itemsize
    return Report(
        model={
            "name": job.loaded.name,
            "source": job.loaded.source,
            "dtype": str(job.loaded.dtype).removeprefix("torch."),
            "parameters": parameters,
            "notes": [*job.loaded.notes, *notes],
        },
        recipe={"name": job.recipe.name, "overrides": list(job.overrides), "toml": dump(job.recipe)},
        data={
            "note": job.text.note(calibrated=bool(batches), source=job.recipe.calibration.source.name if job.recipe.calibration.source else ""),
            **_data_record(job, batches, task),
        },
        size={
            "before_bytes": plan.bytes_before,
            "after_bytes": sum(f.stat().st_size for f in folder.glob("*.safetensors")),
            "float_bits": 8 * job.loaded.dtype.itemsize,
            "effective_bits": round(8 * packed / quantized, 4) if quantized else None,
            "quantized_values": quantized,
        },
        quality=quality,
        sites=sites,
        left_float=plan.left_float,
        refused=plan.refused,
        coverage={"weights_quantized": len(sites), "share_of_parameters": round(quantized / parameters, 4) if parameters else 0.0}
        | ({"experts": ledger} if ledger["stacks"] else {}),
        seconds={k: round(v, 3) for k, v in job.seconds.items()},
        phases={k: round(v, 3) for k, v in phases.items()},
        memory=job.meter.to_dict() if job.meter is not None else {},
        proof=proof,
        versions={
            "qcore": qcore.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": str(torch.get_num_threads()),
        },
        histograms=histograms,
        attribution=attribution,
    )


def _data_record(job: "Job", batches: Sequence[Any], task: Any) -> Mapping[str, Any]:
    """How much calibration and evaluation data there was, of what, and its sha256."""
    from qcore.calibration.text import data_hash
    from qcore.evaluation import TextPair

    if not isinstance(job.text, TextPair):
        return job.text.record(batches, task)
    return {
        "calibration": _data(job.text.calibration, [b["input_ids"] for b in batches], data_hash, job.recipe.calibration.source),
        "evaluation": _data(job.text.evaluation, [task.windows] if task is not None else [], data_hash),
    }


def _data(text: Any, windows: Sequence[Any], digest: Callable[..., str], source: Any = None) -> dict[str, Any] | None:
    if (text is None and source is None) or not windows:
        return None
    read = {} if text is None or (source is not None and not source.needs_text()) else {"file": text.path.name, "part": [text.start, text.stop]}
    return {
        **read,
        **({} if source is None else {"source": repr(source)}),
        "windows": sum(len(w) for w in windows),
        "window": windows[0].shape[1],
        "tokens": sum(w.numel() for w in windows),
        "sha256": digest(*windows),
    }


def leaf_of(site: str) -> str:
    """The path of the module that runs a site's weight: "layers.0.experts:up_proj[3]" runs as "layers.0.experts.up_proj.3"."""
    module, _, own = site.partition(":")
    name, bracket, part = own.partition("[")
    return f"{module}.{name}.{part.removesuffix(']')}" if bracket and ":" not in part else module


def kernels_of(model: Any) -> dict[str, tuple[str, tuple[tuple[str, str], ...]]]:
    """Path of each module that runs from packed parts → its kernel, and why each better-ranked one was refused."""
    found = {}
    for path, module in model.named_modules():
        explain = getattr(module, "explain", None)
        if callable(explain):
            choice = explain()
            found[path] = (choice.kernel.name, tuple(choice.refused))
    return found
