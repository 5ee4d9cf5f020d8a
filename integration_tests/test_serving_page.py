"""docs/serving.md and the README of qcore are true: their commands and python blocks run, top to bottom, in one folder and one namespace."""

import re
import shlex
from functools import partial
from pathlib import Path

import pytest
import torch
from qcore.cli import main

PAGE = Path(__file__).parents[1] / "docs" / "serving.md"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.timeout(600)
def test_the_page_on_serving_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QCORE_FRESH_PROOF", "0")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # traced as ever, but without minutes of g++
    names: dict[str, object] = {"__name__": "serving"}
    seen = set()
    for language, block in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        if language == "python":
            exec(compile(block, PAGE.name, "exec"), names)
        elif not language:
            for line in block.splitlines():
                command, *arguments = shlex.split(line)
                assert command == "qcore" and main(arguments) == 0, f"{line}\n{capsys.readouterr().err}"
                seen.add(arguments[0])
    assert seen == {"quantize", "explain", "bench", "eval", "plan", "verify"}
    # what the page says of them: one model under two loaders, and a cache that is smaller than floats
    assert torch.equal(names["tokens"], names["same"])  # type: ignore[arg-type]
    assert torch.equal(names["fast"], names["same"])  # type: ignore[arg-type]
    written = names["written"]
    layers, heads, size, tokens = 4, 2, 64, written.past_key_values.get_seq_length()  # type: ignore[attr-defined]
    assert 0 < names["cache_bytes"](written.past_key_values) < layers * 2 * heads * size * tokens * 2 / 3  # type: ignore[operator, attr-defined]


def test_the_python_of_qcores_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).parents[1] / "packages" / "qcore" / "README.md"
    ((_, block),) = [found for found in BLOCK.findall(page.read_text(encoding="utf-8")) if found[0] == "python"]
    names: dict[str, object] = {"__name__": "readme"}
    exec(compile(block, page.name, "exec"), names)
    row = names["done"].sites[0]  # type: ignore[attr-defined]
    assert 0 < row.error < 0.1 and (tmp_path / "out" / "model.safetensors").is_file()


def test_recipes_of_the_portable_layout_are_those_that_the_page_lists(capsys: pytest.CaptureFixture[str]) -> None:
    """Of the recipes for decoders, by their plans: which of them transformers opens without qcore."""
    import json

    from qcore.plugins import load_registry

    row = next(line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| recipes |"))
    listed = set(re.findall(r"`([\w-]+)`", row))
    portable = set()
    for name in load_registry().recipes:
        if main(["plan", "zoo:tiny-llama", "-r", name, "--json"]) == 0:
            engine = next(e for e in json.loads(capsys.readouterr().out)["engines"] if e["engine"] == "transformers")
            portable |= {name} if engine["loads"] and not engine["notes"] else set()
        capsys.readouterr()
    assert listed == portable
