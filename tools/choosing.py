"""Pages with figures from the cells of docs/evidence: choosing.txt ("When to use which" of docs/methods.md) and systems.txt (docs/systems.md).

Such a template begins with names, one a line:

    @ NAME = FILES                   the JSON files (a glob, relative to docs/evidence) whose figures are meant; the mean over them
    @ NAME = FILE | KEY=VALUE, …     of a file that is a list, or has a list of `cells` or `runs`: its entries with these values

and goes on as Markdown, in which {NAME FIELD} is a figure: a name of FIELDS.  A piece (a paragraph, or an item of a list) may end with lines

    holds: NAME FIELD < NAME FIELD, …      what the piece claims; a number may stand for either side, or before one, as a factor: a kl < 0.9 b kl
    else: TEXT                             what the piece becomes where a figure that it needs is not measured; without it the piece is left out

A claim that its figures no longer bear out is an error: the piece has to be written anew.
"""

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

TEMPLATE = Path(__file__).with_name("choosing.txt")
SYSTEMS = Path(__file__).with_name("systems.txt")
EVIDENCE = Path(__file__).resolve().parents[1] / "docs" / "evidence"


def _seconds(value: float) -> str:
    return "under 1 s" if value < 1 else f"{value:.0f} s" if value < 600 else f"{value / 60:.0f} minutes"


def _divergence(value: float) -> str:
    return f"{value:.4f}" if value < 0.1 else f"{value:.3f}" if value < 1 else f"{value:.2f}"


# field → (where in a cell, how it is written)
FIELDS: dict[str, tuple[str, Callable[[float], str]]] = {
    "kl": ("scores.kl", _divergence),
    "perplexity": ("scores.perplexity", lambda v: f"{v:.2f}" if v < 1000 else f"{v:.0f}"),
    "float-perplexity": ("scores.perplexity_reference", lambda v: f"{v:.2f}"),
    "agreement": ("scores.top1", lambda v: f"{100 * v:.1f} %"),
    "accuracy": ("scores.accuracy", lambda v: f"{100 * v:.1f} %"),
    "float-accuracy": ("scores.accuracy_reference", lambda v: f"{100 * v:.1f} %"),
    "bits": ("bits", lambda v: f"{v:.2f}"),
    "seconds": ("seconds", _seconds),
    "peak": ("memory.peak_bytes", lambda v: f"{v / 1e9:.1f} GB"),
    # occupancy by rays, tracks
    "rayiou": ("scores.rayiou", lambda v: f"{100 * v:.1f} %"),
    "float-rayiou": ("scores.rayiou_reference", lambda v: f"{100 * v:.1f} %"),
    "success": ("scores.success", lambda v: f"{v:.1f}"),
    "float-success": ("scores.success_reference", lambda v: f"{v:.1f}"),
    # a peer's run, a selector's
    "cpu": ("run.cpu_seconds", _seconds),
    "eff-bits": ("run.eff_bits", lambda v: f"{v:.2f}"),
    "nearest": ("accuracy.1", lambda v: f"{100 * v:.1f} %"),
    "own-kl": ("kl", lambda v: f"{v:.4f}"),
    "cpu-seconds": ("cpu_seconds", _seconds),
}
_FIGURE = re.compile(r"\{([\w+.-]+) ([\w-]+)\}")
_SIDE = re.compile(r"(?:(?P<factor>[\d.]+)\s*)?(?:(?P<name>[a-z][\w+.-]*) (?P<field>[\w-]+))?$")


class Broken(ValueError):
    """The template is wrong, or a claim in it no longer holds."""


class Figures:
    """The names of a template, and what the cells say of them."""

    def __init__(self, names: dict[str, str], folder: Path) -> None:
        self.names, self.folder = names, folder

    @cache  # noqa: B019 - one object a page
    def entries(self, name: str) -> list[dict[str, Any]]:
        """The cells that a name stands for; none where they are not measured."""
        if name not in self.names:
            raise Broken(f"it speaks of {name!r}, but no line '@ {name} = …' says where it is")
        files, _, where = (part.strip() for part in self.names[name].partition("|"))
        found: list[dict[str, Any]] = []
        for file in sorted(self.folder.glob(files)):
            data = json.loads(file.read_text(encoding="utf-8"))
            if where:
                wanted = [pair.split("=", 1) for pair in re.split(r",(?=[\w.]+=)", where)]
                rows = data if isinstance(data, list) else data.get("cells") or data.get("runs") or []
                found += [row for row in rows if all(str(row.get(k.strip())) == v.strip() for k, v in wanted)]
            else:
                found.append(data)
        return found

    def value(self, name: str, field: str) -> float | None:
        """The mean over the cells; None where none has the figure."""
        if field not in FIELDS:
            raise Broken(f"it asks for {field!r} of {name}; have: {', '.join(FIELDS)}")
        values = []
        for entry in self.entries(name):
            at: Any = entry
            for key in FIELDS[field][0].split("."):
                at = at.get(key) if isinstance(at, dict) else None
            if isinstance(at, int | float):
                values.append(float(at))
        return mean(values) if values else None

    def side(self, text: str) -> float | None:
        """One side of a claim: a number, a figure, or a number times a figure."""
        m = _SIDE.match(text.strip())
        if not m or not (m["factor"] or m["name"]):
            raise Broken(f"{text.strip()!r} is no side of a claim")
        if not m["name"]:
            return float(m["factor"])
        value = self.value(m["name"], m["field"])
        return None if value is None else value * float(m["factor"] or 1)

    def piece(self, text: str) -> str:
        """A piece of the template with its figures; "" where they are missing and nothing else was said.  Broken: its claim does not hold"""
        lines, claims, instead = [], [], ""
        for line in text.splitlines():
            word, _, rest = line.strip().partition(": ")
            if word == "holds":
                claims += rest.split(",")
            elif word == "else":
                instead = rest
            else:
                lines.append(line)
        body = "\n".join(lines)
        wanted = _FIGURE.findall(body)
        values = {pair: self.value(*pair) for pair in wanted}
        sides = [tuple(self.side(s) for s in claim.split("<")) for claim in claims]
        if any(v is None for v in values.values()) or any(None in pair for pair in sides):
            return instead
        for claim, pair in zip(claims, sides, strict=True):
            if len(pair) != 2:
                raise Broken(f"{claim.strip()!r} is no claim; write A < B")
            low, high = pair
            assert low is not None and high is not None
            if not low < high:
                raise Broken(f"it claims {claim.strip()}, but the cells say {low:.4g} and {high:.4g}; write anew: {body.strip()[:90]}…")
        return _FIGURE.sub(lambda m: FIELDS[m[2]][1](values[m[1], m[2]]), body)  # type: ignore[arg-type]


def pieces(text: str) -> list[str]:
    """Paragraphs and items of lists, each with what belongs to it; "" for an empty line."""
    out: list[str] = []
    for line in text.splitlines():
        if not line.strip() or line.startswith(("- ", "#")) or not out or not out[-1] or out[-1].startswith("#"):
            out.append(line.rstrip())
        else:
            out[-1] += "\n" + line.rstrip()
    return out


def section(template: str, folder: Path = EVIDENCE) -> tuple[str, list[str]]:
    """The section as Markdown, and what is wrong with it: claims that no longer hold are left out of it."""
    head = re.findall(r"^@ (\S+) = (.+)$", template, flags=re.MULTILINE)
    body = re.sub(r"^@ .*\n", "", template, flags=re.MULTILINE).strip()
    figures = Figures(dict(head), folder)
    lines: list[str] = []
    wrong: list[str] = []
    for text in pieces(body):
        try:
            made = figures.piece(text)
        except Broken as e:
            wrong.append(str(e))
            made = ""
        if made or not text:
            lines.append(made)
    page = re.sub(r"\n{3,}", "\n\n", "\n".join(lines))
    # a heading that nothing was measured for says so
    return re.sub(r"^(### .+)\n\n(?=###|\Z)", r"\1\n\nNot measured yet.\n\n", page + "\n", flags=re.MULTILINE).rstrip() + "\n", wrong
