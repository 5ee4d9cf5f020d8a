"""`qcore nvr`, whole."""

import json
from xml.etree import ElementTree

import numpy as np
import pytest
from qcore.cli import main
from qplug_hardware.nvr.models import MODELS
from qplug_hardware.nvr.run import settings_from


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(*argv):
        code = main(["nvr", *map(str, argv)])
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return code, said.out, said.err

    return call


SMALL = ("--synthetic", "zipf", "--rows", 300, "--gathers", 400)


def test_tables_for_people(run):
    code, out, _ = run(*SMALL, "--depths", "16,64")
    assert code == 0 and "400 gathers" in out and "depth" in out
    assert all(f"│ {m} " in out for m in MODELS)


def test_json_for_programs(run):
    code, out, _ = run(*SMALL, "--models", "imp,nvr", "--depths", "64,16", "--set", "runahead.chains=4", "--json")
    told = json.loads(out)
    assert code == 0 and told["trace"]["gathers"] == 400 and list(told["models"]) == ["imp", "nvr"]
    assert told["settings"]["runahead"]["chains"] == 4
    assert list(told["depths"]["nvr"]) == ["16", "64"] and told["models"]["nvr"]["speedup"] > 1


def test_the_plot_shows_every_model_and_depth(run, tmp_path):
    code, out, _ = run(*SMALL, "--models", "stream,imp,nvr", "--depths", "8,32,128", "--plot", "d.svg")
    assert code == 0 and "written: d.svg" in out
    picture = ElementTree.parse(tmp_path / "d.svg").getroot()
    texts = [t.text for t in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert {"stream", "imp", "nvr", "8", "32", "128"} <= set(texts)
    assert len(list(picture.iter("{http://www.w3.org/2000/svg}circle"))) == 6
    first = (tmp_path / "d.svg").read_bytes()
    run(*SMALL, "--models", "stream,imp,nvr", "--depths", "8,32,128", "--plot", "d.svg")
    assert (tmp_path / "d.svg").read_bytes() == first


def test_a_file_is_simulated_and_cut(run, tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "a.npz", row_ptr=np.arange(0, 201, 20), col_idx=rng.integers(50, size=200))
    code, out, _ = run("a.npz", "--row-bytes", 256, "--limit", 90, "-m", "nvr", "--json")
    told = json.loads(out)["trace"]
    assert code == 0 and (told["gathers"], told["row_bytes"], told["loops"]) == (90, 256, 5)


def test_settings_by_their_path():
    made = settings_from(["machine.l2.size=524288", "runahead.sd=false", "imp.distance=32"])
    assert (made.machine.l2.size, made.runahead.sd, made.imp.distance) == (524288, False, 32)
    assert made.machine.l2.ways == 8


WRONG = [
    ((), "pass a trace file, or --synthetic"),
    (("a.npz", "--synthetic", "zipf"), "not both"),
    (("gone.npz",), "gone.npz does not exist"),
    (("damaged.npz",), "damaged.npz: it cannot be read"),
    (("damaged.mtx",), "damaged.mtx: line 1"),
    (("damaged.csv",), "damaged.csv: line 2"),
    (("damaged.csv", "--rows", 5), "--rows beside a trace file"),
    (("--synthetic", "zipff"), "did you mean 'zipf'"),
    ((*SMALL, "--models", "nvr,impp"), "did you mean 'imp'"),
    ((*SMALL, "--models", ""), "there is no model ''"),
    ((*SMALL, "--set", "runahead.deep=3"), "did you mean runahead.depth"),
    ((*SMALL, "--set", "runahead=3"), "runahead is a group"),
    ((*SMALL, "--set", "runahead.depth.x=3"), "it has no parts"),
    ((*SMALL, "--set", "runahead.depth=deep"), "runahead.depth is 'deep'; allowed: an integer of at least 0"),
    ((*SMALL, "--set", "machine.l2.size=1000"), "machine.l2.size=1000: l2.size is 1000; allowed"),
    ((*SMALL, "--set", "machine.l2.size=0"), "size is 0"),
    ((*SMALL, "--set", "depth"), "KEY=VALUE"),
    ((*SMALL, "--depths", "16,0"), "'0' is no depth"),
    ((*SMALL, "--plot", "d.png"), "*.svg"),
    ((*SMALL, "--plot", "no/d.svg"), "does not exist"),
    ((*SMALL, "--models", "stream", "--plot", "d.svg"), "none of stream has one"),
    ((*SMALL, "--row-bytes", 0), "--row-bytes is 0; allowed: 1"),
    ((*SMALL, "--limit", 0), "limit is 0"),
    (("--synthetic", "zipf", "--gathers", 0), "--gathers is 0; allowed: 1"),
    (("--synthetic", "zipf", "--seed", -1), "--seed is -1"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=lambda v: str(v)[-40:])
def test_wrong_input_ends_with_two_and_writes_nothing(run, tmp_path, arguments, message):
    (tmp_path / "damaged.npz").write_bytes(b"PK\x03\x04 and nothing more")
    (tmp_path / "damaged.mtx").write_text("nothing")
    (tmp_path / "damaged.csv").write_text("1,2\n3;4\n")
    before = sorted(p.name for p in tmp_path.iterdir())
    code, out, err = run(*arguments)
    assert code == 2 and message in err and not out
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_help_gives_an_example(run):
    code, out, _ = run("--help")
    assert code == 0 and "Example: qcore nvr" in out
