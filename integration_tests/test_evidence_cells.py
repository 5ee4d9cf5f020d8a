"""`tools/bench/cells.py`: cells that are missing are computed, written whole, and not computed again."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[1] / "tools" / "bench"


@pytest.fixture
def cells(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCH)
    import cells

    yield cells
    for name in ("cells", "evidence"):
        sys.modules.pop(name, None)


@dataclass(frozen=True)
class Cell:
    name: str
    folder: str
    recipe: str = "w4a16-gptq"

    @property
    def file(self) -> Path:
        return Path(self.folder) / f"{self.name}.json"


def test_missing_cells_are_computed_once(cells: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    matrix = [Cell(name, str(tmp_path)) for name in ("one", "two", "bad", "three")]
    asked, finished = [], []

    def measure(cell: Cell) -> dict[str, Any]:
        asked.append(cell.name)
        if cell.name == "bad":
            raise subprocess.CalledProcessError(1, "bad", stderr="the reason")
        return {"scores": {"kl": 0.5}}

    def run(*argv: str) -> int:
        monkeypatch.setattr(sys, "argv", ["evidence_x.py", *argv])
        return cells.compute("What it is.", matrix, measure, lambda result: f"KL {result['scores']['kl']}", finished.append)

    assert run("--list") == 0 and capsys.readouterr().out.split() == ["one", "two", "bad", "three"]
    assert not asked and not finished
    assert run("--only", "t", "--limit", "1") == 0 and asked == ["two"] and len(finished) == 1
    assert run() == 1 and asked == ["two", "one", "bad", "three"]
    said = capsys.readouterr().err
    assert "bad: failed\nthe reason" in said and "three: KL 0.5" in said
    kept = json.loads((tmp_path / "one.json").read_text())
    assert kept["cell"]["name"] == "one" and kept["scores"] == {"kl": 0.5} and kept["code"]
    assert any(f.endswith("w4a16-gptq.toml") for f in kept["files"])
    assert not list(tmp_path.glob("*.part"))
    asked.clear()
    assert run() == 1 and asked == ["bad"]
    assert run("--table") == 0 and asked == ["bad"]


def test_words_decide_no_number_and_code_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCH)
    from decisive import decisive

    def of(name: str, text: str) -> bytes:
        (tmp_path / name).write_text(text)
        return decisive(tmp_path / name)

    plain = of("a.py", "def f(x: int) -> int:\n    if x < 0:\n        raise ValueError('below 0')\n    return x + 1\n")
    told = of(
        "a.py",
        '"""What it is."""\n\n\ndef f(x: int) -> int:\n    """One more."""\n    if x < 0:  # no\n'
        '        raise ValueError(f"{x} is below 0; give 0 or more") from None\n    return (x + 1)\n',
    )
    assert plain == told
    for other in ("x + 2", "x - 1", "'x'"):
        assert of("a.py", f"def f(x: int) -> int:\n    if x < 0:\n        raise ValueError('below 0')\n    return {other}\n") != plain
    assert of("a.py", "def f(x: int) -> int:\n    if x < 0:\n        raise KeyError('below 0')\n    return x + 1\n") != plain
    assert of("a.py", "def f(x: int) -> int:\n    return x + 1\n") != plain
    recipe = of("r.toml", 'description = "one"\nsteps = 50\n')
    assert of("r.toml", '# why\ndescription = "two"\nsteps = 50  # so many\n') == recipe != of("r.toml", "steps = 51\n")
    assert of("data.json", "{}") == b"{}"


def test_an_edit_that_was_shown_to_change_nothing_leaves_the_key_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCH)
    import decisive

    file, same = tmp_path / "a.py", tmp_path / "same.json"
    monkeypatch.setattr(decisive, "SAME", same)
    hashes = []
    for text in ("x = 1", "x = 2 - 1", "x = 3 - 2", "x = 4"):
        file.write_text(text)
        hashes.append(decisive.standing(file))
    assert len(set(hashes)) == 4
    edits = [{"files": {"a.py": [hashes[0], hashes[1]]}}, {"files": {"a.py": [hashes[0], hashes[2]]}}]
    same.write_text(json.dumps(edits))
    for text, stands in (("x = 1", 0), ("x = 2 - 1", 0), ("x = 3 - 2", 0), ("x = 4", 3)):
        file.write_text(text)
        assert decisive.standing(file) == hashes[stands]


def test_a_witness_with_another_number_stops_an_edit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCH)
    from witness import differences

    cell = {"scores": {"kl": 0.5, "each": [1, 2]}, "seconds": 3.0, "code": "a", "memory": {"peak_bytes": 4}}
    assert not differences(cell, cell | {"seconds": 4.0, "code": "b", "memory": {}})
    assert differences(cell, cell | {"scores": {"kl": 0.5000000001, "each": [1, 2]}}) == ["/scores/kl: 0.5 before, 0.5000000001 now"]
    assert differences(cell, cell | {"scores": {"kl": 0.5, "each": [1]}}) == ["/scores/each/1: 2 before, nothing now"]
    assert differences(cell, cell | {"note": None}) == ["/note: nothing before, None now"]
