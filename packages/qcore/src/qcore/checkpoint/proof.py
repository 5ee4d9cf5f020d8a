"""Open a checkpoint as its consumer does, run it beside the model that was saved, and write down how far apart they are.

A checkpoint that loads is no proof: a loader may round scales, tie what was untied, or leave a layer random.  The consumer of the
compressed-tensors layout is transformers; of the qcore layout it is `qcore.checkpoint.load`.

What transformers loads is compared as it is stored: float inputs, every weight dequantized, on both sides.  How it runs is another matter, and is
noted beside: compressed-tensors scales dynamic int8 inputs by amax / 127.5 where qcore and vLLM take amax / 127, it rounds those scales to bfloat16
in a bfloat16 model, and it knows none of our kernels.
"""

import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qcore.checkpoint.load import load
from qcore.checkpoint.manifest import Manifest
from qcore.errors import CheckpointError
from qcore.model.adapter import adapter_for
from qcore.modules import as_stored
from qcore.plugins import load_registry

PROOF = "proof.json"
# root mean square of differences, relative to that of outputs, that still counts as rounding: sums in another order
CLOSE = {"float64": 1e-9, "float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
Outputs = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What was compared, and how it came out.

    level:          "identical": every output bit for bit; "close": relative_difference is within the tolerance; "different"
    max_difference: largest absolute difference of outputs;  max_output: largest absolute output of the saved model
    relative_difference: root mean square of differences over that of the outputs
    as_run: the same, of the two models as they run, with quantized inputs and kernels; equal where nothing but the reference runs
    loader:         who opened the checkpoint
    fresh:          whether that was another process
    """

    level: Literal["identical", "close", "different"]
    max_difference: float
    max_output: float
    relative_difference: float
    as_run: float
    tolerance: float
    batches: int
    loader: str
    fresh: bool
    versions: dict[str, str] = field(default_factory=dict)


def plain_outputs(model: nn.Module, batch: Any) -> Tensor:
    """Of a model that takes a tensor or keywords, and gives a tensor, or something with `logits`."""
    out = model(**batch) if isinstance(batch, dict) else model(batch)
    return out if isinstance(out, Tensor) else getattr(out, "logits", out[0])


@torch.no_grad()
def prove(
    folder: Path | str,
    model: nn.Module,
    batches: Sequence[Any],
    *,
    outputs: Outputs = plain_outputs,
    skeleton: nn.Module | None = None,
    registry: Any = None,
    fresh: bool = False,
) -> Proof:
    """Compare the checkpoint in `folder` with the `model` from which it was written, and write proof.json beside it.

    batches: one or two reference batches
    outputs: the adapter's, so that what is compared is what the family calls its output
    skeleton, registry: as of `load`, for the qcore layout
    fresh:   open it in another process, which shares no import and no cache with this one, by the source and the adapter that the manifest names,
             so it takes no skeleton and no registry from here; `outputs` are then what that adapter, or no adapter, makes of the model
    """
    folder = Path(folder)
    manifest = Manifest.read(folder)
    if not batches:
        raise CheckpointError("a proof compares outputs of at least one batch, got none")
    if fresh and skeleton is not None:
        raise CheckpointError("a fresh process takes no skeleton from this one; call it without, or with fresh=False")
    stored_only = manifest.layout == "compressed-tensors"
    as_run = _outputs(model, batches, outputs)
    if stored_only:
        with as_stored(model):
            mine = _outputs(model, batches, outputs)
    else:
        mine = as_run
    if fresh:
        loader, theirs, theirs_as_run = _in_fresh_process(folder, batches, stored_only, plain=outputs is plain_outputs)
    else:
        loader, other = open_as_consumer(folder, manifest, skeleton, registry)
        theirs, theirs_as_run = _both(other, batches, outputs, stored_only)
        del other
        gc.collect()
    proof = _compare(mine, theirs, _relative(as_run, theirs_as_run), CLOSE.get(manifest.dtype, 1e-4), loader, fresh)
    (folder / PROOF).write_text(json.dumps(asdict(proof), indent=1) + "\n", encoding="utf-8")
    return proof


def _outputs(model: nn.Module, batches: Sequence[Any], outputs: Outputs) -> list[Tensor]:
    return [outputs(model, batch).detach().cpu() for batch in batches]


def _both(model: nn.Module, batches: Sequence[Any], outputs: Outputs, stored_only: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of what a consumer opened: as it is stored, and as it runs."""
    as_run = _outputs(model, batches, outputs)
    if not stored_only:
        return as_run, as_run
    for m in model.modules():
        if hasattr(m, "quantization_scheme"):
            # compressed-tensors' own switch: weights stay as loaded, inputs stay float
            m.quantization_enabled = False  # type: ignore[assignment]
    return _outputs(model, batches, outputs), as_run


def open_as_consumer(folder: Path, manifest: Manifest, skeleton: nn.Module | None = None, registry: Any = None) -> tuple[str, nn.Module]:
    """(who opened it, the model)."""
    if manifest.layout == "qcore":
        return "qcore.checkpoint.load", load(folder, skeleton=skeleton, registry=registry)
    import transformers

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = (config.get("architectures") or ["AutoModelForCausalLM"])[0]
    cls = getattr(transformers, name, None)
    if cls is None:
        raise CheckpointError(f"{folder / 'config.json'} names the architecture {name!r}, which this transformers does not have")
    return f"transformers.{name}.from_pretrained", cls.from_pretrained(folder, dtype="auto").eval()


def _relative(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Root mean square of differences over that of `a`; NaN where outputs are no numbers."""
    if all(torch.equal(x, y) for x, y in zip(a, b, strict=True)):
        return 0.0
    one, other = (torch.cat([t.double().flatten() for t in ts]) for ts in (a, b))
    return float((one - other).norm() / one.norm())


def _compare(mine: Sequence[Tensor], theirs: Sequence[Tensor], as_run: float, tolerance: float, loader: str, fresh: bool) -> Proof:
    for a, b in zip(mine, theirs, strict=True):
        if a.shape != b.shape:
            raise CheckpointError(f"{loader} gives outputs of shape {tuple(b.shape)}, the saved model {tuple(a.shape)}")
    same = all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    difference = max(float((a.double() - b.double()).abs().max()) if a.numel() else 0.0 for a, b in zip(mine, theirs, strict=True))
    largest = max(float(a.double().abs().max()) if a.numel() else 0.0 for a in mine)
    relative = _relative(mine, theirs)
    # NaN compares false: outputs that are no numbers are different
    level: Literal["identical", "close", "different"] = "identical" if same else "close" if relative <= tolerance else "different"
    return Proof(
        level=level,
        max_difference=difference,
        max_output=largest,
        relative_difference=relative,
        as_run=as_run,
        tolerance=tolerance,
        batches=len(mine),
        loader=loader,
        fresh=fresh,
        versions=versions_here(),
    )


def versions_here() -> dict[str, str]:
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in ("qcore", "torch", "transformers", "compressed-tensors", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _in_fresh_process(folder: Path, batches: Sequence[Any], stored_only: bool, plain: bool) -> tuple[str, list[Tensor], list[Tensor]]:
    with tempfile.TemporaryDirectory() as scratch:
        given, found = Path(scratch) / "batches.pt", Path(scratch) / "outputs.pt"
        torch.save({"batches": list(batches), "stored_only": stored_only, "plain": plain, "threads": torch.get_num_threads()}, given)
        command = [
            sys.executable,
            "-c",
            "import sys; from qcore.checkpoint.proof import _child; _child(*sys.argv[1:])",
            str(folder),
            str(given),
            str(found),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CheckpointError(f"a fresh process cannot open {folder}:\n{done.stderr.strip()[-2000:]}")
        result = torch.load(found, weights_only=True)
        return result["loader"], result["theirs"], result["as_run"]


@torch.no_grad()
def _child(folder: str, given: str, found: str) -> None:
    """What runs in the fresh process."""
    manifest = Manifest.read(Path(folder))
    loader, model = open_as_consumer(Path(folder), manifest)
    task = torch.load(given, weights_only=True)
    torch.set_num_threads(task["threads"])  # sums in the same order
    outputs: Outputs = plain_outputs
    if not task["plain"]:
        outputs = adapter_for(model, load_registry().adapters, manifest.adapter or None).outputs
    theirs, as_run = _both(model, task["batches"], outputs, task["stored_only"])
    torch.save({"loader": loader, "theirs": theirs, "as_run": as_run}, found)
