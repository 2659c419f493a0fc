"""``--task language-model`` and ``--task classify``: their data, their figures, their commands."""

from __future__ import annotations

import gzip
import io
import json
import math
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from training_helpers import interrupted_after

from transformer_ext import classify, generate, train
from transformer_ext.config import DataConfig
from transformer_ext.data.corpus import CorpusError, shipped_corpus
from transformer_ext.data.dataset import ParallelDataset, build_dataset
from transformer_ext.data.text import (
    Blocks,
    Labelled,
    Labels,
    Lines,
    TextCounts,
    read_labelled,
    read_texts,
)
from transformer_ext.data.text_preparation import TextFiles, prepare_texts
from transformer_ext.data.tokenizer import SentencePieceTokenizer, Tokenizer, train_tokenizer
from transformer_ext.files import load_model_dir
from transformer_ext.inference.classifier import TextClassifier
from transformer_ext.inference.continuation import TextGenerator, continuations
from transformer_ext.inference.options import SearchOptions
from transformer_ext.model import LanguageModel, ModelConfig
from transformer_ext.training.classification import (
    accuracy,
    confusion_table,
    macro_f1,
    read_matches,
)
from transformer_ext.training.language_model import text_perplexities

#: A model of some thousand parameters, as options of the command.
SMALL = (
    "--preset tiny --d-model 32 --nhead 2 --dim-feedforward 64 --vocab-size 330 --max-tokens 300 "
    "--precision float32 --threads 1 --device cpu --dropout 0.0 --learning-rate 5e-3"
).split()
LABELS = {"animal": ["cat", "dog", "cow"], "plant": ["tree", "fern", "moss"], "tool": ["saw"]}


def write_texts(folder: Path, count: int = 300, seed: int = 0) -> tuple[Path, Path]:
    """``text.txt`` and ``labelled.tsv``: the label follows from one word of a line."""
    generator = random.Random(seed)
    lines, labelled = [], []
    for _ in range(count):
        label = generator.choice(list(LABELS))
        words = generator.choices(["old", "new", "red", "the", "a"], k=generator.randint(1, 4))
        words.insert(generator.randint(0, len(words)), generator.choice(LABELS[label]))
        lines.append(" ".join(words))
        labelled.append(f"{label}\t{' '.join(words)}")
    paths = folder / "text.txt", folder / "labelled.tsv"
    for path, content in zip(paths, (lines, labelled), strict=True):
        path.write_text("".join(f"{line}\n" for line in content), encoding="utf-8")
    return paths


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    write_texts(folder)
    return folder


def command(folder: Path, task: str, *options: str) -> list[str]:
    names = {"language-model": ("--text-train", "text.txt"), "classify": ("--labelled-train", "")}
    option, name = names[task]
    file = str(folder / (name or "labelled.tsv"))
    common = ["--held-out", "0.1", "--cache", str(folder / "cache")]
    return ["--task", task, option, file, *common, *SMALL, *options]


# --- data -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_tokenizer(["to be or not to be"] * 9, vocab_size=290)[0])
    return SentencePieceTokenizer(path)


TEXTS = ["to be", "or", "not to be or not", "be", "not to"]


def dataset(folder: Path, tokenizer: Tokenizer, labels: list[str]) -> ParallelDataset:
    names = sorted(set(labels) - {""})
    folder.mkdir()
    pairs = list(zip(TEXTS, labels, strict=True))
    build_dataset(folder, pairs, tokenizer, Labels(names, tokenizer))
    return ParallelDataset(folder)


def test_lines_are_read_after_the_start_and_end_with_the_end(tmp_path, tokenizer) -> None:
    lines = Lines(dataset(tmp_path / "d", tokenizer, [""] * 5))
    batch = lines(np.array([2, 0]))
    expected = [[*tokenizer.encode(TEXTS[i]), tokenizer.eos_id] for i in (2, 0)]
    assert batch.labels.tolist() == sum(expected, [])
    assert batch.ids.tolist() == sum([[tokenizer.bos_id, *ids[:-1]] for ids in expected], [])
    assert batch.lengths.tolist() == lines.lengths[[2, 0]].tolist() == [len(e) for e in expected]
    assert batch.target_tokens == len(batch.labels) and batch.sentences == 2


@pytest.mark.parametrize("size", [2, 3, 7, 1000])
def test_blocks_are_the_whole_text_each_token_once(size: int, tmp_path, tokenizer) -> None:
    blocks = Blocks(dataset(tmp_path / "d", tokenizer, [""] * 5), size)
    stream = [id for text in TEXTS for id in (*tokenizer.encode(text), tokenizer.eos_id)]
    count = len(blocks.lengths)
    assert count == math.ceil(len(stream) / size) and blocks.lengths.sum() == len(stream)
    batch = blocks(np.arange(count))
    assert batch.labels.tolist() == stream
    # What is read is the token before; after an end a beginning, as at the begin of every text.
    before = [tokenizer.eos_id, *stream[:-1]]
    begin, end = tokenizer.bos_id, tokenizer.eos_id
    assert batch.ids.tolist() == [begin if id == end else id for id in before]
    last = blocks(np.array([count - 1]))
    assert last.labels.tolist() == stream[size * (count - 1) :]


def test_labelled_texts_have_both_ends_and_one_label(tmp_path, tokenizer) -> None:
    labels = ["b", "a", "b", "b", "a"]
    examples = Labelled(dataset(tmp_path / "d", tokenizer, labels))
    batch = examples(np.array([1, 4, 0]))
    start, end = tokenizer.bos_id, tokenizer.eos_id
    expected = [[start, *tokenizer.encode(TEXTS[i]), end] for i in (1, 4, 0)]
    assert batch.ids.tolist() == sum(expected, [])
    assert batch.lengths.tolist() == examples.lengths[[1, 4, 0]].tolist()
    assert batch.labels.tolist() == [0, 0, 1]
    assert batch.target_tokens == batch.sentences == 3


def test_files_of_text(tmp_path: Path) -> None:
    plain, packed = tmp_path / "a.txt", tmp_path / "b.jsonl.gz"
    plain.write_bytes("one\r\n\n  \ntwo\u2028half\n".encode())
    with gzip.open(packed, "wt", encoding="utf-8") as file:
        file.write('{"text": "three\\nfour", "more": 1}\n')
    counts = TextCounts()
    found = [text for text, _ in read_texts([str(plain), str(packed)], "error", counts)]
    assert found == ["one", "two\u2028half", "three four"]
    assert (counts.read, counts.empty, counts.used) == (5, 2, 3)
    plain.write_bytes(b"fine\nb\xffd\n")
    with pytest.raises(CorpusError, match=r"a.txt:2: not UTF-8: byte 0xff at byte 2"):
        list(read_texts([str(plain)]))
    counts = TextCounts()
    assert [text for text, _ in read_texts([str(plain)], "skip", counts)] == ["fine"]
    assert counts.undecodable == 1 and "1 not UTF-8" in counts.describe("lines")


def test_files_of_labelled_text(tmp_path: Path) -> None:
    tsv, objects = tmp_path / "a.tsv", tmp_path / "b.jsonl"
    tsv.write_text("good\ta text\twith a tab\nbad\tanother\n")
    objects.write_text('{"label": "good", "text": "x"}\n')
    assert list(read_labelled([str(tsv), str(objects)])) == [
        ("a text\twith a tab", "good"),
        ("another", "bad"),
        ("x", "good"),
    ]
    for content, message in (
        ("no tab here\n", r"a.tsv:1: got 'no tab here', expected a label, a tab and a text"),
        ("x\ty\n\tz\n", r"a.tsv:2: empty label; --bad-lines skip"),
        ("x\t \n", r"a.tsv:1: empty text"),
        ("\n", r"a.tsv:1: empty label"),
    ):
        tsv.write_text(content)
        with pytest.raises(CorpusError, match=message):
            list(read_labelled([str(tsv)]))
    counts = TextCounts()
    tsv.write_text("x\ty\n\tz\n\n")
    assert list(read_labelled([str(tsv)], "skip", counts)) == [("y", "x")]
    assert counts.empty == 2
    objects.write_text('{"label": 3, "text": "x"}\n')
    with pytest.raises(CorpusError, match="b.jsonl:1: label: got int, expected a text"):
        list(read_labelled([str(objects)]))


def test_lines_that_are_no_text_are_refused_or_counted(tmp_path: Path) -> None:
    good = {"a.tsv": "x\ty", "b.jsonl": '{"label": "x", "text": "y"}'}
    for name, line, message in (
        ("a.tsv", "no tab", "got 'no tab', expected a label, a tab"),
        ("b.jsonl", "{", "not a JSON object"),
        ("b.jsonl", "[1]", "got list, expected an object with the key "),
        ("b.jsonl", '{"label": "x", "txt": "y"}', "the key 'text' is not there, only"),
        ("b.jsonl", '{"label": "x", "text": "\\ud800"}', "text: has half a character"),
        ("b.jsonl", '{"label": "a\\nb", "text": "y"}', "label: got 'a\\nb', expected one without"),
    ):
        path = tmp_path / name
        path.write_text(f"{good[name]}\n{line}\n{good[name]}\n")
        readers = {read_labelled: [("y", "x")] * 2}
        if name == "b.jsonl" and "label: got" not in message:
            readers[read_texts] = [("y", "")] * 2
        for read, expected in readers.items():
            with pytest.raises(CorpusError) as caught:
                list(read([str(path)]))
            error = str(caught.value)
            assert error.startswith(f"{path}:2: {message}") and "--bad-lines skip" in error
            counts = TextCounts()
            assert list(read([str(path)], "skip", counts)) == expected
            assert (counts.read, counts.malformed, counts.used) == (3, 1, 2)
            assert "1 malformed" in counts.describe("texts")


def lines_of(path: Path) -> TextFiles:
    return TextFiles(path.name, [str(path)], [], [], lambda p, c: read_texts(p, "skip", c), "lines")


def test_the_name_of_a_file_tells_its_format(tmp_path: Path, tokenizer: Tokenizer) -> None:
    data = DataConfig(
        tokenizer=str(tokenizer.path), held_out=0.0, cache=str(tmp_path / "cache"), bad_lines="skip"
    )
    found = []
    for name in ("a.jsonl", "b.txt", "c.json", "d.JSON.gz"):
        path = tmp_path / name
        content = b'{"text": "to be"}\n' * 3
        path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
        prepared = prepare_texts(data, lines_of(path), what="lines", max_length=None)
        found.append(tokenizer.decode(prepared.train.example(0)[0].tolist()[:-1]))
    assert found == ["to be", '{"text": "to be"}', "to be", "to be"]


def test_text_without_a_usable_line_is_named(tmp_path: Path) -> None:
    data = DataConfig(vocab_size=300, cache=str(tmp_path / "cache"), bad_lines="skip")
    for held_out in (0.0, 0.1):
        data.held_out = held_out
        path = tmp_path / "text.jsonl"
        path.write_text("\nbroken\n")
        with pytest.raises(CorpusError) as caught:
            prepare_texts(data, lines_of(path), what="lines", max_length=None)
        assert str(caught.value) == (
            f"{path}: the training text has nothing to use: 0 lines of 2 (1 empty, 1 malformed)"
        )


def test_shipped_pairs_half_of_which_do_not_match() -> None:
    test = shipped_corpus().test
    counts = TextCounts()
    found = list(read_matches((*test.src, *test.tgt), counts))
    assert len(found) == counts.used == 1500
    labels = [label for _, label in found]
    assert 700 < labels.count("translation") < 800
    assert set(labels) == {"translation", "other"}
    assert found == list(read_matches((*test.src, *test.tgt), TextCounts()))
    # Each target is used once, so that no label can be told from the target alone.
    targets = sorted(text.split(" ||| ", 1)[1] for text, _ in found)
    from transformer_ext.data.corpus import read_pairs

    assert targets == sorted(target for _, target in read_pairs(test))


# --- figures --------------------------------------------------------------------------------------


def test_perplexities_by_hand() -> None:
    # 4 tokens of probability 1/2 each: 2 words and 2 ends of lines, 9 bytes.
    figures = text_perplexities(4 * math.log(2), 4, ["öl", "fünf"])
    assert figures["token_perplexity"] == pytest.approx(2.0)
    assert figures["word_perplexity"] == pytest.approx(2.0)
    assert figures["bits_per_byte"] == pytest.approx(4 / (3 + 1 + 5 + 1))


def test_macro_f1_by_hand() -> None:
    truth, found = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 0, 0])
    table = confusion_table(truth, found, 4)
    assert table.tolist() == [[2, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert accuracy(table) == pytest.approx(3 / 6)
    # 2*2/(3+4), 2*1/(2+2), 0; the fourth label is neither there nor found.
    assert macro_f1(table) == pytest.approx((4 / 7 + 1 / 2 + 0) / 3)


# --- the commands ---------------------------------------------------------------------------------


def lines_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str) -> str:
    path = tmp_path / "input.txt"
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("block", [[], ["--block-size", "24"]])
def test_a_language_model_from_text_to_continuations(
    block: list[str],
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "run"
    options = [*block, "--max-steps", "60", "--validate-every", "30", "--prompts", "old", ""]
    test = tmp_path / "test.txt"
    test.write_text("the old cat\na new tree\n\n")
    options += ["--text-test", str(test), "--output", str(run)]
    assert train.main(command(folder, "language-model", *options)) == 0
    said = capsys.readouterr().out
    results = json.loads((run / "results.json").read_text())
    # All words are of 12, and a line end is one more.
    assert 1.0 < results["test_word_perplexity"] < 20.0, said
    assert "test text, 2 lines: perplexity" in said and "decoder-only" in said
    bits = results["test_word_perplexity"]
    assert results["test_bits_per_byte"] == pytest.approx(8 * math.log2(bits) / 23)
    assert [sample["beginning"] for sample in results["samples"]] == ["old", ""]
    assert all(s["greedy"].startswith(s["beginning"]) for s in results["samples"])

    model = load_model_dir(run / "model", ModelConfig)
    assert model.config.kind == "decoder-only" and model.training["corpus"] == "text.txt"
    arguments = [str(run / "model"), lines_in(monkeypatch, tmp_path, "old\n\n")]
    assert generate.main(arguments) == 0
    written = capsys.readouterr().out.splitlines()
    assert len(written) == 2 and written[0].startswith("old")
    assert written[0] == TextGenerator(run / "model")(["old"])[0]
    sampled = [*arguments, "--sampling", "--seed", "3", "--max-length", "5"]
    outputs = []
    for _ in range(2):
        assert generate.main(sampled) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]


def test_a_classifier_from_text_to_labels(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "run"
    options = ["--max-steps", "60", "--validate-every", "20", "--output", str(run)]
    options += ["--validation-metric", "macro_f1"]
    assert train.main(command(folder, "classify", *options)) == 0
    said = capsys.readouterr().out
    results = json.loads((run / "results.json").read_text())
    assert results["validation_accuracy"] > 0.9 > 0.6 > results["validation_majority_accuracy"]
    assert results["validation_macro_f1"] > 0.9, said
    assert np.sum(results["confusion"]) == 30 and results["labels"] == sorted(LABELS)
    assert "macro-F1" in said and "texts/s" in said and "encoder-only" in said

    # What it foretold of the held-out texts, and what the written model foretells.
    predictions = (run / "validation.predictions.tsv").read_text().splitlines()
    rows = [line.split("\t") for line in predictions]
    right = sum(label == found for label, found, _, _ in rows)
    assert right / len(rows) == pytest.approx(results["validation_accuracy"])
    written = TextClassifier(run / "model")([text for *_, text in rows])
    for (_, found, probability, _), prediction in zip(rows, written, strict=True):
        assert prediction.label == found
        assert prediction.probability == pytest.approx(float(probability), abs=1e-4)

    arguments = [str(run / "model"), lines_in(monkeypatch, tmp_path, "the old cat\na saw\n\n")]
    assert classify.main(arguments) == 0
    found = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [label for label, _ in found[:2]] == ["animal", "tool"] and len(found) == 3
    assert classify.main([*arguments, "--format", "jsonl"]) == 0
    values = json.loads(capsys.readouterr().out.splitlines()[0])
    assert values["label"] == "animal" and sum(values["probabilities"].values()) == pytest.approx(1)
    classifier = TextClassifier(run / "model")
    alone = classifier(["the old cat"])[0]
    many = classifier(["a saw " * number + "the old cat" * (not number) for number in range(40)])
    assert alone.label == many[0].label
    assert alone.probability == pytest.approx(many[0].probability, rel=1e-5)
    assert classifier([]) == []


@pytest.mark.parametrize("task", ["language-model", "classify"])
def test_interrupted_and_resumed_is_the_same_to_the_bit(
    task: str, folder: Path, tmp_path: Path
) -> None:
    options = command(
        folder, task, "--max-steps", "12", "--validate-every", "4", "--dropout", "0.1"
    )
    if task == "language-model":
        options += ["--block-size", "32"]
    assert train.main([*options, "--output", str(tmp_path / "whole")]) == 0
    with interrupted_after(6):
        assert train.main([*options, "--output", str(tmp_path / "parts")]) == 130
    assert train.main(["--output", str(tmp_path / "parts"), "--resume"]) == 0
    for name in ("checkpoints/step-12", "model"):
        first, second = (
            load_model_dir(tmp_path / run / name, ModelConfig).weights for run in ("whole", "parts")
        )
        for tensor, value in first.items():
            assert np.array_equal(value, second[tensor]), tensor


def test_dry_run_and_reference_backend(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for task in ("language-model", "classify"):
        assert train.main(command(folder, task, "--dry-run")) == 0
        assert "no run was written" in capsys.readouterr().out
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        (
            "classify",
            ["--text-train", "x"],
            "language_model.text_train: is an option of task langu",
        ),
        ("classify", ["--src-train", "x", "--tgt-train", "y"], "data.src_train: has no meaning"),
        ("classify", ["--tie", "none"], "model.tie: a classifier has no embedding"),
        ("classify", ["--num-decoder-layers", "1"], "model.num_decoder_layers: a classifier has"),
        ("classify", ["--labelled-train", "none.tsv"], "none.tsv: "),
        (
            "classify",
            ["--labelled-test", "OTHER"],
            "the label 'fish' does not occur in the training",
        ),
        ("classify", ["--labelled-train", "ONE"], "every text has the label 'fish', expected two"),
        ("language-model", ["--num-encoder-layers", "1"], "model.num_encoder_layers: a language"),
        (
            "language-model",
            ["--joint-vocab", "--pooling", "first"],
            "classification.pooling: is an",
        ),
        ("language-model", ["--init-from", "no/model"], "no/model: no such model directory"),
        (
            "classify",
            ["--max-tokens", "4"],
            "--max-tokens: got 4, but the longest of the texts has",
        ),
        ("language-model", ["--text-test", "EMPTY"], "the test text has nothing to use"),
        (
            "language-model",
            ["--positions", "learned", "--max-positions", "3"],
            "--max-positions: got 3, but the longest of the lines has",
        ),
        (
            "language-model",
            [
                "--positions",
                "learned",
                "--max-positions",
                "40",
                "--prompts",
                "old",
                "the cat " * 40,
            ],
            "--prompts: 'the cat the cat the cat the cat the cat ' ... has 8",
        ),
        (
            "language-model",
            ["--validation-metric", "bleu"],
            "evaluation.validation_metric: got 'bleu', expected one of nll, accuracy",
        ),
    ],
)
def test_wrong_input_is_one_clear_error(
    task: str,
    options: list[str],
    message: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("OTHER").write_text("fish\ta red herring\n")
    Path("ONE").write_text("fish\ta red herring\nfish\tanother\nfish\tone more\n")
    Path("EMPTY").write_text("\n\n")
    try:
        status = train.main(command(folder, task, *options))
    except SystemExit as exit:
        status = int(exit.code or 0)
    error = capsys.readouterr().err
    assert status == 2 and message in error and "Traceback" not in error
    assert not Path("runs").exists()


# --- continuations --------------------------------------------------------------------------------


def test_continuations_follow_the_model() -> None:
    torch.manual_seed(1)
    model = LanguageModel(
        vocab_size=20, d_model=16, nhead=2, num_layers=1, dim_feedforward=32, norm_first=True
    ).eval()
    beginnings = [[5, 6], [], [7]]
    found = continuations(model, beginnings, SearchOptions(beam_size=1, max_length=6))
    for beginning, result in zip(beginnings, found, strict=True):
        tokens: list[int] = []
        for _ in range(6):
            with torch.no_grad():
                scores = model.next_log_probs(torch.tensor([[2, *beginning, *tokens]]))[0]
            # Padding and the start are never proposed.
            scores[[0, 2]] = -math.inf
            following = int(scores.argmax())
            if following == 3:
                break
            tokens.append(following)
        assert result.hypotheses[0].tokens == tokens
    sampled = SearchOptions(sampling=True, num_hypotheses=3, seed=5, max_length=6)
    first, again = (continuations(model, beginnings, sampled) for _ in range(2))
    assert first == again
    alone = continuations(model, [[7]], sampled, numbers=[2])[0]
    assert [h.tokens for h in alone.hypotheses] == [h.tokens for h in first[2].hypotheses]
    with pytest.raises(ValueError, match="prompt ids: got 20, expected 0 to 19"):
        continuations(model, [[20]])
    with pytest.raises(ValueError, match="a language model has no source"):
        continuations(model, [[4]], SearchOptions(return_alignment=True))


def test_standard_input_is_read(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    run = tmp_path / "run"
    options = ["--max-steps", "2", "--validate-every", "2", "--output", str(run)]
    assert train.main(command(folder, "classify", *options)) == 0
    capsys.readouterr()
    path = tmp_path / "input"
    path.write_text("a\nb\n")
    with open(path, encoding="utf-8") as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert classify.main([str(run / "model")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert generate.main([str(run / "model")]) == 2
    assert "expected a decoder-only (language) model" in capsys.readouterr().err
