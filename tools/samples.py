"""The output that README.md and docs/tour.md show, made anew: `python tools/samples.py`, half a minute on a quiet machine.

The marks in the pages name what stands between them: <!-- tour: plan -->, <!-- tour: table -->, <!-- tour: explain -->, and in README.md
<!-- main-job-table: begin -->.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAIN_JOB = ("zoo:tiny-llama", "--recipe", "w4a16-gptq")


def said(*arguments: str) -> str:
    """What `qcore` prints, without the spaces that fill its lines."""
    environment = os.environ | {"COLUMNS": "150"}
    done = subprocess.run([sys.executable, "-m", "qcore", *arguments], capture_output=True, text=True, check=True, env=environment)
    return "\n".join(line.rstrip() for line in done.stdout.splitlines())


def put(file: Path, begin: str, end: str, text: str) -> None:
    """Put a block of text between two marks; SystemExit where a mark is missing."""
    page = file.read_text(encoding="utf-8")
    pattern = re.compile(f"({re.escape(begin)}\n).*?({re.escape(end)})", re.DOTALL)
    if not pattern.search(page):
        raise SystemExit(f"{file.relative_to(ROOT)} has no {begin} … {end}")
    file.write_text(pattern.sub(lambda m: f"{m[1]}```\n{text.strip()}\n```\n{m[2]}", page, count=1), encoding="utf-8")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/out"
        plan = said("plan", *MAIN_JOB)
        ended = said("quantize", *MAIN_JOB, "-o", out)
        explain = said("explain", out, "*.layers.0.mlp.down_proj")
    table = ended[ended.rindex("zoo:tiny-llama\n") :].partition("\nwritten:")[0]
    put(ROOT / "README.md", "<!-- main-job-table: begin -->", "<!-- main-job-table: end -->", table)
    for name, text in {"plan": plan, "table": table, "explain": explain}.items():
        put(ROOT / "docs" / "tour.md", f"<!-- tour: {name} -->", "<!-- tour: end -->", text)


if __name__ == "__main__":
    main()
