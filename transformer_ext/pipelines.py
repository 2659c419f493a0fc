"""``pipeline(task, model)``: text in, results out, in the shape of transformers' pipelines.

A pipeline is a thin face: what computes are :class:`~transformer_ext.inference.translator.Translator`,
:class:`~transformer_ext.inference.continuation.TextGenerator`,
:class:`~transformer_ext.inference.mask_filler.MaskFiller`,
:class:`~transformer_ext.inference.sentence_encoder.SentenceEncoder` and
:class:`~transformer_ext.inference.classifier.TextClassifier`, which say more and cost the same.
"""

from __future__ import annotations

import itertools
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from transformer_ext.config import ConfigError, nearest
from transformer_ext.inference.shared import Closing, is_many
from transformer_ext.inference.text_model import TextError, check_texts, softmax

if TYPE_CHECKING:
    import numpy as np
    import torch

    from transformer_ext.inference.continuation import GeneratedText
    from transformer_ext.inference.options import SearchOptions

#: Inputs that are worked on at once where a pipeline is told no batch size.
_BATCH_SIZE = 256


def pipeline(
    task: str,
    model: str | Path,
    *,
    threads: int | None = None,
    compute_type: str = "float32",
    device: str | int | torch.device = "cpu",
    batch_size: int | None = None,
    **options: Any,
) -> Pipeline:
    """Open a model for a task, to be called with texts.

    ::

        fill = pipeline("fill-mask", "./bert-base-uncased")
        fill("Paris is the [MASK] of France.", top_k=2)

    Args:
        task: ``translation``, ``text-generation``, ``fill-mask``, ``feature-extraction`` or
            ``text-classification``.
        model: model directory of ours, or one of Hugging Face's.
        threads: threads at work on one call; None takes as many as there are physical cores that
            this process may use.
        compute_type: ``float32``, ``bfloat16``, ``int8`` or ``auto``; on another device ``float32``,
            ``bfloat16``, ``float16`` or ``auto``.
        device: ``cpu``, where torch is not imported, or a device of PyTorch's or its name; as
            transformers has it, also the number of a GPU, or -1 for ``cpu``.
        batch_size: most inputs worked on at once; it has no influence on the results.
        options: of the task, for every call that does not have them; see the class of each.

    Raises:
        FileError: no such model, or one that is not for this task.
        TypeError: an unknown option, or a model that is no folder's name.
        ValueError: an unknown task, or an impossible value.
    """
    if not isinstance(task, str) or task not in PIPELINES:
        raise ValueError(
            f"task: got {task!r}, expected one of {', '.join(PIPELINES)}"
            + nearest(str(task), list(PIPELINES))
        )
    if not isinstance(model, (str, Path)):
        raise TypeError(f"model: got {type(model).__name__}, expected the path of a folder")
    return PIPELINES[task](
        model,
        {"threads": threads, "compute_type": compute_type, "device": device},
        _batch_size(batch_size),
        options,
    )


def _batch_size(value: Any) -> int:
    if value is None:
        return _BATCH_SIZE
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"batch_size: got {value!r}, expected an integer of at least 1")
    return value


class Pipeline(Closing, ABC):
    """Base of the pipelines: one input or a list in, one result or a list out.

    Attributes:
        task: its name.
        defaults: options of a call where neither it nor :func:`pipeline` says otherwise.
    """

    task: ClassVar[str]
    defaults: ClassVar[dict[str, Any]]
    #: What one input is, for messages.
    _expected: ClassVar[str] = "a text"

    def __init__(
        self,
        model: str | Path,
        engine: Mapping[str, Any],
        batch_size: int,
        options: Mapping[str, Any],
    ) -> None:
        self._check_options(options, (*engine, "batch_size"))
        self._batch_size = batch_size
        self._given = dict(options)
        self._opened = self._open(model, **engine)

    def _part(self) -> Closing:
        return self._opened

    def __call__(self, inputs: Any, *, batch_size: int | None = None, **options: Any) -> Any:
        """Results of one input or of many.

        Args:
            inputs: one input, a sequence of them, or an iterator, which is read only as its
                results are asked for.
            batch_size: most inputs worked on at once; it has no influence on the results.
            options: those of the task.

        Returns:
            the result of one input, a list of results, or an iterator of them.

        Raises:
            TypeError: inputs of a wrong type, or an unknown option.
            ValueError: an input or an option with a wrong value.
        """
        size = self._batch_size if batch_size is None else _batch_size(batch_size)
        self._check_options(options, ("batch_size",))
        options = {**self._given, **options}
        if self._is_one(inputs):
            (result,) = self._run([inputs], 0, {**self.defaults, **options})
            return self._alone(inputs, result, options)
        if isinstance(inputs, Iterator):
            return self._stream(inputs, size, options)
        if is_many(inputs):
            # All of them before work begins on the first.
            several = list(inputs)
            self._check(several, 0)
            return list(self._stream(iter(several), size, options))
        raise TypeError(
            f"inputs: got {_shown(inputs)}, expected {self._expected}, or a list or an iterator of "
            "such"
        )

    def _stream(self, inputs: Iterator[Any], size: int, options: dict[str, Any]) -> Iterator[Any]:
        begin = 0
        while block := list(itertools.islice(inputs, size)):
            self._check(block, begin)
            try:
                results = self._run(block, begin, {**self.defaults, **options})
            except TextError as error:
                raise TextError(begin + error.number, error.reason, error.name) from None
            for result in results:
                yield self._of_many(result, options)
            begin += len(block)

    def _check(self, inputs: Sequence[Any], begin: int) -> None:
        for number, value in enumerate(inputs, begin):
            if not self._is_one(value):
                raise TypeError(
                    f"inputs: got {_shown(value)} at position {number}, expected {self._expected}"
                )

    def _check_options(self, options: Mapping[str, Any], others: tuple[str, ...]) -> None:
        """Raise a TypeError for what is none; ``others`` may be said beside those of the task."""
        for name, value in options.items():
            if name not in self.defaults:
                known = [*self.defaults, *others]
                raise TypeError(
                    f"{self.task}: unknown option {name!r}{nearest(name, known)}; its options are "
                    f"{', '.join(known)}"
                )
            if isinstance(self.defaults[name], bool) and not isinstance(value, bool):
                raise TypeError(f"{name}: got {value!r:.60}, expected True or False")

    @abstractmethod
    def _open(self, model: str | Path, **engine: Any) -> Closing:
        """Make what does the work."""

    @abstractmethod
    def _run(self, inputs: Sequence[Any], begin: int, options: dict[str, Any]) -> list[Any]:
        """The result of each input.

        Args:
            inputs: a batch of them.
            begin: number of the first among all inputs of the call.
            options: all of the task.
        """

    def _is_one(self, value: Any) -> bool:
        """Whether this is one input."""
        return isinstance(value, str)

    def _alone(self, value: Any, result: Any, given: Mapping[str, Any]) -> Any:
        """What a call with this one input returns; ``given`` are the options without defaults."""
        return result

    def _of_many(self, result: Any, given: Mapping[str, Any]) -> Any:
        """The result of an input among others."""
        return result


def _shown(value: Any) -> str:
    return f"{value!r:.60}" if isinstance(value, dict) else type(value).__name__


#: Search options by the names that transformers' ``generate`` has for them.
_SEARCH = {
    "num_beams": "beam_size",
    "num_return_sequences": "num_hypotheses",
    "max_new_tokens": "max_length",
    "min_new_tokens": "min_length",
    "length_penalty": "length_penalty",
    "early_stopping": "early_stopping",
    "repetition_penalty": "repetition_penalty",
    "no_repeat_ngram_size": "no_repeat_ngram_size",
    "do_sample": "sampling",
    "top_k": "top_k",
    "top_p": "top_p",
    "temperature": "temperature",
    "seed": "seed",
}
#: Rules of stopping by the values of its ``early_stopping``.
_STOPPING: dict[Any, str] = {False: "heuristic", True: "first", "never": "exact"}


def _search_options(base: SearchOptions, given: Mapping[str, Any]) -> SearchOptions:
    """Search options from those of ``generate``, among others; None is as in ``base``.

    Raises:
        ConfigError: a wrong value; the message has the names of ``generate``.
    """
    changes = {ours: given[name] for name, ours in _SEARCH.items() if given[name] is not None}
    if "early_stopping" in changes:
        value = changes["early_stopping"]
        if not isinstance(value, (bool, str)) or value not in _STOPPING:
            raise ConfigError(f"early_stopping: got {value!r}, expected True, False or 'never'")
        changes["early_stopping"] = _STOPPING[value]
    if changes.get("top_k") == 0:
        changes["top_k"] = None
    try:
        return base.replace(**changes)
    except ConfigError as error:
        names = {ours: name for name, ours in _SEARCH.items()}
        message = re.sub(r"\w+", lambda word: names.get(word[0], word[0]), str(error))
        raise ConfigError(message) from None


class TranslationPipeline(Pipeline):
    """``{"translation_text": ...}`` for a text, as transformers 4 had it.

    Options, None being as :class:`~transformer_ext.inference.translator.Translator` has it:
    ``num_beams, num_return_sequences, max_new_tokens, min_new_tokens, length_penalty,
    early_stopping, repetition_penalty, no_repeat_ngram_size``, and ``do_sample`` with ``top_k,
    top_p, temperature, seed``. A single text gives a list of ``num_return_sequences`` results, a
    list of texts one result each, or such a list each if there are more.
    """

    task = "translation"
    defaults: ClassVar = dict.fromkeys(_SEARCH)

    def _open(self, model: str | Path, **engine: Any) -> Closing:
        from transformer_ext.inference.translator import Translator

        self.translator = Translator(model, **engine)
        return self.translator

    def _run(self, inputs: Sequence[str], begin: int, options: dict[str, Any]) -> list[Any]:
        translator = self.translator
        sources = translator.encode(check_texts("texts", inputs))
        over_long = translator.count_over_long(sources)
        if over_long:
            warnings.warn(translator.over_long_message(over_long), stacklevel=3)
        found = translator.translate_ids(
            sources,
            _search_options(translator.options, options),
            numbers=range(begin, begin + len(inputs)),
        )
        return [
            [{"translation_text": h.text} for h in translator.translation(result).hypotheses]
            for result in found
        ]

    def _of_many(self, result: Any, given: Mapping[str, Any]) -> Any:
        return result[0] if given.get("num_return_sequences") in (None, 1) else result


class TextGenerationPipeline(Pipeline):
    """A list of ``num_return_sequences`` times ``{"generated_text": ...}`` for a text.

    Options and defaults are those of transformers: at most ``max_new_tokens`` (256) are sampled
    with ``temperature`` 0.7 among the ``top_k`` (50) best, ``top_p`` 1. With ``do_sample=False``, or
    ``num_beams`` above 1, it is greedy or beam search, by the rules of ``generate``
    (``length_penalty, early_stopping``). ``min_new_tokens, repetition_penalty,
    no_repeat_ngram_size`` are for both. ``return_full_text=False`` leaves the text itself out,
    ``return_tensors=True`` gives ``{"generated_token_ids": [...]}``. The same ``seed`` (0) gives the
    same results. Settings of a folder's ``generation_config.json`` are not taken over; a warning
    names those that ask for something else.
    """

    task = "text-generation"
    defaults: ClassVar = {
        **dict.fromkeys(_SEARCH),
        "max_new_tokens": 256,
        "return_full_text": True,
        "return_tensors": False,
    }

    def _open(self, model: str | Path, **engine: Any) -> Closing:
        from transformer_ext.inference.continuation import TextGenerator

        self.generator = TextGenerator(model, **engine)
        if self.generator.not_used:
            named = ", ".join(
                f"{key} {value!r:.40}" for key, value in self.generator.not_used.items()
            )
            warnings.warn(
                f"{model}: generation_config.json: not taken over: {named}; what there is an option "
                "for can be said to the pipeline",
                stacklevel=4,
            )
        return self.generator

    def _run(self, inputs: Sequence[str], begin: int, options: dict[str, Any]) -> list[Any]:
        from transformer_ext.inference.options import SearchOptions

        options = dict(options)
        several = options["num_beams"] not in (None, 1)
        if options["do_sample"] is None:
            options["do_sample"] = not several
        if options["do_sample"] is True:
            if several:
                raise ConfigError(
                    f"num_beams: got {options['num_beams']} with do_sample, expected 1"
                )
            for name, default in (("temperature", 0.7), ("top_k", 50)):
                options[name] = default if options[name] is None else options[name]
        if options["num_beams"] is None:
            options["num_beams"] = 1
        search = _search_options(SearchOptions.preset("huggingface"), options)
        found = self.generator.generate(inputs, search, numbers=range(begin, begin + len(inputs)))
        if options["return_tensors"]:
            prompts = self.generator.tokenizer.encode_batch(inputs)
            return [
                [{"generated_token_ids": self._tokens(prompt, each)} for each in texts]
                for prompt, texts in zip(prompts, found, strict=True)
            ]
        full = options["return_full_text"]
        # The text as it was given: a tokenizer may write it in another way.
        return [
            [{"generated_text": (text if full else "") + each.continuation} for each in texts]
            for text, texts in zip(inputs, found, strict=True)
        ]

    def _tokens(self, prompt: list[int], found: GeneratedText) -> list[int]:
        from transformer_ext.inference.shared import fed_tokens

        config, hypothesis = self.generator.config, found.hypothesis
        end = [config.eos_id] if hypothesis.stop == "eos" else []
        return [*fed_tokens(config, prompt), *hypothesis.tokens, *end]


class FillMaskPipeline(Pipeline):
    """A list of ``{"score", "token", "token_str", "sequence"}`` for a text with one mask, best first.

    For a text with several masks it is a list of such lists. Options: ``top_k`` (5), ``targets``
    (None: all tokens), ``truncation`` (False).
    """

    task = "fill-mask"
    defaults: ClassVar = {"top_k": 5, "targets": None, "truncation": False}

    def _open(self, model: str | Path, **engine: Any) -> Closing:
        from transformer_ext.inference.mask_filler import MaskFiller

        self.filler = MaskFiller(model, **engine)
        return self.filler

    def __call__(self, inputs: Any, *, batch_size: int | None = None, **options: Any) -> Any:
        """See :meth:`Pipeline.__call__`; a list of one text gives the result of the text."""
        found = super().__call__(inputs, batch_size=batch_size, **options)
        # As transformers has it.
        return found[0] if isinstance(inputs, list) and len(inputs) == 1 else found

    def _run(self, inputs: Sequence[str], begin: int, options: dict[str, Any]) -> list[Any]:
        targets = options["targets"]
        found = self.filler(
            inputs,
            top_k=options["top_k"],
            targets=[targets] if isinstance(targets, str) else targets,
            truncation=options["truncation"],
        )
        results: list[Any] = []
        for masks in found:
            rows = [[filling.as_dict() for filling in fillings] for fillings in masks]
            results.append(rows[0] if len(rows) == 1 else rows)
        return results


class FeatureExtractionPipeline(Pipeline):
    """The state of each token of a text, start and end included: nested lists, ``[1][tokens][d]``.

    Options: ``return_tensors`` (False; True gives float32 arrays ``[1, tokens, d]``), ``truncation``
    (False). One vector a text, and many texts in one array, are what
    :class:`~transformer_ext.inference.sentence_encoder.SentenceEncoder` gives.
    """

    task = "feature-extraction"
    defaults: ClassVar = {"return_tensors": False, "truncation": False}

    def _open(self, model: str | Path, **engine: Any) -> Closing:
        from transformer_ext.inference.sentence_encoder import SentenceEncoder

        self.encoder = SentenceEncoder(model, **engine)
        return self.encoder

    def _run(self, inputs: Sequence[str], begin: int, options: dict[str, Any]) -> list[Any]:
        states = self.encoder.states(inputs, truncation=options["truncation"])
        if options["return_tensors"]:
            return [state[None] for state in states]
        return [[state.tolist()] for state in states]


class TextClassificationPipeline(Pipeline):
    """``{"label", "score"}`` of the best label of a text.

    With ``top_k`` a list of the best so many, of all labels where it is None.
    ``function_to_apply`` makes scores of what the model gives: ``softmax`` (default), ``sigmoid``
    (default where there is one label) or ``none``. ``truncation`` is False. A pair of texts is
    ``{"text": ..., "text_pair": ...}``.
    """

    task = "text-classification"
    defaults: ClassVar = {"top_k": 1, "function_to_apply": None, "truncation": False}
    _expected = "a text or {'text': ..., 'text_pair': ...}"

    def _open(self, model: str | Path, **engine: Any) -> Closing:
        from transformer_ext.inference.classifier import TextClassifier

        self.classifier = TextClassifier(model, **engine)
        return self.classifier

    def _is_one(self, value: Any) -> bool:
        if not isinstance(value, dict):
            return isinstance(value, str)
        known = "text" in value and value.keys() <= {"text", "text_pair"}
        return known and all(isinstance(text, str) for text in value.values())

    def _run(self, inputs: Sequence[Any], begin: int, options: dict[str, Any]) -> list[Any]:
        labels, top_k = self.classifier.labels, options["top_k"]
        if top_k is not None and (type(top_k) is not int or top_k < 1):
            raise ValueError(f"top_k: got {top_k!r}, expected an integer of at least 1, or None")
        function = options["function_to_apply"] or ("sigmoid" if len(labels) == 1 else "softmax")
        if not isinstance(function, str) or function not in _FUNCTIONS:
            raise ValueError(
                f"function_to_apply: got {function!r}, expected one of {', '.join(_FUNCTIONS)}"
            )
        pairs = [value if isinstance(value, dict) else {"text": value} for value in inputs]
        scores = self.classifier.scores(
            [pair["text"] for pair in pairs],
            [pair.get("text_pair") for pair in pairs],
            truncation=options["truncation"],
        )
        return [
            [
                {"label": labels[number], "score": float(row[number])}
                for number in (-row).argsort(kind="stable")[:top_k].tolist()
            ]
            for row in _FUNCTIONS[function](scores)
        ]

    def _alone(self, value: Any, result: Any, given: Mapping[str, Any]) -> Any:
        # As transformers has it: a list for a text, none for a pair.
        return result[0] if isinstance(value, dict) and "top_k" not in given else result

    def _of_many(self, result: Any, given: Mapping[str, Any]) -> Any:
        return result if "top_k" in given else result[0]


def _sigmoid(scores: np.ndarray) -> np.ndarray:
    import numpy as np

    # Whichever sign, exp of a number not above 0.
    small = np.exp(-np.abs(scores))
    return np.where(scores < 0, small, 1) / (1 + small)


_FUNCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "softmax": softmax,
    "sigmoid": _sigmoid,
    "none": lambda scores: scores,
}

#: The pipelines by the name of their task.
PIPELINES: dict[str, type[Pipeline]] = {
    kind.task: kind
    for kind in (
        TranslationPipeline,
        TextGenerationPipeline,
        FillMaskPipeline,
        FeatureExtractionPipeline,
        TextClassificationPipeline,
    )
}
