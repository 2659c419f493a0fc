"""What all engines share: the compiled model, its weights, threads and compute types."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from transformer_ext._native import native
from transformer_ext.files import Weights, parameter_shapes
from transformer_ext.inference.options import (
    COMPUTE_TYPES,
    LARGEST_ID,
    MOST_AT_ONCE,
    check_at_once,
)
from transformer_ext.inference.shared import Closing, is_many
from transformer_ext.model.config import ModelConfig

if TYPE_CHECKING:
    import numpy as np

ConfigT = TypeVar("ConfigT", bound=ModelConfig)


class UnsupportedModelError(ValueError):
    """A model with a part that the compiled engine does not have; the message names it.

    The modules of ``transformer_ext.model`` compute such a model, slowly;
    ``transformer_ext.inference.search.beam_search`` decodes it.
    """


def resolve_compute_type(compute_type: str) -> str:
    """What an engine will multiply in here.

    Args:
        compute_type: one of :data:`transformer_ext.inference.options.COMPUTE_TYPES`. ``auto`` is
            ``int8`` from AVX2 on, where that is fastest, else ``float32``.

    Raises:
        ValueError: an unknown type, or one that the instruction set in use cannot multiply.
        NativeError: the compiled part of the package is missing.
    """
    compiled = native()
    if compute_type not in COMPUTE_TYPES:
        raise ValueError(
            f"compute_type: got {compute_type!r}, expected one of {', '.join(COMPUTE_TYPES)}"
        )
    if compute_type == "auto":
        return "int8" if compiled.prefers_int8() else "float32"
    if compute_type == "bfloat16" and not compiled.has_bfloat16():
        raise ValueError(
            "compute_type: got 'bfloat16', which needs AVX512_BF16; the instruction set in use "
            f"is {compiled.isa()}: take 'float32' or 'int8'"
        )
    return compute_type


def check_weights_known(
    config: ModelConfig, weights: Iterable[str], ignored: tuple[str, ...] = ()
) -> None:
    """Refuse weights that the architecture has no place for.

    Args:
        config: the architecture.
        weights: their names.
        ignored: beginnings of names that may be there.

    Raises:
        UnsupportedModelError: there is one.
    """
    expected = parameter_shapes(config)
    unknown = [name for name in weights if name not in expected and not name.startswith(ignored)]
    if unknown:
        raise UnsupportedModelError(
            f"the model has a part that the engine does not know: {unknown[0]!r}"
            + (f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else "")
        )


class CompiledModel(Closing, Generic[ConfigT]):
    """A model ready to compute on the CPU, without torch.

    Any number of threads may call one engine at once; the interpreter's lock is not held meanwhile.

    Args:
        config: the architecture.
        weights: float32 arrays by parameter name, as in ``model.safetensors``. They are copied: what
            happens to them afterwards has no effect.
        threads: threads at work on one call; None takes as many as there are physical cores that
            this process may use.
        compute_type: of the factors of the matrix products, one of
            :data:`transformer_ext.inference.options.COMPUTE_TYPES`. Sums and all else are float32;
            where the factors are not, a decoder's cached keys and values are bfloat16, and tied
            embeddings what the products hold of them. ``bfloat16`` halves the memory of the weights
            and takes AVX512_BF16. ``int8`` quarters it, on any machine: weights are rounded to
            8-bit integers with a scale for each output, their inputs with a scale for each row as
            they come. ``auto`` is what is fastest here: see :func:`resolve_compute_type`.

    Attributes:
        config: the architecture.
        compute_type: what the model is multiplied in; never ``auto``.

    Raises:
        UnsupportedModelError: the model has a part that the engine does not know.
        ValueError: a model of another kind; a weight is missing or has a wrong shape or type;
            ``threads`` is below 1; ``compute_type`` is unknown, or nothing that this machine can do.
        NativeError: the compiled part of the package is missing.
    """

    #: Class of the configurations that the engine takes.
    _KIND: type[ConfigT]
    #: Beginnings of names of weights that may be there without being a part of the configuration.
    _IGNORED: tuple[str, ...] = ()

    def __init__(
        self,
        config: ConfigT,
        weights: Mapping[str, np.ndarray],
        *,
        threads: int | None = None,
        compute_type: str = "float32",
    ) -> None:
        if not isinstance(config, self._KIND):
            raise ValueError(
                f"{type(self).__name__}: expected a model of the kind {self._KIND.kind}, "
                f"got {config.kind}"
            )
        self.config = config
        compiled = native()
        self.compute_type = resolve_compute_type(compute_type)
        check_weights_known(config, weights, self._IGNORED)

        def find(name: str) -> memoryview[float] | np.ndarray | None:
            if name not in weights:
                return None
            if isinstance(weights, Weights):
                # Weights in a file are packed as they lie there, one after the other.
                view = weights.floats(name)
                if view is not None:
                    return view
                array = weights.mapped(name)
            else:
                array = weights[name]
            import numpy as np

            if array.dtype != np.float32:
                raise ValueError(f"weight {name}: got {array.dtype}, expected float32")
            return np.require(array, requirements=["C", "A"])

        if threads is None:
            threads = min(compiled.default_threads(), MOST_AT_ONCE["threads"])
        check_at_once("threads", threads)
        try:
            self._engine: Any = compiled.Engine(
                {"kind": config.kind, **config.to_dict()}, find, threads, self.compute_type
            )
        except compiled.UnsupportedModel as error:
            raise UnsupportedModelError(str(error)) from None

    @property
    def threads(self) -> int:
        """Threads at work on one call."""
        return int(self._open().threads)

    @property
    def positions(self) -> int | None:
        """Longest sequence that the model has positions for; None: any."""
        return self.config.longest

    def __reduce__(self) -> str:
        raise TypeError(
            f"{type(self).__name__}: a model cannot be pickled or copied; open it in each process"
        )

    def _close(self, name: str) -> None:
        was_open = self._closed is None
        super()._close(name)
        if was_open:
            native().release_memory()

    def _forget(self) -> None:
        self._engine = None

    def _open(self) -> Any:
        # Taken once: another thread may close it meanwhile.
        engine = self._engine
        self._check_open()
        return engine


def integer_rows(
    name: str, values: Sequence[Sequence[int]], largest: int = LARGEST_ID
) -> list[list[int]]:
    """As the compiled engine takes them.

    Args:
        name: of the argument, for the message.
        values: a sequence of integers for each text.
        largest: of the integers.

    Raises:
        TypeError: no sequences.
        ValueError: something else in them than such integers.
    """
    if not is_many(values):
        raise TypeError(
            f"{name}: got {values!r:.60}, expected a sequence of integers for each text"
        )
    return [integers(name, row, largest, "a sequence of integers for each text") for row in values]


def integers(
    name: str,
    values: Sequence[int],
    largest: int = LARGEST_ID,
    expected: str = "a sequence of integers",
) -> list[int]:
    """One of :func:`integer_rows`; ``expected`` is said of what is no sequence."""
    row = values.tolist() if hasattr(values, "tolist") else values
    if not is_many(row):
        raise TypeError(f"{name}: got {row!r:.60}, expected {expected}")
    found = []
    for value in row:
        try:
            number = -1 if value is True or value is False else operator.index(value)
        except TypeError:
            number = -1
        if not 0 <= number <= largest:
            raise ValueError(f"{name}: got {value!r:.60}, expected integers from 0 to {largest}")
        found.append(number)
    return found


def batches_by_length(
    sequences: Sequence[Sequence[int]],
    batch_size: int,
    batch_tokens: int,
    most: Callable[[int], int] | None = None,
) -> Iterator[list[int]]:
    """Numbers of the sequences that are not empty, longest first, in batches.

    Args:
        sequences: of token ids.
        batch_size: most of them in a batch.
        batch_tokens: most tokens, counted as the longest of them times their number; a longer one is
            alone.
        most: where given, another bound: most of them whose longest has so many tokens.
    """
    check_at_once("batch_size", batch_size)
    check_at_once("batch_tokens", batch_tokens)
    order = sorted(
        (i for i, sequence in enumerate(sequences) if len(sequence)),
        key=lambda i: -len(sequences[i]),
    )
    first = 0
    while first < len(order):
        # The first of a batch is its longest; what its sequences take grows with that.
        longest = len(sequences[order[first]])
        count = max(1, min(batch_size, batch_tokens // longest))
        count = count if most is None else min(count, most(longest))
        yield order[first : first + count]
        first += count
