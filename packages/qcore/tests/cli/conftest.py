"""A toy model of the command line's own: a source `toy:`, a language model over letters, and a pipeline that only pretends."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import pytest
import qcore
import torch
from qcore.calibration import Ledger
from qcore.cli import main
from qcore.cli._job import Steps
from qcore.model import Block, DictReader, LoadedModel, ModelAdapter, Site, Topology, materialize, parameters_on_meta
from qcore.numbers import Codebook, Float, Int, PowerOfTwo
from qcore.ops import ReferenceLinear, TorchInt4Linear, TorchInt8DynamicLinear
from qcore.packing import Bits, CompressedFloat, CompressedInt, CompressedPack
from qcore.plugins.shelf import Shelf
from qcore.transforms.rewrite import Rewrite
from safetensors.torch import save_file
from torch import nn

RECIPES = Path(qcore.__file__).parent / "recipes"


class Toy(nn.Module):
    """A bigram model with one linear layer to quantize."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(128, 64)
        self.mix = nn.Linear(64, 64, bias=False)
        self.head = nn.Linear(64, 128, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.mix(self.embed(ids)))


class Letters:
    def encode(self, text: str) -> list[int]:
        return [min(ord(c), 127) for c in text]


class ToyAdapter(ModelAdapter):
    name: ClassVar[str] = "toy"

    def matches(self, model: nn.Module) -> bool:
        return isinstance(model, Toy)

    def topology(self, model: nn.Module) -> Topology:
        return Topology(blocks=(Block("mix", ((Site("mix"),),)),))

    def outputs(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return model(batch["input_ids"])


def toy_model(texts: Path | None = None) -> LoadedModel:
    torch.manual_seed(0)
    weights = {k: v.detach().clone() for k, v in Toy().state_dict().items()}
    with parameters_on_meta():
        model = Toy()
    own = (texts / "calib.txt", texts / "eval.txt") if texts else (None, None)
    return LoadedModel(
        model, DictReader(weights), "toy", torch.float32, Letters(), "toy", notes=("its weights are random",), calibration=own[0], evaluation=own[1]
    )


@dataclass(frozen=True)
class Nearest:
    """Round to nearest."""

    name: ClassVar[str] = "rtn"
    clip: Literal["none", "mse"] = "mse"
    weighted: bool = False
    observes: ClassVar[tuple[Any, ...]] = ()


@dataclass(frozen=True)
class Columns:
    """Round one column at a time."""

    name: ClassVar[str] = "gptq"
    damp: float = 0.01
    observes: ClassVar[tuple[Any, ...]] = ("gram",)


@dataclass(frozen=True)
class Smooth:
    """Divide by a scale."""

    name: ClassVar[str] = "smoothquant"
    alpha: float = 0.5

    def wants(self, topology: Topology, specs: Any) -> dict[Site, tuple[Any, ...]]:
        return {}


@dataclass(frozen=True)
class Awq(Smooth):
    """Multiply by a scale."""

    name: ClassVar[str] = "awq"


def shelf(kind: str, *items: Any) -> Shelf[Any]:
    made: Shelf[Any] = Shelf(kind, list)
    for item in items:
        made.add(item.stem if isinstance(item, Path) else item.name, item, "qcore")
    return made


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "calib.txt").write_text("".join(f"the cat number {i} sat on mat {i * 7}\n" for i in range(2000)))
    (folder / "eval.txt").write_text("".join(f"a dog called {i} ran to {i * 3}\n" for i in range(1000)))
    return folder


@pytest.fixture
def registry(texts: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    class ToySource:
        name: ClassVar[str] = "toy"
        help: ClassVar[str] = "toy:NAME   a toy; toy:bare brings no text"

        def matches(self, uri: str) -> bool:
            return uri.startswith("toy:")

        def load(self, uri: str) -> LoadedModel:
            return toy_model(None if uri == "toy:bare" else texts)

    made = SimpleNamespace(
        formats=shelf("formats", Int, Float, PowerOfTwo, Codebook),
        solvers=shelf("solvers", Nearest, Columns),
        transforms=shelf("transforms", Smooth, Awq),
        packings=shelf("packings", CompressedPack, CompressedInt, CompressedFloat, Bits),
        kernels=shelf("kernels", ReferenceLinear, TorchInt4Linear, TorchInt8DynamicLinear),
        adapters=shelf("adapters", ToyAdapter),
        sources=shelf("sources", ToySource),
        recipes=shelf("recipes", *sorted(RECIPES.glob("*.toml"))),
        **{
            kind: shelf(kind)
            for kind in (
                "observers",
                "block_solvers",
                "allocators",
                "selectors",
                "calibrations",
                "tasks",
                "exporters",
                "lowerings",
                "commands",
                "modules",
            )
        },
    )
    monkeypatch.setattr("qcore.plugins.load_registry", lambda: made, raising=False)
    return made


@dataclass
class Proof:
    level: str
    max_difference: float
    max_output: float = 2.0
    tolerance: float = 1e-3
    loader: str = "pretend.load"


@dataclass
class Pretend:
    """Steps that do as little as possible; `fail` maps a step's name to what it raises."""

    fail: dict[str, BaseException] = field(default_factory=dict)
    called: list[str] = field(default_factory=list)
    batches: list[Any] = field(default_factory=list)
    level: str = "identical"

    def steps(self) -> Steps:
        return Steps(self.float_forward, self.quantize_model, self.save, self.prove, self.load, self.never, self.never, self.never)

    def never(self, *args: Any, **options: Any) -> Any:
        raise AssertionError("a toy is not streamed")

    def _step(self, name: str) -> None:
        self.called.append(name)
        if name in self.fail:
            raise self.fail[name]

    def float_forward(self, loaded: LoadedModel, adapter: ModelAdapter) -> Callable[[Any], torch.Tensor]:
        self._step("float_forward")
        materialize(loaded.model, "", loaded.reader)
        return lambda batch: adapter.outputs(loaded.model, batch)

    def quantize_model(self, loaded: LoadedModel, recipe: Any, batches: Any, *, registry: Any, adapter: Any, progress: Any, **options: Any) -> Any:
        assert not options["stream"] and options["journal"].finished(1) == 0
        assert all(p.is_meta for p in loaded.model.parameters())  # the float model's memory was given back
        self.batches = list(batches)
        self._step("quantize_model")
        progress("block", 1, 1)
        materialize(loaded.model, "", loaded.reader)
        loaded.model.mix.weight.data += 0.01
        record = SimpleNamespace(
            site="mix:weight",
            spec="int4",
            solver="X()",
            packing="bits",
            shape=(64, 64),
            error=0.01,
            of="weight",
            bits=4.5,
            nbytes=2304,
            seconds=0.1,
            remarks=(),
        )
        return SimpleNamespace(
            model=loaded.model,
            sites=[record],
            seconds={"blocks": 0.1},
            notes=["a note of the run"],
            values=None,
            coverage=Ledger(),
            rewrite=Rewrite(),
        )

    def save(self, model: nn.Module, folder: Path, **options: Any) -> None:
        assert options["adapter"] == options["source"] == "toy" and options["record"]["seed"] == 0
        save_file({k: v.clone() for k, v in model.state_dict().items()}, folder / "model.safetensors")
        self._step("save")

    def prove(self, folder: Path, model: nn.Module, batches: Any, *, outputs: Any, registry: Any, fresh: bool) -> Any:
        self._step("prove")
        assert outputs(model, batches[0]).shape[0] == 1
        return Proof(self.level, 0.25)

    def load(self, folder: Path, *, registry: Any) -> nn.Module:
        self._step("load")
        from safetensors.torch import load_file

        model = Toy()
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return model


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Pretend:
    made = Pretend()
    monkeypatch.setattr(Steps, "real", classmethod(lambda cls: made.steps()))
    return made


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def run(registry: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    monkeypatch.chdir(tmp_path)

    def call(*argv: str) -> Ran:
        code = main([str(a) for a in argv])
        said = capsys.readouterr()
        return Ran(code, said.out, said.err)

    return call
