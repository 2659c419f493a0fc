"""``python -m transformer_ext.classify``: label texts, line by line.

Every input line gives one output line, in order: the label, a tab, its probability.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from transformer_ext._command import command
from transformer_ext.config import ArgumentParser

#: Most lines that are labelled together.
_LINES = 512


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m transformer_ext.classify",
        usage="%(prog)s MODEL_DIR [FILE ...] [options]",
        description="Label texts, one a line: N lines in, N lines out, in order.",
    )
    parser.add_argument("model", metavar="MODEL_DIR", help="folder of the model")
    parser.add_argument(
        "files",
        metavar="FILE",
        nargs="*",
        help="UTF-8 text, plain, gzip or xz, one text a line; none or - reads standard input",
    )
    parser.add_argument(
        "--format",
        choices=("text", "jsonl"),
        default="text",
        help="text: the label, a tab, its probability; jsonl: a JSON object a line with the "
        "probability of every label (default: %(default)s)",
    )
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    arguments = _parser().parse_args(argv)
    from transformer_ext.inference.classifier import TextClassifier
    from transformer_ext.inference.lines import TextLines, input_blocks

    classifier = TextClassifier(arguments.model)
    for lines in input_blocks(TextLines(), arguments.files, _LINES):
        for found in classifier(lines):
            if arguments.format == "jsonl":
                by_label = dict(zip(classifier.labels, found.probabilities, strict=True))
                values = {"label": found.label, "probabilities": by_label}
                print(json.dumps(values, ensure_ascii=False))
            else:
                print(f"{found.label}\t{found.probability:.4f}")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
