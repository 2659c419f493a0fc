"""Translator: text in, text out."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
from decoding_helpers import SENTENCES, save_random_model

from transformer_ext.config import ConfigError
from transformer_ext.data.tokenizer import train_tokenizer
from transformer_ext.files import FileError, load_model_dir
from transformer_ext.inference.engine import UnsupportedModelError
from transformer_ext.inference.options import SearchOptions
from transformer_ext.inference.translator import Translation, Translator

ROOT = Path(__file__).parents[1]
OPTIONS = SearchOptions(max_length=12)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_random_model(tmp_path_factory.mktemp("translator") / "model")


@pytest.fixture(scope="module")
def translator(model_dir):
    with Translator(model_dir, threads=2, options=OPTIONS) as translator:
        yield translator


def test_a_text_gives_a_translation_and_a_list_a_list(translator):
    one = translator.translate(SENTENCES[0])
    assert isinstance(one, Translation)
    assert one.text == translator.target_tokenizer.decode(one.tokens)
    assert one.score == one.hypotheses[0].score and len(one.hypotheses) == 1
    many = translator.translate(SENTENCES)
    assert len(many) == len(SENTENCES) and many[0] == one
    assert translator.translate([]) == []
    assert translator.translate(tuple(SENTENCES)) == many


def test_hypotheses_come_best_first(translator):
    for translation in translator.translate(SENTENCES, beam_size=6, num_hypotheses=5):
        scores = [h.score for h in translation.hypotheses if h.ended]
        cut = [h.score for h in translation.hypotheses if not h.ended]
        assert len(scores) + len(cut) == 5
        assert scores == sorted(scores, reverse=True) and cut == sorted(cut, reverse=True)


def test_an_empty_text_gives_an_empty_translation(translator):
    empty = translator.translate("")
    assert empty.text == "" and empty.tokens == [] and empty.hypotheses[0].ended
    results = translator.translate(["", SENTENCES[0], "  \t "])
    assert [bool(result.text) for result in results] == [False, True, False]


def test_ids(translator):
    ids = translator.encode(SENTENCES[:2])
    assert all(source[-1] == translator.config.eos_id for source in ids)
    results = translator.translate_ids(ids, beam_size=2)
    texts = translator.translate(SENTENCES[:2], beam_size=2)
    assert [r.hypotheses[0].tokens for r in results] == [t.tokens for t in texts]


def test_options_of_translator_and_call(model_dir, translator):
    with Translator(model_dir, options=SearchOptions(beam_size=1, max_length=3)) as short:
        assert len(short.translate(SENTENCES[0]).tokens) <= 3
        changed = short.translate(SENTENCES[0], max_length=12, beam_size=4)
        assert changed == translator.translate(SENTENCES[0])
    with pytest.raises(ConfigError, match="unknown search option 'beamsize'; did you mean 'beam_"):
        translator.translate("a", beamsize=3)
    with pytest.raises(ConfigError, match="beam_size: got 0"):
        translator.translate("a", beam_size=0)
    with pytest.raises(TypeError, match="text: got int at position 1"):
        translator.translate(["a", 3])
    half = "a\udcffb"
    with pytest.raises(ValueError, match=r"text: number 1 \(from 0\) has half a character"):
        translator.translate(["a", half])
    with pytest.raises(ValueError, match=r"texts: number 1 \(from 0\) has half a character"):
        translator.encode(["a", half])
    with pytest.raises(ValueError, match="text: has half a character"):
        translator.source_tokenizer.encode(half)


def test_score(translator):
    scores = translator.score(SENTENCES, SENTENCES[::-1])
    for row, target in zip(scores, SENTENCES[::-1], strict=True):
        assert len(row) == len(translator.target_tokenizer.encode(target)) + 1
        assert all(log_prob < 0 for log_prob in row)
    assert translator.score(SENTENCES[:1], SENTENCES[-1:]) == scores[:1]


def test_attention_of_given_translations(translator):
    sources, targets = [*SENTENCES[:2], ""], [*SENTENCES[3:5], "a"]
    found = translator.align(sources, targets)
    assert [log_probs for log_probs, _ in found] == translator.score(sources, targets)
    for (log_probs, attention), source in zip(found, translator.encode(sources), strict=True):
        assert attention.shape == (len(log_probs), len(source))


def test_what_is_scored_are_sequences_of_texts(translator):
    for call in (translator.score, translator.align):
        with pytest.raises(TypeError, match="^targets: got a text, expected a sequence of texts"):
            call("Open", "Auf.")
        with pytest.raises(TypeError, match="^sources: got a text, expected a sequence of texts"):
            call("Auf.", ["A", "u", "f", "."])
        with pytest.raises(TypeError, match="^sources: got bytes at position 1, expected a text"):
            call(["Open", b"Open"], ["Auf.", "Auf."])
        with pytest.raises(TypeError, match="^targets: got NoneType at position 0, expected a tex"):
            call(["Open"], [None])
    for text in (None, 5, b"Open", {"a": "Open"}):
        with pytest.raises(TypeError, match="^text: got .*, expected a text or a sequence of tex"):
            translator.translate(text)
    assert translator.score(iter(["Open"]), iter(["Auf."])) == translator.score(["Open"], ["Auf."])


def test_a_process_ends_while_threads_are_in_the_engine(tmp_path):
    """Before Python 3.14 a thread that asks for the interpreter's lock then is unwound by force."""
    save_random_model(tmp_path / "model", d_model=64)
    code = """if True:
        import sys, threading, time
        from transformer_ext import Translator
        translator = Translator(sys.argv[1], threads=2)
        calls = []

        def work(call):
            while True:
                call([[5, 6, 7, 3]] * 20)
                calls.append(call)

        def search(ids):
            translator.translate_ids(ids, beam_size=8, min_length=20)

        def score(ids):
            translator._engine.score(ids, ids)

        def cut(ids):
            translator.encode(["Open the file."] * 3)

        for call in (search, search, score, score, cut, cut):
            threading.Thread(target=work, args=(call,), daemon=True).start()
        while {*calls} != {search, score, cut}:
            time.sleep(0.001)
    """
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "model"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_target_prefix(translator):
    one = translator.translate(SENTENCES[0], target_prefix="Öffnen Sie")
    assert one.text.startswith("Öffnen Sie")
    many = translator.translate(SENTENCES[:2], target_prefix=["Öffnen Sie", ""])
    assert many[0] == one and many[1] == translator.translate(SENTENCES[1])
    with pytest.raises(TypeError, match="target_prefix: expected a text for one text"):
        translator.translate(SENTENCES[:2], target_prefix="a")
    with pytest.raises(TypeError, match="target_prefix: got int at position 0"):
        translator.translate(SENTENCES[:1], target_prefix=[3])
    with pytest.raises(TypeError, match="target_prefix: got set, expected a text or a sequence"):
        translator.translate(SENTENCES[:1], target_prefix={"a"})
    with pytest.raises(ValueError, match="target_prefix: got 1, expected one for each of the 2"):
        translator.translate(SENTENCES[:2], target_prefix=["a"])


def test_an_iterator_is_read_as_it_is_asked_for(translator):
    read = []

    def endless():
        for number in itertools.count():
            read.append(number)
            yield SENTENCES[number % len(SENTENCES)]

    expected = translator.translate(SENTENCES * 3)
    found = translator.translate_iter(endless(), read_ahead=5, batch_size=2)
    assert read == []
    for number in range(len(SENTENCES) * 3):
        assert next(found) == expected[number]
        assert len(read) <= number + 5
    # Lines that end in a newline, as files give them.
    lines = [f"{sentence}\n" for sentence in SENTENCES]
    assert [t.text for t in translator.translate_iter(lines)] == [t.text for t in expected[:6]]
    assert list(translator.translate_iter([])) == []


def test_an_iterator_takes_options_and_prefixes(translator):
    options = dict(sampling=True, seed=3, num_hypotheses=2, max_length=10)
    prefixes = ["Öffnen Sie", "", "Die", "", "", "a"]
    expected = translator.translate(SENTENCES, target_prefix=prefixes, **options)
    found = translator.translate_iter(
        iter(SENTENCES), target_prefix=iter(prefixes), read_ahead=4, **options
    )
    assert list(found) == expected
    with pytest.raises(ConfigError, match="did you mean 'beam_size'"):
        translator.translate_iter(SENTENCES, beamsize=2)
    with pytest.raises(TypeError, match="texts: got a text, expected an iterable"):
        translator.translate_iter("one text")
    with pytest.raises(ValueError, match="read_ahead: got 0"):
        translator.translate_iter(SENTENCES, read_ahead=0)
    with pytest.raises(TypeError, match="texts: got int at position 2"):
        list(translator.translate_iter(["a", "b", 3], read_ahead=2))
    with pytest.raises(ValueError, match="target_prefix: got 1, expected one for each text"):
        list(translator.translate_iter(["a", "b"], target_prefix=["c"]))
    long = [" ".join(SENTENCES)] * 5
    with pytest.warns(UserWarning, match="longer than any") as caught:
        assert len(list(translator.translate_iter(long, read_ahead=2))) == 5
    assert len(caught) == 1


def test_texts_longer_than_any_trained_on_give_one_warning(translator):
    assert translator.max_train_length == 40
    long = " ".join(SENTENCES)
    with pytest.warns(UserWarning, match="2 texts are longer than any .* .40 tokens") as caught:
        results = translator.translate([long, "a", long])
    assert len(caught) == 1 and len(results) == 3 and results[0] == results[2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        translator.translate(SENTENCES)


def test_learned_positions_end(tmp_path):
    folder = save_random_model(tmp_path / "model", positions="learned", max_positions=16)
    with Translator(folder) as translator:
        assert translator.longest_source == 16
        assert translator.translate("the").hypotheses
        with (
            pytest.warns(UserWarning, match="1 text is longer"),
            pytest.raises(ValueError, match="longer than the 16 learned positions"),
        ):
            translator.translate(SENTENCES[0] * 3)
        assert translator.translate("the").hypotheses


def test_from_weights(model_dir, translator):
    model = load_model_dir(model_dir)
    other = Translator.from_weights(
        model.config, dict(model.weights), model.source_tokenizer, options=OPTIONS
    )
    assert other.translate(SENTENCES) == translator.translate(SENTENCES)


def test_eight_threads_on_one_translator(tmp_path):
    """Calls of every kind at once give what one after the other gives, on one thread."""
    seconds = float(os.environ.get("TRANSFORMER_EXT_THREADS_SECONDS", "2"))
    folder = save_random_model(tmp_path / "model", d_model=64, num_decoder_layers=2)

    def searching(**options):
        def call(translator):
            found = translator.translate(SENTENCES, **options)
            attention = [h.attention for t in found for h in t.hypotheses]
            return found, [None if a is None else a.tobytes() for a in attention]

        return call

    def aligning(translator):
        found = translator.align(SENTENCES, SENTENCES[::-1])
        return [(log_probs, attention.tobytes()) for log_probs, attention in found]

    def failing(translator):
        with pytest.raises(ValueError, match="suppressed_tokens: got 100000"):
            translator.translate(SENTENCES, suppressed_tokens=[100_000])

    jobs = [
        searching(),
        searching(beam_size=1),
        searching(beam_size=5, num_hypotheses=5, early_stopping="first", length_penalty=1.0),
        searching(sampling=True, seed=3, num_hypotheses=4, top_k=20, temperature=1.3),
        searching(sampling=True, seed=4, top_p=0.8),
        searching(coverage_penalty=0.3, return_attention=True, return_alignment=True),
        searching(no_repeat_ngram_size=2, repetition_penalty=1.3, min_length=4),
        searching(target_prefix=["Die", "", "a", "", "", "Das"], batch_size=2),
        lambda translator: list(translator.translate_iter(SENTENCES, read_ahead=4)),
        lambda translator: translator.score(SENTENCES, SENTENCES[::-1], batch_size=4),
        aligning,
        failing,
    ]
    with (
        Translator(folder, threads=1, options=OPTIONS) as single,
        Translator(folder, threads=2, options=OPTIONS) as translator,
    ):
        expected = [job(single) for job in jobs]
        wrong, calls = [], [0] * 8
        end = time.monotonic() + seconds

        def work(number):
            chance = random.Random(number)
            try:
                while time.monotonic() < end or calls[number] < len(jobs):
                    job = chance.randrange(len(jobs))
                    if jobs[job](translator) != expected[job]:
                        wrong.append(job)
                    calls[number] += 1
            except BaseException as error:
                wrong.append(error)
                raise

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong and min(calls) >= len(jobs), (wrong[:5], calls)


def test_closing(model_dir):
    with Translator(model_dir) as translator:
        translator.translate("the")
    for call in (lambda: translator.translate("the"), translator.__enter__):
        with pytest.raises(ValueError, match="^this Translator is closed$"):
            call()
    translator.close()


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="memory is read from /proc")
def test_closing_gives_the_memory_back(tmp_path):
    folder = save_random_model(tmp_path / "model", d_model=256, tgt_vocab_size=60_000)
    code = (
        "import gc, json, os\n"
        "from transformer_ext import Translator\n"
        "def megabytes():\n"
        "    gc.collect()\n"
        "    with open('/proc/self/statm') as file:\n"
        "        return int(file.read().split()[1]) * os.sysconf('SC_PAGESIZE') / 2**20\n"
        "found = []\n"
        "for _ in range(3):\n"
        f"    with Translator({str(folder)!r}, threads=1) as translator:\n"
        "        translator.translate('Open the file.', max_length=9)\n"
        "        found.append(megabytes())\n"
        "    found.append(megabytes())\n"
        "with open('/proc/self/status') as file:\n"
        "    peak = next(line for line in file if line.startswith('VmHWM:'))\n"
        "print(json.dumps([int(peak.split()[1]) / 1024, *found]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    peak, opened, closed, *_, last_closed = json.loads(done.stdout)
    table = 60_000 * 256 * 4 / 2**20
    # Two tables, of target embeddings and of the last projection.
    assert opened - closed > 0.9 * 2 * table
    assert last_closed - closed < 10
    # Of the file, no more than one table is in memory at any time, and no other copy.
    assert peak - opened < 1.2 * table


def test_broken_files_are_one_clear_error(tmp_path, model_dir):
    def copy(name):
        return Path(shutil.copytree(model_dir, tmp_path / name))

    folder = copy("cut off")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(FileError, match=r"model.safetensors: broken or cut off \(.* bytes\)"):
        Translator(folder)
    folder = copy("other bytes")
    weights = folder / "model.safetensors"
    weights.write_bytes(b"\xff" * 1000)
    with pytest.raises(FileError, match="model.safetensors: broken or cut off"):
        Translator(folder)
    folder = copy("config")
    (folder / "config.json").write_text("{")
    with pytest.raises(FileError, match="config.json: broken, not JSON"):
        Translator(folder)
    folder = copy("tokenizer")
    (folder / "tokenizer.model").write_bytes(train_tokenizer(SENTENCES[:4], vocab_size=300)[0])
    with pytest.raises(FileError, match="not the tokenizer that this model was trained with"):
        Translator(folder)
    folder = copy("numbers")
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 400] = b"\xff" * 400
    weights.write_bytes(content)
    with Translator([model_dir, folder]) as translator:
        for call in (translator.translate, lambda texts: translator.score(texts, texts)):
            with pytest.raises(FileError, match=r"numbers/model.safetensors: .* numbers are NaN"):
                call(["the"])
    with Translator(model_dir, options=OPTIONS) as translator:
        assert translator.translate("the").hypotheses


def test_errors_of_a_call_leave_the_translator_as_it_was(translator):
    expected = translator.translate(SENTENCES)
    for changes in (
        {"suppressed_tokens": [10_000]},
        {"attention_layer": 7, "return_attention": True},
        {"max_source_length": 2},
        {"beam_size": "wide"},
        {"target_prefix": ["a " * 50] * len(SENTENCES)},
    ):
        with pytest.raises(ValueError, match=r"got|has \d+ tokens"):
            translator.translate(SENTENCES, **changes)
    assert translator.translate(SENTENCES) == expected


def test_errors_of_the_folder(tmp_path, model_dir):
    with pytest.raises(FileError, match="no such model directory"):
        Translator(tmp_path / "nothing")
    (model_dir.parent / "best").write_text(f"{model_dir.name}\n")
    with pytest.raises(FileError, match=f"names a checkpoint, expected that: {model_dir}$"):
        Translator(model_dir.parent / "best")
    with pytest.raises(ValueError, match="threads: got 0"):
        Translator(model_dir, threads=0)


def test_ensembles(tmp_path, model_dir, translator):
    other = save_random_model(tmp_path / "other", seed=6)
    with Translator([model_dir, other], options=OPTIONS) as both:
        found = both.score(SENTENCES, SENTENCES)
        with Translator(other) as second:
            rows = zip(
                found,
                translator.score(SENTENCES, SENTENCES),
                second.score(SENTENCES, SENTENCES),
                strict=True,
            )
            for mean, first, last in rows:
                for a, b, c in zip(mean, first, last, strict=True):
                    assert math.isclose(math.exp(a), (math.exp(b) + math.exp(c)) / 2, rel_tol=1e-4)
        assert both.translate(SENTENCES) != translator.translate(SENTENCES)
    with Translator([model_dir], options=OPTIONS) as alone:
        assert alone.translate(SENTENCES) == translator.translate(SENTENCES)
    (tmp_path / "strange").mkdir()
    strange = save_random_model(tmp_path / "strange" / "model", sentences=SENTENCES[:4])
    with pytest.raises(
        FileError, match="model: its source tokenizer is not that of .*model, which"
    ):
        Translator([model_dir, strange])
    with pytest.raises(ValueError, match="model_dir: got no folder"):
        Translator([])


def test_a_part_that_the_engine_does_not_know(model_dir):
    model = load_model_dir(model_dir)
    weights = dict(model.weights)
    weights["encoder.layers.0.adapter.weight"] = weights["source_embedding.weight"]
    with pytest.raises(UnsupportedModelError, match=r"encoder\.layers\.0\.adapter\.weight"):
        Translator.from_weights(model.config, weights, model.source_tokenizer)


def test_translating_imports_neither_torch_nor_numpy(model_dir):
    code = (
        "import sys, json\n"
        "from transformer_ext import Translator\n"
        f"with Translator({str(model_dir)!r}) as translator:\n"
        "    text = translator.translate('Open the file.', max_length=12).text\n"
        "print(json.dumps([text, sorted({'torch', 'numpy'} & {*sys.modules})]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    text, modules = json.loads(done.stdout)
    assert modules == []
    with Translator(model_dir) as translator:
        assert translator.translate("Open the file.", max_length=12).text == text


def test_ctrl_c_ends_a_long_search(tmp_path):
    # One sentence whose translation would take minutes; alone, and so many that teams are formed.
    folder = save_random_model(tmp_path / "model")
    script = """
import signal, sys
from transformer_ext import Translator
# A shell without job control starts what runs in its background with SIGINT ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
with Translator(sys.argv[1], threads=2) as translator:
    texts = ["open the file"] * int(sys.argv[2])
    print("begins", flush=True)
    try:
        translator.translate(texts, max_length=200_000, min_length=199_999, beam_size=4)
    except KeyboardInterrupt:
        print("ended", flush=True)
    print(len(translator.translate(texts[:1], max_length=4)[0].tokens) <= 4)
"""
    for count in (1, 64):
        command = [sys.executable, "-c", script, str(folder), str(count)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
            assert process.stdout.readline() == "begins\n"
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            try:
                assert process.communicate(timeout=60)[0] == "ended\nTrue\n"
            finally:
                process.kill()
