"""RWKV's tokenizers."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from qcore.errors import CheckpointError
from qplug_ssm.rwkv_files import RWKVFiles
from qplug_ssm.rwkv_tokens import WORLD, WorldTokens, tokenizer_file
from qplug_ssm.testing import rwkv7

BYTES = [f"{b + 1} {bytes([b])!r} 1" for b in range(256)]


def vocabulary(path: Path, *more: str) -> Path:
    path.write_text("\n".join([*BYTES, *more]) + "\n", encoding="utf-8")
    return path


def test_the_longest_token_wins_and_text_comes_back(tmp_path):
    tokens = WorldTokens(vocabulary(tmp_path / WORLD, "257 'ab' 2", "258 'abc' 3", "259 'é' 2"))
    assert tokens.encode("abcabé") == [258, 257, 259]
    assert tokens.decode(tokens.encode("ab\n\x00 ü雪 abc")) == "ab\n\x00 ü雪 abc"


def test_a_broken_line_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="line 257"):
        WorldTokens(vocabulary(tmp_path / WORLD, "257 'ab' 3"))


def test_the_vocabulary_beside_a_checkpoint_goes_with_the_model(tmp_path):
    torch.save(rwkv7(), tmp_path / "m.pth")
    vocabulary(tmp_path / WORLD)
    loaded = RWKVFiles().load(str(tmp_path / "m.pth"))
    assert loaded.tokenizer.encode("a") == [98]
    loaded.write_companions(tmp_path / "out")
    assert RWKVFiles().tokenizer(tmp_path / "out").encode("a") == [98]
    assert tokenizer_file(tmp_path / "elsewhere", 40) is None


def test_it_encodes_as_the_package_rwkv_does():
    spec = importlib.util.find_spec("rwkv")
    if spec is None:
        pytest.skip("the package rwkv, which carries the vocabulary, is not installed")
    folder = Path(spec.submodule_search_locations[0])
    source = importlib.util.spec_from_file_location("rwkv_tokenizer_oracle", folder / "rwkv_tokenizer.py")
    oracle = importlib.util.module_from_spec(source)
    sys.modules[source.name] = oracle
    source.loader.exec_module(oracle)
    theirs, ours = oracle.TRIE_TOKENIZER(str(folder / WORLD)), WorldTokens(folder / WORLD)
    for text in ("Hello world! 你好，世界。\n\ndef f(x):\n    return x ** 2  # é ü", " " * 37 + "\t\r\n", "αβγ🙂" * 5):
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == text
