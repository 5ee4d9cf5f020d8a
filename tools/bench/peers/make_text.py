#!/usr/bin/env python3
"""Write disjoint calib.txt / eval.txt from a tree of one-document-per-file .txt files.

Documents are ordered by the SHA-256 of their relative path and dealt out whole, so no document is in both files;
byte-identical documents (after whitespace folding) are kept once."""

import argparse
import hashlib
import json
import pathlib

ap = argparse.ArgumentParser(description=__doc__)
ap.add_argument("src")
ap.add_argument("out")
ap.add_argument("--glob", default="**/*.txt")
ap.add_argument("--calib-chars", type=int, default=260_000)
ap.add_argument("--eval-chars", type=int, default=260_000)
a = ap.parse_args()
src, out = pathlib.Path(a.src), pathlib.Path(a.out)
out.mkdir(parents=True, exist_ok=True)
docs, seen = [], set()
for p in sorted(src.glob(a.glob), key=lambda p: hashlib.sha256(str(p.relative_to(src)).encode()).hexdigest()):
    t = p.read_text(encoding="utf-8", errors="replace").strip()
    h = hashlib.sha256(" ".join(t.split()).encode()).hexdigest()
    # BBC news repeats stories under several sections with the same title: drop any repeated title too
    title = hashlib.sha256(t.split("\n", 1)[0].strip().lower().encode()).hexdigest()
    if not t or h in seen or title in seen:
        continue
    seen |= {h, title}
    docs.append((str(p.relative_to(src)), t))
need = {"calib": a.calib_chars, "eval": a.eval_chars}
i = 0
info = {}
for name, n in need.items():
    parts, ids, c = [], [], 0
    while c < n and i < len(docs):
        parts.append(docs[i][1])
        ids.append(docs[i][0])
        c += len(docs[i][1]) + 2
        i += 1
    text = "\n\n".join(parts) + "\n"
    (out / f"{name}.txt").write_text(text, encoding="utf-8")
    info[name] = {"documents": len(ids), "chars": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest(), "ids": ids}
(out / "text.json").write_text(json.dumps(info, indent=1))
print(json.dumps({k: {x: v[x] for x in ("documents", "chars", "sha256")} for k, v in info.items()}))
