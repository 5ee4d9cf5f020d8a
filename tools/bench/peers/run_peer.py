#!/usr/bin/env python3
"""Run ONE quantization toolkit on one model, write a plain HF folder with the dequantized weights and one JSON line.

    run_peer.py NAME --model HF_DIR --calib calib.txt --out DIR [--bits 4] [--group 64] [--opt key=value ...]

Only the toolkit's own quantization call is timed (model load, imports and saving are not). Run each peer in its own
virtual environment; --list shows the names. Exit status 1 and {"ok": false, "error": ...} on failure."""

import argparse
import json
import pathlib
import sys
import traceback

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import contextlib

import common
from common import Meter

PEERS = {}


def peer(*names):
    def deco(f):
        for n in names:
            PEERS[n] = f
        return f

    return deco


def opt(a, key, default):
    v = a.opts.get(key)
    if v is None:
        return default
    if isinstance(default, bool):
        return v.lower() in ("1", "true", "yes")
    return type(default)(v) if default is not None else v


def sd_of(model):
    """weight tensors under the source model's names; lm_head separately"""
    sd = dict(model.state_dict().items())
    head = sd.pop("lm_head.weight", None)
    return sd, head


def split_head(model, weights, head):
    """None when the head still equals the (possibly changed) embedding, else the head tensor"""
    import torch

    if head is None:
        return None
    emb = weights.get("model.embed_tokens.weight")
    return None if emb is None or (emb.shape == head.shape and torch.equal(emb.float(), head.float())) else head


# ---------------------------------------------------------------- reference round-to-nearest (no toolkit)
@peer("rtn", "rtn-full", "rtn-mse")
def rtn(a, name):
    """rtn: scale = absmax/(2^(b-1)-1). rtn-full: absmax/(2^(b-1)-0.5), uses the negative end. rtn-mse: scale search."""
    import torch

    m = common.load_fp(a.model)
    q = 2 ** (a.bits - 1)
    out = {}
    with Meter() as t, torch.no_grad():
        for n, layer in common.linears(m).items():
            w = layer.weight
            x = w.reshape(w.shape[0], -1, a.group if a.group > 0 else w.shape[1])
            amax = x.abs().amax(-1, keepdim=True).clamp_min(1e-12)

            def qd(s, x=x):
                return (x / s).round().clamp(-q, q - 1) * s

            if name == "rtn":
                y = qd(amax / max(q - 1, 1))
            elif name == "rtn-full":
                y = qd(amax / (q - 0.5))
            else:
                best = torch.full_like(amax, float("inf"))
                y = torch.empty_like(x)
                for i in range(80):
                    z = qd(amax / (q - 0.5) * (1.2 - 0.0125 * i))
                    e = ((z - x) ** 2).sum(-1, keepdim=True)
                    y = torch.where(e < best, z, y)
                    best = torch.minimum(e, best)
            out[n + ".weight"] = y.reshape_as(w)
    return {"weights": out, "meter": t, "sym": True}


# ---------------------------------------------------------------- llm-compressor
@peer("llmc-rtn", "llmc-gptq", "llmc-awq", "llmc-sq", "llmc-sq-gptq", "llmc-spinquant", "llmc-spinquant-gptq", "llmc-quip")
def llmc(a, name):
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    try:
        from llmcompressor.modifiers.gptq import GPTQModifier
    except ImportError:
        from llmcompressor.modifiers.quantization import GPTQModifier
    from transformers import AutoTokenizer

    m = common.load_fp(a.model, opt(a, "dtype", "float32"))
    tok = AutoTokenizer.from_pretrained(a.model)
    wargs = {"num_bits": a.bits, "type": "int", "symmetric": True}
    wargs.update({"strategy": "group", "group_size": a.group} if a.group > 0 else {"strategy": "channel"})
    if a.opts.get("observer"):
        wargs["observer"] = a.opts["observer"]
    scheme = {"targets": ["Linear"], "weights": wargs}
    if a.act_bits:
        scheme["input_activations"] = {"num_bits": a.act_bits, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    kw = {"config_groups": {"g0": scheme}, "ignore": ["lm_head"]}
    q = GPTQModifier(**kw) if name.endswith("gptq") else QuantizationModifier(**kw)
    pre = []
    if name == "llmc-awq":
        try:
            from llmcompressor.modifiers.transform.awq import AWQModifier
        except ImportError:
            from llmcompressor.modifiers.awq import AWQModifier
        pre = [AWQModifier(duo_scaling=True)]
    if name.startswith("llmc-sq"):
        try:
            from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
        except ImportError:
            from llmcompressor.modifiers.smoothquant import SmoothQuantModifier
        pre = [SmoothQuantModifier(smoothing_strength=opt(a, "strength", 0.5))]
    bs = a.opts.get("block")
    bs = int(bs) if bs else None
    if name.startswith("llmc-spinquant"):
        from llmcompressor.modifiers.transform import SpinQuantModifier

        pre = [
            SpinQuantModifier(
                rotations=opt(a, "rotations", "R1,R2").split(","), transform_type=opt(a, "transform", "hadamard"), transform_block_size=bs
            )
        ]
    if name == "llmc-quip":
        from llmcompressor.modifiers.transform import QuIPModifier

        pre = [QuIPModifier(rotations=["v"], transform_type=opt(a, "transform", "random-hadamard"), transform_block_size=bs)]
    need = name not in ("llmc-rtn", "llmc-spinquant", "llmc-quip")
    extra = {}
    if need:
        ids = a.ids
        extra = {
            "dataset": Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}),
            "max_seq_length": ids.shape[1],
            "num_calibration_samples": len(ids),
            "shuffle_calibration_samples": False,
            "batch_size": opt(a, "batch", 1),
        }
    with Meter() as t:
        oneshot(model=m, processor=tok, recipe=[*pre, q], **extra)
    # dequantize with the library's own arithmetic; read the rotations that stay online
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.transform.factory.base import TransformBase

    online = {}
    with torch.no_grad():
        sd, head = sd_of(m)
        for n, layer in m.named_modules():
            if not isinstance(layer, torch.nn.Linear):
                continue
            sch = getattr(layer, "quantization_scheme", None)
            if sch is not None and sch.weights is not None and common.is_target(n):
                sd[n + ".weight"] = fake_quantize(layer.weight.data, layer.weight_scale.data, getattr(layer, "weight_zero_point", None), sch.weights)
            for c in layer.children():
                if isinstance(c, TransformBase) and str(getattr(c.args, "location", "")).lower().endswith("input"):
                    online[n] = c(torch.eye(layer.in_features)) @ (online[n] if n in online else torch.eye(layer.in_features))
    base = set(common.load_fp(a.model).state_dict())
    sd = {k: v for k, v in sd.items() if k in base}
    return {"weights": sd, "head": split_head(m, sd, head), "online": online, "meter": t, "sym": True}


# ---------------------------------------------------------------- GPTQModel
@peer("gptqmodel", "gptqmodel-awq", "gptqmodel-rtn")
def gptqmodel(a, name):
    import shutil
    import tempfile

    import torch
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.quantization import config as C

    kw = {"bits": a.bits, "group_size": a.group, "sym": True, "device": "cpu"}
    if name == "gptqmodel":
        for k in ("desc_act", "act_group_aware"):
            if k in a.opts:
                kw[k] = opt(a, k, True)
        if "mse" in a.opts:
            kw["mse"] = opt(a, "mse", 0.0)
        cfg = C.GPTQConfig(offload_to_disk=False, **kw)
    elif name == "gptqmodel-awq":
        cfg = C.AWQConfig(offload_to_disk=False, **kw)
    else:
        cfg = C.RTNConfig(offload_to_disk=False, **kw)
    m = GPTQModel.load(str(a.model), cfg, dtype=getattr(torch, opt(a, "dtype", "float32")))
    cal = [{"input_ids": r[None], "attention_mask": torch.ones_like(r)[None]} for r in a.ids]
    with Meter() as t:
        m.quantize(None if name == "gptqmodel-rtn" else cal, batch_size=opt(a, "batch", 1))
    tmp = tempfile.mkdtemp(dir=str(pathlib.Path(a.out).parent))
    out = {}
    try:
        m.save(tmp)
        del m
        r = GPTQModel.load(tmp, device="cpu", backend=BACKEND.TORCH if name != "gptqmodel-awq" else BACKEND.TORCH_AWQ)
        for n, layer in r.model.named_modules():
            if hasattr(layer, "qweight") and hasattr(layer, "scales"):
                w = layer.dequantize_weight().float()
                out[n + ".weight"] = w.T if w.shape[0] == layer.in_features and w.shape[1] == layer.out_features else w
        extra = {k: v for k, v in r.model.state_dict().items() if k.endswith("norm.weight")}
        out.update(extra)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return {"weights": out, "meter": t, "sym": True}


# ---------------------------------------------------------------- AutoRound
@peer("autoround", "autoround-rtn", "autoround-optrtn", "autoround-awq")
def autoround(a, name):
    import torch
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    m = common.load_fp(a.model)
    tok = AutoTokenizer.from_pretrained(a.model)
    cal = [{"input_ids": r, "attention_mask": torch.ones_like(r)} for r in a.ids.split(opt(a, "batch", 8))]
    kw = {
        "bits": a.bits,
        "group_size": a.group,
        "sym": True,
        "nsamples": len(a.ids),
        "seqlen": a.ids.shape[1],
        "batch_size": opt(a, "batch", 8),
        "dataset": cal,
        "device_map": "cpu",
    }
    if "amp" in a.opts:
        kw["amp"] = opt(a, "amp", True)
    if name == "autoround":
        kw["iters"] = opt(a, "iters", 200)
    elif name == "autoround-awq":
        kw["alg_configs"] = "awq"
    else:
        kw["iters"] = 0
        kw["disable_opt_rtn"] = name == "autoround-rtn"
    if "alg_ext" in a.opts:
        kw["enable_alg_ext"] = True
    ar = AutoRound(m, tokenizer=tok, **kw)
    with Meter() as t:
        res = ar.quantize()
    qm = res[0] if isinstance(res, tuple) else res
    sd, _head = sd_of(qm)
    keep = set(common.load_fp(a.model).state_dict())
    lin = {n + ".weight" for n in common.linears(qm)}
    # tensors that are not quantized are only cast (bf16) by AutoRound: norms are taken, embeddings stay as in the source
    sd = {k: v for k, v in sd.items() if k in keep and (k in lin or k.endswith("norm.weight"))}
    return {"weights": sd, "meter": t, "sym": True}


# ---------------------------------------------------------------- HQQ
@peer("hqq")
def hqq(a, name):
    import torch
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    m = common.load_fp(a.model)
    cfg = BaseQuantizeConfig(nbits=a.bits, group_size=a.group, axis=opt(a, "axis", 1))
    out = {}
    with Meter() as t, torch.no_grad():
        q = {
            n: HQQLinear(layer, quant_config=cfg, compute_dtype=torch.float32, device="cpu", del_orig=False) for n, layer in common.linears(m).items()
        }
    for n, layer in q.items():
        out[n + ".weight"] = layer.dequantize().reshape(layer.out_features, layer.in_features)
    return {"weights": out, "meter": t, "sym": False, "zp_bits": 16}


# ---------------------------------------------------------------- torchao
@peer("torchao", "torchao-hqq", "torchao-int4", "torchao-gptq", "torchao-awq")
def torchao(a, name):
    import torch
    from torchao.quantization import quantize_
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.quant_api import Int4WeightOnlyConfig, IntxWeightOnlyConfig
    from torchao.quantization.quant_primitives import MappingType

    m = common.load_fp(a.model, "bfloat16" if name in ("torchao-int4", "torchao-gptq") else "float32")
    lin = common.linears(m)
    sym = True
    zp = 0

    def flt(mod, fqn):
        return isinstance(mod, torch.nn.Linear) and common.is_target(fqn)

    ao_dtype = getattr(torch, f"int{a.bits}")
    if name == "torchao":
        cfg = IntxWeightOnlyConfig(weight_dtype=ao_dtype, granularity=PerGroup(a.group), mapping_type=MappingType.SYMMETRIC)
    elif name == "torchao-hqq":
        cfg = IntxWeightOnlyConfig(
            weight_dtype=ao_dtype,
            granularity=PerGroup(a.group),
            mapping_type=MappingType.ASYMMETRIC,
            intx_choose_qparams_algorithm="hqq_scale_only",
        )
    else:
        cfg = Int4WeightOnlyConfig(group_size=a.group, int4_packing_format=opt(a, "packing", "opaque" if name == "torchao-int4" else "plain"))
        sym = False
        zp = 16
    if name == "torchao-gptq":
        from torchao.prototype.gptq import GPTQConfig

        with Meter() as t, torch.no_grad():
            quantize_(m, GPTQConfig(step="observe", base_config=cfg), filter_fn=flt)
            for r in a.ids:
                m(r[None])
            quantize_(m, GPTQConfig(step="convert", base_config=cfg), filter_fn=flt)
    elif name == "torchao-awq":
        from torchao.prototype.awq import AWQConfig

        with Meter() as t, torch.no_grad():
            quantize_(m, AWQConfig(cfg, step="prepare"), filter_fn=flt)
            for r in a.ids:
                m(r[None])
            quantize_(m, AWQConfig(cfg, step="convert"), filter_fn=flt)
    else:
        with Meter() as t, torch.no_grad():
            quantize_(m, cfg, filter_fn=flt)
    out = {}
    mods = dict(m.named_modules())
    with torch.no_grad():
        for n in lin:
            w = mods[n].weight
            if hasattr(w, "dequantize") and type(w) is not torch.nn.Parameter:
                try:
                    d = w.dequantize()
                except Exception:
                    d = mods[n](torch.eye(mods[n].in_features, dtype=torch.bfloat16)).T  # packed for the kernel only
            else:
                d = mods[n](torch.eye(mods[n].in_features, dtype=torch.bfloat16)).T
            if getattr(w, "act_pre_scale", None) is not None:
                d = d * w.act_pre_scale
            out[n + ".weight"] = d
    return {"weights": out, "meter": t, "sym": sym, "zp_bits": zp}


# ---------------------------------------------------------------- qcore itself, in the repository's own environment
@peer("qcore-gptq", "qcore-awq", "qcore-rtn", "qcore-signround")
def qcore(a, name):
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
    import evidence
    from qcore.calibration.text import start_batches, to_batches
    from qcore.model import adapter_for, load_source
    from qcore.modules.stored import StoredWeight
    from qcore.pipeline import quantize_model
    from qcore.plugins import load_registry
    from qcore.recipe_file import load_recipe

    registry = load_registry()
    loaded = load_source(str(a.model), registry.sources)
    adapter = adapter_for(loaded.model, registry.adapters)
    stem = "w4a16-" + name.removeprefix("qcore-")
    recipe = load_recipe(stem, registry, (f"rules.0.format.bits={a.bits}", f"rules.0.granularity.size={a.group}"))
    size = 4 if recipe.block_solver else 8  # windows in a batch: a step of the learning takes one batch, and costs half as much with 4
    batches = to_batches(a.ids, size) + start_batches(a.ids, recipe.calibration.starts, recipe.calibration.starts_weight, 0)
    with Meter() as t:  # reading the weights is inside: qcore reads them block by block
        q = quantize_model(loaded, recipe, batches, registry=registry, adapter=adapter)
    out = {n + ".weight": m.dequantize() for n, m in q.model.named_modules() if isinstance(m, StoredWeight)}
    return {"weights": out, "meter": t, "sym": True, "files": evidence.code_files(stem)}


# ---------------------------------------------------------------- optimum-quanto
@peer("quanto")
def quanto(a, name):
    import torch
    from optimum.quanto import QModuleMixin, freeze, qint2, qint4, qint8, quantize

    qt = {2: qint2, 4: qint4, 8: qint8}.get(a.bits)
    if qt is None:
        raise ValueError(f"optimum-quanto has no {a.bits}-bit integer type (qint2, qint4, qint8 only)")
    m = common.load_fp(a.model)
    with Meter() as t, torch.no_grad():
        quantize(m, weights=qt, exclude=["lm_head"])
        for mod in m.modules():
            if isinstance(mod, QModuleMixin):
                mod.weight_group_size = a.group  # default: 96 for 576, 128 for 1536
        freeze(m)
    out = {n + ".weight": mod.weight.dequantize() for n, mod in m.named_modules() if isinstance(mod, QModuleMixin)}
    return {"weights": out, "meter": t, "sym": False, "zp_bits": 16}


def versions():
    from importlib.metadata import PackageNotFoundError, version

    r = {}
    for p in (
        "torch",
        "transformers",
        "numpy",
        "llmcompressor",
        "compressed-tensors",
        "gptqmodel",
        "auto-round",
        "hqq",
        "torchao",
        "optimum-quanto",
        "qcore",
    ):
        with contextlib.suppress(PackageNotFoundError):
            r[p] = version(p)
    return r


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("name", nargs="?")
    ap.add_argument("--list", action="store_true")
    ap.add_argument("--model")
    ap.add_argument("--calib")
    ap.add_argument("--out")
    ap.add_argument("--bits", type=int, default=4)
    ap.add_argument("--group", type=int, default=64, help="0: one scale per output channel")
    ap.add_argument("--act-bits", type=int, default=0, help="tell the toolkit that activations will be quantized (evaluate.py applies it)")
    ap.add_argument("--calib-windows", type=int, default=64)
    ap.add_argument("--window", type=int, default=512)
    ap.add_argument("--opt", action="append", default=[], metavar="K=V")
    ap.add_argument("--tag", default="")
    ap.add_argument("--results", default="", help="append the JSON line to this file too")
    ap.add_argument("--no-save", action="store_true", help="timing only")
    ap.add_argument("--threads", type=int, default=0)
    a = ap.parse_args()
    if a.list or not a.name:
        print("\n".join(PEERS))
        return
    a.opts = dict(o.split("=", 1) for o in a.opt)
    import torch

    if a.threads:
        torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    a.ids = common.token_windows(a.model, a.calib, a.calib_windows, a.window)
    tag = a.tag or f"{a.name}-w{a.bits}" + (f"a{a.act_bits}" if a.act_bits else "") + f"g{a.group}" + "".join(
        f"-{k}{v}" for k, v in sorted(a.opts.items())
    )
    rec = {
        "tag": tag,
        "peer": a.name,
        "bits": a.bits,
        "group": a.group,
        "act_bits": a.act_bits,
        "opts": a.opts,
        "calib_ids": common.ids_sha(a.ids),
        "threads": torch.get_num_threads(),
    }
    code = 0
    try:
        r = PEERS[a.name](a, a.name)
        g = a.group if a.group > 0 else 576
        rec.update(ok=True, sym=r["sym"], eff_bits=round(a.bits + 16 / g + r.get("zp_bits", 0) / g, 3), **r["meter"].as_dict())
        if not a.no_save:
            common.save_dequantized(a.model, a.out, r["weights"], rec, r.get("head"), r.get("online"), a.group)
            rec["online_layers"] = len(r.get("online") or {})
        if "files" in r:
            rec["files"] = r["files"]
    except BaseException as e:
        if isinstance(e, KeyboardInterrupt):
            raise
        rec.update(ok=False, error=f"{type(e).__name__}: {e}"[:600])
        traceback.print_exc()
        code = 1
    rec["versions"] = versions()
    line = json.dumps(rec)
    print("RESULT " + line)
    if a.results:
        with open(a.results, "a") as f:
            f.write(line + "\n")
    sys.stdout.flush()
    sys.exit(code)


if __name__ == "__main__":
    main()
