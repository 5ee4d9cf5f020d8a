"""`qcore verify`: whether a checkpoint is whole, and whether its recipe makes the same bytes again."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qcore.cli._options import CalibOption, EvalOption, JsonOption, open_model, registry

if TYPE_CHECKING:
    from qcore.checkpoint import Manifest
    from qcore.plugins import Registry

CheckpointArg = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A folder that `qcore quantize` wrote.", show_default=False)]
# what holds times and outputs of one machine
NOT_PROMISED = ("report.json", "report.html", "proof.json")


def verify(
    checkpoint: CheckpointArg,
    reproduce: Annotated[bool, typer.Option("--reproduce", help="Quantize again from the recorded recipe, and compare every byte.")] = False,
    model: Annotated[str | None, typer.Option("--model", help="The float model [default: the recorded address].", show_default=False)] = None,
    calib: CalibOption = None,
    evaluation: EvalOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read every tensor of a checkpoint as its loader would, and compare every weights file with its hash; with --reproduce also make it anew.

    The same machine, versions and number of threads give the same bytes; give the same --calib (and --eval, if it was given then).

    Example: qcore verify out/ --reproduce
    """
    from qcore.cli._show import print_json, table

    own = registry()
    found = whole(checkpoint, own)
    if reproduce:
        found["files_reproduced"] = reproduced(checkpoint, own, model, calib, evaluation)
    if as_json:
        print_json(found)
    else:
        table(("", str(checkpoint)), [(k.replace("_", " "), str(v)) for k, v in found.items()])


def whole(folder: Path, own: "Registry") -> dict[str, Any]:
    """Counts of what was read; CheckpointError for whatever is missing, cut, changed, of another shape, or decodes to no number."""
    import torch

    from qcore.checkpoint import MANIFEST, Manifest
    from qcore.checkpoint.load import check_fit, install, open_shards, skeleton_of
    from qcore.errors import CheckpointError
    from qcore.modules import StoredWeight

    manifest = Manifest.read(folder)
    manifest.require(own, str(folder / MANIFEST))
    reader = open_shards(folder, manifest)
    model = install(skeleton_of(folder, manifest, own), manifest, own)
    check_fit(model, manifest, reader, folder)
    inside: set[str] = set()
    decoded = size = 0
    for path, module in model.named_modules():
        if not isinstance(module, StoredWeight):
            continue
        names = {part: f"{path}.{buffer}" for part, buffer in module._buffer_of.items()}
        inside |= set(names.values())
        parts = {part: reader[name] for part, name in names.items()}
        size += sum(t.numel() * t.element_size() for t in parts.values())
        if not torch.isfinite(module.packing.unpack(parts, module.spec, module.shape).dequantize()).all():
            raise CheckpointError(f"{folder}: {path} decodes to NaN or infinity; the file is corrupt: fetch it again")
        decoded += 1
    for name in reader.names():
        if name not in inside:
            t = reader[name]
            size += t.numel() * t.element_size()
            if t.is_floating_point() and not torch.isfinite(t.float()).all():
                raise CheckpointError(f"{folder}: {name} holds NaN or infinity; the file is corrupt: fetch it again")
    return {
        "layout": manifest.layout,
        "tensors": len(list(reader.names())),
        "packed_weights_decoded": decoded,
        "bytes": size,
        "files_hashed": unchanged(folder, manifest),
    }


def unchanged(folder: Path, manifest: "Manifest") -> int:
    """How many weights files have the SHA-256 that the manifest says, all that it says one of; CheckpointError names one that has another."""
    from qcore.checkpoint.manifest import content_hash
    from qcore.errors import CheckpointError

    hashed = [name for name in manifest.files if name in manifest.sha256]
    for name in hashed:
        if (found := content_hash(folder / name)) != (said := manifest.sha256[name]):
            raise CheckpointError(
                f"{folder / name} has SHA-256 {found[:16]}…, the manifest says {said[:16]}…: it was changed after it was written, fetch it again"
            )
    return len(hashed)


def reproduced(folder: Path, own: "Registry", model: str | None, calib: Path | None, evaluation: Path | None) -> int:
    """How many files came out the same, all of them; CheckpointError names those that did not, and what was different about the run."""
    from dataclasses import replace

    import torch

    from qcore.checkpoint import Manifest
    from qcore.cli._job import Job, run_quantize
    from qcore.cli._progress import progress
    from qcore.errors import CheckpointError, NotFound
    from qcore.evaluation import choose_data
    from qcore.model.reader import weights_fingerprint
    from qcore.recipe_file import parse_recipe

    manifest = Manifest.read(folder)
    record = manifest.record
    if missing := [key for key in ("toml", "recipe", "threads", "weights") if key not in record]:
        raise CheckpointError(f"{folder} does not record how it was made ({', '.join(missing)} is missing); it was written by an older qcore")
    try:
        loaded, adapter = open_model(model or str(record["model"]), own, manifest.adapter or None)
    except NotFound as e:
        if model is not None:
            raise
        raise NotFound(
            f"{folder} was made from {record['model']!r}, as seen from where that run was started; pass --model where it is now\n{e}"
        ) from e
    recipe = parse_recipe(str(record["toml"]), own, str(record["recipe"]))
    text = replace(choose_data(loaded, calib, evaluation), evaluation=None)
    check_inputs(folder, record, {"weights": weights_fingerprint(loaded.reader), **calibration_of(loaded, recipe, text, record)})
    torch.set_num_threads(int(record["threads"]))
    job = Job(loaded, recipe, adapter, own, text, uri=str(record["model"]))
    with tempfile.TemporaryDirectory() as scratch, progress() as report:
        again = Path(scratch) / "again"
        run_quantize(job, again, report)
        made = Manifest.read(again).record
        check_inputs(folder, record, {k: made.get(k) for k in ("weights", "calibration_sha256")})
        names = sorted({p.name for f in (folder, again) for p in f.iterdir()} - set(NOT_PROMISED))
        differing = [n for n in names if not _same(folder / n, again / n)]
    if differing:
        raise CheckpointError(f"{folder} was not reproduced: {', '.join(differing)} came out different; are machine and versions the same?")
    return len(names)


def check_inputs(folder: Path, record: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """CheckpointError where a run has other inputs than the recorded one."""
    from qcore.errors import CheckpointError

    if unlike := [k for k in now if now[k] != record.get(k)]:
        raise CheckpointError(
            f"{folder} was made of other {' and '.join(unlike)}: {record.get(unlike[0])}, now {now[unlike[0]]}; "
            "pass the --model and --calib that it was made with"
        )


def calibration_of(loaded: Any, recipe: Any, text: Any, record: Mapping[str, Any]) -> dict[str, Any]:
    """The hash of the calibration windows, where it is known before the run: of a text that is there, and that the recorded run looked at."""
    from qcore.calibration.text import data_hash
    from qcore.evaluation import TextPair, inputs_of

    if not isinstance(text, TextPair) or text.calibration is None or recipe.calibration.source is not None or not record.get("calibration_sha256"):
        return {}
    batches = text.calibration.batches(loaded.tokenizer, recipe.calibration)
    return {"calibration_sha256": data_hash(*(t for batch in batches for t in inputs_of(batch)))}


def _same(a: Path, b: Path) -> bool:
    return a.is_file() and b.is_file() and a.read_bytes() == b.read_bytes()
