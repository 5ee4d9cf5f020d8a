"""`tools/new_plugin.py`: what it writes passes its own tests at once, and what it cannot write it refuses in a sentence."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KINDS = ("format", "transform", "solver", "adapter")


def new_plugin(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, ROOT / "tools/new_plugin.py", *args], capture_output=True, text=True)


def test_every_scaffold_passes_its_conformance_test_at_once(tmp_path: Path):
    for kind in KINDS:
        done = new_plugin(f"a-{kind}", "--kind", kind, "--into", str(tmp_path))
        assert done.returncode == 0, done.stderr
    # one process for all: what each folder's own pytest settings do, said by hand
    env = os.environ | {"PYTHONPATH": os.pathsep.join([*map(str, tmp_path.glob("*/src")), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", "-p", "no:cacheprovider", *map(str, tmp_path.iterdir())]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(KINDS)} passed" in done.stdout


def test_the_default_is_a_format_under_the_names_of_its_own(tmp_path: Path):
    done = new_plugin("log-two", "--into", str(tmp_path))
    folder = tmp_path / "qplug-log-two"
    assert str(folder) in done.stdout and "qcore plugins list" in done.stdout
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert project["name"] == "qplug-log-two" and project["entry-points"]["qcore"] == {"log-two": "qplug_log_two"}
    source = (folder / "src/qplug_log_two/log_two.py").read_text()
    assert "class LogTwo(" in source and 'name: ClassVar[str] = "log-two"' in source
    assert len([line for line in (folder / "tests/test_conformance.py").read_text().splitlines() if line]) == 4
    everything = "".join(f.read_text() for f in folder.rglob("*") if f.is_file())
    assert "scaffold" not in everything.lower() and "KIND" not in everything


@pytest.mark.parametrize("name", ["Ternary", "two words", "_x", "9lives", "a--b", "class", "é", "../up", ""])
def test_bad_name_is_refused(tmp_path: Path, name: str):
    done = new_plugin(name, "--into", str(tmp_path))
    assert done.returncode == 2 and repr(name) in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_existing_folder_is_left_alone(tmp_path: Path):
    (tmp_path / "qplug-ternary").mkdir()
    done = new_plugin("ternary", "--into", str(tmp_path))
    assert done.returncode == 2 and "exists already" in done.stderr
    assert list((tmp_path / "qplug-ternary").iterdir()) == []


def test_missing_target_and_unknown_kind_are_refused(tmp_path: Path):
    assert "not a folder" in new_plugin("ternary", "--into", str(tmp_path / "gone")).stderr
    done = new_plugin("ternary", "--kind", "novel", "--into", str(tmp_path))
    assert done.returncode == 2 and "choose from" in done.stderr
