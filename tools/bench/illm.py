"""Perplexity of I-LLM's integer program beside the float model's and the fake-quantized model's, on tiny-llama's own evaluation text.

    python tools/bench/illm.py 8 none            one line: bits of weights and inputs, and what eases the numbers
    python tools/bench/illm.py 4 fsbr --steps 40 --windows 16 --seed 0

easing: none · smooth (smoothquant, and scales through SwiGLU) · fsbr (recipe illm-w8a8: learned scales and clipping, and scales through SwiGLU)
Calibrated on the model's calibration text, 32 sequences of 256 tokens; measured on windows of 256 tokens.  One core takes about a minute for 16
windows, and a second for each step of learning.
"""

import argparse
import time
from dataclasses import replace

import torch
from qcore.calibration.text import TextFile, cut, encode, to_batches
from qcore.evaluation.metrics import Mean, nll_rows, perplexity
from qcore.model import adapter_for, load_source
from qcore.pipeline import float_forward, quantize_model
from qcore.plugins import load_registry
from qcore.recipe import CalibrationSettings, Recipe
from qcore.recipe_file import load_recipe
from qcore.transforms import SmoothQuant
from qcore.transforms.learn_static import LearnStatic
from qplug_llm.illm import PAPER, Widths, lower
from qplug_llm.illm.swiglu_smooth import SwiGLUSmooth

WINDOW = 256


def eased(recipe: Recipe, easing: str, steps: int, seed: int) -> Recipe:
    chosen = {
        "none": (),
        "smooth": (SmoothQuant(), SwiGLUSmooth()),
        "fsbr": (LearnStatic(ranges=False, target="block", steps=steps, seed=seed), SwiGLUSmooth()),
        "learned": (LearnStatic(ranges=False, target="block", steps=steps, seed=seed),),
    }
    return replace(recipe, transforms=chosen[easing])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bits", type=int, choices=(4, 6, 8))
    parser.add_argument("easing", choices=("none", "smooth", "learned", "fsbr"))
    parser.add_argument("--model", default="zoo:tiny-llama")
    parser.add_argument("--steps", type=int, default=40, help="of learning, all blocks together")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--paper", action="store_true", help="also with the paper's widths between the operators")
    a = parser.parse_args()
    started = time.perf_counter()
    registry = load_registry()
    loaded = load_source(a.model, registry.sources)
    adapter = adapter_for(loaded.model, registry.adapters)
    assert loaded.calibration is not None and loaded.evaluation is not None
    windows = TextFile(loaded.calibration).windows(loaded.tokenizer, CalibrationSettings(samples=32, length=WINDOW, seed=a.seed))
    text = cut(encode(loaded.tokenizer, loaded.evaluation.read_text(), str(loaded.evaluation)), WINDOW)[: a.windows]
    recipe = eased(load_recipe(f"illm-w{a.bits}a{a.bits}", registry), a.easing, a.steps, a.seed)
    forward = float_forward(loaded, adapter)
    with torch.no_grad():
        scores = {"float": measure(forward, text)}
        q = quantize_model(loaded, recipe, to_batches(windows, 8), registry=registry, adapter=adapter)
        scores["fake-quantized"] = measure(lambda ids: adapter.outputs(q.model, ids), text)
        chosen = {"integer": Widths()} | ({"integer, PAPER": PAPER} if a.paper else {})
        for label, widths in chosen.items():
            program = lower(q, widths)
            scores[label] = measure(lambda ids, program=program: program(ids).dequantize(), text)
    ratios = " · ".join(f"{label} {value:.3f} (×{value / scores['float']:.4f})" for label, value in scores.items())
    steps = f" {a.steps} steps" if a.easing in ("fsbr", "learned") else ""
    print(f"W{a.bits}A{a.bits} {a.easing}{steps}, seed {a.seed}, {len(text)} windows: {ratios}   [{time.perf_counter() - started:.0f} s]")
    for note in q.notes:
        print("  ", note)


def measure(forward, text) -> float:
    """Perplexity over windows, each from its own first token."""
    nll = Mean()
    for ids in text:
        logits = forward(ids.unsqueeze(0))[0]
        nll.add(nll_rows(logits[:-1], ids[1:]))
    return perplexity(nll.mean)


if __name__ == "__main__":
    main()
