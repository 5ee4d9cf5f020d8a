"""Options that several commands share, and how they become objects."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from qcore.model import LoadedModel, ModelAdapter
    from qcore.plugins import Registry

ModelArg = Annotated[str, typer.Argument(metavar="MODEL", help="zoo:tiny-llama, a transformers folder, a GGUF file, …", show_default=False)]
RecipeOption = Annotated[str, typer.Option("--recipe", "-r", help="A recipe's name (`qcore recipes list`) or a TOML file.", show_default=False)]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe: solver.damp=0.05, rules.0.granularity.size=32.")
]
CalibOption = Annotated[
    Path | None, typer.Option("--calib", metavar="FILE", help="Calibration text (20 % of it is held out without --eval) or images.")
]
EvalOption = Annotated[Path | None, typer.Option("--eval", metavar="FILE", help="Evaluation text, or images.")]
TokensOption = Annotated[int, typer.Option("--eval-tokens", min=2, help="Tokens to evaluate on.")]
WindowOption = Annotated[
    int | None, typer.Option("--window", min=2, help="Tokens of one evaluation window [default: 256 for tiny models, else 512].", show_default=False)
]
BitsOption = Annotated[
    float | None,
    typer.Option("--bits", metavar="B", help="Bits per weight that a recipe with a budget may spend (`--recipe mixed`).", show_default=False),
]
SelectOption = Annotated[
    str | None, typer.Option("--select", metavar="NAME", help="Choose calibration text by what it says (`qcore methods selectors`), not by seed.")
]
AdapterOption = Annotated[str | None, typer.Option("--adapter", help="The adapter to use, where several match.")]
MaxRamOption = Annotated[
    str | None, typer.Option("--max-ram", metavar="SIZE", help="Memory the run may take, 3GiB or 3500MB [default: what is free].", show_default=False)
]
StreamOption = Annotated[bool, typer.Option("--stream", help="Hold one block in memory at a time, also where the model would fit.")]
EngineOption = Annotated[
    str | None,
    typer.Option("--engine", help="What is to serve it: transformers, vllm, llama.cpp or onnxruntime; refuse what it cannot.", show_default=False),
]
ParallelOption = Annotated[int, typer.Option("--tensor-parallel", min=1, help="Devices that --engine is to split it over: 1, 2, 4 or 8.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def registry() -> "Registry":
    from qcore.plugins import load_registry

    return load_registry()


def with_budget(recipe: str, own: "Registry", overrides: tuple[str, ...], bits: float | None) -> tuple[str, ...]:
    """The overrides with a budget among them; SpecError for a recipe that spends none."""
    if bits is None:
        return overrides
    from math import isfinite

    from qcore.errors import SpecError
    from qcore.recipe_file import load_recipe

    if not isfinite(bits):
        raise SpecError(f"--bits {bits:g} is no budget; pass a number of bits per weight, such as --bits 3.5")
    allocator = load_recipe(recipe, own, overrides).allocator
    if not hasattr(allocator, "bits"):
        raise SpecError(f"--bits {bits:g}: recipe {recipe!r} has no allocator with a budget; take --recipe mixed, or a recipe for one width")
    return (*overrides, f"allocator.bits={bits}")


def with_selector(select: str | None, overrides: tuple[str, ...]) -> tuple[str, ...]:
    """The overrides with a selector of calibration text before them, so that they can set its options."""
    return overrides if select is None else (f"calibration.select.name={select}", *overrides)


def open_model(uri: str, own: "Registry", adapter: str | None) -> "tuple[LoadedModel, ModelAdapter]":
    """The model behind an address, and the adapter that understands it."""
    from qcore.errors import NotFound, SpecError
    from qcore.model import adapter_for, load_source

    if not uri.strip():
        raise NotFound(f"the model's address is empty, got {uri!r}; pass a folder, a file, or zoo:tiny-llama")
    try:
        loaded = load_source(uri, own.sources)
    except NotFound as e:
        if not (hint := _hint(uri)):
            raise
        raise NotFound(f"{e}\n{hint}") from e
    chosen = adapter_for(loaded.model, own.adapters, adapter)
    if adapter is not None and not chosen.matches(loaded.model):
        fitting = [name for name, cls in own.adapters.items() if cls().matches(loaded.model)]
        raise SpecError(
            f"--adapter {adapter} does not understand {loaded.name}, a {type(loaded.model).__name__}; "
            f"leave --adapter out, or take {' or '.join(fitting) or 'another model: none of those installed does'}"
        )
    return loaded, chosen


def _hint(uri: str) -> str:
    """What a user may have meant by an address that no source takes; "" where nothing comes to mind."""
    path = Path(uri)
    if path.is_dir():
        names = {p.name for p in path.iterdir()}
        if not names:
            return f"{uri} is an empty folder"
        if "config.json" not in names:
            return f"{uri} holds no config.json, which says what its weights are of: fetch it too, or name the folder that holds it"
    elif not path.parent.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", uri):
        return (
            f"qcore downloads nothing; if {uri} is a name on the Hugging Face Hub: hf download {uri} --local-dir {path.name}, then pass {path.name}/"
        )
    return ""


def window_length(window: int | None, model: Any) -> int:
    """Tokens of one evaluation window; SpecError when the model cannot see that many."""
    from qcore.errors import SpecError
    from qcore.evaluation import default_window
    from qcore.plan import context_length

    context = context_length(model)
    if window is not None and context is not None and window > context:
        raise SpecError(f"--window {window} is longer than what the model can see, {context} tokens; pass --window {context} or less")
    return window or default_window(sum(p.numel() for p in model.parameters()), context)
