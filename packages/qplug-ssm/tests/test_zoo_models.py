"""The zoo's trained models are read and understood."""

import math

import pytest
import torch
from qcore.model import adapter_for, load_source
from qcore.pipeline import float_forward
from qcore.plugins import load_registry

pytest.importorskip("qzoo", reason="the zoo's models are a package of their own")


@pytest.mark.parametrize(("name", "adapter_name"), [("tiny-rwkv", "rwkv7"), ("tiny-mamba", "mamba")])
def test_a_trained_model_predicts_text(name, adapter_name):
    registry = load_registry()
    loaded = load_source(f"zoo:{name}", registry.sources)
    adapter = adapter_for(loaded.model, registry.adapters)
    assert adapter.name == adapter_name
    ids = torch.tensor([loaded.tokenizer.encode(loaded.evaluation.read_text("utf-8")[:8000])[:513]])
    logits = float_forward(loaded, adapter)({"input_ids": ids[:, :-1]})[0]
    assert math.exp(torch.nn.functional.cross_entropy(logits, ids[0, 1:])) < 30  # about 20 on the whole evaluation text; 1024 without training
