"""Pieces of text as people read them."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformer_ext.data.tokenizer import Tokenizer

__all__ = ["readable_pieces", "spelt_in_bytes"]

#: What begins a word with SentencePiece; every blank at the beginning of a piece becomes it.
BLANK = "\u2581"


@functools.cache
def _byte_of() -> dict[str, int]:
    """The alphabet of byte-level BPE (Radford et al. 2019): printable bytes of Latin-1 are their own
    letters, the others follow each other from U+0100."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in own]
    letters = {chr(byte): byte for byte in own}
    return letters | {chr(0x100 + index): byte for index, byte in enumerate(others)}


def spelt_in_bytes(piece: str) -> str:
    """A piece of byte-level BPE as text; bytes that are part of a character are ``\\xe4`` and alike."""
    try:
        content = bytes(_byte_of()[letter] for letter in piece)
    except KeyError:
        return piece
    text = content.decode("utf-8", "backslashreplace")
    return BLANK + text[1:] if text.startswith(" ") else text


def readable_pieces(tokenizer: Tokenizer, ids: Iterable[int]) -> list[str]:
    """The piece of each id, with U+2581 for the blank that it begins with."""
    pieces = tokenizer.pieces(ids)
    if _is_byte_level(tokenizer):
        pieces = [spelt_in_bytes(piece) for piece in pieces]
    return pieces


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    if getattr(tokenizer, "suffix", "") != ".json":
        return False
    decoder = json.loads(tokenizer.content()).get("decoder") or {}
    parts = [decoder, *decoder.get("decoders", [])]
    return any(part.get("type") == "ByteLevel" for part in parts)
