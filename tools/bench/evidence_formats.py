"""The evidence for formats of accelerators: BFP, BBFP, GSE and the unit of tables, in docs/evidence/formats.json and docs/evidence/formats.md.

    python tools/bench/evidence_formats.py                 compute what is missing, then the page
    python tools/bench/evidence_formats.py --list          say which cells are missing, and compute nothing
    python tools/bench/evidence_formats.py --table         write the page from what is there
    python tools/bench/evidence_formats.py --only bbfp     only cells of language models whose name contains this

Two kinds of figures.  Squared errors of numbers drawn from four distributions, the sweep of the shared exponent, the choice of the overlap and the
errors of the tables are one file, keyed by the code of qplug-hardware; about a minute on one core.  What the recipes do to tiny-llama is a cell each,
10 to 60 s.  All seeds are written beside what they made; rounding to nearest draws nothing, so a cell has one.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import evidence
from evidence import CACHE, ROOT, code_hash, missing

# what decides the numbers; registration and the simulator of NVR do not
_OWN = ("block_float.py", "integer_dot.py", "overlap.py", "stream.py", "tables.py", "recipes")
evidence.ROOMS += [f"packages/qplug-hardware/src/qplug_hardware/{name}" for name in _OWN]

PAGE = ROOT / "docs" / "evidence" / "formats.md"
FILE = ROOT / "docs" / "evidence" / "formats.json"
SEEDS = 5
ROWS, COLUMNS = 512, 1024
PAIRS = ((3, 1), (4, 2), (4, 3), (6, 3), (6, 4), (6, 5))
# a specification's throw-away measurement: block 32, ties to even; not the paper's
_NAMES = ("BFP(4)", "BFP(6)", "BBFP(3,1)", "BBFP(4,2)", "BBFP(4,3)", "BBFP(6,3)", "BBFP(6,4)", "BBFP(6,5)")
_FIGURES = {
    "normal": (4.4e-3, 2.7e-4, 6.9e-3, 1.7e-3, 1.4e-3, 1.7e-4, 1.1e-4, 8.4e-5),
    "laplace": (6.4e-3, 4.0e-4, 6.6e-3, 1.6e-3, 1.9e-3, 1.7e-4, 9.8e-5, 1.2e-4),
    "student-t3": (9.4e-3, 6.4e-4, 6.8e-3, 1.7e-3, 2.9e-3, 1.6e-4, 1.0e-4, 1.8e-4),
    "outliers": (1.4e-2, 1.1e-3, 8.1e-3, 2.0e-3, 4.9e-3, 9.1e-5, 1.2e-4, 3.1e-4),
}
PUBLISHED = {kind: dict(zip(_NAMES, own, strict=True)) for kind, own in _FIGURES.items()}
PUBLISHED_SWEEP = {"BBFP(4,2)": (1.4e-2, 6.6e-3, 2.0e-3, 9.9e-2, 3.8e-1), "BBFP(6,3)": (1.1e-3, 8.8e-4, 2.7e-4, 9.1e-5, 8.3e-2, 3.6e-1)}

_INT = (
    'rules.0.format={{name="int",bits={b}}}',
    'rules.1={{sites="*:input",format={{name="int",bits={b}}},granularity={{name="group",size=64}},when="dynamic"}}',
)
_TOKEN = (_INT[0], 'rules.1.format={{name="int",bits={b}}}')
_MSE = ('solver.clip="mse"',)
_GPTQ = ('solver={name="gptq"}', "calibration.starts=512")
# label → (recipe, overrides, what it is)
MODELS: dict[str, tuple[str, tuple[str, ...], str]] = {
    **{
        f"int{b}-{kind}": ("rtn-w4a4", tuple(o.format(b=b) for o in own), f"integers of {b} bits, weights in groups of 64, inputs {words}")
        for b in (5, 6, 8)
        for kind, own, words in (("token", _TOKEN, "per token with a zero point"), ("group", _INT, "in groups of 64"))
    },
    "bfp4": ("bfp4-w5a5", (), "BFP(4), GSE-INT5"),
    "bbfp3": ("bbfp3-w5a5", (), "BBFP(3,1)"),
    "bfp5": ("bfp5-w6a6", (), "BFP(5), GSE-INT6"),
    "bbfp4": ("bbfp4-w6a6", (), "BBFP(4,2)"),
    "bbfp4-3": ("bbfp4-w6a6", ("rules.0.format.overlap=3", "rules.1.format.overlap=3"), "BBFP(4,3)"),
    "bbfp4-clip": ("bbfp4-w6a6", ('rules.0.format.corner="clip"', 'rules.1.format.corner="clip"'), "BBFP(4,2), the corner clipped"),
    "bbfp4-weights": ("bbfp4-w6a6", ('rules.1={sites="*:input",float=true}',), "BBFP(4,2), weights alone"),
    "bfp5-weights": ("bfp5-w6a6", ('rules.1={sites="*:input",float=true}',), "BFP(5), weights alone"),
    "bbfp4-mse": ("bbfp4-w6a6", _MSE, "BBFP(4,2), weights' exponents searched"),
    "bfp5-mse": ("bfp5-w6a6", _MSE, "BFP(5), weights' exponents searched"),
    "bbfp4-gptq": ("bbfp4-w6a6", _GPTQ, "BBFP(4,2), weights by GPTQ"),
    "bfp5-gptq": ("bfp5-w6a6", _GPTQ, "BFP(5), weights by GPTQ"),
    "bfp7": ("bfp7-w8a8", (), "BFP(7), GSE-INT8"),
    "bbfp6": ("bbfp6-w8a8", (), "BBFP(6,3)"),
    "bbfp6-4": ("bbfp6-w8a8", ("rules.0.format.overlap=4", "rules.1.format.overlap=4"), "BBFP(6,4)"),
    "bbfp6-5": ("bbfp6-w8a8", ("rules.0.format.overlap=5", "rules.1.format.overlap=5"), "BBFP(6,5)"),
    "mxfp4": ("mxfp4", (), "MXFP4"),
    "nvfp4": ("nvfp4", (), "NVFP4"),
}
# label → (element, t, what it is)
UNITS = {f"unit-{name}-t{t}": (name, t) for name in ("bbfp", "bfp") for t in (7, 8, 10)}

# what the tables show, to be read again whenever the figures were computed anew
FINDINGS = [
    "- The flag of BBFP(m, o) costs a bit, for which BFP(m + 1) would halve all of its steps. At 6.16 bits BFP(5) has 1.5 times less squared error",
    "  than BBFP(4,2) on normal numbers, and as much on Laplace's; BBFP has 1.5 times less on Student's t, and 2.2 times less with outliers.",
    "- On tiny-llama, weights and inputs, BFP has the smaller KL divergence at 5.16, 6.16 (by about two standard errors) and 8.16 bits, where",
    "  BBFP(6,4) comes within the noise; with weights alone it is a third smaller, and with weights by GPTQ both are level. So BBFP's gain over BFP",
    "  of as many *mantissa* bits is real, and no gain at equal size on this model. The paper compares by mantissa bits and by area, on models with",
    "  large outliers; none was there to try.",
    "- Integers of 6 bits in groups of 64 with float scales (6.25 bits) have a smaller KL divergence than both where inputs have groups too, and a",
    "  larger one where inputs have one scale for each token, as such recipes usually have.",
    "- The shared exponent m - o below the largest is the best one; one further down costs 50 to 900 times the error, for the largest saturate.",
    "  Promoting what rounds past the low window has never more error than clipping it; in KL divergence that is a hundredth, within the noise.",
    "- The squared errors agree within 5 % with those that an independent program had measured.",
    "- A segmented table has 4 to 15 times less mean error than an even one of the bytes on chip. Its largest error is larger than that of the even",
    "  table where halves are signs, and smaller where they are windows, which need half the bytes. An even table of the size of *all* sub-tables",
    "  has less error than either, but for the reciprocal.",
    "- With every softmax and SiLU of tiny-llama out of tables the perplexity changes by less than 0.015 % either way, which is noise; KL divergence",
    "  falls with the bits of the index, and BFP(10) has 1.7 to 3 times that of BBFP(10,5).",
]


@dataclass(frozen=True)
class Cell(evidence.Cell):
    """recipe: of `MODELS`, or "unit": float weights, softmax and SiLU out of tables"""

    length: int = 256
    windows: int = 16
    window: int = 256
    text: str = "own"

    @property
    def file(self) -> Path:
        return evidence.CELLS / "formats" / f"{self.name}.json"


def matrix() -> list[Cell]:
    """The float model needs no cell: it is what all are compared with."""
    cells = [Cell("tiny-llama", label, recipe, own) for label, (recipe, own, _) in MODELS.items()]
    cells += [Cell("tiny-llama", label, "unit") for label in UNITS]
    return sorted(cells, key=lambda c: c.label.endswith(("mse", "gptq")))  # the slow ones last


# numbers ------------------------------------------------------------------------------------------------------------------------------------


def drawn(kind: str, seed: int) -> Any:
    """[512, 1024] numbers of one distribution; float32."""
    import torch

    g = torch.Generator().manual_seed(seed)
    shape = (ROWS, COLUMNS)
    normal = torch.randn(shape, generator=g)
    if kind == "normal":
        return normal
    if kind == "laplace":
        u = torch.rand(shape, generator=g, dtype=torch.float64) - 0.5
        return (-u.sign() * torch.log1p(-2 * u.abs())).float()
    if kind == "student-t3":
        return normal / torch.randn((*shape, 3), generator=g).square().mean(-1).sqrt()
    return normal * torch.where(torch.rand(shape, generator=g) < 0.01, 20.0, 1.0)


def nmse(x: Any, y: Any) -> float:
    return float((y.double() - x.double()).square().sum() / x.double().square().sum())


def at_exponent(x: Any, mantissa: int, overlap: int, below: int) -> Any:
    """`x` in BBFP with a shared exponent `below` the largest one, whatever the format would take."""
    import torch
    from qcore.numbers import quantize
    from qplug_hardware.block_float import SharedExponent, bbfp

    top = x.unflatten(-1, (-1, 32)).abs().amax(-1)
    shared = torch.ldexp(torch.ones_like(top), torch.frexp(top)[1] - 1 - below)
    return quantize(x, bbfp(mantissa, overlap), {"scale.codes": SharedExponent().encode(shared)}).dequantize()


def numbers() -> dict[str, Any]:
    """Everything that needs no model."""
    from qcore.numbers import Int, fake_quantize, mx
    from qplug_hardware.block_float import bbfp, bfp, gse
    from qplug_hardware.overlap import choose_overlap

    specs: dict[str, Any] = {f"BFP({m})": bfp(m) for m in (4, 5, 6, 7)}
    specs |= {f"BBFP({m},{o})": bbfp(m, o) for m, o in PAIRS}
    specs |= {"MXINT8": mx(Int(8)), "GSE-INT6, truncated": gse(6, rounding="truncate")}
    errors: dict[str, dict[str, list[float]]] = {}
    sweep: dict[str, list[list[float]]] = {name: [] for name in PUBLISHED_SWEEP}
    chosen: dict[str, Any] = {}
    for kind in PUBLISHED:
        errors[kind] = {name: [] for name in specs}
        for seed in range(SEEDS):
            x = drawn(kind, seed)
            for name, spec in specs.items():
                errors[kind][name].append(nmse(x, fake_quantize(x, spec)))
            if kind == "outliers":
                for (name, published), (m, o) in zip(PUBLISHED_SWEEP.items(), ((4, 2), (6, 3)), strict=True):
                    sweep[name].append([nmse(x, at_exponent(x, m, o, d)) for d in range(len(published))])
        x = drawn(kind, 0)
        for m in (4, 6):
            loss: Callable[[int], float] = lambda o, x=x, m=m: nmse(x, fake_quantize(x, bbfp(m, o)))  # type: ignore[misc]  # noqa: E731
            best, rows = choose_overlap(m, loss)
            chosen[f"{kind}, m = {m}"] = {"chosen": best, "quality alone": choose_overlap(m, loss, weight=1.0)[0], "rows": [asdict(r) for r in rows]}
    return {"errors": errors, "sweep": sweep, "overlap": chosen, "costs": _costs(), "tables": _tables()}


def _costs() -> dict[str, Any]:
    from qplug_hardware.block_float import BBFP, BFP
    from qplug_hardware.overlap import proxy_cost

    formats = {"BFP(4)": BFP(4), "BFP(5)": BFP(5), "BFP(6)": BFP(6), **{f"BBFP({m},{o})": BBFP(m, o) for m, o in PAIRS}}
    return {name: asdict(proxy_cost(f)) | {"logic": proxy_cost(f).logic} for name, f in formats.items()}


def _tables() -> list[dict[str, Any]]:
    """Errors against float64 on blocks whose largest lie between 2^-4 and 2^4, beside even tables of the size on chip and of the size of all."""
    import torch
    from qplug_hardware.block_float import BBFP, BFP
    from qplug_hardware.tables import FUNCTIONS, ExponentTable, UniformTable, gelu, silu, softmax

    g = torch.Generator().manual_seed(0)
    x = torch.randn(512, 256, generator=g) * (2.0 ** torch.randint(-4, 4, (512, 8), generator=g)).repeat_interleave(32, 1)

    def off(y: Any, wanted: Any) -> dict[str, float]:
        e = (y.double() - wanted).abs()
        return {"largest": float(e.max()), "mean": float(e.mean())}

    rows = []
    for name, f in FUNCTIONS.items():
        own = {"negative": -x.abs(), "positive": x.abs().clamp(min=0.05), "any": x}[f.domain]
        low, high = float(own.min()), float(own.max())
        for t in (7, 8):
            for half in ("sign", "window") if not f.normalize else ("sign",):
                table = ExponentTable(name, index=t, half=half)  # type: ignore[arg-type]
                chip = table.bytes_on_chip(own)
                wanted = f.of(own.double())
                even = {w: off(UniformTable(name, low, high, size // 2)(own), wanted) for w, size in (("chip", chip), ("all", table.total_bytes))}
                sizes = {"bytes_on_chip": chip, "bytes": table.total_bytes}
                rows.append({"function": name, "element": "BBFP(10,5)", "t": t, "half": half, **off(table(own), wanted), **sizes, "even": even})
    for label, element in (("BBFP(10,5)", BBFP(10, 5)), ("BFP(10)", BFP(10))):
        for t in (7, 8, 10):
            for name, ours, function, exact in (
                ("SiLU", silu, "sigmoid", torch.nn.functional.silu(x.double())),
                ("GELU", gelu, "normal-cdf", torch.nn.functional.gelu(x.double())),
                ("softmax", softmax, "exp", x.double().softmax(-1)),
            ):
                rows.append({"function": name, "element": label, "t": t, "half": "sign", **off(ours(x, ExponentTable(function, element, t)), exact)})
    return rows


# models -------------------------------------------------------------------------------------------------------------------------------------


def measure(cell: Cell) -> dict[str, Any]:
    """Scores of the quantized model, saved and loaded again; or of the float one with its non-linear functions out of tables."""
    return evidence.measure(cell) if cell.recipe != "unit" else measure_unit(cell)


def measure_unit(cell: Cell) -> dict[str, Any]:
    import torch
    from qcore.calibration.text import cut, encode
    from qcore.evaluation import LanguageModeling
    from qcore.model import adapter_for, load_source
    from qcore.pipeline import float_forward
    from qcore.plugins import load_registry
    from qplug_hardware.block_float import BBFP, BFP
    from qplug_hardware.tables import ExponentTable, silu, softmax
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask
    from transformers.models.llama.modeling_llama import repeat_kv

    name, t = UNITS[cell.label]
    element = BBFP(10, 5) if name == "bbfp" else BFP(10)
    registry = load_registry()
    loaded = load_source(f"zoo:{cell.model}", registry.sources)
    adapter = adapter_for(loaded.model, registry.adapters)
    assert loaded.evaluation is not None
    text = encode(loaded.tokenizer, loaded.evaluation.read_text(), str(loaded.evaluation))
    task = LanguageModeling(cut(text, cell.window)[: cell.windows], batch=4)
    exp, gate = ExponentTable("exp", element, t), ExponentTable("sigmoid", element, t)

    class Gate(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return silu(x, gate).to(x.dtype)

    def attention(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, dropout: float = 0.0, **_: Any) -> tuple[Any, None]:
        k, v = repeat_kv(k, module.num_key_value_groups), repeat_kv(v, module.num_key_value_groups)
        scores = (q @ k.transpose(2, 3) * scaling).float() + (0 if mask is None else mask.float())
        return (softmax(scores, exp).to(v.dtype) @ v).transpose(1, 2).contiguous(), None

    AttentionInterface.register("tables", attention)
    AttentionMaskInterface.register("tables", eager_mask)
    forward, model = float_forward(loaded, adapter), loaded.model
    reference = task.reference(forward, CACHE / f"reference-{cell.model}-{task.data()[:12]}")
    replaced = [m for m in model.modules() if hasattr(m, "act_fn")]
    assert replaced, "no gated block was found in the model"
    for m in replaced:
        m.act_fn = Gate()
    model.set_attn_implementation("tables")  # type: ignore[operator]
    started = time.perf_counter()
    scores = task.evaluate(forward, reference)
    files = evidence.code_files("none")
    return {"scores": scores, "seconds": round(time.perf_counter() - started, 1), "files": files, "code": code_hash(files)}


# page ---------------------------------------------------------------------------------------------------------------------------------------


def page(kept: dict[str, Any] | None, cells: Sequence[Cell]) -> str:
    """The page, from what is there."""
    lines = [
        "# Formats of accelerators: BFP, BBFP, GSE and a unit of tables",
        "",
        "`python tools/bench/evidence_formats.py` made this page; the figures lie in [formats.json](formats.json), those of models in",
        "`cells/formats/`. The formats: [qplug-hardware](../../packages/qplug-hardware/README.md).",
        "",
        *FINDINGS,
    ]
    if kept is not None:
        lines += _error_tables(kept["errors"], kept["sweep"])
        lines += _cost_tables(kept["costs"], kept["overlap"])
    lines += _model_tables(cells)
    if kept is not None:
        lines += _unit_tables(kept["tables"])
    return "\n".join(lines) + "\n"


def _error_tables(errors: dict[str, dict[str, list[float]]], sweep: dict[str, list[list[float]]]) -> list[str]:
    bits = {"BFP(4)": 5.16, "BFP(5)": 6.16, "BFP(6)": 7.16, "BFP(7)": 8.16, "MXINT8": 8.25, "GSE-INT6, truncated": 6.16}
    bits |= {f"BBFP({m},{o})": m + 2.16 for m, o in PAIRS}
    lines = [
        "",
        "## Squared error of drawn numbers",
        "",
        f"Σ(x̂ - x)² / Σx² of {ROWS} × {COLUMNS} numbers, blocks of 32, means over seeds 0 … {SEEDS - 1}; the largest spread over seeds is "
        f"{100 * max(stdev(v) / mean(v) for own in errors.values() for v in own.values()):.1f} %.",
        "In brackets what an independent throw-away program had measured before this code was written; they are not the paper's.",
        "Outliers: one value in a hundred is twenty times as large. Compare rows of equal bits.",
        "",
        f"| format | bits a value | {' | '.join(PUBLISHED)} |",
        "|---|---|" + "---|" * len(PUBLISHED),
    ]
    for name in sorted(errors["normal"], key=lambda n: (bits[n], n)):
        cells = [_measured(mean(errors[kind][name]), PUBLISHED[kind].get(name)) for kind in PUBLISHED]
        lines.append(f"| {name} | {bits[name]:.2f} | {' | '.join(cells)} |")
    lines += [
        "",
        "Numbers with outliers, under a shared exponent that lies δ below the block's largest; the format takes δ = m - o, and any other is worse:",
        "",
        "| format | " + " | ".join(f"δ = {d}" for d in range(6)) + " |",
        "|---|" + "---|" * 6,
    ]
    for name, runs in sweep.items():
        own = [_measured(mean(r[d] for r in runs), PUBLISHED_SWEEP[name][d]) for d in range(len(runs[0]))]
        best = min(range(len(own)), key=lambda d: mean(r[d] for r in runs))
        own[best] = f"**{own[best]}**"
        lines.append(f"| {name} | {' | '.join(own + ['–'] * (6 - len(own)))} |")
    return lines


def _measured(value: float, published: float | None) -> str:
    return f"{value:.2g}" + ("" if published is None else f" ({published:.2g})")


def _cost_tables(costs: dict[str, Any], overlap: dict[str, Any]) -> list[str]:
    lines = [
        "",
        "## The choice of the overlap",
        "",
        "Cost is a proxy counted from bits and the widths of adders (`qplug_hardware.overlap`), in full adders for one multiply-accumulate: no",
        "area was measured. It cannot stand for one either: the paper reports 0.31 for the area of BBFP(3,1)'s processing element against BFP6's,",
        f"and the proxy says {costs['BBFP(3,1)']['logic'] / costs['BFP(6)']['logic']:.2f}.",
        "",
        "| format | bits a value | multiplier | shifter | adder | exponent | all |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, c in costs.items():
        parts = " | ".join(f"{c[k]:.2f}" for k in ("storage", "multiplier", "shifter", "adder", "exponent", "logic"))
        lines.append(f"| {name} | {parts} |")
    lines += [
        "",
        "Squared error (seed 0) and cost, each drawn out to 0 … 1 over o = 1 … m - 1 and weighed a half each; the weights are inferred:",
        "",
        "| numbers | chosen | of least error | errors by o |",
        "|---|---|---|---|",
    ]
    for name, c in overlap.items():
        errors = ", ".join(f"{r['overlap']}: {r['loss']:.2g}" for r in c["rows"])
        lines.append(f"| {name} | o = {c['chosen']} | o = {c['quality alone']} | {errors} |")
    return lines


def _found(cells: Sequence[Cell]) -> dict[str, Any]:
    return {c.label: json.loads(c.file.read_text()) for c in cells if c.file.exists()}


def _model_tables(cells: Sequence[Cell]) -> list[str]:
    found, stale = _found(cells), {c.label for c in missing(cells)}
    some = next(iter(found.values()), None)
    lines = [
        "",
        "## tiny-llama",
        "",
        "Weights (all but embeddings and head) and the inputs of their layers, dynamically; nothing is searched unless said so. 16 windows of 256",
        "tokens of qzoo's own evaluation text, KL divergence to the float model ± standard error; each was saved, and measured after loading."
        + ("" if some is None else f" Float perplexity: {some['scores']['perplexity_reference']:.3f}. Rounding draws nothing: seed 0."),
        "",
        "| what | bits of a weight, counted | KL | top-1 | perplexity |",
        "|---|---|---|---|---|",
    ]
    rows = sorted((label for label in MODELS if label in found), key=lambda label: found[label]["bits"] // 1)
    for label in rows:
        s = found[label]["scores"]
        what = MODELS[label][2] + (" (older code)" if label in stale else "")
        figures = (
            f"{found[label]['bits']:.3f}",
            f"{s['kl']:.5f} ± {s['kl_standard_error']:.5f}",
            f"{100 * s['top1']:.1f} %",
            f"{s['perplexity']:.3f}",
        )
        lines.append(f"| {what} | {' | '.join(figures)} |")
    return lines


def _unit_tables(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "",
        "## The unit of tables",
        "",
        "512 × 256 normal numbers in blocks of 32 whose size lies between 2^-4 and 2^3 (seed 0), in BBFP(10,5); entries of 16 bits, t bits of the",
        "mantissa looked up. Errors are absolute, against float64 of what went in. An even table spans the range of these very numbers; “on chip”",
        "has as many entries as the sub-tables that one block needs, “all” as many as all 64 together.",
        "",
        "| function | t | halves | bytes on chip | largest | mean | even, on chip: largest | mean | even, all: largest | mean |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        if "even" in r:
            e = [f"{r['even'][w][k]:.1e}" for w in ("chip", "all") for k in ("largest", "mean")]
            lines.append(
                f"| {r['function']} | {r['t']} | {r['half']} | {r['bytes_on_chip']} | {r['largest']:.1e} | {r['mean']:.1e} | {' | '.join(e)} |"
            )
    lines += [
        "",
        "What is made of them, in and out as blocks:",
        "",
        "| function | t | BBFP(10,5): largest | mean | BFP(10): largest | mean |",
        "|---|---|---|---|---|---|",
    ]
    plain = {(r["function"], r["t"], r["element"]): r for r in rows if "even" not in r}
    for function, t, element in plain:
        if element == "BBFP(10,5)":
            own = [f"{plain[function, t, e][k]:.1e}" for e in ("BBFP(10,5)", "BFP(10)") for k in ("largest", "mean")]
            lines.append(f"| {function} | {t} | {' | '.join(own)} |")
    found = _found(matrix())
    if any(label in found for label in UNITS):
        lines += [
            "",
            "tiny-llama with float weights, every softmax and SiLU out of tables; 16 windows of 256 tokens:",
            "",
            "| elements | t | KL | top-1 | perplexity | against float |",
            "|---|---|---|---|---|---|",
        ]
        for label, (name, t) in UNITS.items():
            if label in found:
                s = found[label]["scores"]
                more = 100 * (s["perplexity"] / s["perplexity_reference"] - 1)
                kind = "BBFP(10,5)" if name == "bbfp" else "BFP(10)"
                kl, top = f"{s['kl']:.1e} ± {s['kl_standard_error']:.0e}", f"{100 * s['top1']:.2f} %"
                lines.append(f"| {kind} | {t} | {kl} | {top} | {s['perplexity']:.3f} | {more:+.3f} % |")
    return lines


def stale_numbers() -> bool:
    """Whether the file of numbers is missing, or of other code."""
    if not FILE.exists():
        return True
    return not evidence.fresh(json.loads(FILE.read_text()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="say which cells are missing")
    parser.add_argument("--table", action="store_true", help="write the page from what is there")
    parser.add_argument("--only", default="", help="only cells whose name contains this")
    parser.add_argument("--limit", type=int, default=1000, help="at most this many cells")
    a = parser.parse_args()
    cells = matrix()
    todo = [] if a.table else [c for c in missing(cells) if a.only in c.name][: a.limit]
    print(f"{len(todo)} of {len(cells)} cells are missing{', and the file of numbers' if stale_numbers() else ''}", file=sys.stderr)
    if a.list:
        print("\n".join(c.name for c in todo))
        return 0
    if not a.table and stale_numbers():
        started = time.perf_counter()
        result: dict[str, Any] = numbers()
        files = [f"packages/qplug-hardware/src/qplug_hardware/{name}" for name in _OWN if name.endswith(".py")]
        FILE.write_text(json.dumps(result | {"files": files, "code": code_hash(files), "seeds": SEEDS}, indent=1, sort_keys=True) + "\n")
        print(f"numbers ({time.perf_counter() - started:.0f} s)", file=sys.stderr)
    for cell in todo:
        started = time.perf_counter()
        result = {"cell": asdict(cell), **measure(cell)}
        cell.file.parent.mkdir(parents=True, exist_ok=True)
        part = cell.file.with_suffix(".part")
        part.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
        part.replace(cell.file)
        s = result["scores"]
        print(f"{cell.name}: KL {s['kl']:.5f} ppl {s['perplexity']:.3f} ({time.perf_counter() - started:.0f} s)", file=sys.stderr)
    PAGE.write_text(page(json.loads(FILE.read_text()) if FILE.exists() else None, cells), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
