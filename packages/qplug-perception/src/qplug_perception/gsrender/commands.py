"""`qcore gsrender`: which attribute costs what, and a scene's Gaussians in few bytes."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from qplug_perception.gsrender.data import SceneData
    from qplug_perception.gsrender.model import OccupancyNet

gsrender = typer.Typer(name="gsrender", help="Occupancy networks with a Gaussian head.", no_args_is_help=True)
ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="gsrender:tiny, or a folder with a network.", show_default=False)]


def _network(uri: str) -> "tuple[OccupancyNet, SceneData]":
    from qcore.errors import SpecError
    from qcore.model import load_source
    from qcore.model.reader import materialize
    from qcore.plugins import load_registry

    from qplug_perception.gsrender.model import OccupancyNet

    loaded = load_source(uri, load_registry().sources)
    if not isinstance(loaded.model, OccupancyNet):
        raise SpecError(f"{uri} is a {type(loaded.model).__name__}, not an occupancy network with a Gaussian head")
    materialize(loaded.model, "", loaded.reader, loaded.dtype)
    return loaded.model.eval(), loaded.data


@gsrender.command("sweep")
def sweep_command(
    model: ModelName,
    bits: Annotated[str, typer.Option("--bits", help="Numbers of bits, with commas.")] = "8,6,4,3,2",
    samples: Annotated[int, typer.Option("--samples", min=1, help="Evaluated samples.")] = 4,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Put each attribute of the Gaussians alone on fewer bits, and say what that costs.

    Example: qcore gsrender sweep gsrender:tiny --bits 8,4,2
    """
    import json
    import tempfile
    from dataclasses import asdict

    from qcore.errors import SpecError

    from qplug_perception.gsrender.data import OccupancyTask, batch_of
    from qplug_perception.gsrender.sweep import sweep, table

    counts = bits.split(",")
    if not all(c.strip().isdigit() and 2 <= int(c) <= 8 for c in counts):
        raise SpecError(f"--bits wants numbers from 2 to 8 with commas between, as in 8,4,2; got {bits!r}")
    network, data = _network(model)
    calibration = data.calibration.read(8)
    with tempfile.TemporaryDirectory() as folder:
        task = OccupancyTask(tuple(data.evaluation.read(samples)), network.config)
        points = sweep(network, [batch_of(calibration, network.config.fuse)], task, Path(folder), [int(c) for c in counts])
    print(json.dumps([asdict(p) for p in points], indent=1) if as_json else "\n".join(table(points)))


@gsrender.command("compress")
def compress_command(
    model: ModelName,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The safetensors file to write.", show_default=False)],
    sample: Annotated[int, typer.Option("--sample", min=0, help="Which evaluated sample.")] = 0,
    prune: Annotated[float, typer.Option("--prune", help="Leave out Gaussians of a smaller opacity.")] = 0.05,
    codebook: Annotated[int, typer.Option("--codebook", help="Bits of an index into the vectors of logits.")] = 6,
) -> None:
    """Write the Gaussians that a network makes of one sample in few bytes, and say how many and what it costs.

    Example: qcore gsrender compress gsrender:tiny -o scene.safetensors
    """
    import torch

    from qplug_perception.gsrender.compress import Compression, compress, float_bytes
    from qplug_perception.gsrender.data import batch_of
    from qplug_perception.gsrender.gaussians import Attributes
    from qplug_perception.gsrender.geometry import FREE

    network, data = _network(model)
    config = network.config
    own = data.evaluation.read(sample + 1)[sample]
    with torch.no_grad():
        attributes = Attributes.from_rows(network(batch_of([own], config.fuse))[0])
    stored = compress(attributes, config.grid, config.reach, Compression(prune, config.threshold, codebook))
    stored.save(out)
    same = stored.attributes().occupancy(config.threshold, FREE) == attributes.occupancy(config.threshold, FREE)
    print(f"{len(stored)} of {config.grid.count} Gaussians, {stored.nbytes} bytes; {float_bytes(attributes)} as float32 without pruning")
    print(f"{float(same.float().mean()):.2%} of voxels keep their label\nwritten: {out}")
