"""`import qcore.hf` teaches transformers the qcore layout: `AutoModelForCausalLM.from_pretrained(folder, variant="qcore")`.

transformers finds no quantizer by itself: without this import it does not know `quant_method: "qcore"`, and because the weights are stored as
`model.qcore.safetensors` it finds none and says so.  The model that comes out is the one of `qcore.checkpoint.load`, bit for bit;
`save_pretrained(folder, variant="qcore")` writes it again.
"""

from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qcore import plugins
from qcore.checkpoint.load import bind, install, tie
from qcore.checkpoint.manifest import Manifest
from qcore.errors import CheckpointError

METHOD = "qcore"


class QcoreConfig(QuantizationConfigMixin):
    """`quantization_config` of a checkpoint in the qcore layout.  manifest: as in qcore.json, without files and record"""

    def __init__(self, manifest: dict[str, Any] | None = None, **unknown: Any) -> None:
        unknown.pop("quant_method", None)
        if unknown:
            raise CheckpointError(f"quantization_config of method 'qcore' has an unknown field {sorted(unknown)[0]!r}; upgrade qcore")
        self.quant_method = METHOD  # type: ignore[assignment]  # transformers compares it as text
        self.manifest = manifest


class QcoreQuantizer(HfQuantizer):
    """Puts the manifest's modules into the float model before its weights are read, and chooses their kernels after."""

    requires_calibration = True  # it loads what is quantized already; `quantize_model` does the quantizing

    def __init__(self, quantization_config: QcoreConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._manifest = Manifest.from_dict(quantization_config.manifest, "config.json")
        self._registry = plugins.load_registry()

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        self._manifest.require(self._registry, "this checkpoint")

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if install(model, self._manifest, self._registry) is not model:
            raise CheckpointError("the whole model is one run-time module, which transformers cannot load; use qcore.checkpoint.load")

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        tie(model, self._manifest)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        bind(model, self._manifest, self._registry, device)

    @property
    def is_trainable(self) -> bool:
        return False

    def is_serializable(self) -> bool:
        return True


def register() -> None:
    """Make transformers know the method; does nothing the second time.  transformers itself raises for a name that is taken."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(QcoreConfig)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(QcoreQuantizer)


register()
