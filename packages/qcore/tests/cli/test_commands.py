"""The smaller commands, and what every command has in common."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import qcore

RECIPES = Path(qcore.__file__).parent / "recipes"
COMMANDS = [
    ["quantize"], ["plan"], ["eval"], ["compare"], ["explain"], ["bench"], ["export"], ["lower"], ["methods"],
    ["recipes", "list"], ["recipes", "show"], ["plugins", "list"], ["plugins", "doctor"],
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help_with_an_example_and_json(run, command: list[str]) -> None:
    done = run(*command, "--help")
    assert done.code == 0 and f"qcore {' '.join(command)}" in done.out.split("Options:")[0] and "Example" in done.out and "--json" in done.out


def test_help_names_every_command(run) -> None:
    done = run("--help")
    assert done.code == 0
    for command in {c[0] for c in COMMANDS}:
        assert f"\n  {command} " in done.out
    assert "..." not in done.out.split("Commands:")[1]  # no description is cut off


@pytest.mark.parametrize("argv", [["nothing"], ["quantize"], ["quantize", "toy:", "--recipe"], ["plan", "toy:", "-r", "fp8", "--nope"]])
def test_a_wrong_command_line_ends_with_two(run, argv: list[str]) -> None:
    done = run(*argv)
    assert done.code == 2 and "Traceback" not in done.err and done.err


def test_help_is_quick_and_nothing_heavy_is_imported(tmp_path: Path) -> None:
    code = (
        "import resource, sys\n"
        "import qcore\n"
        "assert 'torch' not in sys.modules, 'import qcore'\n"
        "from qcore.cli import main\n"
        "assert main(['--help']) == 0\n"
        "bad = {'torch', 'numpy', 'transformers', 'safetensors', 'rich.table'} & set(sys.modules)\n"
        "assert not bad, bad\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_utime, file=sys.stderr)\n"
    )
    # the least of three: user time, not the clock, but a busy machine with a cold cache makes even that jump
    times = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        times.append(float(done.stderr.splitlines()[-1]))
        if times[-1] < 0.3:
            break
    assert min(times) < 0.3, times


# recipes and methods --------------------------------------------------------------------------------------------------------------------


def test_recipes_list_and_show(run) -> None:
    rows = run("recipes", "list", "--json").json
    assert {r["name"] for r in rows} == {file.stem for file in RECIPES.glob("*.toml")} >= {"w4a16-gptq", "mixed"}
    assert all(r["description"] and r["from"] == "qcore" for r in rows)
    assert "w4a16-gptq" in run("recipes", "list").out
    assert run("recipes", "show", "w4a16-gptq", "--json").json["solver"]["name"] == "gptq"


def test_a_shown_recipe_is_a_start_for_ones_own(run, tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text(run("recipes", "show", "w4a16-gptq").out)
    shown = run("recipes", "show", "my.toml", "--set", "solver.damp=0.5").out
    assert tomllib.loads(shown)["solver"]["damp"] == 0.5
    assert run("recipes", "show", "nothing").code == 2


def test_methods_lists_what_a_recipe_may_name(run) -> None:
    rows = run("methods", "solvers", "--json").json
    assert [(r["name"], r["what"], r["from"]) for r in rows] == [
        ("gptq", "Round one column at a time.", "qcore"),
        ("rtn", "Round to nearest.", "qcore"),
    ]
    assert rows[0]["options"] == ["damp=0.01"]
    assert "smoothquant" in run("methods").out
    wrong = run("methods", "solver")
    assert wrong.code == 2 and "no kind named 'solver'; did you mean 'solvers'?" in wrong.err


# plan -----------------------------------------------------------------------------------------------------------------------------------


def test_plan_shows_decisions_and_computes_nothing(run) -> None:
    done = run("plan", "toy:", "-r", "w4a16-gptq")
    assert done.code == 0
    for piece in (
        "1 × mix:weight",
        "64×64",
        "int4 per group 64",
        "gptq",
        "ct-pack",
        "left float: 1 × embed.weight",
        "note: its weights are random",
        "estimate: about",
    ):
        assert piece in done.out, piece
    assert "mix:weight" in run("plan", "toy:", "-r", "w4a16-gptq", "--verbose").out


def test_plan_as_json_ends_with_two_when_there_are_problems(run) -> None:
    good = run("plan", "toy:", "-r", "fp8", "--json")
    assert good.code == 0 and good.json["problems"] == [] and good.json["sites"][0]["packing"] == "ct-float"
    bad = run("plan", "toy:bare", "-r", "w4a16-gptq", "--set", "rules.0.granularity.size=48", "--json")
    assert bad.code == 2 and len(bad.json["problems"]) == 2
    told = run("plan", "toy:bare", "-r", "w4a16-gptq", "--set", "rules.0.granularity.size=48")
    assert told.code == 2 and "2 problems found before any computing" in told.err
