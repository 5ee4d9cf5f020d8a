"""`qcore tune`."""

from pathlib import Path
from typing import Annotated

import typer


def tune(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="zoo:tiny-llama, a transformers folder, a GGUF file.", show_default=False)],
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="gsq-w4a8g8, gsq-w4a6g6, gsq-w4a5g5, gsq-w8a8g8, qlora-nf4, or a TOML file.")],
    data: Annotated[Path, typer.Option("--data", metavar="FILE", help="Text to train on.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write into.", show_default=False)],
    evaluation: Annotated[Path | None, typer.Option("--eval", metavar="FILE", help="Held-out text [default: the last 20 % of --data].")] = None,
    rank: Annotated[int, typer.Option("--rank", help="Of the adapters.")] = 64,
    alpha: Annotated[float | None, typer.Option("--alpha", help="Adapters count alpha / rank [default: the rank].", show_default=False)] = None,
    steps: Annotated[int, typer.Option("--steps", help="Of the optimizer.")] = 200,
    batch: Annotated[int, typer.Option("--batch", help="Windows of one forward pass.")] = 4,
    accumulation: Annotated[int, typer.Option("--accumulation", help="Forward passes of one step.")] = 1,
    rate: Annotated[float, typer.Option("--lr", help="Learning rate at its highest; it falls to zero as a cosine.")] = 1e-3,
    warmup: Annotated[int, typer.Option("--warmup", help="Steps until it is at its highest.")] = 10,
    window: Annotated[int | None, typer.Option("--window", help="Tokens of one window [default: 256 for tiny models, else 512].")] = None,
    eval_tokens: Annotated[int, typer.Option("--eval-tokens", help="Held-out tokens to measure on.")] = 4096,
    seed: Annotated[int, typer.Option("--seed", help="Of adapters, order and stochastic rounding.")] = 0,
    rounding: Annotated[str, typer.Option("--rounding", help="Of gradients: spec, as the recipe says, or stochastic.")] = "spec",
    state_bits: Annotated[int, typer.Option("--state-bits", help="Of the optimizer's moments: 32 or 8.")] = 32,
    setting: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe: rules.1.format.mantissa=6.")] = None,
    hold: Annotated[bool, typer.Option("--hold", help="Keep weights as they are multiplied, 8 bytes each: quicker, with more memory.")] = False,
    merge: Annotated[bool, typer.Option("--merge", help="Write weights and adapters together too, as a float model.")] = False,
    keep_every: Annotated[int, typer.Option("--keep-every", help="Steps between two writings of the file to go on from.")] = 50,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run into this folder that was interrupted.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a folder that this command wrote.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show every problem, and stop before anything is computed.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Fine-tune a decoder with low-rank adapters over quantized weights, its products in few bits forward and backward.

    Example: qcore tune zoo:tiny-llama --recipe gsq-w4a6g6 --data train.txt --eval eval.txt --rank 32 -o out/
    """
    from qplug_llm.gsq.run import Job, run

    job = Job(
        uri=model,
        recipe=recipe,
        overrides=tuple(setting or ()),
        data=data,
        evaluation=evaluation,
        out=out,
        rank=rank,
        alpha=float(rank) if alpha is None else alpha,
        steps=steps,
        batch=batch,
        accumulation=accumulation,
        rate=rate,
        warmup=warmup,
        window=window,
        eval_tokens=eval_tokens,
        seed=seed,
        rounding=rounding,
        state_bits=state_bits,
        hold=hold,
        merge=merge,
        keep_every=keep_every,
        resume=resume,
        force=force,
    )
    run(job, dry_run=dry_run, as_json=as_json)
