"""y = x Ŵᵀ with a codebook for every tile of the weight."""

from qkernels.codebook_linear import reference
from qkernels.codebook_linear.reference import codebook_linear

__all__ = ["codebook_linear", "reference"]
