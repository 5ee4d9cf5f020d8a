"""Time and memory of whole streamed runs on random weights of published shapes: nothing is said about quality.

    python tools/bench/ssm_shapes.py rwkv7-0.1b       12 layers of 768, vocabulary 65,536: recipe w3a16-rwkvquant
    python tools/bench/ssm_shapes.py mamba-130m       24 layers of 768, vocabulary 50,280: recipe mambaquant-w8a8

Weights are written first, by a process of their own; then quantized one block at a time, on 8 sequences of 128 random tokens, seed 0.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import evidence
import torch

RECIPES = {"rwkv7-0.1b": "w3a16-rwkvquant", "mamba-130m": "mambaquant-w8a8"}


def write(shape: str, folder: Path) -> None:
    """Random weights in bfloat16 as the family publishes them."""
    from qcore.testing.models import randomize

    if shape == "rwkv7-0.1b":
        from qplug_ssm.testing import rwkv7

        tensors = rwkv7(layers=12, width=768, head=64, ffn=3072, vocab=65536)
        torch.save({name: t.bfloat16() for name, t in tensors.items()}, folder / "model.pth")
        return
    from transformers import MambaConfig, MambaForCausalLM

    model: Any = MambaForCausalLM(MambaConfig(vocab_size=50280, hidden_size=768, num_hidden_layers=24, state_size=16, time_step_rank=48))
    randomize(model)
    model.bfloat16().save_pretrained(folder)


def run(shape: str, folder: Path) -> None:
    """Quantize from disk, streamed; prints one line of JSON."""
    from qcore.checkpoint.journal import Journal
    from qcore.evaluation import MemoryMeter
    from qcore.model import adapter_for, load_source
    from qcore.pipeline import quantize_model
    from qcore.plugins import load_registry
    from qcore.recipe_file import load_recipe

    evidence.ROOMS += ["packages/qplug-ssm/src"]
    registry = load_registry()
    recipe = load_recipe(RECIPES[shape], registry)
    meter = MemoryMeter()
    loaded = load_source(str(folder / "model.pth" if (folder / "model.pth").exists() else folder), registry.sources)
    values = sum(p.numel() for p in loaded.model.parameters())
    adapter = adapter_for(loaded.model, registry.adapters)
    g = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(0, 50000, (2, 128), generator=g)} for _ in range(4)]
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        journal = Journal(Path(place), {"shape": shape})
        done = quantize_model(
            loaded, recipe, batches, registry=registry, adapter=adapter, journal=journal, stream=True, progress=lambda *_: meter.sample()
        )
    record = {
        "shape": shape,
        "recipe": recipe.name,
        "parameters": values,
        "seconds": round(time.perf_counter() - started, 1),
        "phases": done.seconds,
        "memory": meter.to_dict(),
        "threads": torch.get_num_threads(),
        "sites": len(done.sites),
        "bits": sum(8 * s.nbytes for s in done.sites) / sum(s.shape[0] * s.shape[1] for s in done.sites),
        "files": evidence.code_files(recipe.name),
    }
    print(json.dumps(record))


def main() -> int:
    if len(sys.argv) == 4:
        (write if sys.argv[1] == "write" else run)(sys.argv[2], Path(sys.argv[3]))
        return 0
    for shape in sys.argv[1:] or RECIPES:
        with tempfile.TemporaryDirectory() as folder:
            for step in ("write", "run"):
                if subprocess.run([sys.executable, __file__, step, shape, folder]).returncode:
                    return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
