"""The documentation: its python blocks run, its links lead somewhere, what it claims is what the cells say."""

import json
import re
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
MARK = "<!-- every python block of this page is run by"


def pages() -> list[Path]:
    return [p for p in sorted((ROOT / "docs").rglob("*.md")) if p.read_text(encoding="utf-8").startswith(MARK)]


@pytest.mark.parametrize("page", pages(), ids=lambda p: p.stem)
def test_python_blocks_run_in_order(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert blocks
    # dataclasses look their module up by name
    names = {"__name__": "page"}
    monkeypatch.setitem(sys.modules, "page", type(sys)("page"))
    for i, block in enumerate(blocks):
        exec(compile(block, f"{page.name}, block {i + 1}", "exec"), names)


def test_some_pages_are_run() -> None:
    assert {"recipe", "task", "source"} <= {p.stem for p in pages()}


def tool(name: str) -> Any:
    spec = spec_from_file_location(name, ROOT / f"tools/{name}.py")
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_dead_link_is_found_and_others_are_not(tmp_path: Path) -> None:
    check_docs = tool("check_docs")
    (tmp_path / "there.md").write_text("[web](https://example.org) [me](there.md#part) [gone](gone.md)\n```\n[code](not/a/link)\n```\n")
    assert list(check_docs.dead_links(tmp_path)) == ["there.md: gone.md"]


COMMANDS = {
    "uv run qcore quantize zoo:tiny-llama --recipe w4a16-gptq -o out/": "",
    "$ qcore recipes show w4a16-gptq > my.toml": "",
    "QCORE_PLUGINS= qcore …": "",
    "qcore plan MODEL --recipe my.toml --set rules.0.format.bits=3   # three bits": "",
    "qcore plan MODEL --recipe mixed --bits 3.5 --select subsa": "",
    "torchrun --nproc-per-node 4 -m qcore quantize MODEL -r w4a16_gptq": "there is no recipe 'w4a16_gptq'",
    "qcore plan MODEL \\\n  --recipe w4a16-gptq --bit 3": "it has no option --bit",
    "qcore evaluate out/": "there is no command 'evaluate'",
    "qcore recipes print w4a16-gptq": "there is no command 'print'",
}


@pytest.mark.parametrize(("line", "said"), COMMANDS.items())
def test_commands_of_code_blocks_that_qcore_would_refuse_are_found(tmp_path: Path, line: str, said: str) -> None:
    from qcore.plugins import load_registry

    # behind a block of another language, whose end must not be taken for a beginning
    (tmp_path / "page.md").write_text(f"```python\nx = 1\n```\n\nqcore prose --here\n\n```\n{line}\n```\n")
    found = list(tool("check_docs").wrong_commands(tmp_path, load_registry()))
    assert len(found) == bool(said) and all(said in one for one in found)


SYSTEMS = {
    "| [X](x) | a | `w4a16-gptq` | | [q](../packages/qplug-x/README.md) |": "",
    "| [X](x) | a | `qcore select` | | [q](../packages/qplug-x/README.md) |": "",
    "| [X](x) | a | not here | | [q](../packages/qplug-empty/README.md) |": "",
    "| [X](x) | a | not here | | [q](../packages/qplug-x/README.md) |": "qplug-x brings qcore_formats",
    "| [X](x) | a | `w4a16-x` | | |": "`w4a16-x`, which is neither",
    "| [X](x) | a | `select` | | |": "`select`, which is neither",
}


@pytest.mark.parametrize(("row", "said"), SYSTEMS.items())
def test_a_row_of_systems_that_is_no_longer_true_is_found(row: str, said: str) -> None:
    from types import SimpleNamespace

    plugins = [SimpleNamespace(distribution="qplug-x", hooks=("qcore_formats",)), SimpleNamespace(distribution="qplug-empty", hooks=())]
    registry = SimpleNamespace(plugins=plugins, recipes={"w4a16-gptq": None}, commands={"select": None})
    found = list(tool("check_docs").wrong_systems(f"| system | model |\n|---|---|\n{row}\n", registry))
    assert len(found) == bool(said) and all(said in one for one in found)


TEMPLATE = """
@ a = cells/a-seed*.json
@ b = list.json | label=b, second
@ gone = cells/gone.json

## Which

### Measured

- a has {a kl}, b has {b kl}
  and takes {b seconds}.
  holds: a kl < 0.5 b kl
- gone has {gone kl}.
- and gone?
  holds: gone kl < a kl
  else: - gone is not measured.

### Not measured

- gone has {gone kl}.

### Last

- a has {a kl} again.
"""


@pytest.fixture
def cells(tmp_path: Path) -> Path:
    (tmp_path / "cells").mkdir()
    for seed, kl in enumerate((0.01, 0.03)):
        (tmp_path / f"cells/a-seed{seed}.json").write_text(json.dumps({"scores": {"kl": kl}}))
    rows = [{"label": "b", "scores": {"kl": 9.0}}, {"label": "b, second", "scores": {"kl": 0.5}, "seconds": 70.4}]
    (tmp_path / "list.json").write_text(json.dumps({"cells": rows}))
    return tmp_path


def test_figures_are_the_cells_means_and_pieces_without_cells_are_left_out(cells: Path) -> None:
    page, wrong = tool("choosing").section(TEMPLATE, cells)
    assert not wrong
    assert page == (
        "## Which\n\n### Measured\n\n- a has 0.0200, b has 0.500\n  and takes 70 s.\n- gone is not measured.\n\n"
        "### Not measured\n\nNot measured yet.\n\n### Last\n\n- a has 0.0200 again.\n"
    )


def test_a_claim_that_the_cells_no_longer_bear_out_is_reported_and_not_written(cells: Path) -> None:
    (cells / "cells/a-seed0.json").write_text(json.dumps({"scores": {"kl": 0.9}}))
    page, wrong = tool("choosing").section(TEMPLATE, cells)
    assert len(wrong) == 1 and "a kl < 0.5 b kl" in wrong[0] and "0.465" in wrong[0]
    assert "takes" not in page


WRONG = {"- {typo kl}": "'typo'", "- {a speed}": "'speed'", "- x\n  holds: a kl": "is no claim", "- x\n  holds: a < 3": "is no side"}


@pytest.mark.parametrize(("line", "said"), WRONG.items())
def test_a_template_that_names_what_is_not_there_is_reported(cells: Path, line: str, said: str) -> None:
    _, wrong = tool("choosing").section(f"@ a = cells/a-seed*.json\n\n{line}\n", cells)
    assert len(wrong) == 1 and said in wrong[0]
