"""What of a source file can change a number: its code without comments, layout, docstrings and the words of its errors.

Cells of evidence are keyed by it, so a sentence that is mended leaves measurements as they are.  So does an edit of which `witness.py` has shown, by
cells that were measured anew, that it changes no number: docs/evidence/same.json has them all.
"""

import ast
import hashlib
import json
import tomllib
from functools import lru_cache
from pathlib import Path

SAME = Path(__file__).resolve().parents[2] / "docs" / "evidence" / "same.json"


class _Wordless(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        """Text that stands alone is a docstring."""
        return None if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str) else node

    def visit_Raise(self, node: ast.Raise) -> ast.Raise:
        """The class of an error decides who catches it, its words do not."""
        return ast.Raise(exc=node.exc.func if isinstance(node.exc, ast.Call) else node.exc, cause=None)


def decisive(file: Path) -> bytes:
    """The content of a file as far as it decides numbers.  Of a recipe: all but its description."""
    return _of(file.suffix, file.read_bytes())


@lru_cache(maxsize=1024)  # hundreds of cells name the same hundred files
def _of(suffix: str, content: bytes) -> bytes:
    if suffix == ".py":
        return ast.unparse(_Wordless().visit(ast.parse(content))).encode()
    if suffix == ".toml":
        recipe = tomllib.loads(content.decode())
        return json.dumps({k: v for k, v in recipe.items() if k != "description"}).encode()
    return content


def standing(file: Path) -> str:
    """A hash of what of a file decides numbers; after edits that were shown to change none, that of the code before them."""
    return standing_of(own_hash(file.suffix, file.read_bytes()), edits(SAME.read_bytes() if SAME.exists() else b"[]"))


def own_hash(suffix: str, content: bytes) -> str:
    return hashlib.sha256(_of(suffix, content)).hexdigest()[:16]


def standing_of(own: str, before: dict[str, str]) -> str:
    """Back over the edits.  before: hash → that of the code before an edit"""
    while own in before:
        own = before[own]
    return own


@lru_cache(maxsize=4)
def edits(same: bytes) -> dict[str, str]:
    """hash → that of the code before an edit, of same.json"""
    return {after: before for edit in json.loads(same) for before, after in edit["files"].values()}
