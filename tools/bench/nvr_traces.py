"""Gather traces out of our own quantized models, for `qcore nvr`.

    python tools/bench/nvr_traces.py FOLDER        writes moe.npz and kv.npz; half a minute on one core

moe.npz: expert by expert, the tokens that zoo:tiny-moe (w4a16-rtn) routes to it in its second layer, over 4096 tokens of its evaluation text;
         a row is a token's hidden state in bfloat16, 512 bytes
kv.npz:  query by query, the 32 keys that the first head of zoo:tiny-llama's (w4a16-rtn) third layer weighs most among those before it, for the
         second half of a window of 1024 tokens; a row is key and value of one head in bfloat16, 256 bytes
"""

import argparse
from pathlib import Path
from typing import Any

from qplug_hardware.nvr.files import save_trace
from qplug_hardware.nvr.trace import Trace
from qplug_hardware.nvr.workloads import kv_rows, moe_routing

KEPT = 32


def quantized(name: str, length: int, windows: int) -> tuple[Any, Any]:
    """(model, [windows, length] token ids of its evaluation text)"""
    from qcore.calibration.text import cut, encode
    from qcore.model import adapter_for, load_source
    from qcore.pipeline import quantize_model
    from qcore.plugins import load_registry
    from qcore.recipe_file import load_recipe

    registry = load_registry()
    loaded = load_source(f"zoo:{name}", registry.sources)
    adapter = adapter_for(loaded.model, registry.adapters)
    ids = encode(loaded.tokenizer, loaded.evaluation.read_text(encoding="utf-8"), str(loaded.evaluation))
    made = quantize_model(loaded, load_recipe("w4a16-rtn", registry, ()), [], registry=registry, adapter=adapter)
    assert made.sites, "no weight was quantized"
    return made.model.eval(), cut(ids, length)[:windows]


def moe_trace() -> Trace:
    import torch

    model, ids = quantized("tiny-moe", 256, 16)
    seen: list[Any] = []
    router = model.get_submodule("model.layers.1.mlp.gate")
    handle = router.register_forward_hook(lambda module, args, out: seen.append(out[-1]))
    with torch.no_grad():
        for window in ids:
            model(input_ids=window[None])
    handle.remove()
    chosen = torch.cat([s.reshape(-1, s.shape[-1]) for s in seen]).long().numpy()
    assert chosen.shape == (ids.numel(), 2), chosen.shape
    return moe_routing(chosen, 8, 512, name="tiny-moe")


def kv_trace() -> Trace:
    import torch

    model, ids = quantized("tiny-llama", 1024, 1)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(input_ids=ids, output_attentions=True).attentions[2][0, 0].float()  # [T, T]
    half = ids.shape[1] // 2
    chosen = weights[half:].topk(KEPT, dim=1).indices.sort(dim=1).values.numpy()
    assert (chosen <= half + torch.arange(half)[:, None].numpy()).all()
    return kv_rows(chosen, ids.shape[1], 256, name="tiny-llama-kv")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in (("moe", moe_trace), ("kv", kv_trace)):
        trace = make()
        save_trace(folder / f"{name}.npz", trace)
        print(f"{folder / name}.npz: {trace.summary()}")


if __name__ == "__main__":
    main()
