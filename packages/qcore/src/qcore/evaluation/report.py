"""`report.json`: what was done to a model, and what it cost.  One schema, with a version; keys in one order; no clock, no host name."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from qcore.errors import CheckpointError

SCHEMA = 1


@dataclass(frozen=True)
class SiteRow:
    """One quantized weight.

    site:    where;  spec: what is stored;  solver, packing, kernel: who chose the codes, how they lie, who multiplies
    refused: (kernel, reason) of each better-ranked kernel that cannot run it
    error:   relative squared error, of what `of` says: the layer's "output", or the "weight" where no input was seen
    bits:    effective, of one weight, from packed bytes
    bytes:   packed;  values: how many weights;  seconds: of solving
    remarks: what was unusual
    """

    site: str
    spec: str
    solver: str
    packing: str
    kernel: str
    refused: tuple[tuple[str, str], ...]
    error: float
    of: str
    bits: float
    bytes: int
    values: int
    seconds: float
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that the table at the end of `qcore quantize` shows, and more.

    model:   name, source, dtype, parameters, notes of the source
    recipe:  name, overrides, and the whole recipe as TOML
    data:    a sentence; tokens, windows and sha256 of calibration and evaluation data
    size:    before_bytes and after_bytes of all weights as stored; effective_bits per quantized weight and quantized_values
    quality: the task's name and its scores, the float model's beside; None where there was no data.  report.json has its KL as "kl" too
    sites:   one row per quantized weight;  left_float: parameter → why it was left float
    refused: axis of a weight → why no transform may touch it: the family's structure, as far as it could be followed
    seconds: by step of the command;  phases: inside the quantization (some contain others);  memory: bytes, see `MemoryMeter`
    proof:   what was proved of the checkpoint
    threads: of the matrix products; another number may give other bits
    histograms:  magnitudes of weights and inputs by kind of module, see `qcore.evaluation.histograms`
    attribution: which modules the loss comes from, see `Attribution`; {} where nobody asked
    """

    model: Mapping[str, Any]
    recipe: Mapping[str, Any]
    data: Mapping[str, Any]
    size: Mapping[str, Any]
    quality: Mapping[str, Any] | None
    sites: Sequence[SiteRow]
    left_float: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    coverage: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    phases: Mapping[str, float] = field(default_factory=dict)
    memory: Mapping[str, Any] = field(default_factory=dict)
    proof: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    threads: int = 1
    histograms: Mapping[str, Any] = field(default_factory=dict)
    attribution: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kernels(self) -> dict[str, int]:
        """How many modules each kernel runs."""
        names = [row.kernel for row in self.sites]
        return {name: names.count(name) for name in sorted(set(names))}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, keys in one order."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        own["sites"] = [asdict(row) for row in self.sites]
        kl = None if self.quality is None else self.quality["scores"].get("kl")
        return {"schema": SCHEMA, "kl": finite(kl), "kernels": self.kernels, **finite(own)}

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")

    def lines(self) -> list[tuple[str, str, str]]:
        """(figure, float model, quantized model) for the table, in words."""
        size, quality = self.size, self.quality
        before, after = size["before_bytes"], size["after_bytes"]
        lines = [
            ("size of weights", f"{megabytes(before)}", f"{megabytes(after)} ({before / after:.2f}× smaller)" if after else "–"),
            ("effective bits per quantized weight", f"{size['float_bits']:g}", f"{size['effective_bits']:.2f}" if size["effective_bits"] else "–"),
        ]
        if quality is not None:
            lines += _quality_lines(quality["scores"])
        seconds = ", ".join(f"{name} {value:.1f}" for name, value in self.seconds.items() if value >= 0.05)
        lines.append(("seconds", "", f"{sum(self.seconds.values()):.1f}" + (f" ({seconds})" if seconds else "")))
        if (peak := self.memory.get("peak_bytes")) is not None:
            anonymous = self.memory.get("anonymous_bytes")
            lines.append(("peak memory", "", megabytes(peak) + (f" ({megabytes(anonymous)} anonymous)" if anonymous else "")))
        words = {"identical": "identical to", "close": "within rounding of"}
        if self.proof.get("level") == "structural":
            said = f"{self.proof['tensors']} tensors read back, {self.proof['decoded']} weights decoded alike"
            lines.append(("proof", "", f"{self.proof['loader']}: {said}"))
        elif "loader" in self.proof:
            who = f"{self.proof['loader']}{', in a process of its own' if self.proof.get('fresh') else ''}"
            lines.append(("proof", "", f"{who}: outputs {words[self.proof['level']]} the saved model's"))
        if self.kernels:
            lines.append(("kernels", "", ", ".join(f"{name} ×{n}" for name, n in self.kernels.items())))
        return lines


def _quality_lines(scores: Mapping[str, float]) -> list[tuple[str, str, str]]:
    lines = []
    if "perplexity" in scores:
        before, after = scores["perplexity_reference"], scores["perplexity"]
        lines.append(("perplexity", f"{before:.3f}", f"{after:.3f} ({(after / before - 1) * 100:+.2f} %)"))
    if "accuracy" in scores:
        change = scores["accuracy"] - scores["accuracy_reference"]
        error = scores.get("accuracy_change_standard_error", math.nan)
        sure = "" if math.isnan(error) else f" ± {100 * error:.2f}"
        lines.append(("accuracy", f"{scores['accuracy_reference']:.2%}", f"{scores['accuracy']:.2%} ({100 * change:+.2f}{sure} points)"))
    if "kl" in scores:
        error = scores.get("kl_standard_error", math.nan)
        lines.append(("KL divergence", "0", f"{scores['kl']:.5f}" + ("" if math.isnan(error) else f" ± {error:.5f}")))
    if "top1" in scores:
        lines.append(("top-1 agreement", "100 %", f"{scores['top1'] * 100:.2f} %"))
    if "sqnr_db" in scores:
        lines.append(("signal to noise", "", f"{scores['sqnr_db']:.1f} dB"))
    return lines + [(name.replace("_", " "), was, now) for name, (was, now) in own_scores(scores).items()]


# scores that tables have words for, and what stands beside them
_WORDED = {"perplexity", "accuracy", "accuracy_change_standard_error", "kl", "kl_standard_error", "top1", "sqnr_db", "lost", "gained"}


def own_scores(scores: Mapping[str, float]) -> dict[str, tuple[str, str]]:
    """Scores that only their task knows, name → (float model, quantized model) in words; whole numbers are counts, and are left out.

    The float model's is the score `name_reference`, "" where there is none.
    """
    real = {name: f"{value:.6g}" for name, value in scores.items() if isinstance(value, float) and name.removesuffix("_reference") not in _WORDED}
    own = [name for name in real if name.removesuffix("_reference") == name or name.removesuffix("_reference") not in real]
    return {name: (real.get(f"{name}_reference", ""), real[name]) for name in own}


def read_report(folder: Path) -> dict[str, Any]:
    """The report beside a checkpoint, as plain data; CheckpointError where it is of a newer schema or broken."""
    path = folder / "report.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; `qcore quantize` writes it beside the checkpoint") from None
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{path} cannot be read ({e}); quantize again") from e
    if not isinstance(data, dict) or not isinstance(data.get("schema"), int):
        raise CheckpointError(f"{path} is no report of qcore: it has no schema number")
    if data["schema"] > SCHEMA:
        raise CheckpointError(f"{path} has schema {data['schema']}, this qcore reads up to {SCHEMA}; upgrade qcore")
    return data


def megabytes(n: float) -> str:
    """1 MB = 10^6 bytes, as file managers count."""
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.2f} MB" if n >= 1e4 else f"{n:.0f} B"


def finite(value: Any) -> Any:
    """JSON-ready: infinite and undefined numbers become None, since JSON has no names for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return value
