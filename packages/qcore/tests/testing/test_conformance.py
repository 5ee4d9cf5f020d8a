"""The checks pass what keeps its promise, and name what does not."""

import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from qcore import numbers
from qcore.calibration import KL, MSE, AbsMax, Ema, Gram, Histogram, MinMax, Moments, Percentile
from qcore.model.topology import Invariance
from qcore.numbers import Codebook, Int, PowerOfTwo, QTensor, int_weight, mx, nvfp4, quantize
from qcore.numbers.formats import NumberFormat
from qcore.packing import Packing
from qcore.testing import (
    check_format,
    check_kernel,
    check_module,
    check_observer,
    check_packing,
    check_selector,
    check_solver,
    check_transform,
    fit_transform,
)
from qcore.testing.models import TinyDecoderAdapter, tiny_decoder, tokens
from qcore.transforms import Rewrite, Transform, scale_link
from torch import Tensor, nn

# formats ---------------------------------------------------------------------------------------------------------------------------------

FORMATS = [
    *(Int(b) for b in (1, 2, 4, 8)),
    *(Int(b, signed=False) for b in (1, 4)),
    *(numbers.FP8_E4M3, numbers.FP8_E5M2, numbers.FP4_E2M1, numbers.FP6_E2M3),
    *(PowerOfTwo(), Codebook(3), Codebook(4, dim=2)),
]


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_formats_of_qcore_keep_the_contract(fmt):
    check_format(fmt)


@dataclass(frozen=True)
class Truncating(Int):
    """Rounds down: not the nearest."""

    name: ClassVar[str] = "truncating"

    def encode(self, x, params=numbers.formats.NO_PARAMS):
        return x.floor().clamp(self.lo, self.hi).to(torch.int8)


@dataclass(frozen=True)
class Drifting(Int):
    """Its codes do not survive the round trip."""

    name: ClassVar[str] = "drifting"

    def decode(self, codes, params=numbers.formats.NO_PARAMS):
        return codes.float() * 0.9


@dataclass(frozen=True)
class Unsaturated(NumberFormat):
    name: ClassVar[str] = "unsaturated"
    bits: int = 2
    lo: ClassVar[float] = -2.0
    hi: ClassVar[float] = 1.0
    wide: int = 3

    def encode(self, x, params=numbers.formats.NO_PARAMS):
        return (x * self.wide).round().to(torch.int8)

    def decode(self, codes, params=numbers.formats.NO_PARAMS):
        return codes.float() / self.wide


@pytest.mark.parametrize(
    ("fmt", "says"), [(Truncating(4), "not nearest"), (Drifting(4), "another number"), (Unsaturated(), r"more than 2\*\*2")], ids=str
)
def test_a_broken_format_is_named(fmt, says):
    with pytest.raises(AssertionError, match=says):
        check_format(fmt)


# observers -------------------------------------------------------------------------------------------------------------------------------

OBSERVERS = [Gram(), Moments(), AbsMax(), MinMax(), MinMax(granularity="channel"), Ema(), Histogram(), Percentile(), MSE(), KL()]


@pytest.mark.parametrize("observer", OBSERVERS, ids=str)
def test_observers_of_qcore_keep_the_contract(observer):
    check_observer(observer)


def test_an_observer_that_forgets_is_named():
    class Last(AbsMax):
        def _join(self, a, b):
            return b

    with pytest.raises(AssertionError, match="cut into batches"):
        check_observer(Last())


def test_an_observer_that_counts_rows_before_any_is_named():
    class Zero(AbsMax):
        def result(self):
            return torch.zeros(1)

    with pytest.raises(AssertionError, match="CalibrationError"):
        check_observer(Zero())


# solvers ---------------------------------------------------------------------------------------------------------------------------------


class Nearest:
    name = "nearest"
    observes = (Gram(),)

    def solve(self, weight, spec, seen, frozen=None):
        return quantize(weight, spec)


class Halving(Nearest):
    """Throws half of the weight away."""

    name = "halving"

    def solve(self, weight, spec, seen, frozen=None):
        return quantize(weight * 0.5, spec)


class Writing(Nearest):
    name = "writing"

    def solve(self, weight, spec, seen, frozen=None):
        weight.mul_(1.0001)
        return quantize(weight, spec)


class Chancy(Nearest):
    name = "chancy"
    chance = torch.Generator().manual_seed(0)

    def solve(self, weight, spec, seen, frozen=None):
        return quantize(weight * (1 + 0.001 * torch.rand((), generator=self.chance)), spec)


@pytest.mark.parametrize("spec", [int_weight(4, 32), int_weight(3, asymmetric=True), mx(), nvfp4()], ids=str)
def test_rounding_to_nearest_keeps_the_contract(spec):
    check_solver(Nearest(), spec)


@pytest.mark.parametrize(("solver", "says"), [(Halving(), "rounding to nearest has"), (Writing(), "wrote into"), (Chancy(), "different parts")])
def test_a_broken_solver_is_named(solver, says):
    with pytest.raises(AssertionError, match=says):
        check_solver(solver)


# transforms ------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OneSided(Transform):
    """Scales what is written and forgets who reads."""

    name: ClassVar[str] = "one-sided"

    def fit(self, topology, specs, seen, model, reader):
        link = topology.links_with(Invariance.SCALE)[0]
        rewrite = scale_link(link, torch.full((link.size,), 2.0))
        return Rewrite(edits={p.param: rewrite.edits[p.param] for p in link.writes})


@dataclass(frozen=True)
class HandsOn(Transform):
    """Writes into the model itself."""

    name: ClassVar[str] = "hands-on"

    def fit(self, topology, specs, seen, model, reader):
        with torch.no_grad():
            model.lm_head.weight.mul_(2)
        return Rewrite()


@dataclass(frozen=True)
class Astray(Transform):
    name: ClassVar[str] = "astray"

    def fit(self, topology, specs, seen, model, reader):
        from qcore.transforms.rewrite import Scale

        port = topology.links[0].writes[0]
        return Rewrite(edits={"model.layers.7.nothing": (Scale(port, torch.ones(32)),)})


@pytest.mark.parametrize(
    ("transform", "says"), [(OneSided(), "changed the outputs"), (HandsOn(), "wrote into the model"), (Astray(), "does not have")]
)
def test_a_broken_transform_is_named(transform, says):
    with pytest.raises(AssertionError, match=says):
        check_transform(transform, TinyDecoderAdapter(), tiny_decoder(), [tokens()])


# selectors -------------------------------------------------------------------------------------------------------------------------------


class First:
    name = "first"

    def select(self, embeddings, k, scores=None):
        return list(range(k))


class Twice(First):
    name = "twice"

    def select(self, embeddings, k, scores=None):
        return [0] * k


class Random(First):
    name = "random"
    chance = torch.Generator().manual_seed(0)

    def select(self, embeddings, k, scores=None):
        return torch.randperm(len(embeddings), generator=self.chance)[:k].tolist()


def test_selectors():
    check_selector(First())
    with pytest.raises(AssertionError, match="twice"):
        check_selector(Twice())
    with pytest.raises(AssertionError, match="not deterministic"):
        check_selector(Random())


# packings and kernels --------------------------------------------------------------------------------------------------------------------


class Plain(Packing):
    """Keeps codes and scales as they are."""

    name = "plain"

    def refuses(self, spec, shape):
        return None

    def pack(self, q):
        return {f"weight_{n.replace('.', '__')}": t for n, t in q.parts.items()}

    def unpack(self, parts, spec, shape):
        return QTensor(spec, {n.removeprefix("weight_").replace("__", "."): t for n, t in parts.items()}, shape)


class Halves(Plain):
    """Stores scales in bfloat16: bits are lost."""

    name = "halves"

    def pack(self, q):
        return {n: t.bfloat16() if t.is_floating_point() else t for n, t in super().pack(q).items()}


class Matmul:
    name, op, rank = "matmul", "linear", 5

    def refuses(self, job):
        return None if job.packing == "plain" else f"packing {job.packing!r} is not 'plain'"

    def prepare(self, parts, job):
        return dict(parts)

    def weight(self, parts, job) -> Tensor:
        return Plain().unpack(parts, job.weight, job.shape).dequantize()

    def __call__(self, x, parts, job):
        return x @ self.weight(parts, job).to(x.dtype).T


class Off(Matmul):
    name = "off"

    def __call__(self, x, parts, job):
        return super().__call__(x, parts, job) * 1.01


class Greedy(Matmul):
    name = "greedy"

    def refuses(self, job):
        return None


def test_packings():
    check_packing(Plain(), int_weight(4, 32))
    with pytest.raises(AssertionError, match="bit for bit"):
        check_packing(Halves(), int_weight(4, 32))


def test_kernels():
    check_kernel(Matmul(), Plain(), int_weight(4, 32))
    with pytest.raises(AssertionError, match=r"off the dequantized reference by 0\.01"):
        check_kernel(Off(), Plain(), int_weight(4, 32))
    with pytest.raises(AssertionError, match="never heard of"):
        check_kernel(Greedy(), Plain(), int_weight(4, 32))
    with pytest.raises(AssertionError, match="off the dequantized"):
        # forgets to quantize its input
        check_kernel(Matmul(), Plain(), int_weight(4, 32), activation=numbers.int_activation(4))


# modules ---------------------------------------------------------------------------------------------------------------------------------


class Gain(nn.Module):
    name = "gain"

    def __init__(self, size, power=1):
        super().__init__()
        self.size, self.power = size, power
        self.register_buffer("gain", torch.full((size,), 2.0))

    def forward(self, x):
        return x * self.gain**self.power

    def config(self):
        return {"size": self.size, "power": self.power}

    @classmethod
    def from_config(cls, config):
        return cls(**config)


class Forgetful(Gain):
    name = "forgetful"

    def config(self):
        return {"size": self.size}


def test_modules():
    check_module(Gain(3, power=2), torch.ones(2, 3))
    with pytest.raises(AssertionError, match="rebuilt from config and state gives other outputs"):
        check_module(Forgetful(3, power=2), torch.ones(2, 3))


# the pytest plug-in ----------------------------------------------------------------------------------------------------------------------


def test_the_seed_repeats(qcore_seed):
    first = torch.rand(3)
    torch.manual_seed(qcore_seed)
    assert torch.equal(torch.rand(3), first)


def test_the_plugin_imports_nothing_heavy():
    code = "import sys, qcore.testing.pytest_plugin; print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_a_block_transform_is_shown_the_specs_of_its_weights_their_inputs_and_its_taps():
    @dataclass(frozen=True)
    class Sees(Transform):
        name: ClassVar[str] = "sees"
        scope: ClassVar[str] = "block"

        def fit(self, topology, specs, seen, model, reader):
            shown.append(set(specs))
            return Rewrite()

    shown: list[set] = []
    model, adapter = tiny_decoder(layers=2), TinyDecoderAdapter()
    topology = adapter.topology(model)
    specs = {s: int_weight(4) for site in topology.sites for s in (site, site.input)} | {s: int_weight(8) for s in topology.activations}
    fit_transform(Sees(), adapter, model, [], specs)
    assert len(shown) == len(topology.blocks) and not shown[0] & shown[1]
    for block, own in zip(topology.blocks, shown, strict=True):
        assert {s for site in block.sites for s in (site, site.input)} <= own
