"""A plug-in stands alone: what is wrong with one is said by name, and takes nothing from the others."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from qcore.errors import NotFound, PluginError
from qcore.plugins import KINDS, PluginWarning, Registry, Shelf

HEAD = "from qcore.plugins import hookimpl\n\n\n"


def brings(name: str, hook: str = "qcore_formats", mark: str = "@hookimpl", args: str = "") -> str:
    return f"{HEAD}class Thing:\n    name = {name!r}\n\n\n{mark}\ndef {hook}({args}):\n    return [Thing]\n"


# one way to be broken → the status, and words that its error must hold
BROKEN = {
    "import error": ("import not_there_at_all", "failed", ["ModuleNotFoundError", "not_there_at_all"]),
    "syntax error": ("def", "failed", ["SyntaxError"]),
    "exit at import": ("raise SystemExit(3)", "failed", ["SystemExit"]),
    "misspelt hook": (brings("other", hook="qcore_format"), "failed", ["qcore_format", "did you mean qcore_formats"]),
    "unmarked hook": (brings("other", mark="#"), "failed", ["qcore_formats", "@hookimpl"]),
    "unknown argument": (brings("other", args="model"), "failed", ["qcore_formats", "model"]),
    "newer API": (f"QCORE_PLUGIN_API = '2.0'\n{brings('other')}", "incompatible", ["2.0", "upgrade qcore"]),
    "API is no version": (f"QCORE_PLUGIN_API = 'new'\n{brings('other')}", "failed", ["'new'", "QCORE_PLUGIN_API"]),
    "raising hook": (
        f"{HEAD}@hookimpl\ndef qcore_formats():\n    import not_there_at_all\n",
        "failed",
        ["qcore_formats", "not_there_at_all"],
    ),
    "exit in a hook": (f"{HEAD}@hookimpl\ndef qcore_formats():\n    raise SystemExit\n", "failed", ["qcore_formats", "SystemExit"]),
    "class without name": (brings("other").replace("name =", "title ="), "failed", ["Thing", "name"]),
    "instance for a class": (brings("other").replace("[Thing]", "[Thing()]"), "failed", ["return the class"]),
    "hook returns nothing": (
        brings("other").replace("return [Thing]", "pass"),
        "failed",
        ["qcore_formats", "returned None; return a list"],
    ),
    "hook returns the class": (brings("other").replace("[Thing]", "Thing"), "failed", ["Thing", "return a list of classes"]),
    "hook returns a name": (brings("other").replace("[Thing]", "'other'"), "failed", ["'other'", "return a list of classes"]),
    "hook returns a dict": (brings("other").replace("[Thing]", "{'other': Thing}"), "failed", ["return a list of classes"]),
    "error in a hook of its own": (brings("other").replace("return [Thing]", "return [Thing.nothing]"), "failed", ["(qplug_broken.py, line 10)"]),
    "error at import of its own": ("x = 1\ny = x.z\n", "failed", ["AttributeError", "(qplug_broken.py, line 2)"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_plugin_is_said_by_name_and_the_others_work(install, load, case):
    source, status, words = BROKEN[case]
    install("qplug-broken", source)
    install("qplug-ternary")
    with pytest.warns(PluginWarning, match=r"plug-in 'broken' \(qplug-broken 0.1\) did not load: .*`qcore plugins doctor`") as caught:
        registry = load()
        assert set(registry.formats) == {"int", "ternary"}
    assert len(caught) == 1
    assert "Traceback" not in str(caught[0].message) and "\n" not in str(caught[0].message)
    broken, ternary = registry.plugins
    assert (broken.name, broken.status, ternary.status) == ("broken", status, "ok")
    assert all(word in broken.error for word in words), broken.error
    with pytest.raises(NotFound, match=r"plug-in 'broken'.*did not load: .*`qcore plugins doctor`"):
        registry.formats["other"]


def test_an_entry_point_that_points_nowhere_is_no_missing_library(install, load, tmp_path: Path):
    install("qplug-ternary")
    install("qplug-broken", module="qplug_elsewhere")
    (tmp_path / "site" / "qplug_elsewhere.py").unlink()
    with pytest.warns(PluginWarning, match='its entry point broken = "qplug_elsewhere" names a module that is not there'):
        registry = load()
    assert set(registry.formats) == {"int", "ternary"}


def test_libraries_that_the_registration_imports_are_recorded(install, load, tmp_path: Path, monkeypatch):
    (tmp_path / "site" / "timm.py").write_text("")
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    install("qplug-heavy", "import timm\n" + brings("heavy"))
    install("qplug-light")
    assert [r.heavy for r in load().plugins] == [("timm",), ()]


def test_plugin_that_loads_is_recorded_whole(install, load):
    install("qplug-ternary", version="1.2")
    (record,) = load().plugins
    assert (record.name, record.distribution, record.version, record.module) == ("ternary", "qplug-ternary", "1.2", "qplug_ternary")
    assert (record.status, record.api, record.hooks, record.error) == ("ok", "1", ("qcore_formats",), "")


def test_failed_record_keeps_the_traceback(install, load):
    install("qplug-broken", "import not_there_at_all")
    with pytest.warns(PluginWarning):
        (record,) = load().plugins
    assert record.traceback.startswith("Traceback") and "qplug_broken.py" in record.traceback


def test_shelf_knows_origins_and_builtins_come_first(install, load):
    install("qplug-ternary")
    formats = load().formats
    assert list(formats.origin.items()) == [("int", "qcore"), ("ternary", "qplug-ternary")]
    assert formats["ternary"].__name__ == "Ternary"
    assert formats[" TERNARY "] is formats["ternary"]


def test_shelf_keeps_the_laws_of_a_mapping(install, load):
    install("qplug-ternary")
    formats = load().formats
    assert all(name in formats and formats.get(name) is formats[name] for name in formats)
    assert len(formats) == len(list(formats)) == 2
    assert "none such" not in formats and formats.get("none such") is None and 3 not in formats


def test_missing_name_says_what_is_near_what_there_is_and_what_to_do(install, load):
    install("qplug-ternary")
    with pytest.raises(NotFound) as e:
        load().formats["ternery"]
    for word in ("no format named 'ternery'", "did you mean 'ternary'", "int (qcore)", "ternary (qplug-ternary)", "qcore plugins list"):
        assert word in str(e.value)


def test_second_distribution_of_a_name_is_a_duplicate_naming_both(install, load):
    install("qplug-b", brings("two"), name="same")
    install("qplug-a", brings("one"), name="same")
    with pytest.warns(PluginWarning, match="qplug-b 0.1.*qplug-a 0.1"):
        registry = load()
    assert [(r.distribution, r.status) for r in registry.plugins] == [("qplug-a", "ok"), ("qplug-b", "duplicate")]
    assert set(registry.formats) == {"int", "one"}


def test_duplicate_is_settled_by_naming_a_distribution(install, load, monkeypatch):
    install("qplug-a", brings("one"), name="same")
    install("qplug-b", brings("two"), name="same")
    monkeypatch.setenv("QCORE_PLUGINS", "qplug-b")
    registry = load()
    assert [(r.distribution, r.status) for r in registry.plugins] == [("qplug-a", "disabled"), ("qplug-b", "ok")]
    assert set(registry.formats) == {"int", "two"}


TWO = brings("{}").replace("[Thing]", "[Thing, Other]") + "\n\nclass Other:\n    name = 'other'\n"


def test_clash_of_two_plugins_is_refused_naming_both_and_spares_the_rest(install, load):
    install("qplug-a", brings("ternary"))
    install("qplug-b", TWO.replace("{}", "TERNARY"))
    formats = load().formats
    with pytest.raises(PluginError, match="format 'ternary' is given by qplug-a and by qplug-b"):
        formats["ternary"]
    with pytest.raises(PluginError):
        formats.get("ternary")
    assert set(formats) == {"int", "other"}
    assert set(formats.conflicts) == {"ternary"}


def test_a_plugin_takes_no_builtin_away(install, load):
    install("qplug-b", TWO.replace("{}", "INT"))
    registry = load()
    with pytest.warns(PluginWarning, match="qplug-b brings a format 'int', which qcore has already; qcore's own is used"):
        formats = registry.formats
    assert set(formats) == {"int", "other"} and formats.origin["int"] == "qcore"
    assert formats.refused == {"int": ("qplug-b",)} and not formats.conflicts


def test_three_of_one_name_are_all_named():
    shelf = Shelf("formats", list)
    for origin, thing in [("a", int), ("b", float), ("c", str)]:
        shelf.add("x", thing, origin)
    assert shelf.conflicts == {"x": ("a", "b", "c")}


def test_the_same_class_from_two_plugins_is_no_clash(install, load):
    install("qplug-a", brings("ternary"))
    install("qplug-b", f"{HEAD}from qplug_a import Thing\n\n\n@hookimpl\ndef qcore_formats():\n    return [Thing]\n")
    assert load().formats.origin["ternary"] == "qplug-a"


def test_one_hook_that_raises_leaves_the_plugins_other_hooks(install, load):
    install("qplug-half", brings("half") + "\n\n@hookimpl\ndef qcore_solvers():\n    raise RuntimeError('no')\n")
    registry = load()
    assert "half" in registry.formats
    with pytest.warns(PluginWarning, match="in qcore_solvers, RuntimeError: no"):
        assert not registry.solvers
    assert registry.plugins[0].status == "failed" and "half" in registry.formats


def test_shelves_open_one_at_a_time(install, load):
    install("qplug-lazy", brings("lazy") + "\n\n@hookimpl\ndef qcore_solvers():\n    raise RuntimeError('too early')\n")
    registry = load()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert registry.formats is registry.formats and "lazy" in registry.formats


@pytest.mark.parametrize(
    ("value", "loaded"),
    [(None, {"a", "b"}), ("", set()), (" ", set()), ("a", {"a"}), ("qplug-a", {"a"}), ("Qplug_A, b", {"a", "b"})],
)
def test_variable_restricts_what_loads(install, load, monkeypatch, value, loaded):
    install("qplug-a", brings("one"))
    install("qplug-b", brings("two"))
    if value is not None:
        monkeypatch.setenv("QCORE_PLUGINS", value)
    registry = load()
    assert {r.name for r in registry.plugins if r.status == "ok"} == loaded
    assert {r.name for r in registry.plugins if r.status == "disabled"} == {"a", "b"} - loaded
    assert "int" in registry.formats and len(registry.formats) == 1 + len(loaded)
    if loaded == {"a"}:
        with pytest.raises(NotFound, match="QCORE_PLUGINS leaves out b"):
            registry.formats["two"]


def test_disabled_plugin_is_not_imported(install, load, monkeypatch):
    install("qplug-a", "raise SystemExit('imported')")
    monkeypatch.setenv("QCORE_PLUGINS", "")
    load()
    assert "qplug_a" not in sys.modules


def test_unknown_name_in_the_variable_is_warned_of(install, load, monkeypatch):
    install("qplug-a", brings("one"))
    monkeypatch.setenv("QCORE_PLUGINS", "a,ghost")
    with pytest.warns(PluginWarning, match="ghost.*there is: a"):
        assert load().unknown == ("ghost",)


def test_unreadable_metadata_of_one_distribution_hides_no_other(install, load, tmp_path: Path):
    install("qplug-ternary")
    bad = tmp_path / "site" / "a_bad-1.dist-info"
    bad.mkdir()
    (bad / "METADATA").write_text("Name: a-bad\nVersion: 1\n")
    (bad / "entry_points.txt").write_text("[qcore]\nno equals sign\n")
    with pytest.warns(PluginWarning, match="a_bad-1.dist-info"):
        registry = load()
    assert "ternary" in registry.formats


def test_hook_of_a_later_qcore_may_be_marked_optional(install, load):
    later = "\n\n@hookimpl(optionalhook=True)\ndef qcore_dreams():\n    return []\n"
    install("qplug-later", brings("later") + later)
    (record,) = load().plugins
    assert record.status == "ok" and record.hooks == ("qcore_formats",)


def test_recipes_are_named_by_their_files(install, load, tmp_path: Path):
    folder = tmp_path / "recipes"
    folder.mkdir()
    for name in ("w4a16.toml", "w8a8.toml", "notes.md"):
        (folder / name).touch()
    (tmp_path / "alone.toml").touch()
    install("qplug-r", f"{HEAD}@hookimpl\ndef qcore_recipes():\n    return [{str(folder)!r}, {str(tmp_path / 'alone.toml')!r}]\n")
    recipes = load().recipes
    assert set(recipes) == {"w4a16", "w8a8", "alone"}
    assert recipes["w8a8"] == folder / "w8a8.toml"


def test_recipe_folder_that_did_not_ship_is_an_error(install, load, tmp_path: Path):
    install("qplug-r", f"{HEAD}@hookimpl\ndef qcore_recipes():\n    return [{str(tmp_path / 'gone')!r}]\n")
    registry = load()
    with pytest.warns(PluginWarning, match=r"there is no recipe at .*gone"):
        assert not registry.recipes


def test_commands_are_functions_and_typer_apps(install, load):
    source = "import typer\n\napp = typer.Typer(name='zoo')\n\n\ndef show_links():\n    pass\n\n\n"
    install("qplug-c", HEAD + source + "@hookimpl\ndef qcore_commands():\n    return [app, show_links]\n")
    assert set(load().commands) == {"zoo", "show-links"}


def test_typer_app_without_a_name_is_refused(install, load):
    install("qplug-c", f"{HEAD}import typer\n\n\n@hookimpl\ndef qcore_commands():\n    return [typer.Typer()]\n")
    registry = load()
    with pytest.warns(PluginWarning, match="typer.Typer"):
        assert not registry.commands


def test_every_hook_has_a_shelf_and_a_meaning():
    from qcore.plugins import hookspecs

    assert set(KINDS) == set(Registry.__annotations__)
    assert all(getattr(hookspecs, f"qcore_{kind}").__doc__ for kind in KINDS)
    assert " ".join(KINDS) == (
        "formats observers transforms solvers block_solvers allocators selectors modules packings kernels adapters "
        "sources calibrations tasks exporters lowerings recipes commands"
    )


def test_the_hook_marker_is_cheap_to_import():
    code = "import sys; from qcore.plugins import hookimpl; print({'torch', 'numpy', 'qcore.plugins.registry'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"
