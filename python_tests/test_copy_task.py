"""The Annotated Transformer's first example: by our command, and in that notebook's own calls."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

from transformer_ext import make_model, train
from transformer_ext.ops.masks import subsequent_mask
from transformer_ext.training.copy_task import VOCAB_SIZE, CopyTask, random_sequences


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are faster so, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_sequences_are_random_and_repeatable() -> None:
    first = random_sequences(500, np.random.default_rng(3))
    assert (first[:, 0] == 1).all() and first.min() == 1 and first.max() == VOCAB_SIZE - 1
    assert np.array_equal(first, random_sequences(500, np.random.default_rng(3)))
    task = CopyTask(seed=2, batch_size=3)
    batch = task.collate(task.epoch(4)[5])
    again = task.collate(task.epoch(4)[5])
    other = task.collate(task.epoch(4)[6])
    assert np.array_equal(batch.src_ids, again.src_ids)
    assert not np.array_equal(batch.src_ids, other.src_ids)
    assert np.array_equal(batch.src_ids.reshape(3, 10)[:, 1:].ravel(), batch.labels)


def test_the_command_learns_it(capsys: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    assert train.main(["--task", "copy", "--device", "cpu"]) == 0
    assert "100.0 % of 200 unseen sequences copied exactly" in capsys.readouterr().out
    # Two minutes are promised; a machine at work on other things may need longer.
    assert time.monotonic() - began < 600


def greedy_decode(
    model: nn.Module, src: torch.Tensor, src_mask: torch.Tensor, max_len: int, start_symbol: int
) -> torch.Tensor:
    memory = model.encode(src, src_mask)
    ys = torch.full((1, 1), start_symbol, dtype=src.dtype)
    for _ in range(max_len - 1):
        out = model.decode(memory, src_mask, ys, subsequent_mask(ys.size(1)))
        prob = model.generator(out[:, -1])
        _, next_word = torch.max(prob, dim=1)
        ys = torch.cat([ys, next_word[:, None]], dim=1)
    return ys


def test_in_the_calls_of_the_notebook() -> None:
    torch.manual_seed(0)
    vocab, batch_size, steps = 11, 40, 400
    model = make_model(vocab, vocab, N=2, d_model=64, d_ff=128, h=4, dropout=0.0)
    criterion = nn.KLDivLoss(reduction="sum")
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, betas=(0.9, 0.98), eps=1e-9)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 40, (steps - step) / steps)
    )
    model.train()
    for _ in range(steps):
        data = torch.randint(1, vocab, size=(batch_size, 10))
        data[:, 0] = 1
        src, tgt, tgt_y = data, data[:, :-1], data[:, 1:]
        src_mask = (src != 0).unsqueeze(-2)
        tgt_mask = (tgt != 0).unsqueeze(-2) & subsequent_mask(tgt.size(-1))
        out = model.forward(src, tgt, src_mask, tgt_mask)
        log_probabilities = model.generator(out)
        truth = nn.functional.one_hot(tgt_y, vocab).float()
        loss = criterion(log_probabilities, truth) / tgt_y.numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        scheduler.step()

    model.eval()
    with torch.no_grad():
        for src in (
            torch.arange(1, 11)[None],
            torch.tensor([[1, 3, 3, 9, 2, 10, 5, 5, 8, 4]]),
            torch.tensor([[1, 10, 9, 8, 7, 6, 5, 4, 3, 2]]),
        ):
            src_mask = torch.ones(1, 1, 10, dtype=torch.bool)
            assert greedy_decode(model, src, src_mask, max_len=10, start_symbol=1).equal(src)
