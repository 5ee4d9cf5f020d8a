"""The preflight: exact sizes, every decision with its reason, every violation at once, and no weight touched."""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from qcore.errors import PlanError
from qcore.model import Block, DictReader, Invariance, Link, LoadedModel, ModelAdapter, Port, Site, Topology, parameters_on_meta
from qcore.numbers import Codebook, Int, PerGroup, PerTensor, QuantSpec, Tile, int_activation, int_weight, nvfp4, quantize
from qcore.ops import ReferenceLinear, TorchInt4Linear, TorchInt8DynamicLinear
from qcore.packing import Bits, CompressedInt, CompressedPack
from qcore.plan import make_plan, packed_bytes
from qcore.recipe import Recipe, Rule
from torch import nn


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.up = nn.Linear(64, 160, bias=False)
        self.down = nn.Linear(160, 64, bias=False)


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.head = nn.Linear(64, 50, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("table", torch.ones(3), persistent=False)


class TinyAdapter(ModelAdapter):
    name: ClassVar[str] = "tiny"

    def matches(self, model: nn.Module) -> bool:
        return isinstance(model, Tiny)

    def topology(self, model: nn.Module) -> Topology:
        def block(i: int) -> Block:
            return Block(f"layers.{i}", ((Site(f"layers.{i}.up"),), (Site(f"layers.{i}.down"),)))

        def link(i: int) -> Link:
            name = f"layers.{i}"
            ports = (Port(f"{name}.up.weight", "out"),), (Port(f"{name}.down.weight", "in"),)
            return Link(f"{name}.up→down", 160, *ports, invariance=Invariance.SCALE)

        residual = Link("residual", 64, (Port("embed.weight", "out"),), (Port("layers.0.up.weight", "in"),), invariance=Invariance.ROTATE)
        return Topology(blocks=(block(0), block(1)), links=(link(0), link(1), residual))


@dataclass(frozen=True)
class Nearest:
    name: ClassVar[str] = "rtn"
    observes: ClassVar[tuple[Any, ...]] = ()


@dataclass(frozen=True)
class Looking:
    name: ClassVar[str] = "gptq"
    observes: ClassVar[tuple[Any, ...]] = ("gram",)


@dataclass(frozen=True)
class Easing:
    """A transform that watches the inputs of all `down`, or of `up` as well."""

    name: ClassVar[str] = "ease"
    scope: str = "block"
    also: str = "down"

    def wants(self, topology: Topology, specs: Mapping[Site, QuantSpec]) -> Mapping[Site, tuple[Any, ...]]:
        return {s.input: ("absmax",) for s in topology.sites if s.module.endswith(("down", self.also))}


KERNELS = (ReferenceLinear, TorchInt4Linear, TorchInt8DynamicLinear)
REGISTRY: Any = SimpleNamespace(
    packings={c.name: c for c in (CompressedPack, CompressedInt, Bits)},
    kernels={k.name: k for k in KERNELS},
)


def loaded(**changes: Any) -> LoadedModel:
    torch.manual_seed(0)
    weights = {k: v.detach().clone() for k, v in Tiny().state_dict().items() if k != "head.weight"}
    for name, value in changes.items():
        weights.pop(name.replace("__", "."), None) if value is None else weights.__setitem__(name.replace("__", "."), value)
    with parameters_on_meta():
        model = Tiny()
    model.head.weight = model.embed.weight
    return LoadedModel(model, DictReader(weights), "tiny", torch.float32, notes=("weights are synthetic",))


def recipe(*rules: Rule, solver: Any = None, transforms: tuple[Any, ...] = ()) -> Recipe:
    return Recipe(name="r", rules=rules or (Rule("*:weight", int_weight(4, 32)),), solver=solver or Nearest(), transforms=transforms)


def plan(made: Recipe, model: LoadedModel | None = None, **options: Any) -> Any:
    return make_plan(model or loaded(), made, TinyAdapter(), REGISTRY, **options)


def test_a_sound_plan_has_a_decision_for_each_site_and_no_problem() -> None:
    made = plan(recipe())
    assert [d.site for d in made.decisions] == [f"layers.{i}.{n}:weight" for i in (0, 1) for n in ("up", "down")]
    assert made.problems == () and made.require() is None
    assert {(d.solver, d.packing, d.spec) for d in made.decisions} == {("rtn", "ct-pack", "int4 per group 32, scale float16")}
    assert all(d.kernel in {k.name for k in KERNELS} for d in made.decisions)
    assert made.notes == ("weights are synthetic",) and not made.needs_data


def test_no_weight_is_read() -> None:
    model = loaded()

    class Names(DictReader):
        def __getitem__(self, name: str) -> torch.Tensor:
            raise AssertionError(f"{name} was read")

    plan(recipe(), replace(model, reader=Names({n: torch.zeros(1) for n in model.reader.names()})))
    assert all(p.is_meta for p in model.model.parameters())


def test_sizes_are_those_of_packed_bytes() -> None:
    made = plan(recipe())
    parameters = 50 * 64 + 2 * (64 * 160 * 2 + 128)
    packed = 2 * sum(n * k // 2 + n * (k // 32) * 2 + 16 for n, k in ((160, 64), (64, 160)))
    assert made.bytes_before == 4 * parameters  # the head shares the embedding's
    assert made.bytes_after == 4 * (parameters - 4 * 64 * 160) + packed
    assert made.effective_bits == pytest.approx(8 * packed / (4 * 64 * 160))


SPECS = [int_weight(4, 32), int_weight(3, 32, asymmetric=True), nvfp4(), int_weight(8), QuantSpec(format=Int(4), granularity=Tile(48, 32)),
         QuantSpec(format=Codebook(3, iterations=2), granularity=PerTensor())]  # fmt: skip


@pytest.mark.parametrize("shape", [(16, 64), (200, 64), (7 * 48, 96)], ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_packed_size_is_the_size_of_real_packed_parts(spec: QuantSpec, shape: tuple[int, int]) -> None:
    real = Bits().pack(quantize(torch.randn(shape), spec))
    assert packed_bytes(Bits(), spec, shape) == pytest.approx(sum(t.numel() * t.element_size() for t in real.values()), rel=0.002)


def test_a_plan_does_not_wake_the_compiler() -> None:
    before = "torch._dynamo" in sys.modules
    plan(recipe())
    assert ("torch._dynamo" in sys.modules) == before


def test_what_stays_float_says_why() -> None:
    made = plan(recipe(Rule("*:weight", int_weight(4, 32)), Rule("layers.1.*:weight", None)))
    assert made.left_float["layers.1.down.weight"] == "rule 'layers.1.*:weight' says so"
    assert made.left_float["layers.0.norm.weight"].startswith("a vector")
    assert made.left_float["embed.weight"].startswith("outside the blocks")
    assert "layers.0.down.weight" not in made.left_float


def test_kinds_summarise_alike_sites() -> None:
    rows = plan(recipe()).kinds()
    assert [(r["count"], r["kind"], r["shape"]) for r in rows] == [(2, "up:weight", [160, 64]), (2, "down:weight", [64, 160])]


def test_every_violation_comes_at_once_with_place_and_next_step() -> None:
    made = plan(
        recipe(
            Rule("*:weight", int_weight(4, 48)),
            Rule("layers.0.down:weight", QuantSpec(format=Int(5), granularity=PerGroup(32)), packing="ct-pack"),
            Rule("*.donw:weight", None),
            solver=Looking(),
        ),
        loaded(layers__0__up__weight=None, stray=torch.zeros(2)),
        has_data=False,
    )
    expected = [
        r"layers.0.up:weight, layers.1.up:weight: group size 48 does not divide K=64; use granularity 'channel', or a divisor of 64: 32, 64",
        r"layers.1.down:weight: group size 48 does not divide K=160",
        r"layers.0.down:weight: packing 'ct-pack' refuses int5 per group 32",
        r"the pattern '*.donw:weight' matches none of the 8 sites of tiny; sites look like layers.1.down:weight and layers.0.down:weight",
        r"the weights lack layers.0.up.weight, which the model has",
        r"the weights hold stray, which the model does not have",
        r"recipe 'r' looks at calibration data, and there is none; pass --calib text.txt",
    ]
    for text in expected:
        assert any(text in problem for problem in made.problems), (text, made.problems)
    assert len(made.problems) == len(expected)
    with pytest.raises(PlanError, match="7 problems found before any computing"):
        made.require()


def test_a_recipe_of_fine_tuning_names_the_command_that_runs_it() -> None:
    made = plan(recipe(Rule("*:weight", int_weight(4, 32)), Rule("*:grad", int_weight(8, 32))))
    assert made.problems == ("the rule '*:grad' is about gradients, which only fine-tuning has: `qcore tune` runs this recipe",)


def test_a_transform_that_looks_needs_data_too() -> None:
    assert plan(recipe(transforms=(Easing(),)), has_data=False).problems[0].startswith("recipe 'r' looks at calibration data")
    assert plan(recipe(transforms=(Easing(),)), has_data=True).needs_data


def test_a_transform_shows_the_links_it_works_on() -> None:
    (use,) = plan(recipe(transforms=(Easing(),))).transforms
    assert use.links == ("layers.0.up→down", "layers.1.up→down") and use.observes == 2


def test_a_transform_that_touches_one_end_of_a_tied_pair_is_noted_with_its_price() -> None:
    made = plan(recipe(transforms=(Easing(scope="model", also="up"),)))
    assert "residual" in made.transforms[0].links
    (note,) = [n for n in made.notes if "tied" in n]
    assert "touches embed.weight, which is tied to head.weight: they may become two tensors, which adds 0.0 MB" in note


def test_a_tied_head_that_is_not_stored_is_not_missing() -> None:
    model = loaded()
    assert "head.weight" not in model.reader and plan(recipe(), model).problems == ()


def test_an_input_rule_without_its_weight_is_noted() -> None:
    rules = (Rule("*:input", int_activation()), Rule("*:weight", int_weight(8)), Rule("layers.0.up:weight", None))
    made = plan(recipe(*rules))
    assert any(
        "layers.0.up:input is not quantized, though a rule names it: rule 'layers.0.up:weight' leaves its weight float" in n for n in made.notes
    )
    assert made.decisions[0].activation == "int8 per token dynamic" and made.decisions[0].packing == "ct-int"


def test_a_recipe_that_quantizes_nothing_is_a_problem() -> None:
    assert "quantizes nothing" in plan(recipe(Rule("*:weight", None))).problems[0]


def test_the_plan_is_json_ready() -> None:
    data = json.loads(json.dumps(plan(recipe(transforms=(Easing(),))).to_dict()))
    assert data["size"]["before_bytes"] == plan(recipe()).bytes_before and len(data["sites"]) == 4
    assert data["estimate"]["at_flops_per_second"] == 5e10


def test_static_scales_that_no_calibration_can_find_are_a_problem() -> None:
    class Tapped(TinyAdapter):
        def topology(self, model: nn.Module) -> Topology:
            return replace(super().topology(model), activations=(Site("layers.0", "h"),))

    static = replace(int_activation(), when="static")  # per token, so that no two batches share a scale
    rules = (Rule("*:weight", int_weight(8)), Rule("*:h", static), Rule("*.up:input", static))
    problems = make_plan(loaded(), recipe(*rules), Tapped(), REGISTRY).problems
    assert any("layers.0.up:input, layers.1.up:input, layers.0:h" in p and "per tensor, per channel (axis 1), group or head" in p for p in problems)


def test_tensors_inside_modules_are_counted_by_what_they_become() -> None:
    class Tapped(TinyAdapter):
        def topology(self, model: nn.Module) -> Topology:
            return replace(super().topology(model), activations=(Site("layers.0", "h"), Site("layers.1", "h"), Site("layers.1", "c")))

    rules = (Rule("*:weight", int_weight(8)), Rule("*:[hc]", int_activation()), Rule("layers.1:c", None))
    made = make_plan(loaded(), recipe(*rules), Tapped(), REGISTRY)
    assert "inside modules: 2 × h int8 per token dynamic" in made.notes


def test_a_policy_for_a_cache_is_refused_where_there_is_none() -> None:
    policy = Rule("*:[kv]", int_activation(4), window=0)
    problems = make_plan(loaded(), recipe(Rule("*:weight", int_weight(8)), policy), TinyAdapter(), REGISTRY).problems
    assert len(problems) == 1 and "is about a cache of keys and values" in problems[0] and "drop the rule" in problems[0]
