"""Texts that a language model writes: continuations of a beginning, greedy, sampled or by beam."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from transformer_ext.files import load_model_dir
from transformer_ext.inference.options import SearchOptions, SearchResult
from transformer_ext.inference.search import check_ids, search
from transformer_ext.model.config import LanguageModelConfig

if TYPE_CHECKING:
    from transformer_ext.model.language_model import LanguageModel

__all__ = ["TextGenerator", "continuations"]


def continuations(
    model: LanguageModel,
    beginnings: Sequence[Sequence[int]],
    options: SearchOptions | None = None,
    *,
    numbers: Sequence[int] | None = None,
) -> list[SearchResult]:
    """Search or sample what follows token ids, by :func:`transformer_ext.inference.search.search`.

    Args:
        model: the language model; put it in evaluation mode before.
        beginnings: token ids of each, without the start token; possibly none.
        options: how to search; the defaults if None. ``max_length`` counts what follows (50
            tokens by default); options that concern a source have no meaning here.
        numbers: of the beginnings, for the random numbers of sampling; 0, 1, ... if None.

    Returns:
        a result for each; its tokens begin with the beginning.

    Raises:
        ValueError: ids out of the vocabulary, options that need a source, or a beginning longer
            than the learned positions.
    """
    import torch

    options = options or SearchOptions()
    if options.needs_attention:
        raise ValueError("options: attention to a source is asked for, but there is no source")
    config = model.config
    for beginning in beginnings:
        check_ids("beginnings", beginning, config.vocab_size)
    check_ids("suppressed_tokens", options.suppressed_tokens, config.vocab_size)
    device = next(model.parameters()).device
    limits = [len(beginning) + options.length_limit(0) for beginning in beginnings]
    if config.positions == "learned":
        limits = [min(limit, config.max_positions) for limit in limits]

    def step(rows: list[int], prefixes: NDArray[np.int64]) -> Any:
        return model.next_log_probs(torch.from_numpy(prefixes).to(device)).cpu().numpy()

    with torch.inference_mode():
        return search(
            step,
            limits,
            options,
            start_id=config.bos_id,
            eos_id=config.eos_id,
            suppressed=frozenset({config.pad_id, config.bos_id} - {config.eos_id}),
            prefixes=beginnings,
            numbers=numbers,
        )


class TextGenerator:
    """A language model from its directory, on text.

    Args:
        folder: model directory of ``python -m transformer_ext.train --task language-model``.
        device: where to compute.

    Raises:
        FileError: no such model, or one of another kind.
    """

    def __init__(self, folder: str | Path, *, device: str = "cpu") -> None:
        from transformer_ext.model.language_model import LanguageModel

        saved = load_model_dir(folder, LanguageModelConfig)
        self.tokenizer = saved.source_tokenizer
        self.model = LanguageModel(saved.config).load_weights(saved.weights).to(device).eval()

    def __call__(
        self,
        beginnings: Sequence[str],
        options: SearchOptions | None = None,
        *,
        numbers: Sequence[int] | None = None,
    ) -> list[str]:
        """The best continuation of each text, the beginning included.

        Args:
            beginnings: texts, possibly empty.
            options: see :func:`continuations`; greedy if None.
            numbers: see :func:`continuations`.
        """
        ids = [self.tokenizer.encode(text) for text in beginnings]
        found = continuations(
            self.model, ids, options or SearchOptions(beam_size=1), numbers=numbers
        )
        return [self.tokenizer.decode(result.hypotheses[0].tokens) for result in found]
