"""Laws of recipe files: what is dumped loads back equal, and every mistake is named with its place."""

from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from qcore.calibration import MSE
from qcore.errors import NotFound, QcoreError, SpecError
from qcore.numbers import (
    Codebook,
    Float,
    Int,
    Offset,
    PerChannel,
    PerGroup,
    PerTensor,
    PowerOfTwo,
    QuantSpec,
    Tile,
    fp8_weight,
    int_activation,
    int_weight,
    mx,
    nvfp4,
)
from qcore.plugins.registry import Registry
from qcore.plugins.shelf import Shelf
from qcore.recipe import CalibrationSettings, Recipe, Rule
from qcore.recipe_file import dump, load_recipe, override, parse_recipe
from qcore.transforms import FoldBatchNorm

RECIPES = Path(__file__).parents[1] / "src/qcore/recipes"


@dataclass(frozen=True)
class Nearest:
    name: ClassVar[str] = "rtn"
    clip: Literal["none", "mse"] = "none"
    grid: int | None = 100
    weighted: bool = False
    observes: ClassVar[tuple[()]] = ()


@dataclass(frozen=True)
class Columns:
    name: ClassVar[str] = "gptq"
    damp: float = 0.01
    act_order: bool = False
    clip: str = "mse"
    signed_scale: bool = True
    inner: Nearest = field(default_factory=Nearest)
    sizes: tuple[int, ...] = ()
    observes: ClassVar[tuple[()]] = ()


@dataclass(frozen=True)
class Smooth:
    name: ClassVar[str] = "smoothquant"
    alpha: float = 0.5


@dataclass(frozen=True)
class Awq:
    name: ClassVar[str] = "awq"


def shelf(kind: str, *items: Any) -> Shelf[Any]:
    made: Shelf[Any] = Shelf(kind, list)
    for item in items:
        made.add(item.stem if isinstance(item, Path) else item.name, item, "toy")
    return made


def toy_registry() -> Any:
    return SimpleNamespace(
        formats=shelf("formats", Int, Float, PowerOfTwo, Codebook),
        solvers=shelf("solvers", Nearest, Columns),
        transforms=shelf("transforms", Smooth, Awq, FoldBatchNorm),
        observers=shelf("observers", MSE),
        packings=shelf("packings"),
        recipes=shelf("recipes", *sorted(RECIPES.glob("*.toml"))),
    )


@pytest.fixture
def registry() -> Any:
    return toy_registry()


SPECS = [
    int_weight(4, 64),
    int_weight(2, 32, asymmetric=True, scale="bfloat16"),
    int_activation(8),
    fp8_weight(),
    mx(),
    mx(Int(8), rule="ceil"),
    nvfp4(),
    QuantSpec(format=Codebook(4, dim=2, per_block=True), granularity=Tile(16, 32), offset=Offset.VALUE),
    QuantSpec(format=Int(8, signed=False), granularity=PerTensor(), offset=Offset.CODE, scale="float16"),
    None,
]
SOLVERS = [Nearest(), Nearest("mse", None), Columns(), Columns(damp=1e-5, act_order=True, inner=Nearest("mse"), sizes=(1, 2))]


@st.composite
def recipes(draw: Any) -> Recipe:
    rules = draw(
        st.lists(
            st.builds(
                Rule,
                st.sampled_from(["*:weight", '*.q"uo\\ted:weight', "lm_head:weight", "日本:\x7f"]),
                st.sampled_from(SPECS),
                st.sampled_from([None, *SOLVERS]),
                st.just(None),
                st.sampled_from(["auto", "spec"]),
            ),
            min_size=1,
            max_size=3,
        )
    )
    return Recipe(
        name="mine",
        description=draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=20)),
        rules=tuple(rules),
        solver=draw(st.sampled_from(SOLVERS)),
        transforms=draw(st.sampled_from([(), (Smooth(0.25),), (Awq(), Smooth())])),
        calibration=draw(st.builds(CalibrationSettings, st.integers(1, 99), st.integers(1, 99), st.integers(1, 9), st.integers(0, 9))),
        propagate=draw(st.sampled_from(["float", "weights", "all"])),
    )


@given(recipe=recipes())
def test_what_is_dumped_loads_back_equal(recipe: Recipe) -> None:
    assert parse_recipe(dump(recipe), toy_registry(), name="mine") == recipe


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda p: p.stem)
def test_shipped_recipe_has_its_files_name_and_survives_a_dump(path: Path) -> None:
    registry = Registry("")  # qcore's own classes, which its recipes name
    recipe = load_recipe(path.stem, registry)
    assert recipe.name == path.stem and recipe.description
    assert parse_recipe(dump(recipe), registry, name=recipe.name) == recipe


def test_promised_recipes_are_shipped() -> None:
    names = {p.stem for p in RECIPES.glob("*.toml")}
    weights = {"w8a16-rtn", "w4a16-rtn", "w4a16-awq", "w4a16-gptq", "w3a16-gptq", "w2a16-gptq", "mixed"}
    caches = {"kv8", "kv4", "kv2-kivi", "rtn-w4a4kv4"}
    assert names >= weights | caches | {"smoothquant-w8a8", "fp8", "mxfp4", "nvfp4", "zeroquant-fp-w4a8", "cnn-w8a8", "cnn-w4a8"}


def test_shipped_recipe_says_what_its_name_says(registry: Any) -> None:
    w4 = load_recipe("w4a16-gptq", registry)
    assert w4.rules == (Rule("*:weight", QuantSpec(format=Int(4), granularity=PerGroup(64))),)
    assert w4.solver == Columns(damp=0.01) and w4.transforms == ()
    w8a8 = load_recipe("smoothquant-w8a8", registry)
    assert [r.spec for r in w8a8.rules] == [QuantSpec(format=Int(8), granularity=PerChannel(0)), int_activation(8)]
    assert w8a8.transforms == (Smooth(0.5),)
    assert load_recipe("fp8", registry).rules[0].spec == fp8_weight()


# overrides and extending ----------------------------------------------------------------------------------------------------------------


def test_set_changes_one_value_and_nothing_else(registry: Any) -> None:
    base = load_recipe("w4a16-gptq", registry)
    changed = load_recipe("w4a16-gptq", registry, ["solver.damp=0.05", "rules.0.granularity.size=32", "calibration.samples=8"])
    assert changed.solver == replace(base.solver, damp=0.05)
    assert changed.rules[0].spec == QuantSpec(format=Int(4), granularity=PerGroup(32))
    assert changed.calibration == replace(base.calibration, samples=8)


def test_set_of_a_name_starts_the_table_anew(registry: Any) -> None:
    assert load_recipe("w4a16-gptq", registry, ["solver.name=rtn"]).solver == Nearest()
    assert load_recipe("w4a16-gptq", registry, ["rules.0.granularity.name=channel"]).rules[0].spec == QuantSpec(
        format=Int(4), granularity=PerChannel()
    )
    assert load_recipe("w4a16-gptq", registry, ["rules.0.granularity=channel"]).rules[0].spec == QuantSpec(format=Int(4), granularity=PerChannel())


def test_set_does_not_touch_the_table_it_was_given() -> None:
    table = {"solver": {"name": "gptq", "damp": 0.01}}
    assert override(table, "solver.damp=0.5") == {"solver": {"name": "gptq", "damp": 0.5}}
    assert table == {"solver": {"name": "gptq", "damp": 0.01}}


def test_extends_merges_tables_and_appends_rules(registry: Any, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('extends = "w4a16-gptq"\n[solver]\nact_order = true\n[[rules]]\nsites = "*.down_proj:weight"\nfloat = true\n')
    recipe = load_recipe(file, registry)
    assert recipe.name == "mine" and recipe.solver == Columns(damp=0.01, act_order=True)
    assert recipe.rules[1] == Rule("*.down_proj:weight", None) and len(recipe.rules) == 2
    other = tmp_path / "other.toml"
    other.write_text('extends = "./mine.toml"\nsolver = "rtn"\n')
    assert load_recipe(other, registry).solver == Nearest()


def test_extending_in_a_circle_is_refused(registry: Any, tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('extends = "./b.toml"')
    (tmp_path / "b.toml").write_text('extends = "./a.toml"')
    with pytest.raises(SpecError, match=r"extends itself, through a.toml → b.toml → a.toml"):
        load_recipe(tmp_path / "a.toml", registry)


# mistakes -------------------------------------------------------------------------------------------------------------------------------

GOOD = '[[rules]]\nsites = "*:weight"\nformat = { name = "int", bits = 4 }\ngranularity = { name = "group", size = 64 }\n[solver]\nname = "gptq"\n'

MISTAKES = {
    "an unknown key near a known one": ("solver.dampp=0.05", SpecError, r"solver 'gptq' has no field 'dampp'; did you mean 'damp'\?; have: damp"),
    "a wrong type": ("solver.damp='a lot'", SpecError, r"solver\.damp: wants float, got 'a lot' \(str\)"),
    "a flag that is a number": ("solver.act_order=1", SpecError, r"solver\.act_order: wants bool, got 1 \(int\)"),
    "an unknown class": ("solver.name=gtpq", NotFound, r"no solver named 'gtpq'; did you mean 'gptq'"),
    "an unknown format": ("rules.0.format.name=imt", NotFound, r"rules\.0\.format: no format named 'imt'; did you mean 'int'"),
    "an unknown granularity": ("rules.0.granularity.name=grup", SpecError, r"no granularity named 'grup'; did you mean 'group'"),
    "a value the class refuses": ("rules.0.format.bits=9", SpecError, r"rules\.0\.format: integers have 1 to 8 bits, got bits=9"),
    "a field of another class": ("rules.0.granularity.axis=1", SpecError, r"granularity 'group' has no field 'axis'; have: size"),
    "a rule that is not there": ("rules.3.float=true", SpecError, r"no entry '3' in an array of 1; entries count from 0"),
    "a step into a number": ("rules.0.format.bits.x=1", SpecError, r"'x' is asked of 4, which is a plain value"),
    "no value": ("solver.damp", SpecError, r"not of the form a\.b\.c=value"),
    "a value that is not TOML": ("solver.damp=0..5", SpecError, r"'0\.\.5' is no TOML value"),
    "an unknown section": ("colour=1", SpecError, r"unknown key 'colour'; have: description"),
    "a near section": ("calibratoin.samples=3", SpecError, r"unknown key 'calibratoin'; did you mean 'calibration'\?"),
    "an unknown scale": ("rules.0.scale=float8", SpecError, r"rules\.0: unknown scale dtype 'float8'"),
    "an impossible setting": ("calibration.samples=0", SpecError, r"calibration\.samples is at least 1, got 0"),
    "an unknown offset": ("rules.0.offset=zero", SpecError, r"rules\.0\.offset: wants one of none, code, value, got 'zero'"),
    "float and a format": ("rules.0.float=true", SpecError, r"float = true leaves these sites float, yet 'format'"),
}


@pytest.mark.parametrize(("setting", "error", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named_with_its_place(registry: Any, setting: str, error: type[QcoreError], message: str) -> None:
    with pytest.raises(error, match=message):
        load_recipe("w4a16-gptq", registry, [setting])


def test_an_unknown_recipe_offers_near_names(registry: Any) -> None:
    with pytest.raises(NotFound, match="no recipe named 'w4a16-gtpq'; did you mean 'w4a16-gptq'"):
        load_recipe("w4a16-gtpq", registry)
    with pytest.raises(NotFound, match=r"no recipe file nowhere\.toml"):
        load_recipe("nowhere.toml", registry)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rules = 3", "wants 'solver'"),
        ("[[rules]\n", "is not TOML"),
        (GOOD.replace('format = { name = "int", bits = 4 }\n', ""), r"rules\.0: wants 'format'; or float = true"),
        (GOOD.replace(", bits = 4", ""), "format 'int' wants a value for 'bits'"),
        (GOOD.replace('sites = "*:weight"\n', ""), r"rules\.0: wants 'sites'"),
        (GOOD + "[[solver]]\n", "is not TOML"),
        ('rules = [3]\nsolver = "rtn"', r"rules\.0: wants a table, got 3"),
    ],
)
def test_a_broken_file_is_named_with_its_place(registry: Any, text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_recipe(text, registry)


# the real registry ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda p: p.stem)
def test_shipped_recipe_fits_the_classes_that_are_registered(path: Path) -> None:
    from qcore.plugins import load_registry

    real = load_registry()
    recipe = load_recipe(path.stem, real)
    assert real.recipes.origin[path.stem] == "qcore" and parse_recipe(dump(recipe), real, name=recipe.name) == recipe


def test_every_registered_solver_and_transform_can_stand_in_a_recipe() -> None:
    from qcore.plugins import load_registry
    from qcore.transforms import IfBeneficial, SmoothQuant, SplitColumns

    real = load_registry()
    needs = {"if-beneficial": IfBeneficial(SmoothQuant(0.25)), "split-columns": SplitColumns(sites=("*:weight",))}
    for transform in [needs.get(name) or cls() for name, cls in real.transforms.items()]:
        # one that is nothing without settings is tested where it comes from
        for solver in [cls() for cls in real.solvers.values() if not any(f.default is f.default_factory is MISSING for f in fields(cls))]:
            recipe = Recipe(name="r", rules=(Rule("*:weight", int_weight(4, 64)),), solver=solver, transforms=(transform,))
            assert parse_recipe(dump(recipe), real, name="r") == recipe
