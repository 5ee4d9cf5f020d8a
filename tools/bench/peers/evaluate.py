#!/usr/bin/env python3
"""Perplexity, KL(reference || candidate) and top-1 agreement of a dequantized HF folder, one JSON line on stdout.

The reference's final hidden states are cached (small), its logits are recomputed from them: the KL is exact, not top-k.
Windows do not overlap; token t of a window is predicted from tokens < t of the same window, so 511 of 512 count for
perplexity; KL and top-1 use the same positions. Everything runs in fp32."""

import argparse
import json
import math
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import common


def fake_quant_tokens(x, bits):
    """Dynamic per-token symmetric integer fake quantization, scale = absmax / (2**(bits-1) - 1)."""
    q = 2 ** (bits - 1) - 1
    s = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / q
    return (x / s).round_().clamp_(-q - 1, q).mul_(s)


def attach(model, online, act_bits):

    n = 0
    for name, m in common.linears(model).items():
        R = online.get(name)
        if R is None and not act_bits:
            continue

        def pre(mod, args, R=R):
            x = args[0]
            if R is not None:
                x = x @ R
            if act_bits:
                x = fake_quant_tokens(x, act_bits)
            return (x, *args[1:])

        m.register_forward_pre_hook(pre)
        n += 1
    return n


def hidden(model, ids):
    return model.model(input_ids=ids, use_cache=False).last_hidden_state


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("model", nargs="+", help="one or more folders: they share the reference's logits")
    ap.add_argument("--ref", required=True, help="full-precision HF folder")
    ap.add_argument("--text", required=True)
    ap.add_argument("--windows", type=int, default=79)
    ap.add_argument("--window", type=int, default=512)
    ap.add_argument("--act-bits", type=int, default=0)
    ap.add_argument("--ref-cache", default="", help="file for the reference's hidden states")
    ap.add_argument("--results", default="", help="append the JSON lines to this file too")
    ap.add_argument("--threads", type=int, default=0)
    a = ap.parse_args()
    import torch
    from safetensors.torch import load_file

    if a.threads:
        torch.set_num_threads(a.threads)
    torch.set_grad_enabled(False)
    ids = common.token_windows(a.ref, a.text, a.windows, a.window)
    key = common.ids_sha(ids)
    cache = pathlib.Path(a.ref_cache) if a.ref_cache else None
    H = None
    if cache and cache.exists():
        c = torch.load(cache, weights_only=True)
        if c["key"] == key:
            H, ref_head, ref_nll = c["h"], c["head"], c["nll"]
    if H is None:
        ref = common.load_fp(a.ref)
        ref_head = ref.lm_head.weight.detach().clone()
        H = []
        nll = 0.0
        for row in ids:
            h = hidden(ref, row[None])[0]
            z = h[:-1] @ ref_head.T
            nll += float(torch.nn.functional.cross_entropy(z, row[1:], reduction="sum").double())
            H.append(h[:-1].clone())
        H = torch.stack(H)
        ref_nll = nll
        del ref
        if cache:
            torch.save({"key": key, "h": H, "head": ref_head, "nll": ref_nll}, cache)
    t0 = time.perf_counter()
    cands = []
    for path in a.model:
        p = pathlib.Path(path)
        online = load_file(str(p / "online.safetensors")) if (p / "online.safetensors").exists() else {}
        m = common.load_fp(p)
        hooks = attach(m, online, a.act_bits)
        cands.append({"tag": p.name, "m": m, "online": len(online), "hooks": hooks, "nll": 0.0, "kl": 0.0, "top": 0, "kls": [], "nlls": []})
    n = 0
    for row, hr in zip(ids, H):
        for c in cands:
            c["h"] = hidden(c["m"], row[None])[0][:-1]
            c["w_nll"] = c["w_kl"] = 0.0
        for i in range(0, len(hr), 128):  # small pieces keep the wide logits in cache
            zr, y = hr[i : i + 128] @ ref_head.T, row[i + 1 : i + 129]
            lser = zr.logsumexp(-1)
            pr = (zr - lser[:, None]).exp_()
            tr = zr.argmax(-1)
            for c in cands:
                z = c["h"][i : i + 128] @ c["m"].lm_head.weight.T
                lse = z.logsumexp(-1)
                c["w_nll"] += float((lse - z.gather(1, y[:, None])[:, 0]).double().sum())
                c["top"] += int((z.argmax(-1) == tr).sum())
                c["w_kl"] += float((torch.linalg.vecdot(pr, zr - z) - lser + lse).double().sum())
        n += len(row) - 1
        for c in cands:
            c["nll"] += c["w_nll"]
            c["kl"] += c["w_kl"]
            c["nlls"].append(c["w_nll"] / (len(row) - 1))
            c["kls"].append(c["w_kl"] / (len(row) - 1))
    k = len(ids)

    def sd(v):
        return (sum((x - sum(v) / k) ** 2 for x in v) / max(k - 1, 1)) ** 0.5

    dt = round((time.perf_counter() - t0) / len(cands), 1)
    for c in cands:
        r = {
            "tag": c["tag"] + (f"+a{a.act_bits}" if a.act_bits else ""),
            "ppl": math.exp(min(c["nll"] / n, 80)),
            "nll": c["nll"] / n,
            "ref_ppl": math.exp(ref_nll / n),
            "kl": c["kl"] / n,
            "kl_sem": sd(c["kls"]) / k**0.5,
            "top1": c["top"] / n,
            "tokens": n,
            "act_bits": a.act_bits,
            "online": c["online"],
            "hooks": c["hooks"],
            "ids": key,
            "eval_s": dt,
        }
        line = json.dumps({x: (round(y, 5) if isinstance(y, float) else y) for x, y in r.items()})
        print(line, flush=True)
        if a.results:
            with open(a.results, "a") as f:
                f.write(line + "\n")


if __name__ == "__main__":
    main()
