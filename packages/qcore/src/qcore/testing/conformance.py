"""One check for each kind of thing that a plug-in may bring.  Each raises AssertionError, and says what is wrong and what to do.

Every class is checked by what its protocol promises, and by nothing else: laws (round trips, merges, equality in float64), not golden numbers.
"""

from qcore.testing.acts import check_observer, check_selector, check_solver
from qcore.testing.adapters import check_adapter
from qcore.testing.forms import check_kernel, check_module, check_packing
from qcore.testing.numbers import check_format
from qcore.testing.transforms import check_transform, fit_transform, observe
from qcore.testing.wholes import check_allocator, check_block_solver, check_source, check_task

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
    "observe",
]
