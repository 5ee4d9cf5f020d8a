"""The two commands, whole, through qcore's command line."""

import csv
import json
import re
from dataclasses import dataclass
from html.parser import HTMLParser

import numpy as np
import pytest
from qcore.cli import main
from qcore.errors import SpecError
from qcore.plugins import load_registry
from qplug_subsa.options import make_selector
from qplug_subsa.subsa import SubSA


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home-cache"))

    def call(*argv):
        code = main([str(a) for a in argv])
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return code, said.out, said.err

    return call


@pytest.fixture
def files(tmp_path, sentences):
    records = [{"id": f"s{i}", "text": t, "sure": i / 60, "label": "even" if i % 2 == 0 else "odd"} for i, t in enumerate(sentences)]
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records[:50]))
    (tmp_path / "test.jsonl").write_text("".join(json.dumps({"text": r["text"], "label": r["label"]}) + "\n" for r in records[50:]))
    return tmp_path


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


class Page(HTMLParser):
    """What a page holds, and whether its tags close."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.outside = [], [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        self.outside += [v for k, v in attributes if k in ("src", "href", "xlink:href")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_select_then_prompts(run, files, encoder):
    code, out, _ = run("select", "pool.jsonl", "-b", 8, "-o", "annotate.jsonl", "--model", encoder, "--set", "lam=auto")
    assert code == 0 and "8 of 50 texts chosen" in out
    chosen = lines(files / "annotate.jsonl")
    assert [r["selection"]["rank"] for r in chosen] == list(range(1, 9))
    pool = lines(files / "pool.jsonl")
    assert all({k: v for k, v in r.items() if k != "selection"} == pool[r["selection"]["index"]] for r in chosen)

    code, out, err = run("prompts", "annotate.jsonl", "-t", "test.jsonl", "-o", "prompts.jsonl", "--model", encoder, "--tokens", 60)
    assert code == 0 and "10 prompts" in out and "tokens are counted by the tokenizer in" in err
    for prompt in lines(files / "prompts.jsonl"):
        assert prompt["prompt"].endswith("\nlabel:") and prompt["tokens"] <= 60 and prompt["examples"]
        assert prompt["similarities"] == sorted(prompt["similarities"])
        assert prompt["label"] in ("even", "odd")


def test_the_choice_is_that_of_the_class_and_the_report_is_json(run, files, encoder, tmp_path):
    from qplug_subsa.embed import LocalModel

    _, out, _ = run("select", "pool.jsonl", "-b", 5, "-o", "a.jsonl", "--model", encoder, "--json")
    summary = json.loads(out)
    assert summary["indices"] == SubSA().select(LocalModel(encoder).embed([r["text"] for r in lines(files / "pool.jsonl")]), 5)
    assert summary["lam"] == 1.0 and "50 computed, 0 from the cache" in summary["embeddings"]
    _, out, _ = run("select", "pool.jsonl", "-b", 5, "-o", "b.jsonl", "--model", encoder, "--json")
    assert "0 computed, 50 from the cache" in json.loads(out)["embeddings"]


def test_the_report_needs_nothing_from_outside(run, files, encoder):
    records = lines(files / "pool.jsonl")
    records[3]["text"] = "<script>alert(1)</script> & the cat"
    (files / "pool.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    run("select", "pool.jsonl", "-b", 6, "-o", "a.jsonl", "--model", encoder, "--report", "map.html", "-s", "facility-location")
    text = (files / "map.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == [] and page.outside == []
    assert "<script" not in text and not re.search(r"https?://|@import|url\(", text)
    circles = [a for tag, a in page.seen if tag == "circle"]
    assert sum(a["class"] == "pool" for a in circles) == 50 and sum(a["class"] == "chosen" for a in circles) == 6
    assert all(0 <= float(a["cx"]) <= 900 and 0 <= float(a["cy"]) <= 560 for a in circles)
    assert (
        sum(int(n) for n in re.findall(r'<td class="n">(\d+)</td><td>', text.partition('id="chosen"')[2])[1::2]) == 50
    )  # every text has its nearest


def test_embeddings_are_taken_from_a_file(run, files, points):
    np.save(files / "e.npy", points)
    code, _, err = run("select", "e.npy", "-b", 9, "-o", "a.jsonl")
    assert code == 0 and "choose: 9/9" in err
    assert [r["index"] for r in lines(files / "a.jsonl")] == SubSA().select(points, 9)
    np.save(files / "e50.npy", points[:50])
    code, _, _ = run("select", "pool.jsonl", "-b", 3, "-o", "b.csv", "--embeddings", "e50.npy", "--no-report")
    with (files / "b.csv").open(newline="") as f:
        rows = list(csv.DictReader(f))
    assert [int(r["index"]) for r in rows] == SubSA().select(points[:50], 3) and rows[0]["rank"] == "1" and not (files / "b.html").exists()
    code, _, err = run("select", "pool.jsonl", "-b", 3, "-o", "c.jsonl", "--embeddings", "e.npy")
    assert code == 2 and "240 rows" in err and "50 texts" in err


def test_scores_come_from_a_field(run, files, encoder):
    run("select", "pool.jsonl", "-b", 3, "-o", "a.jsonl", "--model", encoder, "-s", "least-confidence", "--scores", "sure")
    assert [r["id"] for r in lines(files / "a.jsonl")] == ["s0", "s1", "s2"]
    for scores, message in (("text", "is no number"), ("nothing", "'sure'")):
        code, _, err = run("select", "pool.jsonl", "-b", 3, "-o", "b.jsonl", "-s", "least-confidence", "--scores", scores)
        assert code == 2 and "line 1" in err and message in err
    code, _, err = run("select", "pool.jsonl", "-b", 3, "-o", "b.jsonl", "--model", encoder, "-s", "least-confidence")
    assert code == 2 and "needs a confidence" in err and "embed:" not in err  # said before the model runs


def test_a_strangers_selector_gets_a_tensor(run, files, points, monkeypatch):
    class Largest:
        """The longest vectors."""

        name = "largest"

        def select(self, embeddings, k, scores=None):
            return embeddings.norm(dim=1).topk(k).indices.tolist()

    monkeypatch.setitem(load_registry().selectors._items, "largest", Largest)
    np.save(files / "e.npy", points)
    code, out, _ = run("select", "e.npy", "-b", 4, "-o", "a.jsonl", "-s", "largest")
    assert code == 0 and "–" in out  # it tells no gains
    assert [r["index"] for r in lines(files / "a.jsonl")] == np.argsort(-np.linalg.norm(points, axis=1))[:4].tolist()


WRONG = [
    (("-b", 0), "budget of 0"),
    (("-b", 51), "more than the pool's 50 texts"),
    (("-b", 3, "-s", "subsaa"), "did you mean 'subsa'"),
    (("-b", 3, "--set", "lamda=1"), "did you mean 'lam'"),
    (("-b", 3, "--set", "lam=true"), "lam is a float"),
    (("-b", 3, "--set", "lam=-1"), "lam is"),
    (("-b", 3, "--text-field", "txt"), "line 1: there is no field 'txt'"),
    (("-b", 3, "--model", "nowhere"), "no config.json"),
    (("-b", 3, "--embeddings", "gone.npy"), "gone.npy does not exist"),
    (("-b", 3, "-o", "out.xlsx"), ".jsonl, .csv"),
    (("-b", 3, "-o", "no/such/folder.jsonl"), "is no folder"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=lambda v: str(v)[:40])
def test_wrong_input_ends_with_two_and_writes_nothing(run, files, arguments, message):
    before = sorted(p.name for p in files.iterdir())
    code, _, err = run("select", "pool.jsonl", *(("-o", "out.jsonl") if "-o" not in arguments else ()), *arguments)
    assert code == 2 and message in err
    assert sorted(p.name for p in files.iterdir()) == before


def test_annotations_are_not_overwritten(run, files, encoder):
    (files / "a.jsonl").write_text("my work")
    code, _, err = run("select", "pool.jsonl", "-b", 3, "-o", "a.jsonl", "--model", encoder)
    assert code == 2 and "--force" in err and (files / "a.jsonl").read_text() == "my work"
    assert run("select", "pool.jsonl", "-b", 3, "-o", "a.jsonl", "--model", encoder, "--force")[0] == 0


def test_notes_tell_of_copies_one_class_and_poor_coverage(run, files, encoder):
    records = lines(files / "pool.jsonl")
    for r in records:
        r["label"] = "same"
    (files / "pool.jsonl").write_text("".join(json.dumps({**r, "id": f"{r['id']}-{c}"}) + "\n" for r in records for c in range(2)))
    _, out, _ = run("select", "pool.jsonl", "-b", 6, "-o", "a.jsonl", "--model", encoder)
    assert "50 of 100 texts are copies" in out
    _, out, _ = run("prompts", "a.jsonl", "-t", "test.jsonl", "-o", "p.jsonl", "--model", encoder)
    assert "all 6 annotated examples have the label 'same'" in out


PROMPT_ERRORS = [
    (("--tokens", 3), "the item alone has"),
    (("--order", "sideways"), "ascending"),
    (("--centre", "all"), "none, own, examples"),
    (("--template", "{text}"), "has no {label}"),
    (("--template", "{tekst} {label}"), "'tekst'"),
    (("--label-field", "verdict"), "'verdict'"),
]


@pytest.mark.parametrize(("arguments", "message"), PROMPT_ERRORS, ids=lambda v: str(v)[:30])
def test_prompts_refuse_what_cannot_be_done(run, files, encoder, arguments, message):
    code, _, err = run("prompts", "pool.jsonl", "-t", "test.jsonl", "-o", "p.jsonl", "--model", encoder, *arguments)
    assert code == 2 and message in err and not (files / "p.jsonl").exists()


def test_options_have_the_types_of_their_fields():
    shelf = load_registry().selectors
    assert make_selector("subsa", shelf, ["lam=auto", "centre=false"]) == SubSA("auto", False)
    assert make_selector("subsa", shelf, ["lam=2"]) == SubSA(2.0)
    assert make_selector("vote-k", shelf, ["k=7"]).k == 7


@pytest.mark.parametrize("command", ["select", "prompts"])
def test_help_gives_an_example(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0 and f"qcore {command}" in out and "Example" in out


def test_options_of_other_peoples_selectors_may_have_no_default():
    @dataclass(frozen=True)
    class Near:
        point: int
        top: float | None = None

    assert make_selector("near", {"near": Near}, ["point=3", "top=0.5"]) == Near(3, 0.5)
    with pytest.raises(SpecError, match="wants a value for 'point'; pass --set point=VALUE"):
        make_selector("near", {"near": Near})
