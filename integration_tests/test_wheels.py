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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

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
    variables: dict[str, str] = field(default_factory=dict)

    def run(self, *command: str, ok: bool = True) -> subprocess.CompletedProcess[str]:
        """One of the environment's own commands, in a fresh process that sees nothing of this one's paths."""
        env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "QCORE_", "VIRTUAL_ENV"))} | self.variables
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
    assert set(records) == {"outside", "broken", "llm", "illm", "gsq", "zoo"}
    assert {name: r["status"] for name, r in records.items()} == {name: "failed" if name == "broken" else "ok" for name in records}
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


def test_the_outside_plugin_keeps_the_published_contracts(installed: Environment):
    installed.python("""
        import torch
        from qcore.model.plain import PlainMLP
        from qcore.testing import check_format, check_module, check_solver, check_transform
        from qcore.testing.models import tiny_mlp
        from qcore.numbers import PerGroup, QuantSpec
        from qcore.solvers import GPTQ
        from qplug_outside.geometric import Geometric
        from qplug_outside.spread import Reflect, Spread

        check_format(Geometric(4))
        reflect = Reflect(16)
        reflect.normal.normal_()
        check_module(reflect, torch.randn(3, 16))
        check_transform(Spread(), PlainMLP(), tiny_mlp(), [torch.randn(4, 16)], modules={"reflect": Reflect})
        check_solver(GPTQ(), QuantSpec(format=Geometric(4), granularity=PerGroup(32)))
    """)


@pytest.fixture(scope="module")
def quantized(installed: Environment) -> dict[str, Any]:
    """What one process quantized with the outside plug-in's format and transform, and saved."""
    return json.loads(
        installed.python("""
        import json

        import torch
        from qcore import QuantSpec, Recipe, Rule, load_registry, quantize_model, save
        from qcore.numbers import PerChannel
        from qcore.pipeline import load_in_memory
        from qcore.testing.models import tiny_mlp
        from safetensors.torch import save_file

        registry = load_registry()
        spec = QuantSpec(format=registry.formats["geometric"](4), granularity=PerChannel(0))
        recipe = Recipe(rules=(Rule("*:weight", spec),), solver=registry.solvers["rtn"](), transforms=(registry.transforms["spread"](),))
        model = tiny_mlp()
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            exact = model(x)
            done = quantize_model(load_in_memory(model), recipe, registry=registry)
            y = done.model(x)
        manifest = save(done.model, "checkpoint", adapter=done.adapter.name, registry=registry)
        save_file({"x": x, "y": y}, "expected.safetensors")
        print(json.dumps({"error": float((y - exact).norm() / exact.norm()), "manifest": manifest.to_dict()}))
    """)
    )


RELOAD = """
    from qcore import load
    from qcore.testing.models import tiny_mlp
    from safetensors.torch import load_file

    expected = load_file("expected.safetensors")
    model = load("checkpoint", skeleton=tiny_mlp(seed=1))  # other weights: what counts comes from the checkpoint
    y = model(expected["x"])
    print(float((y - expected["y"]).abs().max()), *[type(m).__name__ for m in model.modules()])
"""


def test_a_model_is_quantized_with_the_outside_format_and_transform(quantized: dict[str, Any]):
    assert 0 < quantized["error"] < 0.3  # 4 bits per weight on three layers of Gaussian weights
    types = [entry["type"] for entry in quantized["manifest"]["modules"].values()]
    assert types.count("reflect") == 3
    origins = quantized["manifest"]["origins"]
    assert origins["formats"]["geometric"] == origins["modules"]["reflect"] == "qplug-outside"


def test_its_checkpoint_reloads_in_a_fresh_process(installed: Environment, quantized: dict[str, Any]):
    difference, *modules = installed.python(RELOAD).split()
    assert float(difference) == 0
    assert modules.count("Reflect") == 3


def test_without_the_plugin_its_checkpoint_names_what_to_install(installed: Environment, quantized: dict[str, Any]):
    done = replace(installed, variables={"QCORE_PLUGINS": ""}).run("python", "-c", textwrap.dedent(RELOAD), ok=False)
    assert done.returncode != 0
    assert "CheckpointError" in done.stderr and "qplug-outside" in done.stderr
