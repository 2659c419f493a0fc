"""``python -m transformer_ext.convert``: models from and to Hugging Face's directories."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from transformer_ext._command import command
from transformer_ext.config import ArgumentParser


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m transformer_ext.convert",
        usage="%(prog)s (--from-huggingface DIR | --to-huggingface MODEL_DIR) --output DIR [options]",
        description="Convert a directory of Hugging Face's transformers (MarianMT, BERT, GPT-2) into "
        "a model directory, or a model directory into one for transformers. What one side has and "
        "the other cannot hold is an error that names it. BERT and GPT-2 need no conversion to be "
        "used here.",
    )
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument(
        "--from-huggingface",
        metavar="DIR",
        help="directory to import: config.json, model.safetensors or pytorch_model.bin, and the "
        "tokenizer",
    )
    direction.add_argument(
        "--to-huggingface",
        metavar="MODEL_DIR",
        help="model directory to export: an encoder-decoder becomes a MarianMT (it must be "
        "post-norm), a text encoder a BERT, a language model a GPT-2",
    )
    parser.add_argument("--output", metavar="DIR", required=True, help="folder to write")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the model in the output folder"
    )
    parser.add_argument(
        "--zero-start",
        action="store_true",
        help="export an encoder-decoder so that ct2-transformers-converter can read it too: the embedding of the "
        "start token moves into the decoder's positions",
    )
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.zero_start and arguments.to_huggingface is None:
        parser.error("--zero-start: expected --to-huggingface with it")
    from transformer_ext.huggingface import from_huggingface, to_huggingface

    if arguments.from_huggingface is not None:
        done = from_huggingface(
            arguments.from_huggingface, arguments.output, overwrite=arguments.overwrite
        )
    else:
        done = to_huggingface(
            arguments.to_huggingface,
            arguments.output,
            overwrite=arguments.overwrite,
            zero_start=arguments.zero_start,
        )
    print("\n".join(done.messages))
    return 0


if __name__ == "__main__":
    sys.exit(main())
