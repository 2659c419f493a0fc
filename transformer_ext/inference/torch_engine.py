"""Models in PyTorch with the methods of the compiled engines: on any device, and while the model is
still being trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from transformer_ext.inference.compiled import (
    UnsupportedModelError,
    batches_by_length,
    check_weights_known,
    integer_rows,
    integers,
)
from transformer_ext.inference.options import (
    BATCH_SIZES,
    SearchOptions,
    SearchResult,
    chosen_options,
)
from transformer_ext.inference.shared import (
    Closing,
    attention_layer,
    check_ensemble,
    check_source_lengths,
    continuation_limits,
    empty_result,
    fed_tokens,
    never_proposed,
    torch_compute_type,
)
from transformer_ext.inference.torch_search import Decoding, Task, TorchSearch, room_at_first
from transformer_ext.model.attention import CrossAttention, DenseAttention, SelfAttention
from transformer_ext.model.cache import DecoderCache, Slots
from transformer_ext.model.config import LanguageModelConfig, TransformerConfig
from transformer_ext.model.language_model import LanguageModel
from transformer_ext.model.stacks import Decoder, DecoderLayer, EncoderLayer, SelfAttentionStack
from transformer_ext.model.trace import Trace
from transformer_ext.model.transformer import Transformer
from transformer_ext.ops._check import guard
from transformer_ext.packed import Packed

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from transformer_ext.model.config import ModelConfig

#: Most sentences, and most source tokens (of a language model, most tokens of prompts and of what may
#: follow), that are decoded together where a call does not say otherwise.
BATCH_SIZE = BATCH_SIZES[1]
BATCH_TOKENS = 32768
LANGUAGE_MODEL_BATCH_TOKENS = 65536

#: What a batch may take of the device's memory, in bytes, and of what is free there on a GPU.
_MOST_BYTES = 8 << 30
_SHARE_OF_FREE = 0.5

#: Rows whose scores over the vocabulary are in memory at once where given tokens are scored.
_SCORED_ROWS = 2048

ModelT = TypeVar("ModelT", Transformer, LanguageModel)


def bytes_per_hypothesis(
    config: TransformerConfig | LanguageModelConfig,
    tokens: int,
    element_size: int,
    *,
    sorted_vocabulary: bool = False,
) -> int:
    """What a hypothesis takes while it is searched for.

    Keys and values of its tokens, and once more those of one layer, which may have to be gathered;
    five rows over the vocabulary, and where all of it is sorted, with sums of probabilities in
    float64, those as well.

    Args:
        config: of a model with a decoder.
        tokens: that it may hold, those before the output included.
        element_size: bytes of an activation.
        sorted_vocabulary: whether any token may be drawn, see :func:`_sorts_vocabulary`.
    """
    if isinstance(config, TransformerConfig):
        layers, vocabulary = config.num_decoder_layers, config.tgt_vocab_size
    else:
        layers, vocabulary = config.num_layers, config.vocab_size
    token = 2 * config.num_kv_heads * config.head_dim * element_size
    return int((layers + 1) * tokens * token + (72 if sorted_vocabulary else 20) * vocabulary)


def _sorts_vocabulary(options: SearchOptions) -> bool:
    """Whether a step sorts all scores of a hypothesis."""
    return options.sampling and options.top_k is None


class _TorchModels(Closing, Generic[ModelT]):
    """One model, or an ensemble.

    Args:
        models: on one device.

    Raises:
        UnsupportedModelError: one has a part of its own that a cache does not go through.
    """

    #: Class of the models, and what of them a step with a cache stands for.
    _KIND: type[ModelT]
    _BYPASSED: tuple[str, ...] = ()

    def __init__(self, models: ModelT | Sequence[ModelT]) -> None:
        self.models: list[ModelT] = list(models) if isinstance(models, Sequence) else [models]
        if not self.models:
            raise ValueError("models: got none, expected at least one")
        for model in self.models:
            self._check(model)
        self._configs: list[Any] = [model.config for model in self.models]

    def _check(self, model: ModelT) -> None:
        kind = self._KIND
        own = [
            name for name in self._BYPASSED if getattr(type(model), name) is not getattr(kind, name)
        ]
        if own:
            raise UnsupportedModelError(
                f"{type(model).__name__} has a {own[0]} of its own, which a search with a cache does "
                "not call"
            )
        # Position-wise parts may be anything: one token at a time is all that they see.
        ours = (
            Decoder,
            SelfAttentionStack,
            DecoderLayer,
            EncoderLayer,
            SelfAttention,
            CrossAttention,
        )
        stack: nn.Module = model.decoder
        parts = [("decoder", stack), *_attending(stack)]
        for name, part in parts:
            known = next((cls for cls in ours if isinstance(part, cls)), None)
            if known is None or type(part).forward is not known.forward:
                raise UnsupportedModelError(
                    f"the model has a part that a search with a cache does not know: {name} is a "
                    f"{type(part).__name__}"
                )

    @property
    def config(self) -> Any:
        """Of the first model."""
        return self._configs[0]

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return next(self.models[0].parameters()).device

    @property
    def positions(self) -> int | None:
        """Longest sequence that the models have positions for; None: any."""
        limits = [config.longest for config in self._configs if config.longest is not None]
        return min(limits, default=None)

    @property
    def threads(self) -> int:
        """Threads at work on one call, as far as they are the host's."""
        return 1

    @property
    def compute_type(self) -> str:
        """Of the activations."""
        return str(self.models[0].activation_dtype).removeprefix("torch.")

    def _forget(self) -> None:
        self.models = []

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """In evaluation mode, without gradients."""
        self._check_open()
        training = [model.training for model in self.models]
        for model in self.models:
            model.eval()
        try:
            with torch.inference_mode():
                yield
        finally:
            for model, was in zip(self.models, training, strict=True):
                if was:
                    model.train()

    def _room(self) -> float:
        """Bytes that a batch may take."""
        room = float(_MOST_BYTES)
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            if _SHARE_OF_FREE * free < room:
                # What torch keeps of earlier work can be had, but for what CUDA graphs of a training
                # hold, and it does not tell one from the other.
                torch.cuda.empty_cache()
                free, _ = torch.cuda.mem_get_info(self.device)
            room = min(room, _SHARE_OF_FREE * free)
        return room

    def _most_at_once(
        self, room: float, options: SearchOptions, tokens: int, memory: int = 0
    ) -> int:
        """How many sentences fit into memory.

        Args:
            room: bytes that they may take.
            options: of the search.
            tokens: that a hypothesis may hold.
            memory: tokens of the source.
        """
        size = 0
        width = options.num_hypotheses if options.sampling else options.beam_size
        every = _sorts_vocabulary(options)
        for model in self.models:
            element = torch.empty(0, dtype=model.activation_dtype).element_size()
            size += width * bytes_per_hypothesis(
                model.config, tokens, element, sorted_vocabulary=every
            )
            size += bytes_per_hypothesis(model.config, memory, element) if memory else 0
        return max(1, int(room // size))

    def _decoding(
        self,
        slots: Slots,
        caches: Sequence[DecoderCache],
        prompt: int,
        most: int,
    ) -> Decoding:
        """How a search steps through the models.

        Args:
            slots: of the hypotheses.
            caches: of the models.
            prompt: tokens of the longest prompt.
            most: tokens that the longest hypothesis can have, its prompt counted.
        """

        def step(tokens: Tensor, longest: int) -> tuple[Tensor, Tensor | None]:
            slots.begin_step(slots.positions_for(prompt - 1 + longest))
            scores, attentions = [], []
            for model, cache in zip(self.models, caches, strict=True):
                scores.append(model.generator.logits(model.decode_step(tokens, cache)))
                if cache.traced is not None:
                    weights = cache.trace.attentions[cache.traced].weights
                    attentions.append(weights.float().mean(1).flatten(0, 1))
            if len(scores) == 1:
                return scores[0], attentions[0] if attentions else None
            columns = [row.double().log_softmax(1) for row in scores]
            mean = torch.stack(columns).logsumexp(0) - math.log(len(columns))
            return mean, torch.stack(attentions).mean(0) if attentions else None

        def keep(sentences: Tensor) -> None:
            for cache in caches:
                cache.keep(sentences)
            slots.keep(sentences)

        def grow(steps: int) -> None:
            capacity = min(most, prompt - 1 + steps)
            for cache in caches:
                cache.grow(capacity)
            slots.grow(capacity)

        return Decoding(step, slots.end_step, keep, grow)

    def _search(
        self,
        tasks: Sequence[Task],
        options: SearchOptions,
        prompt_lengths: Sequence[int],
        make_caches: Callable[[Slots], Sequence[DecoderCache]],
    ) -> list[SearchResult]:
        """One batch."""
        width = options.num_hypotheses if options.sampling else options.beam_size
        prompt = max(prompt_lengths)
        # The last token found is not fed.
        most = max(p - 1 + t.limit for p, t in zip(prompt_lengths, tasks, strict=True))
        slots = Slots(
            prompt_lengths,
            width,
            min(most, prompt - 1 + room_at_first([task.limit for task in tasks])),
            self.device,
        )
        return TorchSearch(
            self._decoding(slots, make_caches(slots), prompt, most),
            tasks,
            options,
            eos_id=self.config.eos_id,
            suppressed=sorted(never_proposed(self.config)),
            device=self.device,
        ).run()

    def _in_memory(
        self, batch: list[int], search: Callable[[list[int]], list[SearchResult]]
    ) -> list[SearchResult]:
        """What is found for a batch, in halves where the device has not the memory for all of it."""
        try:
            return search(batch)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
        # Not in the handler: until it is left, the error keeps what the batch has allocated.
        torch.cuda.empty_cache()
        half = len(batch) // 2
        return self._in_memory(batch[:half], search) + self._in_memory(batch[half:], search)

    def _flat(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Packed]:
        """Ids behind one another, and where they lie."""
        ids = torch.tensor([i for row in rows for i in row], dtype=torch.int64)
        packed = Packed.from_lengths([len(row) for row in rows])
        return ids.to(self.device), packed.to(self.device)


def _attending(stack: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The parts of a stack that are told what may attend to what, by name."""
    for number, layer in enumerate(getattr(stack, "layers", [])):
        yield f"decoder.layers.{number}", layer
        for name in ("self_attention", "cross_attention"):
            part = getattr(layer, name, None)
            if part is not None:
                yield f"decoder.layers.{number}.{name}", part


class TorchEngine(_TorchModels[Transformer]):
    """Encoder-decoders on lists of ids, on the device that they are on.

    Arguments, results and errors are those of :class:`~transformer_ext.inference.engine.Engine`;
    ids are the same but where two continuations are as good as equal, as sums have another order.

    Args:
        models: a model, or several as an ensemble; they may be in training.

    Raises:
        UnsupportedModelError: one has a part of its own that a search with a cache does not know.
    """

    _KIND = Transformer
    _BYPASSED = ("decode_packed", "next_log_probs", "decode_step", "_decode_dense")

    def __init__(self, models: Transformer | Sequence[Transformer]) -> None:
        super().__init__(models)
        check_ensemble(self._configs)

    @classmethod
    def of_weights(
        cls,
        models: Sequence[tuple[ModelConfig, Mapping[str, np.ndarray]]],
        device: str,
        compute_type: str,
    ) -> TorchEngine:
        """Of model directories, on a device.

        Args:
            models: architecture and weights of each.
            device: of PyTorch's.
            compute_type: of the activations, see
                :func:`~transformer_ext.inference.shared.torch_compute_type`.

        Raises:
            UnsupportedModelError: the weights are those of a model with a part of its own.
        """
        return cls([_loaded(Transformer, *model, device, compute_type) for model in models])

    def search(
        self,
        sources: Sequence[Sequence[int]],
        options: SearchOptions | None = None,
        *,
        prefixes: Sequence[Sequence[int]] | None = None,
        numbers: Sequence[int] | None = None,
        batch_size: int = BATCH_SIZE,
        batch_tokens: int = BATCH_TOKENS,
    ) -> list[SearchResult]:
        """Beam search, or sampling: see :meth:`Engine.search`. A batch has fewer sentences where its
        keys and values would not fit into memory."""
        options = chosen_options(options)
        config = self.config
        given = integer_rows("sources", sources, config.src_vocab_size - 1)
        begins = [[] for _ in given] if prefixes is None else prefixes
        begins = integer_rows("prefixes", begins, config.tgt_vocab_size - 1)
        numbers = range(len(given)) if numbers is None else integers("numbers", numbers, 2**64 - 1)
        for name, values in (("prefixes", begins), ("numbers", numbers)):
            if len(values) != len(given):
                raise ValueError(
                    f"{name}: got {len(values)}, expected one for each of the {len(given)} sources"
                )
        _check_suppressed(options, config.tgt_vocab_size)
        layers = [attention_layer(options, config) for config in self._configs]
        check_source_lengths(given, options.max_source_length)
        self._check_positions(given)
        results = [empty_result(options) for _ in given]

        def most(longest: int) -> int:
            limit = options.length_limit(longest, self.positions)
            return self._most_at_once(room, options, limit, longest)

        def search(batch: list[int]) -> list[SearchResult]:
            lengths = [len(given[i]) for i in batch]
            tasks = [
                Task(
                    limit=options.length_limit(length, self.positions),
                    minimum=options.length_minimum(length),
                    number=numbers[i],
                    fed=config.decoder_start_id,
                    prefix=begins[i],
                    source_length=length,
                )
                for i, length in zip(batch, lengths, strict=True)
            ]
            for task in tasks:
                _check_prefix(task)
            sentences = [given[i] for i in batch]

            def make_caches(slots: Slots) -> Any:
                return self._encoded(slots, sentences, layers)

            return self._search(tasks, options, [1] * len(batch), make_caches)

        with self._at_work():
            room = self._room()
            for batch in batches_by_length(given, batch_size, batch_tokens, most):
                found = self._in_memory(batch, search)
                for i, result in zip(batch, found, strict=True):
                    results[i] = result
        return results

    def _check_positions(self, sources: Sequence[Sequence[int]]) -> None:
        most = self.positions
        longest = max((len(source) for source in sources), default=0)
        if most is not None and longest > most:
            raise ValueError(
                f"a sequence of {longest} tokens is longer than the {most} learned positions of this "
                "model (max_positions)"
            )

    def _encoded(
        self, slots: Slots, sources: list[list[int]], layers: Sequence[int | None]
    ) -> list[DecoderCache]:
        ids, packed = self._flat(sources)
        caches = []
        for model, layer in zip(self.models, layers, strict=True):
            memory = packed.unpack(model.encode_packed(ids, packed))
            traced = None if layer is None else f"decoder.layers.{layer}.cross_attention"
            caches.append(DecoderCache(slots, memory, packed.lengths, traced))
        return caches

    def score(
        self,
        sources: Sequence[Sequence[int]],
        targets: Sequence[Sequence[int]],
        *,
        batch_size: int = BATCH_SIZE,
        batch_tokens: int = BATCH_TOKENS,
    ) -> list[list[float]]:
        """Log-probability of each token of given targets: see :meth:`Engine.score`."""
        scores: list[list[float]] = [[] for _ in sources]
        for batch, src, tgt, given in self._pairs(sources, targets, batch_size, batch_tokens):
            of_models = []
            for model in self.models:
                memory = model.encode_packed(src[0], src[1])
                hidden = model.decode_packed(tgt[0], tgt[1], memory, src[1])
                of_models.append(_of_given(model.generator, hidden, given[0]))
            _split(_mean(of_models), [len(targets[i]) for i in batch], batch, scores)
        return scores

    def align(
        self,
        sources: Sequence[Sequence[int]],
        targets: Sequence[Sequence[int]],
        *,
        layer: int | None = None,
        batch_size: int = BATCH_SIZE,
        batch_tokens: int = BATCH_TOKENS,
    ) -> list[tuple[list[float], NDArray[np.float32]]]:
        """:meth:`score`, with what each token attends to: see :meth:`Engine.align`."""
        import numpy as np

        asked = SearchOptions(return_attention=True, attention_layer=layer)
        layers = [attention_layer(asked, config) for config in self._configs]
        scores: list[list[float]] = [[] for _ in sources]
        attentions = [np.zeros((0, len(source)), np.float32) for source in sources]
        # All heads of all layers are in memory at once.
        narrow = min(batch_size, 32)
        for batch, src, tgt, given in self._pairs(sources, targets, narrow, batch_tokens):
            of_models, weights = [], []
            for model, number in zip(self.models, layers, strict=True):
                memory = src[1].unpack(model.encode_packed(src[0], src[1]))
                columns = torch.arange(memory.shape[1], device=memory.device)
                mask = (columns < src[1].lengths[:, None])[:, None, None, :]
                trace = Trace()
                hidden = model._decode_dense(
                    tgt[1].unpack(tgt[0]),
                    memory,
                    DenseAttention(causal=True),
                    DenseAttention(mask, trace=trace),
                )
                of_models.append(_of_given(model.generator, tgt[1].pack(hidden), given[0]))
                name = f"decoder.layers.{number}.cross_attention"
                weights.append(trace.attentions[name].weights.float().mean(1))
            _split(_mean(of_models), [len(targets[i]) for i in batch], batch, scores)
            mean = torch.stack(weights).mean(0).cpu().numpy()
            for row, i in enumerate(batch):
                attentions[i] = mean[row, : len(targets[i]), : len(sources[i])].copy()
        return list(zip(scores, attentions, strict=True))

    def _pairs(
        self,
        sources: Sequence[Sequence[int]],
        targets: Sequence[Sequence[int]],
        batch_size: int,
        batch_tokens: int,
    ) -> Iterator[
        tuple[list[int], tuple[Tensor, Packed], tuple[Tensor, Packed], tuple[Tensor, Packed]]
    ]:
        """Batches: their numbers, sources, what the decoder reads, and what it is to say."""
        config = self.config
        if len(sources) != len(targets):
            raise ValueError(
                f"targets: got {len(targets)}, expected one for each of the {len(sources)} sources"
            )
        src = integer_rows("sources", sources, config.src_vocab_size - 1)
        tgt = integer_rows("targets", targets, config.tgt_vocab_size - 1)
        self._check_positions(src)
        with self._at_work():
            both = [s if t else [] for s, t in zip(src, tgt, strict=True)]
            for batch in batches_by_length(both, batch_size, batch_tokens):
                fed = [[config.decoder_start_id, *tgt[i][:-1]] for i in batch]
                yield (
                    batch,
                    self._flat([src[i] for i in batch]),
                    self._flat(fed),
                    self._flat([tgt[i] for i in batch]),
                )


class TorchLanguageModel(_TorchModels[LanguageModel]):
    """A language model on lists of ids, on the device that it is on.

    Arguments, results and errors are those of
    :class:`~transformer_ext.inference.language_engine.LanguageModelEngine`.

    Args:
        models: the model, which may be in training.

    Raises:
        UnsupportedModelError: it has a part of its own that a search with a cache does not know.
    """

    _KIND = LanguageModel
    _BYPASSED = ("forward_packed", "next_log_probs", "decode_step", "read_prompts")

    @classmethod
    def of_weights(
        cls,
        config: ModelConfig,
        weights: Mapping[str, np.ndarray],
        device: str,
        compute_type: str,
    ) -> TorchLanguageModel:
        """Of a model directory: see :meth:`TorchEngine.of_weights`."""
        return cls(_loaded(LanguageModel, config, weights, device, compute_type))

    def search(
        self,
        prompts: Sequence[Sequence[int]],
        options: SearchOptions | None = None,
        *,
        numbers: Sequence[int] | None = None,
        batch_size: int = BATCH_SIZE,
        batch_tokens: int = LANGUAGE_MODEL_BATCH_TOKENS,
    ) -> list[SearchResult]:
        """What follows each prompt: see :meth:`LanguageModelEngine.search`. ``batch_tokens`` counts
        prompts and what may follow, once for each hypothesis."""
        options = chosen_options(options)
        config = self.config
        given = integer_rows("prompts", prompts, config.vocab_size - 1)
        if numbers is not None:
            numbers = integers("numbers", numbers, 2**64 - 1)
        _check_suppressed(options, config.vocab_size)
        fed = [fed_tokens(config, prompt) for prompt in given]
        limits = continuation_limits(config, options, fed, numbers)
        numbers = range(len(given)) if numbers is None else numbers
        width = options.num_hypotheses if options.sampling else options.beam_size
        longest_limit = max(limits, default=0)

        def most(longest: int) -> int:
            tokens = longest + longest_limit
            fitting = self._most_at_once(room, options, tokens)
            return max(1, min(batch_tokens // (width * tokens), fitting))

        def search(batch: list[int]) -> list[SearchResult]:
            tasks = [
                Task(
                    limit=limits[i],
                    minimum=options.length_minimum(0),
                    number=numbers[i],
                    fed=fed[i][-1],
                    prompt=fed[i],
                )
                for i in batch
            ]
            read = [fed[i] for i in batch]

            def make_caches(slots: Slots) -> Any:
                cache = DecoderCache(slots)
                if any(len(row) > 1 for row in read):
                    ids, packed = self._flat([row[:-1] for row in read])
                    self.models[0].read_prompts(ids, packed, cache)
                return [cache]

            return self._search(tasks, options, [len(row) for row in read], make_caches)

        results: dict[int, SearchResult] = {}
        with self._at_work():
            room = self._room()
            for batch in batches_by_length(fed, batch_size, batch_tokens, most):
                results.update(zip(batch, self._in_memory(batch, search), strict=True))
        return [results[i] for i in range(len(given))]


def _loaded(
    kind: type[ModelT],
    config: Any,
    weights: Mapping[str, np.ndarray],
    device: str,
    compute_type: str,
) -> ModelT:
    compute_type = torch_compute_type(None, compute_type, device)
    check_weights_known(config, weights)
    # What the model draws at first is no random number of the user's.
    with torch.random.fork_rng(devices=[]):
        model = kind(config)
    model = model.load_weights(weights).set_precision(compute_type).to(device).eval()
    guard(next(model.parameters()).device, model.activation_dtype)
    return model


def _check_suppressed(options: SearchOptions, vocabulary: int) -> None:
    for token in options.suppressed_tokens:
        if token >= vocabulary:
            raise ValueError(f"suppressed_tokens: got {token}, expected 0 to {vocabulary - 1}")


def _check_prefix(task: Task) -> None:
    if len(task.prefix) >= task.limit:
        raise ValueError(
            f"prefix: got {len(task.prefix)} tokens, expected fewer than the longest output of the "
            f"sentence ({task.limit}, its end of sentence counted)"
        )


def _of_given(generator: Any, hidden: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities of given tokens after given states."""
    found = []
    for rows, wanted in zip(hidden.split(_SCORED_ROWS), ids.split(_SCORED_ROWS), strict=True):
        log_probs = generator.logits(rows).float().log_softmax(-1)
        found.append(log_probs.gather(-1, wanted[:, None])[:, 0])
    return torch.cat(found)


def _mean(of_models: list[Tensor]) -> Tensor:
    """Logarithms of the mean probability."""
    if len(of_models) == 1:
        return of_models[0]
    return torch.stack(of_models).double().logsumexp(0) - math.log(len(of_models))


def _split(
    values: Tensor, lengths: Sequence[int], numbers: Sequence[int], into: list[list[float]]
) -> None:
    """Values behind one another, to the sentences that they belong to.

    Raises:
        ValueError: a NaN among them.
    """
    flat, first = values.tolist(), 0
    if any(math.isnan(value) for value in flat):
        raise ValueError("log-probabilities of given tokens: NaN among them")
    for number, length in zip(numbers, lengths, strict=True):
        into[number] = flat[first : first + length]
        first += length
