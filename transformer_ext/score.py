"""``python -m transformer_ext.score``: log-probabilities that a model gives to given translations."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from typing import Any

from transformer_ext._command import command
from transformer_ext.config import ArgumentParser
from transformer_ext.inference.options import add_batch_arguments, add_engine_arguments


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
    parser.add_argument(
        "--src", metavar="FILE", required=True, help="source text; - reads standard input"
    )
    parser.add_argument(
        "--tgt", metavar="FILE", required=True, help="its translation, by line, or -"
    )
    parser.add_argument(
        "--format",
        choices=("text", "jsonl"),
        default="text",
        help="text: one number a line; jsonl: a JSON object a line, with the log-probability of "
        "each token (default: %(default)s)",
    )
    add_engine_arguments(parser)
    add_batch_arguments(parser, "pairs scored")
    parser.add_argument(
        "--return-alignment",
        action="store_true",
        help="jsonl: the source token that each target token attends to most",
    )
    parser.add_argument(
        "--return-attention",
        action="store_true",
        help="jsonl: each target token's attention to the source, averaged over heads",
    )
    parser.add_argument(
        "--attention-layer",
        type=int,
        metavar="N",
        help="decoder layer, from 0, of both (default: the last)",
    )
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    attends = arguments.return_alignment or arguments.return_attention
    if attends and arguments.format != "jsonl":
        parser.error("--return-attention and --return-alignment: expected --format jsonl with them")
    if arguments.attention_layer is not None and not attends:
        parser.error("--attention-layer: expected --return-attention or --return-alignment with it")
    from transformer_ext.inference.lines import TextLines, check_as_many
    from transformer_ext.inference.shared import alignment_of
    from transformer_ext.inference.translator import open_translator

    text = TextLines()
    sources, targets = text.read(arguments.src), text.read(arguments.tgt)
    check_as_many(arguments.src, sources, arguments.tgt, targets)
    with open_translator(arguments) as translator:
        batches = dict(batch_size=arguments.batch_size, batch_tokens=arguments.batch_tokens)
        attentions: list[Any] = [None] * len(sources)
        if attends:
            layer = arguments.attention_layer
            aligned = translator.align(sources, targets, layer=layer, **batches)
            scores = [row for row, _ in aligned]
            attentions = [attention for _, attention in aligned]
        else:
            scores = translator.score(sources, targets, **batches)
        for source, target, row, attention in zip(
            sources, targets, scores, attentions, strict=True
        ):
            # No token is scored where the source is empty.
            log_prob = sum(row) if row or not target.strip() else -math.inf
            if arguments.format == "jsonl":
                ids = translator.target_tokenizer.encode(target)
                pieces = translator.target_tokenizer.pieces([*ids, translator.config.eos_id])
                values: dict[str, Any] = {
                    "log_prob": log_prob if math.isfinite(log_prob) else None,
                    "tokens": pieces if row else [],
                    "token_scores": row,
                }
                if attends:
                    values["source_tokens"] = translator.source_tokenizer.pieces(
                        translator.encode([source])[0]
                    )
                if arguments.return_alignment:
                    values["alignment"] = alignment_of(attention)
                if arguments.return_attention:
                    values["attention"] = attention.tolist()
                print(json.dumps(values, ensure_ascii=False))
            else:
                print(f"{log_prob:.6f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
