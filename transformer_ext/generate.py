"""``python -m transformer_ext.generate``: continue texts by a language model, line by line.

Every input line, an empty one too, gives one output line, in order: the line and what follows it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from transformer_ext._command import command
from transformer_ext.config import ArgumentParser, ConfigError, add_arguments, given
from transformer_ext.inference.options import SearchOptions


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m transformer_ext.generate",
        usage="%(prog)s MODEL_DIR [FILE ...] [options]",
        description="Continue texts, one a line, by a language model, in plain Python. Without "
        "options it is greedy (--beam-size 1) and writes at most 50 tokens (--max-length).",
    )
    parser.add_argument("model", metavar="MODEL_DIR", help="folder of the model")
    parser.add_argument(
        "files",
        metavar="FILE",
        nargs="*",
        help="UTF-8 text, plain, gzip or xz, one beginning a line; none or - reads standard input",
    )
    add_arguments(parser, SearchOptions)
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    chosen = given(arguments, SearchOptions)
    if not chosen.get("sampling"):
        chosen.setdefault("beam_size", 1)
    try:
        options = SearchOptions(**chosen)
    except ConfigError as error:
        parser.error(str(error))
    if options.num_hypotheses > 1:
        parser.error("--num-hypotheses: one line is written for each line, expected 1")
    from transformer_ext.inference.continuation import TextGenerator
    from transformer_ext.inference.lines import TextLines, input_blocks

    generator = TextGenerator(arguments.model)
    number = 0
    for lines in input_blocks(TextLines(), arguments.files, 64):
        for line in lines:
            # One after the other: what is sampled for a line does not depend on the others.
            (written,) = generator([line], options, numbers=[number])
            print(written, flush=True)
            number += 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
