"""Texts that a language model writes: continuations of a beginning, greedy, sampled or by beam."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from transformer_ext.files import load_model_dir, naming_damage
from transformer_ext.inference.language_engine import LanguageModelEngine
from transformer_ext.inference.options import (
    Hypothesis,
    SearchOptions,
    SearchResult,
    chosen_options,
)
from transformer_ext.inference.shared import (
    Closing,
    at_once,
    continuation_limits,
    device_name,
    fed_tokens,
    never_proposed,
    torch_compute_type,
)
from transformer_ext.inference.text_model import check_iterable, check_texts
from transformer_ext.model.config import LanguageModelConfig

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from transformer_ext.inference.search import Observer
    from transformer_ext.inference.torch_engine import TorchLanguageModel
    from transformer_ext.model.language_model import LanguageModel

__all__ = ["GeneratedText", "TextGenerator", "continuations"]


def continuations(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    options: SearchOptions | None = None,
    *,
    numbers: Sequence[int] | None = None,
    observe: Observer | None = None,
) -> list[SearchResult]:
    """What :meth:`LanguageModelEngine.search` finds, with a torch model, in plain Python.

    No cache is kept: time grows with the square of the length.

    Args:
        model: the language model, on any device; put it in evaluation mode before.
        prompts: see there, as for the other arguments.
        options: see there.
        numbers: see there.
        observe: is called after each step with the number of the prompt and its search.

    Returns:
        a result for each prompt, with the new tokens only.

    Raises:
        ValueError: see there.
    """
    import torch

    from transformer_ext.inference.search import check_ids, search

    options = chosen_options(options)
    config = model.config
    for prompt in prompts:
        check_ids("prompt ids", prompt, config.vocab_size)
    check_ids("suppressed_tokens", options.suppressed_tokens, config.vocab_size)
    device = next(model.parameters()).device
    fed = [fed_tokens(config, prompt) for prompt in prompts]

    def step(rows: list[int], prefixes: NDArray[np.int64]) -> Any:
        ids = torch.from_numpy(prefixes).to(device)
        return model.next_log_probs(ids, normalize=not options.penalty_on_logits).cpu().numpy()

    with torch.inference_mode():
        return search(
            step,
            continuation_limits(config, options, fed, numbers),
            options,
            start_id=None,
            eos_id=config.eos_id,
            suppressed=never_proposed(config),
            prompts=fed,
            numbers=numbers,
            observe=observe,
        )


@dataclass(frozen=True)
class GeneratedText:
    """One continuation of a text.

    Attributes:
        text: the whole, beginning included.
        continuation: what was added: ``text`` without the beginning, as the tokenizer writes that.
        hypothesis: new tokens, score, and why they end.
    """

    text: str
    continuation: str
    hypothesis: Hypothesis


class TextGenerator(Closing):
    """A language model from its directory, on text.

    ::

        with TextGenerator("runs/my-model") as generator:
            print(generator("The cat", max_length=20))

    Any number of threads may call one generator at once.

    Args:
        folder: model directory of ``python -m transformer_ext.train --task language-model``, or any
            other that holds a language model.
        threads: see :class:`LanguageModelEngine`; of the CPU.
        compute_type: see there; of the CPU.
        device: another device of PyTorch's than ``cpu``, or its name, computes in torch, in ``float32``, ``bfloat16``,
            ``float16`` or ``auto``.

    Attributes:
        config: of the model.
        tokenizer: its tokenizer.
        not_used: settings of the folder's ``generation_config.json`` that nobody here follows.

    Raises:
        FileError: no such model, or one of another kind.
        ValueError: see :class:`LanguageModelEngine`.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        threads: int | None = None,
        compute_type: str = "float32",
        device: str | int | torch.device = "cpu",
    ) -> None:
        saved = load_model_dir(folder, LanguageModelConfig)
        self._folder = saved.path
        self.config = saved.config
        self.tokenizer = saved.source_tokenizer
        self.not_used: dict[str, Any] = dict(saved.training.get("generation_not_used") or {})
        self._engine: LanguageModelEngine | TorchLanguageModel
        device = device_name(device)
        if device == "cpu":
            self._engine = LanguageModelEngine(
                saved.config, saved.weights, threads=threads, compute_type=compute_type
            )
        else:
            compute_type = torch_compute_type(threads, compute_type, device)
            from transformer_ext.inference.torch_engine import TorchLanguageModel

            self._engine = TorchLanguageModel.of_weights(
                saved.config, saved.weights, device, compute_type
            )

    def search(
        self,
        prompts: Sequence[Sequence[int]],
        options: SearchOptions | None = None,
        *,
        numbers: Sequence[int] | None = None,
        batch_size: int | None = None,
        batch_tokens: int | None = None,
        **changes: Any,
    ) -> list[SearchResult]:
        """On token ids: see :meth:`LanguageModelEngine.search`; batches are as large as suits the
        device where nothing is said. ``changes`` are single search options."""
        with naming_damage([self._folder]):
            return self._engine.search(
                prompts,
                chosen_options(options, **changes),
                numbers=numbers,
                **at_once(batch_size, batch_tokens),
            )

    @overload
    def generate(
        self,
        beginnings: str,
        options: SearchOptions | None = None,
        *,
        numbers: Sequence[int] | None = None,
        batch_size: int | None = None,
        batch_tokens: int | None = None,
        **changes: Any,
    ) -> list[GeneratedText]: ...

    @overload
    def generate(
        self,
        beginnings: Iterable[str],
        options: SearchOptions | None = None,
        *,
        numbers: Sequence[int] | None = None,
        batch_size: int | None = None,
        batch_tokens: int | None = None,
        **changes: Any,
    ) -> list[list[GeneratedText]]: ...

    def generate(
        self,
        beginnings: str | Iterable[str],
        options: SearchOptions | None = None,
        *,
        numbers: Sequence[int] | None = None,
        batch_size: int | None = None,
        batch_tokens: int | None = None,
        **changes: Any,
    ) -> list[GeneratedText] | list[list[GeneratedText]]:
        """Continuations of a text, or of each of many, best first.

        Args:
            beginnings: one text or many, possibly empty.
            options: see :meth:`LanguageModelEngine.search`; greedy if None.
            numbers: see there.
            batch_size: see there.
            batch_tokens: see there.
            changes: single search options, as ``max_length=20``.

        Returns:
            a list for one text, a list of such for many.

        Raises:
            ConfigError: an unknown search option, or a wrong value.
            TypeError: neither a text nor a sequence of texts.
            ValueError: see there; a text with half a character.
        """
        several = [beginnings] if isinstance(beginnings, str) else beginnings
        check_iterable("beginnings", several, "a text or a sequence of texts")
        ids = self.tokenizer.encode_batch(check_texts("beginnings", several))
        found = self.search(
            ids,
            chosen_options(options, SearchOptions(beam_size=1), **changes),
            numbers=numbers,
            batch_size=batch_size,
            batch_tokens=batch_tokens,
        )
        texts = []
        for prompt, result in zip(ids, found, strict=True):
            # As a whole: pieces of a tokenizer do not always say alone what they say behind others.
            start = self.tokenizer.decode(prompt)
            whole = [self.tokenizer.decode([*prompt, *h.tokens]) for h in result.hypotheses]
            texts.append(
                [
                    GeneratedText(text, text[len(start) :], hypothesis)
                    for text, hypothesis in zip(whole, result.hypotheses, strict=True)
                ]
            )
        return texts[0] if isinstance(beginnings, str) else texts

    @overload
    def __call__(
        self, beginnings: str, options: SearchOptions | None = None, **arguments: Any
    ) -> str: ...

    @overload
    def __call__(
        self, beginnings: Iterable[str], options: SearchOptions | None = None, **arguments: Any
    ) -> list[str]: ...

    def __call__(
        self,
        beginnings: str | Iterable[str],
        options: SearchOptions | None = None,
        **arguments: Any,
    ) -> str | list[str]:
        """The best continuation of a text, or of each of many, the beginning included.

        Arguments and errors are those of :meth:`generate`.
        """
        if isinstance(beginnings, str):
            return self.generate(beginnings, options, **arguments)[0].text
        return [texts[0].text for texts in self.generate(beginnings, options, **arguments)]

    def _part(self) -> Closing:
        return self._engine
