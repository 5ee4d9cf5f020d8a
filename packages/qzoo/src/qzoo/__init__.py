"""Small trained reference models and data for qcore, as package data: the offline default, and the evidence."""

from qcore.plugins import hookimpl


@hookimpl
def qcore_sources():
    from qzoo.efficientnet import EfficientNetLiteFile
    from qzoo.source import Zoo

    return [Zoo, EfficientNetLiteFile]
