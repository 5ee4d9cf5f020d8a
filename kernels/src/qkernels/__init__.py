"""Ops on plain tensors, one folder each: `reference.py` is the meaning, everything beside it is an optimization with the same signature."""
