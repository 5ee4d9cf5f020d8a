"""Latency of EfficientNet-Lite0 as float, simulated, in integers, and in ONNX Runtime, one after another in one process.

    python tools/bench/cnn_latency.py             measure, then write cells/efficientnet-lite0/latency.json (`evidence_cnn.py --table` shows it)

One image of 224 × 224 and batches of eight; one thread, median of the passes after three that warm up; rounds of all paths interleaved, so that a
busy machine slows them alike.  About a minute.  Needs qzoo[efficientnet] and qcore[onnx].
"""

import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evidence import CELLS

FILE = CELLS / "efficientnet-lite0" / "latency.json"
BATCHES = (1, 8)
ROUNDS = int(os.environ.get("ROUNDS", "12"))


def paths() -> tuple[dict[str, Callable[[Any], Any]], dict[str, Any]]:
    """What is timed, by name: each takes a batch of images."""
    import copy

    import onnxruntime
    from qcore.checkpoint.exporters import OnnxExporter
    from qcore.model import load_source
    from qcore.model.plain import PlainCNN
    from qcore.modules import QuantizedConv
    from qcore.pipeline import float_forward, quantize_model
    from qcore.plugins import load_registry
    from qcore.recipe_file import load_recipe
    from qcore.transforms import FoldBatchNorm, apply_rewrite
    from qzoo.images import photographs

    registry = load_registry()
    uri = "zoo:efficientnet-lite0"
    loaded = load_source(uri, registry.sources)
    float_forward(loaded, PlainCNN())
    folded = apply_rewrite(loaded.model, FoldBatchNorm().fit(PlainCNN().topology(loaded.model), {}, {}, loaded.model, loaded.reader)).eval()
    batches = list(photographs("calibration", 8).split(8))
    recipe = load_recipe("cnn-w8a8", registry, ("correct_bias=false",))
    integers = quantize_model(load_source(uri, registry.sources), recipe, batches, registry=registry, adapter=PlainCNN()).model
    kernels = [k() for k in registry.kernels.values()]
    simulated = copy.deepcopy(integers)
    for m in simulated.modules():
        if isinstance(m, QuantizedConv):
            m.bind(kernels, wish="reference-conv")
    found: dict[str, Callable[[Any], Any]] = {"float, batch norms folded": folded, "simulated": simulated, "integers": integers}
    chosen = [m.explain().kernel.name for m in integers.modules() if isinstance(m, QuantizedConv)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        for name, exporter, model in (
            ("ONNX Runtime, float", OnnxExporter(), folded),
            ("ONNX Runtime, U8U8", OnnxExporter(weights="uint8"), integers),
            ("ONNX Runtime, U8S8", OnnxExporter(weights="int8"), integers),
        ):
            file = exporter.write(model, Path(folder) / "model.onnx", batches[0][:1]).file
            session = onnxruntime.InferenceSession(file.read_bytes(), options, providers=["CPUExecutionProvider"])
            found[name] = lambda x, session=session: session.run(None, {"input": x.numpy()})  # type: ignore[misc]
    return found, {"convolutions": {name: chosen.count(name) for name in sorted(set(chosen))}, "onnxruntime": onnxruntime.__version__}


def measure() -> dict[str, Any]:
    import torch
    from qzoo.images import photographs

    torch.set_num_threads(1)
    found, about = paths()
    seconds: dict[str, dict[str, list[float]]] = {name: {str(b): [] for b in BATCHES} for name in found}
    with torch.no_grad():
        for size in BATCHES:
            x = photographs("evaluation", size)
            for run in found.values():
                for _ in range(3):
                    run(x)
            for _ in range(ROUNDS):
                for name, run in found.items():
                    started = time.perf_counter()
                    run(x)
                    seconds[name][str(size)].append(time.perf_counter() - started)
    return {
        **about,
        "milliseconds": {name: {b: 1000 * statistics.median(times) for b, times in own.items()} for name, own in seconds.items()},
        "fastest_milliseconds": {name: {b: 1000 * min(times) for b, times in own.items()} for name, own in seconds.items()},
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
        "vnni": bool(torch.cpu._is_vnni_supported()),
        "load_average": round(os.getloadavg()[0], 2),
    }


def table(found: dict[str, Any]) -> list[str]:
    """The latencies as a section of the page."""
    lines = [
        "## Latency",
        "",
        f"`python tools/bench/cnn_latency.py`: one thread, median milliseconds of {ROUNDS} interleaved rounds, load average {found['load_average']}; "
        f"VNNI {'there' if found['vnni'] else 'absent'}; torch {found['torch']}, ONNX Runtime {found['onnxruntime']}.",
        "",
        "| path | " + " | ".join(f"{b} image{'s' if b > 1 else ''}" for b in BATCHES) + " |",
        "|---|" + "---|" * len(BATCHES),
    ]
    lines += [f"| {name} | " + " | ".join(f"{own[str(b)]:.1f}" for b in BATCHES) + " |" for name, own in found["milliseconds"].items()]
    return [*lines, ""]


if __name__ == "__main__":
    result = measure()
    FILE.parent.mkdir(parents=True, exist_ok=True)
    FILE.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    print("\n".join(table(result)), file=sys.stderr)
