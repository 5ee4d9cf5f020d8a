"""`qcore lower`: a checkpoint as another program that runs here, and what that changes."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qcore.cli._options import EvalOption, JsonOption, TokensOption, WindowOption, registry
from qcore.cli.export import CheckpointArg

if TYPE_CHECKING:
    from qcore.plugins import Registry

ToOption = Annotated[str | None, typer.Option("--to", help="Which program (`qcore methods lowerings`) [default: the only one].", show_default=False)]
ReferenceOption = Annotated[
    str | None, typer.Option("--reference", help="A model to measure both against: the float one, usually.", show_default=False)
]


def lower(
    checkpoint: CheckpointArg,
    to: ToOption = None,
    reference: ReferenceOption = None,
    text: EvalOption = None,
    eval_tokens: TokensOption = 1024,
    window: WindowOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run a checkpoint as another program, such as one of integers alone, and measure what that changes.

    Every operator of a first pass is looked at, so that a float between integers is found.

    Example: qcore lower out/ --to i-llm --reference zoo:tiny-llama
    """
    from qcore.calibration.text import TextFile
    from qcore.checkpoint.lowering import stored_weights
    from qcore.cli._models import is_checkpoint, open_any, with_recorded_data
    from qcore.cli._options import window_length
    from qcore.cli._progress import progress
    from qcore.cli._show import print_json
    from qcore.cli.compare import check_alike, show_rows
    from qcore.errors import CalibrationError, SpecError
    from qcore.evaluation import Candidate, LanguageModeling, evaluation_windows
    from qcore.evaluation import compare as compare_models
    from qcore.model import Topology

    own = registry()
    lowering = chosen(to, own)
    if not is_checkpoint(checkpoint):
        raise SpecError(f"{checkpoint} is no checkpoint of qcore; make one first: qcore quantize MODEL --recipe NAME -o out/")
    if reference is not None:
        from qcore.cli._models import outline_of

        check_alike([outline_of(uri, own, None) for uri in (reference, str(checkpoint))], window, False)
    opened = with_recorded_data(open_any(str(checkpoint), own), checkpoint, own, text)
    path = text or opened.evaluation
    if opened.data is not None:
        raise SpecError(f"{checkpoint} does not read text; lowerings are of language models")
    if path is None or opened.tokenizer is None:
        raise CalibrationError(f"{checkpoint} brings no text to run the program on; pass one with --eval text.txt")
    task = LanguageModeling(evaluation_windows(TextFile(path), opened.tokenizer, eval_tokens, window_length(window, opened.model)))
    program = lowering.lower(opened.model, Topology(()), stored_weights(opened.model))
    audit = audited(program, task.windows[:1])
    candidate = Candidate(f"{checkpoint} as {lowering.name}", lambda batch: numbers(program(batch["input_ids"])), notes=(audit,))
    models = [] if reference is None else [lambda: open_any(str(reference), own).candidate]
    with progress() as report, tempfile.TemporaryDirectory(prefix="qcore-reference-") as folder:
        rows = compare_models([*models, lambda: opened.candidate, lambda: candidate], task, Path(folder), report)
    if as_json:
        print_json([row.to_dict() for row in rows])
    else:
        show_rows(rows)


def chosen(name: str | None, own: "Registry") -> Any:
    """The lowering of that name, or the only one that is installed."""
    from qcore.errors import NotFound, SpecError

    if name is None and not own.lowerings:
        raise NotFound("no lowering is installed; I-LLM's comes with qplug-llm: pip install qplug-llm")
    if name is None and len(own.lowerings) > 1:
        raise SpecError(f"there are several lowerings; name one with --to: {', '.join(sorted(own.lowerings))}")
    return own.lowerings[name or next(iter(own.lowerings))]()


def audited(program: Any, batch: Any) -> str:
    """What an audit of one pass says."""
    from qcore.testing.integers import FloatFound, check_integer_module

    try:
        return f"integers alone: none of {check_integer_module(program, lambda: program(batch))} operators takes or makes a float"
    except FloatFound as e:
        return f"not integers alone: {e}"


def numbers(result: Any) -> Any:
    """Logits as floats, for scores: a program may give codes that say themselves what they are worth."""
    return result.dequantize() if callable(getattr(result, "dequantize", None)) and not hasattr(result, "is_quantized") else result
