"""`qcore export`: a checkpoint as another program's file."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qcore.cli._options import JsonOption, registry

if TYPE_CHECKING:
    from torch import Tensor, nn

CheckpointArg = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A folder that `qcore quantize` wrote.", show_default=False)]
ToOption = Annotated[str, typer.Option("--to", help="Whose file (`qcore methods exporters`).")]
OutOption = Annotated[Path | None, typer.Option("--output", "-o", help="The file [default: model.onnx in the checkpoint].", show_default=False)]
ShapeOption = Annotated[str, typer.Option("--shape", metavar="B,C,H,W", help="Sizes of an example input.")]
ChangeOption = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change the exporter: weights=int8.")]


def export(
    checkpoint: CheckpointArg,
    to: ToOption = "onnx",
    output: OutOption = None,
    shape: ShapeOption = "1,3,224,224",
    setting: ChangeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a quantized model for another program, and run it there where that program is installed.

    Example: qcore export out/ --to onnx -o model.onnx --shape 1,3,224,224
    """
    from qcore.checkpoint import load
    from qcore.cli._show import print_json, table

    own = registry()
    exporter = configured(own.exporters[to], setting or [])
    example = example_of(shape)
    model = load(checkpoint, registry=own)
    written = exporter.write(model, output or checkpoint / f"model{exporter.suffix}", example)
    found: dict[str, Any] = {"file": str(written.file), "bytes": written.file.stat().st_size, "notes": list(written.notes)}
    found |= checked(model, written.file, example)
    if as_json:
        print_json(found)
    else:
        table(("", str(checkpoint)), [(k.replace("_", " "), "\n".join(v) if isinstance(v, list) else str(v)) for k, v in found.items()])


def configured(cls: type[Any], settings: list[str]) -> Any:
    """The exporter, with its fields set from KEY=VALUE."""
    from dataclasses import fields

    from qcore.errors import SpecError

    chosen = {}
    names = [f.name for f in fields(cls)]
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals or key not in names:
            raise SpecError(f"--set {text!r}: exporter {cls.name!r} is changed by KEY=VALUE, with the keys: {', '.join(names) or 'none'}")
        chosen[key] = value.strip("\"'")
    return cls(**chosen)


def example_of(shape: str) -> "Tensor":
    """A seeded random input of these sizes."""
    import torch

    from qcore.errors import SpecError

    try:
        sizes = [int(n) for n in shape.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise SpecError(f"--shape wants positive sizes such as 1,3,224,224, got {shape!r}")
    return torch.randn(sizes, generator=torch.Generator().manual_seed(0))


def checked(model: "nn.Module", file: Path, example: "Tensor") -> dict[str, Any]:
    """How far ONNX Runtime's outputs are from ours on the example, relative to the largest; a word where it is not installed."""
    if file.suffix != ".onnx":
        return {}
    import torch

    try:
        import onnxruntime
    except ModuleNotFoundError:
        return {"checked": "no: onnxruntime is not installed (pip install 'qcore[onnx]')"}
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    theirs = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: example.numpy()})[0])
    with torch.no_grad():
        ours = model(example)
    gap = float((theirs - ours).abs().max() / ours.abs().max().clamp(min=1e-30))
    return {"checked": f"onnxruntime {onnxruntime.__version__}", "largest_difference": float(f"{gap:.3g}")}
