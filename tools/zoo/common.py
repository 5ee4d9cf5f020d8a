"""What the zoo's training scripts share: paths, token batches, the learning-rate schedule, checkpoints, records."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

TOOLS = Path(__file__).resolve().parent
ROOT = TOOLS.parents[1]
DATA = ROOT / "packages/qzoo/src/qzoo/data"
WORK = Path(os.environ.get("ZOO_WORK", TOOLS / ".work"))
WORK.mkdir(parents=True, exist_ok=True)

EOT = "<|endoftext|>"
VOCAB_SIZE = 1024


def sha256_bytes(data: bytes) -> str:
    """Hex sha256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file."""
    return sha256_bytes(path.read_bytes())


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON with a final newline, atomically."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", "utf-8")
    temporary.replace(path)
