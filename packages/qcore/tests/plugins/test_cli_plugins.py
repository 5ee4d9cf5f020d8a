"""`qcore plugins list` and `doctor`: what a person and what a program reads."""

import json
import subprocess
import sys

import pytest
import typer
from qcore.cli.plugins import app, mount_commands
from qcore.plugins import PluginWarning
from typer.testing import CliRunner

HEAD = "from qcore.plugins import hookimpl\n\n\n"
TERNARY = "class Ternary:\n    name = 'ternary'\n\n    def encode(self, x, params):\n        pass\n\n    decode = encode\n\n\n"
TERNARY += "@hookimpl\ndef qcore_formats():\n    return [Ternary]\n"
RAISING = f"{HEAD}@hookimpl\ndef qcore_formats():\n    raise RuntimeError('not today')\n"

pytestmark = pytest.mark.filterwarnings("error")


def run(*args: str):
    return CliRunner().invoke(app, args, env={"COLUMNS": "200"})


def test_list_is_json_for_programs(install, load):
    install("qplug-broken", "import not_there_at_all")
    install("qplug-ternary")
    result = run("list", "--json")
    assert result.exit_code == 0
    broken, ternary = json.loads(result.stdout)
    assert (broken["name"], broken["status"], ternary["status"], ternary["hooks"]) == ("broken", "failed", "ok", ["qcore_formats"])
    assert "not_there_at_all" in broken["error"] and "traceback" not in broken


def test_list_calls_no_hook(install, load):
    install("qplug-late", RAISING)
    assert json.loads(run("list", "--json").stdout)[0]["status"] == "ok"


def test_what_a_plugin_prints_while_it_loads_stays_out_of_the_json(install, load):
    install("qplug-loud", f"{HEAD}print('hello')\n\n\n@hookimpl\ndef qcore_formats():\n    print('again')\n    return []\n")
    result = run("doctor", "--json")
    assert json.loads(result.stdout)["ok"]
    assert "hello" in result.stderr and "again" in result.stderr


def test_list_shows_a_table(install, load):
    install("qplug-broken", "import not_there_at_all")
    install("qplug-ternary")
    out = run("list").stdout
    assert "formats" in out and "failed" in out and "No module named 'not_there_at_all'" in out


def test_nothing_installed_is_no_error(load):
    assert run("list").exit_code == run("doctor").exit_code == 0
    assert json.loads(run("list", "--json").stdout) == []


def test_doctor_is_content_with_good_plugins(install, load):
    install("qplug-ternary", HEAD + TERNARY)
    result = run("doctor", "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 0 and report["ok"] and report["problems"] == []
    assert report["counts"]["formats"] == 2
    assert "all plug-ins are well" in run("doctor").stdout


def test_doctor_lists_every_trouble_and_what_to_do(install, load, monkeypatch):
    install("qplug-raising", RAISING)
    install("qplug-int", HEAD + "class Int:\n    name = 'int'\n\n\n@hookimpl\ndef qcore_formats():\n    return [Int]\n")
    install("qplug-new", "QCORE_PLUGIN_API = '9'")
    install("qplug-other-new", "", name="new")
    monkeypatch.setenv("QCORE_PLUGINS", "raising,int,new,ghost")
    result = run("doctor", "--json")
    problems = json.loads(result.stdout)["problems"]
    assert result.exit_code == 1 and len(problems) == 5
    whole = "\n".join(p["what"] for p in problems)
    for words in ("format 'int' of qplug-int is left out: qcore has one", "RuntimeError: not today", "API 9", "taken by qplug-new", "'ghost'"):
        assert words in whole
    assert all(p["do"] for p in problems)
    assert "Traceback" not in run("doctor").stdout


def test_doctor_reads_the_recipes(install, load, tmp_path):
    (tmp_path / "bad.toml").write_text("this is = = not TOML")
    install("qplug-r", f"{HEAD}@hookimpl\ndef qcore_recipes():\n    return [{str(tmp_path / 'bad.toml')!r}]\n")
    result = run("doctor", "--json")
    assert result.exit_code == 1 and "bad.toml" in json.loads(result.stdout)["problems"][0]["what"]


def test_commands_of_plugins_are_mounted_and_never_replace_one(install, load):
    source = "import typer\n\nzoo = typer.Typer(name='zoo')\n\n\n@zoo.command()\ndef show():\n    print('animals')\n\n\n"
    source += "def plan():\n    print('theirs')\n\n\ndef count_links():\n    print('12 links')\n\n\n"
    install("qplug-c", HEAD + source + "@hookimpl\ndef qcore_commands():\n    return [zoo, plan, count_links]\n")
    root = typer.Typer()
    root.command()(lambda: None)

    @root.command()
    def plan() -> None:
        print("ours")

    with pytest.warns(PluginWarning, match="qplug-c brings a command 'plan'"):
        mount_commands(root, load())
    assert "ours" in CliRunner().invoke(root, ["plan"]).stdout
    assert "12 links" in CliRunner().invoke(root, ["count-links"]).stdout
    assert "animals" in CliRunner().invoke(root, ["zoo", "show"]).stdout


def test_listing_imports_no_torch():
    code = "import sys, qcore.cli.plugins as p; p.list_plugins(as_json=True); assert 'torch' not in sys.modules, 'torch'"
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


def brings(kind: str, body: str) -> str:
    return f"{HEAD}class Thing:\n    name = 'thing'\n{body}\n\n@hookimpl\ndef qcore_{kind}():\n    return [Thing]\n"


COMMAND = f"{HEAD}def f(x: int | str):\n    pass\n\n\n@hookimpl\ndef qcore_commands():\n    return [f]\n"
SOURCE = "    def matches(self, uri):\n        return {}\n\n    def load(self, uri):\n        pass\n"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (brings("formats", "    def decode(self, codes, params):\n        pass\n"), ["its class Thing has no encode()", "docs/add"]),
        (HEAD + TERNARY.replace("'ternary'", "'Ternary'"), ["calls itself 'Ternary'", "lower case"]),
        (brings("sources", SOURCE.format("True")), ["matches() is True for an address of another kind", "QCORE_PLUGINS"]),
        (brings("sources", SOURCE.format("uri.width")), ["matches() raises AttributeError"]),
        (brings("sources", SOURCE.format("False") + "\n    def __init__(self, root):\n        pass\n"), ["Thing() raises TypeError", "a default"]),
        (
            HEAD + "def plan(model: str):\n    pass\n\n\n@hookimpl\ndef qcore_commands():\n    return [plan]\n",
            ["command 'plan' of qplug-t is left out"],
        ),
        (
            HEAD + "def f(x: int | str):\n    pass\n\n\n@hookimpl\ndef qcore_commands():\n    return [f]\n",
            ["command 'f' of qplug-t", "typer cannot build it"],
        ),
    ],
)
def test_doctor_looks_at_what_is_brought(install, load, source, words):
    install("qplug-t", source)
    result = run("doctor", "--json")
    (problem,) = json.loads(result.stdout)["problems"]
    assert result.exit_code == 1 and all(word in problem["what"] + problem["do"] for word in words), problem


def test_doctor_names_a_recipe_that_names_what_is_not_there(install, load, tmp_path):
    (tmp_path / "mine.toml").write_text('solver = "no-such"\n\n[[rules]]\nsites = "*"\nfloat = true\n')
    install("qplug-r", f"{HEAD}@hookimpl\ndef qcore_recipes():\n    return [{str(tmp_path / 'mine.toml')!r}]\n")
    (problem,) = json.loads(run("doctor", "--json").stdout)["problems"]
    assert "mine.toml cannot be used: recipe 'mine', solver: no solver named 'no-such'" in problem["what"]


def test_doctor_says_what_makes_every_command_wait(install, load, tmp_path, monkeypatch):
    (tmp_path / "site" / "timm.py").write_text("")
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    install("qplug-heavy", "import timm\n")
    (problem,) = json.loads(run("doctor", "--json").stdout)["problems"]
    assert "imports timm when it is registered" in problem["what"] and "inside its hooks" in problem["do"]


def test_a_command_that_typer_cannot_build_leaves_the_others(install, load):
    source = "def good():\n    print('done')\n\n\ndef bad(x: int | str):\n    pass\n\n\n"
    install("qplug-c", HEAD + source + "@hookimpl\ndef qcore_commands():\n    return [good, bad]\n")
    root = typer.Typer()
    root.command("other")(lambda: None)
    with pytest.warns(PluginWarning, match="'bad' that cannot be built"):
        mount_commands(root, load())
    assert "done" in CliRunner().invoke(root, ["good"]).stdout


def test_a_recipe_that_is_no_toml_leaves_the_list_of_the_others(install, load, tmp_path):
    from qcore.cli import recipes

    (tmp_path / "bad.toml").write_text("this is = = not TOML")
    (tmp_path / "good.toml").write_text('description = "a good one"')
    install("qplug-r", f"{HEAD}@hookimpl\ndef qcore_recipes():\n    return [{str(tmp_path)!r}]\n")
    result = CliRunner().invoke(recipes.app, ["list", "--json"])
    rows = {row["name"]: row["description"] for row in json.loads(result.stdout)}
    assert rows["good"] == "a good one" and "cannot be read" in rows["bad"]
