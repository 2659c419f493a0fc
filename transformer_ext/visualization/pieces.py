"""Pieces of text as people read them."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformer_ext.data.tokenizer import Tokenizer

__all__ = ["piece_contents", "readable_pieces", "spelt_out"]

#: What begins a word with SentencePiece; every blank at the beginning of a piece becomes it.
BLANK = "\u2581"

_BYTE = re.compile("<0x([0-9A-F]{2})>")


@functools.cache
def _byte_of() -> dict[str, int]:
    """The alphabet of byte-level BPE (Radford et al. 2019): printable bytes of Latin-1 are their own
    letters, the others follow each other from U+0100."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in own]
    letters = {chr(byte): byte for byte in own}
    return letters | {chr(0x100 + index): byte for index, byte in enumerate(others)}


def piece_contents(tokenizer: Tokenizer, ids: Iterable[int]) -> list[bytes | str]:
    """The piece of each id: bytes where it stands for bytes, which need not be whole characters."""
    byte_level = _is_byte_level(tokenizer)
    return [_content(piece, byte_level) for piece in tokenizer.pieces(ids)]


def _content(piece: str, byte_level: bool) -> bytes | str:
    if byte_level and all(letter in _byte_of() for letter in piece):
        return bytes(_byte_of()[letter] for letter in piece)
    # Byte fallback, as in SentencePiece.
    found = _BYTE.fullmatch(piece)
    return piece if found is None else bytes.fromhex(found[1])


def spelt_out(contents: Sequence[bytes | str]) -> list[str]:
    """Pieces that follow each other, as text.

    A piece that holds a part of a character says of which, and which part: of three pieces that
    make up one character the first is ``点 1/3``. Bytes that make up none are ``\\xe4`` and alike.
    """
    texts: list[str] = []
    run: list[bytes] = []
    # An empty text at the end ends the last run.
    for content in (*contents, ""):
        if isinstance(content, bytes):
            run.append(content)
        else:
            texts += [*_join(run), content]
            run = []
    return texts[:-1]


def _join(run: list[bytes]) -> list[str]:
    owner = [number for number, content in enumerate(run) for _ in content]
    parts: list[list[str]] = [[] for _ in run]
    first = 0
    for character in b"".join(run).decode("utf-8", "surrogateescape"):
        size = len(character.encode("utf-8", "surrogateescape"))
        owners = sorted(set(owner[first : first + size]))
        if len(owners) > 1:
            for place, number in enumerate(owners, 1):
                parts[number].append(f"{character} {place}/{len(owners)}")
        elif "\udc80" <= character <= "\udcff":
            parts[owners[0]].append(f"\\x{ord(character) - 0xDC00:02x}")
        else:
            parts[owners[0]].append(character)
        first += size
    texts = ["".join(found) for found in parts]
    return [BLANK + text[1:] if text.startswith(" ") else text for text in texts]


def readable_pieces(tokenizer: Tokenizer, ids: Iterable[int]) -> list[str]:
    """The piece of each id, with U+2581 for the blank that it begins with; see :func:`spelt_out`."""
    return spelt_out(piece_contents(tokenizer, ids))


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    if getattr(tokenizer, "suffix", "") != ".json":
        return False
    decoder = json.loads(tokenizer.content()).get("decoder") or {}
    parts = [decoder, *decoder.get("decoders", [])]
    return any(part.get("type") == "ByteLevel" for part in parts)
