"""`qcore plan`: what a run would do, and what stands against it, before any computing."""

from typing import Annotated

import typer

from qcore.cli._options import (
    AdapterOption,
    BitsOption,
    CalibOption,
    EngineOption,
    EvalOption,
    JsonOption,
    MaxRamOption,
    ModelArg,
    ParallelOption,
    RecipeOption,
    SelectOption,
    SetOption,
    StreamOption,
    TokensOption,
    WindowOption,
    open_model,
    registry,
    with_budget,
    with_selector,
)


def plan(
    model: ModelArg,
    recipe: RecipeOption,
    calib: CalibOption = None,
    evaluation: EvalOption = None,
    setting: SetOption = None,
    bits: BitsOption = None,
    select: SelectOption = None,
    eval_tokens: TokensOption = 4096,
    window: WindowOption = None,
    adapter: AdapterOption = None,
    max_ram: MaxRamOption = None,
    stream: StreamOption = False,
    engine: EngineOption = None,
    tensor_parallel: ParallelOption = 1,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="One line per site instead of one per kind.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show every decision and every problem of a run, without computing anything.

    Ends with exit code 2 when there are problems.

    Example: qcore plan zoo:tiny-llama --recipe w4a16-gptq
    """
    from dataclasses import replace

    from qcore.budget import parse_bytes
    from qcore.cli._data import data_problems
    from qcore.cli._job import has_data
    from qcore.cli._show import print_json, show_plan
    from qcore.evaluation.data import choose_data
    from qcore.plan import make_plan
    from qcore.recipe_file import load_recipe

    own, limit = registry(), None if max_ram is None else parse_bytes(max_ram)
    overrides = with_selector(select, tuple(setting or ()))
    wanted = load_recipe(recipe, own, with_budget(recipe, own, overrides, bits))
    loaded, chosen = open_model(model, own, adapter)
    text = choose_data(loaded, calib, evaluation)
    made = make_plan(
        loaded,
        wanted,
        chosen,
        own,
        has_data=has_data(wanted, text),
        max_ram=limit,
        stream=stream,
        engine=engine,
        tensor_parallel=tensor_parallel,
        eval_tokens=eval_tokens if text.evaluation is not None else 0,
    )
    found = data_problems(loaded, wanted, text, calibrates=made.needs_data, eval_tokens=eval_tokens, window=window)
    made = replace(made, problems=(*made.problems, *found))
    if as_json:
        print_json(made.to_dict())
        if made.problems:
            raise typer.Exit(2)
        return
    show_plan(made, verbose=verbose)
    made.require()
