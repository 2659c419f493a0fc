"""``python -m transformer_ext.embed``: a vector for each line of text, as a NumPy file."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence

from transformer_ext._command import command
from transformer_ext.config import ArgumentParser
from transformer_ext.inference.text_model import add_text_arguments, results_of_lines
from transformer_ext.model.config import POOLINGS


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m transformer_ext.embed",
        usage="%(prog)s MODEL_DIR [FILE ...] --output FILE.npy [options]",
        description="Make a vector of each text, one a line: float32 [lines, d_model], to be read "
        "by numpy.load.",
    )
    add_text_arguments(parser)
    parser.add_argument("--output", required=True, metavar="FILE.npy", help="file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the file of --output")
    parser.add_argument(
        "--pooling",
        choices=POOLINGS,
        help="how the states of the tokens become one vector, without BERT's pooler: mean, or first "
        "for that of the start token (default: as the model says)",
    )
    parser.add_argument(
        "--normalize", action="store_true", help="vectors of length 1, whatever the model says"
    )
    return parser


def _check_output(output: str, inputs: Sequence[str], overwrite: bool) -> None:
    """Before the work whose result it is to hold.

    Raises:
        ValueError: the file is in the way, or cannot be written as far as can be seen.
    """
    if os.path.isdir(output):
        raise ValueError(f"--output: {output} is a folder, expected a file")
    if os.path.isfile(output):
        for name in inputs or ["-"]:
            if _is_same(output, name):
                raise ValueError(f"--output: {output} is an input, expected another file")
        if not overwrite:
            raise ValueError(f"--output: {output} is there already; --overwrite replaces it")
    # A file is replaced by another one in its folder, which need not be there yet.
    place = os.path.realpath(output)
    if os.path.isfile(output) or not os.path.exists(output):
        place = os.path.dirname(place)
        while not os.path.lexists(place):
            place = os.path.dirname(place)
        if not os.path.isdir(place):
            raise ValueError(f"--output: {output} cannot be written, {place} is no folder")
    else:
        place = output
    if not os.access(place, os.W_OK):
        raise ValueError(f"--output: {output} may not be written")


def _is_same(output: str, name: str) -> bool:
    try:
        given = os.fstat(0) if name == "-" else os.stat(name)
    except OSError:
        return False
    return os.path.samestat(os.stat(output), given)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    arguments = _parser().parse_args(argv)
    _check_output(arguments.output, arguments.files, arguments.overwrite)
    import numpy as np
    from numpy.typing import NDArray

    from transformer_ext.files import atomic_write
    from transformer_ext.inference.sentence_encoder import SentenceEncoder

    encoder = SentenceEncoder(
        arguments.model,
        threads=arguments.threads,
        compute_type=arguments.compute_type,
        device=arguments.device,
        pooling=arguments.pooling,
        normalize=arguments.normalize or None,
    )

    def embed(lines: list[str]) -> NDArray[np.float32]:
        return encoder.encode(lines, truncation=arguments.truncation)

    none = np.empty((0, encoder.config.d_model), np.float32)
    vectors = np.concatenate([none, *results_of_lines(arguments.files, embed)])
    file = io.BytesIO()
    np.save(file, vectors)
    atomic_write(arguments.output, file.getvalue())
    print(f"{arguments.output}: {len(vectors):,} vectors of {vectors.shape[1]}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
