"""Models to run: float ones by their address, quantized ones by their folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qcore.evaluation import Candidate
    from qcore.plugins import Registry


@dataclass(frozen=True)
class Opened:
    """A model that runs.

    candidate:   for comparisons
    tokenizer, model: for windows of text;  evaluation: text that its source brings, or None
    """

    candidate: "Candidate"
    tokenizer: Any
    model: Any
    evaluation: Path | None


def is_checkpoint(uri: str) -> bool:
    """Whether `qcore quantize` wrote this folder."""
    from qcore.checkpoint import is_checkpoint

    return Path(uri).is_dir() and is_checkpoint(Path(uri))


def open_any(uri: str, own: "Registry", adapter: str | None = None) -> Opened:
    """The model behind an address or in a folder, ready to run."""
    return _open_checkpoint(Path(uri), own, adapter) if is_checkpoint(uri) else _open_float(uri, own, adapter)


def _open_float(uri: str, own: "Registry", adapter: str | None) -> Opened:
    from qcore.cli._options import open_model
    from qcore.evaluation import Candidate
    from qcore.pipeline import float_forward

    loaded, chosen = open_model(uri, own, adapter)
    size = sum(p.numel() for p in loaded.model.parameters()) * loaded.dtype.itemsize
    candidate = Candidate(loaded.name, float_forward(loaded, chosen), bytes=size, notes=loaded.notes)
    return Opened(candidate, loaded.tokenizer, loaded.model, loaded.evaluation)


def _open_checkpoint(folder: Path, own: "Registry", adapter: str | None) -> Opened:
    from qcore.checkpoint import load, tokenizer_of
    from qcore.evaluation import Candidate, read_report
    from qcore.model import adapter_for

    model = load(folder, registry=own)
    chosen = adapter_for(model, own.adapters, adapter)
    size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    report = read_report(folder) if (folder / "report.json").exists() else {}
    bits = report.get("size", {}).get("effective_bits")
    candidate = Candidate(str(folder), lambda batch: chosen.outputs(model, batch), size, bits, tuple(report.get("model", {}).get("notes", ())))
    return Opened(candidate, tokenizer_of(folder, own), model, None)
