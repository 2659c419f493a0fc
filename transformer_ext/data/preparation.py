"""From the options of a configuration to tokenizer and data set, each built once and then cached.

The cache is a folder of folders, named by the hash of everything that their content depends on: the
bytes of the text files, the tokenizer, the options, the version of the format. A changed text or
option therefore never meets old ids, and nothing has to be cleaned by hand. A folder appears under
its name only when complete, so processes may build the same one at the same time; where the system
has file locks, the others wait for the first instead.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from transformer_ext.config import DataConfig
from transformer_ext.data.corpus import (
    BadLines,
    Chunk,
    Corpus,
    CorpusError,
    CorpusPart,
    HeldOut,
    HeldOutChoice,
    ParallelText,
    SameTextCheck,
    SkippedPairs,
    describe_held_out,
    file_digest,
    pairs_format,
    parse,
    read_chunks,
    read_pairs,
    shipped_corpus,
    text_hash,
    wrong_layout,
)
from transformer_ext.data.dataset import (
    DATASET_VERSION,
    Block,
    DatasetWriter,
    IdEncoder,
    ParallelDataset,
    build_dataset,
    encode_pairs,
    read_sealed,
    write_sealed,
)
from transformer_ext.data.doubts import look_misaligned, look_swapped
from transformer_ext.data.progress import Progress
from transformer_ext.data.tokenizer import (
    SentencePieceTokenizer,
    Tokenizer,
    open_tokenizer,
    train_tokenizer,
    usable_cpus,
)
from transformer_ext.data.workers import Workers
from transformer_ext.files import FileError, atomic_directory, atomic_write

CACHE_VARIABLE = "TRANSFORMER_EXT_CACHE"
CACHE_VERSION = 3

# A SentencePiece trainer holds its text in memory; more than this changes the pieces little.
TOKENIZER_PAIRS = 500_000

# What a file that is open cannot be written for; the error does not name it.
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
# Below so many bytes of text, starting processes takes longer than the work.
_LITTLE_TEXT = 4 << 20
# The digest of a file below this size is computed each time; it takes some milliseconds.
_SMALL_FILE = 16 << 20
# A file that was changed in the last seconds may change again without a new time stamp.
_SETTLED_SECONDS = 3
# A data set up to this size is compared with its checksums whenever it is opened.
_CHEAP_CHECK = 16 << 20


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
        Exception: what ``build`` raises.
    """
    text = json.dumps({"version": CACHE_VERSION, **key}, sort_keys=True)
    path = folder / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:24]}"
    building = False
    try:
        if path.is_dir():
            return path
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder / f"{path.name}.lock") as locked:
            if path.is_dir():
                return path
            if locked:
                # Nobody else builds this now: what is there was left by a killed process.
                for old in folder.glob(f"{path.name}.tmp-*"):
                    shutil.rmtree(old, ignore_errors=True)
            with atomic_directory(path) as temporary:
                building = True
                build(temporary)
                building = False
    except FileError:
        # Of equal ones that were built at the same time, the first has the name.
        if building or not path.is_dir():
            raise
    except OSError as error:
        if building and not _of_writing(error, folder):
            raise
        raise CorpusError(
            f"{folder}: the cache cannot be written: {error.strerror or error}; choose another "
            f"folder with --cache or ${CACHE_VARIABLE}"
        ) from None
    return path


def _of_writing(error: OSError, folder: Path) -> bool:
    """Whether an error is of a file in a folder, or of a disk."""
    if error.filename is None:
        return error.errno in _NO_ROOM
    return Path(os.fsdecode(error.filename)).is_relative_to(folder)


def cached_digest(path: str, cache: Path) -> str:
    """SHA-256 of a file's bytes; that of a large file is remembered while the file is not touched.

    Raises:
        CorpusError: it cannot be read.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read: {error.strerror}") from None
    if status.st_size < _SMALL_FILE:
        return file_digest(path)
    # The time of change, too: that of modification can be set to any value.
    name = os.path.realpath(path)
    key = [
        name,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
        status.st_ino,
    ]
    note = cache / "digests" / f"{hashlib.sha256(os.fsencode(name)).hexdigest()[:24]}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        values = json.loads(note.read_text(encoding="utf-8"))
        if values["key"] == key:
            return str(values["sha256"])
    digest = file_digest(path)
    newest = max(status.st_mtime_ns, status.st_ctime_ns) / 1e9
    if time.time() - newest > _SETTLED_SECONDS and os.stat(path).st_ctime_ns == status.st_ctime_ns:
        with contextlib.suppress(OSError):
            atomic_write(note, json.dumps({"key": key, "sha256": digest}))
    return digest


@dataclass
class PreparedData:
    """All that training needs to know of the data.

    Attributes:
        name: of the corpus, for people.
        train: pairs to train on.
        source_tokenizer: of the source language.
        target_tokenizer: of the target language; the same object if there is one for both.
        dev: sentence pairs for validation, as text; empty if there are none. Source texts begin
            with their tags, target texts do not.
        test: sentence pairs for the final test, likewise.
        dev_set: ``dev`` as token ids, target tags included; None if there are none.
        corpus_weights: for each of ``train.corpora``, how many times an epoch has each of its
            pairs.
        messages: what a person should know, one line each.
        digests: SHA-256 of each text file by its path.
    """

    name: str
    train: ParallelDataset
    source_tokenizer: Tokenizer
    target_tokenizer: Tokenizer
    dev: list[tuple[str, str]]
    test: list[tuple[str, str]]
    dev_set: ParallelDataset | None
    corpus_weights: list[float] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)


def chosen_corpus(config: DataConfig) -> Corpus:
    """The files named in the options, or the shipped corpus if none are.

    Where there are several corpora, ``train`` has the files of all; see :func:`chosen_parts`.

    Raises:
        CorpusError: a file is missing, or the same on both sides.
    """
    if config.shipped:
        return shipped_corpus()

    def text(part: str) -> ParallelText:
        return ParallelText(
            tuple(getattr(config, f"src_{part}")),
            tuple(getattr(config, f"tgt_{part}")),
            tuple(getattr(config, f"pairs_{part}")),
            config.pair_keys,
        )

    train = text("train")
    if config.corpora:
        name = " + ".join(corpus.name for corpus in config.corpora)
        train = ParallelText(
            tuple(path for corpus in config.corpora for path in corpus.src),
            tuple(path for corpus in config.corpora for path in corpus.tgt),
            tuple(path for corpus in config.corpora for path in corpus.pairs),
            config.pair_keys,
        )
    else:
        name = Path(train.paths[0]).name
    corpus = Corpus(name, train, text("dev"), text("test"))
    for part in (corpus.train, corpus.dev, corpus.test):
        part.check_files()
    return corpus


def chosen_parts(config: DataConfig, corpus: Corpus) -> list[CorpusPart]:
    """The corpora that the text to train on consists of, in order."""
    if not config.corpora:
        return [CorpusPart(corpus.name, corpus.train)]
    return [
        CorpusPart(
            part.name,
            ParallelText(tuple(part.src), tuple(part.tgt), tuple(part.pairs), config.pair_keys),
            part.weight,
            part.source_tag or "",
            part.target_prefix or "",
        )
        for part in config.corpora
    ]


def corpus_weights(
    parts: Sequence[CorpusPart], sizes: Sequence[int], temperature: float | None
) -> list[float]:
    """How many times an epoch has each pair of each corpus.

    Args:
        parts: the corpora.
        sizes: their numbers of pairs.
        temperature: shares in proportion to ``size ** (1 / temperature)`` in an epoch of as many
            pairs as there are; None: the weights of the corpora.
    """
    if temperature is None:
        return [1.0 if part.weight is None else part.weight for part in parts]
    largest = max(sizes)
    shares = [(size / largest) ** (1 / temperature) for size in sizes]
    return [
        sum(sizes) * share / (sum(shares) * size) for share, size in zip(shares, sizes, strict=True)
    ]


def default_vocab_size(pairs: int) -> int:
    """Number of pieces that suits a number of sentence pairs."""
    for limit, size in ((20_000, 4_000), (200_000, 8_000), (2_000_000, 16_000)):
        if pairs < limit:
            return size
    return 32_000


class _ScanTask(NamedTuple):
    part: int
    chunk: Chunk
    # Number of the chunk's first pair among all that are read.
    begin: int
    # Pairs whose hash is above this are not held out.
    highest: int
    # Of which so many go to the tokenizer's training; 0: none.
    every: int


class _Scanned(NamedTuple):
    part: int
    paths: tuple[str, ...]
    counts: SkippedPairs
    candidates: list[tuple[int, str, str]]
    sample: list[tuple[int, str, str]]


@dataclass
class _Scan:
    """The first pass: what is there, what may be held out, what a tokenizer may learn from."""

    bad_lines: BadLines

    def __call__(self, task: _ScanTask) -> _Scanned:
        counts = SkippedPairs()
        src, tgt, places = parse(task.chunk, self.bad_lines, counts)
        candidates = []
        if task.highest >= 0:
            for place, text in enumerate(src):
                key = text_hash(text)
                if key <= task.highest:
                    candidates.append((key, text, tgt[place]))
        sample = [
            (task.begin + place, src[number], tgt[number])
            for number, place in enumerate(places)
            if task.every and (task.begin + place) % task.every == 0
        ]
        return _Scanned(task.part, task.chunk.paths, counts, candidates, sample)


class _Sample:
    """Each pair whose number is a multiple of a power of two, that of the fewest above a limit."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.every = 1
        self.pairs: list[tuple[int, str, str]] = []

    def add(self, pairs: list[tuple[int, str, str]]) -> None:
        self.pairs += [pair for pair in pairs if pair[0] % self.every == 0]
        while len(self.pairs) > self._limit:
            self.every *= 2
            self.pairs = [pair for pair in self.pairs if pair[0] % self.every == 0]


class _EncodeTask(NamedTuple):
    part: int
    chunk: Chunk


class _Encoded(NamedTuple):
    part: int
    paths: tuple[str, ...]
    counts: SkippedPairs
    block: Block


class _Encode:
    """The second pass: token ids of all pairs that are not held out."""

    def __init__(
        self,
        bad_lines: BadLines,
        threshold: int,
        parts: Sequence[CorpusPart],
        source: Tokenizer,
        target: Tokenizer,
        by_words: bool,
    ) -> None:
        self._bad_lines = bad_lines
        self._held_out = HeldOut(threshold=threshold)
        self._tags = [(part.source_tag, part.target_prefix) for part in parts]
        self._tokenizers = (source, target)
        self._by_words = by_words
        self._encoders: tuple[IdEncoder, IdEncoder] | None = None

    def __call__(self, task: _EncodeTask) -> _Encoded:
        if self._encoders is None:
            source, target = self._tokenizers
            self._encoders = (
                IdEncoder(source, with_eos=True, by_words=self._by_words),
                IdEncoder(target, by_words=self._by_words),
            )
        counts = SkippedPairs()
        src, tgt, _ = parse(task.chunk, self._bad_lines, counts)
        if self._held_out.threshold >= 0:
            kept = [place for place, text in enumerate(src) if text not in self._held_out]
            if len(kept) < len(src):
                counts.held_out += len(src) - len(kept)
                src, tgt = [src[place] for place in kept], [tgt[place] for place in kept]
        block = encode_pairs(src, tgt, *self._encoders, *self._tags[task.part])
        return _Encoded(task.part, task.chunk.paths, counts, block)


def _state(path: str) -> tuple[int, int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns, status.st_ino


def _worker_count(config: DataConfig, size: int) -> int:
    if config.prepare_workers is not None:
        return config.prepare_workers
    return 0 if size < _LITTLE_TEXT else usable_cpus()


class _Preparation:
    """The steps from a text to tokenizers and data set, each built or found in the cache."""

    def __init__(
        self,
        config: DataConfig,
        report: Callable[[str], None] | None,
        tokenizers: tuple[Tokenizer, Tokenizer] | None,
    ) -> None:
        self.config = config
        self._given = tokenizers
        self.say = report or (lambda message: None)
        self._report = report
        self.corpus = chosen_corpus(config)
        self.parts = chosen_parts(config, self.corpus)
        self.cache = cache_folder(config)
        self.messages: list[str] = []
        self._paths = [path for part in self.parts for path in part.text.paths]
        self._size = sum(map(os.path.getsize, self._paths))
        self._states = list(map(_state, self._paths))
        self._workers = _worker_count(config, self._size)
        self.say(f"reading {self.corpus.name}")
        trained = not (tokenizers or config.tokenizer or config.src_tokenizer)
        self.text_key: dict[str, Any] = {
            "corpora": [self._part_key(part) for part in self.parts],
            "bad_lines": config.bad_lines,
            "held_out": 0.0 if self.corpus.dev else config.held_out,
        }
        self.tags_key = [[part.source_tag, part.target_prefix] for part in self.parts]
        self._sampled = trained
        # SentencePiece's BPE joins symbols by fixed ranks, and the pieces trained here do not cross
        # spaces: words are independent. A unigram model adds up scores over the whole sentence.
        self._by_words = trained and config.tokenizer_type == "bpe"

    def _part_key(self, part: CorpusPart) -> dict[str, Any]:
        text = part.text
        pairs = [[pairs_format(path), cached_digest(path, self.cache)] for path in text.pairs]
        return {
            "src": [cached_digest(path, self.cache) for path in text.src],
            "tgt": [cached_digest(path, self.cache) for path in text.tgt],
            "pairs": pairs,
            "keys": list(text.keys) if any(form == "jsonl" for form, _ in pairs) else None,
        }

    def _chunks(self, progress: Progress) -> Iterator[tuple[int, Chunk]]:
        for number, part in enumerate(self.parts):
            for chunk in read_chunks(part.text, progress.read):
                yield number, chunk
        for path, state in zip(self._paths, self._states, strict=True):
            if _state(path) != state:
                raise CorpusError(f"{path}: was changed while it was read; start again")

    # First pass -----------------------------------------------------------------------------------

    def split(self) -> tuple[HeldOut, int, Path]:
        """What is held out, the number of pairs, and the folder of the tokenizer's sample."""
        key = {"text": self.text_key, "sample": TOKENIZER_PAIRS if self._sampled else 0}
        folder = cached(self.cache, "split", key, self._build_split)
        values = read_sealed(folder / "split.json")
        held_out = HeldOut(
            threshold=values["threshold"],
            pairs=[(src, tgt) for _, src, tgt in values["pairs"]],
            parts=[part for part, _, _ in values["pairs"]],
        )
        return held_out, values["used"], folder

    def _build_split(self, folder: Path) -> None:
        part_held_out: float = self.text_key["held_out"]
        choice = HeldOutChoice()
        sample = _Sample(TOKENIZER_PAIRS)
        counts = SkippedPairs()
        check = SameTextCheck()

        def tasks(progress: Progress) -> Iterator[_ScanTask]:
            begin = 0
            for number, chunk in self._chunks(progress):
                yield _ScanTask(
                    number,
                    chunk,
                    begin,
                    choice.highest if part_held_out else -1,
                    sample.every if self._sampled else 0,
                )
                begin += chunk.size

        with (
            Progress("reading the text", self._size, self._report) as progress,
            Workers(_Scan(self.config.bad_lines), self._workers) as workers,
        ):
            for result in workers.map(tasks(progress)):
                check.add(result.paths, result.counts)
                counts.add(result.counts)
                progress.done(result.counts.used)
                for key, src, tgt in result.candidates:
                    choice.add(key, src, tgt, result.part)
                sample.add(result.sample)
        check.finish()
        if not counts.used:
            raise CorpusError(
                wrong_layout(self._paths)
                or f"{', '.join(self._paths)}: the training text has no usable sentence pair: "
                f"{counts.describe()}"
            )
        held_out = choice.result(part_held_out, counts.used)
        pairs = [[part, *pair] for part, pair in zip(held_out.parts, held_out.pairs, strict=True)]
        values = {"threshold": held_out.threshold, "pairs": pairs, "used": counts.used}
        write_sealed(folder / "split.json", values)
        with (
            open(folder / "sample.source", "wb") as source,
            open(folder / "sample.target", "wb") as target,
        ):
            for _, src, tgt in sample.pairs:
                if src not in held_out:
                    source.write(src.encode() + b"\n")
                    target.write(tgt.encode() + b"\n")

    # Tokenizers -----------------------------------------------------------------------------------

    def tokenizers(self, pairs: int, sample: Path) -> tuple[Tokenizer, Tokenizer]:
        """Those brought along, or ones trained on the sample."""
        config = self.config
        source_tags = list(dict.fromkeys(p.source_tag for p in self.parts if p.source_tag))
        prefixes = list(dict.fromkeys(p.target_prefix for p in self.parts if p.target_prefix))
        if self._given is not None:
            source, target = self._given
            if source is target:
                source = target = source.with_tags(source_tags, prefixes)
            else:
                source, target = source.with_tags(source_tags), target.with_tags((), prefixes)
            return source, target
        if config.tokenizer is not None:
            tokenizer = open_tokenizer(config.tokenizer, source_tags, prefixes)
            self.messages.append(f"tokenizer: {config.tokenizer}, {tokenizer.vocab_size:,} pieces")
            return tokenizer, tokenizer
        if config.src_tokenizer is not None and config.tgt_tokenizer is not None:
            source = open_tokenizer(config.src_tokenizer)
            target = open_tokenizer(config.tgt_tokenizer)
            if source.sha256 == target.sha256:
                source = target = open_tokenizer(config.src_tokenizer, source_tags, prefixes)
            else:
                source = open_tokenizer(config.src_tokenizer, source_tags)
                target = open_tokenizer(config.tgt_tokenizer, (), prefixes)
            self.messages.append(
                f"tokenizers: {config.src_tokenizer}, {source.vocab_size:,} pieces; "
                f"{config.tgt_tokenizer}, {target.vocab_size:,} pieces"
            )
            return source, target

        wanted = config.vocab_size or default_vocab_size(pairs)
        key = {
            "text": self.text_key,
            "kind": config.tokenizer_type,
            "vocab_size": wanted,
            "joint": config.joint_vocab,
            "character_coverage": config.character_coverage,
            "sample": TOKENIZER_PAIRS,
            "tags": [source_tags, prefixes],
        }

        def build(folder: Path) -> None:
            self.say(f"training the tokenizer ({config.tokenizer_type}, {wanted:,} pieces)")
            both = [*source_tags, *(tag for tag in prefixes if tag not in source_tags)]
            for name, sides, tags in (
                (("tokenizer", ("source", "target"), both),)
                if config.joint_vocab
                else (("source", ("source",), source_tags), ("target", ("target",), prefixes))
            ):
                model, _ = train_tokenizer(
                    _sample_lines(sample, sides),
                    vocab_size=wanted,
                    kind=config.tokenizer_type,
                    character_coverage=config.character_coverage,
                    tags=tags,
                )
                (folder / f"{name}.model").write_bytes(model)

        folder = cached(self.cache, "tokenizer", key, build)
        if config.joint_vocab:
            source = target = SentencePieceTokenizer(
                folder / "tokenizer.model", None, source_tags, prefixes
            )
        else:
            source = SentencePieceTokenizer(folder / "source.model", None, source_tags)
            target = SentencePieceTokenizer(folder / "target.model", None, (), prefixes)
        sizes = sorted({source.vocab_size, target.vocab_size})
        kind = {"bpe": "BPE", "unigram": "unigram"}[config.tokenizer_type]
        what = "one for both languages" if config.joint_vocab else "one for each language"
        message = f"tokenizer: {kind}, {what}, {' and '.join(f'{size:,}' for size in sizes)} pieces"
        if sizes[0] < wanted:
            message += f" (the text has no {wanted:,} different ones)"
        self.messages.append(message)
        return source, target

    # Second pass ----------------------------------------------------------------------------------

    def token_ids(self, held_out: HeldOut, source: Tokenizer, target: Tokenizer) -> ParallelDataset:
        """All pairs that are not held out."""
        key = {
            "text": self.text_key,
            "tags": self.tags_key,
            "names": [part.name for part in self.parts],
            **tokens_key(source, target),
        }

        def build(folder: Path) -> None:
            self.say("turning the text into token ids")
            self._build_ids(folder, held_out, source, target)

        result = ParallelDataset(cached(self.cache, "pairs", key, build))
        if result.bytes_on_disk < _CHEAP_CHECK:
            result.verify()
        return result

    def _build_ids(
        self, folder: Path, held_out: HeldOut, source: Tokenizer, target: Tokenizer
    ) -> None:
        encode = _Encode(
            self.config.bad_lines,
            held_out.threshold,
            self.parts,
            source,
            target,
            self._by_words,
        )
        writer = DatasetWriter(folder, source, target)
        check = SameTextCheck()
        counts: list[SkippedPairs] = []
        try:
            with (
                Progress("token ids", self._size, self._report) as progress,
                Workers(encode, self._workers) as workers,
            ):
                tasks = (_EncodeTask(*pair) for pair in self._chunks(progress))
                for result in workers.map(tasks):
                    check.add(result.paths, result.counts)
                    while len(counts) <= result.part:
                        counts.append(writer.begin(self.parts[len(counts)].name))
                    counts[result.part].add(result.counts)
                    writer.add(result.block)
                    progress.done(result.counts.used)
            check.finish()
            while len(counts) < len(self.parts):
                counts.append(writer.begin(self.parts[len(counts)].name))
            writer.finish()
        except BaseException:
            writer.abort()
            raise

    # All together ---------------------------------------------------------------------------------

    def run(self) -> PreparedData:
        """Everything, in order."""
        config, corpus = self.config, self.corpus
        held_out, used, split_folder = self.split()
        source, target = self.tokenizers(used, split_folder)
        everything = self.token_ids(held_out, source, target)
        train = everything.filtered(
            config.max_length,
            config.max_length_ratio,
            duplicates=config.duplicates,
            identical=config.identical,
        )
        wrong = train.skipped.too_long + train.skipped.ratio
        if config.long_lines == "error" and wrong:
            raise CorpusError(
                f"{wrong:,} of {len(everything):,} pairs are longer than {config.max_length} tokens "
                "or too unequal in length; --long-lines skip leaves them out"
            )
        weights = corpus_weights(
            self.parts, [len(rows) for rows in train.corpora], config.temperature
        )
        summary = [f"training text: {train.skipped.describe()}"]
        if len(self.parts) > 1:
            summary += [
                _describe(part, rows.skipped, weight)
                for part, rows, weight in zip(self.parts, train.corpora, weights, strict=True)
            ]
        self.messages[:0] = summary
        dev, dev_targets = self._dev(held_out, train.skipped.held_out, target)
        test = []
        if corpus.test:
            test = [
                (src, target.split_tag(tgt)[1]) for src, tgt in self._read_all(corpus.test, "test")
            ]
        dev_set = None
        if dev:
            pairs = [(src, tgt) for (src, _), tgt in zip(dev, dev_targets, strict=True)]
            key = {
                "text": hashlib.sha256(json.dumps(pairs).encode()).hexdigest(),
                **tokens_key(source, target),
            }
            dev_set = ParallelDataset(
                cached(
                    self.cache,
                    "dev",
                    key,
                    lambda folder: build_dataset(folder, pairs, source, target),
                )
            )
        self._doubt(train, dev, test, source, target)
        digests = {
            path: cached_digest(path, self.cache)
            for text in (corpus.train, corpus.dev, corpus.test)
            for path in text.paths
        }
        return PreparedData(
            corpus.name, train, source, target, dev, test, dev_set, weights, self.messages, digests
        )

    def _doubt(
        self,
        train: ParallelDataset,
        dev: list[tuple[str, str]],
        test: list[tuple[str, str]],
        source: Tokenizer,
        target: Tokenizer,
    ) -> None:
        """Says what looks wrong, though it can be learnt from."""
        correlation = look_misaligned(train)
        if correlation is not None:
            self.messages.append(
                "warning: the lengths of the source sentences say nothing of those of the target "
                f"(correlation {correlation:.2f}): are the lines translations of each other?"
            )
        read = {os.path.realpath(path) for path in self.corpus.train.paths}
        for name, text, pairs in (
            ("validation", self.corpus.dev, dev),
            ("test", self.corpus.test, test),
        ):
            if not text:
                continue
            for path in text.paths:
                if os.path.realpath(path) in read:
                    self.messages.append(
                        f"warning: {path} is given as training text and as {name} text: the figures "
                        "will be too good"
                    )
            if look_swapped(pairs, train, source, target):
                self.messages.append(
                    f"warning: the {name} text looks as if source and target were swapped: "
                    f"{', '.join(text.paths)}"
                )

    def _dev(
        self, held_out: HeldOut, left_out: int, target: Tokenizer
    ) -> tuple[list[tuple[str, str]], list[str]]:
        """Pairs for validation, and their target texts with tags; ``left_out`` pairs of the training
        text have their sources."""
        if self.corpus.dev:
            pairs = self._read_all(self.corpus.dev, "validation")
            tags = tuple({part.source_tag for part in self.parts})
            plain = sum(not src.startswith(tags) for src, _ in pairs) if all(tags) else 0
            if plain:
                self.messages.append(
                    f"warning: {plain:,} sources of the validation text begin with no tag, but all "
                    "of the training text do"
                )
            return [(src, target.split_tag(tgt)[1]) for src, tgt in pairs], [t for _, t in pairs]
        if not held_out.pairs:
            self.messages.append("validation text: none")
            return [], []
        self.messages.append(describe_held_out("pairs", len(held_out.pairs), left_out))
        parts = [self.parts[number] for number in held_out.parts]
        dev = [
            (f"{part.source_tag} {src}".removeprefix(" ") if part.source_tag else src, tgt)
            for part, (src, tgt) in zip(parts, held_out.pairs, strict=True)
        ]
        targets = [
            f"{part.target_prefix} {tgt}" if part.target_prefix else tgt
            for part, (_, tgt) in zip(parts, held_out.pairs, strict=True)
        ]
        return dev, targets

    def _read_all(self, text: ParallelText, name: str) -> list[tuple[str, str]]:
        skipped = SkippedPairs()
        pairs = list(read_pairs(text, self.config.bad_lines, skipped))
        if not pairs:
            raise CorpusError(
                wrong_layout(text.paths)
                or f"{', '.join(text.paths)}: the {name} text has no usable sentence pair"
            )
        self.messages.append(f"{name} text: {skipped.describe()}")
        return pairs


def tokens_key(source: Tokenizer, target: Tokenizer) -> dict[str, Any]:
    """What token ids depend on beside the text."""
    return {
        "tokenizers": [source.sha256, target.sha256],
        "known_tags": [[*t.source_tags, *t.target_prefixes] for t in (source, target)],
        "dataset": DATASET_VERSION,
    }


def _sample_lines(folder: Path, sides: Sequence[str]) -> Iterator[str]:
    """The lines of the sides, in turn."""
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(folder / f"sample.{side}", "rb")) for side in sides]
        for lines in zip(*files, strict=True):
            for line in lines:
                yield line[:-1].decode()


def _describe(part: CorpusPart, skipped: SkippedPairs, weight: float) -> str:
    text = f"corpus {part.name}: {skipped.describe()}"
    if weight != 1.0:
        text += f"; each {weight:.3g} times an epoch"
    for what, tag in (("tag", part.source_tag), ("target prefix", part.target_prefix)):
        if tag:
            text += f"; {what} {tag}"
    return text


def prepare_data(
    config: DataConfig,
    report: Callable[[str], None] | None = None,
    tokenizers: tuple[Tokenizer, Tokenizer] | None = None,
) -> PreparedData:
    """Read the text, train or load the tokenizers, and build the data set, or find them cached.

    Args:
        config: which text and tokenizers, and what to do with bad pairs.
        report: is told each step that may take long, as it begins, and how far it is.
        tokenizers: of source and target, whatever the options say; None goes by the options.

    Raises:
        CorpusError: the text cannot be used, or the cache cannot be written.
        TokenizerError: a tokenizer cannot be used or trained.
    """
    return _Preparation(config, report, tokenizers).run()
