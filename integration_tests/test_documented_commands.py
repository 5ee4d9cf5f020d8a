"""What the pages tell users to quantize, of models that ship here, is planned without a problem."""

import re
import shlex
from pathlib import Path

import pytest
from qcore.cli import main

ROOT = Path(__file__).parents[1]
SHIPPED = re.compile(r"(?:zoo|petr|gsrender|mvctrack|multimodal):[\w-]+$")


def commands() -> list[str]:
    """`qcore quantize` of shipped models, without files of the user's and without where to write."""
    found = set()
    for page in [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("packages/*/README.md")]:
        for line in re.findall(r"^(?:uv run )?qcore quantize (.*[^\\\n])$", page.read_text(encoding="utf-8"), re.MULTILINE):
            words = shlex.split(line, comments=True)
            if not SHIPPED.match(words[0]) or {"--calib", "--eval"} & set(words):
                continue
            at = next(i for i, word in enumerate(words) if word in ("-o", "--out"))
            found.add(shlex.join(words[:at] + words[at + 2 :]))
    return sorted(found)


@pytest.mark.parametrize("command", commands())
def test_what_pages_quantize_is_planned_without_a_problem(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["plan", *shlex.split(command)])
    assert code == 0, capsys.readouterr().err


def test_there_is_one_for_every_family() -> None:
    of = {command.split(":")[0] for command in commands()}
    assert of == {"zoo", "petr", "gsrender", "mvctrack", "multimodal"} and len(commands()) >= 20
