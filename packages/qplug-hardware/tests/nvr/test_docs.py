"""docs/nvr.md: its python blocks run, and its table of settings is what the code has."""

import re
from pathlib import Path

from qplug_hardware.nvr.config import Settings
from qplug_hardware.nvr.models import MODELS

PAGE = (Path(__file__).parents[4] / "docs" / "nvr.md").read_text(encoding="utf-8")


def test_python_blocks_run():
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "nvr.md", "exec"), {})


def test_settings_and_defaults_are_those_of_the_code():
    rows = [line.split("|")[1:3] for line in PAGE.splitlines() if re.match(r"\| `(machine|nsb|runahead|stream|imp)\.", line)]
    assert len(rows) == 8
    seen = set()
    for names, defaults in rows:
        keys = re.findall(r"`([^`]+)`", names)
        owner = keys[0].rpartition(".")[0]
        full = [k if not k.startswith(".") else owner + k for k in keys]
        values = [v.strip() for v in defaults.split(",")] * (len(full) if "," not in defaults else 1)
        for key, value in zip(full, values, strict=True):
            made = Settings()
            for part in key.split("."):
                made = getattr(made, part)
            assert value in (str(made).lower(), "depth" if made is None else ""), (key, value, made)
            seen.add(key)
    assert {"machine.l2.ways", "runahead.vmig", "imp.queue", "stream.confirmations"} <= seen and len(seen) == 27


def test_every_model_is_described():
    assert re.findall(r"^\| `([a-z-]+)` \| [^|]+\|$", PAGE, flags=re.MULTILINE) == list(MODELS)
