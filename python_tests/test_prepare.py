"""The cache of tokenizers and token ids, and the command that fills it."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from transformer_ext import prepare
from transformer_ext.config import CorpusConfig, DataConfig, TrainConfig, to_commented_yaml
from transformer_ext.data import (
    CorpusError,
    TokenizerError,
    preparation,
    progress,
    read_pairs,
    shipped_corpus,
)
from transformer_ext.data.corpus import file_digest
from transformer_ext.data.preparation import cache_folder, default_vocab_size, prepare_data
from transformer_ext.data.workers import Workers
from transformer_ext.files import FileError


@pytest.fixture(scope="module")
def pairs() -> list[tuple[str, str]]:
    return list(read_pairs(shipped_corpus().dev))


def write_text(folder: Path, name: str, pairs: list[tuple[str, str]]) -> tuple[str, str]:
    paths = []
    for side, language in ((0, "en"), (1, "de")):
        path = folder / f"{name}.{language}"
        path.write_text("".join(pair[side] + "\n" for pair in pairs), encoding="utf-8")
        paths.append(str(path))
    return paths[0], paths[1]


@pytest.fixture
def own(tmp_path, pairs) -> DataConfig:
    """Options for a text of one's own without validation files."""
    src, tgt = write_text(tmp_path, "train", pairs)
    return DataConfig([src], [tgt], vocab_size=600, cache=str(tmp_path / "cache"))


def folders(config: DataConfig) -> list[str]:
    names = os.listdir(cache_folder(config))
    return sorted(name for name in names if not name.endswith(".lock") and name != "digests")


def test_own_text_without_validation_files(own, pairs) -> None:
    steps: list[str] = []
    data = prepare_data(own, steps.append)
    assert steps == [
        "reading train.en",
        "training the tokenizer (bpe, 600 pieces)",
        "turning the text into token ids",
    ]
    assert len(data.dev) == 15 and data.test == []
    assert data.dev_set is not None and len(data.dev_set) == 15
    assert len(data.train) + data.train.skipped.held_out == len(pairs)
    assert data.source_tokenizer is data.target_tokenizer
    text = "\n".join(data.messages)
    assert f"training text: {len(data.train):,} pairs of 1,500" in text
    assert "validation text: 15 pairs held out of the training text" in text
    assert "tokenizer: BPE, one for both languages, 600 pieces" in text
    held = {src for src, _ in data.dev}
    for index in range(len(data.train)):
        source, _ = data.train.example(index)
        assert data.source_tokenizer.decode(source) not in held
    assert [name.split("-")[0] for name in folders(own)] == ["dev", "pairs", "split", "tokenizer"]


def test_second_time_everything_is_found(own) -> None:
    first = prepare_data(own)
    before = {name: os.stat(cache_folder(own) / name).st_mtime_ns for name in folders(own)}
    steps: list[str] = []
    second = prepare_data(own, steps.append)
    assert steps == ["reading train.en"]
    assert second.messages == first.messages
    assert second.dev == first.dev
    after = {name: os.stat(cache_folder(own) / name).st_mtime_ns for name in folders(own)}
    assert before == after


def test_a_changed_text_is_read_again(own, pairs) -> None:
    first = prepare_data(own)
    path = Path(own.src_train[0])
    stat = path.stat()
    path.write_text(path.read_text(encoding="utf-8").replace("e", "o"), encoding="utf-8")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    second = prepare_data(own)
    assert first.train.folder != second.train.folder
    assert len(folders(own)) == 8


def test_lengths_do_not_need_new_ids(own) -> None:
    first = prepare_data(own)
    before = folders(own)
    own.max_length, own.max_length_ratio = 20, 1.5
    second = prepare_data(own)
    assert folders(own) == before
    assert second.train.source_lengths.max() <= 20 < first.train.source_lengths.max()
    assert "too long" in second.messages[0] and "too unequal in length" in second.messages[0]
    own.long_lines = "error"
    with pytest.raises(CorpusError, match="are longer than 20 tokens or too unequal in length"):
        prepare_data(own)


def test_validation_and_test_files(own, tmp_path, pairs) -> None:
    for name in ("dev", "test"):
        src, tgt = write_text(tmp_path, name, pairs[:7])
        setattr(own, f"src_{name}", [src])
        setattr(own, f"tgt_{name}", [tgt])
    data = prepare_data(own)
    assert len(data.train) == len(pairs)
    assert data.dev == data.test == pairs[:7]


def test_nothing_held_out(own, pairs) -> None:
    own.held_out = 0.0
    data = prepare_data(own)
    assert len(data.train) == len(pairs)
    assert data.dev == [] and data.dev_set is None
    assert "validation text: none" in data.messages


def test_two_vocabularies(own) -> None:
    own.joint_vocab = False
    own.tokenizer_type = "unigram"
    data = prepare_data(own)
    assert data.source_tokenizer.sha256 != data.target_tokenizer.sha256
    assert "tokenizer: unigram, one for each language, 600 pieces" in data.messages


def test_a_vocabulary_larger_than_the_text(own, pairs) -> None:
    write_text(Path(own.src_train[0]).parent, "train", pairs[:20])
    data = prepare_data(own)
    own.vocab_size = 9000
    data = prepare_data(own)
    assert data.source_tokenizer.vocab_size < 3000
    assert any("(the text has no 9,000 different ones)" in message for message in data.messages)


def test_tokenizers_brought_along(own, tmp_path) -> None:
    path = str(prepare_data(own).source_tokenizer.path)
    for changes in ({"tokenizer": path}, {"src_tokenizer": path, "tgt_tokenizer": path}):
        config = DataConfig(own.src_train, own.tgt_train, cache=str(tmp_path / "other"), **changes)
        data = prepare_data(config)
        assert str(data.source_tokenizer.path) == path
        assert data.source_tokenizer is data.target_tokenizer
        assert not any(name.startswith("tokenizer") for name in folders(config))
    with pytest.raises(TokenizerError, match="cannot be read"):
        prepare_data(DataConfig(own.src_train, own.tgt_train, cache=own.cache, tokenizer="none"))


def test_bad_lines_by_option(own) -> None:
    path = Path(own.tgt_train[0])
    lines = path.read_bytes().split(b"\n")
    lines[3], lines[5] = b"", b"\xff"
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(CorpusError, match=r"train\.de:4: empty line"):
        prepare_data(own)
    # A text that was refused leaves nothing behind.
    assert folders(own) == []
    own.bad_lines = "skip"
    data = prepare_data(own)
    assert "1 empty, 1 not UTF-8" in data.messages[0]
    assert len(data.train) + data.train.skipped.held_out == 1498


def test_cache_folder(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("TRANSFORMER_EXT_CACHE", raising=False)
    assert cache_folder(DataConfig()) == tmp_path / "xdg" / "transformer_ext"
    monkeypatch.setenv("TRANSFORMER_EXT_CACHE", str(tmp_path / "env"))
    assert cache_folder(DataConfig()) == tmp_path / "env"
    assert cache_folder(DataConfig(cache="~/x")) == Path.home() / "x"


def test_a_cache_that_cannot_be_written(own, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    own.cache = str(tmp_path / "file" / "cache")
    with pytest.raises(CorpusError, match="the cache cannot be written.*--cache"):
        prepare_data(own)


def test_what_a_killed_process_left_is_removed(own) -> None:
    prepare_data(own)
    name = next(name for name in folders(own) if name.startswith("pairs"))
    whole = cache_folder(own) / name
    os.rename(whole, whole.with_name(f"{name}.tmp-1-0"))
    prepare_data(own)
    assert folders(own).count(name) == 1
    assert not any(".tmp-" in name for name in folders(own))


def test_processes_that_prepare_the_same_text_at_the_same_time(own) -> None:
    program = (
        "import sys\n"
        "from transformer_ext.config import DataConfig\n"
        "from transformer_ext.data.preparation import prepare_data\n"
        "src, tgt, cache = sys.argv[1:]\n"
        "data = prepare_data(DataConfig([src], [tgt], vocab_size=600, cache=cache), print)\n"
        "print(data.train.folder, int(data.train.source_lengths.sum()))\n"
    )
    command = [sys.executable, "-c", program, own.src_train[0], own.tgt_train[0], str(own.cache)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len({output.splitlines()[-1] for output in outputs}) == 1
    # One of them did the work, the others waited.
    assert sum("training the tokenizer" in output for output in outputs) == 1
    assert len(folders(own)) == 4


# Processes, and what can go wrong


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_any_number_of_processes_writes_the_same_bytes(own, tmp_path, pairs) -> None:
    # Several chunks, so that each process has some.
    write_text(Path(own.src_train[0]).parent, "train", [pair for _ in range(12) for pair in pairs])
    own.bad_lines, lines = "skip", Path(own.tgt_train[0]).read_bytes().split(b"\n")
    lines[5000], lines[9000] = b"", b"\xff"
    Path(own.tgt_train[0]).write_bytes(b"\n".join(lines))
    found = []
    for count in (0, 1, 3):
        own.prepare_workers, own.cache = count, str(tmp_path / f"cache{count}")
        prepare_data(own)
        names = folders(own)
        found.append((names, [contents(cache_folder(own) / name) for name in names]))
    assert found[0] == found[1] == found[2]


def test_a_wrong_line_is_the_first_one_with_processes_too(own, pairs) -> None:
    write_text(Path(own.src_train[0]).parent, "train", [pair for _ in range(12) for pair in pairs])
    path, own.prepare_workers = Path(own.tgt_train[0]), 2
    whole = path.read_bytes().split(b"\n")
    lines = list(whole)
    for wrong in (17_000, 9000, 12_000):
        lines[wrong] = b"\xff"
    # Fewer lines are found while the line before is still looked at.
    path.write_bytes(b"\n".join(lines[:17_500]))
    with pytest.raises(CorpusError, match=r"train\.de:9001: not UTF-8"):
        prepare_data(own)
    path.write_bytes(b"\n".join(whole[:17_500]))
    with pytest.raises(CorpusError, match=r"train\.en has 18,000 lines and .* has 17,500"):
        prepare_data(own)
    assert folders(own) == []


def _sleepless(task: int) -> int:
    if task == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return task * 2


def test_a_killed_worker_is_one_clear_error() -> None:
    with Workers(_double, 2) as workers:
        assert list(workers.map(range(50))) == [2 * number for number in range(50)]
    with Workers(_sleepless, 2) as workers:
        results = workers.map(range(50))
        assert [next(results) for _ in range(3)] == [0, 2, 4]
        with pytest.raises(CorpusError, match="ended by signal 9; --prepare-workers"):
            list(results)


def _double(task: int) -> int:
    # What is printed does no harm.
    print("a word")
    return task * 2


_PREPARE = (sys.executable, "-m", "transformer_ext.prepare")


def arguments_of(config: DataConfig) -> list[str]:
    return [
        *("--src-train", *config.src_train, "--tgt-train", *config.tgt_train),
        *("--vocab-size", str(config.vocab_size), "--cache", str(config.cache)),
    ]


def children_of(process: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == process:
                found.append(int(entry.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_killed_at_any_moment_nothing_half_built_is_used(own, tmp_path, pairs) -> None:
    write_text(Path(own.src_train[0]).parent, "train", [pair for _ in range(8) for pair in pairs])
    arguments = [*arguments_of(own), "--prepare-workers", "2"]
    own.cache = str(tmp_path / "whole")
    expected = prepare_data(own)
    own.cache = arguments[-3]
    # Each time it is killed when another thing is under way, which the file system tells.
    killed = []
    for kind, file in (
        ("split", "split-*.tmp-*"),
        ("tokenizer", "tokenizer-*.tmp-*"),
        ("pairs", "pairs-*.tmp-*/source.ids"),
        ("dev", "dev-*.tmp-*"),
    ):
        process = subprocess.Popen([*_PREPARE, *arguments], stdout=subprocess.DEVNULL)
        workers: list[int] = []
        while process.poll() is None:
            workers = children_of(process.pid) or workers
            if any(cache_folder(own).glob(file)):
                process.kill()
                killed.append(kind)
        process.wait()
        deadline = time.monotonic() + 20
        while any(Path(f"/proc/{worker}").exists() for worker in workers):
            assert time.monotonic() < deadline, "a worker outlived its parent"
            time.sleep(0.01)
    # The last one may be over before it is seen.
    assert len(killed) >= 3
    data = prepare_data(own)
    data.train.verify()
    assert contents(data.train.folder) == contents(expected.train.folder)
    assert not any(".tmp-" in name for name in folders(own))


def test_a_full_disk_is_one_clear_error(own, pairs) -> None:
    resource = pytest.importorskip("resource")
    write_text(Path(own.src_train[0]).parent, "train", [pair for _ in range(8) for pair in pairs])
    # A limit to the size of files: what a disk gives that is full.
    own.vocab_size = 380
    for limit, left in ((1000, []), (150_000, []), (1_000_000, ["split", "tokenizer"])):
        done = subprocess.run(
            [*_PREPARE, *arguments_of(own), "--prepare-workers", "0"],
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),  # noqa: B023
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert line == (
            f"error: {own.cache}: the cache cannot be written: File too large; choose another "
            "folder with --cache or $TRANSFORMER_EXT_CACHE"
        )
        assert [name.split("-")[0] for name in folders(own)] == left


def test_a_folder_without_permission_is_one_clear_error(pairs) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        src, tgt = write_text(folder, "train", pairs[:300])
        own = DataConfig([src], [tgt], vocab_size=400, cache=str(folder / "cache"))
        prepare_data(own)
        other = DataConfig([src], [tgt], vocab_size=401, cache=own.cache)
        cache, root = cache_folder(own), os.geteuid() == 0
        for mode, config in ((0o555, other), (0o000, own)):
            cache.chmod(mode)
            try:
                # To root everything is permitted.
                if root:
                    os.seteuid(65534)
                with pytest.raises(CorpusError) as caught:
                    prepare_data(config)
            finally:
                if root:
                    os.seteuid(0)
                cache.chmod(0o755)
            assert str(caught.value) == (
                f"{own.cache}: the cache cannot be written: Permission denied; choose another "
                "folder with --cache or $TRANSFORMER_EXT_CACHE"
            )


def test_a_damaged_split_is_named(own) -> None:
    prepare_data(own)
    (folder,) = Path(own.cache).glob("split-*[0-9a-f]/")
    path = folder / "split.json"
    path.write_text(path.read_text().replace('"threshold": ', '"threshold": 1'))
    with pytest.raises(CorpusError, match=r"split\.json: was altered after it was written; remove"):
        prepare_data(own)


def test_errors_of_what_is_built_are_not_those_of_the_cache(tmp_path) -> None:
    def fails(error: Exception) -> None:
        def build(folder: Path) -> None:
            raise error

        preparation.cached(tmp_path / "cache", "thing", {}, build)

    for error in (FileError("a model is broken"), OSError(2, "No such file", "/elsewhere/x")):
        with pytest.raises(type(error)) as caught:
            fails(error)
        assert caught.value is error
    for error in (OSError(28, "No space"), OSError(13, "No", str(tmp_path / "cache/x.tmp-1/y"))):
        with pytest.raises(CorpusError, match=f"the cache cannot be written: {error.strerror}"):
            fails(error)
    assert folders(DataConfig(cache=str(tmp_path / "cache"))) == []


def test_of_two_equal_ones_the_first_is_used(tmp_path) -> None:
    def build(folder: Path) -> None:
        first = folder.with_name(folder.name.split(".")[0])
        first.mkdir()
        (first / "first").touch()

    path = preparation.cached(tmp_path, "thing", {}, build)
    assert os.listdir(path) == ["first"]


def test_a_text_without_a_usable_pair_is_named(own) -> None:
    own.bad_lines, own.held_out = "skip", 0.0
    for path in (*own.src_train, *own.tgt_train):
        Path(path).write_text("\n\n")
    with pytest.raises(
        CorpusError, match=r"train\.en, .*train\.de: the training text has no usable"
    ):
        prepare_data(own)


def test_a_text_that_changes_while_it_is_read(own, monkeypatch) -> None:
    read = preparation.read_chunks

    def changing(*arguments):
        yield from read(*arguments)
        with open(own.src_train[0], "a") as file:
            file.write("one more\n")

    monkeypatch.setattr(preparation, "read_chunks", changing)
    with pytest.raises(CorpusError, match=r"train\.en: was changed while it was read"):
        prepare_data(own)
    assert folders(own) == []


def test_digests_of_large_files_are_remembered(own, monkeypatch) -> None:
    monkeypatch.setattr(preparation, "_SMALL_FILE", 1000)
    monkeypatch.setattr(preparation, "_SETTLED_SECONDS", -1)
    path, cache = own.src_train[0], Path(own.cache)
    digest = preparation.cached_digest(path, cache)
    assert digest == file_digest(path)
    monkeypatch.setattr(preparation, "file_digest", lambda path: "read again")
    assert preparation.cached_digest(path, cache) == digest
    # Neither size nor time of modification tell of this change.
    status = os.stat(path)
    with open(path, "r+b") as file:
        file.write(b"x")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert preparation.cached_digest(path, cache) == "read again"
    (note,) = (cache / "digests").iterdir()
    note.write_text("{")
    assert preparation.cached_digest(path, cache) == "read again"
    # A file that has just been written may change again within the same time stamp.
    monkeypatch.setattr(preparation, "_SETTLED_SECONDS", 1000)
    note.unlink()
    preparation.cached_digest(path, cache)
    assert not note.exists()


def test_altered_token_ids_are_found(own, capsys) -> None:
    data = prepare_data(own)
    path = data.train.folder / "target.ids"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    for options in ([], ["--verify"]):
        assert prepare.main([*arguments_of(own), *options]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "target.ids: was altered after it was written" in line


def test_large_data_sets_are_verified_when_asked(own, capsys, monkeypatch) -> None:
    monkeypatch.setattr(preparation, "_CHEAP_CHECK", 0)
    data = prepare_data(own)
    assert prepare.main([*arguments_of(own), "--verify"]) == 0
    assert "bytes, as their checksums say)" in capsys.readouterr().out
    path = data.train.folder / "source.ids"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    assert prepare.main(arguments_of(own)) == 0
    assert prepare.main([*arguments_of(own), "--verify"]) == 2
    assert "source.ids: was altered" in capsys.readouterr().err


def test_progress_in_a_file(monkeypatch) -> None:
    monkeypatch.setattr(progress, "_FIRST_LINE_SECONDS", 0.0)
    monkeypatch.setattr(progress, "_LINE_SECONDS", 1e9)
    lines: list[str] = []
    with progress.Progress("token ids", 200, lines.append) as shown:
        shown.read(50)
        shown.done(1000)
        shown.read(150)
        shown.done(1000)
    (line,) = lines
    assert re.fullmatch(r"token ids: 25 %, 1,000 pairs, [\d,]+ a second", line)


def test_progress_on_a_terminal(monkeypatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    lines: list[str] = []
    with progress.Progress("token ids", 2000, lines.append) as shown:
        for _ in range(20):
            shown.done(1000)
            shown.read(100)
    assert lines == []
    assert "token ids:" in terminal.getvalue() and "/2.00k" in terminal.getvalue()


# Several corpora


def write_pairs(folder: Path, name: str, pairs: list[tuple[str, str]]) -> str:
    path = folder / name
    with open(path, "w", encoding="utf-8") as file:
        for src, tgt in pairs:
            if name.endswith(".tsv"):
                file.write(f"{src}\t{tgt}\n")
            else:
                file.write(json.dumps({"translation": {"en": src, "de": tgt}}) + "\n")
    return str(path)


@pytest.fixture
def several(tmp_path, pairs) -> DataConfig:
    """Three corpora in three formats, two with tags."""
    src, tgt = write_text(tmp_path, "a", pairs[:800])
    tsv = write_pairs(tmp_path, "b.tsv", [(tgt, src) for src, tgt in pairs[800:1000]])
    jsonl = write_pairs(tmp_path, "c.jsonl", pairs[1000:])
    return DataConfig(
        corpora=[
            CorpusConfig("a", [src], [tgt], source_tag="<2de>", target_prefix="[de]"),
            CorpusConfig("b", pairs=[tsv], source_tag="<2en>", weight=2.5),
            CorpusConfig("c", pairs=[jsonl]),
        ],
        pair_keys=("translation.en", "translation.de"),
        vocab_size=700,
        cache=str(tmp_path / "cache"),
    )


def test_several_corpora(several, pairs) -> None:
    data = prepare_data(several)
    rows = data.train.corpora
    assert [entry.name for entry in rows] == ["a", "b", "c"]
    assert [entry.begin for entry in rows[1:]] == [entry.end for entry in rows[:-1]]
    assert rows[2].end == len(data.train) == 1485
    assert data.corpus_weights == [1.0, 2.5, 1.0]
    assert data.source_tokenizer.source_tags == ("<2de>", "<2en>")
    assert data.target_tokenizer.target_prefixes == ("[de]",)
    for entry, source_tag, target_prefix in zip(
        rows, ("<2de>", "<2en>", None), ("[de]", None, None), strict=True
    ):
        for index in (entry.begin, entry.end - 1):
            source, target = data.train.example(index)
            for ids, tag in ((source, source_tag), (target, target_prefix)):
                assert not data.source_tokenizer.tag_ids & set(ids[1:].tolist())
                found = data.source_tokenizer.piece(int(ids[0]))
                assert found == tag if tag else int(ids[0]) not in data.source_tokenizer.tag_ids
    # Held-out pairs have their tags, but the reference of BLEU has not.
    assert data.dev_set is not None and len(data.dev) == len(data.dev_set) == 15
    texts = set(pairs) | {(tgt, src) for src, tgt in pairs}
    tagged = 0
    for index, (src, tgt) in enumerate(data.dev):
        ids, plain = data.source_tokenizer.split_tag(src)
        assert (plain, tgt) in texts
        source, target = data.dev_set.example(index)
        assert source.tolist() == [*data.source_tokenizer.encode(src), data.source_tokenizer.eos_id]
        prefix = data.target_tokenizer.encode("[de]") if src.startswith("<2de>") else []
        assert target.tolist() == prefix + data.target_tokenizer.encode(tgt)
        tagged += bool(ids)
    assert 5 <= tagged < 15
    text = "\n".join(data.messages)
    assert "corpus b: " in text and "; each 2.5 times an epoch; tag <2en>" in text


def test_pairs_with_a_source_that_is_held_out_are_counted(tmp_path, pairs) -> None:
    files = [write_pairs(tmp_path, name, pairs[:100]) for name in ("a.tsv", "b.tsv")]
    data = prepare_data(
        DataConfig(
            corpora=[
                CorpusConfig(name, pairs=[file]) for name, file in zip("ab", files, strict=True)
            ],
            vocab_size=400,
            cache=str(tmp_path / "cache"),
        )
    )
    assert len(data.dev) == 2 and data.train.skipped.held_out == 4
    text = "\n".join(data.messages)
    assert "(4 held out for validation)" in text
    assert "text: 2 pairs held out of the training text, the same ones for every run" in text
    assert "every run on it; 2 pairs more with the same source left out" in text


def test_validation_text_without_tags_is_told(several, tmp_path, pairs) -> None:
    several.corpora[2].source_tag = "<2x>"
    lines = [("<2de> " + pairs[0][0], pairs[0][1]), ("<2de> " + pairs[1][0], "[de] a"), pairs[2]]
    several.pairs_dev = [write_pairs(tmp_path, "dev.tsv", lines)]
    data = prepare_data(several)
    assert "warning: 1 sources of the validation text begin with no tag" in "\n".join(data.messages)
    assert data.dev[1] == ("<2de> " + pairs[1][0], "a")
    assert data.dev_set is not None
    assert data.dev_set.example(1)[1].tolist() == data.target_tokenizer.encode("[de] a")


def test_weights_need_no_new_ids(several) -> None:
    first = prepare_data(several)
    before = folders(several)
    several.corpora[1].weight = None
    several.temperature = 5.0
    second = prepare_data(several)
    assert folders(several) == before
    sizes = [len(rows) for rows in second.train.corpora]
    counts = [weight * size for weight, size in zip(second.corpus_weights, sizes, strict=True)]
    assert sum(counts) == pytest.approx(sum(sizes))
    for count, size in zip(counts, sizes, strict=True):
        assert count / counts[0] == pytest.approx((size / sizes[0]) ** 0.2)
    assert first.train.folder == second.train.folder
    several.temperature = 1.0
    assert prepare_data(several).corpus_weights == pytest.approx([1.0, 1.0, 1.0])


def test_corpora_without_a_usable_pair(several, tmp_path) -> None:
    several.corpora[2].pairs = [write_pairs(tmp_path, "empty.tsv", [])]
    with pytest.raises(CorpusError, match="corpus 'c' has no usable sentence pair"):
        prepare_data(several)
    several.corpora[2].pairs = ["nowhere.tsv"]
    with pytest.raises(CorpusError, match=r"nowhere\.tsv: no such file"):
        prepare_data(several)


def test_a_tokenizer_of_ones_own_must_know_the_tags(several) -> None:
    plain = prepare_data(DataConfig(vocab_size=400, cache=several.cache, **{
        "pairs_train": several.corpora[1].pairs}))  # fmt: skip
    several.tokenizer = str(plain.source_tokenizer.path)
    with pytest.raises(TokenizerError, match=r"the tag '<2de>' is not a piece of this tokenizer"):
        prepare_data(several)
    several.tokenizer = None
    several.tokenizer = str(prepare_data(several).source_tokenizer.path)
    data = prepare_data(several)
    assert data.source_tokenizer.piece(int(data.train.example(0)[0][0])) == "<2de>"


def test_duplicates_and_identical_pairs_are_left_out_by_option(own, pairs) -> None:
    write_text(Path(own.src_train[0]).parent, "train", [*pairs, *pairs[:9], ("Esc", "Esc")])
    first = prepare_data(own)
    assert "9 of them are duplicates; 1 of them are the same on both sides" in first.messages[0]
    before = folders(own)
    own.duplicates = own.identical = "drop"
    second = prepare_data(own)
    assert folders(own) == before
    assert "9 duplicates, 1 the same on both sides" in second.messages[0]
    assert len(second.train) == len(first.train) - 10


def test_default_vocabulary_grows_with_the_text() -> None:
    assert default_vocab_size(36_673) == 8_000
    sizes = [default_vocab_size(10**power) for power in range(8)]
    assert sizes == sorted(sizes)


def test_command(own, tmp_path, capsys) -> None:
    path = tmp_path / "train.yaml"
    path.write_text(to_commented_yaml(TrainConfig(data=own, model={"d_model": 64})))
    assert prepare.main(["--config", str(path), "--max-length", "100"]) == 0
    output = capsys.readouterr().out
    # The command's cache is the one that training finds.
    data = prepare_data(own)
    assert f"token ids: {data.train.folder} (" in output
    assert f"tokenizer: {data.source_tokenizer.path}" in output


def test_command_with_wrong_text(own, capsys) -> None:
    arguments = ["--src-train", "nowhere", "--tgt-train", own.tgt_train[0]]
    assert prepare.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err == "error: nowhere: no such file\n"
    with pytest.raises(SystemExit):
        prepare.main(["--d-model", "3"])
