"""NVR, vector runahead for sparse NPUs, and the prefetchers it is compared with, on traces of gathers."""
