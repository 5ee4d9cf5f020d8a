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
    data:      what a model that does not read text is evaluated on, a `ModelData`; None = text
    """

    candidate: "Candidate"
    tokenizer: Any
    model: Any
    evaluation: Path | None
    data: Any = None


def is_checkpoint(folder: Path) -> bool:
    """Whether `qcore quantize` wrote this folder."""
    from qcore.checkpoint import MANIFEST

    return (folder / MANIFEST).is_file()


def open_any(uri: str, own: "Registry", adapter: str | None = None, kernel: str | None = None, float_uri: str = "") -> Opened:
    """The model behind an address or in a folder, ready to run.

    kernel:    of a checkpoint: which one goes first
    float_uri: of a checkpoint: the float model from which it was made, so that its modules can be float again; "" = they need not
    """
    return _open_checkpoint(Path(uri), own, adapter, kernel, float_uri) if is_checkpoint(Path(uri)) else _open_float(uri, own, adapter)


def _open_float(uri: str, own: "Registry", adapter: str | None) -> Opened:
    from qcore.cli._options import open_model
    from qcore.evaluation import Candidate
    from qcore.pipeline import float_forward

    loaded, chosen = open_model(uri, own, adapter)
    size = sum(p.numel() for p in loaded.model.parameters()) * loaded.dtype.itemsize
    candidate = Candidate(loaded.name, float_forward(loaded, chosen), bytes=size, notes=loaded.notes)
    return Opened(candidate, loaded.tokenizer, loaded.model, loaded.evaluation, loaded.data)


def _open_checkpoint(folder: Path, own: "Registry", adapter: str | None, kernel: str | None = None, float_uri: str = "") -> Opened:
    from functools import partial

    import torch

    from qcore.checkpoint import MANIFEST, Manifest, load
    from qcore.errors import CheckpointError, SpecError
    from qcore.evaluation import Candidate, read_report
    from qcore.modules import serve_in

    manifest = Manifest.read(folder)
    if adapter is not None and manifest.adapter and adapter != manifest.adapter:
        raise SpecError(f"--adapter {adapter}: {folder} was made with adapter {manifest.adapter!r}, and runs with that alone; leave --adapter out")
    # computed as float models are: what is compared is the quantization, not another rounding of sums
    model = load(folder, registry=own, kernel=kernel)
    serve_in(model, torch.float64 if manifest.dtype == "float64" else torch.float32)
    name = adapter or manifest.adapter
    if not name:
        raise CheckpointError(f"{folder / MANIFEST} names no adapter; pass one with --adapter: {', '.join(sorted(own.adapters))}")
    chosen = own.adapters[name]()
    report = read_report(folder) if (folder / "report.json").exists() else {}
    candidate = Candidate(
        name=str(folder),
        forward=lambda batch: chosen.outputs(model, batch),
        bytes=sum(manifest.files.values()),
        bits=report.get("size", {}).get("effective_bits"),
        notes=tuple(report.get("model", {}).get("notes", ())),
        again=partial(_from_source, folder, model, chosen, own, float_uri) if float_uri else None,
    )
    source = own.sources[manifest.source]() if manifest.source in own.sources else None
    tokenizer, data = (None, None) if source is None else (source.tokenizer(folder), source.data(folder))
    return Opened(candidate, tokenizer, model, None, data)


@dataclass(frozen=True)
class Outline:
    """What is known of a model before it is in memory.

    vocabulary: how many tokens it knows; None where it reads no text
    context:    how many tokens it can see, where it says so
    window:     tokens of one evaluation window, where the user names none
    weights:    fingerprint of the float weights that it has, or was made from; "" = not looked at
    """

    name: str
    vocabulary: int | None
    context: int | None
    window: int
    weights: str = ""


def outline_of(uri: str, own: "Registry", adapter: str | None, weights: bool = False) -> Outline:
    """The outline of a model or checkpoint; whatever is missing, truncated or not installed is an error here, before anything is computed."""
    from qcore.checkpoint import MANIFEST, Manifest
    from qcore.checkpoint.load import open_shards, skeleton_of
    from qcore.cli._options import open_model
    from qcore.evaluation import default_window
    from qcore.model.reader import weights_fingerprint
    from qcore.plan import context_length

    if is_checkpoint(folder := Path(uri)):
        manifest = Manifest.read(folder)
        manifest.require(own, str(folder / MANIFEST))
        open_shards(folder, manifest)
        model, made_from = skeleton_of(folder, manifest, own), str(manifest.record.get("weights", ""))
    else:
        loaded, _ = open_model(uri, own, adapter)
        model, made_from = loaded.model, weights_fingerprint(loaded.reader) if weights else ""
    context = context_length(model)
    return Outline(uri, vocabulary_of(model), context, default_window(sum(p.numel() for p in model.parameters()), context), made_from)


def vocabulary_of(model: Any) -> int | None:
    """How many tokens a model knows: what its configuration says, else the rows of its first embedding; None where it has none."""
    from torch import nn

    if isinstance(said := getattr(getattr(model, "config", None), "vocab_size", None), int):
        return said
    return next((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), None)


def with_recorded_data(opened: Opened, folder: Path, own: "Registry", text: Path | None) -> Opened:
    """A checkpoint with the evaluation data of the model that it was made from, where its own source brings none and `text` is not enough.

    text: what the user passed.  Where the recorded model is not here any more, `opened` comes back as it is.
    """
    from dataclasses import replace

    from qcore.checkpoint import Manifest
    from qcore.errors import QcoreError
    from qcore.model import load_source

    if opened.data is not None:
        enough = text is not None or opened.data.evaluation is not None
    else:
        # transformers' own way to say that a model gives hidden states: there is no next token to predict
        output = getattr(opened.model, "get_output_embeddings", None)
        enough = text is not None and opened.tokenizer is not None and (output is None or output() is not None)
    address = str(Manifest.read(folder).record.get("model", ""))
    if enough or not address:
        return opened
    try:
        loaded = load_source(address, own.sources)
    except QcoreError:
        return opened
    return replace(opened, data=loaded.data if loaded.data is not None else opened.data, evaluation=loaded.evaluation)


def _from_source(folder: Path, model: Any, adapter: Any, own: "Registry", float_uri: str) -> Any:
    from qcore.model import load_source

    loaded = load_source(float_uri, own.sources)
    return float_again(folder, model, loaded.model, loaded.reader, adapter, own)


def float_again(folder: Path, model: Any, skeleton: Any, reader: Any, adapter: Any, own: "Registry") -> Any:
    """What lets modules of the checkpoint's `model` be float again; CheckpointError when the float weights are not those it was made from.

    skeleton, reader: the float architecture and its weights
    """
    from qcore.checkpoint import Manifest
    from qcore.checkpoint.rewrite_file import read_rewrite
    from qcore.errors import CheckpointError
    from qcore.evaluation import FloatAgain
    from qcore.model.reader import weights_fingerprint
    from qcore.modules.stored import DTYPES
    from qcore.pipeline import compute_dtype

    manifest = Manifest.read(folder)
    rewrite = read_rewrite(folder, manifest)
    weights, wanted = weights_fingerprint(reader), manifest.record.get("weights")
    if weights != wanted:
        raise CheckpointError(
            f"{folder} was made from weights {wanted}, the float model has {weights}; modules can only be float again with the weights that "
            "they were made from: name that model first"
        )
    return FloatAgain(model, skeleton, reader, adapter, rewrite, own.modules, compute_dtype(DTYPES[manifest.dtype]))
