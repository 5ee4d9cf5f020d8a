"""Checkpoints: safetensors, a manifest that says what each stored module is, and the proof that a consumer reads the same model."""

from qcore.checkpoint.layout import Layout, layout_for
from qcore.checkpoint.load import load
from qcore.checkpoint.manifest import MANIFEST, Manifest, ModuleEntry
from qcore.checkpoint.proof import Proof, prove
from qcore.checkpoint.save import save
from qcore.checkpoint.structure import prove_structure

__all__ = ["MANIFEST", "Layout", "Manifest", "ModuleEntry", "Proof", "layout_for", "load", "prove", "prove_structure", "save"]
