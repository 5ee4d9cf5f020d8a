"""A trained model, tiny-llama, in integers: how much of its perplexity on held-out text is lost."""

import torch
from qcore.calibration.text import cut, encode
from qcore.evaluation.metrics import nll_rows, perplexity
from qcore.model import adapter_for, load_source
from qcore.pipeline import float_forward, quantize_model
from qcore.plugins import load_registry
from qcore.recipe_file import load_recipe
from qplug_llm.illm import PAPER, lower


def scored(forward, text) -> float:
    logits = forward(text)
    return perplexity(float(nll_rows(logits[:, :-1].flatten(0, 1), text[:, 1:].flatten()).mean()))


def test_integers_lose_less_than_five_percent_of_perplexity():
    registry = load_registry()
    loaded = load_source("zoo:tiny-llama", registry.sources)
    adapter = adapter_for(loaded.model, registry.adapters)
    assert loaded.evaluation is not None
    text = cut(encode(loaded.tokenizer, loaded.evaluation.read_text(), "eval.txt"), 128)[:2]
    with torch.no_grad():
        exact = scored(float_forward(loaded, adapter), text)
        run = quantize_model(loaded, load_recipe("illm-w8a8", registry), registry=registry, adapter=adapter)
        assert scored(lambda ids: lower(run)(ids).dequantize(), text) < 1.05 * exact
        assert scored(lambda ids: lower(run, PAPER)(ids).dequantize(), text) < 1.05 * exact
