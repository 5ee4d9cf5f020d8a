"""`qcore eval`: perplexity of one model, and its distance from another."""

from typing import Annotated

import typer

from qcore.cli._options import AdapterOption, EvalOption, JsonOption, ModelArg, TokensOption, WindowOption, registry


def evaluate(
    model: ModelArg,
    text: EvalOption = None,
    reference: Annotated[str | None, typer.Option("--reference", help="The model to measure against: its float self, usually.")] = None,
    eval_tokens: TokensOption = 4096,
    window: WindowOption = None,
    adapter: AdapterOption = None,
    kernel: Annotated[str | None, typer.Option("--kernel", help="Run a checkpoint's layers by this kernel wherever it can.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a model or a checkpoint on text: perplexity, and with --reference KL divergence and top-1 agreement.

    Example: qcore eval out/ --reference zoo:tiny-llama
    """
    from qcore.cli._show import print_json, score_name, scores_row, table
    from qcore.cli.compare import run_compare
    from qcore.evaluation.report import own_scores

    rows = run_compare([reference or model, model] if reference else [model], registry(), text, eval_tokens, window, adapter, kernel)
    row = rows[-1]
    if as_json:
        print_json(row.to_dict())
        return
    own, kl, top1 = scores_row(row.scores)
    against = [(f"KL from {rows[0].name}", kl), ("top-1 agreement", top1)] if reference else []
    further = [(name, now) for name, (_, now) in own_scores(row.scores).items() if name != score_name(row.scores)]
    amounts = [(name, str(row.scores[name])) for name in ("tokens", "images", "texts", "rows") if name in row.scores][:1]
    table(("", row.name), [(score_name(row.scores), own), *further, *[line for line in against if line[1] != "–"], *amounts])
