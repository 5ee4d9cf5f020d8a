"""How an address becomes a model, and what is said where it does not."""

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from qcore.errors import NotFound
from qcore.model import LoadedModel
from qcore.model.reader import DictReader, shard_files
from qcore.model.source import ModelSource, load_source
from torch import nn


class Here(ModelSource):
    name: ClassVar[str] = "here"
    help: ClassVar[str] = "here:x   a model"

    def matches(self, uri: str) -> bool:
        return uri.startswith("here:")

    def load(self, uri: str) -> LoadedModel:
        return LoadedModel(nn.Linear(1, 1), DictReader({}), uri, torch.float32)


class Breaks(Here):
    name: ClassVar[str] = "breaks"
    priority: ClassVar[int] = 5

    def matches(self, uri: str) -> bool:
        raise KeyError("colour")


SOURCES: dict[str, type[Any]] = {"here": Here, "breaks": Breaks}


def test_a_source_that_breaks_when_it_is_asked_stops_no_other_and_is_named():
    assert load_source("here:a", SOURCES).name == "here:a"
    with pytest.raises(NotFound, match=r"prefix 'there'.*\n  source 'breaks' broke when it was asked \(KeyError: 'colour'\)"):
        load_source("there:a", SOURCES)


@pytest.mark.parametrize(
    ("sources", "uri", "words"),
    [
        ({}, "zoo:a", "'zoo'; for zoo: models: pip install qzoo"),
        ({"zoo": Here}, "foo:a", r"knows the prefix 'foo'\nwhat"),
        ({}, "/dev/null", "neither a file nor a folder"),
        ({}, ".", "pip install qplug-llm"),
        ({"transformers": Here}, ".", r"no installed source can read it\nwhat"),
        ({}, "nowhere", "no such file or folder"),
    ],
)
def test_the_hint_is_about_what_is_not_installed(sources, uri, words):
    with pytest.raises(NotFound, match=words):
        load_source(uri, sources)


def test_missing_shards_are_counted_and_the_first_is_named(tmp_path: Path):
    table = {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-3.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    (tmp_path / "model-1.safetensors").touch()
    with pytest.raises(NotFound, match=r"index\.json: 2 of 3 files that it names are missing, first model-2\.safetensors; fetch them"):
        shard_files(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "x" * 300}}))
    with pytest.raises(NotFound, match="1 of 1 files that it names are missing, first xxx"):
        shard_files(tmp_path)
