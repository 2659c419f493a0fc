"""``python -m transformer_ext.generate``: continue texts by a language model, line by line.

Every input line, an empty one too, gives one output line, in order: the line and what follows it.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from transformer_ext._command import command
from transformer_ext.config import ArgumentParser, ConfigError, add_arguments, given
from transformer_ext.inference.options import (
    PRESETS,
    SearchOptions,
    add_batch_arguments,
    add_engine_arguments,
)
from transformer_ext.inference.shared import PromptError, asked_of_source

if TYPE_CHECKING:
    from transformer_ext.inference.continuation import GeneratedText

FORMATS = ("text", "jsonl", "nbest")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m transformer_ext.generate",
        usage="%(prog)s MODEL_DIR [FILE ...] [options]",
        description="Continue texts, one a line, by a language model. Without options it is greedy "
        "(--beam-size 1) and writes at most 50 tokens (--max-length).",
    )
    parser.add_argument("model", metavar="MODEL_DIR", help="folder of the model")
    parser.add_argument(
        "files",
        metavar="FILE",
        nargs="*",
        default=[],
        help="UTF-8 text, plain, gzip or xz, one beginning a line; none or - reads standard input",
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="text",
        help="text: the line and its best continuation, whose line ends become spaces; jsonl: a "
        "JSON object a line with all hypotheses, as they are; nbest: a line for each hypothesis, "
        "'number ||| text ||| score' (default: %(default)s)",
    )
    add_engine_arguments(parser, ensemble=False)
    add_batch_arguments(
        parser,
        "texts continued",
        "; up to four times as many lines are read ahead where they are there to be read",
        tokens="tokens held for texts, and for what may follow them, once for each hypothesis,",
        batch_tokens=(8192, 65536),
    )
    parser.add_argument(
        "--search-preset",
        choices=tuple(PRESETS),
        default="paper",
        help="search as the named program does, where the options below do not say otherwise "
        "(default: %(default)s)",
    )
    add_arguments(parser, SearchOptions, {"beam_size": 1})
    return parser


def _one_line(text: str) -> str:
    return re.sub(r"\r\n|\r|\n", " ", text)


def lines_of(number: int, texts: Sequence[GeneratedText], format: str) -> str:
    """The output for one input line.

    Args:
        number: of the line, from 0.
        texts: its continuations.
        format: one of :data:`FORMATS`.
    """
    if format == "text":
        return _one_line(texts[0].text)
    if format == "nbest":
        return "\n".join(
            f"{number} ||| {_one_line(text.text)} ||| {text.hypothesis.score:.6f}" for text in texts
        )
    values = [
        {
            "text": text.text,
            "continuation": text.continuation,
            "tokens": text.hypothesis.tokens,
            "score": text.hypothesis.score,
            "log_prob": text.hypothesis.log_prob,
            "token_scores": text.hypothesis.token_scores,
            "stop": text.hypothesis.stop,
        }
        for text in texts
    ]
    return json.dumps({"text": texts[0].text, "hypotheses": values}, ensure_ascii=False)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    chosen = given(arguments, SearchOptions)
    if not chosen.get("sampling"):
        chosen.setdefault("beam_size", 1)
    try:
        options = SearchOptions.preset(arguments.search_preset, **chosen)
    except ConfigError as error:
        parser.error(str(error))
    if options.num_hypotheses > 1 and arguments.format == "text":
        parser.error(
            f"--num-hypotheses: got {options.num_hypotheses}, expected --format jsonl or nbest "
            "with more than 1"
        )
    asked = asked_of_source(options)
    if asked is not None:
        parser.error(
            f"--{asked.replace('_', '-')}: got {getattr(options, asked)}, but a language model has no "
            "source"
        )
    from transformer_ext.inference.continuation import TextGenerator
    from transformer_ext.inference.lines import TextLines, input_blocks, lines_ahead
    from transformer_ext.inference.text_model import TextError

    generator = TextGenerator(
        arguments.model,
        threads=arguments.threads,
        compute_type=arguments.compute_type,
        device=arguments.device,
    )
    number = 0
    text = TextLines()
    try:
        for lines in input_blocks(text, arguments.files, lines_ahead(arguments)):
            try:
                written = generator.generate(
                    lines,
                    options,
                    numbers=range(number, number + len(lines)),
                    batch_size=arguments.batch_size,
                    batch_tokens=arguments.batch_tokens,
                )
            except PromptError as error:
                raise ValueError(f"line {error.number + 1} {error.reason}") from None
            except TextError as error:
                raise ValueError(f"line {number + error.number + 1} {error.reason}") from None
            for line, texts in enumerate(written, number):
                sys.stdout.buffer.write(lines_of(line, texts, arguments.format).encode() + b"\n")
            sys.stdout.buffer.flush()
            number += len(lines)
    finally:
        text.warn()
    return 0


if __name__ == "__main__":
    sys.exit(main())
