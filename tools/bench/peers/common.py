"""Helpers shared by run_peer.py and evaluate.py. Needs torch, transformers, safetensors only."""

import hashlib
import json
import os
import pathlib
import shutil
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


def token_windows(model_dir, text_file, n_windows, window):
    """[n_windows, window] LongTensor: the text tokenized in one piece, cut into non-overlapping windows. No BOS.

    text_file may be a .safetensors file with the token ids themselves, "ids" [n, window]: the first n_windows of them.
    """
    import torch
    from tokenizers import Tokenizer

    if str(text_file).endswith(".safetensors"):
        from safetensors.torch import load_file

        ids = load_file(str(text_file))["ids"]
        if ids.shape[0] < n_windows or ids.shape[1] != window:
            raise SystemExit(f"{text_file}: {tuple(ids.shape)} token ids, need {n_windows} windows of {window}")
        return ids[:n_windows].clone()

    tok = Tokenizer.from_file(str(pathlib.Path(model_dir) / "tokenizer.json"))
    ids = tok.encode(pathlib.Path(text_file).read_text(encoding="utf-8"), add_special_tokens=False).ids
    have = len(ids) // window
    if have < n_windows:
        raise SystemExit(f"{text_file}: {have} windows of {window} tokens, need {n_windows}")
    return torch.tensor(ids[: n_windows * window], dtype=torch.long).view(n_windows, window)


def ids_sha(t):
    return hashlib.sha256(t.numpy().astype("<i8").tobytes()).hexdigest()[:16]


def load_fp(model_dir, dtype="float32"):
    import torch
    from transformers import AutoModelForCausalLM

    m = AutoModelForCausalLM.from_pretrained(str(model_dir), dtype=getattr(torch, dtype)).eval()
    with torch.no_grad():  # safetensors maps the file lazily: read it now, not inside somebody's timing
        for p in m.parameters():
            p.data = p.data.clone()
    m.tie_weights()
    return m


def is_target(name):
    """Linear layers that are quantized: everything but the output head."""
    return "lm_head" not in name


def linears(model):
    import torch

    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and is_target(n)}


def _status(key):
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith(key + ":"):
                return int(line.split()[1]) / 1024  # MiB
    return 0.0


class Meter:
    """Wall time and peak resident memory of a block. The peak counter is reset first where the kernel lets us."""

    def __enter__(self):
        self.rss_before_mib = round(_status("VmRSS"))
        try:
            with open("/proc/self/clear_refs", "w") as f:
                f.write("5")
            self.peak_scope = "block"
        except OSError:
            self.peak_scope = "process"
        self.load1 = os.getloadavg()[0]
        self.cpu0 = sum(os.times()[:4])
        self.t0 = time.perf_counter()
        return self

    def __exit__(self, *exc):
        self.seconds = round(time.perf_counter() - self.t0, 2)
        self.cpu_seconds = round(sum(os.times()[:4]) - self.cpu0, 2)
        self.peak_rss_mib = round(_status("VmHWM"))
        self.load1_end = os.getloadavg()[0]

    def as_dict(self):
        return {k: getattr(self, k) for k in ("seconds", "cpu_seconds", "rss_before_mib", "peak_rss_mib", "peak_scope", "load1", "load1_end")}


def distinct_per_group(w, group):
    """Largest number of distinct values in one contiguous group of one row: <= 2**bits for an honest b-bit grid."""

    _o, i = w.shape
    g = group if group and group > 0 else i
    if i % g:
        return -1
    s = w.float().reshape(-1, g).sort(dim=1).values
    d = (s[:, 1:] - s[:, :-1]).abs() > 1e-6 * s.abs().amax(1, keepdim=True)
    return int(d.sum(1).max()) + 1


def save_dequantized(src_dir, out_dir, weights, meta, untied_head=None, online=None, group=None):
    """Plain HF folder with fp32 weights.

    weights: {state-dict name: tensor}, replaces same-named tensors of src_dir (all others are copied unchanged).
    untied_head: tensor for lm_head.weight when a method separated it from the embeddings.
    online: {linear module name: [in,in] matrix R}; evaluate.py feeds x @ R to that layer (rotations left at run time).
    """
    import torch
    from safetensors.torch import load_file, save_file

    src, out = pathlib.Path(src_dir), pathlib.Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    for f in src.iterdir():
        if f.suffix in (".json", ".jinja", ".model", ".txt") and "index" not in f.name:
            shutil.copy(f, out / f.name)
    base = {}
    for f in sorted(src.glob("*.safetensors")):
        base.update(load_file(str(f)))
    unknown = [k for k in weights if k not in base]
    if unknown:
        raise KeyError(f"not in the source model: {unknown[:4]} (+{len(unknown)})")
    changed = {}
    for k, v in weights.items():
        v = v.detach().to(torch.float32).contiguous().clone()
        if v.shape != base[k].shape:
            raise ValueError(f"{k}: {tuple(v.shape)} != {tuple(base[k].shape)}")
        if not torch.isfinite(v).all():
            meta.setdefault("nonfinite", []).append(k)
        if not torch.equal(v, base[k].float()):
            changed[k] = True
        base[k] = v
    cfg = json.loads((out / "config.json").read_text())
    cfg.pop("quantization_config", None)
    cfg["dtype"] = "float32"
    cfg.pop("torch_dtype", None)
    if untied_head is not None:
        base["lm_head.weight"] = untied_head.detach().float().contiguous().clone()
        cfg["tie_word_embeddings"] = False
    (out / "config.json").write_text(json.dumps(cfg, indent=1))
    save_file(base, str(out / "model.safetensors"), metadata={"format": "pt"})
    if online:
        save_file({k: v.detach().float().contiguous().clone() for k, v in online.items()}, str(out / "online.safetensors"))
    targets = [k for k in base if k.endswith("_proj.weight")]
    meta["changed_tensors"] = len(changed)
    meta["changed_nonlinear"] = sorted(k for k in changed if k not in targets)[:3]
    meta["unchanged_linears"] = sum(k not in changed for k in targets)
    if group is not None:
        meta["max_distinct_per_group"] = max(distinct_per_group(base[k], group) for k in targets)
    return out
