"""The linear layers of many experts at once, on rows sorted by expert."""

from qkernels.grouped_linear import reference

__all__ = ["reference"]
