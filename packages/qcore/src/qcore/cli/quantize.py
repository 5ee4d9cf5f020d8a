"""`qcore quantize`: the main job.

    load → plan → float reference → quantize → save → prove → evaluate what was saved → table, report.json, report.html

Everything is written into a folder beside the target, which takes its place at the end: the target is either whole or not there.
"""

import shutil
import time
from pathlib import Path
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


def quantize(
    model: ModelArg,
    recipe: RecipeOption,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write the checkpoint into.", show_default=False)],
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
    attribute: Annotated[
        bool, typer.Option("--attribute", help="Say in the report which modules the loss comes from: one evaluation for each of them.")
    ] = False,
    fresh_proof: Annotated[
        bool,
        typer.Option(
            "--fresh-proof/--no-fresh-proof",
            envvar="QCORE_FRESH_PROOF",
            help="Open the checkpoint in a process of its own, or in this one, which is quicker.",
        ),
    ] = True,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run into this folder that was interrupted.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the folder if a run wrote it.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and every problem, and stop before anything is computed.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Quantize a model, prove that the checkpoint loads, and measure what it cost.

    Several processes share the work: torchrun --nproc-per-node 2 -m qcore quantize ... (--max-ram is of each of them)

    Example: qcore quantize zoo:tiny-llama --recipe w4a16-gptq -o out/
    """
    from qcore.budget import parse_bytes
    from qcore.cli._job import Job, run_quantize
    from qcore.cli._progress import progress, silent
    from qcore.cli._run_folder import check_target, run_folder
    from qcore.cli._show import print_json, remark, show_plan, show_report
    from qcore.evaluation import MemoryMeter, choose_data
    from qcore.processes import of_this_run
    from qcore.recipe_file import load_recipe

    limit = None if max_ram is None else parse_bytes(max_ram)
    with of_this_run() as processes:
        first = processes.rank == 0
        inputs = [Path(name) for name in (model, recipe, calib, evaluation) if name is not None]
        if processes.agreed(first and check_target(out, force=force, resume=resume, inputs=inputs)):
            if first:
                shutil.rmtree(run_folder(out), ignore_errors=True)
                remark(f"{out}/ is finished; nothing was left to do")
            return
        meter = MemoryMeter()
        own = registry()
        overrides = with_budget(recipe, own, with_selector(select, tuple(setting or ())), bits)
        wanted = load_recipe(recipe, own, overrides)
        started = time.perf_counter()
        with meter.during("load"):
            loaded, chosen = open_model(model, own, adapter)
        seconds = {"load": time.perf_counter() - started}
        text = choose_data(loaded, calib, evaluation)
        with progress(meter.sample) if first else silent() as report_progress:
            job = Job(
                loaded,
                wanted,
                chosen,
                own,
                text,
                eval_tokens=eval_tokens,
                window=window,
                overrides=overrides,
                seconds=seconds,
                meter=meter,
                max_ram=limit,
                stream=stream,
                resume=resume,
                uri=model,
                attribute=attribute,
                processes=processes,
                engine=engine,
                tensor_parallel=tensor_parallel,
                fresh_proof=fresh_proof,
                dry_run=dry_run,
            )
            report = run_quantize(job, out, report_progress, lambda plan: show_plan(plan, stderr=as_json) if first else None)
        if report is None:
            return
        if as_json:
            print_json(report.to_dict())
        else:
            show_report(report)
            print(f"written: {out}/, {out / 'report.json'}, and to look at: {out / 'report.html'}")
