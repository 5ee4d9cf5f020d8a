"""`qcore compare`: several models on one text, measured against the first."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qcore.cli._options import AdapterOption, EvalOption, JsonOption, TokensOption, WindowOption, registry, window_length

if TYPE_CHECKING:
    from qcore.cli._models import Outline
    from qcore.evaluation.compare import Row
    from qcore.plugins import Registry


def compare(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Addresses or checkpoint folders; the first is the reference.")],
    text: EvalOption = None,
    eval_tokens: TokensOption = 4096,
    window: WindowOption = None,
    adapter: AdapterOption = None,
    attribute: Annotated[
        bool, typer.Option("--attribute", help="Say which modules the loss comes from: each is float again once, and evaluated anew.")
    ] = False,
    attribute_tokens: Annotated[int, typer.Option("--attribute-tokens", min=2, help="Tokens of each such evaluation.")] = 512,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.svg", help="Draw KL divergence against size; the best ones are joined by a line.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare models and checkpoints with the first of them: size, perplexity, KL divergence, top-1 agreement.

    A star marks what no other one beats in both size and divergence (the Pareto front).

    Example: qcore compare zoo:tiny-llama out-gptq/ out-rtn/ --attribute --plot quality.svg
    """
    from qcore.cli._show import print_json
    from qcore.errors import SpecError

    if len(models) < 2:
        raise SpecError(f"compare wants at least two models, got {models[0]!r} alone; for one model: qcore eval {models[0]}")
    if plot is not None:
        check_plot(plot)
    wish = "--plot" if plot is not None else "--attribute" if attribute else ""
    rows = run_compare(models, registry(), text, eval_tokens, window, adapter, attribute_tokens=attribute_tokens if attribute else None, by_kl=wish)
    if as_json:
        print_json([row.to_dict() for row in rows])
    else:
        show_rows(rows)
    if plot is not None:  # last: a plot that fails takes no figures with it
        draw(rows, plot)


def show_rows(rows: "Sequence[Row]") -> None:
    """Print what was found as tables."""
    from qcore.cli._show import score_name, scores_row, show_attribution, table
    from qcore.evaluation.report import megabytes

    lines = [
        (
            row.name,
            "*" if row.best else "",
            megabytes(row.bytes) if row.bytes else "–",
            f"{row.bits:.2f}" if row.bits else "–",
            *scores_row(row.scores),
        )
        for row in rows
    ]
    table(("model", "best", "size", "bits", score_name(rows[0].scores), f"KL from {rows[0].name}", "top-1 agreement"), lines, right=(2, 3, 4, 5, 6))
    for row in rows:
        if row.attribution is not None:
            show_attribution(row.name, row.attribution.to_dict())
    for row in rows:
        for note in row.notes:
            print(f"note: {row.name}: {note}")


def run_compare(
    uris: Sequence[str],
    own: "Registry",
    text: Path | None,
    eval_tokens: int,
    window: int | None,
    adapter: str | None,
    kernel: str | None = None,
    attribute_tokens: int | None = None,
    by_kl: str = "",
) -> "list[Row]":
    """Open each model in its turn and measure it against the first.

    kernel:           of the last one, if it is a checkpoint: which kernel goes first
    attribute_tokens: attribute the loss of every checkpoint to its modules, on so many tokens; None = do not
    by_kl:            the option, if any, that wants KL divergence of a task; a SpecError says that it measures none
    """
    from qcore.calibration.text import TextFile
    from qcore.cli._models import is_checkpoint, open_any, outline_of, with_recorded_data
    from qcore.cli._progress import progress
    from qcore.errors import CalibrationError, SpecError
    from qcore.evaluation import LanguageModeling, evaluation_windows
    from qcore.evaluation import compare as compare_models

    if attribute_tokens is not None and is_checkpoint(Path(uris[0])):
        raise SpecError(f"{uris[0]} is quantized; a loss is attributed by float modules, so name the float model first")
    float_uri = uris[0] if attribute_tokens is not None else ""

    if len(uris) > 1:
        check_alike([outline_of(uri, own, adapter, attribute_tokens is not None) for uri in uris], window, attribute_tokens is not None)
    opened: dict[int, Any] = {0: open_any(uris[0], own, adapter, kernel if len(uris) == 1 else None)}
    first = with_recorded_data(opened[0], Path(uris[0]), own, text) if is_checkpoint(Path(uris[0])) else opened[0]
    task: Any
    if first.data is not None:
        data = first.data.chosen(None, text)
        task = data.task()
        if task is None:
            raise CalibrationError(f"{uris[0]} brings no evaluation data; {getattr(data, 'missing', 'pass a file with --eval')}")
    else:
        path = text or first.evaluation
        if path is None:
            raise CalibrationError(f"{uris[0]} brings no evaluation text; pass one with --eval text.txt")
        length = window_length(window, first.model)
        task = LanguageModeling(evaluation_windows(TextFile(path), first.tokenizer, eval_tokens, length))
    if by_kl and "kl" not in task.better:
        raise SpecError(f"{by_kl} goes by KL divergence, and the task {task.name!r} of {uris[0]} gives {', '.join(task.better)}; leave {by_kl} out")
    del first

    def candidate(index: int) -> Any:
        if index in opened:
            return opened.pop(index).candidate
        return open_any(uris[index], own, adapter, kernel if index == len(uris) - 1 else None, float_uri).candidate

    with progress() as report, tempfile.TemporaryDirectory(prefix="qcore-reference-") as folder:
        return compare_models([lambda i=i: candidate(i) for i in range(len(uris))], task, Path(folder), report, attribute_tokens)  # type: ignore[misc]


def check_alike(models: "Sequence[Outline]", window: int | None, attribute: bool) -> None:
    """PlanError with all that stands against comparing these models with the first, before any of them runs."""
    from qcore.cli._models import is_checkpoint
    from qcore.errors import PlanError

    first, problems = models[0], []
    for other in models[1:]:
        if other.vocabulary != first.vocabulary:
            said = [f"{m.name} {f'knows {m.vocabulary} tokens' if m.vocabulary else 'reads no text'}" for m in (other, first)]
            problems.append(f"{said[0]}, {said[1]}; compare models that read the same data and put out the same things")
        elif first.vocabulary and other.context is not None and (length := window or first.window) > other.context:
            problems.append(
                f"windows of {length} tokens are longer than what {other.name} can see, {other.context}; pass --window {other.context} or less"
            )
        if attribute and is_checkpoint(Path(other.name)) and other.weights != first.weights:
            problems.append(
                f"{other.name} was made from weights {other.weights}, {first.name} has {first.weights}; modules can only be float again with the "
                "weights that they were made from: name that model first"
            )
    if problems:
        raise PlanError(problems)


def check_plot(path: Path) -> None:
    """SpecError before the long computation, where the plot could not be written."""
    from qcore.errors import SpecError

    if path.suffix != ".svg":
        raise SpecError(f"--plot {path.name} is not called *.svg; a plot is an SVG picture, which every browser shows")
    if not path.parent.is_dir():
        raise SpecError(f"--plot {path}: the folder {path.parent} does not exist; make it first")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise SpecError(f"--plot {path} cannot be written there; name a file in a folder where you can write")


def draw(rows: "Sequence[Row]", path: Path) -> None:
    """Write the plot of KL divergence against size."""
    from qcore.cli._files import write_whole
    from qcore.cli._show import remark
    from qcore.reporting import pareto_plot

    points = [(row.name, row.bytes, row.scores["kl"], row.best) for row in rows[1:] if row.bytes]
    write_whole(path, pareto_plot(points, rows[0].name))
    remark(f"written: {path}")
