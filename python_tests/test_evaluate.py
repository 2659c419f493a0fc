"""`python -m transformer_ext.evaluate`: sacreBLEU's figures."""

from __future__ import annotations

import errno
import json
import os
import re

import pytest
from decoding_helpers import SENTENCES, save_random_model
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.significance import PairedTest

from transformer_ext import files as model_files
from transformer_ext.evaluate import main
from transformer_ext.inference.translator import Translator


@pytest.fixture
def files(tmp_path):
    for name, lines in {
        "src": SENTENCES[:3],
        "ref": SENTENCES[3:],
        "hyp": [SENTENCES[3], "Öffnen Sie die Datei.", SENTENCES[5]],
        "short": SENTENCES[:1],
    }.items():
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    (tmp_path / "empty").write_text("")
    return tmp_path


def test_given_translations(files, capsys):
    assert main(["--hyp", str(files / "hyp"), "--ref", str(files / "ref")]) == 0
    bleu, chrf = BLEU(), CHRF()
    hypotheses = (files / "hyp").read_text(encoding="utf-8").splitlines()
    expected = [
        f"BLEU {bleu.corpus_score(hypotheses, [SENTENCES[3:]]).score:.2f}  {bleu.get_signature()}",
        f"chrF {chrf.corpus_score(hypotheses, [SENTENCES[3:]]).score:.2f}  {chrf.get_signature()}",
    ]
    assert capsys.readouterr().out.splitlines() == expected


def test_a_model(files, capsys):
    folder = save_random_model(files / "model")
    arguments = ["--src", str(files / "src"), "--ref", str(files / "ref"), "--max-length", "9"]
    output = files / "output"
    assert (
        main([str(folder), *arguments, "--batch-tokens", "9", "--output", str(output), "--json"])
        == 0
    )
    values = json.loads(capsys.readouterr().out)
    with Translator(folder) as translator:
        found = [t.text for t in translator.translate(SENTENCES[:3], max_length=9)]
    assert output.read_text(encoding="utf-8").split("\n") == [*found, ""]
    bleu = BLEU()
    assert values["bleu"] == bleu.corpus_score(found, [SENTENCES[3:]]).score
    assert values["sentences"] == 3 and values["bleu_signature"].startswith("nrefs:1|")


def test_translations_are_written_beside_the_model(files, monkeypatch, capsys):
    """Whatever the folder is called by, and again without a question."""
    save_random_model(files / "run" / "model")
    (files / "src.en.gz").write_bytes((files / "src").read_bytes())
    arguments = ["--src", "../src.en.gz", "--ref", "../ref", "--max-length", "5"]
    written = files / "run" / "model.src.en.output.txt"
    for place, name in (("run", "model"), ("run", "model/"), ("run/model", ".")):
        monkeypatch.chdir(files / place)
        prefix = "../" if name == "." else ""
        command = [name, *(prefix * a.startswith("..") + a for a in arguments)]
        assert main(command) == 0
        said = capsys.readouterr().err
        assert "3 sentences translated in" in said and "model.src.en.output.txt" in said
        assert len(written.read_text(encoding="utf-8").splitlines()) == 3
        written.unlink()


def lines_of(count, wrong):
    """Sentences of which every ``wrong``-th has another end."""
    return [
        f"{SENTENCES[i % 6]} {i} " + ("Ende der Zeile hier" if i % wrong else "etwas ganz anderes")
        for i in range(count)
    ]


def write_lines(path, lines):
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def test_compare_is_sacrebleus_paired_bootstrap(tmp_path, monkeypatch, capsys):
    reference = lines_of(60, 61)
    systems = {"a": lines_of(60, 4), "b": lines_of(60, 3), "c": lines_of(60, 4)}
    paths = [write_lines(tmp_path / name, lines) for name, lines in systems.items()]
    ref = write_lines(tmp_path / "ref", reference)
    monkeypatch.delenv("SACREBLEU_SEED", raising=False)
    options = ["--bootstrap-samples", "200", "--bootstrap-seed", "7"]
    assert main(["--compare", *paths, "--ref", ref, "--json", *options]) == 0
    said = capsys.readouterr()
    assert "SACREBLEU_SEED" not in os.environ
    values = json.loads(said.out)
    assert [system["name"] for system in values["systems"]] == paths
    assert f"{paths[2]} translates every sentence as {paths[0]} does" in said.err

    monkeypatch.setenv("SACREBLEU_SEED", "7")
    signatures, table = PairedTest(
        list(systems.items()), {"x": BLEU(), "y": CHRF()}, [reference], "bs", n_samples=200
    )()
    for key, name in (("bleu", "BLEU"), ("chrf", "chrF2")):
        assert values[f"{key}_signature"] == str(signatures[name])
        for system, expected in zip(values["systems"], table[name], strict=True):
            assert system[key] == expected.score
            assert system[f"{key}_mean"] == float(expected.mean)
            assert system[f"{key}_interval"] == float(expected.ci) > 0
            # Of equal systems sacreBLEU says that their difference is no chance.
            same = system["name"] == paths[2]
            assert system[f"{key}_p_value"] == (1.0 if same else expected.p_value)
    baseline, worse, _ = values["systems"]
    assert baseline["bleu_p_value"] is None
    assert worse["bleu"] < baseline["bleu"] and worse["bleu_p_value"] < 0.3

    assert main(["--compare", *paths, "--ref", ref, *options]) == 0
    out = capsys.readouterr().out
    assert len(re.findall(r"  (?:BLEU|chrF) +[\d.]+ +[\d.]+ ± [\d.]+ +[01]\.\d{4}\n", out)) == 4
    assert out.count("baseline") == 2 and "(200 resamples, seed 7)" in out
    assert "bs:200|seed:7" in out
    assert os.environ["SACREBLEU_SEED"] == "7"


def test_compare_models_and_files(files, capsys):
    models = [str(save_random_model(files / name / "model", seed=n)) for n, name in enumerate("xy")]
    hyp = str(files / "hyp")
    arguments = ["--src", str(files / "src"), "--ref", str(files / "ref"), "--max-length", "9"]
    few = ["--bootstrap-samples", "10"]
    assert main(["--compare", hyp, *models, *arguments, *few]) == 0
    beside = [files / name / "model.src.output.txt" for name in "xy"]
    with Translator(models[1]) as translator:
        found = [t.text for t in translator.translate(SENTENCES[:3], max_length=9)]
    assert beside[1].read_text(encoding="utf-8").split("\n") == [*found, ""]
    capsys.readouterr()

    output = files / "out"
    command = ["--compare", hyp, *models, *arguments, *few, "--output", str(output), "--json"]
    assert main(command) == 0
    printed = json.loads(capsys.readouterr().out)
    assert json.loads((output / "results.json").read_text(encoding="utf-8")) == printed
    assert {p.name for p in output.iterdir()} == {
        "2.model.output.txt",
        "3.model.output.txt",
        "results.json",
    }
    for number, file in zip((2, 3), beside, strict=True):
        assert (output / f"{number}.model.output.txt").read_bytes() == file.read_bytes()
        assert printed["systems"][number - 1]["output"] == str(
            output / f"{number}.model.output.txt"
        )


def test_other_translations_are_not_overwritten(files, capsys):
    folder = save_random_model(files / "model")
    arguments = [str(folder), "--src", str(files / "src"), "--ref", str(files / "ref")]
    written, second = files / "model.src.output.txt", files / "model.src.output.2.txt"
    assert main([*arguments, "--max-length", "5"]) == 0
    first = written.read_bytes()
    assert main([*arguments, "--max-length", "5"]) == 0
    assert written.read_bytes() == first and not second.exists()
    assert main([*arguments, "--max-length", "2"]) == 0
    assert written.read_bytes() == first != second.read_bytes()
    assert str(second) in capsys.readouterr().err


def test_a_system_that_is_not_there_is_named(files, capsys):
    with pytest.raises(SystemExit):
        main(["--compare", str(files / "ref"), str(files / "none"), "--ref", str(files / "ref")])
    assert f"--compare: {files / 'none'}: no such model directory" in capsys.readouterr().err


def test_translations_that_cannot_be_written(files, monkeypatch, capsys):
    """Nothing half-written, and the file is named."""
    folder = save_random_model(files / "model")
    written = files / "model.src.output.txt"
    written.write_text("as it was\n")

    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(model_files, "atomic_write", full)
    arguments = [str(folder), "--src", str(files / "src"), "--ref", str(files / "ref")]
    assert main([*arguments, "--max-length", "5"]) == 2
    other = files / "model.src.output.2.txt"
    assert f"error: {other}: cannot be written: No space left" in capsys.readouterr().err
    assert written.read_text() == "as it was\n" and not other.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected either MODEL_DIR, --hyp FILE or --compare"),
        (["model", "--compare", "hyp", "ref"], "expected either MODEL_DIR, --hyp FILE or"),
        (["--compare", "hyp"], "--compare: got one system, expected two or more"),
        (["--compare", "hyp", "short"], "--compare: files of translations need --ref FILE"),
        (
            ["--compare", "hyp", "best"],
            "best: is a file that names a checkpoint, expected that: model",
        ),
        (
            ["--compare", "hyp", "src", "--src", "src", "--ref", "ref"],
            "--src FILE needs a model to translate it with",
        ),
        (
            ["--compare", "hyp", "./hyp", "--ref", "ref"],
            "--compare: hyp and ./hyp are the same",
        ),
        (["--compare", "hyp", "ref", "--ref", "ref"], "ref is given as translations and as ref"),
        (["--compare", "hyp", "short", "--ref", "ref"], "short has 1 line, ref has 3"),
        (
            ["--compare", "hyp", "nothing", "--src", "src", "--ref", "ref"],
            "nothing: no such model directory",
        ),
        (["--compare", "hyp", "empty", "--src", "src"], "--compare: files of translations need"),
        (
            ["--compare", "hyp", "no-model", "--src", "src", "--ref", "ref"],
            "no-model: no such model directory",
        ),
        (["--compare", "hyp", "src", "--ref", "ref", "--output", "x"], "--output needs a model"),
        (["--compare", "hyp", "src", "--ref", "ref", "--beam-size", "2"], "--beam-size needs a"),
        (
            ["--compare", "hyp", "src", "--ref", "ref", "--ensemble", "x"],
            "--ensemble MODEL_DIR needs a first",
        ),
        (
            ["--compare", "hyp", "src", "--ref", "ref", "--bootstrap-samples", "0"],
            "--bootstrap-samples: got '0', expected an integer from 1 to 100000",
        ),
        (["model", "--bootstrap-seed", "2"], "--bootstrap-seed: only --compare resamples"),
        (["model", "--src", "src", "--ref", "src"], "src is given as source and as reference"),
        (["--hyp", "ref", "--ref", "ref"], "ref is given as translations and as reference"),
        (
            ["model", "--src", "src", "--ref", "ref", "--output", "folder"],
            "--output folder: is a folder, expected a file",
        ),
        (["--hyp", "hyp"], "--hyp FILE needs --ref FILE"),
        (["model", "--src", "src"], "--src FILE and --ref FILE belong together"),
        (["--hyp", "hyp", "--ref", "ref", "--output", "x"], "--output needs a model"),
        (["--hyp", "hyp", "--ref", "ref", "--ensemble", "x"], "--ensemble MODEL_DIR needs a first"),
        (["--hyp", "hyp", "--ref", "ref", "--beam-size", "2"], "--beam-size needs a model"),
        (["--hyp", "hyp", "--ref", "ref", "--threads", "2"], "--threads needs a model"),
        (["model", "--return-alignment"], "--return-alignment: only translate and score write it"),
        (
            ["model", "--output", "no/such/x"],
            "--output no/such/x: its folder is not there",
        ),
        (["--hyp", "short", "--ref", "ref"], "short has 1 line, ref has 3"),
        (["--hyp", "hyp", "--ref", "empty"], "empty: has no lines"),
        (["--hyp", "nothing", "--ref", "ref"], "nothing: cannot be read"),
        (["nothing", "--src", "src", "--ref", "ref"], "nothing: no such model directory"),
        (
            ["model", "--beam-sise", "3"],
            "unknown option '--beam-sise'; did you mean '--beam-size'?",
        ),
    ],
)
def test_wrong_arguments(files, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(files)
    (files / "folder").mkdir()
    save_random_model(files / "model")
    (files / "best").write_text("model\n")
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = stop.code
    assert status == 2 and message in capsys.readouterr().err
    assert not list(files.glob("*.output.txt"))
