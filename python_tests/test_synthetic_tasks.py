"""``--task copy``, ``sort`` and ``reverse``; and copying in the Annotated Transformer's own calls."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from training_helpers import interrupted_after

from transformer_ext import Translator, make_model, train
from transformer_ext.config import ConfigError, SyntheticConfig
from transformer_ext.files import load_model_dir
from transformer_ext.ops.masks import subsequent_mask
from transformer_ext.training.synthetic import make_sequences

#: Learnt in seconds.
QUICK = (
    "--symbols 8 --sequence-lengths 3 6 --sequences 4000 --d-model 64 --nhead 4 "
    "--dim-feedforward 128 --num-encoder-layers 1 --num-decoder-layers 1 --max-tokens 512 "
    "--learning-rate 5e-3 --device cpu"
).split()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are faster so, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split()]


@pytest.mark.parametrize("task", ["copy", "sort", "reverse"])
def test_sequences_follow_the_rule_and_none_is_there_twice(task: str) -> None:
    config = SyntheticConfig(symbols=15, sequence_lengths=(3, 5), sequences=800)
    found = make_sequences(task, config)
    parts = (found.train, found.dev, found.test, found.longer)
    sources = [source for part in parts for source, _ in part]
    assert len(set(sources)) == len(sources) == 800 + 500 + 500 + 500
    for source, target in (*found.train, *found.longer):
        ids = numbers(source)
        rules = {"copy": ids, "sort": sorted(ids), "reverse": list(reversed(ids))}
        assert numbers(target) == rules[task]
    lengths = {len(numbers(source)) for source, _ in (*found.train, *found.dev, *found.test)}
    assert lengths == {3, 4, 5}
    assert {len(numbers(source)) for source, _ in found.longer} == {6, 7}
    assert {n for source in sources for n in numbers(source)} == set(range(1, 16))
    assert make_sequences(task, config) == found


def test_too_few_different_sequences_are_an_error() -> None:
    with pytest.raises(ConfigError, match="synthetic.sequences: there are not 900 different"):
        make_sequences("copy", SyntheticConfig(2, (9, 10), 900))


@pytest.mark.parametrize(("task", "steps"), [("copy", 300), ("sort", 200)])
def test_the_command_learns_it(
    task: str, steps: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    options = ["--task", task, "--output", str(run), "--cache", str(tmp_path / "cache"), *QUICK]
    options += ["--max-steps", str(steps), "--validate-every", str(steps)]
    assert train.main(options) == 0
    said = capsys.readouterr().out
    results = json.loads((run / "results.json").read_text())
    assert results["test_exact"] >= 90.0, said
    assert f"test: {results['test_exact']:.1f} % of 500 unseen sequences of 3 to 6" in said
    assert 0.0 <= results["longer_exact"] <= 100.0
    assert "exact " in said and "validation at step" in said
    # The model is one like any other.
    text = "5 3 8 1 3"
    with Translator(run / "model") as translator:
        output = translator.translate(text).text
    assert output == (text if task == "copy" else "1 3 3 5 8")


def test_interrupted_and_resumed_is_the_same_to_the_bit(tmp_path: Path) -> None:
    options = ["--task", "reverse", "--cache", str(tmp_path / "cache"), *QUICK]
    options += ["--max-steps", "8", "--validate-every", "4", "--validation-sentences", "0"]
    assert train.main([*options, "--output", str(tmp_path / "whole")]) == 0
    with interrupted_after(6):
        assert train.main([*options, "--output", str(tmp_path / "parts")]) == 130
    assert train.main(["--output", str(tmp_path / "parts"), "--resume"]) == 0
    first, second = (load_model_dir(tmp_path / name / "model") for name in ("whole", "parts"))
    for name, value in first.weights.items():
        assert np.array_equal(value, second.weights[name]), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--task", "sort", "--sequence-lengths", "5", "3"],
            "synthetic.sequence_lengths: got 5 3, expected the shortest first",
        ),
        (["--symbols", "9"], "synthetic.symbols: is an option of task copy or sort or reverse"),
        (
            ["--task", "copy", "--src-train", "a", "--tgt-train", "b"],
            "data.src_train: has no meaning for the task copy",
        ),
        (
            ["--task", "sort", "--text-train", "a"],
            "language_model.text_train: is an option of task language-model, but the task is sort; "
            "--task language-model takes --text-train",
        ),
        (["--task", "sotr"], "did you mean 'sort'"),
    ],
)
def test_wrong_options_are_named(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = train.main(options)
    except SystemExit as exit:
        status = int(exit.code or 0)
    error = capsys.readouterr().err
    assert status == 2 and message in error


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
