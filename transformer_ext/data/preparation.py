"""From the options of a configuration to tokenizer and data set, each built once and then cached.

The cache is a folder of folders, named by the hash of everything that their content depends on: the
bytes of the text files, the tokenizer, the options, the version of the format. A changed text or
option therefore never meets old ids, and nothing has to be cleaned by hand. A folder appears under
its name only when complete, so processes may build the same one at the same time; where the system
has file locks, the others wait for the first instead.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformer_ext.config import DataConfig
from transformer_ext.data.corpus import (
    Corpus,
    CorpusError,
    HeldOut,
    ParallelText,
    SkippedPairs,
    file_digest,
    read_pairs,
    shipped_corpus,
)
from transformer_ext.data.dataset import DATASET_VERSION, ParallelDataset, build_dataset
from transformer_ext.data.tokenizer import Tokenizer, train_tokenizer
from transformer_ext.files import FileError, atomic_directory

CACHE_VARIABLE = "TRANSFORMER_EXT_CACHE"
CACHE_VERSION = 1

# A SentencePiece trainer holds its text in memory; more than this changes the pieces little.
TOKENIZER_PAIRS = 500_000


def cache_folder(config: DataConfig) -> Path:
    """Where token ids are kept: the option ``cache``, the environment, or the home folder."""
    chosen = config.cache or os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "transformer_ext"


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Hold an exclusive lock on a file, waiting for it; False where the system has none."""
    try:
        import fcntl
    except ImportError:
        yield False
        return
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # Some network file systems.
            yield False
            return
        yield True


def cached(folder: Path, kind: str, key: dict[str, Any], build: Callable[[Path], None]) -> Path:
    """The cache's folder for a key, built if it is not there.

    Args:
        folder: the cache.
        kind: first part of the name, for people.
        key: all that the content depends on, as JSON has it.
        build: writes the content into the folder it is given.

    Raises:
        CorpusError: the cache cannot be written.
    """
    text = json.dumps({"version": CACHE_VERSION, **key}, sort_keys=True)
    path = folder / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:24]}"
    if path.is_dir():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder / f"{path.name}.lock") as locked:
            if path.is_dir():
                return path
            if locked:
                # Nobody else builds this now: what is there was left by a killed process.
                for old in folder.glob(f"{path.name}.tmp-*"):
                    shutil.rmtree(old, ignore_errors=True)
            with contextlib.suppress(FileError), atomic_directory(path) as temporary:
                build(temporary)
    except OSError as error:
        raise CorpusError(
            f"{folder}: the cache cannot be written: {error.strerror or error}; choose another "
            f"folder with --cache or ${CACHE_VARIABLE}"
        ) from None
    return path


@dataclass
class PreparedData:
    """All that training needs to know of the data.

    Attributes:
        name: of the corpus, for people.
        train: pairs to train on.
        source_tokenizer: of the source language.
        target_tokenizer: of the target language; the same object if there is one for both.
        dev: sentence pairs for validation, as text; empty if there are none.
        test: sentence pairs for the final test, as text; empty if there are none.
        dev_set: ``dev`` as token ids; None if there are none.
        messages: what a person should know, one line each.
    """

    name: str
    train: ParallelDataset
    source_tokenizer: Tokenizer
    target_tokenizer: Tokenizer
    dev: list[tuple[str, str]]
    test: list[tuple[str, str]]
    dev_set: ParallelDataset | None
    messages: list[str] = field(default_factory=list)


def chosen_corpus(config: DataConfig) -> Corpus:
    """The files named in the options, or the shipped corpus if none are.

    Raises:
        CorpusError: a file is missing, or the same on both sides.
    """
    if not config.src_train:
        return shipped_corpus()
    parts = [
        ParallelText(tuple(src), tuple(tgt))
        for src, tgt in (
            (config.src_train, config.tgt_train),
            (config.src_dev, config.tgt_dev),
            (config.src_test, config.tgt_test),
        )
    ]
    for part in parts:
        part.check_files()
    return Corpus(Path(config.src_train[0]).name, *parts)


def default_vocab_size(pairs: int) -> int:
    """Number of pieces that suits a number of sentence pairs."""
    for limit, size in ((20_000, 4_000), (200_000, 8_000), (2_000_000, 16_000)):
        if pairs < limit:
            return size
    return 32_000


def prepare_data(
    config: DataConfig,
    report: Callable[[str], None] | None = None,
    tokenizers: tuple[Tokenizer, Tokenizer] | None = None,
) -> PreparedData:
    """Read the text, train or load the tokenizers, and build the data set, or find them cached.

    Args:
        config: which text and tokenizers, and what to do with bad pairs.
        report: is told each step that may take long, as it begins.
        tokenizers: of source and target, whatever the options say; None goes by the options.

    Raises:
        CorpusError: the text cannot be used.
        TokenizerError: a tokenizer cannot be used or trained.
    """
    say = report or (lambda message: None)
    corpus = chosen_corpus(config)
    cache = cache_folder(config)
    messages: list[str] = []

    say(f"reading {corpus.name}")
    text_key: dict[str, Any] = {
        "src": [file_digest(path) for path in corpus.train.src],
        "tgt": [file_digest(path) for path in corpus.train.tgt],
        "bad_lines": config.bad_lines,
        "held_out": 0.0 if corpus.dev else config.held_out,
    }

    def build_split(folder: Path) -> None:
        skipped = SkippedPairs()
        held_out = HeldOut.choose(
            read_pairs(corpus.train, config.bad_lines, skipped), text_key["held_out"]
        )
        values = {"threshold": held_out.threshold, "pairs": held_out.pairs, "used": skipped.used}
        (folder / "split.json").write_text(json.dumps(values), encoding="utf-8")

    split_folder = cached(cache, "split", {"text": text_key}, build_split)
    split = json.loads((split_folder / "split.json").read_text(encoding="utf-8"))
    held_out = HeldOut(
        threshold=split["threshold"], pairs=[(src, tgt) for src, tgt in split["pairs"]]
    )

    def train_pairs(skipped: SkippedPairs) -> Iterator[tuple[str, str]]:
        held = 0
        for pair in read_pairs(corpus.train, config.bad_lines, skipped):
            if pair[0] in held_out:
                held += 1
            else:
                yield pair
        skipped.held_out = held
        skipped.used -= held

    source, target = tokenizers or _tokenizers(
        config, cache, text_key, split["used"], train_pairs, say, messages
    )

    def build_train(folder: Path) -> None:
        say("turning the text into token ids")
        skipped = SkippedPairs()
        build_dataset(folder, train_pairs(skipped), source, target, skipped)

    tokens_key = {"tokenizers": [source.sha256, target.sha256], "dataset": DATASET_VERSION}
    key = {"text": text_key, **tokens_key}
    everything = ParallelDataset(cached(cache, "pairs", key, build_train))
    train = everything.filtered(config.max_length, config.max_length_ratio)
    if config.long_lines == "error" and len(train) != len(everything):
        raise CorpusError(
            f"{len(everything) - len(train):,} of {len(everything):,} pairs are longer than "
            f"{config.max_length} tokens or too unequal in length; --long-lines skip leaves them "
            "out"
        )
    messages.insert(0, f"training text: {train.skipped.describe()}")

    dev = held_out.pairs
    if corpus.dev:
        dev = _read_all(corpus.dev, config, "validation", messages)
    elif dev:
        messages.append(
            f"validation text: {len(dev):,} pairs held out of the training text, the same ones for "
            "every run on it"
        )
    else:
        messages.append("validation text: none")
    test = _read_all(corpus.test, config, "test", messages) if corpus.test else []

    dev_set = None
    if dev:
        dev_text = hashlib.sha256(json.dumps(dev).encode()).hexdigest()
        dev_set = ParallelDataset(
            cached(
                cache,
                "dev",
                {"text": dev_text, **tokens_key},
                lambda folder: build_dataset(folder, dev, source, target),
            )
        )
    return PreparedData(corpus.name, train, source, target, dev, test, dev_set, messages)


def _read_all(
    text: ParallelText, config: DataConfig, name: str, messages: list[str]
) -> list[tuple[str, str]]:
    skipped = SkippedPairs()
    pairs = list(read_pairs(text, config.bad_lines, skipped))
    if not pairs:
        raise CorpusError(f"{', '.join(text.src)}: the {name} text has no usable sentence pair")
    messages.append(f"{name} text: {skipped.describe()}")
    return pairs


def _tokenizers(
    config: DataConfig,
    cache: Path,
    text_key: dict[str, Any],
    pairs: int,
    read: Callable[[SkippedPairs], Iterator[tuple[str, str]]],
    say: Callable[[str], None],
    messages: list[str],
) -> tuple[Tokenizer, Tokenizer]:
    if config.tokenizer is not None:
        tokenizer = Tokenizer(config.tokenizer)
        messages.append(f"tokenizer: {config.tokenizer}, {tokenizer.vocab_size:,} pieces")
        return tokenizer, tokenizer
    if config.src_tokenizer is not None and config.tgt_tokenizer is not None:
        source, target = Tokenizer(config.src_tokenizer), Tokenizer(config.tgt_tokenizer)
        if source.sha256 == target.sha256:
            target = source
        messages.append(
            f"tokenizers: {config.src_tokenizer}, {source.vocab_size:,} pieces; "
            f"{config.tgt_tokenizer}, {target.vocab_size:,} pieces"
        )
        return source, target

    wanted = config.vocab_size or default_vocab_size(pairs)
    every = -(-pairs // TOKENIZER_PAIRS)
    key = {
        "text": text_key,
        "kind": config.tokenizer_type,
        "vocab_size": wanted,
        "joint": config.joint_vocab,
        "character_coverage": config.character_coverage,
        "every": every,
    }

    def build(folder: Path) -> None:
        say(f"training the tokenizer ({config.tokenizer_type}, {wanted:,} pieces)")
        for name, columns in (
            (("tokenizer", (0, 1)),) if config.joint_vocab else (("source", (0,)), ("target", (1,)))
        ):
            chosen = itertools.islice(read(SkippedPairs()), 0, None, every)
            sentences = (pair[column] for pair in chosen for column in columns)
            model, _ = train_tokenizer(
                sentences,
                vocab_size=wanted,
                kind=config.tokenizer_type,
                character_coverage=config.character_coverage,
            )
            (folder / f"{name}.model").write_bytes(model)

    folder = cached(cache, "tokenizer", key, build)
    if config.joint_vocab:
        source = target = Tokenizer(folder / "tokenizer.model")
    else:
        source, target = Tokenizer(folder / "source.model"), Tokenizer(folder / "target.model")
    sizes = sorted({source.vocab_size, target.vocab_size})
    kind = {"bpe": "BPE", "unigram": "unigram"}[config.tokenizer_type]
    what = "one for both languages" if config.joint_vocab else "one for each language"
    message = f"tokenizer: {kind}, {what}, {' and '.join(f'{size:,}' for size in sizes)} pieces"
    if sizes[0] < wanted:
        message += f" (the text has no {wanted:,} different ones)"
    messages.append(message)
    return source, target
