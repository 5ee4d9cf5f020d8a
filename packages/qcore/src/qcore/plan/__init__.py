"""The preflight: every decision and every violation, on meta tensors, before any computing.

Sizes are those of packed parts; memory and time are estimates, and are called so wherever they are shown.
"""

from qcore.plan.plan import ASSUMED_FLOPS, ASSUMED_SECONDS_PER_WEIGHT, Decision, Plan, TransformUse
from qcore.plan.planner import make_plan
from qcore.plan.sizes import context_length, experts_per_token, matrix_shape, packed_bytes

__all__ = [
    "ASSUMED_FLOPS",
    "ASSUMED_SECONDS_PER_WEIGHT",
    "Decision",
    "Plan",
    "TransformUse",
    "context_length",
    "experts_per_token",
    "make_plan",
    "matrix_shape",
    "packed_bytes",
]
