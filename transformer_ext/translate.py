"""``python -m transformer_ext.translate``: translate text, line by line.

Every input line gives one output line, in order; an empty line gives an empty line. Text goes to
stdout, everything else to stderr.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from transformer_ext._command import command
from transformer_ext.config import ArgumentParser, ConfigError, add_arguments, given
from transformer_ext.inference.options import (
    PRESETS,
    SearchOptions,
    add_batch_arguments,
    add_engine_arguments,
)

if TYPE_CHECKING:
    from transformer_ext.inference.lines import TextLines
    from transformer_ext.inference.translator import TextHypothesis, Translation, Translator

FORMATS = ("text", "jsonl", "nbest")

#: Tokens of the longest line that is translated whole, where neither option nor model say more.
LONGEST_LINE = 1024


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
        default=[],
        help="UTF-8 text, plain, gzip or xz, one sentence a line; none or - reads standard input",
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="text",
        help="text: the translation; jsonl: a JSON object a line with scores and all hypotheses; "
        "nbest: a line for each hypothesis, 'number ||| text ||| score' (default: %(default)s)",
    )
    add_engine_arguments(parser)
    add_batch_arguments(
        parser,
        "sentences decoded",
        "; up to four times as many lines are read ahead where they are there to be read",
    )
    parser.add_argument(
        "--target-prefix",
        metavar="FILE",
        help="what each translation is to begin with: as many lines as the input has; - reads "
        "standard input",
    )
    parser.add_argument(
        "--source-tag",
        metavar="TAG",
        help="a tag that the model was trained with, such as <2de>, before each line; without it "
        "lines may begin with tags themselves",
    )
    parser.add_argument(
        "--search-preset",
        choices=tuple(PRESETS),
        default="paper",
        help="search as the named program does, where the options below do not say otherwise "
        "(default: %(default)s)",
    )
    add_arguments(parser, SearchOptions)
    return parser


def _values(hypothesis: TextHypothesis, pieces: list[str] | None) -> dict[str, Any]:
    """A hypothesis for JSON; with its pieces where they are given."""
    values: dict[str, Any] = {
        "text": hypothesis.text,
        "tokens": hypothesis.tokens,
        "score": _number(hypothesis.score),
        "log_prob": _number(hypothesis.log_prob),
        "token_scores": hypothesis.token_scores,
        "stop": hypothesis.stop,
    }
    if pieces is not None:
        values["pieces"] = pieces
    if hypothesis.alignment is not None:
        values["alignment"] = hypothesis.alignment
    if hypothesis.attention is not None:
        values["attention"] = hypothesis.attention.tolist()
    return values


def _number(value: float) -> float | None:
    """For JSON, which has no infinity."""
    return value if math.isfinite(value) else None


def lines_of(
    number: int,
    translation: Translation,
    format: str,
    pieces: Callable[[list[int], bool], list[str]] | None = None,
    source: Sequence[int] = (),
) -> list[str]:
    """The output for one input line.

    Args:
        number: of the line, from 0.
        translation: of it.
        format: one of :data:`FORMATS`.
        pieces: of ids of the target (True) or source, where they are to be shown.
        source: ids of the line.
    """
    if format == "text":
        return [translation.text]
    if format == "jsonl":
        hypotheses = [
            _values(h, None if pieces is None else pieces(h.tokens, True))
            for h in translation.hypotheses
        ]
        values: dict[str, Any] = {"text": translation.text, "score": _number(translation.score)}
        if pieces is not None:
            values["source_pieces"] = pieces(list(source), False)
        values["hypotheses"] = hypotheses
        return [json.dumps(values, ensure_ascii=False)]
    return [f"{number} ||| {h.text} ||| {h.score:.6f}" for h in translation.hypotheses]


def _warn(count: int, message: str) -> None:
    if count:
        print(f"warning: {message}", file=sys.stderr)


def _refuse_prefixes(file: str | None, count: int, each: str) -> NoReturn:
    raise ValueError(
        f"{file}: has {count} line{'s' if count != 1 else ''}, expected one for each {each}"
    )


def _translate(
    translator: Translator,
    text: TextLines,
    files: Sequence[str],
    format: str,
    batch_size: int | None,
    batch_tokens: int | None,
    ahead: int,
    prefix_file: str | None,
    source_tag: str | None,
) -> None:
    number = over_long = cut = untagged = 0
    tags = translator.source_tokenizer.given_source_tags if source_tag is None else ()
    if source_tag is not None:
        translator.check_source_tag(source_tag, "--source-tag")
    # A line that is no sentence (a file without line ends, say) must not take all memory.
    longest = translator.options.max_source_length or max(
        LONGEST_LINE, 2 * (translator.max_train_length or 0)
    )
    positions = translator.longest_source
    longest = longest if positions is None else min(longest, positions)
    prefix_lines = None if prefix_file is None else text.read(prefix_file)

    def pieces(ids: list[int], target: bool) -> list[str]:
        return (translator.target_tokenizer if target else translator.source_tokenizer).pieces(ids)

    options = translator.options
    shown = pieces if options.return_alignment or options.return_attention else None
    from transformer_ext.inference.lines import count_lines, input_blocks

    if prefix_lines is not None:
        expected = count_lines(files)
        if expected not in (None, len(prefix_lines)):
            _refuse_prefixes(
                prefix_file, len(prefix_lines), f"of the {expected} lines of the input"
            )
    try:
        for block in input_blocks(text, files, ahead):
            sources = translator.encode(block, source_tag)
            if tags:
                untagged += sum(not line.startswith(tags) for line in block if line.strip())
            over_long += translator.count_over_long(sources)
            cut += sum(len(source) > longest for source in sources)
            sources = [
                source if len(source) <= longest else [*source[: longest - 1], source[-1]]
                for source in sources
            ]
            numbers = range(number, number + len(block))
            prefixes = None
            if prefix_lines is not None:
                if len(prefix_lines) < numbers.stop:
                    more = "line of the input, which has more"
                    _refuse_prefixes(prefix_file, len(prefix_lines), more)
                prefixes = translator.encode_prefixes(prefix_lines[numbers.start : numbers.stop])
            results = translator.translate_ids(
                sources,
                prefixes=prefixes,
                numbers=numbers,
                batch_size=batch_size,
                batch_tokens=batch_tokens,
            )
            for source, result in zip(sources, results, strict=True):
                translation = translator.translation(result)
                for line in lines_of(number, translation, format, shown, source):
                    sys.stdout.buffer.write(line.encode("utf-8") + b"\n")
                number += 1
            sys.stdout.buffer.flush()
        if prefix_lines is not None and len(prefix_lines) != number:
            _refuse_prefixes(prefix_file, len(prefix_lines), f"of the {number} lines of the input")
    finally:
        _warn(untagged, f"lines that begin with none of {', '.join(tags)}: {untagged}")
        _warn(over_long, translator.over_long_message(over_long))
        what = (
            f"the {longest} positions of this model"
            if longest == positions
            else f"{longest} tokens"
        )
        _warn(cut, f"texts longer than {what}, cut to them: {cut}")
        _warn(
            text.undecodable,
            f"lines with bytes that are not UTF-8, replaced by U+FFFD: {text.undecodable}",
        )


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        values = given(arguments, SearchOptions)
        options = SearchOptions.preset(arguments.search_preset, **values)
    except ConfigError as error:
        parser.error(str(error))
    if (options.return_attention or options.return_alignment) and arguments.format != "jsonl":
        parser.error("--return-attention and --return-alignment: expected --format jsonl with them")
    from transformer_ext.inference.lines import TextLines, lines_ahead
    from transformer_ext.inference.translator import open_translator

    with open_translator(arguments, options) as translator:
        _translate(
            translator,
            TextLines(),
            arguments.files,
            arguments.format,
            arguments.batch_size,
            arguments.batch_tokens,
            lines_ahead(arguments),
            arguments.target_prefix,
            arguments.source_tag,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
