"""GPTQModel's own GPTQ of one layer: layer_gptqmodel.py PROBLEM OUT BITS GROUP THREADS REPEAT; prints JSON seconds.

desc_act and act_group_aware are off, as in qcore's natural order; its own defaults otherwise.
"""

import json
import os
import sys
import time

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
given, out, bits, group, threads, repeat = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:7])

import torch  # noqa: E402
from gptqmodel.quantization.config import GPTQConfig  # noqa: E402
from gptqmodel.quantization.gptq import GPTQ  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

torch.set_num_threads(threads)
torch.set_grad_enabled(False)
problem = load_file(given)
w, gram = problem["weight"], problem["gram"]
rows = 8192
seconds = float("inf")
for _ in range(repeat):
    layer = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
    layer.weight.data = w.clone()
    task = GPTQ(layer, GPTQConfig(bits=bits, group_size=group, sym=True, desc_act=False, act_group_aware=False, offload_to_disk=False))
    task.quantizer.configure(perchannel=True)
    # as if `process_batch` had seen `rows` inputs: it keeps sums, and halves nothing
    cpu = torch.device("cpu")
    task._device_hessian_partials[cpu] = gram * rows
    task._device_sample_counts[cpu] = rows
    task._hessian_dirty = True
    task.nsamples = rows  # without it, it rounds to nearest and says so in the log alone
    start = time.perf_counter()
    values = task.quantize()[0]
    seconds = min(seconds, time.perf_counter() - start)
save_file({"values": values.float().contiguous()}, out)
print(json.dumps({"seconds": round(seconds, 2), "torch": torch.__version__}))
