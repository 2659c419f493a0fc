"""``python -m transformer_ext.convert``: models from and to Hugging Face's MarianMT directories."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from transformer_ext._command import command
from transformer_ext.config import ArgumentParser


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m transformer_ext.convert",
        usage="%(prog)s (--from-marian DIR | --to-marian MODEL_DIR) --output DIR [options]",
        description="Convert a MarianMT directory of Hugging Face's transformers into a model "
        "directory, or a model directory into a MarianMT directory. What one side has and the "
        "other cannot hold is an error that names it.",
    )
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument(
        "--from-marian",
        metavar="DIR",
        help="MarianMT directory to import: config.json, model.safetensors or pytorch_model.bin, "
        "source.spm, target.spm, vocab.json",
    )
    direction.add_argument(
        "--to-marian", metavar="MODEL_DIR", help="model directory to export; it must be post-norm"
    )
    parser.add_argument("--output", metavar="DIR", required=True, help="folder to write")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the model in the output folder"
    )
    parser.add_argument(
        "--zero-start",
        action="store_true",
        help="export so that ct2-transformers-converter can read it too: the embedding of the "
        "start token moves into the decoder's positions",
    )
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.zero_start and arguments.to_marian is None:
        parser.error("--zero-start: expected --to-marian with it")
    from transformer_ext.marian import from_marian, to_marian

    if arguments.from_marian is not None:
        done = from_marian(arguments.from_marian, arguments.output, overwrite=arguments.overwrite)
    else:
        done = to_marian(
            arguments.to_marian,
            arguments.output,
            overwrite=arguments.overwrite,
            zero_start=arguments.zero_start,
        )
    print("\n".join(done.messages))
    return 0


if __name__ == "__main__":
    sys.exit(main())
