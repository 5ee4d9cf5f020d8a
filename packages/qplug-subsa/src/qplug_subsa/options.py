"""A selector from its name and KEY=VALUE options, without importing what selectors do not need."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from typing import Any

from qcore.errors import SpecError


def make_selector(name: str, selectors: Mapping[str, Any], settings: Sequence[str] = ()) -> Any:
    """`selectors[name]` with its fields set; SpecError for a field that it has not or wants, or a value of another type than the default."""
    cls = selectors[name]
    own = {f.name: f for f in fields(cls) if f.init} if is_dataclass(cls) else {}
    values: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = (part.strip() for part in setting.partition("="))
        if not equals:
            raise SpecError(f"--set {setting!r} is not of the form KEY=VALUE, such as lam=auto")
        if key not in own:
            near = get_close_matches(key, own, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise SpecError(f"--set {setting}: selector {name!r} has no option {key!r}{hint}; have: {', '.join(own) or 'none'}")
        default = own[key].default
        value = _value(text)
        if isinstance(default, float) and type(value) is int:
            value = float(value)
        # without a default, or with None for one, nothing is known of its type here: the selector says what it takes
        known = default is not MISSING and default is not None
        if known and type(value) is not type(default) and not (isinstance(value, str) and isinstance(default, (str, float))):
            raise SpecError(f"--set {setting}: {key} is a {type(default).__name__}, such as {default!r}")
        values[key] = value
    wanted = [key for key, f in own.items() if key not in values and f.default is MISSING and f.default_factory is MISSING]
    if wanted:
        raise SpecError(f"selector {name!r} wants a value for {wanted[0]!r}; pass --set {wanted[0]}=VALUE")
    return cls(**values)


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
