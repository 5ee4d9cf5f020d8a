"""report.html: whole, small, the same every time, and nothing in it asks the network for anything."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from qcore.evaluation.compare import pareto
from qcore.evaluation.histograms import Magnitudes
from qcore.reporting import pareto_plot, render
from qcore.reporting.svg import Axis, log_axis, number

VOID = {"meta", "link", "br", "img"}
SVG = {"svg", "title", "desc", "rect", "text", "polyline", "polygon", "circle", "style"}
KINDS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


def counts(scale: float, zeros: int) -> dict[str, Any]:
    return {"start": -12.0, "step": 0.5, "counts": [1 + i * i for i in range(24)], "zeros": zeros, "largest": scale}


def report(layers: int = 4, experts: int = 0, name: str = "zoo:tiny <llama> & co") -> dict[str, Any]:
    """As `Report.to_dict` gives it."""
    sites = [
        {
            "site": f"model.layers.{i}.{kind}:weight", "spec": "int4 per group 64", "solver": "GPTQ(damp=0.01)", "packing": "ct-pack",
            "kernel": "torch-int4-linear",
            "refused": [["int4-linear-native", "needs K divisible by 64, got 48"]], "error": 0.001 * (1 + i + 3 * k), "of": "output", "bits": 4.25,
            "bytes": 1088, "values": 2048, "seconds": 0.1,
        }
        for i in range(layers)
        for k, kind in enumerate(KINDS)
    ]  # fmt: skip
    modules = [
        {"module": s["site"].removesuffix(":weight"), "kind": KINDS[j % 4], "kl": 0.05 - 0.001 * (9 - j), "saved": 0.001 * (9 - j)}
        for j, s in enumerate(sites)
    ]
    stacks = {
        f"model.layers.{i}.mlp.experts": {
            "up_proj": {"rows": [3 * e for e in range(experts)], "weight": [0.0] * experts, "instead": {"0": "rounded to nearest"}}
        }
        for i in range(layers)
    }
    return {
        "schema": 1, "kernels": {"torch-int4-linear": len(sites)},
        "model": {"name": name, "source": "zoo", "dtype": "bfloat16", "parameters": 10, "notes": ["weights are <random>"]},
        "recipe": {"name": "w4a16-gptq", "overrides": ["solver.damp=0.1"], "toml": 'a = "<b>"'},
        "data": {"note": "calibrated on a", "calibration": {"file": "a", "windows": 2, "window": 8, "tokens": 16, "sha256": "0" * 64}},
        "size": {"before_bytes": 4000000, "after_bytes": 1000000, "float_bits": 16, "effective_bits": 4.25, "quantized_values": 9},
        "quality": {"task": "language-modeling", "scores": {
            "perplexity": 20.1, "perplexity_reference": 19.8, "kl": 0.05, "kl_standard_error": None, "top1": 0.94, "tokens": 510,
        }},
        "sites": sites, "left_float": {"model.norm.weight": "a vector"},
        "refused": {f"model.layers.{i}.o.weight.in": f"model.layers.{i}.v→o: failed the proof" for i in range(layers)},
        "coverage": {"weights_quantized": 9} | ({"experts": {"minimum": 2, "below": "nearest", "stacks": stacks}} if experts else {}),
        "seconds": {"load": 1.0, "quantize": 5.0}, "phases": {"solve": 3.0},
        "memory": {
            "peak_bytes": 9e8, "anonymous_bytes": 5e8, "anonymous_by_phase": {"load": 2e8},
            "timeline": [[0.0, 1e8], [3.0, 5e8], [6.0, 2e8]], "spans": [["load", 0.0, 1.0], ["quantize", 1.0, 6.0]],
        },
        "proof": {"level": "identical", "loader": "qcore.checkpoint.load"}, "versions": {"qcore": "0.1", "threads": "1"}, "threads": 1,
        "histograms": {kind: {f"{what}_{when}": counts(2.0, 5) for what in ("weight", "input") for when in ("before", "after")} for kind in KINDS},
        "attribution": {"kl": 0.05, "kl_float": 1e-7, "rows": 510, "modules": modules},
    }  # fmt: skip


class Strict(HTMLParser):
    """Fails on an element that is not closed in order, an unknown one in SVG, an id that is there twice, and any reference to elsewhere."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "iframe", "object", "embed", "base", "form"), tag
        assert "svg" not in self.open or tag in SVG, tag
        if tag == "svg":
            assert ("role", "img") in attrs
        for name, value in attrs:
            assert not name.startswith("on"), name
            assert name not in ("src", "srcset", "action", "formaction", "xlink:href", "poster", "background"), name
            if name == "href":
                assert value is not None and value.startswith(("#", "data:")), value
                self.links.append(value)
            if name == "id":
                self.ids.append(str(value))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, (tag, self.open)
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parsed(page: str) -> Strict:
    parser = Strict()
    parser.feed(page)
    parser.close()
    assert parser.open == [] and len(set(parser.ids)) == len(parser.ids)
    assert {link[1:] for link in parser.links if link.startswith("#")} <= set(parser.ids)
    return parser


PAGES = {
    "dense": report(),
    "experts": report(experts=8),
    "nothing measured": report() | {"quality": None, "attribution": {}, "histograms": {}, "memory": {}, "proof": {"level": "not proved"}},
    "nothing quantized": report(layers=0) | {"attribution": {}, "histograms": {}, "kernels": {}},
    "of images": report() | {"data": {"note": "images", "evaluation": {"file": "t.gz", "images": 100, "shape": [1, 28, 28], "sha256": "1" * 64}}},
    "of an older qcore": {k: v for k, v in report().items() if k not in ("attribution", "histograms", "phases")},
}


@pytest.mark.parametrize("data", PAGES.values(), ids=PAGES)
def test_it_is_whole_and_needs_nothing_from_elsewhere(data) -> None:
    page = render(data)
    parser = parsed(page)
    style = page.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style and style.count("{") == style.count("}")
    assert "default-src 'none'" in page and not re.search(r"(?:https?:)?//[a-z]", page.replace("http://www.w3.org/2000/svg", ""))
    text = " ".join(parser.text)
    assert "zoo:tiny <llama> & co" in text and "nan" not in page.lower().split() and "None" not in text
    assert "weights are <random>" in text and 'a = "<b>"' in text  # shown, not run


def test_everything_that_was_measured_is_on_it() -> None:
    text = " ".join(parsed(render(report(experts=8))).text)
    for said in (
        "1.00 MB", "4.00×", "4.25 bits", "0.0500", "20.1", "94.00%", "model.layers.0.self_attn.q_proj saves 0.00900 (+18.0%)", "int4-linear-native",
        "needs K divisible by 64, got 48", "expert 7: 21 rows", "expert 0: 0 rows, too few", "0: rounded to nearest",
        "model.layers.3 mlp.down_proj: 0.0130",
        "weights of mlp.up_proj", "inputs of mlp.up_proj", "quantize: 5.00 s", "a vector",
        "4 × model.layers.*.v→o: failed the proof", "solver.damp=0.1", "bit for bit",
    ):  # fmt: skip
        assert said in text, said


def test_the_same_figures_give_the_same_bytes_also_out_of_the_file() -> None:
    assert render(report()) == render(report()) == render(json.loads(json.dumps(report())))


def test_a_large_model_s_page_stays_under_a_megabyte() -> None:
    page = render(report(layers=80, experts=64))
    parsed(page)
    assert len(page.encode()) < 1_000_000


# pictures -------------------------------------------------------------------------------------------------------------------------------------


def test_the_front_is_what_no_other_beats_in_both() -> None:
    points = [(10.0, 0.0), (4.0, 0.2), (4.0, 0.3), (5.0, 0.2), (2.0, 1.0), (2.0, 1.0), (None, 0.1), (3.0, None)]
    assert pareto(points) == [True, True, False, False, True, True, False, False]


def test_the_plot_stands_alone_and_names_every_model() -> None:
    plot = pareto_plot([("out <a>/", 2e6, 0.1, True), ("b", 3e6, 0.2, False), ("c", 4e6, 0.0, True)], "zoo:x")
    parser = parsed(plot)
    text = " ".join(parser.text)
    assert "out <a>/: 2.00 MB, KL 0.100" in text and "no other is both smaller and closer" in text
    assert plot.count('class="dot-best"') == 2 + 1 and plot.count('class="dot-other"') == 1 + 1 and 'class="front"' in plot
    assert parsed(pareto_plot([], "zoo:x")).open == []


@pytest.mark.parametrize(
    ("value", "said"),
    [(0, "0"), (0.00606, "0.00606"), (19.862, "19.9"), (1234.5, "1234"), (2.5e-6, "2.5e-6"), (4e9, "4e9"), (float("nan"), "–"), (None, "–")],
)
def test_numbers_have_three_digits(value, said: str) -> None:
    assert number(value) == said


@pytest.mark.parametrize(
    "axis", [Axis(0, 7.3, 0, 100), Axis(-3, 2, 50, 0), log_axis(3e-4, 0.2, 0, 100), log_axis(0.4, 0.7, 0, 100), Axis(2, 2, 0, 9)]
)
def test_ticks_lie_on_their_axis_in_order(axis: Axis) -> None:
    ticks = axis.ticks()
    assert ticks and ticks == sorted(ticks) and all(axis.low <= t <= axis.high for t in ticks)
    assert all(min(axis.start, axis.stop) <= axis(t) <= max(axis.start, axis.stop) for t in ticks)


def test_magnitudes_are_counted_in_half_octaves() -> None:
    import torch

    seen = Magnitudes()
    seen.add(torch.tensor([0.0, 1.0, -1.4, 1.5, 4.0]))
    assert seen.to_dict() == {"start": 0.0, "step": 0.5, "counts": [2, 1, 0, 0, 1], "zeros": 1, "largest": 4.0}
    assert Magnitudes().to_dict()["counts"] == []


# in a browser ---------------------------------------------------------------------------------------------------------------------------------

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome", "chrome") if (path := shutil.which(name))), None)
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync", "--hide-scrollbars", "--window-size=1120,3000", "--enable-logging=stderr",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_browser_draws_it_without_a_complaint(tmp_path: Path, dark: bool) -> None:
    import numpy as np

    image = pytest.importorskip("PIL.Image", reason="Pillow reads the screenshot")
    (tmp_path / "report.html").write_text(render(report(layers=12, experts=8)), encoding="utf-8")
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    argv = [
        BROWSER,
        *QUIET,
        scheme,
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--screenshot={tmp_path / 'page.png'}",
        (tmp_path / "report.html").as_uri(),
    ]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr  # a blocked request, a broken style, a script: all would be reported there
    pixels = np.asarray(image.open(tmp_path / "page.png").convert("RGB")).astype(int)
    paper = pixels[2, 2]
    assert (paper < 60).all() if dark else (paper > 240).all()
    drawn = (abs(pixels - paper).max(-1) > 40).mean(1) > 0
    assert drawn[:2500].mean() > 0.3  # rows with something on them, all the way down
    blue = (pixels[..., 2] - pixels[..., 0] > 60).mean()
    assert blue > 0.01  # bars and heat maps


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine")
def test_the_browser_would_have_complained(tmp_path: Path) -> None:
    (tmp_path / "bad.html").write_text(render(report()).replace("</main>", '<img src="https://example.org/x.png"></main>'), encoding="utf-8")
    argv = [BROWSER, *QUIET, f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={tmp_path / 'p.png'}", (tmp_path / "bad.html").as_uri()]
    assert "CONSOLE" in subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False).stderr
