"""What is asked of all that a plug-in brings: a name, no use of anybody's random numbers, and errors that say whose they are."""

import random
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

NAME = re.compile(r"[a-z0-9]+([-_.][a-z0-9]+)*")


def check_named(thing: Any, what: str, *methods: str) -> str:
    """An instance with a lower-case name and these methods; returns how messages call it: "solver 'gptq'"."""
    if isinstance(thing, type):
        raise AssertionError(f"{what} {thing.__name__}: this is the class; check an instance, {thing.__name__}(…)")
    name = getattr(thing, "name", None)
    assert isinstance(name, str) and name.strip(), f"{what} {type(thing).__name__} has no name; give it a `name: ClassVar[str]`, lower case"
    assert NAME.fullmatch(name), (
        f"{what} {name!r}: recipes and checkpoints ask for it by name, so that is lower-case letters and digits, with '-', '_' or '.' between"
    )
    for method in methods:
        assert callable(getattr(thing, method, None)), (
            f"{what} {name!r} has no method {method}(); derive it from the protocol of its kind, which brings those that are alike"
        )
    return f"{what} {name!r}"


@contextmanager
def calls(what: str, refusal: type[Exception] | tuple[()] = ()) -> Iterator[None]:
    """Around a call into the thing that is checked: what it raises becomes a sentence that names it, with the exception itself below.

    refusal: what it may say for itself, and is left as it is
    """
    try:
        yield
    except refusal:
        raise
    except Exception as e:
        if isinstance(e, AssertionError) and str(e):
            raise
        raise AssertionError(f"{what} raised {type(e).__name__}: {e}") from e


@contextmanager
def by_itself(what: str, refusal: type[Exception] | tuple[()] = ()) -> Iterator[None]:
    """As `calls`; besides, no global generator of random numbers may have moved: neither drawn from nor seeded."""
    before = _generators()
    with calls(what, refusal):
        yield
    moved = [name for name, state in _generators().items() if not _equal(state, before[name])]
    assert not moved, (
        f"{what} drew from or seeded the global random numbers of {' and '.join(moved)}: results would depend on what ran before, "
        "and change what runs after; draw from torch.Generator().manual_seed(self.seed), with a field `seed`"
    )


def _generators() -> dict[str, Any]:
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "Python": random.getstate()}
    if "numpy" in sys.modules:  # without it nobody can have drawn from it
        kind, keys, *rest = sys.modules["numpy"].random.get_state()
        states["numpy"] = (kind, torch.from_numpy(keys.astype("int64")), *rest)
    return states


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, tuple) and any(isinstance(x, torch.Tensor) for x in a):
        return all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def kept_tensors(value: Any) -> Any:
    """A copy of nested plain data with its tensors cloned, to be compared by `unchanged`."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {k: kept_tensors(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [kept_tensors(v) for v in value]
    return None


def unchanged(value: Any, kept: Any) -> bool:
    """Whether every tensor in `value` is still what `kept_tensors` saw."""
    if isinstance(value, torch.Tensor):
        # by bytes: room that nobody has filled yet may hold NaN, which equals nothing
        same = value.shape == kept.shape and value.dtype == kept.dtype
        return same and bool(
            torch.equal(value.detach().contiguous().flatten().view(torch.uint8), kept.detach().contiguous().flatten().view(torch.uint8))
        )
    if isinstance(value, dict):
        return set(value) == set(kept) and all(unchanged(v, kept[k]) for k, v in value.items())
    if isinstance(value, list | tuple):
        return len(value) == len(kept) and all(unchanged(v, k) for v, k in zip(value, kept, strict=True))
    return True
