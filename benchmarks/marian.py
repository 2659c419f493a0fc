"""Whether a model translates the same when exported: transformers, CTranslate2, and back again.

    python benchmarks/marian.py runs/001/model --sentences 200

The model (post-norm) is exported, the export imported, and converted by CTranslate2's own converter.
All translate the beginning of the shipped test text in float32, greedily and with a beam of 4, by
the same rules: those of ``generate``, then those of CTranslate2, both of which come with
``pip install ".[test]"``. Where two find different
translations, our model scores both in float64; the exit status is 1 if any two differ by 1e-4.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from decoding_models import marian_ids
from processes import require
from rescoring import differences, model_in_float64, score_in_float64

from transformer_ext.data.corpus import read_lines, shipped_corpus
from transformer_ext.huggingface import from_huggingface, to_huggingface
from transformer_ext.inference.options import SearchOptions
from transformer_ext.inference.translator import Translator

GAP = 1e-4
LONGEST = 200
Hypotheses = list[tuple[list[int], bool]]


def main() -> int:
    """Print a line for each comparison; 1 if a translation differs by more than rounding."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="model directory, post-norm")
    parser.add_argument("--sentences", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    lines = test_lines(arguments.sentences)
    with tempfile.TemporaryDirectory() as name:
        return compare(arguments.model, lines, arguments.threads, Path(name))


def test_lines(count: int) -> list[str]:
    """The beginning of the source side of the shipped test text."""
    (file,) = shipped_corpus().test.src
    return [line.decode() for line in itertools.islice(read_lines(file), count)]


def compare(model_dir: Path, lines: Sequence[str], threads: int, scratch: Path) -> int:
    """All comparisons."""
    require("torch", "transformers", "ctranslate2", what="the comparison")
    import ctranslate2
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    worst = 0.0
    to_huggingface(model_dir, scratch / "plain")
    to_huggingface(model_dir, scratch / "zero", zero_start=True)
    back = from_huggingface(scratch / "plain", scratch / "back")
    converter = ctranslate2.converters.TransformersConverter(str(scratch / "zero"))
    converter.convert(str(scratch / "ct2"))

    ours = Translator(model_dir, threads)
    imported = Translator(scratch / "back", threads)
    tokenizer = transformers.MarianTokenizer.from_pretrained(scratch / "plain")
    ids = marian_ids(scratch / "plain", ours.target_tokenizer)
    sources = ours.encode(lines)
    their_sources = [tokenizer(line).input_ids for line in lines]
    check("token ids of MarianTokenizer", [[ids[i] for i in s] for s in their_sources], sources)
    check("token ids of the import", imported.encode(lines), their_sources)

    def report(name: str, theirs: Hypotheses, mine: Hypotheses, options: SearchOptions) -> float:
        found = differences(model_dir, sources, mine, theirs, options)
        gap = max((abs(gap) for _, gap in found), default=0.0)
        print(f"{name:34} {len(lines) - len(found)} of {len(lines)} equal", end="")
        print(f", scores of the others within {gap:.1e}" if found else "")
        return gap

    for beam in (1, 4):
        options = SearchOptions.preset("huggingface", beam_size=beam, max_length=LONGEST)
        mine = [(r.tokens, r.hypotheses[0].ended) for r in ours.translate(lines, options)]
        assert back.search is not None
        never = back.search.suppressed_tokens
        again = imported.translate(lines, options, suppressed_tokens=never)
        found = [([ids[i] for i in r.tokens], r.hypotheses[0].ended) for r in again]
        worst = max(worst, report(f"import, beam {beam}", found, mine, options))
        for kind in ("plain", "zero"):
            model = transformers.MarianMTModel.from_pretrained(scratch / kind, dtype="float32")
            found = [
                ([ids[i] for i in tokens], ended)
                for tokens, ended in generate(model.eval(), tokenizer, lines, beam)
            ]
            name = f"generate, {kind} start, beam {beam}"
            worst = max(worst, report(name, found, mine, options))

    exact = model_in_float64(model_dir)
    other = ctranslate2.Translator(
        str(scratch / "ct2"), compute_type="float32", intra_threads=threads
    )
    pieces = [ours.source_tokenizer.pieces(source) for source in sources]
    names = ours.target_tokenizer.pieces(range(ours.config.tgt_vocab_size))
    for beam in (1, 4):
        options = SearchOptions.preset(
            "ctranslate2", beam_size=beam, max_length=LONGEST, min_length=0
        )
        results = ours.translate(lines, options)
        mine = [(r.tokens, r.hypotheses[0].ended) for r in results]
        theirs = other.translate_batch(
            pieces,
            beam_size=beam,
            max_decoding_length=LONGEST,
            min_decoding_length=0,
            return_scores=True,
        )
        said = [[names.index(piece) for piece in found.hypotheses[0]] for found in theirs]
        # It does not tell whether a hypothesis ended.
        found = [(tokens, len(tokens) < LONGEST) for tokens in said]
        worst = max(worst, report(f"CTranslate2, beam {beam}", found, mine, options))
        for name, absent in (
            ("ours in float64", []),
            ("without the start token", [ours.config.decoder_start_id]),
        ):
            gaps = [
                abs(score_in_float64(exact, source, *h, options, absent) - t.scores[0])
                for source, h, t in zip(sources, found, theirs, strict=True)
            ]
            print(f"{'':34} its scores are within {max(gaps):.1e} of {name}")
    return int(worst >= GAP)


def check(name: str, found: list[list[int]], expected: list[list[int]]) -> None:
    """Equality of all token ids."""
    equal = sum(a == b for a, b in zip(found, expected, strict=True))
    print(f"{name:34} {equal} of {len(expected)} equal")
    if equal != len(expected):
        raise SystemExit(1)


def generate(model, tokenizer, lines: Sequence[str], beam: int) -> Hypotheses:
    """What ``generate`` finds, in its ids, and whether it ended."""
    import torch

    hypotheses: Hypotheses = []
    for first in range(0, len(lines), 20):
        batch = tokenizer(list(lines[first : first + 20]), return_tensors="pt", padding=True)
        with torch.inference_mode():
            rows = model.generate(
                **batch, num_beams=beam, max_length=None, max_new_tokens=LONGEST
            ).tolist()
        for _, *row in rows:
            ended = model.config.eos_token_id in row
            end = row.index(model.config.eos_token_id) if ended else LONGEST
            hypotheses.append((row[:end], ended))
    return hypotheses


if __name__ == "__main__":
    sys.exit(main())
