"""A quantized decoder under torch.compile: one graph, the same logits, and the kernel that was chosen in it."""

import pytest
import torch
import transformers
from qcore.modules import QuantizedLinear
from qcore.pipeline import load_in_memory, quantize_model
from qcore.plugins import load_registry
from qcore.recipe_file import load_recipe
from qkernels import native
from transformers import StaticCache

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))

SMALL = {
    "vocab_size": 97, "num_hidden_layers": 2, "max_position_embeddings": 64, "hidden_size": 128, "intermediate_size": 256,
    "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def quantized(recipe: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).eval().requires_grad_(False)
    registry = load_registry()
    windows = [torch.randint(3, 97, (4, 32), generator=torch.Generator().manual_seed(1))]
    return quantize_model(load_in_memory(model), load_recipe(recipe, registry), windows, registry=registry).model


@pytest.mark.parametrize("recipe", ["w4a16-rtn", "rtn-w8a8"])
def test_prefill_and_decoding_are_a_graph_each_and_give_the_same_logits(recipe):
    model = quantized(recipe)
    ids = torch.randint(3, 97, (1, 9), generator=torch.Generator().manual_seed(2))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    forward = torch.compile(model.forward, backend=backend, fullgraph=True)
    eager, compiled = (StaticCache(config=model.config, max_cache_len=16) for _ in range(2))
    with torch.no_grad():
        for tokens in (ids, ids[:, :1], ids[:, 1:2], ids[:, 2:3]):
            expected = model(tokens, past_key_values=eager).logits
            torch.testing.assert_close(forward(tokens, past_key_values=compiled).logits, expected, rtol=1e-5, atol=1e-5)
    assert len(graphs) == 2  # of nine tokens, of one
    leaves = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert len(leaves) == 14 and all(m.explain().kernel.name.startswith("native") for m in leaves)
    for graph in graphs:
        assert sum("qkernels.linear" in str(node.target) for node in graph.graph.nodes) == len(leaves)
