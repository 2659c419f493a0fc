"""``python -m transformer_ext.evaluate``: BLEU and chrF of a model, or of given translations."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from transformer_ext._command import command
from transformer_ext.config import ArgumentParser, ConfigError, add_arguments, from_dict, given
from transformer_ext.inference.options import (
    SearchOptions,
    add_batch_arguments,
    add_engine_arguments,
)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m transformer_ext.evaluate",
        usage="%(prog)s MODEL_DIR [--src FILE --ref FILE] [options]\n"
        "       %(prog)s --hyp FILE --ref FILE [options]",
        description="sacreBLEU's BLEU and chrF, with their signatures. Without files: of the "
        "shipped test set.",
    )
    parser.add_argument("model", metavar="MODEL_DIR", nargs="?", help="folder of the model")
    parser.add_argument("--src", metavar="FILE", help="source text, one sentence a line")
    parser.add_argument("--ref", metavar="FILE", help="its reference translation, line by line")
    parser.add_argument("--hyp", metavar="FILE", help="translations to judge, instead of a model's")
    parser.add_argument("--output", metavar="FILE", help="write the model's translations here")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_engine_arguments(parser)
    add_batch_arguments(parser, "sentences decoded")
    add_arguments(parser, SearchOptions)
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        options = from_dict(SearchOptions, given(arguments, SearchOptions))
    except ConfigError as error:
        parser.error(str(error))
    if (arguments.model is None) == (arguments.hyp is None):
        parser.error("expected either MODEL_DIR or --hyp FILE")
    if arguments.hyp is not None and (arguments.ref is None or arguments.src is not None):
        parser.error("--hyp FILE needs --ref FILE, and no --src")
    if arguments.model is not None and (arguments.src is None) != (arguments.ref is None):
        parser.error("--src FILE and --ref FILE belong together")
    if arguments.output is not None and arguments.hyp is not None:
        parser.error("--output FILE needs a model to write the translations of")
    if arguments.hyp is not None:
        engine = ("threads", "compute_type", "batch_size", "batch_tokens")
        names = [n for n in engine if getattr(arguments, n) != parser.get_default(n)]
        for name in (*given(arguments, SearchOptions), *names):
            parser.error(f"--{name.replace('_', '-')} needs a model to translate with, got --hyp")
    for name in ("return_alignment", "return_attention"):
        if getattr(options, name):
            parser.error(f"--{name.replace('_', '-')}: only translate and score write it")
    if arguments.ensemble and arguments.model is None:
        parser.error("--ensemble MODEL_DIR needs a first model")
    from transformer_ext.data.corpus import shipped_corpus
    from transformer_ext.inference.lines import TextLines
    from transformer_ext.training.scoring import score

    # Before the work whose result it is to hold.
    if arguments.output is not None and not Path(arguments.output).parent.is_dir():
        raise ValueError(f"--output {arguments.output}: its folder is not there")
    text = TextLines()
    if arguments.ref is None:
        test = shipped_corpus().test
        sources_path, reference_path = test.src[0], test.tgt[0]
    else:
        sources_path, reference_path = arguments.src, arguments.ref
    references = text.read(reference_path)
    read_path = arguments.hyp or sources_path
    lines = text.read(read_path)
    if len(lines) != len(references):
        raise ValueError(
            f"{read_path} has {len(lines)} lines, {reference_path} has {len(references)}: "
            "expected as many"
        )
    if not references:
        raise ValueError(f"{reference_path}: has no lines")
    seconds = None
    if arguments.hyp is None:
        from transformer_ext.inference.translator import open_translator

        with open_translator(arguments, options) as translator:
            start = time.perf_counter()
            found = translator.translate(
                lines, batch_size=arguments.batch_size, batch_tokens=arguments.batch_tokens
            )
            seconds = time.perf_counter() - start
        outputs = [translation.text for translation in found]
        if arguments.output is not None:
            try:
                with open(arguments.output, "w", encoding="utf-8", newline="\n") as file:
                    file.writelines(f"{line}\n" for line in outputs)
            except OSError as error:
                raise OSError(f"--output {arguments.output}: {error.strerror}") from None
    else:
        outputs = lines
    if text.undecodable:
        print(
            f"warning: lines with bytes that are not UTF-8, replaced by U+FFFD: {text.undecodable}",
            file=sys.stderr,
        )
    scores = score(outputs, references)
    if arguments.json:
        values = {
            "bleu": scores.bleu,
            "bleu_signature": scores.bleu_signature,
            "chrf": scores.chrf,
            "chrf_signature": scores.chrf_signature,
            "sentences": len(outputs),
            "seconds": seconds,
        }
        print(json.dumps(values))
        return 0
    if seconds is not None:
        print(f"{len(outputs)} sentences translated in {seconds:.1f} s", file=sys.stderr)
    print(f"BLEU {scores.bleu:.2f}  {scores.bleu_signature}")
    print(f"chrF {scores.chrf:.2f}  {scores.chrf_signature}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
