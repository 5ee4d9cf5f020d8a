"""llm-compressor's own GPTQ of one layer: layer_llm_compressor.py PROBLEM OUT BITS GROUP THREADS REPEAT; prints JSON seconds.

Scales are minmax ones, as its default observer gives, and are not counted in the time.
"""

import json
import sys
import time

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from safetensors.torch import load_file, save_file

given, out, bits, group, threads, repeat = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:7])
torch.set_num_threads(threads)
torch.set_grad_enabled(False)
problem = load_file(given)
w, gram = problem["weight"], problem["gram"]
args = QuantizationArgs(num_bits=bits, type="int", symmetric=True, strategy="group", group_size=group)
low, high = w.unflatten(1, (-1, group)).aminmax(dim=-1)
scale, zero = calculate_qparams(low, high, args)
seconds = float("inf")
for _ in range(repeat):
    weights, grams = w.clone().unsqueeze(0), gram.clone().unsqueeze(0)  # the routine works in place
    start = time.perf_counter()
    values, _, fell_back = quantize_weight(weights, grams, scale.unsqueeze(0), zero.unsqueeze(0), None, args)
    seconds = min(seconds, time.perf_counter() - start)
assert not fell_back.any(), "llm-compressor fell back to rounding to nearest"
save_file({"values": values[0].contiguous()}, out)
print(json.dumps({"seconds": round(seconds, 2), "torch": torch.__version__}))
