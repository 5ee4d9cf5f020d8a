"""What a beginner gets wrong is said by the check of its kind, in one sentence that names the thing, not by a bare traceback or not at all."""

import itertools
import random
import tempfile
from dataclasses import dataclass, is_dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from qcore.calibration import AbsMax, Gram, StreamingObserver
from qcore.calibration.text import data_hash
from qcore.evaluation import Agreement
from qcore.evaluation.store import write_reference
from qcore.model import Block, DictReader, LoadedModel, ModelSource, Site, Topology, parameters_on_meta
from qcore.model.plain import PlainMLP
from qcore.numbers import Int, NumberFormat, QTensor, int_weight, quantize
from qcore.packing import Bits, CompressedInt
from qcore.solvers import RTN, Allocator, BlockSolver, Choice
from qcore.testing import (
    check_adapter,
    check_allocator,
    check_block_solver,
    check_format,
    check_kernel,
    check_module,
    check_observer,
    check_packing,
    check_selector,
    check_solver,
    check_source,
    check_task,
    check_transform,
)
from qcore.testing.models import TinyDecoderAdapter, tiny_decoder, tiny_mlp, tokens
from qcore.transforms import Rewrite, Transform
from torch import Tensor, nn

GLOBAL = "global random numbers of torch"


def broken(base: type, *args: Any, **members: Any) -> Any:
    """An instance of a subclass with these members."""
    made = type("Broken", (base,), members)
    return (dataclass(frozen=True)(made) if is_dataclass(base) and base is not Power else made)(*args)


def by_chance(f: Any) -> Any:
    return lambda *a, **k: (torch.rand(1), f(*a, **k))[1]


def seeding(f: Any) -> Any:
    return lambda *a, **k: (torch.manual_seed(0), f(*a, **k))[1]


def says(check: Any, *args: Any, match: str) -> None:
    with pytest.raises(AssertionError, match=match):
        check(*args)


# formats ---------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("members", "match"),
    [
        ({"name": "Int"}, "lower-case"),
        ({"name": ""}, "has no name"),
        ({"encode": lambda s, x, params=None: None}, "encode made None"),
        ({"encode": lambda s, x: Int.encode(s, x)}, "encode raised TypeError"),
        ({"encode": by_chance(Int.encode)}, GLOBAL),
        ({"encode": seeding(Int.encode)}, GLOBAL),
        ({"encode": lambda s, x, params=None: Int.encode(s, x.mul_(1.5))}, "wrote into x"),
        ({"encode": lambda s, x, params=None: Int.encode(s, x).long()}, "8 bytes each"),
        ({"encode": lambda s, x, params=None: Int.encode(s, x[: len(x)] if x.ndim == 1 else x.flatten())}, "as a matrix|in two dimensions"),
        ({"decode": lambda s, c, params=None: None}, "got None"),
    ],
)
def test_a_format(members, match):
    says(check_format, broken(Int, 4, **members), match=match)


def test_a_format_that_is_a_class_or_no_frozen_dataclass():
    says(check_format, Int, match="this is the class")

    class Loose:
        name, bits, lo, hi, dim, parts = "loose", 2, -1.0, 1.0, 1, ()
        encode = decode = lambda self, x, params=None: x

    @dataclass
    class Thawed(Loose):
        wide: int = 4

    says(check_format, Loose(), match="no frozen dataclass")
    says(check_format, Thawed(), match="no frozen dataclass")
    says(check_format, Halfway(), match="whole number of bits")


@dataclass(frozen=True)
class Halfway(NumberFormat):
    name: ClassVar[str] = "halfway"
    bits: ClassVar[float] = 1.58
    lo: ClassVar[float] = -1.0
    hi: ClassVar[float] = 1.0

    def encode(self, x, params=None):
        return x.round().clamp(-1, 1).to(torch.int8)

    def decode(self, codes, params=None):
        return codes.float()


@dataclass(frozen=True)
class Mean(NumberFormat):
    """-t, 0, t; its fit heeds values of weight 0."""

    name: ClassVar[str] = "mean"
    bits: ClassVar[int] = 2
    lo: ClassVar[float] = -1.0
    hi: ClassVar[float] = 1.0
    parts: ClassVar[tuple[str, ...]] = ("t",)
    heeds: bool = True

    def fit(self, x, weight=None):
        w = torch.ones_like(x) if weight is None or self.heeds else weight
        return {"t": (w * x.abs()).sum(1) / w.sum(1)}

    def encode(self, x, params):
        return (x.sign() * (x.abs() > params["t"] / 2)).to(torch.int8)

    def decode(self, codes, params):
        return codes.float() * params["t"]


def test_a_fit_that_heeds_filling():
    check_format(Mean(heeds=False))
    says(check_format, Mean(), match="heeds values of weight 0")


# observers -------------------------------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Power(StreamingObserver):
    """Mean square of each channel."""

    name: ClassVar[str] = "power"
    parts: ClassVar[tuple[str, ...]] = ("n", "square")

    def _summarize(self, rows, weight):
        w = torch.ones(rows.shape[-2], dtype=torch.float64) if weight is None else weight
        return {"n": w.sum(), "square": w @ rows.double().square()}

    def _join(self, a, b):
        return {k: a[k] + b[k] for k in a}

    def _finish(self, state):
        return state["square"] / state["n"]


def test_a_whole_observer_passes():
    check_observer(Power())


@pytest.mark.parametrize(
    ("members", "match"),
    [
        ({"_summarize": lambda s, r, w: Power._summarize(s, r, None)}, "weight 2 is not two rows"),
        ({"_join": lambda s, a, b: {k: (a[k] + b[k]) / 2 for k in a}}, "cut into batches"),
        ({"_summarize": by_chance(Power._summarize)}, GLOBAL),
        ({"_summarize": lambda s, r, w: Power._summarize(s, r.mul_(2), w)}, "wrote into the rows"),
        ({"_summarize": lambda s, r, w: {**Power._summarize(s, r, w), "more": torch.ones(1)}}, "keeps n, square"),
        ({"_summarize": lambda s, r, w: {"n": torch.ones(())}}, "KeyError: 'square'"),
        ({"_finish": lambda s, state: None}, "returned None"),
        ({"name": "my power"}, "lower-case"),
    ],
)
def test_an_observer(members, match):
    says(check_observer, broken(Power, **members), match=match)


# solvers ---------------------------------------------------------------------------------------------------------------------------------


class Nearest:
    name = "nearest"
    observes = (Gram(),)

    def solve(self, weight, spec, seen, frozen=None):
        return quantize(weight, spec)


def stored(change: Any) -> Any:
    """Nearest rounding, one of whose parts is changed."""

    def solve(self, weight, spec, seen, frozen=None):
        q = quantize(weight, spec)
        return QTensor(q.spec, {**q.parts, **change(q.parts)}, q.shape)

    return solve


def in_one_group(self: Any, weight: Tensor, spec: Any, seen: Any, frozen: Any = None) -> QTensor:
    assert seen["gram"].ndim == 2
    return quantize(weight, spec)


@pytest.mark.parametrize(
    ("members", "match"),
    [
        ({"solve": lambda s, w, spec, seen, frozen=None: w}, "returned a Tensor; return a QTensor"),
        ({"solve": lambda s, w, spec, seen, frozen=None: None}, "returned a NoneType"),
        ({"solve": stored(lambda p: {"codes": p["codes"].long()})}, "part 'codes' is torch.int64"),
        ({"solve": stored(lambda p: {"scale": p["scale"] * 1.0003})}, "must round scales"),
        ({"solve": stored(lambda p: {"extra": p["scale"]})}, "has the parts codes, extra, scale"),
        ({"solve": by_chance(Nearest.solve)}, GLOBAL),
        ({"solve": seeding(Nearest.solve)}, GLOBAL),
        ({"solve": lambda s, w, spec, seen, frozen=None: (seen["gram"].zero_(), quantize(w, spec))[1]}, "wrote into what was seen"),
        ({"solve": in_one_group}, "in 2 groups"),
        ({"observes": (Gram,)}, "list prototypes"),
        ({"observes": ("gram",)}, "list prototypes"),
        ({"observes": None}, "a tuple of observers"),
        ({"name": "Nearest"}, "lower-case"),
    ],
)
def test_a_solver(members, match):
    says(check_solver, broken(Nearest, **members), match=match)


@pytest.mark.parametrize("draw", [random.random, lambda: np.random.rand(1)])
def test_other_peoples_generators_count_too(draw):
    says(check_solver, broken(Nearest, solve=lambda s, w, spec, seen, frozen=None: (draw(), quantize(w, spec))[1]), match="global random numbers")


# packings and kernels --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("members", "match"),
    [
        ({"refuses": lambda s, spec, shape: False}, "returned False; return None where it accepts"),
        ({"refuses": lambda s, spec, shape: ""}, "returned ''"),
        ({"refuses": lambda s, spec, shape: None}, "accepts .* but"),
        ({"pack": lambda s, q: list(CompressedInt.pack(s, q).values())}, "pack.. returned a list; return a dict of tensors"),
        ({"pack": lambda s, q: {**CompressedInt.pack(s, q), "k": 3}}, "'k': 'int'"),
        ({"pack": lambda s, q: (q.codes.sum().item(), CompressedInt.pack(s, q))[1]}, "on meta"),
        ({"pack": lambda s, q: (q.codes.clamp_(-7, 7), CompressedInt.pack(s, q))[1]}, "wrote into the tensor"),
        ({"unpack": lambda s, parts, spec, shape: CompressedInt.unpack(s, parts, spec, shape).parts}, "return QTensor"),
        ({"rows": lambda s, parts, index, spec, shape: {k: t[: len(index)] for k, t in parts.items()}}, "cuts out other rows"),
    ],
)
def test_a_packing(members, match):
    says(check_packing, broken(CompressedInt, **members), int_weight(8), match=match)


class Dequantize:
    """y = x Ŵᵀ, by whatever the packing unpacks."""

    name, op, rank = "dequantize", "linear", 5

    def refuses(self, job):
        return None if job.packing == "bits" else f"reads 'bits', got {job.packing!r}"

    def prepare(self, parts, job):
        return dict(parts)

    def __call__(self, x, parts, job):
        return x @ job.unpack(parts).dequantize().to(x.dtype).T


def only_int4(self: Any, x: Tensor, parts: Any, job: Any) -> Tensor:
    q = job.unpack(parts)
    return x @ (q.codes.float() * q.scale().reshape(len(q.codes), -1)[:, :1]).to(x.dtype).T  # one scale a row


@pytest.mark.parametrize(
    ("members", "match"),
    [
        ({"refuses": lambda s, job: True}, "returned True"),
        ({"prepare": lambda s, parts, job: None}, "prepare.. returned None"),
        ({"prepare": lambda s, parts, job: {k: v.zero_() for k, v in parts.items()}}, "wrote into the stored parts"),
        ({"__call__": lambda s, x, parts, job: (x[0], Dequantize.__call__(s, x, parts, job))[1]}, r"x \[0, 128\].*IndexError"),
        ({"__call__": only_int4}, "which accepts .* too"),
        ({"op": "liner"}, "op 'liner'"),
        ({"rank": None}, "has no rank"),
    ],
)
def test_a_kernel(members, match):
    check_kernel(Dequantize(), Bits(), int_weight(8))
    says(check_kernel, broken(Dequantize, **members), Bits(), int_weight(8), match=match)


class Scaled(nn.Module):
    name = "scaled"

    def config(self):
        return {}

    @classmethod
    def from_config(cls, config):
        return cls()

    def forward(self, x):
        return x, None


@pytest.mark.parametrize(
    ("members", "match"),
    [
        ({"config": lambda s: {"s": torch.ones(1)}}, "config.*as JSON,.* not JSON serializable"),
        ({"from_config": classmethod(lambda cls, config: None)}, "gave a NoneType"),
        ({"forward": lambda s, x: None}, "forward gave no tensor"),
        ({"name": "Scaled"}, "lower-case"),
    ],
)
def test_a_module(members, match):
    check_module(Scaled(), torch.ones(2))  # several outputs, one of them a tensor
    says(check_module, broken(Scaled, **members), torch.ones(2), match=match)


# transforms ------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Nothing(Transform):
    name: ClassVar[str] = "nothing"

    def fit(self, topology, specs, seen, model, reader):
        return Rewrite()


def fitted(result: Any) -> dict[str, Any]:
    return {"fit": lambda s, topology, specs, seen, model, reader: result(topology)}


def wanting(result: Any) -> dict[str, Any]:
    return {"wants": lambda s, topology, specs: result(topology)}


@pytest.mark.parametrize(
    ("members", "match"),
    [
        (fitted(lambda t: None), "returned None; return a Rewrite"),
        (fitted(lambda t: (torch.rand(1), Rewrite())[1]), GLOBAL),
        (wanting(lambda t: [AbsMax()]), r"wants\(\) returns"),
        (wanting(lambda t: {t.sites[0].input: AbsMax()}), r"wants\(\) returns"),
        (wanting(lambda t: {t.sites[0].input: (AbsMax,)}), "with prototypes"),
        (wanting(lambda t: {Site("no.such", "input"): (AbsMax(),)}), "no module 'no.such'"),
        ({"scope": "blocks"}, "scope is 'block' or 'model'"),
    ],
)
def test_a_transform(members, match):
    says(check_transform, broken(Nothing, **members), TinyDecoderAdapter(), tiny_decoder(), [tokens()], match=match)


def test_a_transform_that_finds_another_rewrite_each_time():
    from qcore.model import Invariance
    from qcore.transforms import scale_link

    chance = torch.Generator().manual_seed(0)

    def fit(s, topology, specs, seen, model, reader):
        links = topology.links_with(Invariance.SCALE)
        return scale_link(links[0], torch.full((links[0].size,), 1 + float(torch.rand(1, generator=chance))))

    transform = broken(Nothing, fit=fit, scope="model")
    says(check_transform, transform, PlainMLP(), tiny_mlp(), [torch.ones(4, 16)], match="finds two rewrites")


# adapters --------------------------------------------------------------------------------------------------------------------------------


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


class StackAdapter:
    name = "stack"

    def matches(self, model):
        return isinstance(model, Stack)

    def topology(self, model):
        from qcore.model import Port

        axes = [Port(f"{n}.weight", axis) for n in "ab" for axis in ("in", "out")]
        return Topology((Block("", ((Site("a"),), (Site("b"),))),), (), dict.fromkeys(axes, "not told"))

    def prepare(self, model):
        pass

    def outputs(self, model, batch):
        return model(batch)

    def context(self, batch):
        from qcore.model.tap import RunContext

        return RunContext()


def laid_out(*blocks: Block) -> dict[str, Any]:
    return {"topology": lambda s, m: replace(StackAdapter.topology(s, m), blocks=blocks)}


@pytest.mark.parametrize(
    ("members", "match"),
    [
        ({"matches": lambda s, m: True}, "without a single layer"),
        ({"matches": lambda s, m: m.a.in_features == 4}, "another family, raised AttributeError"),
        ({"topology": lambda s, m: None}, "return a Topology"),
        (laid_out(), "no blocks"),
        (laid_out(Block("c", ((Site("a"),),))), "block 'c': the model has no such module"),
        (laid_out(Block("", (Site("a"), Site("b")))), "tuples of sites"),
        (laid_out(Block("", ((Site("a"),), (Site("a"),)))), "a:weight stands in the topology twice"),
        (laid_out(Block("", ((Site("b"),), (Site("a"),)))), "b:weight of stage 0 reads what stage 1 puts out"),
        (laid_out(Block("b", ((Site("b"),),), "rerun"), Block("a", ((Site("a"),),), "rerun")), "run in the order a, b"),
        (laid_out(Block("a", ((Site("a"),),)), Block("b", ((Site("b"),),))), "does not read what block 'a' puts out"),
        ({"topology": lambda s, m: (float(m.a.weight.detach().sum()), StackAdapter.topology(s, m))[1]}, "on meta"),
        ({"topology": by_chance(StackAdapter.topology)}, GLOBAL),
        ({"outputs": lambda s, m, batch: (m(batch),)}, "gives a tuple"),
    ],
)
def test_an_adapter(members, match):
    check_adapter(StackAdapter(), Stack(), torch.ones(2, 4))
    says(check_adapter, broken(StackAdapter, **members), Stack(), torch.ones(2, 4), match=match)


# selectors -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("select", "match"),
    [
        (lambda s, e, k, scores=None: None, "raised TypeError"),
        (lambda s, e, k, scores=None: [i + 0.5 for i in range(k)], "whole numbers"),
        (lambda s, e, k, scores=None: e[:k], "whole numbers"),
        (lambda s, e, k, scores=None: torch.randperm(len(e))[:k], GLOBAL),
        (lambda s, e, k, scores=None: scores.argsort()[:k], "only CalibrationError is allowed"),
    ],
)
def test_a_selector(select, match):
    says(check_selector, broken(object, name="mine", select=select), match=match)


# what takes part in a whole run ----------------------------------------------------------------------------------------------------------


class Demo(ModelSource):
    name: ClassVar[str] = "demo"
    help: ClassVar[str] = "demo:4"

    def matches(self, uri):
        return uri.startswith("demo:")

    def weights(self):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Linear(4, 4).state_dict()

    def skeleton_of(self):
        with parameters_on_meta():
            return nn.Linear(4, 4)

    def load(self, uri):
        return LoadedModel(self.skeleton_of(), DictReader(self.weights()), uri, source=self.name)


@pytest.mark.parametrize(
    ("members", "match"),
    [
        ({"matches": lambda s, uri: True}, "takes the addresses of all other sources"),
        ({"matches": lambda s, uri: None}, "is not True"),
        ({"load": lambda s, uri: s.skeleton_of()}, "return a LoadedModel"),
        ({"skeleton_of": lambda s: nn.Linear(4, 4)}, "parameters_on_meta|global random"),
        ({"weights": lambda s: {"weight": torch.ones(4, 4)}}, "lacks 1 of the model's parameters"),
        ({"weights": lambda s: {"weight": torch.ones(4, 3), "bias": torch.ones(4)}}, "in the skeleton"),
        ({"weights": seeding(lambda s: {"weight": torch.ones(4, 4), "bias": torch.ones(4)})}, GLOBAL),
        ({"help": ""}, "no help"),
    ],
)
def test_a_source(members, match):
    assert check_source(Demo(), "demo:4").source == "demo"
    says(check_source, broken(Demo, **members), "demo:4", match=match)


NEAREST, NUMBERS = Nearest(), itertools.count()


class Eight(Allocator):
    """8 bits for the first."""

    name: ClassVar[str] = "eight"
    solvers = (RTN(),)

    def allocate(self, sites, look):
        return {sites[0]: Choice(int_weight(8), RTN())}


@pytest.mark.parametrize(
    ("members", "match"),
    [
        ({"allocate": lambda s, sites, look: None}, "return {site: Choice"),
        ({"allocate": lambda s, sites, look: {sites[0]: int_weight(8)}}, "return {site: Choice"),
        ({"allocate": lambda s, sites, look: {Site("no.such"): Choice(int_weight(8), RTN())}}, "chose for no.such"),
        ({"allocate": by_chance(Eight.allocate)}, GLOBAL),
        ({"allocate": lambda s, sites, look: {sites[0]: Choice(int_weight(8), NEAREST)}}, "chose Nearest, which `solvers` does not name"),
        ({"allocate": lambda s, sites, look: {sites[0]: Choice(int_weight(8), RTN(), f"number {next(NUMBERS)}")}}, "chooses twice otherwise"),
        ({"needs": "everything"}, "`needs` is one of"),
        ({"solvers": None}, "`solvers` is a tuple"),
    ],
)
def test_an_allocator(members, match):
    assert len(check_allocator(Eight())) == 1
    says(check_allocator, broken(Eight, **members), match=match)


class Idle(BlockSolver):
    name: ClassVar[str] = "idle"

    def solve_block(self, view):
        return {}


def zeros(self: Any, view: Any) -> Any:
    return {site: QTensor(q.spec, {**q.parts, "codes": torch.zeros_like(q.codes)}, q.shape) for site, q in view.start.items()}


@pytest.mark.parametrize(
    ("members", "match"),
    [
        ({"solve_block": lambda s, view: None}, "return {site: QTensor}"),
        ({"solve_block": zeros}, "made the block's outputs worse"),
        ({"solve_block": by_chance(Idle.solve_block)}, GLOBAL),
        ({"solve_block": lambda s, view: {Site("no.such"): next(iter(view.start.values()))}}, "no.such.*not in the block"),
        ({"solve_block": lambda s, view: {k: quantize(q.dequantize(), int_weight(8)) for k, q in view.start.items()}}, "came back as int8"),
        ({"refuses": lambda s, spec: "not this one"}, "not this one"),
        ({"target": "near"}, "target is"),
    ],
)
def test_a_block_solver(members, match):
    check_block_solver(Idle())
    says(check_block_solver, broken(Idle, **members), match=match)


@dataclass(frozen=True)
class Regression:
    name: ClassVar[str] = "regression"
    better: ClassVar[dict[str, bool]] = {"mse": False}
    rows: Tensor

    def data(self):
        return data_hash(self.rows)

    def sample(self):
        return self.rows[:1]

    def reference(self, forward, folder, progress=None):
        return write_reference(folder, [forward(self.rows).detach()], len(self.rows), self.data())

    def evaluate(self, forward, reference, progress=None):
        return {"mse": float((forward(self.rows).detach() - reference.read(0, reference.rows)).square().mean())}


@pytest.mark.parametrize(
    ("members", "match"),
    [
        ({"better": {"mse": True}}, "which `better` prefers"),
        ({"better": {"rmse": False}}, "none tells which model is better"),
        ({"better": {}}, "`better` says"),
        ({"data": lambda s: None}, "sha256"),
        ({"reference": lambda s, forward, folder, progress=None: forward(s.rows)}, "return what write_reference gives"),
        ({"evaluate": lambda s, forward, reference, progress=None: {"mse": torch.ones(())}}, "scores are numbers"),
        ({"evaluate": lambda s, forward, reference, progress=None: {"mse": float(torch.rand(1))}}, GLOBAL),
    ],
)
def test_a_task(members, match):
    rows, model = torch.linspace(-1, 1, 64).reshape(16, 4), tiny_linear()
    assert check_task(Regression(rows), model) == {"mse": 0.0}
    says(check_task, type("Broken", (Regression,), members)(rows), model, match=match)


def tiny_linear() -> nn.Module:
    layer = nn.Linear(4, 3)
    nn.init.eye_(layer.weight)
    return layer.eval()


def test_the_task_of_qcore_keeps_the_contract():
    check_task(Agreement([torch.linspace(-1, 1, 64).reshape(16, 4)]), tiny_linear())


def test_a_check_leaves_nothing_behind(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    check_task(Regression(torch.linspace(-1, 1, 64).reshape(16, 4)), tiny_linear())
    assert list(tmp_path.iterdir()) == []
