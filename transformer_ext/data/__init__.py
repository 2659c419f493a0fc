"""From text files to batches of token ids: corpus, tokenizer, data set, batches; without torch.

:mod:`transformer_ext.data.preparation` puts them together for a configuration. Each name below is
loaded when first used: a translation needs the tokenizer alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformer_ext.data.batches import Batch, BatchSampler, collate
    from transformer_ext.data.corpus import (
        Corpus,
        CorpusError,
        ParallelText,
        SkippedPairs,
        read_pairs,
        shipped_corpus,
    )
    from transformer_ext.data.dataset import ParallelDataset, build_dataset
    from transformer_ext.data.json_tokenizer import JsonTokenizer
    from transformer_ext.data.tokenizer import (
        SentencePieceTokenizer,
        Tokenizer,
        TokenizerError,
        train_tokenizer,
    )

_MODULES = {
    "Batch": "batches",
    "BatchSampler": "batches",
    "Corpus": "corpus",
    "CorpusError": "corpus",
    "JsonTokenizer": "json_tokenizer",
    "ParallelDataset": "dataset",
    "ParallelText": "corpus",
    "SkippedPairs": "corpus",
    "SentencePieceTokenizer": "tokenizer",
    "Tokenizer": "tokenizer",
    "TokenizerError": "tokenizer",
    "build_dataset": "dataset",
    "collate": "batches",
    "read_pairs": "corpus",
    "shipped_corpus": "corpus",
    "train_tokenizer": "tokenizer",
}

__all__ = [
    "Batch",
    "BatchSampler",
    "Corpus",
    "CorpusError",
    "JsonTokenizer",
    "ParallelDataset",
    "ParallelText",
    "SkippedPairs",
    "SentencePieceTokenizer",
    "Tokenizer",
    "TokenizerError",
    "build_dataset",
    "collate",
    "read_pairs",
    "shipped_corpus",
    "train_tokenizer",
]


def __getattr__(name: str) -> object:
    if name in _MODULES:
        value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
