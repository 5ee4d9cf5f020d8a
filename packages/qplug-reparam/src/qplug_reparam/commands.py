"""`qcore reparam`: what fusing the branches of a network did to its weights."""

from pathlib import Path
from typing import Annotated

import typer


def reparam(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="zoo:tiny-repvgg, timm:repvgg_a0@weights.safetensors, …", show_default=False)],
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="FILE", help="Also write a picture (SVG).")] = None,
    images: Annotated[int, typer.Option("--images", min=0, help="Images on which outputs are compared in float64; 0: none are.")] = 4,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Compare a network with its fused self, block by block, and name the branch whose fusion blew up the range.

    Example: qcore reparam zoo:tiny-repvgg -o repvgg.svg
    """
    import json

    from qcore.errors import SpecError
    from qcore.model import load_source
    from qcore.plugins import load_registry

    from qplug_reparam.report import block_differences, lines, picture, report_blocks
    from qplug_reparam.timm_source import FusedWeights

    loaded = load_source(model, load_registry().sources)
    weights = loaded.reader
    if not isinstance(weights, FusedWeights) or not weights.fused:
        raise SpecError(f"{model} has no branches that were fused while it was read: its weights are deployed already, or it never had any")
    differences = None
    if images:
        probe = weights.probe(loaded, images)
        differences = block_differences(weights.branched(), probe, weights.fused)
    reports = report_blocks(weights.fused, weights.source, differences)
    if out is not None:
        out.write_text(picture(reports, f"{loaded.name}: largest weights of each branch, and fused"), encoding="utf-8")
    if as_json:
        print(json.dumps([r.to_dict() for r in reports], indent=1))
        return
    print("\n".join(lines(reports)))
    if out is not None:
        print(f"written: {out}")
