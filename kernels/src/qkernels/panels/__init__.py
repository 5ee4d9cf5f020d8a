"""Integer weights in panels of 16 output channels: the layout that the native kernels run from."""

from qkernels.panels.reference import LANES, Panels, pack, unpack

__all__ = ["LANES", "Panels", "pack", "unpack"]
