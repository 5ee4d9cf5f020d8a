"""qcore's own formats, observers, transforms, solvers and the rest, handed in through the hooks that plug-ins use.

If something of ours cannot be expressed here, the hook is wrong.
"""

from pathlib import Path

from qcore.plugins import hookimpl


@hookimpl
def qcore_formats():
    from qcore.numbers import Codebook, Float, Int, LowRankCodebook, PowerOfTwo
    from qcore.numbers.normal_float import NormalFloat
    from qcore.numbers.partly_binary import PartlyBinary

    return [Int, Float, PowerOfTwo, Codebook, LowRankCodebook, PartlyBinary, NormalFloat]


@hookimpl
def qcore_observers():
    from qcore.calibration import KL, MSE, AbsMax, Ema, Gram, Histogram, MinMax, Moments, Percentile, Rows, Sample, Spikes

    return [Gram, Moments, AbsMax, MinMax, Ema, Histogram, Percentile, MSE, KL, Rows, Sample, Spikes]


@hookimpl
def qcore_transforms():
    from qcore.transforms import (
        AWQScale,
        CrossLayerEqualize,
        FoldBatchNorm,
        FoldNorm,
        HadamardRotate,
        IfBeneficial,
        LearnRotations,
        LowRank,
        Reorder,
        SmoothQuant,
        SplitColumns,
    )
    from qcore.transforms.layer_norm import LayerNormToRMS
    from qcore.transforms.learn_static import LearnStatic
    from qcore.transforms.split_merge import SplitMerge

    return [
        FoldBatchNorm,
        FoldNorm,
        LayerNormToRMS,
        SmoothQuant,
        AWQScale,
        HadamardRotate,
        LearnRotations,
        LearnStatic,
        Reorder,
        CrossLayerEqualize,
        SplitColumns,
        SplitMerge,
        LowRank,
        IfBeneficial,
    ]


@hookimpl
def qcore_solvers():
    from qcore.solvers import GPTQ, GPTVQ, HQQ, RTN
    from qcore.solvers.adaround import LayerAdaRound
    from qcore.solvers.pbllm import PBLLM

    return [RTN, HQQ, GPTQ, GPTVQ, LayerAdaRound, PBLLM]


@hookimpl
def qcore_block_solvers():
    from qcore.solvers import AdaRound, LearnedClipping, SignRound
    from qcore.solvers.low_rank_tuning import LowRankTuning

    return [SignRound, AdaRound, LearnedClipping, LowRankTuning]


@hookimpl
def qcore_allocators():
    from qcore.solvers import Mixed
    from qcore.solvers.spikes import SpikeAware

    return [Mixed, SpikeAware]


@hookimpl
def qcore_modules():
    from qcore.modules.clip_range import ClipRange
    from qcore.modules.conv import QuantizedConv
    from qcore.modules.embedding import QuantizedEmbedding
    from qcore.modules.hadamard import HeadHadamard, OnlineHadamard
    from qcore.modules.kv_cache import KVCache
    from qcore.modules.leaves import FLOAT_LEAVES, Nothing
    from qcore.modules.linear import QuantizedLinear
    from qcore.modules.reassemble import ReassembleChannels
    from qcore.modules.stream_norm import StreamNorm
    from qcore.modules.sum import Sum
    from qcore.modules.tapped import QuantizedTap

    return [
        QuantizedLinear,
        QuantizedConv,
        QuantizedEmbedding,
        OnlineHadamard,
        HeadHadamard,
        ReassembleChannels,
        ClipRange,
        StreamNorm,
        Sum,
        QuantizedTap,
        KVCache,
        Nothing,
        *FLOAT_LEAVES,
    ]


@hookimpl
def qcore_packings():
    from qcore.packing import Bits, CompressedFloat, CompressedInt, CompressedPack
    from qcore.packing.partly_binary import PartlyBinaryBits

    return [CompressedPack, CompressedInt, CompressedFloat, PartlyBinaryBits, Bits]


@hookimpl
def qcore_kernels():
    from qcore.ops import KERNELS
    from qcore.ops.triton_linear import TRITON_KERNELS

    return [*KERNELS, *TRITON_KERNELS]


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
    from qcore.evaluation import Agreement, ImageClassification, LanguageModeling

    return [LanguageModeling, Agreement, ImageClassification]


@hookimpl
def qcore_exporters():
    from qcore.checkpoint.exporters import OnnxExporter

    return [OnnxExporter]


@hookimpl
def qcore_recipes():
    return [Path(__file__).parent / "recipes"]
