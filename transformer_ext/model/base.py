"""What the kinds of model share: precision, the state of dropout, padded ids to packed ones."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from transformer_ext import ops
from transformer_ext.model.attention import DenseAttention
from transformer_ext.model.layers import Embedding
from transformer_ext.model.stacks import SelfAttentionStack, Stack
from transformer_ext.model.trace import Trace
from transformer_ext.packed import Packed

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_Self = TypeVar("_Self", bound="Model")


class Model(nn.Module):
    """Base of the models.

    Parameters are float32. Activations have the type chosen by :meth:`set_precision`.

    What trains a model calls its ``forward_packed`` with the inputs of a batch and gives the
    states that it returns to the loss, with ``weight`` and ``bias`` of its ``generator``.

    Attributes:
        rng: ``[3]`` int64 (seed, step, microstep), the whole state of dropout. ``forward``
            advances the step by itself in training mode; a training loop that calls
            ``forward_packed`` sets it.
    """

    rng: Tensor

    def _begin_dropout(self) -> None:
        """To be called at the end of construction: it draws a random number."""
        self.activation_dtype = torch.float32
        self.register_buffer("rng", torch.zeros(3, dtype=torch.int64), persistent=False)
        self.seed_dropout(int(torch.randint(2**62, ()).item()))

    def seed_dropout(self, seed: int) -> None:
        """Start dropout anew from ``seed`` (64 bits), step 0."""
        with torch.no_grad():
            self.rng.copy_(torch.tensor([seed, 0, 0]))

    def set_precision(self: _Self, name: str) -> _Self:
        """Type of the activations: ``float32``, ``bfloat16`` or ``float16``; returns self.

        Parameters and their gradients stay float32.

        Raises:
            ValueError: another name.
        """
        if name not in _DTYPES:
            raise ValueError(f"precision: expected one of {', '.join(_DTYPES)}, got {name!r}")
        self.activation_dtype = _DTYPES[name]
        return self

    def load_weights(self: _Self, weights: Mapping[str, NDArray[np.float32]]) -> _Self:
        """Takes over the weights of a model directory, by name; returns self."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(torch.from_numpy(np.asarray(weights[name])))
        return self

    def _embed(
        self,
        stack: Stack,
        table: Embedding,
        ids: Tensor,
        positions: Tensor,
        max_length: int,
        rng: Tensor | None,
        token_types: Tensor | None = None,
    ) -> Tensor:
        dtype = self._embedding_dtype(table)
        # A GPU cannot be asked without being waited for, and gives NaN.
        if ids.device.type != "cpu" or torch.compiler.is_compiling():
            return stack.embed(ids, table.weight, positions, max_length, rng, dtype, token_types)
        try:
            return stack.embed(ids, table.weight, positions, max_length, rng, dtype, token_types)
        except IndexError:
            check_vocabulary(self._ids_name(stack), ids, table.weight.shape[0])
            if stack.token_types is not None and token_types is not None:
                check_vocabulary("token_types", token_types, stack.token_types.weight.shape[0])
            raise

    def _ids_name(self, stack: Stack) -> str:
        """The argument that a stack reads, for messages."""
        return "ids"

    def _embed_dense(
        self,
        stack: Stack,
        table: Embedding,
        ids: Tensor,
        rng: Tensor | None,
        trace: Trace | None,
        token_types: Tensor | None = None,
    ) -> Tensor:
        """Of padded ids ``[batch, length]``, its summands into the trace."""
        if trace is not None:
            dtype = self._embedding_dtype(table)
            trace.states.update(stack.trace_embedding(ids, table.weight, dtype, token_types))
        length = ids.shape[1]
        positions = torch.arange(length, dtype=torch.int32, device=ids.device).expand_as(ids)
        return self._embed(stack, table, ids, positions, length, rng, token_types)

    def _embedding_dtype(self, table: Embedding) -> torch.dtype:
        # A model moved to float64 (for comparisons) computes in float64 throughout.
        dtype = table.weight.dtype
        return dtype if dtype == torch.float64 else self.activation_dtype

    @contextmanager
    def _studied(self) -> Iterator[Trace]:
        """In evaluation mode and without gradients, for :meth:`trace`."""
        # Parts of a model may be in evaluation mode by themselves.
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            with torch.no_grad():
                yield Trace()
        finally:
            for module, training in modes:
                module.training = training

    def _trace_stack(
        self,
        stack: SelfAttentionStack,
        table: Embedding,
        ids: Tensor,
        lengths: Tensor | None,
        pad_id: int,
        causal: bool = False,
        token_types: Tensor | None = None,
    ) -> Trace:
        """:meth:`trace` of a model of one stack."""
        real = pack_ids("ids", ids, lengths, pad_id).lengths
        check_read("ids", ids, real, table.weight.shape[0])
        mask = ops.key_padding_mask(real, ids.shape[1])
        with self._studied() as trace:
            x = self._embed_dense(stack, table, ids, None, trace, token_types)
            stack(x, DenseAttention(mask, causal=causal, trace=trace))
        return trace

    def _dropout_state(self) -> Tensor | None:
        # A copy, so that what backward reads is what forward read, whatever the caller does next.
        return self.rng.clone() if self.training else None

    def _advance(self) -> None:
        if self.training:
            with torch.no_grad():
                self.rng[1] += 1


def check_ids(name: str, ids: Tensor) -> None:
    """Raise a TypeError for what is no tensor, a ValueError for anything but int64 ``[batch, length]``."""
    check_tensor(name, ids, "int64 [batch, length]")
    if ids.dim() != 2 or ids.dtype != torch.int64:
        raise ValueError(
            f"{name}: expected int64 [batch, length], got {ids.dtype} {list(ids.shape)}"
        )


def check_tensor(name: str, value: object, expected: str) -> None:
    """Raise a TypeError for what is no tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name}: expected a tensor, {expected}, got {type(value).__name__}: {reprlib.repr(value)}"
        )


def check_read(name: str, ids: Tensor, lengths: Tensor, vocab_size: int) -> None:
    """Raise a ValueError for what is nothing to study: no token, or one that is not in the vocabulary.

    Args:
        name: of the argument.
        ids: ``[batch, length]``.
        lengths: ``[batch]`` tokens of each.
        vocab_size: of the model.
    """
    if not len(lengths) or not bool(lengths.all()):
        row = int(lengths.argmin()) if len(lengths) else None
        raise ValueError(
            f"{name}: expected at least one token in each row, got "
            + (f"none in row {row}" if row is not None else f"no row: {list(ids.shape)}")
        )
    check_vocabulary(name, ids, vocab_size)


def check_vocabulary(name: str, ids: Tensor, vocab_size: int) -> None:
    """Raise a ValueError for an id that is not in the vocabulary.

    Args:
        name: of the argument.
        ids: ``[batch, length]``; packed ones no longer tell where they stood.
        vocab_size: of the model.
    """
    wrong = (ids < 0) | (ids >= vocab_size)
    if bool(wrong.any()):
        place = ""
        if ids.dim() == 2:
            row, column = wrong.nonzero()[0].tolist()
            place = f" in row {row}, column {column}"
        raise ValueError(
            f"{name}: got {int(ids[wrong][0])}{place}, expected ids from 0 to {vocab_size - 1}"
        )


def pack_padded(name: str, ids: Tensor, real: Tensor, pad_id: int) -> Packed:
    """Where the sequences lie in ids padded on the right.

    Args:
        name: of the argument, for messages.
        ids: ``[batch, length]``.
        real: which of them are not padding, of the same shape.
        pad_id: for messages.

    Raises:
        ValueError: padding stands before a token.
    """
    lengths = real.sum(1, dtype=torch.int32)
    if torch.compiler.is_compiling():
        # No value may be read back inside a compiled graph: all rows are kept, the last ones
        # as slack.
        return Packed.from_lengths(lengths, ids.numel(), max_length=ids.shape[1])
    columns = torch.arange(ids.shape[1], device=ids.device)
    if not torch.equal(real, columns < lengths[:, None]):
        raise ValueError(
            f"{name}: padding (id {pad_id}) stands before a token; "
            "sentences must be padded on the right, or masks be given"
        )
    return Packed.from_lengths(lengths)


def pack_ids(name: str, ids: Tensor, lengths: Tensor | None, pad_id: int) -> Packed:
    """Where the sequences of a model of one stack lie.

    Args:
        name: of the argument, for messages.
        ids: ``[batch, length]`` int64, padded on the right.
        lengths: ``[batch]`` tokens of each; None: all that is not ``pad_id``.
        pad_id: the padding.

    Raises:
        ValueError: other shapes or types, or padding before a token.
    """
    check_ids(name, ids)
    if lengths is None:
        return pack_padded(name, ids, ids != pad_id, pad_id)
    check_tensor("lengths", lengths, f"integers [{ids.shape[0]}]")
    if lengths.shape != ids.shape[:1] or lengths.is_floating_point():
        raise ValueError(
            f"lengths: expected integers [{ids.shape[0]}], got {lengths.dtype} "
            f"{list(lengths.shape)}"
        )
    columns = torch.arange(ids.shape[1], device=ids.device)
    if not torch.compiler.is_compiling() and bool((lengths > ids.shape[1]).any()):
        raise ValueError(
            f"lengths: got {int(lengths.max())}, but {name} has {ids.shape[1]} columns"
        )
    return pack_padded(name, ids, columns < lengths[:, None], pad_id)
