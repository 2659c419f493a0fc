"""Language models in the compiled engine: against the plain Python search, and against
``generate()`` of transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from decoding_helpers import SENTENCES, ctrl_c  # noqa: E402
from huggingface_helpers import write_gpt2_dir  # noqa: E402
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from transformer_ext import generate  # noqa: E402
from transformer_ext.data.tokenizer import SentencePieceTokenizer, train_tokenizer  # noqa: E402
from transformer_ext.files import load_model_dir, parameter_shapes, save_model_dir  # noqa: E402
from transformer_ext.inference.continuation import TextGenerator, continuations  # noqa: E402
from transformer_ext.inference.language_engine import LanguageModelEngine  # noqa: E402
from transformer_ext.inference.options import SearchOptions  # noqa: E402
from transformer_ext.inference.torch_engine import TorchLanguageModel  # noqa: E402
from transformer_ext.model import LanguageModel, LanguageModelConfig  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent

VARIANTS = {
    "gpt-2": {
        "norm_first": True,
        "positions": "learned",
        "max_positions": 24,
        "activation": "gelu_tanh",
        "scale_embedding": False,
        "prepend_bos": False,
        **dict.fromkeys(("pad_id", "unk_id", "bos_id", "eos_id"), 36),
    },
    "the paper's decoder": {},
    "learned, a start token": {"positions": "learned", "max_positions": 22, "norm_first": True},
    "untied": {"tie": False, "output_bias": True, "embedding_norm": True},
    "modern": {
        "norm": "rms",
        "norm_first": True,
        "positions": "rope",
        "activation": "swiglu",
        "bias": False,
        "num_kv_heads": 2,
    },
    "no layers": {"num_layers": 0},
}
PROMPTS = [[5, 6, 7], [], [8], [9, 10, 11, 12, 13, 14, 15, 9, 10, 11, 12, 5], [20, 20], [30, 31]]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_model(seed=0, **changes):
    torch.manual_seed(seed)
    fields = dict(vocab_size=37, d_model=32, nhead=4, num_layers=2, dim_feedforward=48, dropout=0.0)
    model = LanguageModel(LanguageModelConfig(**{**fields, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.mul_(2.0)
    return model


def weights_of(model):
    shapes = parameter_shapes(model.config)
    return {n: w.detach().numpy() for n, w in model.named_parameters() if n in shapes}


def make_engine(model, threads=1, compute_type="float32"):
    return LanguageModelEngine(
        model.config, weights_of(model), threads=threads, compute_type=compute_type
    )


def assert_same(results, expected, tolerance=5e-5):
    for result, other in zip(results, expected, strict=True):
        assert (result.stop, result.steps) == (other.stop, other.steps)
        for mine, theirs in zip(result.hypotheses, other.hypotheses, strict=True):
            assert (mine.tokens, mine.stop) == (theirs.tokens, theirs.stop)
            np.testing.assert_allclose(mine.score, theirs.score, atol=tolerance)
            np.testing.assert_allclose(mine.token_scores, theirs.token_scores, atol=tolerance)


@pytest.mark.parametrize("variant", VARIANTS)
def test_finds_what_the_python_search_finds(variant):
    model = make_model(**VARIANTS[variant])
    engine = make_engine(model, threads=2)
    for options in (
        SearchOptions(beam_size=1),
        SearchOptions(beam_size=3, num_hypotheses=3, max_length=9),
        SearchOptions(
            sampling=True, num_hypotheses=2, seed=4, top_k=9, top_p=0.8, temperature=0.7
        ).replace(max_length=11, no_repeat_ngram_size=2, repetition_penalty=1.2),
    ):
        expected = continuations(model, PROMPTS, options)
        assert_same(engine.search(PROMPTS, options), expected)
        assert_same(TorchLanguageModel(model).search(PROMPTS, options), expected)


@pytest.mark.parametrize("penalty_on", ["log_probs", "logits"])
@pytest.mark.parametrize("beam_size", [1, 3])
def test_the_prompt_counts_for_repetition_and_not_for_scores(penalty_on, beam_size):
    model = make_model(seed=3, **VARIANTS["gpt-2"])
    engine = make_engine(model)
    plain = SearchOptions(beam_size=beam_size, max_length=10)
    rules = plain.replace(
        repetition_penalty=1.8, no_repeat_ngram_size=2, repetition_penalty_on=penalty_on
    )
    found = engine.search(PROMPTS, rules)
    expected = continuations(model, PROMPTS, rules)
    assert_same(found, expected)
    assert_same(TorchLanguageModel(model).search(PROMPTS, rules, batch_size=2), expected)
    for prompt, result in zip(PROMPTS, found, strict=True):
        hypothesis = result.hypotheses[0]
        assert len(hypothesis.tokens) <= 10 and result.steps <= 10
        said = [*(prompt or [36]), *hypothesis.tokens]
        pairs = list(zip(said, said[1:], strict=False))
        new = pairs[max(0, len(prompt) - 1) :]
        assert all(pairs.count(pair) == 1 for pair in new)
    single = engine.search(PROMPTS, rules.replace(no_repeat_ngram_size=1))
    for prompt, result in zip(PROMPTS, single, strict=True):
        tokens = result.hypotheses[0].tokens
        assert len({*prompt, *tokens}) == len({*prompt}) + len(tokens)


def test_a_penalty_on_logits_is_no_penalty_on_log_probs():
    """Of a positive score it makes less, and what is said next may differ."""
    model = make_model(seed=1, tie=False, output_bias=True)
    with torch.no_grad():
        model.generator.bias.add_(4.0)
    engine = make_engine(model)
    found = {}
    for name in ("log_probs", "logits"):
        options = SearchOptions(
            beam_size=1, repetition_penalty=2.5, repetition_penalty_on=name, max_length=20
        )
        found[name] = engine.search(PROMPTS, options)
        assert_same(found[name], continuations(model, PROMPTS, options))
    tokens = [[r.hypotheses[0].tokens for r in results] for results in found.values()]
    assert tokens[0] != tokens[1]


def test_scores_are_those_of_a_search_and_of_the_model():
    for variant in ("gpt-2", "modern", "learned, a start token"):
        model = make_model(**VARIANTS[variant])
        engine = make_engine(model, threads=2)
        config = model.config
        found = engine.search(PROMPTS, SearchOptions(max_length=7, num_hypotheses=2))
        texts, expected = [], []
        for prompt, result in zip(PROMPTS, found, strict=True):
            for hypothesis in result.hypotheses:
                start = [config.bos_id] if not prompt and not config.prepend_bos else []
                end = [config.eos_id] if hypothesis.ended else []
                texts.append([*start, *prompt, *hypothesis.tokens, *end])
                expected.append(hypothesis.token_scores)
        scores = engine.score([*texts, []])
        assert scores.pop() == []
        for text, row, of_search in zip(texts, scores, expected, strict=True):
            assert len(row) == len(text) - (not config.prepend_bos)
            # The same bits, whether tokens come at once or one after the other.
            assert row[len(row) - len(of_search) :] == of_search
            fed = [config.bos_id, *text] if config.prepend_bos else text
            with torch.no_grad():
                lengths = torch.tensor([len(fed)], dtype=torch.int32)
                log_probs = torch.log_softmax(model.logits(torch.tensor([fed]), lengths)[0], -1)
            labels = torch.tensor(fed[1:])
            of_model = log_probs[:-1].gather(1, labels[:, None])[:, 0]
            np.testing.assert_allclose(row, of_model, atol=2e-5)


def test_long_prompts_are_taken_in_pieces():
    model = make_model(positions="rope", num_kv_heads=1)
    engine = make_engine(model, threads=2)
    generator = np.random.default_rng(1)
    prompts = [generator.integers(4, 36, size=n).tolist() for n in (700, 3, 1100)]
    options = SearchOptions(beam_size=2, max_length=4)
    found = engine.search(prompts, options)
    assert_same(found, continuations(model, prompts, options))
    (scores,) = engine.score([prompts[2]])
    with torch.no_grad():
        fed = torch.tensor([[2, *prompts[2]]])
        log_probs = torch.log_softmax(model.logits(fed)[0], -1)
    expected = log_probs[:-1].gather(1, fed[0, 1:, None])[:, 0]
    np.testing.assert_allclose(scores, expected, atol=5e-5)


@st.composite
def language_searches(draw):
    prompts = draw(st.lists(st.lists(st.integers(0, 36), max_size=13), min_size=1, max_size=7))
    sampling = draw(st.booleans())
    beam_size = draw(st.integers(1, 4))
    fields = dict(
        beam_size=beam_size,
        num_hypotheses=draw(st.integers(1, 3 if sampling else beam_size)),
        early_stopping=draw(st.sampled_from(["exact", "first", "heuristic"])),
        max_length=draw(st.sampled_from([None, 1, 5, 11])),
        no_repeat_ngram_size=draw(st.sampled_from([0, 1, 2])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.4])),
        repetition_penalty_on=draw(st.sampled_from(["log_probs", "logits"])),
        min_length=draw(st.sampled_from([0, 1])),
        sampling=sampling,
    )
    if sampling:
        fields.update(
            seed=draw(st.integers(0, 99)),
            top_k=draw(st.sampled_from([None, 3])),
            top_p=draw(st.sampled_from([1.0, 0.7])),
        )
    return prompts, SearchOptions(**fields), draw(st.integers(1, 9)), draw(st.integers(1, 80))


@pytest.mark.parametrize("compute_type", ["float32", "bfloat16", "int8"])
def test_bitwise_the_same_in_any_batch_and_for_any_number_of_threads(compute_type):
    model = make_model(**VARIANTS["gpt-2"])
    try:
        engines = [make_engine(model, threads, compute_type) for threads in (1, 2, 4)]
    except ValueError:
        pytest.skip("the machine has no bfloat16 products")

    @settings(
        max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
    )
    @given(language_searches())
    def check(problem):
        prompts, options, batch_size, batch_tokens = problem
        numbers = list(range(5, 5 + len(prompts)))
        together = engines[0].search(prompts, options, numbers=numbers)
        for engine in engines[1:]:
            assert together == engine.search(
                prompts, options, numbers=numbers, batch_size=batch_size, batch_tokens=batch_tokens
            )
        texts = [prompt for prompt in prompts if prompt]
        assert engines[0].score(texts) == engines[2].score(
            texts, batch_size=batch_size, batch_tokens=batch_tokens
        )

    check()


# --- transformers ---------------------------------------------------------------------------------


def gpt2(folder, seed, end=1.6):
    """Their model, with its end of text so much likelier, and our engine from the same files."""
    pytest.importorskip("transformers")
    model = write_gpt2_dir(folder, seed=seed, n_embd=32, n_head=4, n_positions=64)
    with torch.no_grad():
        # Matrices that outweigh biases, or it would say the same token again and again.
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.mul_(0.3).add_(0.7 if name.endswith("weight") else 0.0)
            else:
                parameter.mul_(1.4)
        model.transformer.wte.weight[model.config.eos_token_id] *= end
    model.save_pretrained(folder)
    saved = load_model_dir(folder, LanguageModelConfig)
    return model, LanguageModelEngine(saved.config, saved.weights, threads=2)


def theirs(model, prompts, **options):
    """New tokens of the hypotheses of each prompt, up to the end: all prompts in one batch."""
    longest = max(map(len, prompts))
    end = model.config.eos_token_id
    ids = torch.tensor([[end] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    found = model.generate(
        input_ids=ids, attention_mask=mask, pad_token_id=end, do_sample=False, **options
    )
    rows = [row[longest:] for row in found.tolist()]
    rows = [row[: row.index(end)] if end in row else row for row in rows]
    count = len(rows) // len(prompts)
    return [rows[i * count : (i + 1) * count] for i in range(len(prompts))]


def assert_equal_or_tied(engine, prompts, results, expected):
    """The same tokens; others only where the model gives equal probabilities, to 1e-4."""
    different = 0
    for prompt, result, rows in zip(prompts, results, expected, strict=True):
        for hypothesis, row in zip(result.hypotheses, rows, strict=True):
            if hypothesis.tokens == row:
                continue
            different += 1
            end = [engine.config.eos_id]
            texts = [[*prompt, *hypothesis.tokens, *end], [*prompt, *row, *end]]
            mine, other = (sum(scores[len(prompt) - 1 :]) for scores in engine.score(texts))
            assert abs(mine - other) < 1e-4, (hypothesis.tokens, row)
    assert different <= 1


BEAMS = [
    {"num_beams": 1},
    {"num_beams": 2, "num_return_sequences": 2},
    {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.4},
    {"num_beams": 3, "early_stopping": True, "length_penalty": 2.0},
    {"num_beams": 5, "early_stopping": "never", "num_return_sequences": 2},
    {"num_beams": 4, "early_stopping": "never", "length_penalty": 0.0},
]
STOPPING = {False: "heuristic", True: "first", "never": "exact"}


def as_ours(limit, num_beams=1, num_return_sequences=1, early_stopping=False, **others):
    return SearchOptions.preset(
        "huggingface",
        beam_size=num_beams,
        num_hypotheses=num_return_sequences,
        early_stopping=STOPPING[early_stopping],
        max_length=limit,
        **others,
    )


@pytest.mark.parametrize("case", range(len(BEAMS)))
def test_finds_what_generate_of_transformers_finds(tmp_path, case):
    options = BEAMS[case]
    ended = 0
    for seed in range(3):
        model, engine = gpt2(tmp_path / str(seed), seed)
        generator = np.random.default_rng(seed)
        prompts = [generator.integers(0, 200, size=n).tolist() for n in (1, 7, 3, 30, 12)]
        for limit in (1, 6, 20):
            found = engine.search(prompts, as_ours(limit, **options))
            expected = theirs(model, prompts, max_new_tokens=limit, **options)
            assert_equal_or_tied(engine, prompts, found, expected)
            ended += sum(h.ended for result in found for h in result.hypotheses)
    assert ended > 0


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize(
    "rules",
    [
        {"no_repeat_ngram_size": 2},
        {"no_repeat_ngram_size": 3},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 2.5},
        {"min_new_tokens": 5},
        {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "min_new_tokens": 3},
    ],
)
def test_rules_are_those_of_transformers(tmp_path, num_beams, rules):
    plain = []
    ruled = []
    for seed in range(2):
        model, engine = gpt2(tmp_path / str(seed), seed)
        generator = np.random.default_rng(seed)
        prompts = [generator.integers(0, 40, size=n).tolist() for n in (4, 25, 12, 1)]
        mine = dict(rules)
        mine["min_length"] = mine.pop("min_new_tokens", 0)
        found = engine.search(prompts, as_ours(20, num_beams, **mine))
        # One by one: their rules see the padding of a batch.
        expected = [
            theirs(model, [prompt], max_new_tokens=20, num_beams=num_beams, **rules)[0]
            for prompt in prompts
        ]
        assert_equal_or_tied(engine, prompts, found, expected)
        ruled += [result.hypotheses[0].tokens for result in found]
        usual = engine.search(prompts, as_ours(20, num_beams))
        plain += [result.hypotheses[0].tokens for result in usual]
    assert plain != ruled


@pytest.mark.parametrize(
    "rules",
    [
        {"temperature": 0.6},
        {"top_k": 5},
        {"top_p": 0.7},
        {"temperature": 1.5, "top_k": 12, "top_p": 0.8},
        {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.7},
    ],
)
def test_samples_have_the_probabilities_of_transformers(tmp_path, rules):
    """A draw takes the token in whose part of [0, 1) the random number lies."""
    from transformer_ext.inference.search import uniform_number

    transformers = pytest.importorskip("transformers")
    model, engine = gpt2(tmp_path / "gpt2", 4, end=1.0)
    prompt = [5, 17, 40, 17]
    processors = model._get_logits_processor(
        transformers.GenerationConfig(do_sample=True, **rules), input_ids_seq_length=len(prompt)
    )
    with torch.no_grad():
        scores = model(torch.tensor([prompt])).logits[:, -1]
    probabilities = torch.softmax(processors(torch.tensor([prompt]), scores), -1)[0].double()
    order = torch.argsort(-probabilities, stable=True).tolist()
    sums = np.cumsum([float(probabilities[token]) for token in order])
    drawn = set()
    for seed in range(150):
        options = SearchOptions.preset(
            "huggingface", sampling=True, seed=seed, max_length=1, **rules
        )
        (result,) = engine.search([prompt], options)
        hypothesis = result.hypotheses[0]
        token = hypothesis.tokens[0] if hypothesis.tokens else model.config.eos_token_id
        place = order.index(token)
        uniform = uniform_number(seed, 0, 0, 0)
        assert sums[place] - float(probabilities[token]) - 1e-5 <= uniform <= sums[place] + 1e-5
        drawn.add(token)
    assert len(drawn) > 3


# --- on text --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("language")
    file = path / "trained.model"
    file.write_bytes(train_tokenizer(SENTENCES, vocab_size=330)[0])
    tokenizer = SentencePieceTokenizer(file)
    model = make_model(
        vocab_size=tokenizer.vocab_size, positions="learned", max_positions=40, norm_first=True
    )
    save_model_dir(path / "model", model.config, weights_of(model), tokenizer, tokenizer, {})
    return path / "model"


def test_texts_and_their_continuations(folder):
    generator = TextGenerator(folder, threads=2)
    beginnings = ["Open the file", "", "Save the table"]
    options = SearchOptions(beam_size=3, num_hypotheses=2, max_length=6)
    found = generator.generate(beginnings, options)
    for beginning, texts in zip(beginnings, found, strict=True):
        assert len(texts) == 2
        for text in texts:
            assert text.text == beginning + text.continuation
            assert len(text.hypothesis.tokens) <= 6
    assert generator(beginnings, options) == [texts[0].text for texts in found]
    assert generator(beginnings) == generator(beginnings, SearchOptions(beam_size=1))
    generator.close()
    with pytest.raises(ValueError, match="closed"):
        generator(["Open"])


def run(arguments, text, capsysbinary, tmp_path):
    path = tmp_path / "input"
    path.write_text(text, encoding="utf-8")
    model, *options = map(str, arguments)
    status = generate.main([model, str(path), *options])
    captured = capsysbinary.readouterr()
    return status, captured.out.decode(), captured.err.decode()


def test_the_command_writes_a_line_for_each(folder, capsysbinary, tmp_path):
    text = "Open the file\n\nSave the table\nClose it\n" * 3
    sampled = ["--sampling", "--seed", 3, "--max-length", 5]
    outputs = []
    places = (["--device", "cpu:0"], ["--device", "cpu:0", "--batch-size", 2])
    for more in ([], ["--batch-size", 1], ["--batch-tokens", 30, "--threads", 2], *places):
        status, out, _ = run([folder, *sampled, *more], text, capsysbinary, tmp_path)
        assert status == 0 and out.count("\n") == 12
        outputs.append(out)
    assert len(set(outputs)) == 1
    lines = outputs[0].split("\n")
    assert lines[0].startswith("Open the file") and lines[0] != lines[4]
    several = ["--beam-size", 2, "--num-hypotheses", 2, "--format"]
    status, out, _ = run([folder, *several, "jsonl"], "Open\n", capsysbinary, tmp_path)
    line, _ = out.split("\n")
    values = json.loads(line)
    assert status == 0 and len(values["hypotheses"]) == 2
    best = values["hypotheses"][0]
    assert values["text"] == best["text"] == "Open" + best["continuation"]
    assert best["log_prob"] == pytest.approx(sum(best["token_scores"]))
    status, out, _ = run([folder, *several, "nbest"], "\nOpen\n", capsysbinary, tmp_path)
    *lines, end = out.split("\n")
    assert status == 0 and end == "" and [line.split(" ||| ")[0] for line in lines] == list("0011")
    expected = [f"1 ||| {h['text']} ||| {h['score']:.6f}" for h in values["hypotheses"]]
    assert lines[2:] == [line.replace("\n", " ") for line in expected]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-hypotheses", 2, "--beam-size", 2], "--num-hypotheses: got 2, expected --format"),
        (["--top-k", 3], "--top-k: got 3 without sampling"),
        (["--threads", 0], "--threads: got 0, expected an integer from 1"),
        (["--coverage-penalty", 0.3], "--coverage-penalty: got 0.3, but a language model has no"),
        (["--return-attention"], "--return-attention: got True, but a language model has no"),
        (["--compute-type", "int3"], "--compute-type"),
    ],
)
def test_wrong_options_are_one_line(options, message, folder, capsysbinary, tmp_path):
    try:
        status, out, error = run([folder, *options], "a\n", capsysbinary, tmp_path)
    except SystemExit as end:
        captured = capsysbinary.readouterr()
        status, out, error = end.code, captured.out.decode(), captured.err.decode()
    assert status == 2 and out == "" and message in error


def test_a_line_longer_than_the_positions_is_named(folder, capsysbinary, tmp_path):
    text = "Open\n" * 2 + "Open the file. " * 30 + "\n"
    status, _, error = run([folder], text, capsysbinary, tmp_path)
    assert status == 2
    assert error.startswith("error: line 3 has") and error.count("\n") == 1
    assert "learned positions for 40" in error


def test_the_help_has_the_default_of_the_command(capsys):
    with pytest.raises(SystemExit):
        generate.main(["--help"])
    found = " ".join(capsys.readouterr().out.split())
    described = found.split("--beam-size N ")[1].split(" --")[0]
    assert "default: 1" in described and "default: 4" not in described


def test_texts_of_a_wrong_kind_are_named(folder):
    generator = TextGenerator(folder)
    for call in (generator, generator.generate):
        with pytest.raises(TypeError, match="beginnings: got bytes, expected a text or a sequence"):
            call(b"Open")
    with pytest.raises(ValueError, match=r"beginnings: number 1 \(from 0\) has half a character"):
        generator(["Open", "\ud800"])
    options = SearchOptions(beam_size=1, max_length=2)
    expected = generator(["Open"], options)
    assert generator(iter(["Open"]), options) == expected
    with generator:
        assert [generator("Open", max_length=2)] == expected
    with pytest.raises(ValueError, match="^this TextGenerator is closed$"):
        generator("Open")


def test_wrong_arguments_are_named():
    engine = make_engine(make_model(**VARIANTS["gpt-2"]))
    for prompts, options, message in (
        ([[37]], {}, "prompts: got 37, expected integers from 0 to 36"),
        ([[-1, 4]], {}, "prompts: got -1, expected integers from 0 to 36"),
        ([[2**31]], {}, "prompts: got 2147483648, expected integers from 0 to 36"),
        ([[1.5]], {}, "prompts: got 1.5, expected integers from 0 to 36"),
        ([["x"]], {}, "prompts: got 'x', expected integers from 0 to 36"),
        ([[4] * 25], {}, "prompts: number 0 .* has 25 tokens .* learned positions for 24"),
        ([[4]], {"return_alignment": True}, "return_alignment: got True, but a language"),
        ([[4]], {"max_length_a": 2.0}, "max_length_a: got 2.0, but a language model has no source"),
        ([[4]], {"suppressed_tokens": (99,)}, "suppressed_tokens: got 99"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.search(prompts, SearchOptions(**options))
    with pytest.raises(ValueError, match="numbers: got 1, expected one for each of the 2 prompts"):
        engine.search([[4], [5]], numbers=[1])
    for numbers, got in (([-1], "-1"), ([0.5], "0.5"), ([2**64], str(2**64))):
        message = f"numbers: got {got}, expected integers from 0 to {2**64 - 1}$"
        with pytest.raises(ValueError, match=message):
            engine.search([[4]], numbers=numbers)
    for prompts in ([1], 1):
        with pytest.raises(TypeError, match="prompts: got 1, expected a sequence of integers for"):
            engine.search(prompts)
    with pytest.raises(TypeError, match="numbers: got 3, expected a sequence of integers"):
        engine.search([[4]], numbers=3)
    for text, got in (([40], "40"), ([2**31], str(2**31)), ([1.5], "1.5"), (["x"], "'x'")):
        with pytest.raises(ValueError, match=f"texts: got {got}, expected integers from 0 to 36"):
            engine.score([text])
    with pytest.raises(TypeError, match="texts: got 1, expected a sequence of integers for each"):
        engine.score([1, 2])
    # Integers of numpy are integers, and so in options.
    given = SearchOptions(
        np.int64(2), length_penalty=np.float32(1), suppressed_tokens=np.array([5])
    )
    assert given == SearchOptions(2, length_penalty=1.0, suppressed_tokens=(5,))
    given = [[np.int64(4), np.int32(5)], np.array([6])]
    assert engine.score(given) == engine.score([[4, 5], [6]])
    options = SearchOptions(sampling=True, max_length=3)
    assert engine.search(given, options, numbers=np.array([2**63, 1], np.uint64)) == engine.search(
        [[4, 5], [6]], options, numbers=[2**63, 1]
    )
    with pytest.raises(ValueError, match="batch_tokens: got 0"):
        engine.search([[4]], batch_tokens=0)
    # As long as there are positions, something may follow; the last token needs none.
    assert engine.search([[4] * 24], SearchOptions(beam_size=1))[0].steps == 1
    assert engine.search([[4] * 20], SearchOptions(beam_size=1, min_length=9))[0].steps == 5
    assert engine.search([]) == [] and engine.score([]) == []
    engine.close()
    with pytest.raises(ValueError, match="closed"):
        engine.search([[4]])


def test_ctrl_c_ends_a_long_prompt():
    # It would take half a minute; a layer, after which signals are looked at, a fraction of a second.
    engine = make_engine(make_model(num_layers=64))
    options = SearchOptions(beam_size=1, max_length=1)
    before = engine.search([[5, 6]], options)
    with pytest.raises(KeyboardInterrupt), ctrl_c():
        engine.search([[5] * 16_384], options)
    assert engine.search([[5, 6]], options) == before


def test_imports_no_torch(folder):
    code = (
        "import sys\n"
        "from transformer_ext import generate\n"
        "status = generate.main([sys.argv[1], '--max-length', '3'])\n"
        "loaded = [m for m in ('torch', 'transformers', 'tokenizers') if m in sys.modules]\n"
        "sys.exit(f'imported: {loaded}' if loaded else status)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        input="Open\n",
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Open")
