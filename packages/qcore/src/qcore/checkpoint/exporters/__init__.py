"""Writing a quantized model for another program."""

from qcore.checkpoint.exporters.base import Exported, Exporter
from qcore.checkpoint.exporters.onnx import OnnxExporter

__all__ = ["Exported", "Exporter", "OnnxExporter"]
