"""What a user gets: built wheels in a fresh environment, with a plug-in from outside the workspace and a broken one.

The environment holds the wheels and, behind them on the path, the running environment's third-party packages (torch and its company are too large to
install again): a folder of links to all of them but ours, so that nothing of this repository's sources can be imported by accident.
"""

import json
import os
import subprocess
import sys
import sysconfig
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HERE = Path(__file__).parent / "plugins"
DISTRIBUTIONS = {
    "qcore-kernels": ROOT / "kernels",
    "qcore": ROOT / "packages/qcore",
    "qzoo": ROOT / "packages/qzoo",
    "qplug-llm": ROOT / "packages/qplug-llm",
    "qplug-outside": HERE / "qplug-outside",
    "qplug-broken": HERE / "qplug-broken",
}
OURS = ("qcore", "qkernels", "qplug", "qzoo")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@dataclass(frozen=True)
class Environment:
    folder: Path
    cwd: Path

    def run(self, *command: str, ok: bool = True) -> subprocess.CompletedProcess[str]:
        """One of the environment's own commands, in a fresh process that sees nothing of this one's paths."""
        env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "QCORE_", "VIRTUAL_ENV"))} | {"COLUMNS": "200"}
        done = subprocess.run([self.folder / "bin" / command[0], *command[1:]], cwd=self.cwd, env=env, capture_output=True, text=True)
        assert not ok or done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def python(self, source: str) -> str:
        return self.run("python", "-c", textwrap.dedent(source)).stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    tmp = tmp_path_factory.mktemp("wheels")
    dist, venv, others, cwd = tmp / "dist", tmp / "venv", tmp / "others", tmp / "cwd"
    for source in DISTRIBUTIONS.values():
        uv("build", "--wheel", "--out-dir", str(dist), str(source))
    uv("venv", "--python", sys.executable, str(venv))
    wheels = sorted(map(str, dist.glob("*.whl")))
    assert len(wheels) == len(DISTRIBUTIONS)
    uv("pip", "install", "--offline", "--no-deps", "--python", str(venv / "bin/python"), *wheels)
    others.mkdir()
    cwd.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.lower().startswith(OURS) and entry.suffix != ".pth":
            (others / entry.name).symlink_to(entry)
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "others.pth").write_text(f"{others}\n")
    return Environment(venv, cwd)


def uv(*args: str) -> None:
    done = subprocess.run(["uv", *args], capture_output=True, text=True, env={k: v for k, v in os.environ.items() if k != "VIRTUAL_ENV"})
    assert done.returncode == 0, f"uv {' '.join(args)}\n{done.stderr}"


def test_the_wheels_are_what_is_imported(installed: Environment):
    where = installed.python("import qcore, qkernels, qzoo, qplug_llm; print(*[m.__file__ for m in (qcore, qkernels, qzoo, qplug_llm)], sep='\\n')")
    assert all(Path(line).is_relative_to(installed.folder) for line in where.splitlines())


def test_list_tells_the_good_from_the_broken(installed: Environment):
    records = {r["name"]: r for r in json.loads(installed.run("qcore", "plugins", "list", "--json").stdout)}
    assert set(records) == {"outside", "broken", "llm", "zoo"}
    assert {name: r["status"] for name, r in records.items()} == {"outside": "ok", "broken": "failed", "llm": "ok", "zoo": "ok"}
    assert (records["outside"]["distribution"], records["outside"]["version"]) == ("qplug-outside", "0.3.1")
    assert records["outside"]["hooks"] == ["qcore_formats", "qcore_modules", "qcore_transforms"]
    assert "a_dependency_that_went_missing" in records["broken"]["error"]


def test_doctor_ends_with_1_and_blames_the_broken_one_alone(installed: Environment):
    done = installed.run("qcore", "plugins", "doctor", "--json", ok=False)
    report = json.loads(done.stdout)
    assert done.returncode == 1
    assert len(report["problems"]) == 1 and "'broken'" in report["problems"][0]["what"]


def test_a_broken_plugin_is_a_warning_of_one_line(installed: Environment):
    done = installed.run("python", "-c", "from qcore.plugins import load_registry; load_registry(); load_registry()")
    assert done.stderr.count("plug-in 'broken' (qplug-broken 0.0.1) did not load") == 1
    assert "Traceback" not in done.stderr
