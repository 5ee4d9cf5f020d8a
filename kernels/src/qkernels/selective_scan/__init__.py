"""The recurrence of a selective state-space model, and its readout in 8-bit integers."""

from qkernels.selective_scan import reference
from qkernels.selective_scan.reference import int8_readout, selective_scan, selective_scan_int8

__all__ = ["int8_readout", "reference", "selective_scan", "selective_scan_int8"]
