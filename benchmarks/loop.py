"""What the training loop costs around the step: data, log, numbers of the step, agreements.

The same model is trained by ``Trainer.fit``, as the train command does, and by the bare step: forward
and backward pass and the optimizer, on batches that lie on the device. They take turns of some steps;
the ratio is the median over the turns of the time for a target token, on the clock and of the
processor, all threads together (the clock alone says little on a busy machine). Then the loop's
parts, on the clock.

    python benchmarks/loop.py
    python benchmarks/loop.py --preset tiny --max-tokens 256      # where the loop weighs most
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from processes import machine, say, table

from transformer_ext.config import DataConfig, OptimizerConfig
from transformer_ext.data import BatchSampler, collate
from transformer_ext.data.preparation import prepare_data
from transformer_ext.model import Transformer, preset
from transformer_ext.training.batches import BatchStream
from transformer_ext.training.environment import keep_freed_memory
from transformer_ext.training.optimizer import Optimizer, parameters_by_name
from transformer_ext.training.report import Console, JsonLog
from transformer_ext.training.schedules import Schedule
from transformer_ext.training.trainer import Plan, Trainer

#: Methods whose time is measured, by what they are for.
PARTS = {
    "waiting for data": ("stream", "__next__"),
    "tensors of a batch": ("losses", "load"),
    "skipped steps": ("", "_check_skipped"),
    "log": ("", "report"),
    "agreement on stopping": ("", "_agreed_stop"),
}


def make_trainer(options: argparse.Namespace, train: Any, folder: Path) -> Trainer:
    """As the train command makes it, without validation and checkpoints."""
    torch.manual_seed(1)
    model = Transformer(preset(options.preset, 8000, 8000)).set_precision(options.precision)
    defaults = OptimizerConfig()
    return Trainer(
        model,
        BatchStream(
            functools.partial(collate, train),
            BatchSampler(train.source_lengths, train.target_lengths, options.max_tokens),
            train.target_lengths,
            workers=options.data_workers,
        ),
        Optimizer(
            parameters_by_name(model).items(),
            betas=defaults.betas,
            eps=defaults.eps,
            clip_norm=defaults.clip_norm,
        ),
        Schedule("constant", 1e-4, 0, 1 << 30),
        Plan(0, log_every=options.log_every, validate_every=1 << 30),
        console=Console(open(folder / "console", "w")),
        log=JsonLog(folder / "log.jsonl"),
    )


def bare_steps(trainer: Trainer, batches: list[Any]) -> None:
    """Forward, backward, optimizer."""
    for batch in batches:
        loss, _, _ = trainer.losses(batch, batch.target_tokens)
        loss.backward()
        trainer.optimizer.step(1e-4)


def timed(owner: Any, name: str, seconds: dict[str, float], part: str) -> None:
    """Lets a method add its time to a part."""
    method: Callable[..., Any] = getattr(owner, name)

    @functools.wraps(method)
    def wrapper(*args: Any, **keywords: Any) -> Any:
        start = time.perf_counter()
        try:
            return method(*args, **keywords)
        finally:
            seconds[part] += time.perf_counter() - start

    if name.startswith("__"):
        # Python looks such methods up in the class.
        owner.__class__ = type(type(owner).__name__, (type(owner),), {name: lambda _: wrapper()})
    else:
        setattr(owner, name, wrapper)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="small")
    parser.add_argument("--max-tokens", type=int, default=1024)
    parser.add_argument("--precision", default="bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--data-workers", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--steps", type=int, default=20, help="steps of a turn")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    say(f"turns of {options.seconds:.0f} s (--seconds), once the text is read and both are warm")
    train = prepare_data(DataConfig(vocab_size=8000), say).train
    with tempfile.TemporaryDirectory() as folder:
        ours = make_trainer(options, train, Path(folder))
        bare = make_trainer(options, train, Path(folder))
        batches = [
            bare.losses.load(next(bare.stream).batches[0], bare.world.device)
            for _ in range(options.steps)
        ]
        bare.stream.close()
        seconds = dict.fromkeys(PARTS, 0.0)
        for part, (owner, name) in PARTS.items():
            timed(getattr(ours, owner) if owner else ours, name, seconds, part)

        close = ours.stream.close
        # Steps of the plan's end are validated and end the reading: not what is measured.
        ours.validate_and_save = lambda: None  # type: ignore[method-assign]
        ours.stream.close = lambda: None  # type: ignore[method-assign]

        def fit() -> int:
            before = ours.progress.target_tokens
            ours.plan = dataclasses.replace(ours.plan, max_steps=ours.progress.step + options.steps)
            ours.fit()
            return ours.progress.target_tokens - before

        def steps_alone() -> int:
            bare_steps(bare, batches)
            return sum(batch.target_tokens for batch in batches)

        fit()
        steps_alone()
        seconds |= dict.fromkeys(PARTS, 0.0)
        times: dict[str, list[tuple[float, float]]] = {"fit": [], "bare": []}
        end = time.perf_counter() + options.seconds
        while time.perf_counter() < end:
            for name, run in (("fit", fit), ("bare", steps_alone)):
                clock, processor = time.perf_counter(), time.process_time()
                tokens = run()
                elapsed = time.perf_counter() - clock, time.process_time() - processor
                times[name].append((elapsed[0] / tokens, elapsed[1] / tokens))
        close()
    ratios = [
        statistics.median(f[i] / b[i] for f, b in zip(times["fit"], times["bare"], strict=True))
        for i in (0, 1)
    ]
    mean_tokens = sum(batch.target_tokens for batch in batches) / len(batches)
    step = statistics.median(b[0] for b in times["bare"]) * mean_tokens
    steps = len(times["fit"]) * options.steps
    rows = [
        ["bare step", f"{1e6 * step:.0f}", ""],
        ["Trainer.fit", f"{1e6 * step * ratios[0]:.0f}", f"{100 * (ratios[0] - 1):+.2f} %"],
        ["  processor time", "", f"{100 * (ratios[1] - 1):+.2f} %"],
    ]
    for part, total in seconds.items():
        rows.append(
            [f"  {part}", f"{1e6 * total / steps:.0f}", f"{100 * total / steps / step:.2f} %"]
        )
    print(
        f"{machine()}, {options.threads} threads; {options.preset}, {options.max_tokens:,} tokens"
    )
    print("\n".join(table(["", "us a step", "of the step"], rows, options.markdown)))


if __name__ == "__main__":
    main()
