"""``python -m transformer_ext.score``: log-probabilities that a model gives to given translations."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence

from transformer_ext.config import ArgumentParser


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m transformer_ext.score",
        usage="%(prog)s MODEL_DIR --src FILE --tgt FILE [options]",
        description="For each pair of lines, the natural logarithm of the probability that the "
        "model gives to the target (its end of sentence included), given the source. An empty "
        "source is translated by an empty line and by nothing else: every other target has -inf "
        "(null in jsonl).",
    )
    parser.add_argument("model", metavar="MODEL_DIR", help="folder of the model")
    parser.add_argument("--src", metavar="FILE", required=True, help="source text")
    parser.add_argument("--tgt", metavar="FILE", required=True, help="its translation, by line")
    parser.add_argument(
        "--format",
        choices=("text", "jsonl"),
        default="text",
        help="text: one number a line; jsonl: a JSON object a line, with the log-probability of "
        "each token (default: %(default)s)",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads")
    parser.add_argument(
        "--batch-size",
        type=int,
        default=64,
        metavar="N",
        help="pairs scored together (default: %(default)s)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    arguments = _parser().parse_args(argv)
    try:
        from transformer_ext.inference.lines import TextLines
        from transformer_ext.inference.translator import Translator

        text = TextLines()
        sources, targets = text.read(arguments.src), text.read(arguments.tgt)
        if len(sources) != len(targets):
            raise ValueError(
                f"{arguments.src} has {len(sources)} lines, {arguments.tgt} has {len(targets)}: "
                "expected as many"
            )
        with Translator(arguments.model, arguments.threads) as translator:
            scores = translator.score(sources, targets, batch_size=arguments.batch_size)
            for target, row in zip(targets, scores, strict=True):
                # No token is scored where the source is empty.
                log_prob = sum(row) if row or not target.strip() else -math.inf
                if arguments.format == "jsonl":
                    ids = translator.target_tokenizer.encode(target)
                    pieces = translator.target_tokenizer.pieces([*ids, translator.config.eos_id])
                    values = {
                        "log_prob": log_prob if math.isfinite(log_prob) else None,
                        "tokens": pieces if row else [],
                        "token_scores": row,
                    }
                    print(json.dumps(values, ensure_ascii=False))
                else:
                    print(f"{log_prob:.6f}")
    except (ImportError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
