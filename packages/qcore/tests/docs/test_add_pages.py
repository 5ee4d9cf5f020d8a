"""Every page of docs/add is true: its Python blocks run, top to bottom, in one namespace.

A page may rely on the scaffold it tells of: `qplug_ternary`, as `tools/new_plugin.py ternary` writes it.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]
PAGES = sorted((ROOT / "docs" / "add").glob("*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture
def scaffold(tmp_path, monkeypatch):
    """`import qplug_ternary` works."""
    script = ROOT / "tools" / "new_plugin.py"
    if not script.exists():
        pytest.skip("this tree has no tools/new_plugin.py, which the page tells of")
    subprocess.run([sys.executable, script, "ternary", "--into", tmp_path], check=True, capture_output=True)
    monkeypatch.syspath_prepend(tmp_path / "qplug-ternary" / "src")
    yield
    for name in [m for m in sys.modules if m.split(".")[0] == "qplug_ternary"]:
        del sys.modules[name]


def test_there_are_pages():
    assert {"format.md", "observer.md", "plugin.md"} <= {p.name for p in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_the_python_of_a_page_runs(page, request):
    text = page.read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    assert blocks, f"{page.name} shows no Python"
    if "qplug_ternary" in text:
        request.getfixturevalue("scaffold")
    namespace = {"__name__": f"docs_add_{page.stem}"}
    for block in blocks:
        # the page's own line numbers, for tracebacks
        source = "\n" * text[: block.start(1)].count("\n") + block[1]
        exec(compile(source, str(page), "exec"), namespace)
    for name, value in list(namespace.items()):
        if name.startswith("test_") and callable(value):
            value()
