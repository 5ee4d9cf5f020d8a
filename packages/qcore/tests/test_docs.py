"""The documentation: its python blocks run, its links lead somewhere."""

import re
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

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


def test_a_dead_link_is_found_and_others_are_not(tmp_path: Path) -> None:
    spec = spec_from_file_location("check_docs", ROOT / "tools/check_docs.py")
    assert spec and spec.loader
    check_docs = module_from_spec(spec)
    spec.loader.exec_module(check_docs)
    (tmp_path / "there.md").write_text("[web](https://example.org) [me](there.md#part) [gone](gone.md)\n```\n[code](not/a/link)\n```\n")
    assert list(check_docs.dead_links(tmp_path)) == ["there.md: gone.md"]
