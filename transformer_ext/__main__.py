"""`transformer-ext <command> ...`, the same as `python -m transformer_ext.<command> ...`."""

from __future__ import annotations

import importlib
import importlib.util
import sys

from transformer_ext._command import import_ops, limit_openmp_spin

COMMANDS = {
    "train": "train a model: on the shipped corpus, or on your own text",
    "prepare": "build tokenizer and data set without training",
    "translate": "translate text, line by line",
    "generate": "continue texts by a language model",
    "classify": "label texts by a classifier",
    "fill-mask": "guess masked tokens of texts",
    "embed": "vectors of texts, as a NumPy file",
    "score": "log-probabilities of given translations",
    "evaluate": "BLEU and chrF of a model on a test set",
    "average": "average checkpoints into one model",
    "convert": "models from and to Hugging Face's directories",
    "visualize": "pictures: attention, beam search, flow of a model, positions, trainings",
    "info": "what is installed, built and used, for a bug report",
}


def _module(command: str) -> str:
    return f"transformer_ext.{command.replace('-', '_')}"


def available() -> dict[str, str]:
    """The commands that this version has, with what each is for."""
    return {
        name: text
        for name, text in COMMANDS.items()
        if importlib.util.find_spec(_module(name)) is not None
    }


def _usage() -> str:
    commands = available()
    width = max(map(len, commands))
    lines = [f"  {name:{width}}  {text}" for name, text in commands.items()]
    return "\n".join(
        [
            "usage: transformer-ext <command> [options]",
            "",
            *lines,
            "",
            "`transformer-ext <command> --help` explains the options of a command.",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Runs one command; each command's module is imported only when it is asked for."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if arguments[0] in ("--version", "-V"):
        from transformer_ext import __version__

        print(f"transformer-ext {__version__}")
        return 0
    name, *rest = arguments
    # Some write it as its module is called.
    command = name.replace("_", "-")
    if command not in available():
        print(f"transformer-ext: no command {name!r}\n\n{_usage()}", file=sys.stderr)
        return 2
    if command == "train":
        limit_openmp_spin()
        import_ops()
    return importlib.import_module(_module(command)).main(rest) or 0


if __name__ == "__main__":
    sys.exit(main())
