"""Tokenizers of RWKV models: the "World" vocabulary, a text file that belongs to the published models, or a tokenizer.json.

Looked for beside the checkpoint, then, for models of 65,536 tokens, in the installed package `rwkv`, which carries that vocabulary.
"""

import ast
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qcore.errors import CheckpointError

WORLD = "rwkv_vocab_v20230424.txt"
FILES = (WORLD, "tokenizer.json", "20B_tokenizer.json")
_WORLD_SIZE = 65536


class WorldTokens:
    """Greedy longest match over bytes.

    Each line of the file is an index, a Python string or bytes literal, and the number of its bytes: `300 '\\n\\n' 2`.
    """

    def __init__(self, path: Path) -> None:
        self.ids: dict[bytes, int] = {}
        for number, line in enumerate(path.read_text(encoding="utf-8").rstrip("\n").split("\n"), 1):
            try:
                index, rest = line.split(" ", 1)
                literal, length = rest.rsplit(" ", 1)
                token = ast.literal_eval(literal)
                piece = token.encode("utf-8") if isinstance(token, str) else bytes(token)
                if len(piece) != int(length):
                    raise ValueError(f"{len(piece)} bytes, not {length}")
                self.ids[piece] = int(index)
            except (ValueError, SyntaxError) as e:
                raise CheckpointError(f"{path}, line {number} is no token of an RWKV vocabulary ({e}); fetch the file again") from e
        self._pieces = {i: piece for piece, i in self.ids.items()}
        self._longest = max(map(len, self.ids), default=0)

    def encode(self, text: str) -> list[int]:
        data, at, found = text.encode("utf-8"), 0, []
        while at < len(data):
            for length in range(min(self._longest, len(data) - at), 0, -1):
                index = self.ids.get(data[at : at + length])
                if index is not None:
                    found.append(index)
                    at += length
                    break
            else:
                raise CheckpointError(f"the vocabulary has no token for byte {data[at]}; it is not complete")
        return found

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(self._pieces.get(i, b"") for i in ids).decode("utf-8", "replace")


class JsonTokens:
    """A `tokenizers.Tokenizer`, as what qcore asks of one."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as e:  # tokenizers raises what it likes
            raise CheckpointError(f"{path} cannot be read as a tokenizer ({e}); fetch it again") from e

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode(list(ids))


def tokenizer_file(folder: Path, vocabulary: int | None = None) -> Path | None:
    """The tokenizer that lies in a folder, or that of the installed package for a model of `vocabulary` tokens; None where there is none."""
    own = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if own is not None or vocabulary != _WORLD_SIZE:
        return own
    spec = find_spec("rwkv")
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return next((file for place in places if (file := Path(place) / WORLD).is_file()), None)


def read_tokenizer(file: Path | None) -> Any:
    """The tokenizer in a file; None for None."""
    if file is None:
        return None
    return WorldTokens(file) if file.suffix == ".txt" else JsonTokens(file)
