"""``python -m transformer_ext.fill_mask``: guess the masked tokens of texts, line by line.

Every input line gives one output line, in order: a JSON object with the best tokens for each mask.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from transformer_ext._command import command
from transformer_ext.config import ArgumentParser, text_argument
from transformer_ext.inference.text_model import add_text_arguments, results_of_lines


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m transformer_ext.fill_mask",
        usage="%(prog)s MODEL_DIR [FILE ...] [options]",
        description="Guess the masked tokens of texts, one a line, each with one [MASK] at least. A "
        'JSON object a line: {"masks": [[{"score", "token", "token_str", "sequence"}, ...], '
        "...]}, for each mask the best tokens with their probabilities.",
    )
    add_text_arguments(parser)
    parser.add_argument(
        "--top-k",
        type=int,
        default=5,
        metavar="N",
        help="how many tokens for a mask (default: %(default)s)",
    )
    parser.add_argument(
        "--targets",
        nargs="+",
        type=text_argument,
        metavar="TOKEN",
        help="only these, each a piece of the vocabulary (default: all)",
    )
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    arguments = _parser().parse_args(argv)
    from transformer_ext.inference.mask_filler import Filling, MaskFiller

    filler = MaskFiller(
        arguments.model,
        threads=arguments.threads,
        compute_type=arguments.compute_type,
        device=arguments.device,
    )

    def fill(lines: list[str]) -> list[list[list[Filling]]]:
        return filler(
            lines,
            top_k=arguments.top_k,
            targets=arguments.targets,
            truncation=arguments.truncation,
        )

    for texts in results_of_lines(arguments.files, fill):
        for masks in texts:
            values = [[filling.as_dict() for filling in fillings] for fillings in masks]
            print(json.dumps({"masks": values}, ensure_ascii=False))
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
