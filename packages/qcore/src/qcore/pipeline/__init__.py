"""`quantize_model`: the data path, top to bottom.

    place → wish → transform → allocate → for every block: observe, solve, pack, replace → bind

One way for all runs: a model in memory is a reader over a dict, a resumed run is a journal with finished blocks.  No session, no events, no state on
modules, no patched forward.

    run.py       the steps, and the journal       wishes.py   what the recipe says about a site
    sites.py     one weight: solve, settle, pack  skeleton.py which modules and weights are there
    floats.py    the float model                  record.py   what a run leaves
    blocks.py    what a block solver sees, does   look.py     what an allocator sees
"""

from qcore.pipeline.floats import compute_dtype, float_forward, load_in_memory, streamed_float
from qcore.pipeline.record import Quantized, SiteRecord, relative_error
from qcore.pipeline.run import quantize_model

__all__ = [
    "Quantized",
    "SiteRecord",
    "compute_dtype",
    "float_forward",
    "load_in_memory",
    "quantize_model",
    "relative_error",
    "streamed_float",
]
