"""MambaQuant's transforms: smoothing whose scales the neighbours absorb, and rotations of the state.

Source: https://arxiv.org/abs/2501.13484.  Residual and Δ are rotated by `KLTRotate`, the input of out_proj by qcore's `HadamardRotate(online=…)`; the
mean of δ is subtracted by `CentreDelta`, norm gains are smoothed by `GainSmooth` (S1).
All are exact rewrites, of the scope "model", in the order of the recipe: smoothing first, then rotations, then means, S1 last.  An order that would
not keep the function, or undo what came before, is refused.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from qcore.calibration.observer import Observer, Seen
from qcore.calibration.observers import AbsMax
from qcore.errors import SpecError
from qcore.model.layers import layout
from qcore.model.reader import TensorReader
from qcore.model.topology import Link, Port, Site, Topology
from qcore.numbers import QuantSpec
from qcore.numbers.hadamard import core_size, random_signs
from qcore.transforms.base import Transform
from qcore.transforms.channels import seen_at
from qcore.transforms.rewrite import Edit, Hadamard, Insert, ModuleConfig, Rewrite, Scale, scale_link
from qcore.transforms.smooth import SmoothQuant
from torch import Tensor, nn

from qplug_ssm.mixer import SelectiveMixer
from qplug_ssm.mixer2 import HeadMixer
from qplug_ssm.readout import RotatedReadout

LOWEST, HIGHEST = 1e-2, 1e2


def readouts(topology: Topology) -> list[str]:
    """Paths of the modules that multiply h by C."""
    return list(dict.fromkeys(site.module for site in topology.activations if site.tensor == "h"))


def mixers(topology: Topology, model: nn.Module) -> Iterator[tuple[str, SelectiveMixer]]:
    """Mamba-1 mixers with their paths; Mamba-2's gate stands inside its norm, and its B and C pass the convolution: none of this applies."""
    for path in dict.fromkeys(r.rpartition(".")[0] for r in readouts(topology)):
        mixer = model.get_submodule(path)
        if isinstance(mixer, SelectiveMixer) and not isinstance(mixer, HeadMixer):
            yield path, mixer


@dataclass(frozen=True)
class MambaSmooth(Transform):
    """Move the spread of activations into the weights that make or read them: s = max|x|^α / max|w|^(1-α).

    gate:   (S2) out_proj's input: z's rows of in_proj are divided by s, SiLU becomes x·σ(s∘x), out_proj takes s
    states: (S4) h and C: rows of B divided, rows of C multiplied.  The recurrence is linear and diagonal, so a state that starts at zero simply is
            h/s at every step; a state from elsewhere must be divided by s once (`to_smoothed`)
    delta:  (S5) δ between x_proj and dt_proj
    conv:   (S7) the convolution's input; its bias stays
    alpha:  0.5 as published
    """

    name: ClassVar[str] = "mamba-smooth"
    scope: ClassVar[Literal["block", "model"]] = "model"
    gate: bool = True
    states: bool = True
    delta: bool = True
    conv: bool = True
    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise SpecError(f"alpha lies between 0 (weights decide) and 1 (activations decide), got {self.alpha}")

    def _plain(self) -> list[SmoothQuant]:
        """Links whose scales nothing special has to absorb."""
        wanted = (("*.x_proj*.delta", self.delta), ("*.x→conv", self.conv))
        return [SmoothQuant(alpha=self.alpha, links=pattern) for pattern, on in wanted if on]

    def wants(self, topology: Topology, specs: Mapping[Site, QuantSpec]) -> Mapping[Site, tuple[Observer, ...]]:
        wanted: dict[Site, tuple[Observer, ...]] = {}
        for smooth in self._plain():
            wanted |= smooth.wants(topology, specs)
        for readout in readouts(topology):
            if self.states:
                wanted |= {Site(readout, t): (AbsMax(),) for t in ("h", "c")}
            if self.gate:
                wanted[_out_proj(readout.rpartition(".")[0]).input] = (AbsMax(),)
        return wanted

    def fit(self, topology: Topology, specs: Mapping[Site, QuantSpec], seen: Mapping[Site, Seen], model: nn.Module, reader: TensorReader) -> Rewrite:
        rewrite, notes = Rewrite(), []
        if self.states:
            _require_unrotated(topology, model)
        for smooth in self._plain():
            rewrite = rewrite.then(smooth.fit(topology, specs, seen, model, reader))
        for path, mixer in mixers(topology, model):
            if self.gate:
                rewrite = rewrite.then(self._gate(path, mixer, seen, reader))
            if self.states:
                links = state_links(path, topology)
                rewrite = rewrite.then(self._states(path, mixer, links, seen))
        if not list(mixers(topology, model)):
            notes.append("mamba-smooth: no Mamba-1 mixer in this model; gates and states are not smoothed")
        return Rewrite(**{**rewrite.__dict__, "notes": (*rewrite.notes, *notes)})

    def _gate(self, path: str, mixer: SelectiveMixer, seen: Mapping[Site, Seen], reader: TensorReader) -> Rewrite:
        x = seen_at(_out_proj(path).input, AbsMax.name, seen).double()
        w = reader[f"{path}.out_proj.weight"].double().abs().amax(0)
        s = smoothing(x, w, self.alpha)
        inner = len(s)
        z = (range(inner, 2 * inner),)
        biased = getattr(mixer.in_proj, "bias", None) is not None
        writes = [Port(f"{path}.in_proj.{n}", "out", channels=z) for n in (("weight", "bias") if biased else ("weight",))]
        edits: dict[str, tuple[Edit, ...]] = {p.param: (Scale(p, 1 / s),) for p in writes}
        edits[f"{path}.out_proj.weight"] = (Scale(Port(f"{path}.out_proj.weight", "in"), s),)
        return Rewrite(
            edits=edits, inserts={f"{path}.gate_act": Insert(ModuleConfig("smooth-silu", {"channels": inner}, {"s": s.float()}), "instead")}
        )

    def _states(self, path: str, mixer: SelectiveMixer, links: list[Link], seen: Mapping[Site, Seen]) -> Rewrite:
        rewrite = Rewrite()
        for link in links:
            tails = [r for r in mixer.readouts if len(links) == 1 or r.removeprefix("readout") == _tail(link)]
            h = torch.stack([state_maxima(seen_at(Site(f"{path}.{r}", "h"), AbsMax.name, seen), mixer.states) for r in tails]).amax(0)
            c = torch.stack([seen_at(Site(f"{path}.{r}", "c"), AbsMax.name, seen).double() for r in tails]).amax(0)
            rewrite = rewrite.then(scale_link(link, 1 / smoothing(h, c, self.alpha)))
        return rewrite


def _require_unrotated(topology: Topology, model: nn.Module) -> None:
    """SpecError where states are rotated at run time already: a scale for each state does not commute with that."""
    for path in readouts(topology):
        readout = model.get_submodule(path)
        if isinstance(readout, RotatedReadout) and readout.over_states is not None:
            raise SpecError(f"{path}: its states are rotated already, and scales do not pass a rotation; put mamba-smooth before state-rotate")


def smoothing(x: Tensor, w: Tensor, alpha: float) -> Tensor:
    """s = x^α / w^(1-α) within [0.01, 100]; 1 where either is zero.  float64"""
    x, w = x.double(), w.double()
    alive = (x > 0) & (w > 0)
    s = torch.where(alive, x, 1.0) ** alpha / torch.where(alive, w, 1.0) ** (1 - alpha)
    # in float32: the buffer of S-SiLU holds the very numbers that the weights took
    return torch.where(alive, s.clamp(LOWEST, HIGHEST), 1.0).float().double()


def state_maxima(maxima: Tensor, states: int) -> Tensor:
    """The largest magnitude of each state over all channels.  [D·N] → [N]"""
    return maxima.double().unflatten(-1, (-1, states)).amax(0)


def state_links(path: str, topology: Topology) -> list[Link]:
    """The links between B and C of one mixer: one for each direction that has parameters of its own."""
    return [link for link in topology.links if link.name.startswith(f"{path}.") and link.name.endswith("B·C")]


def to_smoothed(state: Tensor, s: Tensor) -> Tensor:
    """A float model's state in the basis of the smoothed one, h/s.  state: [..., N]; s: [N]

    Done once, where the state enters.  Equivalently ln(1/s) is added to Δ·A at the first step alone; at every step it would divide the state again
    and again.
    """
    return state / s.to(state.dtype)


def _out_proj(mixer: str) -> Site:
    return Site(f"{mixer}.out_proj")


def _tail(link: Link) -> str:
    """ "" or "_b": of which direction's x_proj the link speaks."""
    return link.name.rpartition("x_proj")[2].removesuffix(".B·C")


@dataclass(frozen=True)
class StateRotate(Transform):
    """Rotate h and C before their product: over channels and back at run time (S3, R3), over states with C's half merged into x_proj (R4).

    channels: divide channels of h by s3 = max|h|^α (relative to its mean), rotate them, and undo both behind the product
    states:   rotate states; C's rows of x_proj are rotated likewise.  Left out where a norm stands between x_proj and C
    seed:     of the signs

    Put it after MambaSmooth: it reads the smoothed state.
    """

    name: ClassVar[str] = "state-rotate"
    scope: ClassVar[Literal["block", "model"]] = "model"
    channels: bool = True
    states: bool = True
    alpha: float = 0.5
    seed: int = 0

    def wants(self, topology: Topology, specs: Mapping[Site, QuantSpec]) -> Mapping[Site, tuple[Observer, ...]]:
        return {Site(r, "h"): (AbsMax(),) for r in readouts(topology)} if self.channels else {}

    def fit(self, topology: Topology, specs: Mapping[Site, QuantSpec], seen: Mapping[Site, Seen], model: nn.Module, reader: TensorReader) -> Rewrite:
        rewrite, notes = Rewrite(), []
        for i, (path, mixer) in enumerate(mixers(topology, model)):
            inner = int(layout(mixer.out_proj).matrix(mixer.out_proj.weight).shape[1])
            normed = "c_layernorm" in mixer._modules
            fits = {"channels": core_size(inner) is not None, "states": core_size(mixer.states) is not None and not normed}
            for what, possible in fits.items():
                if getattr(self, what) and not possible:
                    reason = "a norm stands between x_proj and C" if what == "states" and normed else "no Hadamard matrix of their number is known"
                    notes.append(f"state-rotate: {path}: {what} are not rotated: {reason}")
            over_channels, over_states = self.channels and fits["channels"], self.states and fits["states"]
            if over_channels or over_states:
                rewrite = rewrite.then(self._mixer(path, mixer, inner, over_channels, over_states, seen, self.seed + 101 * i))
        return Rewrite(**{**rewrite.__dict__, "notes": tuple(notes)})

    def _mixer(self, path: str, mixer: Any, inner: int, channels: bool, states: bool, seen: Mapping[Site, Seen], seed: int) -> Rewrite:
        rank, n = mixer.rank, mixer.states
        edits: dict[str, tuple[Edit, ...]] = {}
        inserts = {}
        signs_n, signs_d = random_signs(n, seed), random_signs(inner, seed + 1)
        for tail in mixer._tails:
            projection = getattr(mixer, f"x_proj{tail}")
            for name in ("weight", "bias"):
                if states and getattr(projection, name, None) is not None:
                    port = Port(f"{path}.x_proj{tail}.{name}", "out", channels=(range(rank + n, rank + 2 * n),))
                    edits[port.param] = (Hadamard(port, signs_n, n),)
        for readout in mixer.readouts:
            tensors: dict[str, Tensor] = {}
            if channels:
                maxima = seen_at(Site(f"{path}.{readout}", "h"), AbsMax.name, seen).double().unflatten(-1, (-1, n)).amax(1)
                s = smoothing(maxima, torch.ones_like(maxima), self.alpha)
                tensors |= {"scale": (s / s.log().mean().exp()).float(), "over_channels.signs": signs_d.float()}
            if states:
                tensors["over_states.signs"] = signs_n.float()
            config = {"channels": inner, "states": n, "rotate_channels": channels, "rotate_states": states}
            inserts[f"{path}.{readout}"] = Insert(ModuleConfig("rotated-readout", config, tensors), "instead")
        return Rewrite(edits=edits, inserts=inserts)
