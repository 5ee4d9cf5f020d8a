"""Peak memory against the budget: generated checkpoints with random weights, quantized by the command line in a process of their own.

    python tools/bench/memory.py                 every size whose cell is missing, then the picture
    python tools/bench/memory.py --only rtn-8gb  one of them
    python tools/bench/memory.py --list

Each cell: the plan's estimate, the budget, the kernel's own peak (VmHWM), the largest anonymous memory, and both sampled twice a second.  The
checkpoints are dense random bfloat16 in shards of at most 2 GB, made in --scratch and deleted afterwards; they take up to 8 GB there, the run 3 GB.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CELLS = ROOT / "docs" / "evidence" / "memory"


@dataclass(frozen=True)
class Cell:
    """A Llama shape, a recipe and a budget ("smallest": the least that `plan` accepts).  samples: calibration sequences of 512 tokens, 0 = none"""

    name: str
    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    recipe: str
    max_ram: str
    samples: int = 0

    def config(self) -> dict[str, Any]:
        return {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.hidden // self.heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
        }


MATRIX = [
    Cell("rtn-1gb", 2048, 10, 5632, 16, 4, 32000, "w4a16-rtn", "2GiB"),
    Cell("rtn-8gb", 4096, 19, 11008, 32, 32, 32000, "w4a16-rtn", "3GiB"),
    Cell("gptq-0.3b", 1024, 20, 2816, 16, 8, 32000, "w4a16-gptq", "3GiB", samples=32),
    Cell("rtn-1gb-tight", 2048, 10, 5632, 16, 4, 32000, "w4a16-rtn", "smallest"),
    Cell("gptq-0.3b-tight", 1024, 20, 2816, 16, 8, 32000, "w4a16-gptq", "smallest", samples=32),
    Cell("gptq-1b", 2048, 18, 8192, 32, 8, 32000, "w4a16-gptq", "4GiB", samples=32),
]


def generate(cell: Cell, folder: Path) -> int:
    """Write the checkpoint of a cell; returns the bytes of its weights."""
    import torch
    from qcore.model.safetensors_file import write_safetensors

    h, f, kv = cell.hidden, cell.intermediate, cell.hidden // cell.heads * cell.kv_heads
    shapes = {"model.embed_tokens.weight": (cell.vocabulary, h), "model.norm.weight": (h,), "lm_head.weight": (cell.vocabulary, h)}
    for i in range(cell.layers):
        p = f"model.layers.{i}"
        attention = {"q_proj": (h, h), "k_proj": (kv, h), "v_proj": (kv, h), "o_proj": (h, h)}
        shapes |= {f"{p}.self_attn.{n}.weight": s for n, s in attention.items()}
        shapes |= {f"{p}.mlp.gate_proj.weight": (f, h), f"{p}.mlp.up_proj.weight": (f, h), f"{p}.mlp.down_proj.weight": (h, f)}
        shapes |= {f"{p}.input_layernorm.weight": (h,), f"{p}.post_attention_layernorm.weight": (h,)}
    generator = torch.Generator().manual_seed(0)

    def value(name: str) -> torch.Tensor:
        shape = shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        return (torch.randn(shape, generator=generator) * shape[1] ** -0.5).to(torch.bfloat16)

    shards: list[list[str]] = [[]]
    room = total = 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        total, room = total + size, room + size
        if room > 2_000_000_000 and shards[-1]:
            shards, room = [*shards, []], size
        shards[-1].append(name)
    index: dict[str, str] = {}
    for i, names in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        meta = {n: torch.empty(shapes[n], dtype=torch.bfloat16, device="meta") for n in names}
        write_safetensors(folder / file, meta, {"format": "pt"}, value)
        index |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps(cell.config(), indent=1))
    if cell.samples:
        from qzoo.source import TEXT

        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(TEXT / file, folder / file)
    return total


def _status(pid: int) -> tuple[float, float] | None:
    """Resident and anonymous memory, in GiB."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    found = [re.search(rf"{key}:\s+(\d+)", text) for key in ("VmRSS", "RssAnon")]
    return None if None in found else tuple(int(m[1]) / 2**20 for m in found if m)  # type: ignore[return-value]


def measure(cell: Cell, scratch: Path) -> dict[str, Any]:
    """Quantize the cell's model, and watch the process."""
    source, out = scratch / "model", scratch / "out"
    source.mkdir()
    weights = generate(cell, source)
    shared = [str(source), "-r", cell.recipe, "--json", "--set", "rules.0.granularity.size=128"]
    if cell.samples:
        from qzoo.source import TEXT

        shared += ["--calib", str(TEXT / "calib.txt"), "--eval", str(TEXT / "eval.txt"), "--set", f"calibration.samples={cell.samples}"]
        shared += ["--set", "calibration.starts=0"]

    def planned(*more: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "qcore", "plan", *shared, *more]
        return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    budget = f"{planned('--stream')['memory']['smallest_bytes']}B" if cell.max_ram == "smallest" else cell.max_ram
    shared += ["--max-ram", budget]
    plan = planned()
    command = [sys.executable, "-m", "qcore", "quantize", *shared, "-o", str(out), "--eval-tokens", "512"]
    started, samples = time.monotonic(), []
    with open(scratch / "report.json", "w") as said, open(scratch / "errors.txt", "w") as errors:
        process = subprocess.Popen(command, stdout=said, stderr=errors)
        while process.poll() is None:
            if (now := _status(process.pid)) is not None:
                samples.append([round(time.monotonic() - started, 1), *(round(v, 3) for v in now)])
            time.sleep(0.5)
    if process.returncode:
        raise SystemExit(f"{cell.name} failed:\n{(scratch / 'errors.txt').read_text()[-3000:]}")
    report = json.loads((scratch / "report.json").read_text())
    every = max(1, len(samples) // 400)
    return {
        "cell": asdict(cell),
        "command": "qcore " + " ".join(command[3:]).replace(str(scratch), ".").replace(str(ROOT), "."),
        "weights_bytes": weights,
        "estimate": plan["memory"],
        "memory": report["memory"],
        "seconds": report["seconds"],
        "proof": report["proof"]["level"],
        "kl": report["quality"]["scores"]["kl"] if report["quality"] else None,
        "over_time": samples[::every],
    }


def picture() -> None:
    """docs/evidence/memory.svg: resident memory over time, as a share of the budget."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "qcore"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4))
    for file in sorted(CELLS.glob("*.json")):
        data = json.loads(file.read_text())
        limit = data["estimate"]["limit_bytes"] / 2**30
        end = data["over_time"][-1][0]
        label = f"{file.stem}: {data['weights_bytes'] / 1e9:.1f} GB of weights, budget {limit:.2f} GiB, {end:.0f} s"
        axes.plot([s[0] / end for s in data["over_time"]], [s[1] / limit for s in data["over_time"]], label=label)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xlabel("share of the run")
    axes.set_ylabel("resident memory / budget")
    axes.set_ylim(0, 1.1)
    axes.legend(fontsize=7)
    figure.savefig(ROOT / "docs" / "evidence" / "memory.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="cells whose name contains this")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--scratch", type=Path, help="a folder with 12 GB free")
    options = parser.parse_args()
    cells = [c for c in MATRIX if not (CELLS / f"{c.name}.json").exists() and (options.only or "") in c.name]
    if options.list:
        print("\n".join(c.name for c in cells))
        return
    CELLS.mkdir(parents=True, exist_ok=True)
    for cell in cells:
        with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
            data = measure(cell, Path(scratch))
        (CELLS / f"{cell.name}.json").write_text(json.dumps(data, indent=1) + "\n")
        print(f"{cell.name}: peak {data['memory']['peak_bytes'] / 2**30:.2f} GiB of {data['estimate']['limit_bytes'] / 2**30:.2f}", flush=True)
    if any(CELLS.glob("*.json")):
        picture()


if __name__ == "__main__":
    main()
