"""``python -m transformer_ext.prepare``: build tokenizer and data set ahead of a training.

Training does the same on its first run. This command is for large text, for a machine without the
GPU, or to see what is wrong with a corpus before anything else. It writes into the cache, where
training with the same options for the data finds it. ``--verify`` reads what is there once more and
compares it with its checksums.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from transformer_ext._command import command
from transformer_ext.config import DataConfig, TrainConfig, group, option, parse_arguments
from transformer_ext.data.preparation import prepare_data


@dataclass
class PrepareConfig:
    """The options of ``python -m transformer_ext.prepare``: the data part of training's."""

    verify: bool = option(
        False, help="read the finished files and compare them with their checksums"
    )
    data: DataConfig = group(DataConfig, help="Text and tokens; without files, the shipped corpus.")


@dataclass
class _PrepareFile(TrainConfig):
    """What --config may hold: a file of training's, or one that this command printed."""

    verify: bool = False


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    config = parse_arguments(
        PrepareConfig,
        argv,
        prog="python -m transformer_ext.prepare",
        description="Train the tokenizer and turn the text into token ids, for training to find. "
        "--config takes a file of training's, too.",
        file_cls=_PrepareFile,
    )
    start = time.perf_counter()
    data = prepare_data(config.data, lambda message: print(f"{message} ...", flush=True))
    if config.verify:
        for part in (data.train, data.dev_set):
            if part is not None:
                part.verify()
    for message in data.messages:
        print(message)
    sources, targets = data.train.source_lengths, data.train.target_lengths
    print(
        f"tokens: {sources.sum():,} source ({sources.mean():.1f} a sentence, at most "
        f"{sources.max()}), {targets.sum():,} target ({targets.mean():.1f}, at most "
        f"{targets.max()})"
    )
    checked = ", as their checksums say" if config.verify else ""
    print(f"token ids: {data.train.folder} ({data.train.bytes_on_disk:,} bytes{checked})")
    for tokenizer in dict.fromkeys((data.source_tokenizer.path, data.target_tokenizer.path)):
        print(f"tokenizer: {tokenizer}")
    print(f"ready after {time.perf_counter() - start:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
