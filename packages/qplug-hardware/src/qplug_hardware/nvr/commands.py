"""`qcore nvr`."""

from pathlib import Path
from typing import Annotated

import typer


def nvr(
    trace: Annotated[Path | None, typer.Argument(help="A trace: .npz, .mtx or .csv (docs/nvr.md).", show_default=False)] = None,
    synthetic: Annotated[
        str | None, typer.Option("--synthetic", help="Instead of a file: zipf, uniform, permutation, streaming, two-level or short-rows.")
    ] = None,
    models: Annotated[str, typer.Option("--models", "-m", help="Separated by commas.")] = "none,next-line,stream,imp,dvr,nvr,nvr-nsb,oracle",
    rows: Annotated[int | None, typer.Option("--rows", help="Rows of data of a synthetic trace [default: 20000].")] = None,
    gathers: Annotated[int | None, typer.Option("--gathers", help="Gathers of a synthetic trace [default: 40000].")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of a synthetic trace [default: 0].")] = None,
    row_bytes: Annotated[int | None, typer.Option("--row-bytes", help="Of a row of data [default: what the file says, else 128].")] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Simulate so many gathers and no more.")] = None,
    setting: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="As runahead.depth=64, machine.l2.size=524288.")] = None,
    depths: Annotated[str | None, typer.Option("--depths", help="Run the models that look ahead at each of these depths, too: 16,64,256.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE.svg", help="Draw the speedup against the depth.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Simulate prefetchers on the gathers of a sparse program.

    Example: qcore nvr --synthetic zipf --models stream,imp,nvr --plot depth.svg
    """
    from qplug_hardware.nvr.run import Job, run

    run(Job(trace, synthetic, tuple(models.split(",")), rows, gathers, seed, row_bytes, limit, tuple(setting or ()), depths, plot), as_json=as_json)
