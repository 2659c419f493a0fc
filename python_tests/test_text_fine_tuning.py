"""``--init-from`` of the tasks on texts of one side: from models of ours, from BERT and GPT-2."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_helpers import write_bert_dir, write_gpt2_dir
from test_text_tasks import LABELS, write_texts
from training_helpers import SMALL_MODEL, interrupted_after, write_text

from transformer_ext import classify, generate, train
from transformer_ext.config import TrainConfig, from_dict
from transformer_ext.data.dataset import ParallelDataset, build_dataset
from transformer_ext.data.json_tokenizer import JsonTokenizer
from transformer_ext.data.text import Labelled, Labels
from transformer_ext.data.tokenizer import SentencePieceTokenizer
from transformer_ext.files import ModelDir, load_model_dir, save_model_dir
from transformer_ext.huggingface.convert import to_huggingface
from transformer_ext.inference.classifier import TextClassifier
from transformer_ext.inference.translator import Translator
from transformer_ext.model import LanguageModelConfig, ModelConfig, TextEncoder, TextEncoderConfig
from transformer_ext.training.parent import Parent

NEW_HEAD = "init       new: the head for 3 labels (the model has none)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``text.txt``, ``labelled.tsv``, and the directories ``bert`` and ``gpt2``."""
    folder = tmp_path_factory.mktemp("texts")
    write_texts(folder, 120)
    words = [word for words in LABELS.values() for word in words]
    write_bert_dir(folder / "bert", "BertForMaskedLM")
    # Its words are not those of the texts.
    with open(folder / "bert" / "vocab.txt", "a") as file:
        file.writelines(f"{word}\n" for word in [*words, "old", "new", "red"])
    lines = (folder / "bert" / "vocab.txt").read_text().splitlines()
    settings = json.loads((folder / "bert" / "config.json").read_text())
    shutil.rmtree(folder / "bert")
    write_bert_dir(folder / "bert", "BertForMaskedLM", vocab_size=len(lines) + 1)
    (folder / "bert" / "vocab.txt").write_text("".join(f"{line}\n" for line in lines))
    assert settings["model_type"] == "bert"
    write_gpt2_dir(folder / "gpt2")
    return folder


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Path:
    """A text encoder of ours with the tokenizer of BERT, and a masked head."""
    saved = load_model_dir(folder / "bert", TextEncoderConfig)
    torch.manual_seed(3)
    config = dataclasses.replace(
        saved.config, pooling="mean", pooler=False, normalize=True, masked_lm_head=True
    )
    model = TextEncoder(config)
    tokenizer = saved.source_tokenizer
    save_model_dir(folder / "ours", config, model.state_dict(), tokenizer, tokenizer)
    return folder / "ours"


def command(folder: Path, task: str, parent: Path, *options: str) -> list[str]:
    text = {"language-model": "--text-train text.txt", "classify": "--labelled-train labelled.tsv"}
    option, name = text[task].split()
    return [
        *("--task", task, option, str(folder / name), "--init-from", str(parent)),
        *("--held-out", "0.1", "--cache", str(folder / "cache"), "--max-tokens", "300"),
        *("--precision", "float32", "--threads", "1", "--device", "cpu", *options),
    ]


def steps(number: int, rate: float = 1e-7) -> list[str]:
    # Adam moves each weight by the learning rate at most.
    return [
        *("--max-steps", f"{number}", "--validate-every", f"{number}", "--warmup-steps", "0"),
        *("--schedule", "constant", "--learning-rate", f"{rate:g}"),
    ]


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert train.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def near(new: ModelDir[Any], old: ModelDir[Any], names: set[str]) -> None:
    assert set(new.weights) == names
    for name in names & set(old.weights):
        assert np.abs(new.weights[name] - old.weights[name]).max() < 1e-5, name


def test_a_new_head_on_the_trunk_of_the_model(
    folder: Path,
    encoder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "run"
    arguments = command(folder, "classify", encoder, *steps(2), "--output", str(output))
    assert train.main(arguments) == 0
    said = capsys.readouterr().out
    pieces = load_model_dir(encoder, TextEncoderConfig).source_tokenizer.vocab_size
    assert f"init       weights and tokenizer ({pieces} pieces) of {encoder}, SHA-256" in said
    assert NEW_HEAD in said and "init       left out: the head for masked tokens" in said
    assert "init       vectors of texts are no longer scaled to length 1" in said
    assert "before fine-tuning" not in said and "its architecture, encoder-only: 2 layers" in said
    old = load_model_dir(encoder, TextEncoderConfig)
    new = load_model_dir(output / "model", TextEncoderConfig)
    expected = dataclasses.replace(
        old.config, labels=sorted(LABELS), normalize=False, masked_lm_head=False, output_bias=True
    )
    assert new.config == expected
    trunk = {name for name in old.weights if not name.startswith("masked_lm_head.")}
    near(new, old, trunk | {"generator.weight", "generator.bias"})
    assert new.source_tokenizer.sha256 == old.source_tokenizer.sha256
    assert new.training["init_from"]["path"] == str(encoder)
    # What was trained labels texts.
    (tmp_path / "in.txt").write_text("the old cat\nthe saw\n")
    with open(tmp_path / "in.txt") as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert classify.main([str(output / "model")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and {line.split("\t")[0] for line in lines} <= set(LABELS)


def test_the_pooling_can_be_another(folder: Path, encoder: Path, tmp_path: Path, capsys) -> None:
    options = ["--pooling", "first", "--pooler", "--output", str(tmp_path / "run")]
    assert train.main(command(folder, "classify", encoder, *steps(1), *options)) == 0
    said = capsys.readouterr().out
    assert "init       pooling: first instead of mean" in said
    assert "init       pooler: yes instead of no" in said
    config = load_model_dir(tmp_path / "run" / "model", TextEncoderConfig).config
    assert config.pooling == "first" and config.pooler


def test_a_head_for_the_same_labels_is_kept_whatever_their_order(
    folder: Path, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = load_model_dir(encoder, TextEncoderConfig)
    names = list(LABELS)[::-1]
    assert names != sorted(names)
    config = dataclasses.replace(
        saved.config, labels=names, masked_lm_head=False, output_bias=True, normalize=True
    )
    torch.manual_seed(5)
    model, tokenizer = TextEncoder(config), saved.source_tokenizer
    save_model_dir(tmp_path / "old", config, model.state_dict(), tokenizer, tokenizer)
    output = tmp_path / "run"
    arguments = command(folder, "classify", tmp_path / "old", *steps(1), "--output", str(output))
    assert train.main(arguments) == 0
    said = capsys.readouterr().out
    assert "init       new" not in said and "no longer" not in said
    before = re.search(r"before fine-tuning: .* accuracy ([\d.]+) %", said)
    after = re.search(r"validation at step 1: .* accuracy ([\d.]+) %", said)
    assert before and after and before[1] == after[1]
    new = load_model_dir(output / "model", TextEncoderConfig).config
    assert new == dataclasses.replace(config, labels=sorted(names))
    texts = ["the old cat", "a new fern", "saw the red tree"]
    was, found = TextClassifier(tmp_path / "old"), TextClassifier(output / "model")
    order = [names.index(label) for label in found.labels]
    np.testing.assert_allclose(found.scores(texts), was.scores(texts)[:, order], atol=1e-4)


def test_a_bert_of_hugging_face_there_and_back(folder: Path, tmp_path: Path, capsys: Any) -> None:
    transformers = pytest.importorskip("transformers")
    parent = tmp_path / "bert"
    shutil.copytree(folder / "bert", parent)
    options = ["--pooling", "first", "--pooler", "--checkpoint-every", "2"]
    options += ["--max-steps", "6", "--validate-every", "3", "--learning-rate", "1e-3"]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    arguments = command(folder, "classify", parent, *options)
    assert train.main([*arguments, "--output", str(straight)]) == 0
    assert NEW_HEAD in capsys.readouterr().out
    with interrupted_after(2):
        assert train.main([*arguments, "--output", str(stopped)]) == 130
    # The directory is not needed any more.
    shutil.rmtree(parent)
    assert train.main(["--resume", "--output", str(stopped)]) == 0
    first, second = (
        load_model_dir(run / "model", TextEncoderConfig) for run in (straight, stopped)
    )
    assert first.config == second.config
    assert first.training["init_from"] == second.training["init_from"]
    for name in first.weights:
        assert np.array_equal(first.weights[name], second.weights[name]), name
    to_huggingface(straight / "model", tmp_path / "back")
    texts = ["the old cat", "a new fern", "saw"]
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "back")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    with torch.no_grad():
        logits = theirs.eval()(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    ours = TextClassifier(straight / "model")
    assert ours.labels == [theirs.config.id2label[number] for number in range(3)]
    np.testing.assert_allclose(ours.scores(texts), logits.numpy(), atol=1e-4)


def test_gpt2_goes_on_with_a_text(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    transformers = pytest.importorskip("transformers")
    parent, output = folder / "gpt2", tmp_path / "run"
    options = [*steps(1), "--block-size", "40", "--prompts", "the", "--output", str(output)]
    options += ["--cache", str(tmp_path / "cache")]
    assert train.main(command(folder, "language-model", parent, *options)) == 0
    said = capsys.readouterr().out
    before = re.search(r"before fine-tuning: loss ([\d.]+) ", said)
    after = re.search(r"validation at step 1: loss ([\d.]+) ", said)
    assert before and after and float(before[1]) == pytest.approx(float(after[1]), abs=2e-3)
    old = load_model_dir(parent, LanguageModelConfig)
    new = load_model_dir(output / "model", LanguageModelConfig)
    assert new.config == old.config and not new.config.prepend_bos
    near(new, old, set(old.weights))
    # The loss is that of GPT-2 on texts separated by the end token, in blocks of 40.
    (split,) = (tmp_path / "cache").glob("text-split-*/split.json")
    held = [text for text, _ in json.loads(split.read_text())["texts"]]
    tokenizer = old.source_tokenizer
    end = tokenizer.eos_id
    stream = [end, *(id for text in held for id in (*tokenizer.encode(text), end))]
    model = transformers.GPT2LMHeadModel.from_pretrained(parent).eval()
    losses, count = 0.0, len(stream) - 1
    for begin in range(0, count, 40):
        ids = torch.tensor(stream[begin : begin + 41])
        with torch.no_grad():
            logits = model(ids[None, :-1]).logits[0]
        losses += float(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum"))
    assert float(before[1]) == pytest.approx(losses / count, abs=2e-3)
    (tmp_path / "in.txt").write_text("the old\n")
    with open(tmp_path / "in.txt") as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert generate.main([str(output / "model"), "--max-length", "8"]) == 0
    assert capsys.readouterr().out.startswith("the old")
    assert len((output / "continuations.tsv").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("task", "parent", "options", "message"),
    [
        ("classify", "ours", "--d-model 64", "--d-model: got 64, but the model of --init-from DIR"),
        (
            "classify",
            "ours",
            "--num-encoder-layers 3",
            "--num-encoder-layers: got 3, but the model",
        ),
        (
            "classify",
            "ours",
            "--num-decoder-layers 3",
            "model.num_decoder_layers: a classifier has",
        ),
        ("classify", "ours", "--tie none", "model.tie: a classifier has no embedding"),
        ("classify", "ours", "--preset tiny", "--preset: got tiny (d_model 128), but the model of"),
        ("classify", "ours", "--vocab-size 300", "--vocab-size: got 300, but the model of --init"),
        ("classify", "ours", "--tokenizer x.model", "--tokenizer: got x.model, but the model of"),
        ("classify", "ours", "--positions rotary", "--positions: got rotary, but the model of"),
        ("classify", "gpt2", "", "is a decoder-only (language) model, expected an encoder-only"),
        ("classify", "none", "", "none: no such model directory"),
        ("classify", "ours", "--max-tokens 4", "--max-tokens: got 4, but the longest of the texts"),
        ("language-model", "bert", "", "expected a decoder-only (language) model"),
        ("language-model", "gpt2", "--tie none", "--tie: got none, but the model of --init-from"),
        ("language-model", "gpt2", "--num-decoder-layers 1", "--num-decoder-layers: got 1, but"),
        (
            "language-model",
            "gpt2",
            "--num-encoder-layers 1",
            "model.num_encoder_layers: a language",
        ),
        (
            "language-model",
            "gpt2",
            "--block-size 60",
            "has 48 positions, but the longest of the lines has 60 tokens; expected --block-size 48",
        ),
        ("language-model", "gpt2", f"--prompts {'x' * 48}", "has 48 tokens, but the model has"),
    ],
)
def test_options_that_contradict_the_model(
    folder: Path,
    encoder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    task: str,
    parent: str,
    options: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = command(folder, task, folder / parent, *options.split())
    assert message.replace("DIR", str(folder / parent)) in refusal(arguments, capsys)
    assert not list(tmp_path.iterdir())


def test_options_that_say_what_the_model_has(folder: Path, encoder: Path) -> None:
    fields = {"num_encoder_layers": 2, "positions": "learned", "dropout": 0.25}
    values: dict[str, Any] = {"task": "classify", "init_from": str(encoder), "model": fields}
    found = Parent.open(from_dict(TrainConfig, values), TextEncoderConfig)
    changed = dataclasses.replace(found.config, dropout=0.25, attention_dropout=0.25)
    assert found.architecture(fields) == changed
    values = {"task": "language-model", "init_from": str(folder / "gpt2"), "model": {"tie": "all"}}
    language_model = Parent.open(from_dict(TrainConfig, values), LanguageModelConfig)
    assert language_model.architecture(values["model"]) == language_model.config


def test_texts_longer_than_the_positions_are_cut(
    folder: Path, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "long.tsv"
    lines = (folder / "labelled.tsv").read_text() + "animal\told " + "cat " * 70 + "\n"
    path.write_text(lines)
    options = ["--labelled-train", str(path), "--labelled-dev", str(path), *steps(1)]
    output = ["--output", str(tmp_path / "run")]
    assert train.main([*command(folder, "classify", encoder, *options), *output]) == 0
    assert "2 texts are cut to the 32 tokens that the model can read" in capsys.readouterr().out
    saved = load_model_dir(tmp_path / "run" / "model", ModelConfig)
    assert saved.training["max_train_length"] == 32


def test_cut_texts_keep_both_ends(folder: Path, tmp_path: Path) -> None:
    tokenizer = JsonTokenizer.from_huggingface(folder / "bert")
    texts = [("the old cat", "a"), ("saw", "b"), ("the the the the the the the", "a"), ("", "b")]
    (tmp_path / "d").mkdir()
    build_dataset(tmp_path / "d", texts, tokenizer, Labels(["a", "b"], tokenizer))
    dataset = ParallelDataset(tmp_path / "d")
    for longest in (3, 4, 5, 9, 100):
        examples = Labelled(dataset, longest)
        rows = np.array([2, 3, 0, 1])
        batch = examples(rows)
        expected = []
        for row in rows:
            ids = tokenizer.encode(texts[row][0])[: longest - 2]
            expected.append([tokenizer.bos_id, *ids, tokenizer.eos_id])
        assert batch.ids.tolist() == sum(expected, [])
        assert batch.lengths.tolist() == examples.lengths[rows].tolist() == list(map(len, expected))
        assert batch.labels.tolist() == [0, 1, 0, 1]


def test_a_tokenizer_of_bert_for_random_weights(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ["--tokenizer", str(folder / "bert"), *SMALL_MODEL[:6], "--output", str(run)]
    arguments = command(folder, "classify", folder, *steps(1), *options)
    place = arguments.index("--init-from")
    del arguments[place : place + 2]
    assert train.main(arguments) == 0
    saved = load_model_dir(run / "model", TextEncoderConfig)
    tokenizer = JsonTokenizer.from_huggingface(folder / "bert")
    assert saved.source_tokenizer.sha256 == tokenizer.sha256
    assert (saved.config.bos_id, saved.config.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)


def test_a_translation_with_the_tokenizer_of_bert(folder: Path, tmp_path: Path) -> None:
    source, target = write_text(tmp_path, pairs=60)
    content = JsonTokenizer.from_huggingface(folder / "bert").content()
    (tmp_path / "tokenizer.json").write_bytes(content)
    options = ["--tokenizer", str(tmp_path / "tokenizer.json"), *SMALL_MODEL[:10]]
    options += ["--src-train", str(source), "--tgt-train", str(target), "--held-out", "0.1"]
    options += [
        "--precision",
        "float32",
        "--threads",
        "1",
        "--max-tokens",
        "300",
        "--device",
        "cpu",
    ]
    options += ["--cache", str(tmp_path / "cache"), "--output", str(tmp_path / "run")]
    assert train.main([*options, *steps(1), "--prepare-workers", "2"]) == 0
    translator = Translator(tmp_path / "run" / "model")
    assert isinstance(translator.source_tokenizer, JsonTokenizer)
    assert len(translator.translate(["the old cat"])) == 1


def test_a_language_model_of_ours_goes_on_with_its_tokenizer(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, parent = tmp_path / "first", tmp_path / "first" / "model"
    arguments = command(folder, "language-model", parent, *SMALL_MODEL[:6], "--vocab-size", "300")
    place = arguments.index("--init-from")
    options = ["--max-steps", "20", "--validate-every", "20", "--output", str(first)]
    assert train.main([*arguments[:place], *arguments[place + 2 :], *options]) == 0
    learnt = re.findall(r"validation at step 20: loss ([\d.]+) ", capsys.readouterr().out)
    arguments = command(folder, "language-model", parent)
    options = ["--max-steps", "4", "--validate-every", "2", "--learning-rate", "1e-3"]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert train.main([*arguments, *options, "--output", str(straight)]) == 0
    # The same text: it begins where the first training ended.
    assert re.findall(r"before fine-tuning: loss ([\d.]+) ", capsys.readouterr().out) == learnt
    with interrupted_after(2):
        assert train.main([*arguments, *options, "--output", str(stopped)]) == 130
    shutil.rmtree(first)
    assert train.main(["--resume", "--output", str(stopped)]) == 0
    models = [load_model_dir(run / "model", LanguageModelConfig) for run in (straight, stopped)]
    assert models[0].config == models[1].config and models[0].config.prepend_bos
    for name, weight in models[0].weights.items():
        assert np.array_equal(weight, models[1].weights[name]), name
    assert isinstance(models[0].source_tokenizer, SentencePieceTokenizer)
