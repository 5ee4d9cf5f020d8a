"""What every implementation must satisfy: call these from a plug-in's own tests.

from qcore.testing import check_adapter

def test_links_are_true():
    check_adapter(MyAdapter(), my_tiny_model(), batch)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qcore.testing.conformance import (
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
        fit_transform,
    )

__all__ = [
    "check_adapter",
    "check_allocator",
    "check_block_solver",
    "check_format",
    "check_kernel",
    "check_module",
    "check_observer",
    "check_packing",
    "check_selector",
    "check_solver",
    "check_source",
    "check_task",
    "check_transform",
    "fit_transform",
]


def __getattr__(name: str) -> Any:
    # pytest imports this package in every run, for the fixtures: torch must wait
    if name in __all__:
        return getattr(import_module("qcore.testing.conformance"), name)
    raise AttributeError(f"module 'qcore.testing' has no attribute {name!r}")
