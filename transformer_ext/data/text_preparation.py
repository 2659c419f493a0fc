"""From files of text to tokenizer and data sets, for the tasks whose data have one side.

Cached as :mod:`transformer_ext.data.preparation` does it, under the hash of all that it depends on.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformer_ext.config import DataConfig
from transformer_ext.data.corpus import (
    CorpusError,
    HeldOut,
    describe_held_out,
    file_digest,
    text_format,
    wrong_layout,
)
from transformer_ext.data.dataset import (
    DATASET_VERSION,
    ParallelDataset,
    build_dataset,
    read_sealed,
    write_sealed,
)
from transformer_ext.data.preparation import (
    TOKENIZER_PAIRS,
    cache_folder,
    cached,
    default_vocab_size,
)
from transformer_ext.data.text import Labels, TextCounts
from transformer_ext.data.tokenizer import (
    SentencePieceTokenizer,
    Tokenizer,
    open_tokenizer,
    train_tokenizer,
)

#: Reads files as (text, label) and counts what it leaves out.
Reader = Callable[[Sequence[str], TextCounts], Iterator[tuple[str, str]]]


@dataclass(frozen=True)
class TextFiles:
    """Files of text.

    Attributes:
        name: for people.
        train: to learn from.
        dev: for validation; without any a part of the training text is held out.
        test: for the final test.
        reader: reads them.
        key: all that the reader's result depends on beside the files' content.
    """

    name: str
    train: Sequence[str]
    dev: Sequence[str]
    test: Sequence[str]
    reader: Reader
    key: str


@dataclass
class PreparedTexts:
    """All that training needs to know of texts.

    Attributes:
        name: of the corpus, for people.
        train: texts to train on.
        tokenizer: of the texts.
        labels: the different labels, sorted; empty where there are none.
        dev: (text, label) for validation; empty if there are none.
        test: (text, label) for the final test; empty if there are none.
        dev_set: ``dev`` as token ids; None if there are none.
        test_set: ``test`` as token ids; None if there are none.
        messages: what a person should know, one line each.
    """

    name: str
    train: ParallelDataset
    tokenizer: Tokenizer
    labels: list[str]
    dev: list[tuple[str, str]]
    test: list[tuple[str, str]]
    dev_set: ParallelDataset | None
    test_set: ParallelDataset | None
    messages: list[str] = field(default_factory=list)


def prepare_texts(
    config: DataConfig,
    files: TextFiles,
    *,
    what: str,
    max_length: int | None,
    report: Callable[[str], None] | None = None,
    tokenizer: Tokenizer | None = None,
) -> PreparedTexts:
    """Read the texts, train or load the tokenizer, and build the data sets, or find them cached.

    Args:
        config: tokenizer, part to be held out, cache.
        files: which texts.
        what: what one is called in messages, in the plural.
        max_length: training texts with more tokens, the end id included, are left out; None: none.
        report: is told each step that may take long, as it begins.
        tokenizer: of the texts, whatever the options say; None goes by the options.

    Raises:
        CorpusError: the texts cannot be used.
        TokenizerError: the tokenizer cannot be used or trained.
    """
    say = report or (lambda message: None)
    cache = cache_folder(config)
    messages: list[str] = []
    say(f"reading {files.name}")
    text_key: dict[str, Any] = {
        "files": [[text_format(path), file_digest(path)] for path in files.train],
        "reader": files.key,
        "bad_lines": config.bad_lines,
        "held_out": 0.0 if files.dev else config.held_out,
    }

    def build_split(folder: Path) -> None:
        counts = TextCounts()
        labels: set[str] = set()

        def read() -> Iterator[tuple[str, str]]:
            for text, label in files.reader(files.train, counts):
                labels.add(label)
                yield text, label
            if not counts.used:
                raise CorpusError(
                    wrong_layout(files.train)
                    or f"{', '.join(files.train)}: the training text has nothing to use: "
                    f"{counts.describe(what)}"
                )

        held_out = HeldOut.choose(read(), text_key["held_out"])
        values = {
            "threshold": held_out.threshold,
            "texts": held_out.pairs,
            "used": counts.used,
            "labels": sorted(labels - {""}),
        }
        write_sealed(folder / "split.json", values)

    split_folder = cached(cache, "text-split", {"text": text_key}, build_split)
    split = read_sealed(split_folder / "split.json")
    dev = [(text, label) for text, label in split["texts"]]
    held_out = HeldOut(threshold=split["threshold"], pairs=dev)

    def train_texts(counts: TextCounts) -> Iterator[tuple[str, str]]:
        for text, label in files.reader(files.train, counts):
            if text in held_out:
                counts.held_out += 1
            else:
                yield text, label

    if tokenizer is None:
        tokenizer = _tokenizer(config, cache, text_key, split["used"], train_texts, say, messages)
    labels = Labels(split["labels"], tokenizer)

    chosen = tokenizer

    def build(folder: Path, texts: Iterable[tuple[str, str]]) -> None:
        build_dataset(folder, texts, chosen, labels)

    def build_train(folder: Path) -> None:
        say("turning the text into token ids")
        counts = TextCounts()
        build(folder, train_texts(counts))
        write_sealed(folder / "counts.json", vars(counts))

    tokens_key = {
        "tokenizer": tokenizer.sha256,
        "labels": labels.names,
        "dataset": DATASET_VERSION,
    }
    folder = cached(cache, "texts", {"text": text_key, **tokens_key}, build_train)
    train = everything = ParallelDataset(folder)
    counts = TextCounts(**read_sealed(folder / "counts.json"))
    if max_length is not None:
        train = everything.filtered(max_length)
        counts.too_long = len(everything) - len(train)
        if config.long_lines == "error" and counts.too_long:
            raise CorpusError(
                f"{counts.too_long:,} of {len(everything):,} {what} are longer than {max_length} "
                "tokens; --long-lines skip leaves them out"
            )
    messages.insert(0, f"training text: {counts.describe(what)}")

    def held(paths: Sequence[str], part: str) -> list[tuple[str, str]]:
        counts = TextCounts()
        texts = list(files.reader(paths, counts))
        if not texts:
            raise CorpusError(f"{', '.join(paths)}: the {part} text has nothing to use")
        unknown = {label for _, label in texts} - {*labels.names, ""}
        if unknown:
            raise CorpusError(
                f"{', '.join(paths)}: the label {sorted(unknown)[0]!r} does not occur in the "
                f"training text, which has {', '.join(map(repr, labels.names[:10]))}"
            )
        messages.append(f"{part} text: {counts.describe(what)}")
        return texts

    def as_set(texts: list[tuple[str, str]]) -> ParallelDataset | None:
        if not texts:
            return None
        digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
        return ParallelDataset(
            cached(cache, "texts", {"held": digest, **tokens_key}, lambda f: build(f, texts))
        )

    if files.dev:
        dev = held(files.dev, "validation")
    elif dev:
        messages.append(describe_held_out(what, len(dev), counts.held_out))
    else:
        messages.append("validation text: none")
    test = held(files.test, "test") if files.test else []
    return PreparedTexts(
        files.name,
        train,
        tokenizer,
        labels.names,
        dev,
        test,
        as_set(dev),
        as_set(test),
        messages,
    )


def _tokenizer(
    config: DataConfig,
    cache: Path,
    text_key: dict[str, Any],
    count: int,
    read: Callable[[TextCounts], Iterator[tuple[str, str]]],
    say: Callable[[str], None],
    messages: list[str],
) -> Tokenizer:
    if config.tokenizer is not None:
        tokenizer = open_tokenizer(config.tokenizer)
        messages.append(f"tokenizer: {config.tokenizer}, {tokenizer.vocab_size:,} pieces")
        return tokenizer
    wanted = config.vocab_size or default_vocab_size(count)
    every = max(1, -(-count // TOKENIZER_PAIRS))
    key = {
        "text": text_key,
        "kind": config.tokenizer_type,
        "vocab_size": wanted,
        "character_coverage": config.character_coverage,
        "every": every,
    }

    def build(folder: Path) -> None:
        say(f"training the tokenizer ({config.tokenizer_type}, {wanted:,} pieces)")
        chosen = itertools.islice(read(TextCounts()), 0, None, every)
        model, _ = train_tokenizer(
            (text for text, _ in chosen),
            vocab_size=wanted,
            kind=config.tokenizer_type,
            character_coverage=config.character_coverage,
        )
        (folder / "tokenizer.model").write_bytes(model)

    tokenizer = SentencePieceTokenizer(cached(cache, "tokenizer", key, build) / "tokenizer.model")
    kind = {"bpe": "BPE", "unigram": "unigram"}[config.tokenizer_type]
    message = f"tokenizer: {kind}, {tokenizer.vocab_size:,} pieces"
    if tokenizer.vocab_size < wanted:
        message += f" (the text has no {wanted:,} different ones)"
    messages.append(message)
    return tokenizer
