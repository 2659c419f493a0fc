"""`python -m transformer_ext.evaluate`: sacreBLEU's figures."""

from __future__ import annotations

import json

import pytest
from decoding_helpers import SENTENCES, save_random_model
from sacrebleu.metrics import BLEU, CHRF

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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected either MODEL_DIR or --hyp"),
        (["--hyp", "hyp"], "--hyp FILE needs --ref FILE"),
        (["model", "--src", "src"], "--src FILE and --ref FILE belong together"),
        (["--hyp", "hyp", "--ref", "ref", "--output", "x"], "--output FILE needs a model"),
        (["--hyp", "hyp", "--ref", "ref", "--ensemble", "x"], "--ensemble MODEL_DIR needs a first"),
        (["--hyp", "hyp", "--ref", "ref", "--beam-size", "2"], "--beam-size needs a model"),
        (["--hyp", "hyp", "--ref", "ref", "--threads", "2"], "--threads needs a model"),
        (["model", "--return-alignment"], "--return-alignment: only translate and score write it"),
        (
            ["model", "--output", "no/such/x"],
            "--output no/such/x: its folder is not there",
        ),
        (["--hyp", "short", "--ref", "ref"], "short has 1 lines, ref has 3"),
        (["--hyp", "empty", "--ref", "empty"], "empty: has no lines"),
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
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = stop.code
    assert status == 2 and message in capsys.readouterr().err
