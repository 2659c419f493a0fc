"""What users can get wrong with ``train`` and ``prepare``: one line that says what, and nothing left."""

from __future__ import annotations

import errno
import gzip
import importlib
import io
import lzma
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_helpers import SMALL_MODEL, write_text

from transformer_ext import prepare, train
from transformer_ext.config import ArgumentParser, DataConfig
from transformer_ext.data.preparation import prepare_data
from transformer_ext.training import translation
from transformer_ext.training.report import Console


def lines_of(*lines: str) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text in all states; a test changes nothing of it."""
    folder = tmp_path_factory.mktemp("input")
    source, target = write_text(folder, pairs=200)
    en, de = (path.read_text(encoding="utf-8").splitlines() for path in (source, target))
    rest = lines_of(*de[5:])
    for name, content in {
        "short.de": lines_of(*de[:150]),
        "hole.de": lines_of(*de[:4], "") + rest,
        "white.de": lines_of(*de[:4], " \t ") + rest,
        "latin.de": lines_of(*de[:4]) + "öffnet\n".encode("latin-1") + rest,
        "utf16.de": "\n".join(de).encode("utf-16"),
        "copy.en": lines_of(*en),
        "empty.en": b"",
        "empty.de": b"",
        "blank.en": b"\n\n\n",
        "array.json": b'[{"src": "a", "tgt": "b"}]',
        "blank.de": b"\n \n\n",
        "one.en": lines_of(en[0]),
        "one.de": lines_of(de[0]),
        "long.en": lines_of(*(f"{line} {'word ' * 3000}" for line in en[:20])),
        "long.de": lines_of(*(f"{line} {'Wort ' * 3000}" for line in de[:20])),
        "mixed.en": lines_of(*en[:40], "word " * 3000),
        "mixed.de": lines_of(*de[:40], "Wort " * 3000),
        "cut.en.gz": gzip.compress(lines_of(*en))[:-20],
        "cut.en.xz": lzma.compress(lines_of(*en))[:-20],
        "binary.en": bytes(range(128, 256)) * 9,
        "no.model": b"no model",
        "broken.yaml": b"training: [1\n",
        "typo.yaml": b"training: {max_step: 3}\n",
        "place.yaml": b"max_steps: 3\n",
        "list.yaml": b"- 1\n",
        "twice.yaml": b"training: {seed: 1, seed: 2}\n",
        "latin.yaml": b"task: \xf6\n",
        "a-file": b"x",
    }.items():
        (folder / name).write_bytes(content)
    (folder / "a-folder").mkdir()
    (folder / "a-folder" / "something").write_text("of the user")
    return folder


#: options for the data, what the message says
DATA = [
    ("--src-train text.en --tgt-train short.de", "text.en has 200 lines and short.de has 150"),
    ("--src-train text.en --tgt-train hole.de", "hole.de:5: empty line; --bad-lines skip leaves"),
    ("--src-train text.en --tgt-train white.de", "white.de:5: empty line"),
    ("--src-train text.en --tgt-train latin.de", "latin.de:5: not UTF-8: byte 0xf6 at byte 1"),
    ("--src-train text.en --tgt-train utf16.de", "utf16.de: is UTF-16, expected UTF-8"),
    ("--src-train binary.en --tgt-train text.de", "binary.en:1: not UTF-8"),
    ("--src-train text.en --tgt-train text.en", "text.en is given as source and as target"),
    ("--src-train text.en --tgt-train ./text.en", "text.en is given as source and as target"),
    ("--src-train text.en --tgt-train copy.en", "text.en and copy.en hold the same text"),
    (
        "--src-train text.en text.en --tgt-train text.de text.de",
        "src_train: text.en with text.de is given twice",
    ),
    ("--src-train none.en --tgt-train text.de", "none.en: no such file"),
    ("--src-train a-folder --tgt-train text.de", "a-folder: is a folder, expected a text file"),
    ("--src-train empty.en --tgt-train empty.de", "no usable sentence pair"),
    ("--src-train text.en --tgt-train empty.de", "text.en has 200 lines and empty.de has 0"),
    ("--src-train blank.en --tgt-train blank.de --bad-lines skip", "no usable sentence pair"),
    ("--pairs-train array.json --bad-lines skip", "array.json: expected one JSON object a line"),
    ("--src-train one.en --tgt-train one.de", "too few to hold some out for validation; give"),
    ("--src-train long.en --tgt-train long.de", "max_length: with 256 tokens none of 19 pairs is"),
    (
        "--src-train mixed.en --tgt-train mixed.de --long-lines error",
        "1 of 40 pairs are longer than 256 tokens",
    ),
    ("--src-train cut.en.gz --tgt-train text.de", "cut.en.gz: its compressed data are broken"),
    ("--src-train cut.en.xz --tgt-train text.de", "cut.en.xz: its compressed data are broken"),
    ("--src-train text.en", "src_train has 1 files and data.tgt_train 0"),
    ("--tgt-train text.de", "src_train has 0 files and data.tgt_train 1"),
    ("--src-dev text.en --tgt-dev text.de", "data.src_train: got no file, expected one beside dev"),
    ("TEXT --src-dev text.en", "data.src_dev has 1 files and data.tgt_dev 0"),
    ("TEXT --src-dev copy.en --tgt-dev short.de", "copy.en has 200 lines and short.de has 150"),
    ("TEXT --src-dev empty.en --tgt-dev empty.de", "the validation text has no usable sentence"),
    ("TEXT --src-test hole.de --tgt-test text.en", "hole.de:5: empty line"),
    ("TEXT --tokenizer no.model", "no.model: not a SentencePiece model"),
    ("TEXT --tokenizer none.model", "none.model: cannot be read: No such file"),
    ("TEXT --src-tokenizer no.model", "src_tokenizer and data.tgt_tokenizer: expected both or"),
    ("TEXT --vocab-size 264", "vocab_size: got 264, expected at least 28"),
    ("TEXT --vocab-size 9", "--vocab-size: got 9, expected an integer of at least 264"),
    ("TEXT --max-length 1", "max_length: with 1 tokens none of"),
    ("TEXT --held-out 0.9", "--held-out: got 0.9, expected a number from 0.0 to 0.5"),
    ("TEXT --cache a-file", "a-file: the cache cannot be written: File exists; choose another"),
    ("TEXT --config none.yaml", "none.yaml: cannot be read: No such file"),
    ("TEXT --config a-folder", "a-folder: cannot be read: Is a directory"),
    ("TEXT --config broken.yaml", "broken.yaml:2:1: not YAML: expected ',' or ']'"),
    ("TEXT --config latin.yaml", "latin.yaml: not YAML: 'utf-8' codec can't decode byte 0xf6"),
    ("TEXT --config typo.yaml", "typo.yaml: unknown key 'training.max_step'; did you mean"),
    (
        "TEXT --config place.yaml",
        "place.yaml: unknown key 'max_steps'; it belongs under 'training'",
    ),
    ("TEXT --config list.yaml", "list.yaml: got list, expected a mapping of keys"),
    ("TEXT --config twice.yaml", "twice.yaml:1: the key 'seed' is given twice"),
]

#: further options of train, what the message says
TRAINING = [
    ("--max-tokens 5", "--max-tokens: got 5, but the longest target sentence has 2"),
    ("--average-last 6", "output.average_last: got 6, expected at most keep_checkpoints, 5"),
    ("--average-last 3 --keep-checkpoints 2", "output.average_last: got 3, expected at most"),
    ("--label-smoothing 1", "optimizer.label_smoothing: got 1.0, expected a number below 1"),
    ("--label-smoothing 1.5", "--label-smoothing: got 1.5, expected a number from 0.0 to 1.0"),
    ("--betas 0.9 1", "optimizer.betas: got 0.9 and 1.0, expected numbers below 1"),
    ("--eps 0", "optimizer.eps: got 0.0, expected a number above 0"),
    ("--learning-rate 0", "optimizer.learning_rate: got 0.0, expected a number above 0"),
    ("--learning-rate 1e300", "--learning-rate: got 1e+300, expected a number from 0.0 to 1000.0"),
    ("--accum-steps 100000", "--accum-steps: got 100000, expected an integer from 1 to 10000"),
    ("--beam-size 400", "--beam-size: got 400, expected at most the 330 pieces of the vocabulary"),
    ("--validation-beam-size 331", "--validation-beam-size: got 331, expected at most the 330"),
    ("--held-out 0 --early-stop-patience 2", "--early-stop-patience: got 2, but there is no text"),
    ("--positions learned --max-positions 4", "--max-positions: got 4, but the longest sentence"),
    ("--no-joint-vocab --tie all", "--tie: got all, but source and target have a vocabulary each"),
    ("--nhead 5", "nhead: 5 does not divide d_model 32"),
    ("--dropout 1", "dropout: expected a probability in [0, 1), got 1.0"),
    ("--layer-norm-eps 0", "layer_norm_eps: expected a number above 0 and below 1, got 0.0"),
    ("--num-encoder-layers 100000", "num_encoder_layers: expected an integer from 0 to 10000"),
    ("--activation rellu", "got 'rellu'; did you mean 'relu'?"),
    ("--preset huge", "--preset: got 'huge', expected one of tiny, small, base, big"),
    ("--task copy", "data.src_train: has no meaning for the task copy"),
    ("--pad-id 3", "unknown option '--pad-id'"),
    ("--max-steps 0", "--max-steps: got 0, expected an integer of at least 1"),
    ("--threads 9999", "--threads: got 9999, expected an integer from 1 to 1024"),
    ("--seed -1", "--seed: got -1, expected an integer from 0 to"),
    ("--device abacus", "abacus"),
    ("--precision float16 --device cpu", "float16"),
    ("--output a-file", "--output: a-file is a file, expected a folder"),
    ("--output a-folder", "--output: a-folder is not empty; --overwrite replaces the run in it"),
    ("--output a-folder --overwrite", "--overwrite: a-folder holds no run; nothing was removed"),
    ("--output a-file/run", "a-file/run"),
    ("--overwrite", "output.overwrite: expected output beside it, the folder to replace"),
    ("--resume --output a-folder", "--resume: a-folder holds no run to go on with"),
    ("--resume", "--resume: runs/ holds no numbered run, as a training without --output makes"),
    ("--resume --output x --config typo.yaml", "leave --config out"),
    ("--resume --output x --init-from y", "leave --init-from out"),
    ("--init-from none", "none: no such model directory"),
    ("--init-from a-folder", "a-folder/config.json: no such file"),
]


def refusal(module: Any, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The error message of a command that has to be refused with status 2."""
    try:
        status = module.main(arguments)
    except SystemExit as end:
        status = end.code
    error = capsys.readouterr().err
    assert status == 2, error
    assert "Traceback" not in error and "[Errno" not in error
    # argparse's errors end with a second line, where to read on.
    lines = error.removesuffix("(--help lists the options)\n").splitlines()
    assert len(lines) == 1 and "error: " in lines[0], error
    return lines[0]


@pytest.fixture
def place(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The working folder with the text; checked to be as it was, but for the cache."""
    monkeypatch.chdir(folder)
    monkeypatch.delenv("TRANSFORMER_EXT_TRACEBACK", raising=False)
    monkeypatch.setenv("TRANSFORMER_EXT_CACHE", str(tmp_path / "cache"))
    before = sorted(folder.rglob("*"))
    yield folder
    assert sorted(folder.rglob("*")) == before
    assert not list(tmp_path.rglob("*.tmp-*"))


TEXT = ["--src-train", "text.en", "--tgt-train", "text.de"]


@pytest.mark.parametrize(("options", "message"), DATA)
def test_wrong_text(
    place: Path, capsys: pytest.CaptureFixture[str], options: str, message: str
) -> None:
    """prepare and train say the same."""
    arguments = options.replace("TEXT", " ".join(TEXT)).split()
    for module in (prepare, train):
        model = SMALL_MODEL if module is train else ["--vocab-size", "330"]
        assert message in refusal(module, [*model, *arguments], capsys)


@pytest.mark.parametrize(("options", "message"), TRAINING)
def test_wrong_options(
    place: Path, capsys: pytest.CaptureFixture[str], options: str, message: str
) -> None:
    text = [] if "--resume" in options else [*SMALL_MODEL, *TEXT]
    assert message in refusal(train, [*text, *options.split()], capsys)


@pytest.mark.parametrize("module", [prepare, train])
def test_text_that_may_not_be_read(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, module: Any
) -> None:
    access = os.access
    # The superuser may read everything.
    monkeypatch.setattr(os, "access", lambda path, mode: path != "text.de" and access(path, mode))
    assert "text.de: may not be read" in refusal(module, TEXT, capsys)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS])
@pytest.mark.parametrize("module", [prepare, train])
def test_a_cache_without_room_or_permission(
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    module: Any,
    code: int,
) -> None:
    def refused(*arguments: Any, **keywords: Any) -> Any:
        raise OSError(code, os.strerror(code), "some/file")

    monkeypatch.setattr(Path, "mkdir", refused)
    error = refusal(module, TEXT, capsys)
    assert f"the cache cannot be written: {os.strerror(code)}; choose another folder" in error


def test_a_folder_of_the_run_that_cannot_be_made(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir = Path.mkdir

    def refused(self: Path, *arguments: Any, **keywords: Any) -> None:
        if self.name == "run":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        mkdir(self, *arguments, **keywords)

    monkeypatch.setattr(Path, "mkdir", refused)
    error = refusal(train, [*SMALL_MODEL, *TEXT, "--output", "run"], capsys)
    assert "run" in error and "Permission denied" in error


@pytest.mark.parametrize(
    "problem",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nmore lines"),
    ],
)
def test_too_little_memory(
    place: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    problem: Exception,
) -> None:
    def refused(*arguments: Any) -> Any:
        raise problem

    monkeypatch.setattr(translation, "Transformer", refused)
    assert train.main([*SMALL_MODEL, *TEXT, "--dry-run"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: the memory does not suffice (") and error.count("\n") == 1
    assert "a smaller --max-tokens" in error


def warnings(config: DataConfig) -> list[str]:
    return [m for m in prepare_data(config).messages if m.startswith("warning: ")]


def test_files_mixed_up(place: Path, tmp_path: Path) -> None:
    def config(**changes: Any) -> DataConfig:
        return DataConfig(
            src_train=["text.en"],
            tgt_train=["text.de"],
            vocab_size=330,
            cache=str(tmp_path),
            **changes,
        )

    write_text(tmp_path, pairs=30, seed=3)
    en, de = [str(tmp_path / "text.en")], [str(tmp_path / "text.de")]
    assert warnings(config(src_dev=en, tgt_dev=de, src_test=en, tgt_test=de)) == []
    swapped = "text looks as if source and target were swapped: "
    assert warnings(config(src_dev=de, tgt_dev=en)) == [
        f"warning: the validation {swapped}{de[0]}, {en[0]}"
    ]
    assert warnings(config(src_test=de, tgt_test=en, joint_vocab=False)) == [
        f"warning: the test {swapped}{de[0]}, {en[0]}"
    ]
    found = warnings(config(src_dev=["./text.en"], tgt_dev=["text.de"]))
    assert len(found) == 2
    assert found[0].startswith("warning: ./text.en is given as training text and as validation")


def test_lines_that_are_no_translations(place: Path, tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    lengths = generator.integers(2, 30, 1200)
    sides = {"a": lengths, "b": lengths + generator.integers(0, 6, 1200), "c": np.roll(lengths, 1)}
    for name, counts in sides.items():
        words = [" ".join([f"{name}{i % 7}"] * count) for i, count in enumerate(counts)]
        (tmp_path / name).write_bytes(lines_of(*words))

    def found(target: str) -> list[str]:
        files = {"src_train": [str(tmp_path / "a")], "tgt_train": [str(tmp_path / target)]}
        return warnings(DataConfig(**files, vocab_size=300, cache=str(tmp_path / "cache")))

    assert found("b") == []
    [message] = found("c")
    assert re.search(
        r"\(correlation -?0\.\d\d\): are the lines translations of each other\?", message
    )


class Lost(io.StringIO):
    """A stream whose reader goes after some lines."""

    def __init__(self, lines: int) -> None:
        super().__init__()
        self.lines = lines

    def write(self, text: str) -> int:
        self.lines -= 1
        if self.lines < 0:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")
        return super().write(text)


def test_a_training_outlives_whoever_reads_it(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Lost(5)
    console = Console(stream, live=False)
    monkeypatch.setattr(sys, "stdout", sys.__stdout__)
    for number in range(9):
        console.print(f"line {number}")
    assert stream.getvalue() == "".join(f"line {number}\n" for number in range(5))
    assert capsys.readouterr().err == (
        "warning: standard output: Broken pipe; the training goes on without it\n"
    )


def test_a_console_without_umlauts() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    Console(stream, live=False).print("öffnet")
    assert raw.getvalue() == b"\\xf6ffnet\n"


COMMANDS = ["average", "convert", "evaluate", "prepare", "train", "visualize"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_ends_alike(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main = importlib.import_module(f"transformer_ext.{name}").main

    def ends_with(problem: BaseException) -> tuple[int, str]:
        def raises(*arguments: Any, **keywords: Any) -> Any:
            raise problem

        monkeypatch.setattr(ArgumentParser, "parse_args", raises)
        return main([]), capsys.readouterr().err

    monkeypatch.delenv("TRANSFORMER_EXT_TRACEBACK", raising=False)
    assert ends_with(ValueError("x: is wrong")) == (2, "error: x: is wrong\n")
    assert ends_with(ImportError("no such library")) == (2, "error: no such library\n")
    assert ends_with(KeyboardInterrupt())[0] == 130
    monkeypatch.setenv("TRANSFORMER_EXT_TRACEBACK", "1")
    with pytest.raises(ValueError, match="x: is wrong"):
        ends_with(ValueError("x: is wrong"))
    monkeypatch.setattr(sys, "stdout", None)
    assert main([]) == 2
    assert capsys.readouterr().err == "error: standard output: is closed\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_full_output(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a command; a training goes on."""
    for module, status, expected in (
        (prepare, 2, "error: standard output: No space left on device\n"),
        (train, 0, "warning: standard output: No space left on device; the training goes on"),
    ):
        with open("/dev/full", "w", encoding="utf-8") as full:
            monkeypatch.setattr(sys, "stdout", full)
            model = [*SMALL_MODEL, "--dry-run"] if module is train else ["--vocab-size", "330"]
            assert module.main([*model, *TEXT]) == status
        assert capsys.readouterr().err.startswith(expected)


def test_what_no_text_could_mend_is_found_before_the_text_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    assert train.main(["--validation-metric", "exact", "--cache", str(cache)]) == 2
    found = capsys.readouterr()
    assert "got 'exact', expected one of nll, accuracy, bleu, chrf" in found.err
    assert "reading" not in found.out and not cache.exists()
    assert train.main(["--nhead", "3", "--cache", str(cache)]) == 2
    found = capsys.readouterr()
    assert "nhead: 3 does not divide d_model 256" in found.err
    assert "reading" not in found.out and not cache.exists()
