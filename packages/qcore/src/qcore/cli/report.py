"""`qcore report`: make report.html again from report.json."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A folder that `qcore quantize` wrote.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="Where to [default: report.html in the folder].", show_default=False)
    ] = None,
) -> None:
    """Write the report of a checkpoint as one HTML page that needs no network.

    Example: qcore report out/
    """
    from qcore.cli._files import write_whole
    from qcore.errors import SpecError
    from qcore.evaluation import read_report
    from qcore.reporting import render

    data = read_report(checkpoint)
    path = out or checkpoint / "report.html"
    try:
        write_whole(path, render(data))
    except OSError as e:
        raise SpecError(f"{path} cannot be written ({e.strerror}); name another file with --out") from e
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise SpecError(f"{checkpoint / 'report.json'} lacks what a page is made of ({type(e).__name__}: {e}); quantize again") from e
    print(f"written: {path}")
