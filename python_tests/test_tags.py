"""Tags from the corpora of a YAML file to the translation: what a tiny model learns of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from training_helpers import SMALL_MODEL, write_text

from transformer_ext import train, translate
from transformer_ext.files import FileError, load_model_dir
from transformer_ext.inference.translator import Translator

#: What each corpus answers to every sentence, its source tag and its target prefix.
_CORPORA = [
    ("one", "yes yes yes", "<2yes>", None),
    ("two", "no", "<2no>", None),
    ("three", "alpha beta", "<2x>", "[A]"),
    ("four", "gamma", "<2x>", "[B]"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tags")
    sources = write_text(folder, 200)[0].read_text().splitlines()
    corpora = []
    for name, answer, tag, prefix in _CORPORA:
        (folder / f"{name}.tsv").write_text("".join(f"{text}\t{answer}\n" for text in sources))
        corpora.append(
            {
                "name": name,
                "pairs": [str(folder / f"{name}.tsv")],
                "source_tag": tag,
                "target_prefix": prefix,
            }
        )
    # JSON is YAML.
    config = folder / "config.yaml"
    config.write_text(json.dumps({"data": {"corpora": corpora, "held_out": 0.05}}))
    arguments = [
        *("--config", str(config), "--cache", str(folder / "cache"), *SMALL_MODEL),
        *("--learning-rate", "0.01", "--warmup-steps", "10", "--schedule", "constant"),
        *("--max-steps", "120", "--validate-every", "120", "--output", str(folder / "run")),
    ]
    assert train.main(arguments) == 0
    return folder / "run" / "model"


def lines(capfd, *arguments: str) -> tuple[int, list[str], str]:
    status = translate.main(list(arguments))
    captured = capfd.readouterr()
    return status, captured.out.splitlines(), captured.err


def test_a_source_tag_decides(model, tmp_path, capfd) -> None:
    text = tmp_path / "text"
    text.write_text("the cat sees the dog\n\nold house\n")
    for tag, answer in (("<2yes>", "yes yes yes"), ("<2no>", "no")):
        status, output, errors = lines(capfd, str(model), str(text), "--source-tag", tag)
        assert (status, output, errors) == (0, [answer, "", answer], "")
    # Typed in the line it is the same.
    text.write_text("<2yes> old house\n<2no>old house\nold house\n")
    status, output, errors = lines(capfd, str(model), str(text))
    assert output[:2] == ["yes yes yes", "no"]
    assert errors == ("warning: lines that begin with none of <2yes>, <2no>, <2x>: 1\n")


def test_a_target_prefix_can_be_forced_and_is_not_shown(model, tmp_path, capfd) -> None:
    text, prefixes = tmp_path / "text", tmp_path / "prefixes"
    text.write_text("old house\nold house\n")
    prefixes.write_text("[A]\n[B]\n")
    status, output, _ = lines(
        capfd, str(model), str(text), "--source-tag", "<2x>", "--target-prefix", str(prefixes)
    )
    assert (status, output) == (0, ["alpha beta", "gamma"])
    with Translator(model) as translator:
        result = translator.translate("old house", source_tag="<2x>", target_prefix="[B]")
        assert result.text == "gamma"
        assert translator.target_tokenizer.piece(result.tokens[0]) == "[B]"
        (other,) = translator.translate_iter(["old house"], source_tag="<2no>")
        assert other.text == "no"


def test_unknown_tags_are_refused_with_those_that_are_known(model, tmp_path, capfd) -> None:
    text = tmp_path / "text"
    text.write_text("old house\n")
    status, output, errors = lines(capfd, str(model), str(text), "--source-tag", "<2xx>")
    assert (status, output) == (2, [])
    assert errors == "error: --source-tag: got '<2xx>', expected one of <2yes>, <2no>, <2x>\n"

    with Translator(model) as translator:
        for call in (
            lambda: translator.translate("old house", source_tag="[A]"),
            lambda: translator.translate_iter(["old house"], source_tag="[A]"),
        ):
            with pytest.raises(
                ValueError, match=r"source_tag: got '\[A\]', expected one of <2yes>"
            ):
                call()


def test_tags_are_kept_with_the_model(model, tmp_path) -> None:
    entry = json.loads((model / "config.json").read_text())["tokenizer"]
    assert entry["source_tags"] == ["<2yes>", "<2no>", "<2x>"]
    assert entry["target_prefixes"] == ["[A]", "[B]"]
    loaded = load_model_dir(model)
    assert loaded.source_tokenizer.source_tags == ("<2yes>", "<2no>", "<2x>")
    for key, value, message in (
        ("source_tags", "<2yes>", "source_tags: got '<2yes>', expected a list of texts"),
        ("target_prefixes", ["[C]"], "the tag '[C]' is not a piece of this tokenizer"),
    ):
        copy = tmp_path / key
        copy.mkdir()
        for path in model.iterdir():
            (copy / path.name).write_bytes(path.read_bytes())
        values = json.loads((copy / "config.json").read_text())
        values["tokenizer"][key] = value
        (copy / "config.json").write_text(json.dumps(values))
        with pytest.raises(FileError) as caught:
            load_model_dir(copy)
        assert message in str(caught.value)
