"""The weights that stay float, looked at before a run that would otherwise never compute with them."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qcore.model import LoadedModel
    from qcore.plan import Plan


def require_finite_floats(loaded: "LoadedModel", plan: "Plan") -> None:
    """SpecError that names the first NaN or infinity in a tensor that the plan leaves float; the others are looked at when they are quantized.

    A run with evaluation data finds it in its reference pass; one without would write it into the checkpoint.
    """
    from qcore.errors import at
    from qcore.model.reader import owned_names
    from qcore.numbers.tensor import require_finite

    quantized = {decision.site.partition("[")[0].replace(":", ".") for decision in plan.decisions}
    there = set(loaded.reader.names())
    for name, _, _, parameter in owned_names(loaded.model, ""):
        if parameter and name in there and name not in quantized:
            with at(name):
                require_finite(loaded.reader[name])
