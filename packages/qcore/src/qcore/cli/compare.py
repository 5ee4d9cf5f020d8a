"""`qcore compare`: several models on one text, measured against the first."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qcore.cli._options import AdapterOption, EvalOption, JsonOption, TokensOption, WindowOption, registry, window_length

if TYPE_CHECKING:
    from qcore.evaluation.compare import Row
    from qcore.plugins import Registry


def compare(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Addresses or checkpoint folders; the first is the reference.")],
    text: EvalOption = None,
    eval_tokens: TokensOption = 4096,
    window: WindowOption = None,
    adapter: AdapterOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare models and checkpoints with the first of them: size, perplexity, KL divergence, top-1 agreement.

    Example: qcore compare zoo:tiny-llama out-gptq/ out-rtn/
    """
    from qcore.cli._show import print_json, score_name, scores_row, table
    from qcore.errors import SpecError
    from qcore.evaluation.report import megabytes

    if len(models) < 2:
        raise SpecError(f"compare wants at least two models, got {models[0]!r} alone; for one model: qcore eval {models[0]}")
    rows = run_compare(models, registry(), text, eval_tokens, window, adapter)
    if as_json:
        print_json([row.to_dict() for row in rows])
        return
    lines = [(row.name, megabytes(row.bytes) if row.bytes else "–", f"{row.bits:.2f}" if row.bits else "–", *scores_row(row.scores)) for row in rows]
    table(("model", "size", "bits", score_name(rows[0].scores), f"KL from {rows[0].name}", "top-1 agreement"), lines, right=(1, 2, 3, 4, 5))
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
) -> "list[Row]":
    """Open each model in its turn and measure it against the first.

    kernel: of the last one, if it is a checkpoint: which kernel goes first
    """
    from qcore.calibration.text import TextFile
    from qcore.cli._models import open_any
    from qcore.cli._progress import progress
    from qcore.errors import CalibrationError
    from qcore.evaluation import LanguageModeling, evaluation_windows
    from qcore.evaluation import compare as compare_models

    opened: dict[int, Any] = {0: open_any(uris[0], own, adapter, kernel if len(uris) == 1 else None)}
    first = opened[0]
    task: Any
    if first.data is not None:
        task = first.data.chosen(None, text).task()
        if task is None:
            raise CalibrationError(f"{uris[0]} brings no evaluation data; pass a file with --eval")
    else:
        path = text or first.evaluation
        if path is None:
            raise CalibrationError(f"{uris[0]} brings no evaluation text; pass one with --eval text.txt")
        length = window_length(window, first.model)
        task = LanguageModeling(evaluation_windows(TextFile(path), first.tokenizer, eval_tokens, length))
    del first

    def candidate(index: int) -> Any:
        return (opened.pop(index) if index in opened else open_any(uris[index], own, adapter, kernel if index == len(uris) - 1 else None)).candidate

    with progress() as report, tempfile.TemporaryDirectory(prefix="qcore-reference-") as folder:
        return compare_models([lambda i=i: candidate(i) for i in range(len(uris))], task, Path(folder), report)  # type: ignore[misc]
