"""The tokenizers of BERT and GPT-2: files of the ``tokenizers`` library, and of Hugging Face."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformer_ext.data.tokenizer import Tokenizer, TokenizerError, check_characters

if TYPE_CHECKING:
    import tokenizers

__all__ = ["JsonTokenizer"]

_FILE = "tokenizer.json"
#: A tokenizer.json of a million pieces is 50 MB; more is not a tokenizer.
_LARGEST_FILE = 256 << 20
_LARGEST_ID = 1 << 24

_ROLES = ("bos", "eos", "pad", "unk", "mask")
#: The names of special tokens in the files of Hugging Face, in the order that transformers has them.
_NAMED = (
    *("bos_token", "eos_token", "unk_token", "sep_token"),
    *("pad_token", "cls_token", "mask_token"),
)
#: The special tokens of a class where its files name none.
_DEFAULTS: dict[str, dict[str, str]] = {
    "BertTokenizer": {
        "unk_token": "[UNK]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "mask_token": "[MASK]",
    },
    "GPT2Tokenizer": {
        "unk_token": "<|endoftext|>",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
    },
}
_OF_MODEL_TYPE = {"bert": "BertTokenizer", "distilbert": "BertTokenizer", "gpt2": "GPT2Tokenizer"}
_ALIASES = {"DistilBertTokenizer": "BertTokenizer"}
_CLASS_OF_MODEL = {"WordPiece": "BertTokenizer", "BPE": "GPT2Tokenizer"}
#: What Rust takes for white space at the end of a line of ``vocab.txt``.
_RUST_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)


class JsonTokenizer(Tokenizer):
    """A ``tokenizer.json`` of the ``tokenizers`` library: WordPiece, or (byte-level) BPE.

    Ids are those that ``transformers`` gives with ``add_special_tokens=False``. So an added token
    in a text, such as ``[MASK]`` or ``<|endoftext|>``, is that token. What the file says about
    truncation and padding is not heeded.

    For BERT the start is ``[CLS]`` and the end ``[SEP]``; for GPT-2 all special ids are that of
    ``<|endoftext|>``.

    Args:
        path: the file.
        special_tokens: the tokens that are special, by role: ``bos``, ``eos``, ``pad``, ``unk`` and,
            where there is one, ``mask``.
        source_tags: tags of source texts; each is a piece.
        target_prefixes: tags of target texts; each is a piece.
        content: the bytes of the file, where there is none that holds them.

    Raises:
        TokenizerError: no such file, not one of the library, of another kind of model, or without
            one of the special tokens.
    """

    suffix = ".json"
    vocabulary = None

    def __init__(
        self,
        path: str | Path,
        special_tokens: Mapping[str, str],
        source_tags: Sequence[str] = (),
        target_prefixes: Sequence[str] = (),
        *,
        content: bytes | None = None,
    ) -> None:
        path = Path(path)
        content = _read(path) if content is None else content
        self._set(path, special_tokens, content, _parse(path, content))
        self._set_tags(source_tags, target_prefixes)

    def _set(
        self,
        path: Path,
        special_tokens: Mapping[str, str],
        content: bytes,
        tokenizer: tokenizers.Tokenizer,
    ) -> None:
        self.path = path
        self._content = content
        self._tokenizer = tokenizer
        self.vocab_size = _vocab_size(self.path, self._tokenizer)
        self._roles = dict(special_tokens)
        found = {role: self._role(role) for role in _ROLES if role in self._roles}
        missing = [role for role in _ROLES[:-1] if role not in found]
        if missing or len(found) != len(self._roles):
            raise TokenizerError(
                f"{path}: special tokens: got {', '.join(map(str, self._roles))}, expected bos, eos, "
                "pad, unk and perhaps mask"
            )
        self.bos_id, self.eos_id = found["bos"], found["eos"]
        self.pad_id, self.unk_id = found["pad"], found["unk"]
        self.mask_id = found.get("mask")
        roles = json.dumps(self._roles, sort_keys=True)
        self.sha256 = hashlib.sha256(
            f"{hashlib.sha256(self._content).hexdigest()} {roles}".encode()
        ).hexdigest()

    @classmethod
    def from_huggingface(cls, folder: str | Path) -> JsonTokenizer:
        """The tokenizer of a directory of Hugging Face, as ``AutoTokenizer`` reads it.

        That is ``tokenizer.json``, or ``vocab.txt`` of BERT, or ``vocab.json`` and ``merges.txt`` of
        GPT-2, with what ``tokenizer_config.json``, ``special_tokens_map.json`` and
        ``added_tokens.json`` say of special tokens, letter case and accents.

        Raises:
            TokenizerError: a file is missing or broken, or the tokenizer is of another kind.
        """
        path, special, built = _Folder(Path(folder)).read()
        tokenizer = cls.__new__(cls)
        tokenizer._set(path, special, built.to_str().encode(), built)
        tokenizer._set_tags((), ())
        return tokenizer

    def huggingface_files(self, max_length: int | None = None) -> dict[str, bytes]:
        """The files from which ``AutoTokenizer`` makes the same tokenizer, by name.

        Args:
            max_length: the longest text that the model can read, special tokens included.
        """
        values = json.loads(self._content)
        name = _class_of(values)
        bert = values["model"]["type"] == "WordPiece"
        names = (
            {"cls": "bos", "sep": "eos", "pad": "pad", "unk": "unk", "mask": "mask"}
            if bert
            else {role: role for role in _ROLES}
        )
        special = {
            f"{token}_token": self._roles[role]
            for token, role in names.items()
            if role in self._roles
        }
        if not bert and special["pad_token"] == special["eos_token"]:
            # GPT-2 has none.
            del special["pad_token"]
        settings: dict[str, Any] = {"tokenizer_class": name, **special}
        if name == "BertTokenizer":
            normalizer = values["normalizer"]
            settings |= {
                "do_lower_case": normalizer["lowercase"],
                "strip_accents": normalizer["strip_accents"],
                "tokenize_chinese_chars": normalizer["handle_chinese_chars"],
            }
        elif name == "GPT2Tokenizer":
            settings["add_prefix_space"] = values["pre_tokenizer"]["add_prefix_space"]
        if max_length is not None:
            settings["model_max_length"] = max_length
        settings["clean_up_tokenization_spaces"] = False
        settings["added_tokens_decoder"] = {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"}
            for token in values.get("added_tokens", [])
        }
        return {
            _FILE: self._content,
            "tokenizer_config.json": _as_json(settings),
            "special_tokens_map.json": _as_json(special),
        }

    def __getstate__(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "special_tokens": self._roles,
            "source_tags": self.source_tags,
            "target_prefixes": self.target_prefixes,
            "content": self._content,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def _role(self, role: str) -> int:
        token = self._roles[role]
        id = self.find(token) if isinstance(token, str) else None
        if id is None:
            raise TokenizerError(
                f"{self.path}: the {role} token is {reprlib.repr(token)}, which is not in its "
                "vocabulary"
            )
        return id

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """The tokens that are special, by role."""
        return dict(self._roles)

    def content(self) -> bytes:
        """What ``tokenizer.json`` holds."""
        return self._content

    def find(self, piece: str) -> int | None:
        found: int | None = self._tokenizer.token_to_id(piece)
        return found

    def _with(self, source_tags: Sequence[str], target_prefixes: Sequence[str]) -> JsonTokenizer:
        return JsonTokenizer(
            self.path, self._roles, source_tags, target_prefixes, content=self._content
        )

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without start and end."""
        first, rest = self.split_tag(text)
        return first + self._encode([rest], text)[0]

    def encode_untagged(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """:meth:`encode_batch` of texts in which a tag at the beginning is text like any other.

        The library chooses the number of threads.
        """
        return self._encode(texts, texts)

    def _encode(self, texts: Sequence[str], given: str | Sequence[str]) -> list[list[int]]:
        """Ids of texts; ``given`` is what an error names."""
        try:
            if len(texts) == 1:
                return [self._tokenizer.encode(texts[0], add_special_tokens=False).ids]
            # The fast one leaves out where in the text each token stands.
            found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError:
            # What the library says of half a surrogate pair, too.
            check_characters(given)
            raise
        return [encoding.ids for encoding in found]

    def decode(self, ids: Iterable[int], *, keep_special: bool = False) -> str:
        """Text of ids; special tokens, and a tag at the beginning, are left out.

        As ``transformers`` decodes with ``skip_special_tokens=True``: a text may have several lines.
        With ``keep_special`` nothing is left out.
        """
        if keep_special:
            everything: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
            return everything
        known = [int(id) for id in ids if id not in self._special and id < self.vocab_size]
        if known and known[0] in self._hidden:
            del known[0]
        text: str = self._tokenizer.decode(known, skip_special_tokens=True)
        return text

    def piece(self, id: int) -> str:
        """The piece of an id, as in the file; of byte-level BPE it is spelt in its byte alphabet.

        Raises:
            IndexError: no such id.
        """
        if not 0 <= id < self.vocab_size:
            raise IndexError(f"id: expected 0 to {self.vocab_size - 1}, got {id}")
        found: str | None = self._tokenizer.id_to_token(int(id))
        # A vocabulary may have gaps.
        return f"<{id}>" if found is None else found


class _Folder:
    """The files of a tokenizer of Hugging Face.

    Args:
        folder: where they are.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        if not folder.is_dir():
            raise TokenizerError(f"{folder}: no such folder")
        self._settings = self._object("tokenizer_config.json")
        self._json = self._object(_FILE) if (folder / _FILE).is_file() else None

    def _object(self, name: str) -> dict[str, Any]:
        path = self._folder / name
        return _read_object(path, _read(path)) if path.is_file() else {}

    def read(self) -> tuple[Path, dict[str, str], tokenizers.Tokenizer]:
        """The file that has the vocabulary, the special tokens by role, and the tokenizer."""
        name = self._class()
        self._read_map()
        if name == "BertTokenizer":
            path, tokenizer = self._bert()
        elif name == "GPT2Tokenizer":
            path, tokenizer = self._gpt2()
        elif self._json is not None:
            path = self._folder / _FILE
            tokenizer = _parse(path, _read(path))
            name = _CLASS_OF_MODEL[type(tokenizer.model).__name__]
        else:
            raise TokenizerError(
                f"{self._folder}: tokenizer_class is {reprlib.repr(name)} and there is no {_FILE}; expected one, "
                "or BertTokenizer or GPT2Tokenizer"
            )
        return path, self._special(path, name, tokenizer), tokenizer

    def _class(self) -> str:
        """The name of the class that transformers would choose; empty: that of the file."""
        config = self._object("config.json")
        name = self._settings.get("tokenizer_class") or config.get("tokenizer_class")
        if isinstance(name, str):
            name = name.removesuffix("Fast")
            return _ALIASES.get(name, name)
        known = config.get("model_type")
        if isinstance(known, str) and known in _OF_MODEL_TYPE:
            return _OF_MODEL_TYPE[known]
        if self._json is not None:
            return ""
        for file, name in (("vocab.txt", "BertTokenizer"), ("vocab.json", "GPT2Tokenizer")):
            if (self._folder / file).is_file():
                return name
        raise TokenizerError(
            f"{self._folder}: has no tokenizer; expected {_FILE}, vocab.txt (BERT), or vocab.json and "
            "merges.txt (GPT-2)"
        )

    def _read_map(self) -> None:
        # Where the settings list the added tokens, those alone are heeded.
        if "added_tokens_decoder" not in self._settings:
            self._settings |= self._object("special_tokens_map.json")

    def _flag(self, name: str, default: bool | None) -> bool | None:
        value = self._settings.get(name, default)
        if value is not default and not isinstance(value, bool):
            raise TokenizerError(
                f"{self._folder / 'tokenizer_config.json'}: {name}: got {reprlib.repr(value)}, "
                "expected true or false"
            )
        return value

    def _bert(self) -> tuple[Path, tokenizers.Tokenizer]:
        import tokenizers
        from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

        path, model = self._model("WordPiece", "vocab.txt")
        vocab = _vocab(path, model["vocab"]) if model else self._lines(path)
        names = ("unk_token", "cls_token", "sep_token")
        unknown, first, last = (self._token(name, "BertTokenizer") or "" for name in names)
        ids = {**vocab, **{token["content"]: token["id"] for token in self._listed(path)}}
        for token in (unknown, first, last):
            if token not in (vocab if token == unknown else ids):
                raise TokenizerError(
                    f"{path}: its vocabulary lacks the special token {token!r:.80}"
                )
        tokenizer = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token=unknown))
        # transformers goes by the settings, whatever tokenizer.json says.
        tokenizer.normalizer = normalizers.BertNormalizer(
            clean_text=True,
            handle_chinese_chars=bool(self._flag("tokenize_chinese_chars", True)),
            strip_accents=self._flag("strip_accents", None),
            lowercase=bool(self._flag("do_lower_case", True)),
        )
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece(prefix="##")
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first}:0 $A:0 {last}:0",
            pair=f"{first}:0 $A:0 {last}:0 $B:1 {last}:1",
            special_tokens=[(first, ids[first]), (last, ids[last])],
        )
        return path, tokenizer

    def _gpt2(self) -> tuple[Path, tokenizers.Tokenizer]:
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers, processors

        path, model = self._model("BPE", "vocab.json")
        if model:
            vocab, merges = _vocab(path, model["vocab"]), _merges(path, model.get("merges"))
        else:
            vocab = _vocab(path, _read_object(path, _read(path)))
            merges = self._merge_lines(self._folder / "merges.txt")
        try:
            bpe = models.BPE(
                vocab=vocab,
                merges=merges,
                continuing_subword_prefix="",
                end_of_word_suffix="",
                fuse_unk=False,
            )
        except Exception as error:
            raise TokenizerError(f"{path}: its merges do not fit its vocabulary: {error}") from None
        tokenizer = tokenizers.Tokenizer(bpe)
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
            add_prefix_space=bool(self._flag("add_prefix_space", False))
        )
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
        return path, tokenizer

    def _model(self, kind: str, other: str) -> tuple[Path, dict[str, Any]]:
        """The model of tokenizer.json; where there is none, the name of the other file."""
        if self._json is None:
            path = self._folder / other
            if not path.is_file():
                raise TokenizerError(
                    f"{self._folder}: has no tokenizer; expected {_FILE} or {other}"
                )
            return path, {}
        path = self._folder / _FILE
        model = _check_model(path, self._json)
        if model["type"] != kind:
            raise TokenizerError(
                f"{path}: model: got {model['type']}, expected {kind}, as the tokenizer_class has"
            )
        return path, model

    def _lines(self, path: Path) -> dict[str, int]:
        """The pieces of vocab.txt, one a line."""
        lines = _decode(path, _read(path)).split("\n")
        if not lines[-1]:
            del lines[-1]
        return {line.rstrip(_RUST_SPACE): number for number, line in enumerate(lines)}

    def _merge_lines(self, path: Path) -> list[tuple[str, str]]:
        lines = [line.removesuffix("\r") for line in _decode(path, _read(path)).split("\n")]
        return _merges(path, [line for line in lines if line and not line.startswith("#version")])

    def _token(self, name: str, of_class: str) -> str | None:
        """A special token by its name in the settings."""
        value = self._settings.get(name, _DEFAULTS[of_class].get(name))
        if isinstance(value, dict):
            value = value.get("content")
        if value is not None and not isinstance(value, str):
            raise TokenizerError(
                f"{self._folder / 'tokenizer_config.json'}: {name}: got {reprlib.repr(value)}, "
                "expected a text"
            )
        return value

    def _listed(self, path: Path) -> list[dict[str, Any]]:
        """The added tokens that the files list, by their ids."""
        listed: dict[int, dict[str, Any]] = {}
        by_id = self._settings.get("added_tokens_decoder")
        where = self._folder / "tokenizer_config.json"
        entries: Iterable[tuple[Any, Any]]
        if by_id is not None:
            entries = by_id.items() if isinstance(by_id, dict) else [(None, None)]
        else:
            where = path
            entries = [
                (id, {"content": content})
                for content, id in self._object("added_tokens.json").items()
            ]
            if self._json is not None:
                added = self._json.get("added_tokens") or []
                added = added if isinstance(added, list) else [None]
                found = [token if isinstance(token, dict) else {} for token in added]
                entries = [*entries, *((token.get("id"), token) for token in found)]
        for id, token in entries:
            number = (
                int(id)
                if isinstance(id, (int, str)) and re.fullmatch("[0-9]{1,8}", str(id))
                else -1
            )
            content = token.get("content") if isinstance(token, dict) else None
            if number < 0 or not isinstance(content, str) or not content:
                raise TokenizerError(f"{where}: an added token without id or content")
            listed[number] = {**token, "id": number}
        return [listed[id] for id in sorted(listed)]

    def _special(self, path: Path, name: str, tokenizer: tokenizers.Tokenizer) -> dict[str, str]:
        """Adds the added tokens, in the order of transformers; returns the special ones by role."""
        from tokenizers import AddedToken

        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        special = {key: self._token(key, name) for key in _NAMED}
        listed = {entry["content"] for entry in self._listed(path)}
        for key, token in special.items():
            # A default of the class is not forced on a vocabulary that has no such token.
            if token is not None and key not in self._settings and token not in listed:
                special[key] = token if tokenizer.token_to_id(token) is not None else None
        extra = self._settings.get("additional_special_tokens")
        extra = self._settings.get("extra_special_tokens") or extra or []
        extra = list(extra.values()) if isinstance(extra, dict) else extra
        named: list[Any] = [token for token in special.values() if token is not None]
        for token in extra if isinstance(extra, list) else [None]:
            named.append(token.get("content") if isinstance(token, dict) else token)
        if not all(isinstance(token, str) and token for token in named):
            raise TokenizerError(
                f"{self._folder / 'tokenizer_config.json'}: a special token that is no text"
            )
        known = {added.content for added in tokenizer.get_added_tokens_decoder().values()}
        tokens = []
        for entry in self._listed(path):
            known.add(entry["content"])
            values = {key: entry[key] for key in flags if key in entry}
            if not all(isinstance(value, bool) for value in values.values()):
                raise TokenizerError(
                    f"{path}: the added token {entry['content']!r:.80}: expected flags"
                )
            if entry["content"] in named:
                values["special"] = True
            elif "special" not in values:
                values["normalized"] = True
            tokens.append(AddedToken(entry["content"], **values))
        tokens += [
            AddedToken(token, special=True, normalized=False)
            for token in dict.fromkeys(named)
            if token not in known
        ]
        tokenizer.add_tokens(tokens)
        return self._roles(path, special)

    def _roles(self, path: Path, special: Mapping[str, str | None]) -> dict[str, str]:
        bos, eos = special["bos_token"], special["eos_token"]
        bos, eos = special["cls_token"] or bos or eos, special["sep_token"] or eos or bos
        if bos is None or eos is None:
            raise TokenizerError(
                f"{path}: no token begins or ends a text; expected cls_token and sep_token, or "
                "bos_token and eos_token, in tokenizer_config.json"
            )
        roles = {
            "bos": bos,
            "eos": eos,
            "pad": special["pad_token"] or eos,
            "unk": special["unk_token"] or eos,
        }
        mask = special["mask_token"]
        return roles if mask is None else {**roles, "mask": mask}


def _class_of(values: Mapping[str, Any]) -> str:
    """The class of transformers that makes exactly the tokenizer of a tokenizer.json."""
    model = values["model"]
    pre = values.get("pre_tokenizer") or {}
    decoder = values.get("decoder") or {}
    normalizer = values.get("normalizer")
    if model["type"] == "WordPiece":
        same = (
            normalizer is not None
            and (normalizer.get("type"), normalizer.get("clean_text")) == ("BertNormalizer", True)
            and pre.get("type") == "BertPreTokenizer"
            and (decoder.get("type"), decoder.get("prefix")) == ("WordPiece", "##")
            and (model["continuing_subword_prefix"], model["max_input_chars_per_word"])
            == ("##", 100)
        )
        return "BertTokenizer" if same else "PreTrainedTokenizerFast"
    same = (
        normalizer is None
        and (pre.get("type"), pre.get("use_regex", True)) == ("ByteLevel", True)
        and decoder.get("type") == "ByteLevel"
        and not any(
            model.get(key)
            for key in (
                *("continuing_subword_prefix", "end_of_word_suffix", "unk_token"),
                *("fuse_unk", "byte_fallback", "ignore_merges"),
            )
        )
    )
    return "GPT2Tokenizer" if same else "PreTrainedTokenizerFast"


def _as_json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()


def _read(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > _LARGEST_FILE:
            raise TokenizerError(
                f"{path}: is no tokenizer: {size:,} bytes, expected at most {_LARGEST_FILE:,}"
            )
        return path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read: {error.strerror}") from None


def _decode(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path}: not UTF-8: byte {error.start:,}") from None


def _read_object(path: Path, content: bytes) -> dict[str, Any]:
    text = _decode(path, content)
    try:
        values = json.loads(text)
    # A number of thousands of digits is a ValueError, too.
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: broken, not JSON: {error}") from None
    if re.search(r"\\u[dD][89a-fA-F]", text):
        try:
            json.dumps(values, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise TokenizerError(f"{path}: broken: half a character (\\ud800 to \\udfff)") from None
    if not isinstance(values, dict):
        raise TokenizerError(f"{path}: got {type(values).__name__}, expected an object with keys")
    return values


def _vocab(path: Path, vocab: Any) -> dict[str, int]:
    if not isinstance(vocab, dict) or not vocab:
        raise TokenizerError(f"{path}: vocab: got {reprlib.repr(vocab)}, expected pieces with ids")
    ids = vocab.values()
    if set(map(type, ids)) != {int} or min(ids) < 0 or max(ids) >= _LARGEST_ID:
        raise TokenizerError(
            f"{path}: vocab: expected an id from 0 to {_LARGEST_ID - 1} for each piece"
        )
    if len(set(ids)) != len(vocab):
        raise TokenizerError(f"{path}: vocab: two pieces have the same id")
    return vocab


def _vocab_size(path: Path, tokenizer: tokenizers.Tokenizer) -> int:
    """Number of ids; there may be gaps."""
    ids = tokenizer.get_vocab(with_added_tokens=True).values()
    largest = max(ids, default=0)
    if len(set(ids)) != len(ids):
        raise TokenizerError(f"{path}: vocab: two pieces have the same id")
    if largest >= _LARGEST_ID:
        raise TokenizerError(
            f"{path}: vocab: got the id {largest}, expected less than {_LARGEST_ID}"
        )
    return largest + 1


def _merges(path: Path, merges: Any) -> list[tuple[str, str]]:
    if not isinstance(merges, list):
        raise TokenizerError(
            f"{path}: merges: got {reprlib.repr(merges)}, expected a list of pairs"
        )
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    for number, pair in enumerate(pairs):
        if not isinstance(pair, list) or list(map(type, pair)) != [str, str]:
            raise TokenizerError(
                f"{path}: merge {number}: got {reprlib.repr(merges[number])}, expected two pieces"
            )
    return list(map(tuple, pairs))


def _check_model(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """The part ``model`` of a tokenizer.json, with its type."""
    model = values.get("model")
    if not isinstance(model, dict):
        got = ", ".join(map(reprlib.repr, itertools.islice(values, 9))) or "nothing"
        raise TokenizerError(f"{path}: not a {_FILE}: has {got}; expected the key 'model'")
    kind = model.get("type")
    if kind is None:
        # Early files leave it out.
        kind = "BPE" if "merges" in model else "WordPiece" if "unk_token" in model else None
    if not isinstance(kind, str) or kind not in _CLASS_OF_MODEL:
        raise TokenizerError(
            f"{path}: model: got {reprlib.repr(kind)}, expected {' or '.join(_CLASS_OF_MODEL)}"
        )
    _vocab(path, model.get("vocab"))
    if kind == "BPE":
        _merges(path, model.get("merges"))
    elif not isinstance(unknown := model.get("unk_token"), str) or unknown not in model["vocab"]:
        raise TokenizerError(
            f"{path}: its vocabulary lacks the unk_token {reprlib.repr(model.get('unk_token'))}"
        )
    return {**model, "type": kind}


def _parse(path: Path, content: bytes) -> tokenizers.Tokenizer:
    """The tokenizer of a tokenizer.json, without its truncation and padding."""
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    # A panic of the library is no Exception.
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        # What the library says is seldom of use to a person.
        _check_model(path, _read_object(path, content))
        reason = str(error).split("\n", 1)[0]
        raise TokenizerError(f"{path}: not a file of the tokenizers library: {reason}") from None
    kind = type(tokenizer.model).__name__
    lacks_unknown = (
        kind == "WordPiece" and tokenizer.model.token_to_id(tokenizer.model.unk_token) is None
    )
    if kind not in _CLASS_OF_MODEL or lacks_unknown:
        _check_model(path, _read_object(path, content))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if kind == "BPE" and tokenizer.model.dropout is not None:
        # It would give a text other ids each time.
        tokenizer.model.dropout = None
    return tokenizer
