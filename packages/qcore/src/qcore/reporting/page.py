"""`report.html`: one file that holds all it shows.

It is made from `report.json` alone, so it can be made again (`qcore report out/`), and the same figures give the same bytes.  No script, no request:
its own content-security policy forbids both.  Charts are SVG with titles and tooltips; behind each stands its table.
"""

import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from qcore.evaluation.report import megabytes, own_scores
from qcore.reporting import charts
from qcore.reporting.svg import STYLE, number

_PAGE_STYLE = files("qcore.reporting").joinpath("page.css").read_text(encoding="utf-8")

Table = tuple[Sequence[str], Sequence[Sequence[str]]]


def render(report: Mapping[str, Any]) -> str:
    """The page of a report, as `Report.to_dict` or `read_report` gives it; what an older report does not hold is left out."""
    sections = [
        ("loss", "Where the loss comes from", _loss(report)),
        ("error", "Error by layer and kind", _errors(report)),
        ("bits", "Bits by layer", _bits(report)),
        ("values", "Values before and after", _values(report)),
        ("experts", "What the experts saw", _experts(report)),
        ("kernels", "Kernels", _kernels(report)),
        ("run", "Time and memory", _run(report)),
        ("float", "What stayed float", _left_float(report)),
        ("refused", "What no transform may touch", _refused(report)),
        ("recipe", "Recipe, data, versions", _recipe(report)),
    ]
    shown = [(key, title, body) for key, title, body in sections if body]
    name, recipe = str(report["model"]["name"]), str(report["recipe"]["name"])
    links = " ".join(f'<a href="#{key}">{escape(title)}</a>' for key, title, _ in shown)
    body = "".join(f'<section aria-labelledby="{key}"><h2 id="{key}">{escape(title)}</h2>{own}</section>\n' for key, title, own in shown)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(name)}, {escape(recipe)}: quantization report</title>\n<style>\n{_PAGE_STYLE}{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<header><h1>{escape(name)}</h1><p class="soft">quantized by the recipe <code>{escape(recipe)}</code></p>'
        f'{_cards(report)}{_notes(report)}<nav aria-label="sections">{links}</nav></header>\n{body}</main>\n</body>\n</html>\n'
    )


def _cards(report: Mapping[str, Any]) -> str:
    size, scores = report["size"], (report.get("quality") or {}).get("scores", {})
    before, after = size["before_bytes"], size["after_bytes"]
    cards = [(megabytes(after), f"of weights, was {megabytes(before)}" + (f" ({before / after:.2f}× smaller)" if after else ""))]
    if size.get("effective_bits"):
        cards.append((f"{size['effective_bits']:.2f} bits", f"per quantized weight, was {size['float_bits']:g}"))
    if "kl" in scores:
        error = scores.get("kl_standard_error")
        cards.append((number(scores["kl"]), "KL divergence from the float model" + (f", ± {number(error)}" if error else "") + ", nats"))
    if "perplexity" in scores:
        was, now = scores["perplexity_reference"], scores["perplexity"]
        change = f" ({(now / was - 1) * 100:+.2f} %)" if was and now else ""
        cards.append((number(now), f"perplexity, was {number(was)}{change}"))
    if "accuracy" in scores:
        cards.append((f"{scores['accuracy']:.2%}", f"accuracy, was {scores['accuracy_reference']:.2%}"))
    if "top1" in scores:
        cards.append((f"{scores['top1']:.2%}", "of outputs put the same entry first"))
    if "sqnr_db" in scores and scores["sqnr_db"] is not None:
        cards.append((f"{scores['sqnr_db']:.1f} dB", "signal to noise of the outputs"))
    cards += [(now, name.replace("_", " ") + (f", was {was}" if was else "")) for name, (was, now) in own_scores(scores).items()]
    return (
        '<div class="cards">'
        + "".join(f'<div class="card"><b>{escape(big)}</b><span>{escape(small)}</span></div>' for big, small in cards)
        + "</div>"
    )


def _notes(report: Mapping[str, Any]) -> str:
    note = str(report["data"].get("note") or "")
    said = f"<p>{escape(note[:1].upper() + note[1:])}.</p>" if note else ""
    if not report.get("quality"):
        said += '<p class="note">Its quality was not measured: there was no evaluation data.</p>'
    proof = report.get("proof") or {}
    words = {"identical": "its outputs are the saved model's, bit for bit", "close": "its outputs are the saved model's up to rounding"}
    if proof.get("loader"):
        how = words.get(str(proof["level"]), "its tensors were read back and decoded")
        said += f'<p class="soft">Proof: the checkpoint was opened by <code>{escape(str(proof["loader"]))}</code>; {how}.</p>'
    return said + "".join(f'<p class="note">{escape(str(note))}</p>' for note in report["model"].get("notes", ()))


def _loss(report: Mapping[str, Any]) -> str:
    found = report.get("attribution") or {}
    if not found.get("modules"):
        quality = report.get("quality")
        return (
            "<p>Not measured; <code>qcore quantize --attribute</code> or <code>qcore compare FLOAT OUT --attribute</code> does.</p>"
            if quality
            else ""
        )
    all_kl, listed = found["kl"], found["modules"]
    said = (
        f"<p>Each of the {len(listed)} modules was float again once, its inputs too, and the KL divergence measured anew on "
        f"{found['rows']} outputs. With all quantized it is {number(all_kl)}; with all of them float again, {number(found['kl_float'])}. "
        "What single modules save does not add up to the whole: their errors meet. A module that saves less than nothing "
        "made up for another's error.</p>"
    )
    rows = [(c["module"], number(c["saved"]), _share(c["saved"], all_kl), number(c["kl"])) for c in listed]
    kinds: dict[str, float] = {}
    for c in listed:
        kinds[c["kind"]] = kinds.get(c["kind"], 0.0) + c["saved"]
    by_kind = [(kind, number(saved), _share(saved, all_kl)) for kind, saved in sorted(kinds.items(), key=lambda item: (-item[1], item[0]))]
    return (
        said
        + _wide(charts.costs(listed[:10], all_kl))
        + _details("All modules", (("module", "KL saved if float", "of all", "KL left"), rows), right=(1, 2, 3))
        + _details("By kind", (("kind", "KL saved, summed", "of all"), by_kind), right=(1, 2))
    )


def _share(part: float, whole: float) -> str:
    return f"{part / whole:+.1%}" if whole else "–"


def _errors(report: Mapping[str, Any]) -> str:
    sites = report["sites"]
    if not sites:
        return ""
    what = {row["of"] for row in sites}
    meaning = {
        "output": "squared error of what the layer puts out on the calibration data, relative to its square",
        "weight": "squared error of the weight, relative to its square; no inputs were seen",
    }
    said = "; or ".join(meaning[w] for w in sorted(what) if w in meaning)
    rows = [
        (
            r["site"],
            r["spec"],
            r["solver"].partition("(")[0],
            number(r["error"]),
            r["of"],
            f"{r['bits']:.2f}",
            megabytes(r["bytes"]),
            number(r["seconds"]),
        )
        for r in sites
    ]
    headers = ("site", "stored as", "solver", "error", "of", "bits", "bytes", "seconds")
    return (
        f"<p>{said[:1].upper()}{said[1:]}. The stronger the colour, the larger the error.</p>"
        + _wide(charts.error_map(sites))
        + _details("All sites", (headers, rows), (3, 5, 6, 7))
    )


def _bits(report: Mapping[str, Any]) -> str:
    drawn = charts.bits_by_layer(report["sites"])
    return "<p>Effective bits of a weight, scales included, over the quantized weights of each layer.</p>" + _wide(drawn) if drawn else ""


def _values(report: Mapping[str, Any]) -> str:
    histograms = report.get("histograms") or {}
    figures = charts.histograms(histograms)
    if not figures:
        return ""
    said = (
        "<p>Magnitudes on logarithmic axes: what share of the values lies in each half octave. Before: of the float "
        "model. After: of the values that the stored codes stand for, and of what they are multiplied with, behind any transform and on its grid "
        "where inputs are quantized. The dots are the largest.</p>"
        '<p class="soft"><span class="key before"></span>before<span class="key after"></span>after</p>'
    )
    drawn = "".join(f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>" for svg, caption in figures)
    return f'{said}<div class="many">{drawn}</div>'


def _experts(report: Mapping[str, Any]) -> str:
    ledger = (report.get("coverage") or {}).get("experts")
    if not ledger:
        return ""
    rows = []
    for module, stack in ledger["stacks"].items():
        for tensor, own in stack.items():
            mended = "; ".join(f"{part}: {how}" for part, how in sorted(own["instead"].items(), key=lambda item: int(item[0]))) or "–"
            rows.append((f"{module}.{tensor}", str(min(own["rows"])), str(max(own["rows"])), mended))
    few = f"fewer than {ledger['minimum']} counts as not covered ({ledger['below']})"
    said = f"<p>Rows of the calibration data that the router sent to each expert; {few}, and is red.</p>"
    return said + _wide(charts.coverage(ledger)) + _details("As a table", (("stack", "least", "most", "mended"), rows), (1, 2))


def _kernels(report: Mapping[str, Any]) -> str:
    used: dict[str, list[Mapping[str, Any]]] = {}
    for row in report["sites"]:
        used.setdefault(row["kernel"], []).append(row)
    rows, refusals = [], []
    for name in sorted(used):
        own = used[name]
        rows.append(
            (
                name,
                str(len(own)),
                ", ".join(sorted({r["packing"] for r in own})),
                number(100 * sum(r["values"] for r in own) / _values_of(report)) + " %",
            )
        )
        why: dict[tuple[str, str], int] = {}
        for r in own:
            for other, reason in r["refused"]:
                why[other, reason] = why.get((other, reason), 0) + 1
        refusals += [(name, other, reason, str(n)) for (other, reason), n in sorted(why.items())]
    table = _table(("kernel", "modules", "packing", "of quantized weights"), rows, (1, 3)) if rows else ""
    return table + (
        _details("Kernels that were refused, and why", (("runs", "instead of", "because", "modules"), refusals), (3,)) if refusals else ""
    )


def _values_of(report: Mapping[str, Any]) -> int:
    return sum(r["values"] for r in report["sites"]) or 1


def _run(report: Mapping[str, Any]) -> str:
    seconds, memory = report.get("seconds") or {}, report.get("memory") or {}
    if not seconds:
        return ""
    total = sum(seconds.values())
    peak, anonymous = memory.get("peak_bytes"), memory.get("anonymous_bytes")
    threads = str((report.get("versions") or {}).get("threads", report.get("threads", 1)))
    said = f"{number(total)} seconds on {escape(threads)} thread{'' if threads == '1' else 's'}"
    if peak:
        said += f"; at most {megabytes(peak)} resident" + (f", at most {megabytes(anonymous)} anonymous" if anonymous else "")
    drawn = charts.timeline(memory)
    by_phase = memory.get("anonymous_by_phase") or {}
    rows = [(name, number(value), megabytes(by_phase[name]) if by_phase.get(name) else "–") for name, value in seconds.items()]
    inside = [(name, number(value)) for name, value in (report.get("phases") or {}).items()]
    return (
        f"<p>{said}. Drawn is anonymous memory, which had to be there (pages of files need not be), as seen at every step.</p>"
        + (_wide(drawn) if drawn else "")
        + _details("By step", (("step", "seconds", "most memory"), rows), (1, 2))
        + (_details("Inside the quantization (some contain others)", (("phase", "seconds"), inside), (1,)) if inside else "")
    )


def _left_float(report: Mapping[str, Any]) -> str:
    by_reason: dict[str, list[str]] = {}
    for name, why in (report.get("left_float") or {}).items():
        by_reason.setdefault(str(why), []).append(str(name))
    return "".join(
        f"<details><summary>{len(names)} × {escape(why)}</summary><p>{', '.join(f'<code>{escape(n)}</code>' for n in names)}</p></details>"
        for why, names in by_reason.items()
    )


def _refused(report: Mapping[str, Any]) -> str:
    """Reasons that differ in numbers alone (of layers, of heads) are one."""
    by_reason: dict[str, list[str]] = {}
    for port, why in (report.get("refused") or {}).items():
        by_reason.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", str(why)), []).append(str(port))
    lists = "".join(
        f"<details><summary>{len(ports)} × {escape(why)}</summary><p>{', '.join(f'<code>{escape(p)}</code>' for p in ports)}</p></details>"
        for why, ports in sorted(by_reason.items(), key=lambda item: (-len(item[1]), item[0]))
    )
    said = (
        "<p>Axes of weights whose channels could not be followed, or were proven to be shared otherwise: rotations and scales leave them alone.</p>"
    )
    return said + lists if lists else ""


def _recipe(report: Mapping[str, Any]) -> str:
    data = report["data"]
    rows = []
    for use in ("calibration", "evaluation"):
        own = data.get(use)
        if own:
            origin = str(own.get("file") or own.get("source") or "")
            amount = f"{own['tokens']} tokens" if "tokens" in own else f"{own.get('images', '–')} images"
            form = f"{own['windows']} windows of {own['window']}" if "windows" in own else "×".join(map(str, own.get("shape", ())))
            rows.append((use, origin, amount, form, str(own.get("sha256", ""))[:16]))
    changed = [str(o) for o in report["recipe"].get("overrides", ())]
    versions = ", ".join(f"{name} {version}" for name, version in (report.get("versions") or {}).items() if name != "threads")
    return (
        (_table(("data", "from", "amount", "form", "sha256"), rows, ()) if rows else "")
        + (f"<p>Changed: {', '.join(f'<code>{escape(o)}</code>' for o in changed)}</p>" if changed else "")
        + f"<details><summary>The whole recipe</summary><pre>{escape(str(report['recipe'].get('toml', '')))}</pre></details>"
        + f'<p class="soft">{escape(versions)}</p>'
    )


def _wide(svg: str) -> str:
    return f'<div class="wide">{svg}</div>' if svg else ""


def _details(title: str, table: Table, right: Sequence[int] = ()) -> str:
    return f'<details><summary>{escape(title)}</summary><div class="wide">{_table(*table, right)}</div></details>' if table[1] else ""


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    def cell(tag: str, i: int, text: str) -> str:
        return f"<{tag}{' class=n' if i in right else ''}{' scope=col' if tag == 'th' else ''}>{escape(text)}</{tag}>"

    head = "".join(cell("th", i, h) for i, h in enumerate(headers))
    body = "".join(f"<tr>{''.join(cell('td', i, c) for i, c in enumerate(row))}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
