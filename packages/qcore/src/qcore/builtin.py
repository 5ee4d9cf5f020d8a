"""qcore's own formats, observers, transforms, solvers and the rest, handed in through the hooks that plug-ins use.

If something of ours cannot be expressed here, the hook is wrong.
"""

from pathlib import Path

from qcore.plugins import hookimpl


@hookimpl
def qcore_formats():
    from qcore.numbers import Codebook, Float, Int, LowRankCodebook, PowerOfTwo

    return [Int, Float, PowerOfTwo, Codebook, LowRankCodebook]


@hookimpl
def qcore_observers():
    from qcore.calibration import KL, MSE, AbsMax, Ema, Gram, Histogram, MinMax, Moments, Percentile, Rows, Sample

    return [Gram, Moments, AbsMax, MinMax, Ema, Histogram, Percentile, MSE, KL, Rows, Sample]


@hookimpl
def qcore_transforms():
    from qcore.transforms import (
        AWQScale,
        CrossLayerEqualize,
        FoldNorm,
        HadamardRotate,
        IfBeneficial,
        LearnRotations,
        Reorder,
        SmoothQuant,
        SplitColumns,
    )

    return [FoldNorm, SmoothQuant, AWQScale, HadamardRotate, LearnRotations, Reorder, CrossLayerEqualize, SplitColumns, IfBeneficial]


@hookimpl
def qcore_solvers():
    from qcore.solvers import GPTQ, GPTVQ, RTN

    return [RTN, GPTQ, GPTVQ]


@hookimpl
def qcore_modules():
    from qcore.modules.conv import QuantizedConv
    from qcore.modules.embedding import QuantizedEmbedding
    from qcore.modules.hadamard import HeadHadamard, OnlineHadamard
    from qcore.modules.linear import QuantizedLinear
    from qcore.modules.sum import Sum
    from qcore.modules.tapped import QuantizedTap

    return [QuantizedLinear, QuantizedConv, QuantizedEmbedding, OnlineHadamard, HeadHadamard, Sum, QuantizedTap]


@hookimpl
def qcore_packings():
    from qcore.packing import Bits, CompressedFloat, CompressedInt, CompressedPack

    return [CompressedPack, CompressedInt, CompressedFloat, Bits]


@hookimpl
def qcore_kernels():
    from qcore.ops import KERNELS

    return list(KERNELS)


@hookimpl
def qcore_adapters():
    from qcore.model.plain import PlainCNN, PlainMLP

    return [PlainMLP, PlainCNN]


@hookimpl
def qcore_calibrations():
    from qcore.calibration.text import TextFile

    return [TextFile]


@hookimpl
def qcore_tasks():
    from qcore.evaluation import Agreement, LanguageModeling

    return [LanguageModeling, Agreement]


@hookimpl
def qcore_recipes():
    return [Path(__file__).parent / "recipes"]
