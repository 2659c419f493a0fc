"""``python -m transformer_ext.classify``: label texts, line by line.

Every input line gives one output line, in order: the label, a tab, its probability.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from transformer_ext._command import command
from transformer_ext.config import ArgumentParser
from transformer_ext.inference.text_model import add_text_arguments, results_of_lines


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m transformer_ext.classify",
        usage="%(prog)s MODEL_DIR [FILE ...] [options]",
        description="Label texts, one a line: N lines in, N lines out, in order.",
    )
    add_text_arguments(parser)
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
    from transformer_ext.inference.classifier import Prediction, TextClassifier

    classifier = TextClassifier(
        arguments.model,
        threads=arguments.threads,
        compute_type=arguments.compute_type,
        device=arguments.device,
    )

    def label(lines: list[str]) -> list[Prediction]:
        return classifier(lines, truncation=arguments.truncation)

    for predictions in results_of_lines(arguments.files, label):
        for found in predictions:
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
