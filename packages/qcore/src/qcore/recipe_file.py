"""Recipes as TOML files: tables map onto constructors, through the registry.

A class is named by `name`, its fields are the other keys; nothing else is accepted, and no default is written down twice.

    description = "GPTQ, 4 bits in groups of 64"
    extends = "w4a16-rtn"                           # optional: a recipe's name, or a path relative to this file

    [[rules]]                                       # the last rule that matches a site wins
    sites = "*:weight"
    format = { name = "int", bits = 4 }
    granularity = { name = "group", size = 64 }
    scale = "auto"                                  # or a float dtype, or a table like this one: a spec of its own

    [[rules]]
    sites = "*.lm_head:weight"
    float = true                                    # leave it float

    [[rules]]                                       # activations: what a weight reads, with scales that calibration finds
    sites = "*:input"
    format = { name = "int", bits = 8 }
    granularity = "tensor"
    observer = { name = "percentile", q = 0.9999 }  # optional: minmax finds the extremes

    [[rules]]                                       # the cache of keys (after RoPE) and values: docs/kv-cache.md
    sites = "*:[kv]"
    format = { name = "int", bits = 4 }
    granularity = "head"                            # one scale for each token and head
    offset = "code"
    when = "dynamic"
    window = 0                                      # so many tokens at the end of the cache stay float

    [solver]
    name = "gptq"
    damp = 0.01

A recipe's name is its file's stem.  Extending: tables merge key by key, and one whose `name` changes starts anew; rules are put behind those
of the base; other arrays (transforms) replace the base's.  TOML has no null: "none" stands for None where a field takes None but no string.
"""

import json
import re
import tomllib
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from qcore.errors import NotFound, QcoreError, SpecError
from qcore.numbers.formats import NumberFormat
from qcore.numbers.granularity import GRANULARITIES, Granularity
from qcore.numbers.spec import Offset, QuantSpec
from qcore.plugins import Registry
from qcore.recipe import AUTO_SCALE, CalibrationSettings, Recipe, Rule

Table = dict[str, Any]

_SPEC_KEYS = ("format", "granularity", "offset", "scale", "when")
_RULE_KEYS = ("sites", "float", *_SPEC_KEYS, "auto_scale", "solver", "packing", "observer", "window")
_RECIPE_KEYS = ("description", "extends", "rules", "solver", "block_solver", "transforms", "allocator", "calibration", "propagate", "correct_bias")
_PROPAGATE = ("float", "weights", "all")


def load_recipe(name_or_path: str | Path, registry: Registry, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of that name, or in that file, with `overrides` ("solver.damp=0.05") applied in order.

    NotFound for a name or file that is not there; SpecError, naming the place in the file, for all else.
    """
    name, table = _read(str(name_or_path), registry, Path(), ())
    for text in overrides:
        table = override(table, text)
    return _Builder(name, registry).recipe(table)


def parse_recipe(text: str, registry: Registry, name: str = "recipe") -> Recipe:
    """The recipe that a TOML text describes."""
    return _Builder(name, registry).recipe(_extended(_tables(text, name), name, registry, Path(), ()))


def override(table: Table, text: str) -> Table:
    """`table` with one value set: "a.b.c=value", indices for arrays ("rules.0.granularity.size=32"), the value in TOML; a bare word is a string.

    Setting the `name` of a table to another class drops the fields of the old one.
    """
    path, equals, value = text.partition("=")
    if not equals or not path.strip():
        raise SpecError(f"--set {text!r} is not of the form a.b.c=value, such as solver.damp=0.05 or rules.0.granularity.size=32")
    return _put(table, [step.strip() for step in path.split(".")], _value(value.strip(), text), f"--set {text}")


def dump(recipe: Recipe) -> str:
    """TOML that loads back equal (under the file name `<recipe.name>.toml`), every field written out."""
    lines = []
    if recipe.description:
        lines.append(f"description = {_toml(recipe.description)}")
    lines.append(f"propagate = {_toml(recipe.propagate)}")
    if recipe.correct_bias:
        lines.append("correct_bias = true")
    for rule in recipe.rules:
        lines += ["", "[[rules]]", *_lines(_rule_table(rule))]
    for transform in recipe.transforms:
        lines += ["", "[[transforms]]", *_lines(_class_table(transform))]
    lines += ["", "[solver]", *_lines(_class_table(recipe.solver))]
    if recipe.block_solver is not None:
        lines += ["", "[block_solver]", *_lines(_class_table(recipe.block_solver))]
    if recipe.allocator is not None:
        lines += ["", "[allocator]", *_lines(_class_table(recipe.allocator))]
    lines += ["", "[calibration]", *_lines(_field_table(recipe.calibration))]
    return "\n".join(lines) + "\n"


# reading --------------------------------------------------------------------------------------------------------------------------------


def _read(name_or_path: str, registry: Registry, folder: Path, seen: tuple[Path, ...]) -> tuple[str, Table]:
    """(name, tables) with everything that it extends merged in.  folder: what relative paths are relative to"""
    if name_or_path.endswith(".toml") or "/" in name_or_path or "\\" in name_or_path:
        path = folder / name_or_path
        if not path.is_file():
            raise NotFound(f"no recipe file {path}; give a path that exists, or a recipe's name: {', '.join(sorted(registry.recipes)) or 'none'}")
    else:
        path = Path(registry.recipes[name_or_path])
    path = path.resolve()
    if path in seen:
        raise SpecError(f"{path} extends itself, through {' → '.join(p.name for p in (*seen, path))}; drop one `extends`")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise SpecError(f"{path} cannot be read as a recipe: {e}") from e
    return path.stem, _extended(_tables(text, str(path)), path.stem, registry, path.parent, (*seen, path))


def _tables(text: str, where: str) -> Table:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise SpecError(f"{where} is not TOML: {e}") from e


def _extended(table: Table, name: str, registry: Registry, folder: Path, seen: tuple[Path, ...]) -> Table:
    base_name = table.pop("extends", None)
    if base_name is None:
        return table
    if not isinstance(base_name, str):
        raise SpecError(f"recipe {name!r}: extends wants a recipe's name or path, got {base_name!r}")
    _, base = _read(base_name, registry, folder, seen)
    rules = base.get("rules", [])
    merged = _merged(base, table)
    if "rules" in table and isinstance(table["rules"], list):
        merged["rules"] = [*rules, *table["rules"]]
    return merged


def _merged(base: Table, over: Table) -> Table:
    if "name" in over and over["name"] != base.get("name", over["name"]):
        return over
    both = {k: _merged(base[k], v) if isinstance(v, dict) and isinstance(base.get(k), dict) else v for k, v in over.items()}
    return base | both


def _value(text: str, whole: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        if re.fullmatch(r"[A-Za-z_*][\w.*:/-]*", text):
            return text
        raise SpecError(f'--set {whole}: {text!r} is no TOML value; write a number, true, false, a word, or a table like {{name = "rtn"}}') from None


def _put(node: Any, path: list[str], value: Any, where: str) -> Any:
    """A copy of `node` with `value` at `path`."""
    if not path:
        return value
    step, rest = path[0], path[1:]
    if isinstance(node, list):
        if not step.isdigit() or int(step) >= len(node):
            raise SpecError(f"{where}: there is no entry {step!r} in an array of {len(node)}; entries count from 0")
        return [_put(item, rest, value, where) if i == int(step) else item for i, item in enumerate(node)]
    if not isinstance(node, dict):
        raise SpecError(f"{where}: {step!r} is asked of {node!r}, which is a plain value and has no fields")
    if step == "name" and not rest and node.get("name", value) != value:
        return {"name": value}
    return node | {step: _put(node.get(step, {}), rest, value, where)}


# building -------------------------------------------------------------------------------------------------------------------------------


class _Builder:
    """Makes objects of tables; every error names the place, as in `w4a16-gptq: rules.0.granularity: …`."""

    def __init__(self, name: str, registry: Registry) -> None:
        self.name, self.registry = name, registry

    def fail(self, where: str, what: str) -> SpecError:
        return SpecError(f"recipe {self.name!r}, {where}: {what}" if where else f"recipe {self.name!r}: {what}")

    def recipe(self, table: Table) -> Recipe:
        self.only(table, _RECIPE_KEYS, "")
        for key in ("rules", "solver"):
            if key not in table:
                raise self.fail("", f"wants {key!r}; see `qcore recipes show w4a16-gptq` for one to start from")
        propagate = table.get("propagate", "weights")
        if propagate not in _PROPAGATE:
            raise self.fail("propagate", f"wants one of {', '.join(_PROPAGATE)}, got {propagate!r}")
        calibration = self.table(table.get("calibration", {}), "calibration")
        return Recipe(
            name=self.name,
            description=self.coerce(table.get("description", ""), str, "description"),
            rules=tuple(self.rule(self.table(rule, f"rules.{i}"), f"rules.{i}") for i, rule in enumerate(self.array(table["rules"], "rules"))),
            solver=self.named("solvers", table["solver"], "solver"),
            block_solver=self.named("block_solvers", table["block_solver"], "block_solver") if "block_solver" in table else None,
            transforms=tuple(
                self.named("transforms", t, f"transforms.{i}") for i, t in enumerate(self.array(table.get("transforms", []), "transforms"))
            ),
            allocator=self.named("allocators", table["allocator"], "allocator") if "allocator" in table else None,
            calibration=self.make(CalibrationSettings, calibration, "calibration", "calibration"),
            propagate=propagate,
            correct_bias=self.coerce(table.get("correct_bias", False), bool, "correct_bias"),
        )

    def rule(self, table: Table, where: str) -> Rule:
        self.only(table, _RULE_KEYS, where)
        if "sites" not in table:
            raise self.fail(where, "wants 'sites', a pattern such as \"*:weight\"")
        sites = self.coerce(table["sites"], str, f"{where}.sites")
        solver = self.named("solvers", table["solver"], f"{where}.solver") if "solver" in table else None
        packing = self.coerce(table.get("packing"), str | None, f"{where}.packing")
        if packing is not None and packing not in self.registry.packings:
            self.registry.packings[packing]  # raises NotFound with near names
        observer = self.named("observers", table["observer"], f"{where}.observer") if "observer" in table else None
        window = self.coerce(table.get("window"), int | None, f"{where}.window")
        leave = self.coerce(table.get("float", False), bool, f"{where}.float")
        told = [k for k in _SPEC_KEYS if k in table]
        if leave:
            if told:
                raise self.fail(where, f"float = true leaves these sites float, yet {told[0]!r} says how to store them; drop one")
            return Rule(sites, None, solver, packing, self._scale_mode(table, where))
        scale = table.get("scale", AUTO_SCALE)
        own = {k: table[k] for k in told if k != "scale"} | ({} if scale == AUTO_SCALE else {"scale": scale})
        try:
            return Rule(sites, self.spec(own, where), solver, packing, self._scale_mode(table, where), observer, window)
        except SpecError as e:
            raise e if str(e).startswith("recipe ") else self.fail(where, str(e)) from e

    def _scale_mode(self, table: Table, where: str) -> Literal["auto", "spec"]:
        auto = self.coerce(table.get("auto_scale", table.get("scale", AUTO_SCALE) == AUTO_SCALE), bool, f"{where}.auto_scale")
        return "auto" if auto else "spec"

    def spec(self, table: Table, where: str) -> QuantSpec:
        self.only(table, _SPEC_KEYS, where)
        for key in ("format", "granularity"):
            if key not in table:
                raise self.fail(where, f"wants {key!r}; or float = true, to leave these sites float")
        scale = table.get("scale", "float32")
        offset = table.get("offset", "none")
        offsets = [o.value for o in Offset]
        if offset not in offsets:
            raise self.fail(f"{where}.offset", f"wants one of {', '.join(offsets)}, got {offset!r}")
        when = table.get("when", "static")
        if when not in ("static", "dynamic"):
            raise self.fail(f"{where}.when", f"wants static or dynamic, got {when!r}")
        try:
            return QuantSpec(
                format=self.named("formats", table["format"], f"{where}.format"),
                granularity=self.granularity(table["granularity"], f"{where}.granularity"),
                offset=Offset(offset),
                scale=self.spec(scale, f"{where}.scale") if isinstance(scale, dict) else scale,
                when=when,
            )
        except SpecError as e:
            raise e if str(e).startswith("recipe ") else self.fail(where, str(e)) from e

    def granularity(self, value: Any, where: str) -> Any:
        table = self.table({"name": value} if isinstance(value, str) else value, where)
        name = table.get("name")
        if name not in GRANULARITIES:
            raise self.fail(where, f"no granularity named {name!r}{_near(name, GRANULARITIES)}; have: {', '.join(GRANULARITIES)}")
        return self.make(GRANULARITIES[name], {k: v for k, v in table.items() if k != "name"}, where, f"granularity {name!r}")

    def named(self, kind: str, value: Any, where: str) -> Any:
        """An object of a registered class: {name = "gptq", damp = 0.01}, or its name alone."""
        table = self.table({"name": value} if isinstance(value, str) else value, where)
        name = table.get("name")
        if not isinstance(name, str):
            raise self.fail(
                where, f"wants a name, such as {where.rpartition('.')[2]} = {{name = …}}; have: {', '.join(sorted(getattr(self.registry, kind)))}"
            )
        try:
            cls = getattr(self.registry, kind)[name]
        except NotFound as e:
            raise NotFound(f"recipe {self.name!r}, {where}: {e}") from e
        return self.make(cls, {k: v for k, v in table.items() if k != "name"}, where, f"{kind.removesuffix('s')} {name!r}")

    def make(self, cls: type, table: Table, where: str, what: str) -> Any:
        """`cls(**table)`, with every key and value checked first."""
        own = _options(cls)
        for key in table:
            if key not in own:
                raise self.fail(where, f"{what} has no field {key!r}{_near(key, own)}; have: {', '.join(own) or 'none'}")
        missing = [n for n, f in own.items() if n not in table and f.default is MISSING and f.default_factory is MISSING]
        if missing:
            raise self.fail(where, f"{what} wants a value for {missing[0]!r}")
        hints = _hints(cls)
        values = {key: self.coerce(value, hints.get(key, Any), f"{where}.{key}") for key, value in table.items()}
        try:
            return cls(**values)
        except QcoreError as e:
            raise self.fail(where, str(e)) from e

    def coerce(self, value: Any, hint: Any, where: str) -> Any:
        """`value` as the annotation wants it; SpecError where it is of another type."""
        origin, args = get_origin(hint), get_args(hint)
        if hint is Any or isinstance(hint, str):
            return value
        if origin is Literal:
            if value in args and type(value) in {type(a) for a in args}:
                return value
            raise self.fail(where, f"wants one of {', '.join(map(str, args))}, got {value!r}{_near(value, args)}")
        if origin in (Union, types.UnionType):
            return self._any_of(value, args, where)
        if origin in (tuple, list, Sequence):
            items = self.array(value, where)
            inner = args[0] if len(args) == 1 or (len(args) == 2 and args[1] is Ellipsis) else None
            if inner is None and args and len(args) != len(items):
                raise self.fail(where, f"wants {len(args)} values, got {len(items)}")
            made = [self.coerce(v, inner or (args[i] if args else Any), f"{where}.{i}") for i, v in enumerate(items)]
            return made if origin is list else tuple(made)
        if isinstance(hint, type) and issubclass(hint, Enum):
            return self._enum(value, hint, where)
        if hint is float and type(value) in (int, float):
            return float(value)
        if hint in (bool, int, float, str):
            if type(value) is hint:
                return value
            raise self.fail(where, f"wants {hint.__name__}, got {value!r} ({type(value).__name__})")
        return self._object(value, hint, where)

    def _any_of(self, value: Any, hints: Sequence[Any], where: str) -> Any:
        if value is None or (value == "none" and type(None) in hints and str not in hints):
            return None
        problems = []
        for hint in hints:
            if hint is not type(None):
                try:
                    return self.coerce(value, hint, where)
                except SpecError as e:
                    problems.append(e)
        if len(problems) == 1:
            raise problems[0]
        wants = " or ".join(getattr(h, "__name__", str(h)) for h in hints if h is not type(None))
        raise self.fail(where, f"wants {wants}, got {value!r} ({type(value).__name__})")

    def _enum(self, value: Any, hint: type[Enum], where: str) -> Enum:
        try:
            return hint(value)
        except ValueError:
            raise self.fail(where, f"wants one of {', '.join(str(m.value) for m in hint)}, got {value!r}") from None

    def _object(self, value: Any, hint: Any, where: str) -> Any:
        """A field that is itself an object: a spec, a format, a granularity, a registered class, or a plain dataclass."""
        if hint is QuantSpec:
            return self.spec(self.table(value, where), where)
        if hint is Granularity:
            return self.granularity(value, where)
        kind = "formats" if hint is NumberFormat else _kind_of(hint)
        if kind is not None:
            return self.named(kind, value, where)
        if is_dataclass(hint) and isinstance(hint, type):
            table = self.table(value, where)
            return self.make(hint, {k: v for k, v in table.items() if k != "name"}, where, hint.__name__)
        if get_origin(hint) in (dict, Mapping):
            return self.table(value, where)
        raise self.fail(where, f"a value of type {getattr(hint, '__name__', hint)} cannot be written in a recipe file; build this recipe in Python")

    def table(self, value: Any, where: str) -> Table:
        if not isinstance(value, dict):
            raise self.fail(where, f"wants a table, got {value!r}")
        return value

    def array(self, value: Any, where: str) -> list[Any]:
        if not isinstance(value, list):
            raise self.fail(where, f"wants an array, got {value!r}")
        return value

    def only(self, table: Table, known: Sequence[str], where: str) -> None:
        for key in table:
            if key not in known:
                raise self.fail(where, f"unknown key {key!r}{_near(key, known)}; have: {', '.join(known)}")


def _kind_of(hint: Any) -> str | None:
    """The registry's kind for fields that hold one of its protocols."""
    kinds = {"WeightSolver": "solvers", "Transform": "transforms", "Observer": "observers", "Allocator": "allocators", "Selector": "selectors"}
    kinds |= {"CalibrationSource": "calibrations", "BlockSolver": "block_solvers"}
    return kinds.get(getattr(hint, "__name__", ""))


def _options(cls: type) -> dict[str, Field[Any]]:
    return {f.name: f for f in fields(cls) if f.init} if is_dataclass(cls) else {}


def _hints(cls: type) -> dict[str, Any]:
    try:
        return get_type_hints(cls)
    except NameError:  # an annotation that exists for type checkers only: its field is taken as it comes
        return {}


def _near(name: object, known: Any) -> str:
    near = get_close_matches(str(name), [str(k) for k in known], n=2)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


# writing --------------------------------------------------------------------------------------------------------------------------------


def _rule_table(rule: Rule) -> Table:
    table: Table = {"sites": rule.sites}
    if rule.spec is None:
        table["float"] = True
        if rule.scale == "spec":
            table["auto_scale"] = False
    else:
        table |= _spec_table(rule.spec)
        plain = rule.spec.scale == "float32"
        if rule.scale == "auto" and plain:
            table["scale"] = AUTO_SCALE
        elif rule.scale == "auto":
            table["auto_scale"] = True
    if rule.solver is not None:
        table["solver"] = _class_table(rule.solver)
    if rule.packing is not None:
        table["packing"] = rule.packing
    if rule.observer is not None:
        table["observer"] = _class_table(rule.observer)
    if rule.window is not None:
        table["window"] = rule.window
    return table


def _spec_table(spec: QuantSpec) -> Table:
    return {
        "format": _class_table(spec.format),
        "granularity": _class_table(spec.granularity),
        "offset": spec.offset.value,
        "scale": _spec_table(spec.scale) if isinstance(spec.scale, QuantSpec) else spec.scale,
        "when": spec.when,
    }


def _class_table(value: Any) -> Table:
    return {"name": value.name} | _field_table(value)


def _field_table(value: Any) -> Table:
    table = {}
    for name, field in _options(type(value)).items():
        held = getattr(value, name)
        if held is not None:
            table[name] = _plain(held)
        elif field.default is not None:
            table[name] = "none"
    return table


def _plain(value: Any) -> Any:
    if isinstance(value, QuantSpec):
        return _spec_table(value)
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value):
        return _class_table(value) if hasattr(value, "name") else _field_table(value)
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    return value


def _lines(table: Table) -> list[str]:
    return [f"{key} = {_toml(value)}" for key, value in table.items()]


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for the delete character
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k if re.fullmatch('[A-Za-z0-9_-]+', k) else _toml(k)} = {_toml(v)}" for k, v in value.items()) + " }"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    raise SpecError(f"{value!r} ({type(value).__name__}) cannot be written in a recipe file")
