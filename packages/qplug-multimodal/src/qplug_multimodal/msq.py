"""Modality-specific static quantization: two scales for the input of a layer, one for visual tokens and one for text.

Activations of visual tokens span tens, those of text tokens halves: one static scale for both leaves text a few codes, and scales for each token
cost a reduction over thousands of tokens.  Here every token takes the static scale of its modality: with tokens in the order that `aifs.py` makes,
y = s_m s_w (q_x q_wᵀ) is one integer product for each of two blocks of rows.

What is not here: no kernel multiplies these integers yet.  `ModalInput` puts inputs on their grid and the layer's own kernel for float inputs runs;
that gives the numbers of the integer product up to the rounding of float sums, and not its speed.

Source: https://arxiv.org/abs/2502.00425 (MQuant), section 3.2.  The code released with it has one quantizer for each layer: MSQ is absent from it.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from qcore.calibration.observer import Observer, Seen
from qcore.calibration.observers import MinMax
from qcore.calibration.ranges import range_parts
from qcore.errors import CalibrationError, SpecError
from qcore.model.reader import TensorReader
from qcore.model.tap import run_context
from qcore.model.topology import Port, Site, Topology
from qcore.modules.stored import resolved
from qcore.numbers import Int, Offset, PerTensor, PerToken, QTensor, QuantSpec, quantize, spec_from_dict, spec_to_dict
from qcore.numbers.hadamard import padded_size, random_signs, transform
from qcore.transforms.base import Transform
from qcore.transforms.rewrite import Hadamard, Insert, ModuleConfig, Rewrite
from torch import Tensor, nn

from qplug_multimodal.modality import TEXT, VISUAL

MODALITIES = {TEXT: "text", VISUAL: "visual"}


class ModalInput(nn.Module):
    """x → x on the grid of each token's modality, after a rotation where there are signs.  [..., size] → [..., padded]

    spec:   of the codes, per tensor;  scale, offset: [2, 1], of text and of visual tokens
    signs:  [padded] of an online Hadamard rotation, or None
    seen:   which modalities calibration saw; the scale of one that it did not see is the other's, and a token of it warns once

    Which token is which is `RunContext.segments`, which the adapter's hooks set.  All is static: no value is looked at to find a scale.
    """

    name: ClassVar[str] = "modal-input"
    scale: Tensor
    offset: Tensor | None
    signs: Tensor | None

    def __init__(
        self,
        spec: QuantSpec,
        scale: Tensor,
        offset: Tensor | None = None,
        signs: Tensor | None = None,
        size: int = 0,
        seen: tuple[bool, ...] = (True, True),
    ) -> None:
        super().__init__()
        self.spec, self.size, self.seen = spec, size, tuple(seen)
        self._rows = replace(spec, granularity=PerToken())
        self.register_buffer("scale", scale)
        self.register_buffer("offset", offset)
        self.register_buffer("signs", signs)
        self._warned = False

    def forward(self, x: Tensor) -> Tensor:
        return self.codes(x).dequantize().to(x.dtype).reshape(*x.shape[:-1], -1)

    def codes(self, x: Tensor) -> QTensor:
        """What stands for the tokens of `x`, as rows.  [T, padded]"""
        if self.signs is not None:
            x = transform(F.pad(x, (0, self.signs.shape[0] - self.size)) * self.signs.to(x.dtype))
        segments = run_context().segments
        if segments is None or segments.shape != x.shape[:-1]:
            said = "nobody said" if segments is None else f"known for {tuple(segments.shape)} tokens, and {tuple(x.shape[:-1])} came"
            raise SpecError(f"which tokens are visual is {said}; run the whole model on input_ids, or inside running(RunContext(segments=…))")
        index = (segments.reshape(-1) != TEXT).long().to(x.device)
        self._warn(index)
        parts = {"scale": self.scale[index]} | ({} if self.offset is None else {"offset": self.offset[index]})
        return quantize(x.reshape(-1, x.shape[-1]), self._rows, parts)

    def _warn(self, index: Tensor) -> None:
        if all(self.seen) or self._warned:
            return
        missing = self.seen.index(False)
        if bool((index == missing).any()):
            self._warned = True
            warnings.warn(
                f"calibration saw no {MODALITIES[missing]} token, and now one came: it takes the scale of the others; calibrate on both", stacklevel=4
            )

    def config(self) -> dict[str, Any]:
        padded = None if self.signs is None else self.signs.shape[0]
        return {"spec": spec_to_dict(self.spec), "size": self.size, "padded": padded, "seen": list(self.seen)}

    @classmethod
    def from_config(cls, config: dict[str, Any], registry: Any = None) -> Self:
        spec = spec_from_dict(config["spec"], resolved(registry).formats)
        offset = torch.zeros(2, 1, dtype=torch.int8 if spec.format.lo < 0 else torch.uint8) if spec.offset is Offset.CODE else None
        signs = None if config["padded"] is None else torch.ones(config["padded"])
        return cls(spec, torch.ones(2, 1), offset, signs, config["size"], tuple(config["seen"]))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # the scales keep their dtype when the model is converted: they are the grid on which weights were solved
        kept = {name: self._buffers[name] for name in ("scale", "offset")}
        super()._apply(fn, recurse)
        for name, old in kept.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    def extra_repr(self) -> str:
        rotated = "" if self.signs is None else f", rotated {self.size} → {self.signs.shape[0]}"
        return f"{self.spec}{rotated}, seen={[MODALITIES[i] for i, s in enumerate(self.seen) if s]}"


@dataclass(kw_only=True)
class ByModality(Observer):
    """The range of each modality's rows, by an observer for each; result: {0: (low, high), 1: (low, high)}, without those that were not seen.

    observer: finds a range;  None = the extremes
    seed:     rows are rotated first, by `random_signs(padded, seed)`; None = as they come
    """

    name: ClassVar[str] = "by-modality"
    observer: Observer | None = None
    seed: int | None = None
    _own: dict[int, Observer] = field(default_factory=dict, init=False, repr=False, compare=False)

    def _of(self, modality: int) -> Observer:
        if modality not in self._own:
            self._own[modality] = (self.observer or MinMax()).fresh()
        return self._own[modality]

    def update(self, rows: Tensor, weight: Tensor | None = None) -> None:
        context = run_context()
        if context.segments is None:
            raise CalibrationError("nobody said which rows are visual tokens; modalities are known inside the language model alone")
        segments = context.segments.reshape(-1)
        if segments.shape[0] != rows.shape[0] and context.valid is not None:
            segments = segments[context.valid.reshape(-1)]  # rows of padding were taken out
        if segments.shape[0] != rows.shape[0]:
            raise CalibrationError(f"{rows.shape[0]} rows came, and modalities are known for {segments.shape[0]} tokens")
        if self.seed is not None:
            padded = padded_size(rows.shape[-1])
            rows = transform(F.pad(rows, (0, padded - rows.shape[-1])) * random_signs(padded, self.seed).to(rows))
        for modality in MODALITIES:
            mine = (segments != TEXT) == (modality != TEXT)
            if bool(mine.any()):
                self._of(modality).update(rows[mine], None if weight is None else weight[mine])

    def result(self) -> dict[int, Any]:
        found = {m: own.result() for m, own in sorted(self._own.items())}
        if not found:
            raise CalibrationError("observer 'by-modality' saw no rows; calibrate on more samples")
        return found

    def state(self) -> dict[str, Tensor]:
        return {f"{m}.{name}": t for m, own in self._own.items() for name, t in own.state().items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self._own = {}
        self.merge([state])

    def merge(self, states: Any) -> None:
        for state in states:
            for modality in MODALITIES:
                own = {name.partition(".")[2]: t for name, t in state.items() if name.startswith(f"{modality}.")}
                if own:
                    self._of(modality).merge([own])


@dataclass(frozen=True)
class MSQ(Transform):
    """Put a `ModalInput` before every layer of the language model: static scales by modality, found on the outputs of the quantized blocks before.

    The recipe leaves the inputs of these layers float: what codes them is the module.  Put it last: links do not reach through it.

    sites:  shell patterns over weight sites
    bits:   of the codes
    offset: "none": symmetric, as the released code; "code": with a zero point, as the paper's (s, z)
    online: patterns over weight sites whose input is rotated first, by a random-sign Hadamard matrix in the same module
    observer: finds a modality's range; None = the extremes.  One token that is unlike all others (an attention sink) stretches those: see percentile
    seed:   of the signs

    A modality that calibration did not see takes the other's scale, and the notes say so.
    """

    name: ClassVar[str] = "msq"
    scope: ClassVar[Literal["block", "model"]] = "block"
    exact: ClassVar[bool] = False
    sites: tuple[str, ...] = ("*language_model.*:weight",)
    bits: int = 8
    offset: Literal["none", "code"] = "none"
    online: tuple[str, ...] = ("*.down_proj:weight",)
    observer: Observer | None = None
    seed: int = 0

    @property
    def spec(self) -> QuantSpec:
        return QuantSpec(format=Int(self.bits), granularity=PerTensor(), offset=Offset(self.offset))

    def foresee(self, topology: Topology, specs: Mapping[Site, QuantSpec], model: nn.Module) -> list[str]:
        """What can be said before anything is fitted, once for the model; SpecError where no layer of it would get scales by modality."""
        layers = [path for path, m in model.named_modules() if isinstance(m, nn.Linear) and any(fnmatchcase(f"{path}:weight", p) for p in self.sites)]
        if not layers:
            raise SpecError(f"msq: no layer of {type(model).__name__} matches {', '.join(self.sites)}; is this a vision-language model?")
        matched = self._matched(topology, specs)
        self._require_float(matched, specs)
        if layers[0] not in {s.module for s in matched}:
            return []  # asked block by block: the first one speaks for all
        return [f"the inputs of {len(layers)} layers have static scales by modality ({self.spec}), put on their grid before the layer's kernel"]

    def wants(self, topology: Topology, specs: Mapping[Site, QuantSpec]) -> Mapping[Site, tuple[Observer, ...]]:
        return {s.input: (self._observer(s),) for s in self._matched(topology, specs)}

    def fit(self, topology: Topology, specs: Mapping[Site, QuantSpec], seen: Mapping[Site, Seen], model: nn.Module, reader: TensorReader) -> Rewrite:
        sites = self._matched(topology, specs)
        self._require_float(sites, specs)
        rewrite = Rewrite(exact=1.0 if sites else 0.0)
        alone: dict[int, list[Site]] = {}
        for site in sites:
            found = seen.get(site.input, {}).get(ByModality.name)
            if found is None:
                raise CalibrationError(f"msq: nothing was seen at {site.input}; pass image-text pairs with --calib")
            missing = [m for m in MODALITIES if m not in found]
            if missing:
                alone[missing[0]] = [*alone.get(missing[0], []), site]
            ranges = [found.get(m, next(iter(found.values()))) for m in MODALITIES]
            parts = [range_parts(r, self.spec, "msq") for r in ranges]
            tensors = {name: torch.cat([p[name] for p in parts]) for name in parts[0]}
            size, padded = int(model.get_parameter(_live(model, site)).shape[1]), None
            if self._rotated(site):
                padded = padded_size(size)
                signs = random_signs(padded, self.seed)
                tensors["signs"] = signs.float()
                rewrite.edits[site.param] = (Hadamard(Port(site.param, "in"), signs, padded),)
            config = {"spec": spec_to_dict(self.spec), "size": size, "padded": padded, "seen": [m in found for m in MODALITIES]}
            rewrite.inserts[site.module] = Insert(ModuleConfig(ModalInput.name, config, tensors))
        notes = tuple(
            f"calibration saw no {MODALITIES[m]} token at {own[0].module} and {len(own) - 1} more layers: "
            "such tokens take the other modality's scale; calibrate on pairs of images and text"
            for m, own in alone.items()
        )
        return replace(rewrite, notes=notes)

    def _observer(self, site: Site) -> ByModality:
        return ByModality(
            observer=None if self.observer is None else self.observer.for_spec(self.spec), seed=self.seed if self._rotated(site) else None
        )

    def _matched(self, topology: Topology, specs: Mapping[Site, QuantSpec]) -> list[Site]:
        plain = [s for s in topology.sites if s.tensor == "weight" and s.part is None and s in specs]
        return [s for s in plain if any(fnmatchcase(str(s), p) for p in self.sites)]

    def _rotated(self, site: Site) -> bool:
        return any(fnmatchcase(str(site), p) for p in self.online)

    @staticmethod
    def _require_float(sites: list[Site], specs: Mapping[Site, QuantSpec]) -> None:
        if twice := [s for s in sites if s.input in specs]:
            raise SpecError(
                f"msq: {twice[0].input} has a rule ({specs[twice[0].input]}) and scales by modality as well; leave it float: "
                'a rule with sites = "*language_model*:input" and float = true'
            )


def _live(model: nn.Module, site: Site) -> str:
    """The weight's name in a model where a module may stand before the leaf."""
    return f"{site.module}.leaf.weight" if hasattr(model.get_submodule(site.module), "leaf") else site.param
