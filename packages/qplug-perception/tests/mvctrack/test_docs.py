"""docs/mvctrack.md: its python blocks run."""

import re
from pathlib import Path

PAGE = (Path(__file__).parents[4] / "docs" / "mvctrack.md").read_text(encoding="utf-8")


def test_python_blocks_run():
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "mvctrack.md", "exec"), {})
