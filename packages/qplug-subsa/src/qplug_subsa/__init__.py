"""Selection of samples for qcore: Sub-SA and its baselines, retrieval, prompts, and two commands."""

from qcore.plugins import hookimpl


@hookimpl
def qcore_selectors():
    from qplug_subsa.baselines import Diversity, KMeans, LeastConfidence, Random
    from qplug_subsa.facility import FacilityLocation
    from qplug_subsa.ideal import IDEAL
    from qplug_subsa.subsa import SubSA
    from qplug_subsa.votek import FastVoteK

    return [SubSA, Random, FastVoteK, Diversity, FacilityLocation, IDEAL, LeastConfidence, KMeans]


@hookimpl
def qcore_commands():
    from qplug_subsa.commands import prompts, select

    return [select, prompts]


@hookimpl
def qcore_adapters():
    from qplug_subsa.adapter import AnyTextEncoder

    return [AnyTextEncoder]
