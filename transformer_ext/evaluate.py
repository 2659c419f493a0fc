"""``python -m transformer_ext.evaluate``: BLEU and chrF of a model, or of given translations.

``--compare`` judges several by sacreBLEU's paired bootstrap. Translations that a model made are
always written, so that a figure can be looked into and compared later.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformer_ext._command import command
from transformer_ext.config import ArgumentParser, ConfigError, add_arguments, from_dict, given
from transformer_ext.inference.lines import TextLines, check_as_many
from transformer_ext.inference.options import (
    SearchOptions,
    add_batch_arguments,
    add_engine_arguments,
)

_BOOTSTRAP = ("bootstrap_samples", "bootstrap_seed")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m transformer_ext.evaluate",
        usage="%(prog)s MODEL_DIR [--src FILE --ref FILE] [options]\n"
        "       %(prog)s --hyp FILE --ref FILE [options]\n"
        "       %(prog)s --compare SYSTEM SYSTEM [...] [--src FILE --ref FILE] [options]",
        description="sacreBLEU's BLEU and chrF, with their signatures. Without files: of the "
        "shipped test set. What a model translates is written beside it, as "
        "MODEL_DIR.SOURCE.output.txt, unless --output says where.",
    )
    parser.add_argument("model", metavar="MODEL_DIR", nargs="?", help="folder of the model")
    parser.add_argument("--src", metavar="FILE", help="source text, a sentence a line; - is stdin")
    parser.add_argument("--ref", metavar="FILE", help="its reference translation, line by line")
    parser.add_argument("--hyp", metavar="FILE", help="translations to judge, instead of a model's")
    parser.add_argument(
        "--compare",
        metavar="SYSTEM",
        nargs="+",
        help="model directories or files of translations: whether they differ from the first by more "
        "than chance (sacreBLEU's paired bootstrap resampling)",
    )
    parser.add_argument(
        "--bootstrap-samples",
        type=_integer(1, 100_000),
        default=1000,
        metavar="N",
        help="resamples of --compare (default: %(default)s)",
    )
    parser.add_argument(
        "--bootstrap-seed",
        type=_integer(1, 2**63 - 1),
        default=12345,
        metavar="N",
        help="seed of --compare's resampling (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        metavar="PATH",
        help="file for the model's translations; with --compare, a folder for those of all models "
        "and results.json",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_engine_arguments(parser)
    add_batch_arguments(parser, "sentences decoded")
    add_arguments(parser, SearchOptions)
    return parser


def _integer(least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(
                f"got {text!r}, expected an integer from {least} to {most}"
            )
        return value

    return parse


def _options(parser: ArgumentParser, arguments: Any) -> SearchOptions:
    """The options of the search; ends the process where arguments do not go together."""
    try:
        options = from_dict(SearchOptions, given(arguments, SearchOptions))
    except ConfigError as error:
        parser.error(str(error))
    modes = [arguments.model, arguments.hyp, arguments.compare]
    if sum(mode is not None for mode in modes) != 1:
        parser.error("expected either MODEL_DIR, --hyp FILE or --compare SYSTEM SYSTEM")
    if arguments.hyp is not None and (arguments.ref is None or arguments.src is not None):
        parser.error("--hyp FILE needs --ref FILE, and no --src")
    if arguments.compare is not None and len(arguments.compare) < 2:
        parser.error("--compare: got one system, expected two or more")
    if arguments.compare is not None:
        from transformer_ext.files import refuse_pointer

        # Any other file is taken for one of translations.
        for system in arguments.compare:
            refuse_pointer(system)
    if arguments.compare is None:
        for name in _BOOTSTRAP:
            if getattr(arguments, name) != parser.get_default(name):
                parser.error(f"--{name.replace('_', '-')}: only --compare resamples")
    models = _models(arguments)
    for name in models if arguments.compare else ():
        if not os.path.exists(name):
            parser.error(f"--compare: {name}: no such model directory or file of translations")
    if models and (arguments.src is None) != (arguments.ref is None):
        parser.error("--src FILE and --ref FILE belong together")
    if arguments.compare is not None and not models:
        if arguments.ref is None:
            parser.error("--compare: files of translations need --ref FILE")
        if arguments.src is not None:
            parser.error("--src FILE needs a model to translate it with")
    if arguments.ensemble and arguments.model is None:
        parser.error("--ensemble MODEL_DIR needs a first model")
    if not models:
        if arguments.output is not None:
            parser.error("--output needs a model to write the translations of")
        engine = ("threads", "compute_type", "device", "batch_size", "batch_tokens")
        names = [n for n in engine if getattr(arguments, n) != parser.get_default(n)]
        for name in (*given(arguments, SearchOptions), *names):
            parser.error(f"--{name.replace('_', '-')} needs a model to translate with")
    for name in ("return_alignment", "return_attention"):
        if getattr(options, name):
            parser.error(f"--{name.replace('_', '-')}: only translate and score write it")
    return options


def _models(arguments: Any) -> list[str]:
    """The systems that are models; what is no file is taken for one, and reported as missing."""
    if arguments.compare is None:
        return [] if arguments.model is None else [arguments.model]
    return [system for system in arguments.compare if not os.path.isfile(system)]


@dataclass
class _System:
    """One of those that are judged.

    Attributes:
        name: as given.
        output: the file of its translations.
        model: whether it has to translate first.
        lines: its translations.
        seconds: what translating took.
    """

    name: str
    output: str
    model: bool
    lines: list[str]
    seconds: float | None = None


def _source_name(path: str) -> str:
    name = "stdin" if path == "-" else Path(path).name
    return name.removesuffix(".xz").removesuffix(".gz")


def _beside(model: str, source: str) -> str:
    """The file for a model's translations of a text, beside its folder."""
    folder = os.path.dirname(model.rstrip("/\\"))
    name = os.path.basename(os.path.abspath(model))
    if os.path.basename(model.rstrip("/\\")) in ("", ".", ".."):
        folder = os.path.dirname(os.path.abspath(model))
    return os.path.join(folder, f"{name}.{_source_name(source)}.output.txt")


def _not_another(path: str, lines: Sequence[str]) -> str:
    """The path, with a number where other translations have it: of a text of the same name, or of
    another search."""
    stem, number, content = path.removesuffix(".txt"), 1, "".join(f"{line}\n" for line in lines)
    while os.path.isfile(path) and Path(path).read_bytes() != content.encode():
        number += 1
        path = f"{stem}.{number}.txt"
    return path


def _check_output(path: str, asked: bool) -> None:
    """Before the work whose result it is to hold.

    Raises:
        ValueError: the file cannot be written, as far as can be seen.
    """
    where = f"--output {path}" if asked else path
    advice = "" if asked else "; --output names another place for the translations"
    folder = os.path.dirname(path) or "."
    if os.path.isdir(path):
        raise ValueError(f"{where}: is a folder, expected a file{advice}")
    if not os.path.isdir(folder):
        raise ValueError(f"{where}: its folder is not there")
    if not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise ValueError(f"{where}: may not be written{advice}")


def _check_folder(path: str) -> None:
    """As :func:`_check_output`, for the folder of a comparison, which need not be there."""
    if not os.path.isdir(path):
        if os.path.exists(path):
            raise ValueError(f"--output {path}: is a file, expected a folder, for --compare")
        _check_output(path.rstrip("/\\"), True)
    elif not os.access(path, os.W_OK):
        raise ValueError(f"--output {path}: may not be written")


def _write(path: str, lines: Sequence[str]) -> None:
    from transformer_ext.files import atomic_write

    text = "".join(f"{line}\n" for line in lines)
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            # /dev/stdout and the like cannot be replaced by a complete file.
            with open(path, "w", encoding="utf-8", newline="\n") as file:
                file.write(text)
        else:
            atomic_write(path, text)
    except OSError as error:
        raise OSError(f"{path}: cannot be written: {error.strerror}") from None


def _translate(
    system: _System, lines: Sequence[str], arguments: Any, options: SearchOptions
) -> None:
    from transformer_ext.inference.translator import open_translator

    arguments = copy.copy(arguments)
    arguments.model = system.name
    with open_translator(arguments, options) as translator:
        start = time.perf_counter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = translator.translate(
                lines, batch_size=arguments.batch_size, batch_tokens=arguments.batch_tokens
            )
        system.seconds = time.perf_counter() - start
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)
    system.lines = [translation.text for translation in found]
    if arguments.output is None:
        system.output = _not_another(system.output, system.lines)
    _write(system.output, system.lines)
    print(
        f"{len(lines)} sentences translated in {system.seconds:.1f} s: {system.output}",
        file=sys.stderr,
    )


def _check_systems(systems: Sequence[_System], sources_path: str, reference_path: str) -> None:
    """Before anything is translated.

    Raises:
        ValueError: a system stands twice or is the reference, or a model cannot be opened.
    """
    from transformer_ext.files import load_model_dir

    seen: dict[str, str] = {}
    for system in systems:
        place = os.path.realpath(system.name)
        if place in seen:
            raise ValueError(
                f"--compare: {seen[place]} and {system.name} are the same; to compare two ways of "
                "decoding one model, write the translations of each with --output"
            )
        seen[place] = system.name
        if place == os.path.realpath(reference_path):
            raise ValueError(f"{system.name} is given as translations and as reference")
        if system.model:
            load_model_dir(system.name)
    if any(s.model for s in systems) and os.path.realpath(sources_path) == os.path.realpath(
        reference_path
    ):
        raise ValueError(f"{sources_path} is given as source and as reference")


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    options = _options(parser, arguments)
    from transformer_ext.data.corpus import shipped_corpus

    sources_path, reference_path = arguments.src, arguments.ref
    if reference_path is None:
        test = shipped_corpus().test
        sources_path, reference_path = test.src[0], test.tgt[0]
    comparing = arguments.compare is not None
    models = _models(arguments)
    systems = []
    for number, name in enumerate(arguments.compare or [arguments.model or arguments.hyp], 1):
        output = name
        if name in models:
            output = arguments.output or _beside(name, sources_path)
            if comparing and arguments.output is not None:
                base = os.path.basename(os.path.abspath(name))
                output = os.path.join(arguments.output, f"{number}.{base}.output.txt")
        systems.append(_System(name, output, name in models, []))
    _check_systems(systems, sources_path, reference_path)
    folder = arguments.output if comparing else None
    if folder is not None:
        _check_folder(folder)
    for system in systems:
        if system.model and folder is None:
            _check_output(system.output, arguments.output is not None)

    if models and arguments.ref is None:
        print(
            "text: the test set that comes with the package (software help, English to German); "
            "--src and --ref name another",
            file=sys.stderr,
        )
    text = TextLines()
    references = text.read(reference_path)
    if not references:
        raise ValueError(f"{reference_path}: has no lines")
    given_lines = {path: text.read(path) for path in _texts_read(systems, sources_path)}
    for path, lines in given_lines.items():
        check_as_many(path, lines, reference_path, references)
    if text.undecodable:
        print(
            f"warning: lines with bytes that are not UTF-8, replaced by U+FFFD: {text.undecodable}",
            file=sys.stderr,
        )
    if folder is not None:
        os.makedirs(folder, exist_ok=True)
    for system in systems:
        if system.model:
            _translate(system, given_lines[sources_path], arguments, options)
        else:
            system.lines = given_lines[system.name]
    if comparing:
        _compare(systems, references, arguments)
    else:
        _score(systems[0], references, arguments)
    return 0


def _texts_read(systems: Sequence[_System], sources_path: str) -> list[str]:
    paths = [system.name for system in systems if not system.model]
    return paths + ([sources_path] if len(paths) < len(systems) else [])


def _score(system: _System, references: Sequence[str], arguments: Any) -> None:
    """Prints the figures of one system."""
    from transformer_ext.training.scoring import score

    scores = score(system.lines, references)
    if arguments.json:
        values = {
            "bleu": scores.bleu,
            "bleu_signature": scores.bleu_signature,
            "chrf": scores.chrf,
            "chrf_signature": scores.chrf_signature,
            "sentences": len(system.lines),
            "seconds": system.seconds,
            "output": system.output,
        }
        print(json.dumps(values))
        return
    print(f"BLEU {scores.bleu:.2f}  {scores.bleu_signature}")
    print(f"chrF {scores.chrf:.2f}  {scores.chrf_signature}")


def _compare(systems: Sequence[_System], references: Sequence[str], arguments: Any) -> None:
    """Prints, and in a folder writes, what the paired bootstrap says."""
    from transformer_ext.files import write_json
    from transformer_ext.training.scoring import compare

    found = compare(
        [system.lines for system in systems],
        references,
        arguments.bootstrap_samples,
        arguments.bootstrap_seed,
    )
    values = {
        "sentences": len(references),
        "bootstrap_samples": arguments.bootstrap_samples,
        "bootstrap_seed": arguments.bootstrap_seed,
        "bleu_signature": found.bleu_signature,
        "chrf_signature": found.chrf_signature,
        "systems": [
            {
                "name": system.name,
                "output": system.output,
                "seconds": system.seconds,
                **{
                    f"{name}{part}": value
                    for name, judged in (("bleu", bleu), ("chrf", chrf))
                    for part, value in (
                        ("", judged.score),
                        ("_mean", judged.mean),
                        ("_interval", judged.interval),
                        ("_p_value", judged.p_value),
                    )
                },
            }
            for system, bleu, chrf in zip(systems, found.bleu, found.chrf, strict=True)
        ],
    }
    for system in systems[1:]:
        if system.lines == systems[0].lines:
            print(
                f"note: {system.name} translates every sentence as {systems[0].name} does",
                file=sys.stderr,
            )
    if arguments.output is not None:
        file = os.path.join(arguments.output, "results.json")
        try:
            write_json(file, values)
        except OSError as error:
            raise OSError(f"{file}: cannot be written: {error.strerror}") from None
    if arguments.json:
        print(json.dumps(values))
        return
    width = max(len(system.name) for system in systems)
    print(f"{'':{width}}  {'':5}   score  mean and 95 % interval  p")
    for name, figures in (("BLEU", found.bleu), ("chrF", found.chrf)):
        for system, judged in zip(systems, figures, strict=True):
            p = "baseline" if judged.p_value is None else f"{judged.p_value:.4f}"
            print(
                f"{system.name:{width}}  {name:5}  {judged.score:6.2f}  "
                f"{judged.mean:6.2f} ± {judged.interval:<13.2f}  {p}"
            )
    print(
        f"p: how often chance alone makes such a difference from {systems[0].name} "
        f"({arguments.bootstrap_samples} resamples, seed {arguments.bootstrap_seed}); one below "
        "0.05 is usually taken for a real difference"
    )
    print(f"BLEU {found.bleu_signature}\nchrF {found.chrf_signature}")


if __name__ == "__main__":
    sys.exit(main())
