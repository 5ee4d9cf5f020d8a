"""What sources of transformers folders share."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from qcore.errors import CheckpointError, NotFound
from qcore.model.reader import DictReader
from qcore.model.transformers_folder import RenamedReader, copy_files, first_line, read_config, require_float, whole_state
from torch import nn


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "has no config.json"),
        ("{", "cannot be read"),
        ("[]", "names no model_type"),
        ('{"model_type": 3}', "names no model_type"),
        ('{"model_type": "llama", "auto_map": {"AutoModel": "x.Y"}}', "code of its own .auto_map: AutoModel.*remove the auto_map entry"),
    ],
)
def test_a_broken_configuration_or_one_that_brings_code_is_refused(tmp_path: Path, content, words):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises((CheckpointError, NotFound), match=f"(?s){words}"):
        read_config(tmp_path)


def test_a_configuration_is_read_from_its_folder_or_its_file(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert read_config(tmp_path) == read_config(tmp_path / "config.json") == {"model_type": "llama"}


def test_a_quantized_folder_is_refused_with_the_method_it_names(tmp_path: Path):
    require_float({}, tmp_path)
    for data, how in (({"quantization_config": {"quant_method": "gptq"}}, "gptq"), ({"quantization_config": None}, "an unnamed method")):
        with pytest.raises(CheckpointError, match=f"quantized already \\({how}\\)"):
            require_float(data, tmp_path)


def test_renamed_tensors_are_those_of_the_other_name_and_tell_the_same_weights():
    inner = DictReader({"a": torch.arange(3.0)})
    reader = RenamedReader(inner, {"x": "a", "tied": "a"})
    assert list(reader.names()) == ["x", "tied"] and "a" not in reader and torch.equal(reader["tied"], reader["x"])
    assert reader.fingerprint() == RenamedReader(inner, {"y": "a"}).fingerprint()
    with pytest.raises(NotFound, match="no tensor named 'a'; there are 2, such as x, tied"):
        reader["a"]


def test_a_whole_model_is_refused_where_tensors_are_missing_or_left_over(tmp_path: Path):
    def loads(info=None, fails=None):
        def from_pretrained(folder, **options):
            assert options["use_safetensors"] and options["local_files_only"] and not options["trust_remote_code"]
            if fails:
                raise fails
            return nn.Linear(2, 1), info

        return SimpleNamespace(from_pretrained=from_pretrained)

    assert set(whole_state(loads({"missing_keys": []}), tmp_path, torch.float32)) == {"weight", "bias"}
    with pytest.raises(CheckpointError, match=r"2 missing tensors, such as a; .* would be random"):
        whole_state(loads({"missing_keys": ["b", "a"]}), tmp_path, torch.float32)
    with pytest.raises(CheckpointError, match=r"transformers cannot load it \(OSError: no pickles\)"):
        whole_state(loads(fails=OSError("no pickles\nand more")), tmp_path, torch.float32)
    assert first_line(KeyError()) == "KeyError: "


def test_only_named_files_are_copied(tmp_path: Path):
    source, target = tmp_path / "a", tmp_path / "b" / "c"
    source.mkdir()
    for name in ("config.json", "modeling.py"):
        (source / name).write_text(json.dumps(name))
    copy_files(source, target, ("config.json", "tokenizer.json"))
    assert [p.name for p in target.iterdir()] == ["config.json"]
