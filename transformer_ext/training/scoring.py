"""Translations during and after training: BLEU of held-out text, and samples beside references.

On the CPU the compiled engine translates where it knows the model. On another device, and with a
part of the user's own that the engine does not know, the model in memory does, by the search with a
cache, or by the plain one, which runs any model.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from transformer_ext.data.batches import pick_evenly
from transformer_ext.data.tokenizer import Tokenizer
from transformer_ext.inference.engine import UnsupportedModelError
from transformer_ext.inference.options import SearchOptions
from transformer_ext.inference.search import beam_search
from transformer_ext.training.report import Console

if TYPE_CHECKING:
    import torch

    from transformer_ext.model import Transformer

__all__ = [
    "Comparison",
    "Decoder",
    "Judged",
    "Scorer",
    "Scores",
    "compare",
    "pick_samples",
    "print_samples",
    "score",
]


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


@dataclass(frozen=True)
class Judged:
    """One figure of one system of a :class:`Comparison`.

    Attributes:
        score: of all sentences, 0 to 100.
        mean: of the resamples.
        interval: half of their 95 % interval's width, to either side of the mean.
        p_value: how often chance alone makes a difference from the baseline as large as this one;
            None for the baseline itself, 1 where the translations are the same.
    """

    score: float
    mean: float
    interval: float
    p_value: float | None


@dataclass(frozen=True)
class Comparison:
    """sacreBLEU's paired bootstrap of several systems; figures in the order of the systems."""

    bleu: list[Judged]
    bleu_signature: str
    chrf: list[Judged]
    chrf_signature: str


def compare(
    systems: Sequence[Sequence[str]], references: Sequence[str], samples: int = 1000, seed: int = 1
) -> Comparison:
    """Whether systems differ from the first of them by more than chance, in BLEU and chrF.

    sacreBLEU's paired bootstrap resampling (Koehn 2004): both systems are scored on the same
    sentences, drawn with replacement, many times.

    Args:
        systems: Translations of each system, the baseline first, as many as there are references.
        references: Reference translations.
        samples: Resamples; all together hold 80 bytes for each sentence of each.
        seed: Of the resampling, above 0.

    Raises:
        ValueError: Numbers out of range, lists of unequal length, or too little memory.
    """
    from sacrebleu.metrics import BLEU, CHRF
    from sacrebleu.significance import PairedTest

    if samples < 1 or seed < 1:
        raise ValueError(f"samples, seed: got {samples} and {seed}, expected integers above 0")
    if len(systems) < 2:
        raise ValueError(f"systems: got {len(systems)}, expected 2 or more")
    for number, outputs in enumerate(systems):
        if len(outputs) != len(references):
            raise ValueError(
                f"systems: number {number} has {len(outputs)} translations, "
                f"expected {len(references)}, as many as there are references"
            )
    try:
        with _sacrebleu_seed(seed):
            signatures, table = PairedTest(
                # sacreBLEU takes the same name for the same system.
                [(str(number), list(outputs)) for number, outputs in enumerate(systems)],
                {"BLEU": BLEU(), "chrF": CHRF()},
                [list(references)],
                test_type="bs",
                n_samples=samples,
            )()
    except MemoryError:
        raise ValueError(
            f"samples: {samples} resamples of {len(references)} sentences do not fit into memory"
        ) from None

    def judged(name: str) -> list[Judged]:
        found = []
        for outputs, result in zip(systems, table[name], strict=True):
            assert not isinstance(result, str)
            assert result.mean is not None and result.ci is not None
            p_value = result.p_value
            # sacreBLEU counts strictly larger differences, of which two equal systems have none.
            if p_value is not None and list(outputs) == list(systems[0]):
                p_value = 1.0
            # numpy's float32 among them, which JSON does not take.
            found.append(Judged(float(result.score), float(result.mean), float(result.ci), p_value))
        return found

    # chrF's name has its beta: chrF2.
    bleu, chrf = (key for key in table if key != "System")
    return Comparison(judged(bleu), str(signatures[bleu]), judged(chrf), str(signatures[chrf]))


@contextlib.contextmanager
def _sacrebleu_seed(seed: int) -> Iterator[None]:
    """sacreBLEU takes its seed from the environment alone."""
    before = os.environ.get("SACREBLEU_SEED")
    os.environ["SACREBLEU_SEED"] = str(seed)
    try:
        yield
    finally:
        if before is None:
            del os.environ["SACREBLEU_SEED"]
        else:
            os.environ["SACREBLEU_SEED"] = before


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
    """Translates with a model directory, or with the model in memory, on its device.

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
        self._warnings: set[str] = set()

    @property
    def refused(self) -> bool:
        """Whether no engine knows the model, so that only that in memory can translate."""
        return self._refused

    @property
    def in_memory(self) -> bool:
        """Whether the model translates where it is, without a folder of its weights."""
        return self._refused or self._device.type != "cpu"

    @property
    def _device(self) -> torch.device:
        return next(self._model.parameters()).device

    def __call__(self, folder: Path | None, texts: Sequence[str], beam_size: int) -> list[str]:
        """Translations with the weights in ``folder``; None, or a model that no engine knows: with
        those that ``model`` has."""
        options = SearchOptions(beam_size=beam_size, length_penalty=self._length_penalty)
        if folder is not None and not self._refused:
            try:
                return self._with_engine(folder, texts, options)
            except (ImportError, UnsupportedModelError) as error:
                self._refused = True
                self._console.print(f"decoding with the model in memory, not the engine: {error}")
        return self._with_model(texts, options)

    def _with_engine(self, folder: Path, texts: Sequence[str], options: SearchOptions) -> list[str]:
        from transformer_ext.inference.translator import Translator

        device = str(self._device)
        with Translator(
            folder,
            threads=self._threads if device == "cpu" else None,
            compute_type="float32" if device == "cpu" else self._precision,
            device=device,
        ) as translator:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                found = translator.translate(list(texts), options)
        for warning in caught:
            message = str(warning.message)
            # Each validation has the same texts.
            if message not in self._warnings:
                self._warnings.add(message)
                self._console.print(f"warning: {message}")
        return [translation.text for translation in found]

    @property
    def _precision(self) -> str:
        return str(self._model.activation_dtype).removeprefix("torch.")

    def _with_model(self, texts: Sequence[str], options: SearchOptions) -> list[str]:
        from transformer_ext.inference.torch_engine import TorchEngine

        eos = self._source_tokenizer.eos_id
        sources = [[*ids, eos] for ids in self._source_tokenizer.encode_batch(list(texts))]
        try:
            engine = TorchEngine(self._model)
        except UnsupportedModelError:
            return self._with_search(sources, options)
        decode = self._target_tokenizer.decode
        return [decode(found.hypotheses[0].tokens) for found in engine.search(sources, options)]

    def _with_search(self, sources: Sequence[list[int]], options: SearchOptions) -> list[str]:
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

    def __call__(self, directory: Path | None) -> dict[str, float]:
        """BLEU and chrF of the model in ``directory``, 0 to 100; nothing without a sentence.

        Without a directory the model in memory is judged.
        """
        if not self.pairs:
            return {}
        outputs = self._decoder(directory, [src for src, _ in self.pairs], self._beam_size)
        print_samples(self._console, self.pairs, outputs, self._samples)
        scores = score(outputs, [tgt for _, tgt in self.pairs])
        return {"bleu": scores.bleu, "chrf": scores.chrf}
