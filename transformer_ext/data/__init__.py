"""From text files to batches of token ids: corpus, tokenizer, data set, batches; without torch.

:mod:`transformer_ext.data.preparation` puts them together for a configuration.
"""

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
from transformer_ext.data.tokenizer import Tokenizer, TokenizerError, train_tokenizer

__all__ = [
    "Batch",
    "BatchSampler",
    "Corpus",
    "CorpusError",
    "ParallelDataset",
    "ParallelText",
    "SkippedPairs",
    "Tokenizer",
    "TokenizerError",
    "build_dataset",
    "collate",
    "read_pairs",
    "shipped_corpus",
    "train_tokenizer",
]
