"""The keys and values that a decoder has computed for the tokens of hypotheses, so that a step of a
search computes those of one new token of each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from transformer_ext.model.trace import Trace

#: Columns of the cache that attention reads are a multiple of this: few shapes, aligned rows.
_COLUMNS = 32


class Slots:
    """Where the tokens of hypotheses lie; of no model, and shared by the caches of an ensemble.

    Sentence s has the rows ``s * width`` to ``(s + 1) * width - 1``, one a hypothesis; each row has
    ``capacity`` slots. The token at position j of a hypothesis lies in slot j of the row that said
    it. A beam search that gives a row another past rewrites that list and copies no keys.

    Args:
        prompt_lengths: for each sentence, tokens before the first that a search finds.
        width: hypotheses of a sentence.
        capacity: most tokens of a hypothesis that are held at first.
        device: where.
        reordered: whether rows change their past (False: greedy search and sampling).

    Attributes:
        position: int64 ``[rows]``, of the token that the step feeds.
        mask: ``[rows, 1, 1, columns]``, which columns hold the past of this step.
    """

    def __init__(
        self,
        prompt_lengths: Sequence[int],
        width: int,
        capacity: int,
        device: torch.device,
        *,
        reordered: bool,
    ) -> None:
        self.sentences = len(prompt_lengths)
        self.width = width
        self.capacity = capacity
        self.device = device
        self._reordered = reordered
        self._prompt_lengths = list(prompt_lengths)
        last = torch.tensor(prompt_lengths, device=device) - 1
        self.position = last.repeat_interleave(width)
        self._next = self.position.clone()
        self._owner: Tensor | None = None
        if reordered:
            # Prompts lie in the first row of their sentence.
            self._owner = torch.zeros(self.rows, capacity, dtype=torch.int64, device=device)
        self._lay_out()

    @property
    def rows(self) -> int:
        """Hypotheses of all sentences."""
        return self.sentences * self.width

    def _lay_out(self) -> None:
        """What follows from the numbers of rows and slots."""
        rows = torch.arange(self.rows, device=self.device)
        self._columns = torch.arange(self.capacity, device=self.device)
        self._row_start = rows * self.capacity
        self._beam = (rows % self.width)[:, None]
        first = (rows - rows % self.width) * self.capacity
        self._first_slot = first[:, None] + self._columns

    def prompt_slots(self) -> Tensor:
        """Slots of the tokens of all prompts but the last ones, one prompt behind the other.

        Where rows keep their past, all of those for the first row of each sentence, then for the
        second, and so on.
        """
        copies = 1 if self._reordered else self.width
        slots = [
            (sentence * self.width + copy) * self.capacity + j
            for copy in range(copies)
            for sentence, length in enumerate(self._prompt_lengths)
            for j in range(length - 1)
        ]
        return torch.tensor(slots, dtype=torch.int64, device=self.device)

    def columns_for(self, longest: int) -> int:
        """Columns that a step reads whose longest hypothesis has so many tokens."""
        return min(self.capacity, -(-longest // _COLUMNS) * _COLUMNS)

    def begin_step(self, columns: int) -> None:
        """To be called before a step; ``columns`` from :meth:`columns_for`."""
        self.columns = columns
        # A sentence that is done may wait for the others of its batch longer than it has slots.
        self.position = self._next.clamp(max=self.capacity - 1)
        self.written = self._row_start + self.position
        self.mask = (self._columns[:columns] <= self.position[:, None])[:, None, None, :]
        self.read: Tensor | None = None
        if self._owner is not None:
            self._owner.scatter_(1, self.position[:, None], self._beam)
            past = self._owner[:, :columns] * self.capacity
            self.read = (past + self._first_slot[:, :columns]).flatten()

    def end_step(self, rows: Tensor | None) -> None:
        """After a step: row i goes on from what row ``rows[i]`` was; None: from what it was."""
        if self._owner is not None and rows is not None:
            self._owner.copy_(self._owner.index_select(0, rows))
        self._next += 1

    def keep(self, sentences: Tensor) -> Tensor:
        """Let go of all but some sentences; returns the rows that stay."""
        rows = (sentences[:, None] * self.width + self._beam[: self.width, 0]).flatten()
        self.sentences = sentences.shape[0]
        self._next = self._next.index_select(0, rows)
        if self._owner is not None:
            self._owner = self._owner.index_select(0, rows)
        self._lay_out()
        return rows

    def grow(self, capacity: int) -> None:
        """More slots a row."""
        if self._owner is not None:
            more = capacity - self.capacity
            self._owner = torch.nn.functional.pad(self._owner, (0, more))
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
        copies = self._prompt_slots.shape[0] // key_value.shape[0]
        self._held(name, key_value).index_copy_(
            0, self._prompt_slots, key_value if copies == 1 else key_value.repeat(copies, 1)
        )

    def extend(self, name: str, key_value: Tensor) -> Tensor:
        """Take the keys and values of the newest tokens ``[rows, n]``.

        Returns:
            those of each hypothesis, ``[rows, columns, n]``, under the mask of the slots.
        """
        slots = self.slots
        held = self._held(name, key_value)
        held.index_copy_(0, slots.written, key_value)
        if slots.read is None:
            return held.view(slots.rows, slots.capacity, -1)[:, : slots.columns]
        return held.index_select(0, slots.read).view(slots.rows, slots.columns, -1)

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

    def keep(self, sentences: Tensor, rows: Tensor) -> None:
        """After :meth:`Slots.keep`, with its result."""
        capacity = self.slots.capacity
        for name, held in self._tokens.items():
            kept = held.view(-1, capacity, held.shape[1]).index_select(0, rows)
            self._tokens[name] = kept.flatten(0, 1)
        for name, held in self._memories.items():
            self._memories[name] = held.index_select(0, sentences)
        if self.memory is not None:
            self.memory = self.memory.index_select(0, sentences)
        if self.memory_mask is not None:
            self.memory_mask = self.memory_mask.index_select(0, sentences)

    def grow(self) -> None:
        """After :meth:`Slots.grow`."""
        rows, capacity = self.slots.rows, self.slots.capacity
        for name, held in self._tokens.items():
            old = held.view(rows, -1, held.shape[1])
            more = held.new_zeros(rows, capacity, held.shape[1])
            more[:, : old.shape[1]] = old
            self._tokens[name] = more.flatten(0, 1)
