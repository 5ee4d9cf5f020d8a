"""The cells of selection.py that run a model: a quantized encoder, calibration text chosen by a selector, prompts for a language model."""

import time
from pathlib import Path
from typing import Any

# (kind, what is compared, on what)
ENCODER = ("float", "w8a16-rtn", "w4a16-rtn", "w4a16-gptq")
CALIBRATION = ("seed", "subsa", "subsa-auto", "facility-location")
PROMPTS = ("random", "subsa", "subsa-auto", "facility-location")
MATRIX = [
    *(("encoder", recipe, "rotten-tomatoes") for recipe in ENCODER),
    *(("calibration", selector, "tiny-llama") for selector in CALIBRATION),
    *(("prompts", selector, f"smollm2-135m-{bits}") for bits in ("float", "w4a16-rtn") for selector in PROMPTS),
]
SHOWN, ITEMS, WORDS, TOKENS = 18, 64, 30, 220  # annotated texts, test items, words of each text that a prompt shows, tokens of a prompt


def encoder(cell: Any) -> dict[str, Any]:
    """MiniLM quantized by qcore: how near its vectors stay to the float model's, and what that does to neighbours and to a selection."""
    import labelled
    import numpy as np
    from qcore.pipeline import quantize_model
    from qcore.plugins import load_registry
    from qcore.recipe_file import load_recipe
    from qplug_subsa.coverage import coverage, random_coverage
    from qplug_subsa.embed import LocalModel, default_model, embed_with
    from qplug_subsa.encoder import TextEncoder, batches_of, load_encoder
    from qplug_subsa.retrieve import knn_accuracy, similarities
    from qplug_subsa.rows import as_rows
    from qplug_subsa.storage import recall
    from qplug_subsa.subsa import SubSA
    from qplug_subsa.units import Units

    source = LocalModel(default_model())
    parts = labelled.load(cell.what)
    pool, queries, calibration = parts["train"].texts[:800], parts["test"].texts[:200], parts["train"].texts[-128:]
    labels, truth = list(parts["train"].labels[:800]), list(parts["test"].labels[:200])
    exact = [embed_with(source.model, source.tokenizer, source.settings, texts) for texts in (pool, queries)]
    bits, seconds, vectors = 32.0, 0.0, exact
    if cell.selector != "float":
        registry = load_registry()
        started = time.perf_counter()
        batches = batches_of(source.tokenizer, list(calibration), 64)
        # GPTQ's sequences of one token stand for attention sinks of causal models; an encoder has none
        recipe = load_recipe(cell.selector, registry, ["calibration.starts=0"])
        q = quantize_model(load_encoder(source.folder), recipe, batches, registry=registry, adapter=TextEncoder())
        seconds = time.perf_counter() - started
        bits = sum(8 * r.nbytes for r in q.sites) / sum(r.shape[0] * r.shape[1] for r in q.sites)
        vectors = [embed_with(q.model, source.tokenizer, source.settings, texts) for texts in (pool, queries)]
    near = similarities(vectors[0], vectors[1])
    chosen, wanted = (SubSA("auto").select(v[0], 100) for v in (vectors, exact))
    units = Units.of(as_rows(exact[0]))
    return {
        "bits": bits,
        "cosine_to_float": float(np.mean((vectors[0] * exact[0]).sum(1))),
        "recall_at_10": recall(near, similarities(*exact), 10),
        "accuracy_5nn": knn_accuracy(near, labels, truth, 5),
        "same_choices_of_100": len(set(chosen) & set(wanted)),
        # what the choices are worth in the float model's space
        "covers": coverage(units, chosen).nearest,
        "covers_random": random_coverage(units, 100).nearest,
        "quantize_seconds": round(seconds, 1),
        "pool": len(pool),
        "queries": len(queries),
    }


def calibration(cell: Any) -> dict[str, Any]:
    """GPTQ at 3 bits on windows of the zoo model's own text: chosen by seed, or by a selector from half of the windows that the seed draws."""
    import tempfile

    from qcore.calibration.text import TextFile, cut, encode
    from qcore.evaluation import LanguageModeling
    from qcore.model import adapter_for, load_source
    from qcore.pipeline import float_forward, quantize_model
    from qcore.plugins import load_registry
    from qcore.recipe_file import load_recipe

    registry = load_registry()
    uri = f"zoo:{cell.what}"
    loaded = load_source(uri, registry.sources)
    adapter = adapter_for(loaded.model, registry.adapters)
    assert loaded.calibration is not None and loaded.evaluation is not None
    task = LanguageModeling(cut(encode(loaded.tokenizer, loaded.evaluation.read_text(), "eval"), 256)[:64], batch=4)
    windows = len(cut(encode(loaded.tokenizer, loaded.calibration.read_text(), "calib"), 256))
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        reference = task.reference(float_forward(loaded, adapter), Path(folder))
        for seed in range(5):
            overrides = ["rules.0.format.bits=3", "rules.0.granularity.size=64", "calibration.samples=64", "calibration.length=256"]
            overrides += [f"calibration.seed={seed}", f"calibration.candidates={max(windows // 2, 64)}"]
            if cell.selector != "seed":
                overrides.append(f"calibration.select.name={cell.selector.removesuffix('-auto')}")
                overrides += ["calibration.select.lam=auto"] if cell.selector.endswith("-auto") else []
            recipe = load_recipe("w4a16-gptq", registry, overrides)
            again = load_source(uri, registry.sources)
            batches = TextFile(loaded.calibration).batches(loaded.tokenizer, recipe.calibration)
            q = quantize_model(again, recipe, batches, registry=registry, adapter=adapter)
            scores = task.evaluate(lambda batch, model=q.model: adapter.outputs(model, batch), reference)
            runs.append({"seed": seed, "kl": scores["kl"], "kl_standard_error": scores["kl_standard_error"], "perplexity": scores["perplexity"]})
    return {"runs": runs, "windows": windows, "perplexity_float": scores["perplexity_reference"]}


def prompts(cell: Any) -> dict[str, Any]:
    """BBC topics by a language model: the label whose first token is likeliest behind a prompt of retrieved examples."""
    import labelled
    import numpy as np
    import torch
    from qcore.model import adapter_for, load_source
    from qcore.pipeline import float_forward, quantize_model
    from qcore.plugins import load_registry
    from qcore.recipe_file import load_recipe
    from qplug_subsa.pool import Pool
    from qplug_subsa.prompts import Template, build_prompts
    from qplug_subsa.retrieve import Limits, similarities
    from selection import choose, embedded

    model_name, form = "smollm2-135m", cell.what.removeprefix("smollm2-135m-")
    registry = load_registry()
    loaded = load_source(f"zoo:{model_name}", registry.sources)
    adapter = adapter_for(loaded.model, registry.adapters)
    tokenizer = loaded.tokenizer
    if form == "float":
        float_forward(loaded, adapter)
        model: Any = loaded.model
    else:
        model = quantize_model(loaded, load_recipe(form, registry, ["rules.0.granularity.size=64"]), registry=registry, adapter=adapter).model
    parts, vectors = labelled.load("bbc"), embedded("bbc")
    classes = sorted(set(parts["train"].labels))
    first = [tokenizer.encode(f" {c}")[0] for c in classes]
    assert len(set(first)) == len(classes), "two labels begin with one token"

    def shown(part: str, indices: Any) -> Pool:
        texts = [" ".join(parts[part].texts[i].split()[:WORDS]) for i in indices]
        records = [{"text": t, "label": parts[part].labels[i]} for t, i in zip(texts, indices, strict=True)]
        return Pool(Path(part), records, texts, [str(i) for i in indices], [f"text {i}" for i in indices])

    runs = []
    for seed in range(2):
        rng = np.random.default_rng(seed)
        mine = rng.permutation(len(vectors["train"][0]))[: len(vectors["train"][0]) * 4 // 5]
        items = rng.permutation(len(vectors["test"][0]))[:ITEMS]
        chosen = mine[choose(cell.selector, vectors["train"][0][mine], vectors["train"][1][mine], SHOWN, seed)]
        near = similarities(vectors["train"][0][chosen], vectors["test"][0][items])
        template = Template("Text: {text}\nTopic: {label}")
        built = build_prompts(
            shown("train", chosen), shown("test", items), near, template, lambda t: len(tokenizer.encode(t)), Limits(tokens=TOKENS, example=100)
        )
        right = 0
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            for prompt, item in zip(built, items, strict=True):
                ids = torch.tensor([tokenizer.encode(prompt.text)])
                logits = model(input_ids=ids, logits_to_keep=1).logits[0, -1]
                right += classes[int(logits[first].argmax())] == parts["test"].labels[item]
        runs.append({"seed": seed, "accuracy": right / ITEMS, "examples": float(np.mean([len(p.examples) for p in built]))})
    return {"runs": runs, "items": ITEMS, "annotated": SHOWN, "tokens": TOKENS, "notes": list(loaded.notes)}


KINDS = {"encoder": encoder, "calibration": calibration, "prompts": prompts}
