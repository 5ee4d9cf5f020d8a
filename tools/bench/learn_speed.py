"""How long learned rotations take: 100 steps of OSTQuant on SmolLM2-135M, 4 sequences of 256 tokens a step.  docs/evidence/learn_speed.json

    OMP_NUM_THREADS=2 python tools/bench/learn_speed.py

For a machine that does nothing else: it takes about a quarter of an hour, and says the load.  The run is that of the recipe `ostquant-w4a4kv4`, on
16 windows of calibration text, up to the last step; what comes after it (GPTQ) is measured by `evidence_w4a4.py`.
"""

import json
import os
import time
from contextlib import suppress
from itertools import pairwise
from statistics import median

import evidence
from evidence import CACHE, ROOT

STEPS, WINDOWS = 100, 16


class Learned(Exception):
    """Enough was seen."""


def main() -> None:
    import news
    import torch
    from qcore.calibration.text import cut, encode, to_batches
    from qcore.model import adapter_for, load_source
    from qcore.pipeline import quantize_model
    from qcore.plugins import load_registry
    from qcore.recipe_file import load_recipe

    registry = load_registry()
    loaded = load_source("zoo:smollm2-135m", registry.sources)
    recipe = load_recipe("ostquant-w4a4kv4", registry)
    calib, _ = news.write(CACHE / "news")
    windows = cut(encode(loaded.tokenizer, calib.read_text(), str(calib)), 512)[:WINDOWS]
    load, stamps = os.getloadavg()[0], []

    def progress(phase: str, done: int, total: int) -> None:
        if phase == "learn":
            stamps.append(time.perf_counter())
            if done % 10 == 0:
                print(f"step {done} of {total}: {stamps[-1] - started:.0f} s", flush=True)
            if done == STEPS:
                raise Learned

    started = time.perf_counter()
    adapter = adapter_for(loaded.model, registry.adapters)
    with suppress(Learned):
        quantize_model(loaded, recipe, to_batches(windows, 1), registry=registry, adapter=adapter, progress=progress)
    if len(stamps) != STEPS:
        raise SystemExit(f"the recipe learned {len(stamps)} steps, not {STEPS}")
    gaps = [b - a for a, b in pairwise(stamps)]
    found = {
        "command": f"OMP_NUM_THREADS={torch.get_num_threads()} python tools/bench/learn_speed.py",
        "code": evidence.code_hash(evidence.code_files("ostquant-w4a4kv4")),
        "steps": STEPS,
        "seconds": round(stamps[-1] - started, 1),
        "seconds_of_a_step": round(median(gaps), 2),
        "threads": torch.get_num_threads(),
        "load_before": round(load, 1),
        "includes": f"float statistics of {WINDOWS} windows of 512 tokens, the start, a look at held-out sequences every ten steps",
    }
    (ROOT / "docs" / "evidence" / "learn_speed.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
