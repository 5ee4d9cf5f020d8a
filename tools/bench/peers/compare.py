"""qcore beside other toolkits: the same weights, calibration tokens, evaluation text and scores, one JSON cell a run (docs/evidence/cells/peers/).

    python tools/bench/peers/compare.py --envs FOLDER            compute the cells that are missing, then docs/evidence/peers.md
    python tools/bench/peers/compare.py --list                   say which are missing, and compute nothing
    python tools/bench/peers/compare.py --only w4-hqq            only cells whose name contains the word
    python tools/bench/peers/compare.py --table                  write the page from the cells that are there

FOLDER holds the environments, each made by `make_env.sh NAME FOLDER/NAME`.  zoo:smollm2-135m is written once as a float32 folder of transformers, and
the tokens of `tools/bench/evidence.py` beside it.  Every run is a process of its own in its toolkit's environment (run_peer.py); it hands back
dequantized float32 weights, which this process scores with the repository's evaluator.  Widths in turn, and in each the methods in turn: what
disturbs the machine for an hour disturbs all methods alike.  Seconds and memory are of the quantization call alone; OMP_NUM_THREADS is passed on.

A cell is keyed by what made it: the method's function in run_peer.py and what it shares with the others, the pins of its environment (for qcore the
code that was loaded), the scores' code, options, calibration and evaluation tokens.  A toolkit that fails leaves a cell with its error.

One core: 64 calibration windows cost gptqmodel and llm-compressor's GPTQ 6 to 7 minutes, AutoRound's opt-RTN and qcore's GPTQ 2.5, learned rounding
(AutoRound with iterations, qcore's SignRound) 17 to 22; the rest, and each score, under a minute.  Methods that come close to none of the others have
16 windows at 3 and 2 bits; the page says so.

Settings of qcore's recipes were compared on windows of the evaluation text.  So the methods whose order might hang on that (`CONFIRMED`) are scored
on windows that nothing was chosen on as well, window by window.
"""

import argparse
import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))  # evidence.py and news.py; run_peer.py's neighbours are there already

import peers_page  # noqa: E402
from evidence import CACHE, CELLS, ROOT, code_hash  # noqa: E402

MODEL = "smollm2-135m"
GROUP, WINDOW, EVALUATION = 64, 512, 24
UNSEEN = 48  # the last windows of the evaluation text
WORK = CACHE / "peers"
OWN = "qcore"  # the environment that is the repository's own
THREE = "autoround-hqq-torchao"


@dataclass(frozen=True)
class Method:
    """environment: a requirements-NAME.txt, or qcore; windows: calibration windows at 4, 3 and 2 bits; () where a width is left out"""

    peer: str
    environment: str
    words: str
    windows: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] = ((64,), (64,), (64,))
    opts: tuple[str, ...] = ()


# in the order in which they run at each width
METHODS = {
    "float": Method("float", OWN, "the float32 weights that all are given: a check of the harness", ((0,), (), ())),
    "qcore-gptq": Method("qcore-gptq", OWN, "qcore, recipe `w4a16-gptq`"),
    "qcore-gptq-16": Method("qcore-gptq", OWN, "qcore, recipe `w4a16-gptq`", ((16,), (16,), (16,))),
    "qcore-signround": Method("qcore-signround", OWN, "qcore, recipe `w4a16-signround`"),
    "hqq": Method("hqq", THREE, "HQQ (asymmetric, 16-bit zero points; no data)"),
    "torchao": Method("torchao", THREE, "torchao intx (no data)"),
    "torchao-hqq": Method("torchao-hqq", THREE, "torchao intx with HQQ's scales (no data)"),
    "autoround-rtn": Method("autoround-rtn", THREE, "AutoRound, RTN (no data)"),
    "llmc-rtn": Method("llmc-rtn", "llm-compressor", "llm-compressor, RTN (no data)"),
    "autoround-optrtn-16": Method("autoround-optrtn", THREE, "AutoRound, opt-RTN", ((16,), (16,), (16,))),
    "autoround-optrtn": Method("autoround-optrtn", THREE, "AutoRound, opt-RTN", ((64,), (), ())),
    "llmc-gptq": Method("llmc-gptq", "llm-compressor", "llm-compressor, GPTQ", ((64,), (16,), (16,))),
    "gptqmodel": Method("gptqmodel", "gptqmodel", "gptqmodel, GPTQ", ((64,), (16,), (16,))),
    "autoround-50": Method("autoround", THREE, "AutoRound, 50 iterations", opts=("iters=50",)),
}
CONFIRMED = ("qcore-gptq", "qcore-signround", "autoround-50")
EXTRA = {"gptqmodel": {"GPTQMODEL_CPU_WORKERS": "2"}}  # it refuses to start on one or two cores without


@dataclass(frozen=True)
class Cell:
    """One run.  windows × 512 tokens of calibration"""

    method: str
    peer: str
    bits: int
    windows: int
    opts: tuple[str, ...]
    group: int = GROUP

    @property
    def name(self) -> str:
        return f"w{self.bits}-{self.method}"

    @property
    def file(self) -> Path:
        return CELLS / "peers" / f"{self.name}.json"


def matrix() -> list[Cell]:
    """Interleaved: all methods at 4 bits, then at 3, then at 2."""
    return [Cell(label, m.peer, bits, n, m.opts) for i, bits in enumerate((4, 3, 2)) for label, m in METHODS.items() for n in m.windows[i]]


def function_of(peer: str) -> str:
    """run_peer.py without the functions of other peers, comments and layout."""
    tree = ast.parse((HERE / "run_peer.py").read_text(encoding="utf-8"))

    def others(node: ast.stmt) -> bool:
        names = [
            arg.value
            for d in getattr(node, "decorator_list", [])
            if isinstance(d, ast.Call) and getattr(d.func, "id", "") == "peer"
            for arg in d.args
            if isinstance(arg, ast.Constant)
        ]
        return bool(names) and peer not in names

    tree.body = [node for node in tree.body if not others(node)]
    return ast.unparse(tree)


def own_code(cell: Cell, files: list[str]) -> str:
    """A hash of what decides a cell's numbers.  files: qcore's code that the run had loaded"""
    h = hashlib.sha256(function_of(cell.peer).encode())
    environment = METHODS[cell.method].environment
    parts = [HERE / "common.py", ROOT / "packages/qcore/src/qcore/evaluation/metrics.py"]
    parts += [HERE / f"requirements-{environment}.txt"] if environment != OWN else []
    for file in parts:
        h.update(file.read_bytes())
    return h.hexdigest()[:12] + (":" + code_hash(files) if files else "")


def fresh(cell: Cell, kept: dict[str, Any]) -> bool:
    if cell.method in CONFIRMED and "unseen" not in kept:
        return False
    return kept["code"] == own_code(cell, kept.get("files", [])) and kept["cell"] == json.loads(json.dumps(asdict(cell)))


def missing(cells: list[Cell]) -> list[Cell]:
    """Those that nothing was measured for, or by other code.  (That the tokens are the same is looked at when the data is there.)"""
    return [c for c in cells if not c.file.exists() or not fresh(c, json.loads(c.file.read_text()))]


def prepare() -> dict[str, Any]:
    """The float folder and the tokens, written once; the reference of the evaluation, as evidence.py keeps it."""
    import news
    import torch
    from qcore.calibration.text import cut, encode
    from qcore.evaluation import LanguageModeling
    from qcore.evaluation.store import Reference
    from qcore.model import adapter_for, load_source
    from qcore.pipeline import float_forward
    from qcore.plugins import load_registry
    from safetensors.torch import load_file, save_file

    registry = load_registry()
    loaded = load_source(f"zoo:{MODEL}", registry.sources)
    calib, evaluation = news.write(CACHE / "news")
    ids = cut(encode(loaded.tokenizer, calib.read_text(), str(calib)), WINDOW)[:64].contiguous()
    windows = cut(encode(loaded.tokenizer, evaluation.read_text(), str(evaluation)), WINDOW)
    assert len(windows) > EVALUATION + UNSEEN, "the window between keeps a document from lying in both"
    tasks = {"task": LanguageModeling(windows[:EVALUATION], batch=4), "unseen": LanguageModeling(windows[-UNSEEN:], batch=4)}
    places = {name: CACHE / f"reference-{MODEL}-{task.data()[:12]}" for name, task in tasks.items()}
    folder, tokens = WORK / "float32", WORK / "calibration.safetensors"
    if not (folder / "config.json").exists() or not all((place / "reference.json").exists() for place in places.values()):
        adapter = adapter_for(loaded.model, registry.adapters)
        forward = float_forward(loaded, adapter)
        for name, place in places.items():
            if not (place / "reference.json").exists():
                tasks[name].reference(forward, place)
        part = folder.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        loaded.write_companions(part)
        state = {k: v.detach().float().contiguous().clone() for k, v in loaded.model.state_dict().items()}
        if loaded.model.config.tie_word_embeddings:
            state.pop("lm_head.weight", None)
        save_file(state, str(part / "model.safetensors"), metadata={"format": "pt"})
        config = json.loads((part / "config.json").read_text()) | {"dtype": "float32"}
        (part / "config.json").write_text(json.dumps(config, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    WORK.mkdir(parents=True, exist_ok=True)
    if not tokens.exists() or not torch.equal(load_file(str(tokens))["ids"], ids):
        save_file({"ids": ids}, str(tokens))
    references = {f"{name} reference": Reference.open(place) for name, place in places.items()}
    return {"registry": registry, "folder": folder, "tokens": tokens, "ids": ids, **tasks, **references}


def forward_of(data: dict[str, Any], folder: Path) -> Any:
    """The model in a folder of float32 weights: batch → logits."""
    from qcore.model import adapter_for, load_source
    from qcore.pipeline import float_forward

    loaded = load_source(str(folder), data["registry"].sources)
    return float_forward(loaded, adapter_for(loaded.model, data["registry"].adapters))


def unseen_scores(data: dict[str, Any], forward: Any) -> dict[str, Any]:
    """KL to float of each window that nothing was chosen on, and the scores over all of them."""
    import torch
    from qcore.evaluation.metrics import Distance, perplexity

    distance, reference, rows = Distance(), data["unseen reference"], WINDOW - 1
    with torch.no_grad():
        for i, ids in enumerate(data["unseen"].windows):
            distance.add(reference.read(i * rows, (i + 1) * rows), forward({"input_ids": ids[None]})[0, :-1], ids[1:])
    return {
        "tokens": data["unseen"].data()[:16],
        "kl": distance.kl.mean,
        "kl_windows": distance.kl.windows,
        "perplexity": perplexity(distance.nll.mean),
        "perplexity_reference": perplexity(distance.nll_reference.mean),
        "top1": distance.top1.mean,
    }


def measure(cell: Cell, data: dict[str, Any], python: Path, threads: int) -> dict[str, Any]:
    """One toolkit's run in its environment, and the scores of what it handed back."""
    import common

    made: dict[str, Any] = {"tokens": data["task"].data()[:16], "calib_ids": common.ids_sha(data["ids"][: cell.windows])}
    if cell.peer == "float":
        return made | {
            "run": {"ok": True, "eff_bits": 32.0},
            "scores": data["task"].evaluate(forward_of(data, data["folder"]), data["task reference"]),
        }
    with tempfile.TemporaryDirectory(dir=WORK) as place:
        out, line = Path(place) / "out", Path(place) / "result.jsonl"
        command = [str(python), str(HERE / "run_peer.py"), cell.peer, "--model", str(data["folder"]), "--calib", str(data["tokens"])]
        command += ["--calib-windows", str(cell.windows), "--window", str(WINDOW), "--bits", str(cell.bits), "--group", str(cell.group)]
        command += ["--out", str(out), "--results", str(line), "--tag", cell.name, "--threads", str(threads)]
        command += [f"--opt={o}" for o in cell.opts]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)} | EXTRA.get(METHODS[cell.method].environment, {})
        if METHODS[cell.method].environment != OWN:
            environment.pop("PYTHONPATH", None)
        ended = subprocess.run(command, env=environment, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if not line.exists():
            raise RuntimeError(f"{cell.name} ended with {ended.returncode} and said nothing:\n{ended.stdout[-1500:]}")
        run = json.loads(line.read_text().splitlines()[-1])
        made |= {"files": run.pop("files", []), "run": run}
        if run["ok"]:
            assert run["calib_ids"] == made["calib_ids"], (run["calib_ids"], made["calib_ids"])
            forward = forward_of(data, out)
            made["scores"] = data["task"].evaluate(forward, data["task reference"])
            if cell.method in CONFIRMED:
                made["unseen"] = unseen_scores(data, forward)
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="say which cells are missing")
    parser.add_argument("--table", action="store_true", help="write the page from the cells that are there")
    parser.add_argument("--only", action="append", default=[], help="only cells whose name contains this; may be given again")
    parser.add_argument("--envs", type=Path, default=ROOT / ".qcore-cache" / "peers", help="folder of the environments")
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "1")))
    a = parser.parse_args()
    cells = matrix()
    todo = [] if a.table else [c for c in missing(cells) if not a.only or any(word in c.name for word in a.only)]
    print(f"{len(todo)} of {len(cells)} cells are missing", file=sys.stderr)
    if a.list:
        print("\n".join(c.name for c in todo))
        return 0
    data = prepare() if todo else {}
    left = 0
    for cell in todo:
        started = time.perf_counter()
        name = METHODS[cell.method].environment
        python = Path(sys.executable) if name == OWN else a.envs / name / "bin" / "python"
        if not python.exists():
            print(f"{cell.name}: no environment {a.envs / name}; make_env.sh {name} {a.envs / name}", file=sys.stderr)
            left += 1
            continue
        result = {"cell": asdict(cell), **measure(cell, data, python, a.threads)}
        result["code"] = own_code(cell, result.get("files", []))
        cell.file.parent.mkdir(parents=True, exist_ok=True)
        part = cell.file.with_suffix(".part")
        part.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
        part.replace(cell.file)
        s, run = result.get("scores"), result["run"]
        said = f"KL {s['kl']:.4f} ppl {s['perplexity']:.2f}, {run.get('seconds', 0)} s" if s else f"failed: {run['error'][:200]}"
        print(f"{cell.name}: {said} ({time.perf_counter() - started:.0f} s)", file=sys.stderr, flush=True)
    peers_page.write(cells, METHODS, fresh)
    return 1 if left else 0


if __name__ == "__main__":
    raise SystemExit(main())
