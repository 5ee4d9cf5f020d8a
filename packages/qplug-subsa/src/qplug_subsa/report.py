"""One HTML file about a selection: a map of the pool, how well it is covered, and the chosen texts.  A browser is all it needs, no network."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

from qplug_subsa.coverage import Coverage
from qplug_subsa.plot import Plane
from qplug_subsa.rows import Array

SHOWN = 4000  # texts of the pool on the map, drawn at random where there are more
_TEXT = 160
_WIDTH, _HEIGHT = 900, 560

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2733; --paper: #ffffff; --faint: #93a3b5; --soft: #526273; --line: #d6dde5; --mark: #c2410c; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e9ef; --paper: #12181f; --faint: #5c6b7b; --soft: #9fb0c0; --line: #2c3743; --mark: #fb923c; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
svg { width: 100%; height: auto; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.pool { fill: var(--faint); opacity: .6; } .chosen { fill: var(--mark); stroke: var(--paper); stroke-width: 1.5; }
.rank { font-size: 11px; fill: var(--ink); } .axis { stroke: var(--line); } .curve { fill: none; stroke: var(--mark); stroke-width: 2; }
.random { stroke: var(--soft); stroke-dasharray: 6 4; } .small { color: var(--soft); font-size: .9em; }
"""


@dataclass(frozen=True)
class Picture:
    """What the report shows.

    map:     positions [m, 2] of texts of the pool, with their indices [m]
    chosen:  positions [k, 2], in order of choice
    serves:  how many texts of the pool have each chosen one for their nearest
    curve:   coverage by the first 1 … k chosen texts
    """

    title: str
    summary: Sequence[tuple[str, str]]
    plane: Plane
    map: Array
    map_indices: Array
    chosen: Array
    indices: Sequence[int]
    gains: Sequence[float]
    serves: Sequence[int]
    curve: Sequence[float]
    found: Coverage
    random: Coverage
    notes: Sequence[str] = ()


def write_report(path: Path, picture: Picture, name: Sequence[str], text: Sequence[str]) -> None:
    """Write the file.  name: ids, text: texts of the whole pool; text may be empty"""
    path.write_text(render(picture, name, text), encoding="utf-8")


def render(picture: Picture, name: Sequence[str], text: Sequence[str]) -> str:
    p = picture
    shares = f"{p.plane.share[0]:.0%} and {p.plane.share[1]:.0%}"
    drawn = "" if len(p.map) >= len(name) else f" {len(p.map)} of {len(name)} texts are drawn, chosen at random."
    notes = "".join(f"<li>{escape(n)}</li>" for n in p.notes)
    rows = "".join(
        f'<tr><td class="n">{rank}</td><td>{escape(str(name[i]))}</td><td class="n">{_number(p.gains, rank - 1)}</td>'
        f'<td class="n">{p.serves[rank - 1]}</td><td>{escape(_brief(text[i])) if text else ""}</td></tr>'
        for rank, i in enumerate(p.indices, 1)
    )
    figures = "".join(
        f'<tr><td>{what}</td><td class="n">{mine:.3f}</td><td class="n">{other:.3f}</td></tr>'
        for what, mine, other in (
            ("similarity of a text to its nearest chosen one, mean over the pool", p.found.nearest, p.random.nearest),
            ("the same, for the 5 % of the pool that are covered worst (at most)", p.found.worst, p.random.worst),
            ("similarity of two chosen texts, mean (less is better)", p.found.redundancy, p.random.redundancy),
        )
    )
    summary = "".join(f"<tr><td>{escape(k)}</td><td>{escape(v)}</td></tr>" for k, v in p.summary)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(p.title)}</title><style>{_STYLE}</style></head><body>
<h1>{escape(p.title)}</h1>
<table>{summary}</table>
{f"<ul>{notes}</ul>" if notes else ""}
<h2>Map</h2>
{_map(p, name, text)}
<p class="small">The two directions in which the pool spreads most carry {shares} of its spread; distances on the map are those alone.{drawn}
Numbers give the order of choice. Point at a dot to read its text.</p>
<h2>Coverage</h2>
<table><tr><th>cosines of centred embeddings</th><th class="n">chosen</th><th class="n">random</th></tr>{figures}</table>
{_curve(p)}
<p class="small">Coverage by the first 1 … {len(p.indices)} chosen texts; the dashed line is a random selection of {len(p.indices)}.
Where the curve is flat, more annotations add little.</p>
<h2>Chosen texts</h2>
<table id="chosen"><tr><th class="n">rank</th><th>id</th><th class="n">gain</th><th class="n">nearest to</th><th>text</th></tr>{rows}</table>
</body></html>
"""


def _map(p: Picture, name: Sequence[str], text: Sequence[str]) -> str:
    both = np.concatenate([p.map, p.chosen])
    low, high = both.min(0), both.max(0)
    scale = np.array([_WIDTH - 40, _HEIGHT - 40]) / np.maximum(high - low, 1e-12)

    def at(position: Array) -> tuple[float, float]:
        x, y = (position - low) * scale + 20
        return round(float(x), 1), round(_HEIGHT - float(y), 1)

    def told(i: int) -> str:
        return escape(f"{name[i]}: {_brief(text[i])}" if text else str(name[i]))

    dots = []
    for position, i in zip(p.map, p.map_indices, strict=True):
        x, y = at(position)
        dots.append(f'<circle class="pool" cx="{x}" cy="{y}" r="3"><title>{told(int(i))}</title></circle>')
    for rank, (position, i) in enumerate(zip(p.chosen, p.indices, strict=True), 1):
        x, y = at(position)
        dots.append(f'<circle class="chosen" cx="{x}" cy="{y}" r="6"><title>{rank}. {told(i)}</title></circle>')
        dots.append(f'<text class="rank" x="{x + 8}" y="{y + 4}">{rank}</text>')
    label = f"{len(p.map)} texts of the pool and the {len(p.indices)} chosen ones"
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(dots)}</svg>'


def _curve(p: Picture) -> str:
    width, height, left = 900, 220, 50
    top = max(*p.curve, p.random.nearest, 1e-9)
    bottom = min(*p.curve, p.random.nearest, 0.0)

    def y(value: float) -> float:
        return round(height - 25 - (value - bottom) / (top - bottom) * (height - 45), 1)

    step = (width - left - 20) / max(len(p.curve) - 1, 1)
    points = " ".join(f"{left + i * step:.1f},{y(v)}" for i, v in enumerate(p.curve))
    r = y(p.random.nearest)
    return f"""<svg viewBox="0 0 {width} {height}" role="img" aria-label="coverage against the number of chosen texts">
<line class="axis" x1="{left}" x2="{width - 20}" y1="{y(bottom)}" y2="{y(bottom)}"/>
<line class="random" x1="{left}" x2="{width - 20}" y1="{r}" y2="{r}"/>
<polyline class="curve" points="{points}"/>
<text class="rank" x="4" y="{y(top) + 4}">{top:.2f}</text><text class="rank" x="4" y="{y(bottom) + 4}">{bottom:.2f}</text>
<text class="rank" x="{left}" y="{height - 6}">1</text><text class="rank" x="{width - 40}" y="{height - 6}">{len(p.curve)}</text></svg>"""


def _brief(text: str) -> str:
    one = " ".join(text.split())
    return one if len(one) <= _TEXT else one[: _TEXT - 1] + "…"


def _number(values: Sequence[float], i: int) -> str:
    return f"{values[i]:.1f}" if i < len(values) else "–"
