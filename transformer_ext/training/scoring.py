"""Translations during and after training: BLEU of held-out text, and samples beside references.

The compiled engine translates where it knows the model; a model with a part of the user's own is
translated by the Python search instead, which runs any model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from transformer_ext.data.tokenizer import Tokenizer
from transformer_ext.inference.engine import UnsupportedModelError
from transformer_ext.inference.options import SearchOptions
from transformer_ext.inference.search import beam_search
from transformer_ext.training.report import Console

if TYPE_CHECKING:
    from transformer_ext.model import Transformer

__all__ = ["Decoder", "Scorer", "Scores", "pick_evenly", "pick_samples", "print_samples", "score"]


@dataclass(frozen=True)
class Scores:
    """sacreBLEU's figures of a list of translations, 0 to 100, each with its signature."""

    bleu: float
    bleu_signature: str
    chrf: float
    chrf_signature: str


def score(outputs: Sequence[str], references: Sequence[str]) -> Scores:
    """BLEU (Papineni et al. 2002) and chrF (Popovic 2015) as sacreBLEU computes them."""
    from sacrebleu.metrics import BLEU, CHRF

    bleu, chrf = BLEU(), CHRF()
    bleu_score = bleu.corpus_score(list(outputs), [list(references)]).score
    chrf_score = chrf.corpus_score(list(outputs), [list(references)]).score
    return Scores(bleu_score, str(bleu.get_signature()), chrf_score, str(chrf.get_signature()))


def pick_evenly(total: int, count: int) -> np.ndarray:
    """At most ``count`` of the numbers below ``total``, spread evenly: int64, ascending."""
    count = min(count, total)
    return np.arange(count, dtype=np.int64) * total // max(1, count)


def pick_samples(pairs: Sequence[tuple[str, str]], count: int) -> list[int]:
    """Numbers of ``count`` pairs worth showing: of middling length, spread over the text."""
    good = [i for i, (src, _) in enumerate(pairs) if 5 <= len(src.split()) <= 20]
    good = good or list(range(len(pairs)))
    count = min(count, len(good))
    return [good[(2 * index + 1) * len(good) // (2 * count)] for index in range(count)]


def print_samples(
    console: Console, pairs: Sequence[tuple[str, str]], outputs: Sequence[str], which: Sequence[int]
) -> None:
    """Source, reference and output of some pairs, one below the other."""
    for number in which:
        console.print(f"  source     {pairs[number][0]}")
        console.print(f"  reference  {pairs[number][1]}")
        console.print(f"  output     {outputs[number]}")
        console.print()


class Decoder:
    """Translates with a model directory, or where the engine cannot, with the model in memory.

    Args:
        model: The Python model whose weights the directories hold.
        source_tokenizer: Of the source language.
        target_tokenizer: Of the target language.
        console: Is told once why the engine is not used.
        length_penalty: GNMT's alpha.
        threads: CPU threads of the engine.
    """

    #: Sentences that the Python search decodes at once.
    _BATCH = 50

    def __init__(
        self,
        model: Transformer,
        source_tokenizer: Tokenizer,
        target_tokenizer: Tokenizer,
        console: Console,
        *,
        length_penalty: float = 0.6,
        threads: int | None = None,
    ) -> None:
        self._model = model
        self._source_tokenizer = source_tokenizer
        self._target_tokenizer = target_tokenizer
        self._console = console
        self._length_penalty = length_penalty
        self._threads = threads
        self._refused = False

    def __call__(self, folder: Path, texts: Sequence[str], beam_size: int) -> list[str]:
        """Translations with the weights in ``folder``, which ``model`` must have too."""
        options = SearchOptions(beam_size=beam_size, length_penalty=self._length_penalty)
        if not self._refused:
            try:
                return self._with_engine(folder, texts, options)
            except (ImportError, UnsupportedModelError) as error:
                self._refused = True
                self._console.print(f"decoding with the Python search, not the engine: {error}")
        return self._with_search(texts, options)

    def _with_engine(self, folder: Path, texts: Sequence[str], options: SearchOptions) -> list[str]:
        from transformer_ext.inference.translator import Translator

        with Translator(folder, threads=self._threads) as translator:
            return [found.text for found in translator.translate(list(texts), options)]

    def _with_search(self, texts: Sequence[str], options: SearchOptions) -> list[str]:
        eos = self._source_tokenizer.eos_id
        sources = [[*ids, eos] for ids in self._source_tokenizer.encode_batch(list(texts))]
        order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
        outputs = [""] * len(sources)
        training = self._model.training
        self._model.eval()
        for first in range(0, len(order), self._BATCH):
            numbers = order[first : first + self._BATCH]
            found = beam_search(self._model, [sources[i] for i in numbers], options)
            for number, result in zip(numbers, found, strict=True):
                outputs[number] = self._target_tokenizer.decode(result.hypotheses[0].tokens)
        self._model.train(training)
        return outputs


class Scorer:
    """Translates at most some hundred held-out sentences with a checkpoint, and scores them.

    Args:
        pairs: Held-out sentence pairs.
        decoder: Translates.
        console: Where the samples are printed.
        beam_size: Hypotheses kept; 1 is greedy.
        sentences: At most so many are translated, spread evenly over the text.
        samples: How many to print, the same ones each time.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[str, str]],
        decoder: Decoder,
        console: Console,
        *,
        beam_size: int = 1,
        sentences: int = 300,
        samples: int = 2,
    ) -> None:
        self.pairs = [pairs[number] for number in pick_evenly(len(pairs), sentences)]
        self._decoder = decoder
        self._beam_size = beam_size
        self._console = console
        self._samples = pick_samples(self.pairs, samples)

    def __call__(self, directory: Path) -> float | None:
        """BLEU of the checkpoint in ``directory``, 0 to 100; None without a sentence."""
        if not self.pairs:
            return None
        outputs = self._decoder(directory, [src for src, _ in self.pairs], self._beam_size)
        print_samples(self._console, self.pairs, outputs, self._samples)
        return score(outputs, [tgt for _, tgt in self.pairs]).bleu
