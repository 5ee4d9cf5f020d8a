"""What modules of one kind are called, whatever layer they lie in.

"model.layers.3.mlp.down_proj" is a "mlp.down_proj" of "model.layers.3".
"""


def split_site(site: str) -> tuple[str, str, str]:
    """(layer, index, kind) of a site or a module path.

    "model.layers.3.mlp.down_proj:weight" → ("model.layers.3", "3", "mlp.down_proj")
    "model.layers.3.mlp.experts:up_proj[7]" → ("model.layers.3", "3", "mlp.experts.up_proj")
    "lm_head:weight" → ("", "", "lm_head")
    """
    module, _, tensor = site.partition(":")
    own = tensor.partition("[")[0]
    names = module.split(".")
    first = next((i for i, name in enumerate(names) if name.isdigit()), None)
    layer = "" if first is None else ".".join(names[: first + 1])
    rest = names if first is None else names[first + 1 :]
    kind = ".".join("*" if name.isdigit() else name for name in rest if name)
    if own and own != "weight":
        kind = f"{kind}.{own}" if kind else own
    return layer, "" if first is None else names[first], kind or module


def kind_of(site: str) -> str:
    """The last of `split_site`."""
    return split_site(site)[2]
