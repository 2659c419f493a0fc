"""`python -m transformer_ext.translate` and `score`: lines in, lines out."""

from __future__ import annotations

import gzip
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from decoding_helpers import SENTENCES, save_random_model

from transformer_ext.inference.engine import resolve_compute_type
from transformer_ext.inference.options import SearchOptions
from transformer_ext.inference.translator import Translator

ROOT = Path(__file__).parents[1]
QUICK = ["--max-length", "12", "--threads", "1"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_random_model(tmp_path_factory.mktemp("command") / "model")


@pytest.fixture(scope="module")
def expected(model_dir):
    with Translator(model_dir) as translator:
        return [t.text for t in translator.translate(SENTENCES, max_length=12)]


def command(*arguments, module="translate"):
    return [sys.executable, "-m", f"transformer_ext.{module}", *map(str, arguments)]


def run(*arguments, stdin=b"", module="translate"):
    return subprocess.run(
        command(*arguments, module=module), input=stdin, capture_output=True, cwd=ROOT, timeout=300
    )


def test_as_many_lines_out_as_in(model_dir, expected):
    text = "\n".join(["", SENTENCES[0], "   ", *SENTENCES[1:], ""]) + "\n"
    done = run(model_dir, *QUICK, "--batch-size", 2, stdin=text.encode())
    assert done.returncode == 0 and done.stderr == b""
    assert done.stdout.decode() == "\n".join(["", expected[0], "", *expected[1:], ""]) + "\n"
    # No line end after the last line.
    done = run(model_dir, *QUICK, stdin="\n".join(SENTENCES[:2]).encode())
    assert done.stdout.decode().splitlines() == expected[:2]
    assert run(model_dir, *QUICK, stdin=b"").stdout == b""


def test_only_a_newline_ends_a_line(model_dir, expected):
    odd = "one\u2028two\x0bthree\x0cfour\x85five\rsix"
    done = run(model_dir, *QUICK, stdin=f"\ufeff{SENTENCES[0]}\r\n{odd}\n".encode())
    lines = done.stdout.split(b"\n")
    assert len(lines) == 3 and lines[0].decode() == expected[0] and lines[2] == b""


def test_undecodable_bytes_are_replaced_and_counted(model_dir):
    done = run(model_dir, *QUICK, stdin=b"open \xff\xfe\nfile\n\xc3\n")
    assert done.returncode == 0 and done.stdout.count(b"\n") == 3
    assert b"not UTF-8, replaced by U+FFFD: 2" in done.stderr


def test_long_lines_are_translated_with_one_warning(model_dir):
    line = " ".join(SENTENCES)
    done = run(model_dir, *QUICK, stdin=f"{line}\nopen\n{line}\n".encode())
    assert done.returncode == 0 and done.stdout.count(b"\n") == 3
    assert done.stderr.count(b"warning") == 1 and b"2 texts are longer" in done.stderr


def test_files(model_dir, expected, tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(SENTENCES[:4]) + "\n")
    with gzip.open(tmp_path / "b.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(SENTENCES[4:]) + "\n")
    done = run(model_dir, tmp_path / "a.txt", tmp_path / "b.gz", *QUICK)
    assert done.stdout.decode().splitlines() == expected
    done = run(model_dir, tmp_path / "missing.txt", *QUICK)
    assert done.returncode == 2 and b"missing.txt: cannot be read: No such file" in done.stderr


def test_jsonl_and_nbest(model_dir, expected):
    text = "\n".join(["", *SENTENCES[:2]]).encode()
    options = [*QUICK, "--num-hypotheses", "3"]
    lines = run(model_dir, *options, "--format", "jsonl", stdin=text).stdout.splitlines()
    values = [json.loads(line) for line in lines]
    assert [value["text"] for value in values] == ["", *expected[:2]]
    assert [len(value["hypotheses"]) for value in values] == [1, 3, 3]
    best = values[1]["hypotheses"][0]
    assert best["text"] == expected[0] and best["score"] == values[1]["score"]
    assert set(best) == {"text", "tokens", "score", "log_prob", "token_scores", "stop"}
    lines = run(model_dir, *options, "--format", "nbest", stdin=text).stdout.decode().splitlines()
    numbers = [line.split(" ||| ")[0] for line in lines]
    assert numbers == ["0", "1", "1", "1", "2", "2", "2"]
    assert lines[1].split(" ||| ")[1] == expected[0]


def test_alignment_and_pieces(model_dir):
    options = [*QUICK, "--format", "jsonl", "--return-alignment", "--return-attention"]
    done = run(model_dir, *options, stdin=f"{SENTENCES[0]}\n\n".encode())
    value, empty = (json.loads(line) for line in done.stdout.splitlines())
    best = value["hypotheses"][0]
    assert value["source_pieces"][-1] == "</s>"
    assert len(best["pieces"]) == len(best["tokens"]) > 0
    assert len(best["alignment"]) == len(best["attention"]) == len(best["token_scores"])
    for column, row in zip(best["alignment"], best["attention"], strict=True):
        assert len(row) == len(value["source_pieces"]) and row[column] == max(row)
    assert empty["source_pieces"] == [] and empty["hypotheses"][0]["alignment"] == []


def test_options_of_the_search(model_dir):
    text = "\n".join(SENTENCES[:3]).encode()
    options = [*QUICK, "--format", "jsonl", "--num-hypotheses", "3"]
    for given, changes in (
        (["--sampling", "--seed", "7", "--top-k", "9"], dict(sampling=True, seed=7, top_k=9)),
        (["--no-repeat-ngram-size", "1"], dict(no_repeat_ngram_size=1)),
        (["--search-preset", "fairseq"], SearchOptions.preset("fairseq").__dict__),
        (["--suppressed-tokens", "8", "9"], dict(suppressed_tokens=(8, 9))),
    ):
        done = run(model_dir, *options, *given, "--batch-size", 1, stdin=text)
        found = [json.loads(line)["hypotheses"] for line in done.stdout.splitlines()]
        with Translator(model_dir) as translator:
            expected = translator.translate(
                SENTENCES[:3], **{**changes, "num_hypotheses": 3, "max_length": 12}
            )
        assert [[h["tokens"] for h in row] for row in found] == [
            [h.tokens for h in translation.hypotheses] for translation in expected
        ]


def test_target_prefix(model_dir, tmp_path):
    prefixes = ["Klicken", "", "Speichern Sie"]
    file = tmp_path / "prefixes"
    file.write_text("\n".join(prefixes) + "\n")
    source = tmp_path / "source"
    source.write_text("\n".join(SENTENCES[:3]))
    options = [*QUICK, "--target-prefix", "-", "--batch-size", 1]
    done = run(model_dir, source, *options, stdin=file.read_bytes())
    lines = done.stdout.decode().splitlines()
    with Translator(model_dir) as translator:
        found = translator.translate(SENTENCES[:3], target_prefix=prefixes, max_length=12)
    assert lines == [translation.text for translation in found]
    assert all(line.startswith(prefix) for line, prefix in zip(lines, prefixes, strict=True))
    text = "\n".join(SENTENCES[:4]).encode()
    done = run(model_dir, *QUICK, "--target-prefix", file, stdin=text)
    assert done.returncode == 2 and b"has 3 lines, expected one for each" in done.stderr
    # The lines of a file are counted before the first is translated.
    source.write_text("\n".join(SENTENCES[:2]))
    done = run(model_dir, source, *QUICK, "--target-prefix", file)
    assert done.returncode == 2 and done.stdout == b""
    assert b"has 3 lines, expected one for each of the 2 lines of the input" in done.stderr


def test_an_answer_comes_before_the_next_line_is_sent(model_dir, expected):
    with subprocess.Popen(
        command(model_dir, *QUICK), stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    ) as process:
        for sentence, translation in zip(SENTENCES[:3], expected, strict=False):
            process.stdin.write(sentence.encode() + b"\n")
            process.stdin.flush()
            assert process.stdout.readline().decode() == translation + "\n"
        process.stdin.close()
        assert process.stdout.read() == b"" and process.wait() == 0


def test_a_reader_that_goes_away_is_no_error(model_dir):
    with subprocess.Popen(
        command(model_dir, *QUICK, "--batch-size", 1, "--format", "jsonl"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    ) as process:
        process.stdout.close()
        try:
            process.stdin.write("\n".join(SENTENCES * 20).encode())
            process.stdin.close()
        except BrokenPipeError:
            process.stdin = None
        assert process.stderr.read() == b""
        assert process.wait() == 141


@pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals are POSIX")
def test_a_terminal_gets_a_prompt(model_dir, expected):
    import pty

    master, slave = pty.openpty()
    with subprocess.Popen(
        command(model_dir, *QUICK),
        stdin=slave,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    ) as process:
        os.close(slave)
        os.write(master, SENTENCES[0].encode() + b"\n")
        assert process.stdout.readline().decode() == expected[0] + "\n"
        os.write(master, b"\x04")
        assert process.wait() == 0
        assert process.stderr.read().decode().startswith("Type a sentence")
    os.close(master)


def test_learned_positions(tmp_path):
    folder = save_random_model(tmp_path / "model", positions="learned", max_positions=16)
    done = run(folder, "--threads", 1, stdin=f"{SENTENCES[0] * 3}\nopen\n".encode())
    assert done.returncode == 0 and done.stdout.count(b"\n") == 2
    assert b"texts longer than the 16 positions of this model, cut to them: 1" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--beam-sise", "3"], b"unknown option '--beam-sise'; did you mean '--beam-size'?"),
        (["--beam-size", "none"], b"--beam-size: got 'none', expected an integer from 1 to 1000"),
        (["--num-hypotheses", "9"], b"--num-hypotheses: got 9, expected at most --beam-size (4)"),
        (["--format", "xml"], b"--format"),
        (["--batch-size", "0"], b"--batch-size: got 0, expected an integer from 1 to 1000000"),
        (["--threads", "0"], b"--threads: got 0, expected an integer from 1 to 1024"),
        (["a", "-"], b"standard input cannot be one of several files"),
        (["--batch-tokens", "0"], b"--batch-tokens: got 0, expected an integer from 1 to"),
        (["--batch-size", "9" * 20], b"expected an integer from 1 to 1000000"),
        (["--batch-tokens", "9" * 20], b"expected an integer from 1 to 1000000000"),
        (["--threads", "1025"], b"--threads: got 1025, expected an integer from 1 to 1024"),
        (["--beam-size", "9" * 400], b"expected an integer from 1 to 1000"),
        (["--min-length", "9" * 20], b"expected an integer from 0 to 1000000"),
        (["--max-length", "5", "--min-length", "9"], b"--min-length: got 9, expected at most"),
        (["--top-k", "3"], b"--top-k: got 3 without sampling"),
        (["--return-alignment"], b"expected --format jsonl with them"),
        (["--search-preset", "marian"], b"--search-preset"),
        (["--target-prefix", "missing.txt"], b"missing.txt: cannot be read"),
        (["--target-prefix", "-"], b"-: standard input is read already, by another option"),
    ],
)
def test_wrong_arguments(model_dir, arguments, message):
    done = run(model_dir, *arguments)
    assert done.returncode == 2 and done.stdout == b""
    assert message in done.stderr and b"Traceback" not in done.stderr


def test_no_such_model(tmp_path):
    done = run(tmp_path / "nothing")
    assert done.returncode == 2 and b"no such model directory" in done.stderr


def test_compute_types(model_dir):
    with Translator(model_dir, compute_type="int8") as translator:
        expected = [t.text for t in translator.translate(SENTENCES, max_length=12)]
    text = "".join(f"{line}\n" for line in SENTENCES).encode()
    done = run(model_dir, *QUICK, "--compute-type", "int8", stdin=text)
    assert done.stdout.decode().splitlines() == expected and done.stderr == b""
    done = run(model_dir, *QUICK, "--compute-type", "auto", stdin=text)
    assert done.stderr.decode() == f"compute type: {resolve_compute_type('auto')}\n"
    done = run(model_dir, *QUICK, "--compute-type", "int9", stdin=text)
    assert done.returncode == 2 and b"int9" in done.stderr and done.stdout == b""


def test_ensemble(model_dir, tmp_path):
    other = save_random_model(tmp_path / "other", seed=6)
    with Translator([model_dir, other]) as translator:
        expected = [t.text for t in translator.translate(SENTENCES[:3], max_length=12)]
        scores = translator.score(SENTENCES[:3], SENTENCES[3:])
    text = "\n".join(SENTENCES[:3]).encode()
    done = run(model_dir, *QUICK, "--ensemble", other, stdin=text)
    assert done.stdout.decode().splitlines() == expected
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_text("\n".join(SENTENCES[:3]))
    target.write_text("\n".join(SENTENCES[3:]))
    files = ["--src", source, "--tgt", target, "--ensemble", other]
    done = run(model_dir, *files, module="score")
    assert done.stdout.decode().splitlines() == [f"{sum(row):.6f}" for row in scores]


def test_very_long_lines_are_cut(model_dir):
    line = " ".join(SENTENCES * 40)
    done = run(model_dir, *QUICK, stdin=f"{line}\nopen\n".encode())
    assert done.returncode == 0 and done.stdout.count(b"\n") == 2
    assert b"texts longer than 1024 tokens, cut to them: 1" in done.stderr
    done = run(model_dir, *QUICK, "--max-source-length", 5, stdin=f"{SENTENCES[0]}\na\n".encode())
    assert done.returncode == 0 and b"texts longer than 5 tokens, cut to them: 1" in done.stderr


def test_score_with_attention(model_dir, tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_text(f"{SENTENCES[0]}\n\n")
    target.write_text(f"{SENTENCES[3]}\n\n")
    files = ["--src", source, "--tgt", target]
    options = ["--format", "jsonl", "--return-alignment", "--return-attention"]
    done = run(model_dir, *files, *options, "--attention-layer", 0, module="score")
    first, empty = (json.loads(line) for line in done.stdout.splitlines())
    with Translator(model_dir) as translator:
        log_probs, attention = translator.align(SENTENCES[:1], SENTENCES[3:4])[0]
    assert first["token_scores"] == log_probs and first["attention"] == attention.tolist()
    assert first["alignment"] == attention.argmax(1).tolist()
    assert len(first["source_tokens"]) == attention.shape[1]
    assert empty["alignment"] == [] and empty["source_tokens"] == []
    for wrong, message in (
        (["--return-alignment"], b"expected --format jsonl with them"),
        (["--attention-layer", "0"], b"expected --return-attention or --return-alignment with it"),
        (["--srk", "x"], b"unknown option '--srk'; did you mean '--src'?"),
        (["--batch-tokens", "0"], b"--batch-tokens: got 0, expected an integer from 1 to"),
    ):
        done = run(model_dir, *files, *wrong, module="score")
        assert done.returncode == 2 and message in done.stderr
    # A misspelt option that is needed is named, not only missed.
    done = run(model_dir, "--srk", source, "--tgt", target, module="score")
    assert done.returncode == 2 and b"did you mean '--src'?" in done.stderr


def test_score(model_dir, tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_text("\n".join(SENTENCES[:3]))
    target.write_text("\n".join(SENTENCES[3:]))
    done = run(model_dir, "--src", source, "--tgt", target, module="score")
    with Translator(model_dir) as translator:
        scores = translator.score(SENTENCES[:3], SENTENCES[3:])
    assert done.stdout.decode().splitlines() == [f"{sum(row):.6f}" for row in scores]
    options = ["--src", "-", "--tgt", target, "--format", "jsonl"]
    done = run(model_dir, *options, stdin=source.read_bytes(), module="score")
    first = json.loads(done.stdout.splitlines()[0])
    assert first["token_scores"] == scores[0] and first["tokens"][-1] == "</s>"
    # An empty source gives an empty line, and nothing else.
    source.write_text(f"\n{SENTENCES[0]}\n\n")
    target.write_text(f"text\n{SENTENCES[3]}\n\n")
    done = run(model_dir, "--src", source, "--tgt", target, module="score")
    assert done.stdout.decode().splitlines() == ["-inf", f"{sum(scores[0]):.6f}", "0.000000"]
    done = run(model_dir, "--src", source, "--tgt", target, "--format", "jsonl", module="score")
    first = json.loads(done.stdout.splitlines()[0])
    assert first == {"log_prob": None, "tokens": [], "token_scores": []}
    target.write_text("one line")
    done = run(model_dir, "--src", source, "--tgt", target, module="score")
    assert done.returncode == 2 and b"has 3 lines" in done.stderr


def test_wide_text_on_standard_input_is_refused(model_dir):
    for code in ("utf-16", "utf-32"):
        done = run(model_dir, *QUICK, stdin="open\n".encode(code))
        assert done.returncode == 2 and done.stdout == b""
        assert f"standard input: is {code.upper()}, expected UTF-8".encode() in done.stderr


def every_command(model_dir, folder):
    """Arguments of the commands that print."""
    for name in ("source", "target"):
        (folder / name).write_text("\n".join(SENTENCES[:3]))
    source, target = folder / "source", folder / "target"
    return {
        "translate": [model_dir, source, *QUICK],
        "score": [model_dir, "--src", source, "--tgt", target],
        "evaluate": [model_dir, "--src", source, "--ref", target, *QUICK],
        "info": [],
    }


@pytest.mark.parametrize("module", ["translate", "score", "evaluate"])
def test_an_instruction_set_that_there_is_not(model_dir, tmp_path, module):
    done = subprocess.run(
        command(*every_command(model_dir, tmp_path)[module], module=module),
        env={**os.environ, "TRANSFORMER_EXT_ISA": "nonsense"},
        capture_output=True,
        cwd=ROOT,
        timeout=300,
    )
    assert done.returncode == 2 and done.stdout == b""
    message = done.stderr.decode().splitlines()[-1]
    assert message.startswith("error: TRANSFORMER_EXT_ISA=nonsense: expected one of baseline, ")
    assert b"Traceback" not in done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize("module", ["translate", "score", "evaluate", "info"])
@pytest.mark.parametrize(
    ("streams", "message"),
    [
        (">/dev/full", "standard output: No space left on device"),
        (">&-", "standard output: is closed"),
    ],
)
def test_output_that_cannot_be_written(model_dir, tmp_path, module, streams, message):
    arguments = command(*every_command(model_dir, tmp_path)[module], module=module)
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {streams}', "sh", *arguments],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        timeout=300,
    )
    assert done.returncode == 2
    lines = done.stderr.decode().splitlines()
    assert lines[-1] == f"error: {message}" and "Traceback" not in done.stderr.decode()


@pytest.mark.skipif(os.name != "posix", reason="streams of a POSIX shell")
@pytest.mark.parametrize(
    ("streams", "message"),
    [
        ("<&-", "standard input: is closed"),
        ("0>/dev/null", "standard input: cannot be read: Bad file descriptor"),
    ],
)
def test_input_that_cannot_be_read(model_dir, streams, message):
    arguments = command(model_dir, *QUICK)
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {streams}', "sh", *arguments],
        capture_output=True,
        cwd=ROOT,
        timeout=300,
    )
    assert done.returncode == 2 and done.stdout == b""
    assert done.stderr.decode() == f"error: {message}\n"


@pytest.mark.parametrize("module", ["translate", "score", "evaluate"])
def test_an_interrupt_ends_without_a_word(model_dir, tmp_path, monkeypatch, capsys, module):
    def interrupted(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr("transformer_ext.inference.engine.Engine.__init__", interrupted)
    arguments = every_command(model_dir, tmp_path)[module]
    main = importlib.import_module(f"transformer_ext.{module}").main
    assert main(list(map(str, arguments))) == 130
    assert capsys.readouterr() == ("", "")
