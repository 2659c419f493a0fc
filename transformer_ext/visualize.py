"""``python -m transformer_ext.visualize PICTURE ...``: pictures of models, trainings and formulas.

Each picture has a module of its own in :mod:`transformer_ext.visualization`; here is the command.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformer_ext._command import command
from transformer_ext.config import (
    ArgumentParser,
    add_arguments,
    given,
    nearest,
    text_argument,
)
from transformer_ext.inference.options import SearchOptions
from transformer_ext.inference.shared import fed_tokens
from transformer_ext.model.config import (
    PRESETS,
    LanguageModelConfig,
    ModelConfig,
    TransformerConfig,
    preset,
)
from transformer_ext.training.sizing import Recipe
from transformer_ext.visualization.figure import FORMATS, check_output, save_figure
from transformer_ext.visualization.positions import LAYOUTS

if TYPE_CHECKING:
    from transformer_ext.files import ModelDir
    from transformer_ext.model import Model

__all__ = ["PICTURES", "load_model", "main"]

#: Tokens of a text: at 8 points of a letter they are 300 inches, the most that a picture has.
_LONGEST = 2000


def load_model(
    folder: str | os.PathLike[str], kind: type[ModelConfig] = TransformerConfig
) -> tuple[Any, Any]:
    """The model in a model directory as a torch module in evaluation mode, and what lies beside it.

    Args:
        folder: the directory.
        kind: class of the configuration that is expected; ``ModelConfig`` takes every kind.

    Returns:
        (:class:`transformer_ext.model.Model`, :class:`transformer_ext.files.ModelDir`).

    Raises:
        FileError: no such model, or one of another kind.
    """
    from transformer_ext.files import load_model_dir
    from transformer_ext.model import LanguageModel, TextEncoder, Transformer

    saved: ModelDir[Any] = load_model_dir(os.fspath(folder), kind)
    model: Model
    if isinstance(saved.config, TransformerConfig):
        model = Transformer(saved.config)
    elif isinstance(saved.config, LanguageModelConfig):
        model = LanguageModel(saved.config)
    else:
        model = TextEncoder(saved.config)
    return model.load_weights(saved.weights).eval(), saved


@dataclasses.dataclass(frozen=True)
class Picture:
    """One picture as the command has it.

    Attributes:
        summary: what it shows.
        usage: what stands after its name.
        add_options: gives the parser the options of its own.
        draw: draws it into ``options.output``, which can be written; returns what the command prints.
        formats: endings of its output.
    """

    summary: str
    usage: str
    add_options: Callable[[ArgumentParser], object]
    draw: Callable[[argparse.Namespace, ArgumentParser], str]
    formats: tuple[str, ...] = FORMATS


def _text_option(parser: ArgumentParser, flag: str, help: str) -> None:
    parser.add_argument(flag, type=text_argument, metavar="TEXT", help=help)


def _attention_options(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL_DIR", help="folder of the model")
    _text_option(parser, "--source", "the sentence to translate")
    _text_option(parser, "--target", "a translation to look at (default: the model's own)")
    _text_option(parser, "--text", "a text, for a language model or a text encoder")
    parser.add_argument(
        "--kind",
        choices=["cross", "encoder", "decoder"],
        help="of a picture: cross: translation to source (default); encoder, decoder: "
        "self-attention",
    )
    for name in ("layer", "head"):
        parser.add_argument(
            f"--{name}",
            type=int,
            action="append",
            metavar="N",
            help=f"of a picture: {name} to draw, from 1; may be given again (default: all)",
        )


def _draw_attention(options: argparse.Namespace, parser: ArgumentParser) -> str:
    from transformer_ext.visualization import attention, page

    as_page = Path(options.output).suffix.lower() == ".html"
    for name in ("source", "target", "text"):
        _check_text(name, getattr(options, name), parser)
    if as_page:
        for name in ("kind", "layer", "head"):
            if getattr(options, name) is not None:
                parser.error(f"--{name}: a page has all of them; expected no --{name}")
    model, saved = load_model(options.model, ModelConfig)
    pair = isinstance(saved.config, TransformerConfig)
    text, ids = _wanted_text(options, saved, parser, ("source", "target", "text"))
    if not as_page:
        _check_choice(options, saved, parser)
    texts = [text]
    if pair:
        target_ids = _target_ids(model, saved, ids, options.target)
        _check_length("target", len(target_ids) + 1, saved.config, parser)
        texts.append(saved.target_tokenizer.decode(target_ids))
        maps = attention.translation_attention(
            model, ids, target_ids, saved.source_tokenizer, saved.target_tokenizer
        )
    else:
        maps = attention.text_attention(model, ids, saved.source_tokenizer)
    if as_page:
        special = {
            tokenizer.piece(id)
            for tokenizer in (saved.source_tokenizer, saved.target_tokenizer)
            for id in (tokenizer.pad_id, tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id)
        }
        place = Path(options.model).resolve()
        title = f"Attention of {place.parent.name}/{place.name}"
        data = page.page_data(maps, title=title, texts=texts, special=special)
        page.save_attention_page(data, options.output)
    else:
        kind = options.kind or ("cross" if pair else next(iter(maps), "none"))
        found = attention.of_kind(maps, kind)
        figure = attention.draw_attention(found, options.layer, options.head)
        save_figure(figure, options.output)
    return "\n".join(texts) + "\n"


def _check_text(name: str, text: str | None, parser: ArgumentParser) -> None:
    if text is not None and not text.strip():
        parser.error(f"--{name}: got {text!r}, expected a text of at least one letter")


def _wanted_text(
    options: argparse.Namespace, saved: Any, parser: ArgumentParser, names: Sequence[str]
) -> tuple[str, list[int]]:
    """The text that the kind of model reads, and its ids; of the other names none may be given."""
    pair = isinstance(saved.config, TransformerConfig)
    wanted = "source" if pair else "text"
    expected = ("source", "target") if pair else ("text",)
    for name in names:
        if name not in expected and getattr(options, name) is not None:
            parser.error(f"--{name}: {options.model} is {saved.config.kind}; expected --{wanted}")
    text = getattr(options, wanted)
    if text is None:
        parser.error(f"--{wanted}: is missing; {options.model} is {saved.config.kind}")
    ids: list[int] = saved.source_tokenizer.encode(text)
    if not ids:
        parser.error(f"--{wanted}: got {text!r}, of which the tokenizer of the model keeps nothing")
    if isinstance(saved.config, LanguageModelConfig):
        count = len(fed_tokens(saved.config, ids))
    else:
        count = len(ids) + (1 if pair else 2)
    _check_length(wanted, count, saved.config, parser)
    return text, ids


def _check_length(name: str, count: int, config: Any, parser: ArgumentParser) -> None:
    """Before anything is computed: what a model cannot read, or nobody could look at."""
    most, reason = _LONGEST, "a picture has no room for more"
    if config.longest is not None and config.longest < most:
        most, reason = config.longest, "the model has no more learned positions"
    if count > most:
        parser.error(
            f"--{name}: has {count:,} tokens with those around it, expected at most {most:,}: {reason}"
        )


def _check_choice(options: argparse.Namespace, saved: Any, parser: ArgumentParser) -> None:
    """Kind, layers and heads, before anything is computed."""
    config = saved.config
    if isinstance(config, TransformerConfig):
        depths = {
            "cross": config.num_decoder_layers,
            "encoder": config.num_encoder_layers,
            "decoder": config.num_decoder_layers,
        }
    else:
        depths = {
            "decoder" if isinstance(config, LanguageModelConfig) else "encoder": config.num_layers
        }
    kind = options.kind or next(iter(depths))
    if kind not in depths:
        parser.error(
            f"--kind: got {kind!r}, expected {' or '.join(depths)}: {options.model} is {config.kind}"
        )
    if not depths[kind]:
        parser.error(f"--kind: {options.model} has no layer of the kind {kind}")
    for name, most in (("layer", depths[kind]), ("head", config.nhead)):
        for number in getattr(options, name) or ():
            if not 1 <= number <= most:
                parser.error(f"--{name}: got {number}, expected 1 to {most}")


def _target_ids(model: Any, saved: Any, source_ids: Sequence[int], text: str | None) -> list[int]:
    """Of the given translation, or of the model's own."""
    from transformer_ext.inference.search import beam_search

    if text is not None:
        ids: list[int] = saved.target_tokenizer.encode(text)
        return ids
    source = [*source_ids, saved.source_tokenizer.eos_id]
    return list(beam_search(model, [source])[0].hypotheses[0].tokens)


def _beam_options(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL_DIR", help="folder of the model")
    _text_option(parser, "--source", "the sentence to translate")
    _text_option(parser, "--text", "the beginning that a language model continues")
    add_arguments(parser, SearchOptions)


def _draw_beam(options: argparse.Namespace, parser: ArgumentParser) -> str:
    from transformer_ext.visualization.beam import beam_tree, check_beam, draw_beam

    for name in ("source", "text"):
        _check_text(name, getattr(options, name), parser)
    try:
        search_options = SearchOptions(**given(options, SearchOptions))
        check_beam(search_options)
    except ValueError as error:
        parser.error(str(error))
    model, saved = load_model(options.model, ModelConfig)
    if not isinstance(saved.config, TransformerConfig | LanguageModelConfig):
        parser.error(
            f"MODEL_DIR: {options.model} is {saved.config.kind}, which writes nothing; expected a "
            "translation model or a language model"
        )
    text, ids = _wanted_text(options, saved, parser, ("source", "text"))
    pair = isinstance(saved.config, TransformerConfig)
    source = [*ids, saved.source_tokenizer.eos_id] if pair else ids
    tree = beam_tree(model, source, saved.target_tokenizer, search_options, drawable=True)
    save_figure(draw_beam(tree, text), options.output)
    before = [] if pair else ids
    lines = [
        f"{found.score:.4f}  {saved.target_tokenizer.decode([*before, *found.tokens])}"
        for found in tree.result.hypotheses
    ]
    return "\n".join([text, *lines, ""])


def _positions_options(parser: ArgumentParser) -> None:
    parser.add_argument("--length", type=int, default=20, help="positions (default: %(default)s)")
    parser.add_argument(
        "--d-model", type=int, default=512, help="width of the model (default: %(default)s)"
    )
    parser.add_argument(
        "--layout",
        choices=[*LAYOUTS, "both"],
        default="both",
        help="; ".join(f"{layout}: {meaning}" for layout, meaning in LAYOUTS.items())
        + " (default: %(default)s)",
    )


def _draw_positions(options: argparse.Namespace, parser: ArgumentParser) -> str:
    from transformer_ext.visualization.positions import draw_positions

    layouts = tuple(LAYOUTS) if options.layout == "both" else (options.layout,)
    figure = draw_positions(options.length, options.d_model, layouts=layouts)
    save_figure(figure, options.output)
    return ""


def _schedules_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--learning-rate",
        type=float,
        default=7e-4,
        help="peak of the schedules beside noam (default: %(default)s)",
    )
    parser.add_argument(
        "--warmup-steps", type=int, default=4000, help="of the same (default: %(default)s)"
    )
    parser.add_argument(
        "--max-steps", type=int, default=20000, help="steps to draw (default: %(default)s)"
    )
    parser.add_argument(
        "--final-fraction",
        type=float,
        default=0.0,
        help="share of the peak that cosine and linear end at (default: %(default)s)",
    )


def _draw_schedules(options: argparse.Namespace, parser: ArgumentParser) -> str:
    from transformer_ext.visualization.schedules import (
        draw_schedules,
        every_schedule,
        noam_schedules,
    )

    if options.warmup_steps >= options.max_steps > 0:
        parser.error(
            f"--warmup-steps: got {options.warmup_steps}, expected fewer than --max-steps "
            f"({options.max_steps}): until then all schedules are the same"
        )
    others = every_schedule(
        options.learning_rate, options.warmup_steps, options.max_steps, options.final_fraction
    )
    panels = {
        "noam (paper, section 5.3)": noam_schedules(options.max_steps),
        f"peak {options.learning_rate:g}, warm-up {options.warmup_steps:,}": others,
    }
    save_figure(draw_schedules(panels), options.output)
    return ""


def _training_options(parser: ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN_DIR", help="folder of a training, or its log.jsonl")


def _draw_training(options: argparse.Namespace, parser: ArgumentParser) -> str:
    from transformer_ext.training.report import foreign_line, read_log
    from transformer_ext.visualization.training import draw_training, training_curves

    log = Path(options.run)
    if log.is_dir():
        log = log / "log.jsonl"
    if not log.is_file():
        raise ValueError(f"{options.run}: expected the folder of a training, or its log.jsonl")
    events = read_log(log)
    if not events and (number := foreign_line(log)) is not None:
        raise ValueError(
            f"{log}: is not the log of a training: line {number} is no JSON object with an event"
        )
    if not training_curves(events):
        raise ValueError(f"{log}: has no step and no validation yet")
    save_figure(draw_training(events, log.resolve().parent.name), options.output)
    return ""


def _smoothing_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--label-smoothing",
        type=float,
        default=Recipe.label_smoothing,
        help="of the map, and a curve (default: %(default)s, a training's)",
    )
    parser.add_argument(
        "--vocab-size", type=int, default=5, help="tokens of the vocabulary (default: %(default)s)"
    )


def _draw_smoothing(options: argparse.Namespace, parser: ArgumentParser) -> str:
    from transformer_ext.visualization.label_smoothing import CURVES, draw_label_smoothing

    curves = sorted({*CURVES, options.label_smoothing})
    figure = draw_label_smoothing(
        options.label_smoothing, vocab_size=options.vocab_size, curves=curves
    )
    save_figure(figure, options.output)
    return ""


def _flow_options(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL_DIR", nargs="?", help="folder of the model")
    parser.add_argument("--preset", choices=list(PRESETS), help="a named size instead of a model")
    parser.add_argument(
        "--vocab-size",
        type=int,
        help="of the preset (default: 32000)",
    )


def _draw_flow(options: argparse.Namespace, parser: ArgumentParser) -> str:
    from transformer_ext.model import Transformer
    from transformer_ext.visualization.flow import draw_flow, flow_text

    if (options.model is None) == (options.preset is None):
        parser.error("model: expected either MODEL_DIR or --preset")
    if options.preset is None:
        if options.vocab_size is not None:
            parser.error("--vocab-size: a model has its own; expected --preset with it")
        model, _ = load_model(options.model, ModelConfig)
    else:
        size = 32000 if options.vocab_size is None else options.vocab_size
        model = Transformer(preset(options.preset, size, size))
    save_figure(draw_flow(model), options.output)
    return flow_text(model)


#: name -> the picture
PICTURES = {
    "attention": Picture(
        "what attends to what, by layer and head; as .html an interactive page",
        "MODEL_DIR --source TEXT | --text TEXT",
        _attention_options,
        _draw_attention,
        (*FORMATS, ".html"),
    ),
    "beam": Picture(
        "the tree of a beam search, with scores",
        "MODEL_DIR --source TEXT | --text TEXT",
        _beam_options,
        _draw_beam,
    ),
    "flow": Picture(
        "every module with shape, type and equation; printed as a table too",
        "MODEL_DIR | --preset NAME",
        _flow_options,
        _draw_flow,
    ),
    "positions": Picture(
        "positional encoding as a map in both layouts, and as curves",
        "",
        _positions_options,
        _draw_positions,
    ),
    "schedules": Picture(
        "learning rate of every schedule", "", _schedules_options, _draw_schedules
    ),
    "training": Picture(
        "course of a training: loss, validations, learning rate, gradient norm",
        "RUN_DIR",
        _training_options,
        _draw_training,
    ),
    "label-smoothing": Picture(
        "targets of label smoothing, and what they do to an over-confident model",
        "",
        _smoothing_options,
        _draw_smoothing,
    ),
}

_PROGRAM = "python -m transformer_ext.visualize"


def _parser(name: str | None) -> ArgumentParser:
    """Of a picture; of the command without one, which can only explain itself."""
    if name is None:
        width = max(map(len, PICTURES))
        lines = [f"  {name:{width}}  {each.summary}" for name, each in PICTURES.items()]
        parser = ArgumentParser(
            prog=_PROGRAM,
            usage="%(prog)s PICTURE [options]",
            description="Draw a picture.",
            epilog="\n".join(["pictures:", *lines, "", "PICTURE --help lists its options."]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument("picture", metavar="PICTURE", help="what to draw, see below")
        return parser
    picture = PICTURES[name]
    parser = ArgumentParser(
        prog=f"{_PROGRAM} {name}",
        usage=f"%(prog)s {picture.usage} [options]".replace("  ", " "),
        description=f"Draw {picture.summary}.",
    )
    picture.add_options(parser)
    parser.add_argument(
        "--output",
        default=f"{name}.png",
        metavar="FILE",
        help=f"to be written: {', '.join(picture.formats)} (default: %(default)s)",
    )
    return parser


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    given_arguments = list(sys.argv[1:] if arguments is None else arguments)
    name = given_arguments[0] if given_arguments else None
    if name not in PICTURES:
        parser = _parser(None)
        found = parser.parse_args(given_arguments[:1]).picture
        parser.error(
            f"PICTURE: expected one of {', '.join(PICTURES)}, got {found!r}"
            f"{nearest(found, list(PICTURES))}"
        )
    parser = _parser(name)
    options = parser.parse_args(given_arguments[1:])
    picture = PICTURES[name]
    try:
        check_output(options.output, picture.formats)
        said = picture.draw(options, parser)
    except ValueError as error:
        # What the Python function calls an argument is an option here.
        if parser.with_flags(str(error)) != str(error):
            parser.error(str(error))
        raise
    print(f"{said}drawn into {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
