"""A LAVT small enough for tests, with weights that hide nothing, and a batch for it."""

import json
from pathlib import Path

import torch
from qcore.testing.models import randomize

from qplug_segmentation.lavt import Lavt, LavtConfig
from qplug_segmentation.shapes import WORDS

BERT = {
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
}
SIZES = {"embed": 8, "depths": [2, 1, 1, 1], "heads": [1, 2, 2, 4], "window": 2, "patch": 2, "decoder": 8, "bert": BERT}
CONFIG = {"architecture": "lavt_one", "lavt": SIZES, "image": {"side": 32}, "tokens": 9, "shapes": {"seed": 3, "calibration": 12, "evaluation": 6}}


def tiny_lavt(seed: int = 0) -> Lavt:
    torch.manual_seed(seed)
    model = Lavt(LavtConfig.from_dict(SIZES)).eval()
    randomize(model, seed)
    return model


def tiny_batch(count: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    words = torch.ones(count, 9, dtype=torch.long)
    words[0, 6:] = 0
    return {
        "image": torch.randn(count, 3, 32, 32, generator=g),
        "ids": torch.randint(4, len(WORDS), (count, 9), generator=g),
        "words": words,
        "target": torch.rand(count, 32, 32, generator=g) > 0.9,
    }


def write_folder(folder: Path, model: Lavt | None = None) -> Path:
    """A folder as `lavt:` reads it."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    tensors = {name: t.contiguous() for name, t in (model or tiny_lavt()).state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    return folder
