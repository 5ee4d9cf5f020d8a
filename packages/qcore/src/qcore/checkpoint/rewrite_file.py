"""`rewrite.qcore`: what was done to the float weights before they were quantized, kept beside them.

Nothing at run time reads it.  It lets the float form of one module be made again (`qcore compare --attribute`).  The file is in the format of
safetensors, under another suffix, so that no loader takes it for weights; what is no tensor stands in its header.
"""

import json
from dataclasses import replace
from pathlib import Path

from qcore.checkpoint.manifest import Manifest
from qcore.errors import CheckpointError
from qcore.model.safetensors_file import SafetensorsFile, write_safetensors
from qcore.transforms.rewrite import Rewrite

REWRITE = "rewrite.qcore"
# what a manifest's record says about it
NONE, KEPT = "none", "kept"


def write_rewrite(folder: Path, rewrite: Rewrite) -> None:
    """Write it beside the weights, in an order that does not depend on how the run came to its end."""
    ordered = replace(
        rewrite,
        edits=dict(sorted(rewrite.edits.items())),
        derived=dict(sorted(rewrite.derived.items())),
        inserts=dict(sorted(rewrite.inserts.items())),
    )
    tensors, data = ordered.state()
    write_safetensors(folder / REWRITE, tensors, {"rewrite": json.dumps(data, sort_keys=True)})


def read_rewrite(folder: Path, manifest: Manifest) -> Rewrite:
    """What `write_rewrite` kept; CheckpointError where it was not kept, or is damaged."""
    said = manifest.record.get("rewrite")
    if said == NONE:
        return Rewrite()
    if said != KEPT:
        raise CheckpointError(f"{folder} does not say how its float weights were rewritten: an older qcore wrote it; quantize again")
    path = folder / REWRITE
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; it says how the float weights were rewritten: fetch the checkpoint again")
    try:
        file = SafetensorsFile(path)
        data = json.loads(file.metadata["rewrite"])
        return Rewrite.from_state({name: file[name] for name in file.names()}, data)
    except CheckpointError:
        raise
    except Exception as e:  # whatever a damaged file makes of a rewrite
        raise CheckpointError(f"{path} cannot be read ({type(e).__name__}: {e}); fetch the checkpoint again") from e
