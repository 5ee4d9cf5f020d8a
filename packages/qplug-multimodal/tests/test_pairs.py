"""Folders, pairs of pictures and text, and what is judged on them."""

import json

import pytest
import torch
from PIL import Image
from qcore.errors import CalibrationError, CheckpointError, NotFound
from qcore.model import adapter_for, load_source
from qcore.pipeline import float_forward
from qcore.plugins import load_registry
from qcore.recipe import CalibrationSettings
from qcore.testing import check_source
from qplug_multimodal import scenes
from qplug_multimodal.pairs import PairFile, VisualQuestions, data_of, processed
from qplug_multimodal.sources import VisionLanguageFolder, stored_names
from qplug_multimodal.testing import tiny_qwen2_vl
from safetensors.torch import save_file

REGISTRY = load_registry()


@pytest.fixture(scope="module")
def loaded():
    return load_source("multimodal:tiny-llava", REGISTRY.sources)


def _write(folder, name, seeds, shift=0):
    lines = []
    for i, seed in enumerate(seeds):
        picture = scenes.draw(1, seed).pixels[0]
        Image.fromarray((picture * 255).byte().permute(1, 2, 0).numpy()).save(folder / f"{seed}.png")
        answer = ["circle", "red"][(i + shift) % 2]
        lines.append(json.dumps({"images": [f"{seed}.png"], "text": "look <image> what shape top left ?", "answer": answer}))
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / name


def test_the_trained_model_answers_most_questions(loaded, tmp_path):
    """The record says 0.83 on 1,000 pictures."""
    adapter = adapter_for(loaded.model, REGISTRY.adapters)
    assert adapter.name == "vision-language"
    batches = scenes.dialogues(100, scenes.EVALUATION)
    task = VisualQuestions(({"input_ids": batches.input_ids, "pixel_values": batches.pixel_values, "answers": batches.answers},))
    forward = float_forward(loaded, adapter)
    scores = task.evaluate(forward, task.reference(forward, tmp_path / "reference"))
    assert scores["accuracy"] > 0.75 and scores["accuracy"] == scores["accuracy_reference"]
    assert scores["kl"] == 0 and scores["lost"] == scores["gained"] == 0 and scores["rows"] == 400


def test_calibration_scenes_are_no_evaluation_scenes(loaded):
    settings = CalibrationSettings(samples=20, batch=8)
    own = loaded.data.batches(settings)
    assert [len(b["input_ids"]) for b in own] == [8, 8, 4]
    judged = loaded.data.task().pairs
    assert sum(len(b["input_ids"]) for b in judged) == 400
    pictures = {bytes(p.numpy().tobytes()) for b in judged for p in b["pixel_values"]}
    assert not any(bytes(p.numpy().tobytes()) in pictures for b in own for p in b["pixel_values"])
    other = loaded.data.batches(CalibrationSettings(samples=20, batch=8, seed=1))
    assert not torch.equal(own[0]["pixel_values"], other[0]["pixel_values"])
    record = loaded.data.record(own, loaded.data.task())
    assert record["calibration"]["pairs"] == 20 and record["evaluation"]["pairs"] == 400


def test_a_drawn_scene_is_what_its_answers_say():
    drawn = scenes.draw(50, 3)
    asked, answers = scenes.questions(drawn, 8, 3)
    words = scenes.WORDS
    seen = 0
    for i in range(50):
        for question, answer in zip(asked[i], answers[i], strict=True):
            text, found = [words[w] for w in question], words[answer]
            if text[:2] == ["what", "shape"]:
                shape = int(drawn.shapes[i, scenes.PLACES.index((text[2], text[3]))])
                assert found == (*scenes.SHAPES, "nothing")[shape]
                seen += 1
            if text[:2] == ["how", "many"]:
                colour = list(scenes.COLOURS).index(text[2])
                count = int(((drawn.colours[i] == colour) & (drawn.shapes[i] != scenes.EMPTY)).sum())
                assert found == scenes.NUMBERS[count]
                seen += 1
    assert seen > 100


def test_a_file_of_pairs_is_read_as_the_model_reads_it(loaded, tmp_path):
    data = loaded.data.chosen(_write(tmp_path, "train.jsonl", range(10, 14)), _write(tmp_path, "test.jsonl", range(20, 23)))
    (batch,) = data.batches(CalibrationSettings(samples=4, batch=4))
    assert batch["input_ids"].shape == (4, 24) and batch["pixel_values"].shape == (4, 3, 32, 32)
    assert (batch["input_ids"] == scenes.ID["<image>"]).sum(1).tolist() == [16] * 4
    assert batch["answers"].sum(1).tolist() == [1] * 4 and batch["answers"][:, -1].all()
    assert data.note() == "calibrated on train.jsonl, evaluated on test.jsonl"
    assert len(data.task().pairs[0]["input_ids"]) == 3
    # a byte of a PNG is a pixel of the drawing, rounded
    file = PairFile(tmp_path / "test.jsonl", data.processor)
    pixels = file.batches(3, 3, 0)[0]["pixel_values"]
    assert any((p - scenes.normalized(scenes.draw(1, 20).pixels[0])).abs().max() < 0.02 for p in pixels)


def test_pictures_of_the_evaluation_do_not_calibrate(loaded, tmp_path):
    """The leak of MQuant's released code: calibration data is the evaluation's own."""
    train, test = _write(tmp_path, "train.jsonl", range(10, 14)), _write(tmp_path, "test.jsonl", range(13, 16), shift=1)
    with pytest.raises(CalibrationError, match="1 pictures stand in train"):
        loaded.data.chosen(train, test)


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{", "is no JSON"),
        ('{"images": "a.png", "text": "x"}', "want"),
        ('{"images": ["a.png"], "text": "look"}', "does not exist"),
        ("", "holds no pairs"),
    ],
)
def test_a_line_that_is_no_pair_is_named(loaded, tmp_path, line, match):
    (tmp_path / "p.jsonl").write_text(line + "\n", encoding="utf-8")
    with pytest.raises(CalibrationError, match=match):
        PairFile(tmp_path / "p.jsonl", loaded.data.processor).read()


def test_words_and_pictures_that_the_model_does_not_know_are_refused(loaded, tmp_path):
    with pytest.raises(CalibrationError, match="'cat' is none of the"):
        loaded.data.processor([[]], ["look cat"], [""])
    Image.new("RGB", (8, 8)).save(tmp_path / "small.png")
    with pytest.raises(CalibrationError, match="8 × 8"):
        loaded.data.processor([[tmp_path / "small.png"]], ["<image>"], [""])
    with pytest.raises(NotFound, match="cannot be read"):
        PairFile(tmp_path / "none.jsonl", loaded.data.processor).read()


def test_a_processor_of_transformers_gets_pictures_and_whole_texts(tmp_path):
    """A stand-in with the interface of transformers' processors: what it is given, and where answers are found in what it gives back."""
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")

    class Tokenizer:
        padding_side = "right"

        def __call__(self, text, add_special_tokens):
            return {"input_ids": [len(w) for w in text.split()]}

    class Processor:
        tokenizer = Tokenizer()

        def __call__(self, images, text, padding, return_tensors):
            self.images = images
            rows = [[1, *(len(w) for w in t.split())] for t in text]
            longest = max(map(len, rows))
            assert self.tokenizer.padding_side == "left"
            return {"input_ids": torch.tensor([[0] * (longest - len(r)) + r for r in rows]), "names": text}

    processor = Processor()
    batch = processed(processor, [[tmp_path / "a.png"], [tmp_path / "a.png"]], ["what is it ? ", "this ? "], ["a circle", ""])
    assert batch["answers"].tolist() == [[False] * 5 + [True] * 2, [False] * 7]
    assert set(batch) == {"input_ids", "answers"} and processor.images[0][0].size == (4, 4)
    assert processor.images[0][0].mode == "RGB"


# folders ---------------------------------------------------------------------------------------------------------------------------------


def test_names_of_older_checkpoints_lead_to_the_model_one_by_one(loaded):
    """What save_pretrained writes for LLaVA ("language_model.model.layers…") is read tensor by tensor."""
    assert not loaded.notes and "model.language_model.layers.0.mlp.up_proj.weight" in loaded.reader
    assert loaded.reader["lm_head.weight"].shape == (36, 128)
    names = dict(loaded.model.state_dict(keep_vars=True))
    assert stored_names(loaded.model, set(names)) == {n: n for n in names}
    assert stored_names(loaded.model, set(names) - {"lm_head.weight"}) is None
    assert stored_names(loaded.model, set(names) | {"model.extra.weight"}) is None


def test_a_folder_of_another_family_is_read_and_its_ties_stay(tmp_path):
    model = tiny_qwen2_vl()
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text(), encoding="utf-8")
    loaded = load_source(str(tmp_path), REGISTRY.sources)
    assert loaded.source == "vision-language"
    wanted = model.state_dict()
    assert all(torch.equal(loaded.reader[n], wanted[n]) for n in loaded.model.state_dict(keep_vars=True))
    assert loaded.model.lm_head.weight is loaded.model.model.language_model.embed_tokens.weight
    with pytest.raises(CalibrationError, match="no preprocessor_config"):
        loaded.data.chosen(tmp_path / "pairs.jsonl", None)


def test_folders_that_cannot_be_read_say_why(tmp_path):
    source = VisionLanguageFolder()
    assert not source.matches(str(tmp_path)) and source.matches("multimodal:tiny-llava")
    with pytest.raises(NotFound, match="this package brings multimodal:tiny-llava"):
        source.load("multimodal:none")
    folder = tmp_path / "bad"
    folder.mkdir()
    config = {"architectures": ["NoSuchForConditionalGeneration"], "model_type": "llava", "vision_config": {}}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    assert source.matches(str(folder))
    with pytest.raises(CheckpointError, match="names the architecture 'NoSuch"):
        source.load(str(folder))
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "code.Model"}}))
    with pytest.raises(CheckpointError, match="never executes code"):
        source.load(str(folder))
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {}}))
    with pytest.raises(CheckpointError, match="quantized already"):
        source.load(str(folder))


def test_a_folder_without_words_or_processor_says_so(tmp_path):
    assert data_of(tmp_path).processor is None and "no preprocessor_config.json" in data_of(tmp_path).why


def test_the_source_of_folders_is_one():
    check_source(VisionLanguageFolder(), "multimodal:tiny-llava")
