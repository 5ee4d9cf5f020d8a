"""`qcore recipes`: the recipes that there are, and what they say."""

from typing import Annotated

import typer

from qcore.cli._options import JsonOption, SetOption, registry

app = typer.Typer(name="recipes", help="List recipes, or show one as TOML, to start your own from.", no_args_is_help=True, rich_markup_mode=None)


@app.command("list")
def list_recipes(as_json: JsonOption = False) -> None:
    """List every recipe that qcore and its plug-ins bring.

    Example: qcore recipes list
    """
    import tomllib

    from qcore.cli._show import print_json, table

    own = registry()
    rows = []
    for name, path in sorted(own.recipes.items()):
        try:
            description = tomllib.loads(path.read_text(encoding="utf-8")).get("description", "")
        except (OSError, ValueError) as e:
            description = f"cannot be read: {e}; mend {path}, or reinstall {own.recipes.origin[name]}"
        rows.append({"name": name, "description": description, "from": own.recipes.origin[name], "path": str(path)})
    if as_json:
        print_json(rows)
    else:
        table(("recipe", "what it does", "from"), [(r["name"], r["description"], r["from"]) for r in rows])


@app.command("show")
def show(
    name: Annotated[str, typer.Argument(help="A recipe's name, or a TOML file.", show_default=False)],
    setting: SetOption = None,
    resolved: Annotated[bool, typer.Option("--resolved", help="With every default written out, and what it extends merged in.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show one recipe; redirect it into a file, and you have your own.

    Example: qcore recipes show w4a16-gptq > my.toml && qcore quantize zoo:tiny-llama --recipe my.toml -o out/
    """
    import tomllib
    from pathlib import Path

    from qcore.cli._show import print_json
    from qcore.recipe_file import dump, load_recipe

    own = registry()
    recipe = load_recipe(name, own, setting or ())
    if as_json:
        print_json({"name": recipe.name} | tomllib.loads(dump(recipe)))
    elif resolved or setting:
        print(dump(recipe), end="")
    else:
        path = own.recipes[name] if name in own.recipes else Path(name)
        print(path.read_text(encoding="utf-8"), end="")
