"""Language models for qcore: adapters for transformers' decoders and encoders, and sources that read its folders and GGUF files."""

from pathlib import Path

from qcore.plugins import hookimpl


@hookimpl
def qcore_adapters():
    from qplug_llm.decoder import DecoderLM
    from qplug_llm.encoder import EncoderLM

    return [DecoderLM, EncoderLM]


@hookimpl
def qcore_modules():
    from qplug_llm.experts import ExpertStack, PackedMatrix

    return [ExpertStack, PackedMatrix]


@hookimpl
def qcore_calibrations():
    from qplug_llm.ebss import EBSS

    return [EBSS]


@hookimpl
def qcore_tasks():
    from qplug_llm.neighbours import NearestNeighbours

    return [NearestNeighbours]


@hookimpl
def qcore_sources():
    from qplug_llm.sources import GGUF, TransformersConfig, TransformersFolder

    return [GGUF, TransformersFolder, TransformersConfig]


@hookimpl
def qcore_recipes():
    return [Path(__file__).parent / "recipes"]
