"""An audit of programs that promise to compute with integers alone."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class FloatFound(AssertionError):
    """A float tensor inside a program that promised integers."""


class _Audit(TorchDispatchMode):
    """Looks at what every operator takes and gives, below autograd, so that no module or function can hide one."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        result = func(*args, **(kwargs or {}))
        for what, values in (("takes", (args, kwargs)), ("makes", result)):
            for value in tree_leaves(values):
                if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
                    raise FloatFound(
                        f"{func} {what} a tensor of {value.dtype} and shape {tuple(value.shape)}; only integers may be computed with here"
                    )
        return result


@contextmanager
def only_integers() -> Iterator[_Audit]:
    """Inside, every operator that takes or makes a float (or complex) tensor raises `FloatFound`; the audit counts the `operations` it saw."""
    with torch.no_grad(), _Audit() as audit:
        yield audit


def check_integer_module(module: nn.Module, run: Callable[[], Any]) -> int:
    """AssertionError where a module that promises integers keeps a float, or computes with one while `run()` runs it.

    return: how many operators were looked at
    """
    for name, value in module.state_dict(keep_vars=True).items():
        if value.is_floating_point() or value.is_complex():
            raise FloatFound(f"{name} is kept as {value.dtype}")
    with only_integers() as audit:
        run()
    assert audit.operations > 0, "nothing was run"
    return audit.operations
