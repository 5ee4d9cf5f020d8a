"""The proof of a checkpoint whose model is too large to run beside its float self: every tensor is read and decoded, none is run.

What the consumer builds from the configuration, on meta, must want exactly the stored names, shapes and dtypes; every stored tensor must hold the
run's own values bit by bit; and the consumer's decoder must make of every packed weight the values that qcore makes of it.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qcore.checkpoint.load import check_fit, install, open_shards, skeleton_of
from qcore.checkpoint.manifest import MANIFEST, Manifest
from qcore.checkpoint.proof import PROOF, versions_here
from qcore.errors import CheckpointError
from qcore.model.reader import SafetensorsReader, TensorReader
from qcore.modules import StoredWeight
from qcore.modules.stored import resolved


@dataclass(frozen=True, kw_only=True)
class StructuralProof:
    """tensors: compared bit by bit;  decoded: packed weights that `loader`'s decoder and qcore's agree on, bit by bit"""

    level: Literal["structural"] = "structural"
    loader: str
    tensors: int
    decoded: int
    versions: dict[str, str] = field(default_factory=dict)


@torch.no_grad()
def prove_structure(folder: Path | str, values: TensorReader, *, registry: Any = None) -> StructuralProof:
    """Read the checkpoint in `folder` back as its consumer would, tensor by tensor, and write proof.json beside it.

    values: what was meant to be stored (`Quantized.values`)

    CheckpointError names the first tensor that differs.
    """
    folder, registry = Path(folder), resolved(registry)
    manifest = Manifest.read(folder)
    manifest.require(registry, str(folder / MANIFEST))
    reader = open_shards(folder, manifest)
    model = install(skeleton_of(folder, manifest, registry), manifest, registry)
    check_fit(model, manifest, reader, folder)
    for name in reader.names():
        stored = reader[name]
        if not _same(stored, values[name].to(stored.dtype)):
            raise CheckpointError(f"{folder}: {name} does not hold what was solved; this is a defect, or the disk is: write the checkpoint again")
    loader, decoded = "qcore.checkpoint.load", 0
    if manifest.layout == "compressed-tensors":
        loader, decoded = _as_transformers(folder, model, manifest, reader)
    proof = StructuralProof(loader=loader, tensors=len(list(reader.names())), decoded=decoded, versions=versions_here())
    (folder / PROOF).write_text(json.dumps(asdict(proof), indent=1) + "\n", encoding="utf-8")
    return proof


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    one, other = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(one, other)


def _as_transformers(folder: Path, model: nn.Module, manifest: Manifest, reader: SafetensorsReader) -> tuple[str, int]:
    """(who would load it, how many packed weights it decodes as qcore does).  model: qcore's, on meta"""
    import transformers
    from compressed_tensors.compressors import BaseCompressor, ModelCompressor
    from compressed_tensors.quantization import apply_quantization_config

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    name = (config.architectures or ["AutoModelForCausalLM"])[0]
    quantization = transformers.utils.quantization_config.CompressedTensorsConfig.from_dict(config.quantization_config)
    del config.quantization_config
    compressor: Any = ModelCompressor.from_compression_config(quantization)
    with torch.device("meta"):
        theirs = getattr(transformers, name)._from_config(config, dtype=getattr(torch, manifest.dtype))
    apply_quantization_config(theirs, compressor.quantization_config, run_compressed=False)
    compressor.compress_model(model=theirs)
    wanted = {n: t for n, t in theirs.state_dict(keep_vars=True).items() if n not in manifest.ties}
    stored = set(reader.names())
    if missing := sorted(set(wanted) - stored):
        raise CheckpointError(f"{folder}: transformers would leave {len(missing)} tensors random, such as {missing[0]}")
    if unexpected := sorted(stored - set(wanted)):
        raise CheckpointError(f"{folder}: transformers would pass over {len(unexpected)} tensors, such as {unexpected[0]}")
    for n, t in wanted.items():
        if tuple(t.shape) != reader.info(n).shape:
            raise CheckpointError(f"{folder}: {n} has shape {reader.info(n).shape}, transformers expects {tuple(t.shape)}")
    decoded = 0
    for path, own in model.named_modules():
        if not isinstance(own, StoredWeight):
            continue
        parts = {buffer: reader[f"{path}.{buffer}"] for buffer in own._buffer_of.values()}
        scheme: Any = theirs.get_submodule(path).quantization_scheme
        codec: Any = BaseCompressor.get_value_from_registry(str(getattr(scheme.format, "value", scheme.format)))
        value = codec.decompress(dict(parts), scheme)["weight"]
        mine = own.packing.unpack({part: parts[buffer] for part, buffer in own._buffer_of.items()}, own.spec, own.shape).dequantize()
        if not _same(value, mine.to(value.dtype)):
            raise CheckpointError(f"{folder}: compressed-tensors decodes {path} to other values than qcore stored")
        decoded += 1
    return f"transformers.{name}, compressed-tensors", decoded
