"""The keys and values that a decoder has computed for the tokens of hypotheses, so that a step of a
search computes those of one new token of each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from transformer_ext.model.trace import Trace

#: Positions of the cache that attention reads are a multiple of this: few shapes, aligned rows.
_POSITIONS = 32

#: Hypotheses of a sentence that attend to the slots of all of them, each under its mask: nothing is
#: copied, and keys are read once for all of them, but scores grow with their square.
_MOST_TOGETHER = 16


class Slots:
    """Where the tokens of hypotheses lie; of no model, and shared by the caches of an ensemble.

    A sentence has ``width`` hypotheses, its rows, and for each position ``width`` slots, one for
    each row that says a token there: slot ``(sentence * capacity + position) * width + row``. A
    beam search that gives a row another's past rewrites the list of who said its tokens, and moves
    no keys.

    Args:
        prompt_lengths: for each sentence, tokens before the first that a search finds.
        width: hypotheses of a sentence.
        capacity: most tokens of a hypothesis that are held at first.
        device: where.

    Attributes:
        position: int64 ``[rows]``, of the token that the step feeds.
        written: int64 ``[rows]``, the slots of these tokens.
        read: int64, the slots that the step reads, where they are to be gathered; else None, and all
            hypotheses of a sentence read all of its slots.
        mask: what a hypothesis may attend to of them: ``[sentences, 1, width, positions * width]``,
            gathered ``[rows, 1, 1, positions]``.
    """

    def __init__(
        self, prompt_lengths: Sequence[int], width: int, capacity: int, device: torch.device
    ) -> None:
        self.sentences = len(prompt_lengths)
        self.width = width
        self.capacity = capacity
        self.device = device
        self.together = width <= _MOST_TOGETHER
        self._prompt_lengths = list(prompt_lengths)
        lengths = torch.tensor(prompt_lengths, device=device).repeat_interleave(width)
        self._next = lengths - 1
        self._lay_out()
        # The row that said the token at each position; -1: none. Prompts lie in the first rows.
        held = self._positions < self._next[:, None]
        self._owner = torch.where(held, 0, -1)

    @property
    def rows(self) -> int:
        """Hypotheses of all sentences."""
        return self.sentences * self.width

    def _lay_out(self) -> None:
        """What follows from the numbers of rows and slots."""
        rows = torch.arange(self.rows, device=self.device)
        self._positions = torch.arange(self.capacity, device=self.device)
        self._beams = torch.arange(self.width, device=self.device)
        self._beam = rows % self.width
        self._first = (rows - self._beam) * self.capacity

    def prompt_slots(self) -> Tensor:
        """Slots of the tokens of all prompts but the last ones, one prompt behind the other."""
        slots = [
            (sentence * self.capacity + position) * self.width
            for sentence, length in enumerate(self._prompt_lengths)
            for position in range(length - 1)
        ]
        return torch.tensor(slots, dtype=torch.int64, device=self.device)

    def positions_for(self, longest: int) -> int:
        """Positions that a step reads whose longest hypothesis has so many tokens."""
        return min(self.capacity, -(-longest // _POSITIONS) * _POSITIONS)

    def begin_step(self, positions: int) -> None:
        """To be called before a step; ``positions`` from :meth:`positions_for`."""
        self.positions = positions
        # A sentence that is done may wait for the others of its batch longer than it has slots.
        self.position = self._next.clamp(max=self.capacity - 1)
        self.written = self._first + self.position * self.width + self._beam
        self._owner.scatter_(1, self.position[:, None], self._beam[:, None])
        owner = self._owner[:, :positions]
        self.read: Tensor | None = None
        if self.together:
            mask = owner[:, :, None] == self._beams
            self.mask = mask.view(self.sentences, 1, self.width, positions * self.width)
        else:
            self.mask = (owner >= 0)[:, None, None, :]
            slots = self._positions[:positions] * self.width + owner.clamp(min=0)
            self.read = (slots + self._first[:, None]).flatten()

    def end_step(self, rows: Tensor | None) -> None:
        """After a step: row i goes on from what row ``rows[i]`` was; None: from what it was."""
        if rows is not None and self.width > 1:
            self._owner.copy_(self._owner.index_select(0, rows))
        self._next += 1

    def keep(self, sentences: Tensor) -> None:
        """Let go of all but some sentences."""
        rows = (sentences[:, None] * self.width + self._beams).flatten()
        self.sentences = sentences.shape[0]
        self._next = self._next.index_select(0, rows)
        self._owner = self._owner.index_select(0, rows)
        self._lay_out()

    def grow(self, capacity: int) -> None:
        """Room for more tokens of a hypothesis."""
        self._owner = functional.pad(self._owner, (0, capacity - self.capacity), value=-1)
        self.capacity = capacity
        self._lay_out()


class DecoderCache:
    """What one model holds of the hypotheses of a batch.

    Args:
        slots: where their tokens lie.
        memory: the encoder's output ``[sentences, source length, d_model]``, where there is one.
        source_lengths: ``[sentences]``.
        traced: a cross-attention, by its name, whose weights are kept at each step.

    Attributes:
        memory: as given.
        memory_mask: ``[sentences, 1, 1, source length]``, what is no padding.
        trace: what the last step of ``traced`` computed.
    """

    def __init__(
        self,
        slots: Slots,
        memory: Tensor | None = None,
        source_lengths: Tensor | None = None,
        traced: str | None = None,
    ) -> None:
        self.slots = slots
        self.memory = memory
        self.memory_mask: Tensor | None = None
        if memory is not None and source_lengths is not None:
            columns = torch.arange(memory.shape[1], device=memory.device)
            self.memory_mask = (columns < source_lengths[:, None])[:, None, None, :]
        self.traced = traced
        self.trace = Trace()
        self._tokens: dict[str, Tensor] = {}
        self._memories: dict[str, Tensor] = {}
        self._prompt_slots: Tensor | None = None

    def fill(self, name: str, key_value: Tensor) -> None:
        """Take the keys and values of all prompts but their last tokens, packed ``[tokens, n]``."""
        if self._prompt_slots is None:
            self._prompt_slots = self.slots.prompt_slots()
        self._held(name, key_value).index_copy_(0, self._prompt_slots, key_value)

    def extend(self, name: str, key_value: Tensor) -> Tensor:
        """Take the keys and values of the newest tokens ``[rows, n]``.

        Returns:
            what the hypotheses attend to, under the mask of the slots: ``[sentences, keys, n]``, for
            all hypotheses of a sentence, or where they are gathered ``[rows, keys, n]``.
        """
        slots = self.slots
        held = self._held(name, key_value)
        held.index_copy_(0, slots.written, key_value)
        if slots.read is not None:
            return held.index_select(0, slots.read).view(slots.rows, slots.positions, -1)
        of_sentence = held.view(slots.sentences, -1, held.shape[1])
        return of_sentence[:, : slots.positions * slots.width]

    def _held(self, name: str, like: Tensor) -> Tensor:
        if name not in self._tokens:
            # Zeros, as what no token has written is multiplied too: with weights of 0.
            size = self.slots.rows * self.slots.capacity
            self._tokens[name] = like.new_zeros(size, like.shape[1])
        return self._tokens[name]

    def of_memory(self, name: str) -> Tensor | None:
        """Keys and values of the memory for a cross-attention, once they are there."""
        return self._memories.get(name)

    def set_memory(self, name: str, key_value: Tensor) -> Tensor:
        """Keep those; returns them."""
        self._memories[name] = key_value
        return key_value

    def keep(self, sentences: Tensor) -> None:
        """Let go of all but some sentences, before the slots do."""
        for name, held in self._tokens.items():
            kept = held.view(self.slots.sentences, -1, held.shape[1]).index_select(0, sentences)
            self._tokens[name] = kept.flatten(0, 1)
        for name, held in self._memories.items():
            self._memories[name] = held.index_select(0, sentences)
        if self.memory is not None:
            self.memory = self.memory.index_select(0, sentences)
        if self.memory_mask is not None:
            self.memory_mask = self.memory_mask.index_select(0, sentences)

    def grow(self, capacity: int) -> None:
        """Room for more tokens of a hypothesis, before the slots have it."""
        slots = self.slots
        more = (capacity - slots.capacity) * slots.width
        for name, held in self._tokens.items():
            of_sentence = held.view(slots.sentences, -1, held.shape[1])
            self._tokens[name] = functional.pad(of_sentence, (0, 0, 0, more)).flatten(0, 1)
