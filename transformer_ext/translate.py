"""``python -m transformer_ext.translate``: translate text, line by line.

Every input line gives one output line, in order; an empty line gives an empty line. Text goes to
stdout, everything else to stderr.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from transformer_ext.config import ArgumentParser, ConfigError, add_arguments, from_dict, given
from transformer_ext.inference.options import SearchOptions

if TYPE_CHECKING:
    from transformer_ext.inference.lines import TextLines
    from transformer_ext.inference.translator import Translation, Translator

FORMATS = ("text", "jsonl", "nbest")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m transformer_ext.translate",
        usage="%(prog)s MODEL_DIR [FILE ...] [options]",
        description="Translate text, one sentence a line: N lines in, N lines out, in order.",
    )
    parser.add_argument("model", metavar="MODEL_DIR", help="folder of the model")
    parser.add_argument(
        "files",
        metavar="FILE",
        nargs="*",
        help="UTF-8 text, plain, gzip or xz, one sentence a line; none or - reads standard input",
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="text",
        help="text: the translation; jsonl: a JSON object a line with scores and all hypotheses; "
        "nbest: a line for each hypothesis, 'number ||| text ||| score' (default: %(default)s)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="CPU threads (default: the physical cores that the process may use)",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=64,
        metavar="N",
        help="sentences decoded together; up to four times as many lines are read ahead where they "
        "are there to be read (default: %(default)s)",
    )
    add_arguments(parser, SearchOptions)
    return parser


def lines_of(number: int, translation: Translation, format: str) -> list[str]:
    """The output for one input line.

    Args:
        number: of the line, from 0.
        translation: of it.
        format: one of :data:`FORMATS`.
    """
    if format == "text":
        return [translation.text]
    if format == "jsonl":
        hypotheses = [dataclasses.asdict(hypothesis) for hypothesis in translation.hypotheses]
        values = {"text": translation.text, "score": translation.score, "hypotheses": hypotheses}
        return [json.dumps(values, ensure_ascii=False)]
    return [f"{number} ||| {h.text} ||| {h.score:.6f}" for h in translation.hypotheses]


def _warn(count: int, message: str) -> None:
    if count:
        print(f"warning: {message}", file=sys.stderr)


def _blocks(text: TextLines, files: Sequence[str], limit: int) -> Iterator[list[str]]:
    if files not in ([], ["-"]):
        if "-" in files:
            raise ValueError("-: standard input cannot be one of several files")
        yield from text.file_blocks(files, limit)
        return
    terminal = sys.stdin.isatty()
    if terminal:
        print(
            "Type a sentence and press Enter (Ctrl-D ends):\n> ",
            file=sys.stderr,
            end="",
            flush=True,
        )
    for block in text.stream_blocks(sys.stdin.fileno(), limit):
        yield block
        if terminal:
            print("> ", file=sys.stderr, end="", flush=True)
    if terminal:
        print(file=sys.stderr)


def _translate(
    translator: Translator,
    text: TextLines,
    files: Sequence[str],
    format: str,
    batch_size: int,
) -> None:
    number = over_long = cut = 0
    longest = translator.longest_source
    try:
        for block in _blocks(text, files, 4 * batch_size):
            sources = translator.encode(block)
            over_long += translator.count_over_long(sources)
            if longest is not None:
                cut += sum(len(source) > longest for source in sources)
                sources = [
                    source if len(source) <= longest else [*source[: longest - 1], source[-1]]
                    for source in sources
                ]
            for result in translator.translate_ids(sources, batch_size=batch_size):
                for line in lines_of(number, translator.translation(result), format):
                    sys.stdout.buffer.write(line.encode("utf-8") + b"\n")
                number += 1
            sys.stdout.buffer.flush()
    finally:
        _warn(over_long, translator.over_long_message(over_long))
        _warn(cut, f"texts longer than the {longest} positions of this model, cut to them: {cut}")
        _warn(
            text.undecodable,
            f"lines with bytes that are not UTF-8, replaced by U+FFFD: {text.undecodable}",
        )


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        options = from_dict(SearchOptions, given(arguments, SearchOptions))
    except ConfigError as error:
        parser.error(str(error))
    if arguments.batch_size < 1:
        parser.error(f"argument --batch-size: got {arguments.batch_size}, expected at least 1")
    try:
        from transformer_ext.inference.lines import TextLines
        from transformer_ext.inference.translator import Translator

        translator = Translator(arguments.model, arguments.threads, options=options)
        _translate(translator, TextLines(), arguments.files, arguments.format, arguments.batch_size)
    except BrokenPipeError:
        # The reader has gone, which is no mistake; Python's own flush at exit must not meet it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return 130
    except (ImportError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
