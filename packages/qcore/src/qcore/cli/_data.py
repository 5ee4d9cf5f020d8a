"""What stands against the data of a run, found before the run, all of it at once."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qcore.model import LoadedModel
    from qcore.recipe import Recipe

# a token is shorter than this, on average over a text: so much text is enough for sure, and is not encoded to count
CHARACTERS = 16
# bytes of a file of images that is read to see whether it can be
LARGEST = 256 << 20


def data_problems(loaded: "LoadedModel", recipe: "Recipe", data: Any, *, calibrates: bool, eval_tokens: int, window: int | None) -> list[str]:
    """Files that are missing, are no text, or hold too few tokens; [] where all is well.

    data:       a `TextPair` or a `ModelData`, as `choose_data` gives it
    calibrates: whether the run looks at calibration data at all
    """
    from qcore.cli._options import window_length
    from qcore.evaluation import TextPair, evaluation_windows

    settings = recipe.calibration
    # a source that makes its data has its own reasons to refuse, and needs the whole model to find them
    calibration = data.calibration if calibrates and (settings.source is None or settings.source.needs_text()) else None
    if not isinstance(data, TextPair):
        # a file that was named and is not there is a mistake, whether or not it would have been read
        whys = (_unreadable(calibration) or _absent(data.calibration), _unreadable(data.evaluation))
        return [why for why in whys if why]
    checks: list[Callable[[], Any]] = []
    if calibration is not None:
        checks.append(lambda: _enough(calibration, settings.samples * settings.length) or calibration.windows(loaded.tokenizer, settings))
    if (test := data.evaluation) is not None:

        def evaluation() -> Any:
            length = window_length(window, loaded.model)
            return _enough(test, max(eval_tokens, length)) or evaluation_windows(test, loaded.tokenizer, eval_tokens, length)

        checks.append(evaluation)
    # both texts may be parts of one file, which is named once
    return list(dict.fromkeys(why for check in checks if (why := _refusal(check))))


def _enough(text: Any, tokens: int) -> bool:
    """Whether a text is long enough without counting; its file is read, and raises what is wrong with it."""
    return len(text.text()) > CHARACTERS * tokens


def _refusal(check: Callable[[], Any]) -> str | None:
    from qcore.errors import QcoreError

    try:
        check()
    except QcoreError as e:
        return str(e)
    return None


def _unreadable(part: Any) -> str | None:
    """What is wrong with a file of other data than text; a large one is only looked for."""
    path, read = getattr(part, "path", None), getattr(part, "read", None)
    if (why := _absent(part)) or not isinstance(path, Path):
        return why
    return _refusal(read) if callable(read) and path.is_file() and path.stat().st_size <= LARGEST else None


def _absent(part: Any) -> str | None:
    path = getattr(part, "path", None)
    return f"data file {path} does not exist; pass a path that exists" if isinstance(path, Path) and not path.exists() else None
