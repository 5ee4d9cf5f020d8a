"""Vision-language models for qcore: adapters for a tower, a connector and a language model, and MQuant's static quantization of them."""

from pathlib import Path

from qcore.plugins import hookimpl


@hookimpl
def qcore_adapters():
    from qplug_multimodal.adapter import VisionLanguage
    from qplug_multimodal.two_tower import TwoTower

    return [VisionLanguage, TwoTower]


@hookimpl
def qcore_transforms():
    from qplug_multimodal.aifs import AIFS
    from qplug_multimodal.msq import MSQ
    from qplug_multimodal.rms import SuppressMagnitude

    return [AIFS, MSQ, SuppressMagnitude]


@hookimpl
def qcore_observers():
    from qplug_multimodal.msq import ByModality

    return [ByModality]


@hookimpl
def qcore_modules():
    from qplug_multimodal.aifs import VisualFirst
    from qplug_multimodal.msq import ModalInput
    from qplug_multimodal.rms import RotatedSum

    return [VisualFirst, ModalInput, RotatedSum]


@hookimpl
def qcore_sources():
    from qplug_multimodal.openclip import OpenClip
    from qplug_multimodal.sources import VisionLanguageFolder

    return [VisionLanguageFolder, OpenClip]


@hookimpl
def qcore_recipes():
    return [Path(__file__).parent / "recipes"]
