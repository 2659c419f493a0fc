"""Corpus, tokenizer, memory-mapped data set, batches."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from transformer_ext.data import (
    BatchSampler,
    CorpusError,
    ParallelDataset,
    ParallelText,
    SentencePieceTokenizer,
    SkippedPairs,
    Tokenizer,
    TokenizerError,
    build_dataset,
    collate,
    read_pairs,
    shipped_corpus,
    train_tokenizer,
)
from transformer_ext.data.batches import random_order
from transformer_ext.data.corpus import HeldOut, open_text, read_chunks
from transformer_ext.data.dataset import DatasetWriter, IdEncoder, _repeated, encode_pairs


@pytest.fixture(scope="module")
def pairs() -> list[tuple[str, str]]:
    """Real sentences: the shipped validation text."""
    return list(read_pairs(shipped_corpus().dev))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, pairs) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    data, size = train_tokenizer((text for pair in pairs for text in pair), vocab_size=1000)
    path.write_bytes(data)
    assert size == 1000
    return SentencePieceTokenizer(path)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, pairs, tokenizer) -> ParallelDataset:
    folder = tmp_path_factory.mktemp("dataset")
    build_dataset(folder, pairs, tokenizer, tokenizer)
    return ParallelDataset(folder)


def text_files(folder: Path, src: bytes | str, tgt: bytes | str) -> ParallelText:
    for name, content in (("src", src), ("tgt", tgt)):
        data = content.encode() if isinstance(content, str) else content
        (folder / name).write_bytes(data)
    return ParallelText((str(folder / "src"),), (str(folder / "tgt"),))


# Corpus


def test_shipped_corpus_is_whole_and_licensed() -> None:
    corpus = shipped_corpus()
    sizes = {}
    for name in ("train", "dev", "test"):
        counts = SkippedPairs()
        assert sum(1 for _ in read_pairs(getattr(corpus, name), "error", counts)) == counts.used
        assert counts.read == counts.used
        sizes[name] = counts.used
    assert sizes == {"train": 36_673, "dev": 1_500, "test": 1_500}
    folder = Path(corpus.train.src[0]).parent
    assert "Oracle and/or its affiliates" in (folder / "NOTICE").read_text(encoding="utf-8")
    assert "Mozilla Public License Version 2.0" in (folder / "LICENSE").read_text(encoding="utf-8")


def test_test_sentences_are_not_in_the_training_text() -> None:
    corpus = shipped_corpus()
    train = list(read_pairs(corpus.train))
    for side in (0, 1):
        seen = {pair[side] for pair in train}
        assert not any(pair[side] in seen for pair in read_pairs(corpus.test))


@pytest.mark.parametrize("compress", [lambda data: data, gzip.compress, lzma.compress])
def test_plain_gzip_and_xz_whatever_the_name(tmp_path, compress) -> None:
    text = text_files(tmp_path, compress(b"a\nb\n"), compress("ä\nö\n".encode()))
    assert list(read_pairs(text)) == [("a", "ä"), ("b", "ö")]


def test_several_files_are_read_one_after_the_other(tmp_path) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    first = text_files(tmp_path / "1", "a\n", "b\n")
    second = text_files(tmp_path / "2", "c", "d")
    text = ParallelText(first.src + second.src, first.tgt + second.tgt)
    assert list(read_pairs(text)) == [("a", "b"), ("c", "d")]


def test_only_line_feeds_end_lines(tmp_path) -> None:
    odd = "one\u2028two\u0085three\x0bfour\x0cfive\x1csix\rseven"
    text = text_files(tmp_path, f"\ufeff{odd}\r\nb\r\n", "ä\nö")
    assert list(read_pairs(text)) == [(odd, "ä"), ("b", "ö")]


def test_a_byte_order_mark_inside_the_text_stays(tmp_path) -> None:
    text = text_files(tmp_path, "a\n\ufeffb\n", "ä\nö\n")
    assert list(read_pairs(text))[1][0] == "\ufeffb"


def test_unequal_line_counts(tmp_path) -> None:
    for src, tgt, message in (
        ("a\nb\nc\n", "x\n", r"src has 3 lines and .*tgt has 1"),
        ("a\n", "x\ny\nz", r"tgt has 3 lines and .*src has 1"),
        ("", "x\n", r"tgt has 1 line and .*src has 0"),
        ("a\n", "", r"src has 1 line and .*tgt has 0"),
    ):
        text = text_files(tmp_path, src, tgt)
        for bad_lines in ("error", "skip"):
            with pytest.raises(CorpusError, match=message):
                list(read_pairs(text, bad_lines))


def test_empty_lines(tmp_path) -> None:
    text = text_files(tmp_path, "a\n\nc\nd\n", "x\ny\n \t\u00a0\nz\n")
    with pytest.raises(CorpusError, match=r"src:2: empty line; --bad-lines skip"):
        list(read_pairs(text))
    counts = SkippedPairs()
    assert list(read_pairs(text, "skip", counts)) == [("a", "x"), ("d", "z")]
    assert (counts.read, counts.used, counts.empty) == (4, 2, 2)
    assert counts.describe() == "2 pairs of 4 (2 empty)"


def test_undecodable_bytes(tmp_path) -> None:
    text = text_files(tmp_path, b"a\nb\n", b"x\ny \xff\xfe\n")
    with pytest.raises(CorpusError, match=r"tgt:2: not UTF-8: byte 0xff at byte 3 of the line"):
        list(read_pairs(text))
    counts = SkippedPairs()
    assert list(read_pairs(text, "skip", counts)) == [("a", "x")]
    assert counts.undecodable == 1


def test_utf16_is_named(tmp_path) -> None:
    text = text_files(tmp_path, "a\n".encode("utf-16"), "b\n")
    with pytest.raises(CorpusError, match="is UTF-16, expected UTF-8"):
        list(read_pairs(text, "skip"))


@pytest.mark.parametrize("damage", ["cut off", "changed"])
@pytest.mark.parametrize("compress", [gzip.compress, lzma.compress])
def test_broken_compression(tmp_path, compress, damage) -> None:
    data = compress("".join(f"sentence {i}\n" for i in range(5000)).encode())
    middle = len(data) // 2
    end = b"" if damage == "cut off" else b"\xff" * 64 + data[middle + 64 :]
    text = text_files(tmp_path, data[:middle] + end, "b\n" * 5000)
    with pytest.raises(CorpusError, match="src: its compressed data are broken"):
        list(read_pairs(text))


# Pairs in one file


def pairs_file(folder: Path, name: str, content: str | bytes) -> ParallelText:
    data = content.encode() if isinstance(content, str) else content
    (folder / name).write_bytes(data)
    return ParallelText(pairs=(str(folder / name),))


@pytest.mark.parametrize(
    ("name", "pack"),
    [("a.tsv", bytes), ("a.TSV.gz", gzip.compress), ("a.b.tsv.xz", lzma.compress)],
)
def test_tsv(tmp_path, name, pack) -> None:
    text = pairs_file(tmp_path, name, pack("\ufeffa\tä\r\nb c\td\u2028e\n".encode()))
    assert list(read_pairs(text)) == [("a", "ä"), ("b c", "d\u2028e")]


@pytest.mark.parametrize(
    ("name", "pack"),
    [("a.jsonl", bytes), ("a.json", bytes), ("a.jsonl.gz", gzip.compress)],
)
def test_json_lines(tmp_path, name, pack) -> None:
    content = '{"src": "a\\nb", "tgt": "\\u00e4", "id": 3}\n{"tgt": "d", "src": "c"}'
    text = pairs_file(tmp_path, name, pack(content.encode()))
    assert list(read_pairs(text)) == [("a b", "ä"), ("c", "d")]


def test_json_keys(tmp_path) -> None:
    content = '{"translation": {"en": "a", "de": "b"}, "x.y": "c"}\n'
    text = pairs_file(tmp_path, "a.jsonl", content)
    for keys, expected in (
        (("translation.en", "translation.de"), ("a", "b")),
        # A name with a dot of its own comes before what the dot would say.
        (("x.y", "translation.de"), ("c", "b")),
    ):
        assert list(read_pairs(ParallelText(pairs=text.pairs, keys=keys))) == [expected]


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("a.tsv", b"x", "got 1 columns, expected two, source and target"),
        ("a.tsv", b"", "got an empty line, expected two"),
        ("a.tsv", b"x\ty\tz", "got 3 columns, expected two"),
        ("a.tsv", b"x\t ", "empty target"),
        ("a.tsv", b"\ty", "empty source"),
        ("a.tsv", b"x\t\xffy", "not UTF-8: byte 0xff at byte 3 of the line"),
        ("a.jsonl", b"x", "not a JSON object: Expecting value"),
        ("a.jsonl", b"", "got an empty line, expected a JSON object"),
        ("a.jsonl", b"[1]", "got list, expected an object with the key 'src'"),
        ("a.jsonl", b'{"src": "x", "target": "y"}', "'tgt' is not there, only 'src', 'target'"),
        ("a.jsonl", b'{"src": "x", "tgt": 3}', "tgt: got int, expected a text"),
        ("a.jsonl", b'{"src": "x", "tgt": "\\ud800"}', "tgt: has half a character"),
        ("a.jsonl", b'{"src": "x", "tgt": ""}', "empty target"),
    ],
)
def test_wrong_lines_in_files_of_pairs(tmp_path, name, line, message) -> None:
    good = {"a.tsv": b"a\tb", "a.jsonl": b'{"src": "a", "tgt": "b"}'}[name]
    text = pairs_file(tmp_path, name, good + b"\n" + line + b"\n" + good + b"\n")
    with pytest.raises(CorpusError) as caught:
        list(read_pairs(text))
    assert f"{name}:2: " in str(caught.value) and message in str(caught.value)
    assert "--bad-lines skip" in str(caught.value)
    counts = SkippedPairs()
    assert list(read_pairs(text, "skip", counts)) == [("a", "b"), ("a", "b")]
    assert (counts.read, counts.used) == (3, 2)
    assert counts.empty + counts.undecodable + counts.malformed == 1


def test_json_that_is_not_one_object_a_line_is_told(tmp_path) -> None:
    pairs = [{"src": "a", "tgt": "b"}] * 2
    for content, message in (
        (json.dumps(pairs), "one array of all"),
        (json.dumps(pairs, indent=1), "one array of all"),
        ("\n\n " + json.dumps(pairs), "one array of all"),
        ("[]", "one array of all"),
        (json.dumps(["a", "b"]), "one array of texts"),
        (json.dumps(pairs[0], indent=1), "objects over several lines"),
    ):
        with pytest.raises(CorpusError, match=f"this looks like {message}") as caught:
            list(read_pairs(pairs_file(tmp_path, "a.json", content)))
        assert "--bad-lines" not in str(caught.value)
    # An array a line is no such file.
    rows = pairs_file(tmp_path, "rows.json", '["a", "b"]\n["c", "d"]\n')
    with pytest.raises(CorpusError, match=r"rows\.json:1: got list"):
        list(read_pairs(rows))


def test_the_first_wrong_line_is_the_one_that_is_named(tmp_path) -> None:
    for name, content in (
        ("a.tsv", b"a\tb\n\tb\nx\n\xff\ty\n"),
        ("b.tsv", b"a\tb\nx\n\tb\n\xff\ty\n"),
        ("c.tsv", b"a\tb\n\xff\ty\nx\n\tb\n"),
    ):
        with pytest.raises(CorpusError, match=f"{name}:2: "):
            list(read_pairs(pairs_file(tmp_path, name, content)))


def test_names_that_tell_no_format(tmp_path) -> None:
    for name in ("pairs.txt", "tsv", "pairs.tsv.zip"):
        with pytest.raises(
            CorpusError, match=r"expected a name that ends in \.tsv, \.jsonl, \.json"
        ):
            list(read_pairs(pairs_file(tmp_path, name, "a\tb\n")))


def test_the_same_text_in_both_columns(tmp_path) -> None:
    with pytest.raises(CorpusError, match="source and target are the same text"):
        list(read_pairs(pairs_file(tmp_path, "a.tsv", "a\ta\nb\tb\n")))


def test_pipes_are_refused(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe.tsv")
    with pytest.raises(CorpusError, match="is a pipe or a device, expected a text file"):
        list(read_pairs(ParallelText(pairs=(str(tmp_path / "pipe.tsv"),))))


def test_long_texts_are_read_in_chunks_that_fit_together(tmp_path) -> None:
    # Lines of very unequal length, so that blocks of the two files end in different places.
    src = [f"{i} " + "x" * (i % 7) for i in range(30_000)]
    tgt = [f"{i} " + "long " * (i % 50) for i in range(30_000)]
    text = text_files(tmp_path, "\n".join(src), "\n".join(tgt) + "\n")
    chunks = list(read_chunks(text))
    assert len(chunks) > 5
    assert [chunk.first for chunk in chunks[1:]] == [
        chunk.first + chunk.size for chunk in chunks[:-1]
    ]
    assert list(read_pairs(text)) == list(zip(src, tgt, strict=True))


def test_missing_and_same_files(tmp_path) -> None:
    text = text_files(tmp_path, "a\n", "b\n")
    with pytest.raises(CorpusError, match="nowhere: no such file"):
        list(read_pairs(ParallelText(text.src, (str(tmp_path / "nowhere"),))))
    with pytest.raises(CorpusError, match="is a folder"):
        list(read_pairs(ParallelText(text.src, (str(tmp_path),))))
    with pytest.raises(CorpusError, match="is given as source and as target"):
        list(read_pairs(ParallelText(text.src, text.src)))
    with pytest.raises(CorpusError, match="1 source files and 0 target files"):
        list(read_pairs(ParallelText(text.src, ())))
    with pytest.raises(CorpusError, match="cannot be read: No such file"):
        open_text(str(tmp_path / "nowhere"))


def test_the_same_text_on_both_sides(tmp_path) -> None:
    text = text_files(tmp_path, "a\nb\n", "a\nb\n")
    with pytest.raises(CorpusError, match="hold the same text"):
        list(read_pairs(text))
    counts = SkippedPairs()
    text = text_files(tmp_path, "a\nb\n", "a\nc\n")
    assert len(list(read_pairs(text, "error", counts))) == 2
    assert counts.describe() == "2 pairs; 1 of them are the same on both sides"


def test_held_out_pairs(pairs) -> None:
    chosen = HeldOut.choose(pairs, 0.01)
    assert len(chosen.pairs) == 15
    assert set(chosen.pairs) <= set(pairs)
    rest = [pair for pair in pairs if pair[0] not in chosen]
    assert not {src for src, _ in rest} & {src for src, _ in chosen.pairs}
    assert all(src in chosen for src, _ in chosen.pairs)
    # Neither order nor repetition of the text changes the choice.
    again = HeldOut.choose(pairs[::-1], 0.01)
    assert set(again.pairs) == set(chosen.pairs)
    doubled = HeldOut.choose(pairs + pairs, 0.005)
    assert {src for src, _ in doubled.pairs} == {src for src, _ in chosen.pairs}
    assert set(HeldOut.choose(pairs, 0.01, seed=1).pairs) != set(chosen.pairs)


def test_held_out_limits(pairs) -> None:
    assert len(HeldOut.choose(pairs, 0.5, limit=20).pairs) == 20
    assert len(HeldOut.choose(pairs[:3], 0.01).pairs) == 1
    nothing = HeldOut.choose(pairs, 0.0)
    assert nothing.pairs == [] and pairs[0][0] not in nothing
    with pytest.raises(CorpusError, match="too few to hold some out"):
        HeldOut.choose(pairs[:1] * 5, 0.01)


# Tokenizer


def test_tokenizer_special_ids(tokenizer) -> None:
    found = (tokenizer.pad_id, tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id)
    assert found == (0, 1, 2, 3)
    assert tokenizer.vocab_size == 1000
    assert tokenizer.pieces([0, 2, 3]) == ["<pad>", "<s>", "</s>"]
    with pytest.raises(IndexError, match="expected 0 to 999, got 1000"):
        tokenizer.piece(1000)


def test_tokenizer_round_trip_of_real_text(tokenizer, pairs) -> None:
    texts = [text for pair in pairs for text in pair]
    batch = tokenizer.encode_batch(texts)
    assert batch[7] == tokenizer.encode(texts[7])
    assert [tokenizer.decode(ids) for ids in batch] == [" ".join(text.split(" ")) for text in texts]


@pytest.mark.parametrize("text", ["日本語 🙂 ﬁ … ½ \u2028 x", "<s> </s> <pad> <unk>", "", "\x00a"])
def test_tokenizer_falls_back_to_bytes(tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.unk_id not in ids
    assert not {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id} & set(ids)
    assert tokenizer.decode(ids) == text


def test_decoding_gives_one_line(tokenizer) -> None:
    ids = tokenizer.encode("a") + tokenizer.encode("\r\n") + tokenizer.encode("b")
    assert "\n" not in tokenizer.decode(ids) and "\r" not in tokenizer.decode(ids)
    text = tokenizer.decode([2, *np.array(tokenizer.encode("a b")), 3, 0])
    assert text == "a b"


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_tokenizer_training_is_deterministic(pairs, kind) -> None:
    texts = [src for src, _ in pairs[:300]]
    first, _ = train_tokenizer(texts, vocab_size=500, kind=kind)
    second, _ = train_tokenizer(iter(texts), vocab_size=500, kind=kind)
    assert first == second


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_vocabulary_larger_than_the_text_is_lowered(kind) -> None:
    data, size = train_tokenizer(["a small text", "ein kleiner Text"], vocab_size=8000, kind=kind)
    assert 264 < size < 400


def test_vocabulary_smaller_than_the_characters(pairs) -> None:
    with pytest.raises(TokenizerError, match=r"vocab_size: got 270, expected at least \d+"):
        train_tokenizer((src for src, _ in pairs), vocab_size=270)


def test_wrong_tokenizer_files(tmp_path) -> None:
    with pytest.raises(TokenizerError, match="cannot be read: No such file"):
        SentencePieceTokenizer(tmp_path / "none.model")
    for content in (b"", b"text\n"):
        (tmp_path / "x.model").write_bytes(content)
        with pytest.raises(TokenizerError, match="not a SentencePiece model"):
            SentencePieceTokenizer(tmp_path / "x.model")


def test_tokenizer_can_be_sent_to_a_process(tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("a cell") == tokenizer.encode("a cell")
    assert copy.sha256 == tokenizer.sha256


def test_a_model_without_special_pieces_gets_ids_for_them(tmp_path, pairs) -> None:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(src for src, _ in pairs),
        model_prefix=str(tmp_path / "own"),
        vocab_size=200,
        hard_vocab_limit=False,
        unk_id=0,
        bos_id=-1,
        eos_id=1,
        pad_id=-1,
        minloglevel=2,
    )
    own = SentencePieceTokenizer(tmp_path / "own.model")
    assert (own.unk_id, own.eos_id) == (0, 1)
    assert {own.pad_id, own.bos_id} == {own.vocab_size - 2, own.vocab_size - 1}
    ids = own.encode("the cell")
    assert own.decode([own.bos_id, *ids, own.eos_id, own.pad_id]) == "the cell"
    assert own.pieces([own.pad_id, own.bos_id, own.eos_id]) == ["<pad>", "<s>", "</s>"]


# Tags


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def tagged(request, tmp_path_factory, pairs) -> Tokenizer:
    path = tmp_path_factory.mktemp("tagged") / "tokenizer.model"
    tags = ["<2de>", "<2de>>", ">>fr<<", "[x]"]
    data, _ = train_tokenizer(
        (src for src, _ in pairs), vocab_size=700, kind=request.param, tags=tags
    )
    path.write_bytes(data)
    return SentencePieceTokenizer(path, None, tags[:3], ["[x]"])


def test_a_tag_at_the_beginning_is_one_token(tagged) -> None:
    plain = tagged.encode("the cell <2de>")
    for tag in ("<2de>", "<2de>>", ">>fr<<", "[x]"):
        for text in (f"{tag} the cell <2de>", f"{tag}the cell <2de>"):
            ids = tagged.encode(text)
            assert tagged.piece(ids[0]) == tag
            assert ids[1:] == plain
            assert tagged.encode_batch([text, "the cell <2de>"]) == [ids, plain]
            # It is not shown.
            assert tagged.decode(ids) == "the cell <2de>"
            assert tagged.decode([tagged.bos_id, *ids, tagged.eos_id]) == "the cell <2de>"
    # Within a text a tag is text.
    assert not tagged.tag_ids & set(plain)
    assert tagged.encode("<2de>") == [next(i for i in tagged.tag_ids if tagged.piece(i) == "<2de>")]
    assert tagged.source_tags == ("<2de>", "<2de>>", ">>fr<<")
    assert tagged.target_prefixes == ("[x]",)
    copy = pickle.loads(pickle.dumps(tagged))
    assert copy.encode("[x] a") == tagged.encode("[x] a")


def test_tags_must_be_pieces(tokenizer) -> None:
    for tag in ("<2de>", "<unk>", "</s>"):
        with pytest.raises(
            TokenizerError, match=f"the tag '{tag}' is not a piece of this tokenizer"
        ):
            SentencePieceTokenizer(tokenizer.path, None, [tag])


# Data set


_ODD_TEXTS = [
    " a  b ", "", " ", "a\u2581b c", "\u2581", "a\tb", "\u3000a \u3000 b", "x" * 60 + " y", "a " * 40,
    "日本語 テキスト", "e\u0301 é", "\u00a0a b", "🙂🙂 🙂", "\x00 \x01a", "<2de> a <2de>", "<s> </s>",
]  # fmt: skip


def test_words_are_remembered_without_a_difference(tokenizer, pairs) -> None:
    # Real text and odd text, also with a memory so small that it is emptied all the time.
    texts = [text for pair in pairs for text in pair]
    texts += _ODD_TEXTS + [" ".join(_ODD_TEXTS[i::3]) for i in range(3)]
    for most in (1 << 18, 50):
        fast = IdEncoder(tokenizer, with_eos=True, by_words=True)
        fast._MOST_WORDS = most
        for _ in range(2):
            ids, lengths = fast.encode(texts)
            expected = [[*row, tokenizer.eos_id] for row in tokenizer.encode_batch(texts)]
            assert lengths.tolist() == [len(row) for row in expected]
            assert np.frombuffer(ids, "<u2").tolist() == [id for row in expected for id in row]
        assert len(fast._words) <= max(most, 100)


@pytest.mark.parametrize("by_words", [False, True])
def test_encoded_tags(tagged, by_words) -> None:
    if by_words and "unigram" in str(tagged.path):
        return
    texts = ["the cell", "<2de> a", "a <2de> b", ""]
    for tag, expected in (
        ("", texts),
        ("[x]", [f"[x] {text}" for text in texts]),
        ("<2de>", [f"<2de> {text}" for text in texts]),
    ):
        ids, lengths = IdEncoder(tagged, by_words=by_words).encode(texts, tag)
        rows = np.split(np.frombuffer(ids, "<u2"), np.cumsum(lengths)[:-1])
        assert [row.tolist() for row in rows] == [tagged.encode(text) for text in expected]


def test_duplicates_are_the_same_text_under_the_same_tags(tagged, tmp_path) -> None:
    encoders = IdEncoder(tagged, with_eos=True), IdEncoder(tagged)
    writer = DatasetWriter(tmp_path, tagged, tagged)
    tags = [
        ("", ""),
        ("<2de>", ""),
        ("", "[x]"),
        ("<2de>", "[x]"),
        (">>fr<<", "[x]"),
        ("<2de>", ""),
    ]
    for number, (source_tag, prefix) in enumerate(tags):
        writer.begin(str(number))
        writer.add(encode_pairs(["the cell"], ["die Zelle"], *encoders, source_tag, prefix))
    writer.finish()
    assert [rows.skipped.repeated for rows in ParallelDataset(tmp_path).corpora] == [0] * 5 + [1]


def test_several_corpora_and_filters(tmp_path, tokenizer, pairs) -> None:
    encoders = IdEncoder(tokenizer, with_eos=True), IdEncoder(tokenizer)
    writer = DatasetWriter(tmp_path, tokenizer, tokenizer)
    parts = {
        "first": [*pairs[:50], ("Same", "Same"), pairs[3], ("Same", "Same")],
        "second": [pairs[5], *pairs[60:90], pairs[60], ("same", "same")],
    }
    for name, some in parts.items():
        counts = writer.begin(name)
        counts.read = len(some)
        for begin in range(0, len(some), 20):
            src, tgt = zip(*some[begin : begin + 20], strict=True)
            writer.add(encode_pairs(src, tgt, *encoders))
    writer.finish()
    whole = ParallelDataset(tmp_path)
    assert [(c.name, c.begin, c.end) for c in whole.corpora] == [
        ("first", 0, 53),
        ("second", 53, 86),
    ]
    assert [c.skipped.repeated for c in whole.corpora] == [2, 2]
    assert [c.skipped.identical for c in whole.corpora] == [2, 1]
    assert whole.skipped.describe() == (
        "86 pairs; 4 of them are duplicates; 3 of them are the same on both sides"
    )
    rest = whole.filtered(10_000, duplicates="drop", identical="drop")
    assert [(c.name, c.begin, c.end) for c in rest.corpora] == [
        ("first", 0, 50),
        ("second", 50, 80),
    ]
    assert rest.skipped.describe() == "80 pairs of 86 (3 duplicates, 3 the same on both sides)"
    for index, (src, tgt) in enumerate(pairs[:50] + pairs[60:90]):
        source, target = rest.example(index)
        assert tokenizer.decode(source) == src and tokenizer.decode(target) == tgt
    # A second filter on top, and the names of corpora that are left.
    short = rest.filtered(30)
    for rows in short.corpora:
        assert 0 < len(rows) < 50
        assert rows.skipped.used == len(rows)
    assert short.corpora[1].end == len(short) and short.corpora[1].begin == short.corpora[0].end
    # With the shortest pair of one corpus as the limit, nothing of the other is left.
    lengths = np.maximum(rest.source_lengths, rest.target_lengths)
    shortest = [int(lengths[:50].min()), int(lengths[50:].min())]
    assert shortest[0] != shortest[1]
    empty = ("50 pairs of corpus 'first'", "30 pairs of corpus 'second'")[int(np.argmax(shortest))]
    with pytest.raises(CorpusError, match=f"none of {empty} is left"):
        rest.filtered(min(shortest))


def test_duplicates_among_many(tmp_path, monkeypatch) -> None:
    import transformer_ext.data.dataset as module

    generator = np.random.default_rng(0)
    hashes = generator.integers(0, 1 << 63, 4000, dtype=np.uint64) * np.uint64(2)
    hashes = hashes[generator.integers(0, 4000, 10_000)]
    (tmp_path / "hashes").write_bytes(hashes.tobytes())
    seen: set[int] = set()
    expected = [h in seen or seen.add(h) is not None for h in hashes.tolist()]
    for size in (1 << 22, 100, 4096):
        monkeypatch.setattr(module, "_SORTED_PAIRS", size)
        assert _repeated(tmp_path / "hashes", 10_000).tolist() == expected


def test_altered_datasets_are_found(tmp_path, dataset) -> None:
    dataset.verify()
    for name in ("source.ids", "target.offsets", "flags"):
        copy = tmp_path / name
        shutil.copytree(dataset.folder, copy)
        data = bytearray((copy / name).read_bytes())
        data[len(data) // 2] ^= 1
        (copy / name).write_bytes(data)
        with pytest.raises(CorpusError, match=f"{name}: was altered after it was written"):
            ParallelDataset(copy).verify()


def test_dataset_holds_the_text(dataset, pairs, tokenizer) -> None:
    assert len(dataset) == len(pairs)
    for index in (0, 1, 700, len(pairs) - 1):
        source, target = dataset.example(index)
        assert source.dtype == target.dtype == np.int32
        assert source.tolist() == [*tokenizer.encode(pairs[index][0]), tokenizer.eos_id]
        assert target.tolist() == tokenizer.encode(pairs[index][1])
        assert dataset.source_lengths[index] == len(source)
        assert dataset.target_lengths[index] == len(target) + 1
    with pytest.raises(IndexError):
        dataset.example(len(pairs))


def test_dataset_is_mapped_and_small(dataset) -> None:
    sizes = {name: (dataset.folder / name).stat().st_size for name in os.listdir(dataset.folder)}
    assert sizes["source.ids"] == 2 * dataset.source_lengths.sum()
    assert sizes["target.ids"] == 2 * (dataset.target_lengths.sum() - len(dataset))
    assert isinstance(dataset._source_ids, np.memmap)


def test_filtered_dataset(dataset) -> None:
    short = dataset.filtered(20, max_length_ratio=2.0)
    source, target = dataset.source_lengths, dataset.target_lengths
    fits = (source <= 20) & (target <= 20)
    even = np.maximum(source, target) <= 2 * np.minimum(source, target)
    rows = np.flatnonzero(fits & even)
    assert len(short) == len(rows)
    np.testing.assert_array_equal(short.source_lengths, source[rows])
    np.testing.assert_array_equal(short.example(5)[1], dataset.example(int(rows[5]))[1])
    assert short.skipped.too_long == (~fits).sum()
    assert short.skipped.ratio == (fits & ~even).sum()
    assert short.skipped.used == len(rows)
    twice = short.filtered(10)
    assert twice.source_lengths.max() <= 10
    assert twice.skipped.used + twice.skipped.too_long + twice.skipped.ratio == len(dataset)
    with pytest.raises(CorpusError, match="max_length: with 1 tokens none of"):
        dataset.filtered(1)


def test_broken_datasets_are_refused(tmp_path, dataset) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(dataset.folder, copy)
    path = copy / "target.ids"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(CorpusError, match=r"target\.ids: has .* bytes, expected"):
        ParallelDataset(copy)
    path.unlink()
    with pytest.raises(CorpusError, match=r"target\.ids: is missing"):
        ParallelDataset(copy)
    (copy / "dataset.json").unlink()
    with pytest.raises(CorpusError, match=r"dataset\.json: cannot be read: No such file"):
        ParallelDataset(copy)


def test_an_altered_description_of_a_dataset_is_refused(tmp_path, dataset) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(dataset.folder, folder)
    path = folder / "dataset.json"
    text = path.read_text(encoding="utf-8")
    meta = json.loads(text)
    without = {name: value for name, value in meta.items() if name != "pairs"}
    for values in (
        text[:-5],
        "[" * 100_000,
        "[1, 2]",
        json.dumps(without),
        json.dumps({**meta, "pairs": str(meta["pairs"])}),
        json.dumps({**meta, "eos_id": 5}),
        json.dumps({**meta, "corpora": [{**meta["corpora"][0], "end": 9}]}),
        json.dumps({**meta, "skipped": {"lost": 3}}),
    ):
        path.write_text(values, encoding="utf-8")
        with pytest.raises(CorpusError) as caught:
            ParallelDataset(folder)
        assert str(caught.value) == (
            f"{path}: was altered after it was written; remove the folder {folder}, it is then "
            "built anew"
        )
    path.write_bytes(b"\xff")
    with pytest.raises(CorpusError, match="was altered"):
        ParallelDataset(folder)
    # Written otherwise, it is the same.
    path.write_text(json.dumps(dict(sorted(meta.items()))), encoding="utf-8")
    assert len(ParallelDataset(folder)) == len(dataset)


def test_a_dataset_of_nothing_is_an_error(tmp_path, tokenizer) -> None:
    with pytest.raises(CorpusError, match="no usable sentence pair"):
        build_dataset(tmp_path, [], tokenizer, tokenizer)


# Batches


@pytest.mark.parametrize("pool_batches", [0, 1, 32])
@pytest.mark.parametrize(("max_tokens", "least"), [(256, 0.88), (1024, 0.94)])
def test_batches_hold_each_pair_once_within_the_budget(
    dataset, max_tokens, least, pool_batches
) -> None:
    source, target = dataset.source_lengths, dataset.target_lengths
    sampler = BatchSampler(source, target, max_tokens, pool_batches=pool_batches)
    batches = sampler.epoch(0)
    assert sorted(np.concatenate(batches)) == list(range(len(dataset)))
    assert max(target[batch].sum() for batch in batches) <= max_tokens
    assert max(source[batch].sum() for batch in batches) <= 2 * max_tokens
    filled = target.sum() / (len(batches) * max_tokens)
    assert sampler.efficiency() == pytest.approx(filled)
    assert filled > least


def test_batches_are_a_pure_function_of_seed_and_epoch(dataset) -> None:
    def batches(seed: int, epoch: int) -> list[list[int]]:
        sampler = BatchSampler(dataset.source_lengths, dataset.target_lengths, 512, seed)
        sampler.epoch(9)
        return [batch.tolist() for batch in sampler.epoch(epoch)]

    assert batches(1, 3) == batches(1, 3)
    assert batches(1, 3) != batches(1, 4)
    assert batches(1, 3) != batches(2, 3)
    # Other numpy versions have to give the same order: a resume depends on it.
    assert random_order(8, 1, 2).tolist() == [0, 1, 6, 2, 7, 4, 5, 3]


def test_length_buckets_keep_like_lengths_together(dataset) -> None:
    source, target = dataset.source_lengths, dataset.target_lengths

    def padding(pool_batches: int) -> float:
        sampler = BatchSampler(source, target, 1024, pool_batches=pool_batches)
        cells = sum(len(batch) * target[batch].max() for batch in sampler.epoch(0))
        return 1 - target.sum() / cells

    assert padding(32) < 0.3 < 0.5 < padding(0)


def test_source_tokens_are_bounded() -> None:
    source, target = np.full(100, 30), np.full(100, 10)
    batches = BatchSampler(source, target, 100, max_source_tokens=90).epoch(0)
    assert {len(batch) for batch in batches} == {3, 1}


def test_impossible_batches_are_refused() -> None:
    lengths = np.array([5, 200])
    with pytest.raises(ValueError, match="max_tokens: got 100, but the longest sentence has 200"):
        BatchSampler(np.array([5, 5]), lengths, 100)
    with pytest.raises(ValueError, match="max_source_tokens: got 150, but the longest"):
        BatchSampler(lengths, np.array([5, 5]), 100, max_source_tokens=150)
    with pytest.raises(ValueError, match="target_lengths: got 2, expected 3"):
        BatchSampler(np.array([1, 2, 3]), lengths, 1000)


def test_random_order_is_a_fair_permutation() -> None:
    counts = np.zeros((6, 6))
    for seed in range(3000):
        counts[np.arange(6), random_order(6, seed)] += 1
    assert abs(counts / 3000 - 1 / 6).max() < 0.03
    assert len(random_order(0, 1)) == 0


def test_collate(dataset) -> None:
    indices = np.array([9, 2, 500])
    batch = collate(dataset, indices)
    assert batch.sentences == 3
    assert batch.target_tokens == len(batch.labels) == len(batch.tgt_ids) == batch.tgt_lengths.sum()
    source_start = target_start = 0
    for place, index in enumerate(indices):
        source, target = dataset.example(int(index))
        source_end = source_start + batch.src_lengths[place]
        target_end = target_start + batch.tgt_lengths[place]
        assert batch.src_ids[source_start:source_end].tolist() == source.tolist()
        assert batch.tgt_ids[target_start:target_end].tolist() == [dataset.bos_id, *target]
        assert batch.labels[target_start:target_end].tolist() == [*target, dataset.eos_id]
        source_start, target_start = source_end, target_end
    for name in ("src_ids", "src_lengths", "tgt_ids", "labels", "tgt_lengths"):
        assert getattr(batch, name).dtype == np.int64, name
    assert collate(dataset, indices, start_id=0).tgt_ids[0] == 0
    assert collate(dataset, indices[:0]).target_tokens == 0


def test_data_without_torch() -> None:
    import subprocess
    import sys

    program = (
        "import sys\n"
        "import transformer_ext.data.preparation, transformer_ext.prepare\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
