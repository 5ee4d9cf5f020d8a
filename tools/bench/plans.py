"""How long `qcore plan` takes for published shapes, from config.json alone: docs/evidence/plans.json.

    python tools/bench/plans.py

Each plan is a process of its own, imports included.  Sizes, memory and times in it are the plan's estimates; nothing is quantized.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "docs" / "evidence" / "plans.json"
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5, "dtype": "bfloat16", "tie_word_embeddings": False}
MIXTRAL = LLAMA | {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
SHAPES = {
    "Llama 3 8B": LLAMA
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    | {"vocab_size": 128256, "max_position_embeddings": 8192},
    "Llama 3 70B": LLAMA
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8}
    | {"vocab_size": 128256, "max_position_embeddings": 8192},
    "Mixtral 8x7B": MIXTRAL
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    | {"vocab_size": 32000, "max_position_embeddings": 32768, "num_local_experts": 8, "num_experts_per_tok": 2},
}


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "calib.txt"
        text.write_text("some text, which nobody reads for a plan ")
        for name, config in SHAPES.items():
            folder = Path(scratch) / name.replace(" ", "-")
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(config))
            command = [sys.executable, "-m", "qcore", "plan", str(folder / "config.json"), "-r", "w4a16-gptq", "--calib", str(text), "--json"]
            started = time.perf_counter()
            run = subprocess.run(command, capture_output=True, text=True, check=True)
            seconds = time.perf_counter() - started
            plan = json.loads(run.stdout)
            rows.append(
                {
                    "model": name,
                    "seconds": round(seconds, 2),
                    "weights": len(plan["sites"]),
                    "before_gb": round(plan["size"]["before_bytes"] / 1e9, 2),
                    "after_gb": round(plan["size"]["after_bytes"] / 1e9, 2),
                    "memory_gb": round(plan["memory"]["estimate_bytes"] / 1e9, 2) if "estimate_bytes" in plan["memory"] else plan["memory"],
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    result = {"command": "qcore plan CONFIG -r w4a16-gptq --calib TEXT --json", "cpus": os.cpu_count(), "machine": platform.machine()}
    OUT.write_text(json.dumps(result | {"load_average": round(os.getloadavg()[0], 2), "plans": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
