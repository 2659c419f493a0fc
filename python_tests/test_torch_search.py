"""The search of whole batches in torch: its rules against the plain search, on each device.

test_engine.py and test_generation.py compare it, with models, beside the compiled engine.
"""

from __future__ import annotations

import copy
import functools
import io
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")
hypothesis = pytest.importorskip("hypothesis")

from decoding_helpers import SENTENCES, save_random_model  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from kernel_testing import needs_compiled, needs_gpu  # noqa: E402
from test_decoding_options import SOURCES, VOCABULARY, searches  # noqa: E402
from test_device_step import Watched, _registered_for_cuda  # noqa: E402
from test_engine import assert_same, make_model, random_sources  # noqa: E402
from test_generation import PROMPTS  # noqa: E402
from test_generation import make_model as make_language_model  # noqa: E402

from transformer_ext import translate  # noqa: E402
from transformer_ext.files import load_model_dir  # noqa: E402
from transformer_ext.inference import torch_search  # noqa: E402
from transformer_ext.inference.compiled import UnsupportedModelError  # noqa: E402
from transformer_ext.inference.continuation import continuations  # noqa: E402
from transformer_ext.inference.options import SearchOptions  # noqa: E402
from transformer_ext.inference.search import beam_search, search  # noqa: E402
from transformer_ext.inference.torch_engine import (  # noqa: E402
    TorchEngine,
    TorchLanguageModel,
    bytes_per_hypothesis,
)
from transformer_ext.inference.torch_search import (  # noqa: E402
    Decoding,
    Task,
    TorchSearch,
    best_of,
)
from transformer_ext.inference.translator import Translator  # noqa: E402
from transformer_ext.model.cache import DecoderCache, Slots  # noqa: E402
from transformer_ext.model.transformer import Transformer  # noqa: E402
from transformer_ext.ops import _backend, set_backend  # noqa: E402
from transformer_ext.training.report import Console  # noqa: E402
from transformer_ext.training.scoring import Decoder, Scorer  # noqa: E402

DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]
START, END = 2, 3


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def table(seed, coarse):
    """Scores and attention after each token, by sentence; coarse ones are often equal."""
    generator = np.random.default_rng(seed)
    scores = generator.normal(size=(len(SOURCES), VOCABULARY, VOCABULARY)) * 2
    if coarse:
        scores = np.round(scores)
    longest = max(len(source) for source in SOURCES)
    attention = np.zeros((len(SOURCES), VOCABULARY, longest), np.float32)
    for weights, source in zip(attention, SOURCES, strict=True):
        weights[:, : len(source)] = generator.dirichlet(np.ones(len(source)), size=VOCABULARY)
    return scores, attention


class Tables:
    """What a model is for the search: here two tables."""

    def __init__(self, scores, attention, width, device):
        self.scores = torch.tensor(scores, device=device)
        self.attention = None if attention is None else torch.tensor(attention, device=device)
        self.rows = torch.arange(len(scores), device=device).repeat_interleave(width)
        self.width = width
        self.room = None

    def step(self, tokens, longest):
        assert self.room is None or longest <= self.room
        attention = None if self.attention is None else self.attention[self.rows, tokens]
        return self.scores[self.rows, tokens], attention

    def keep(self, sentences):
        self.rows = self.rows.view(-1, self.width)[sentences].flatten()

    def grow(self, steps):
        self.room = steps

    def decoding(self):
        return Decoding(self.step, lambda rows: None, self.keep, self.grow)


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(asked=searches())
def test_the_rules_are_those_of_the_plain_search(device, asked):
    options, prefixes, numbers = asked
    # The logarithms of the coverage penalty are of two libraries: equal scores need not stay so.
    coarse = numbers[1] % 2 == 0 and options.coverage_penalty == 0.0
    scores, attention = table(numbers[0] % 1000, coarse)
    attention = attention if options.needs_attention else None
    lengths = [len(source) for source in SOURCES]
    limits = [options.length_limit(length) for length in lengths]
    log_probs = torch.tensor(scores).log_softmax(2).numpy()

    def step(rows, prefix_rows):
        found = log_probs[rows, prefix_rows[:, -1]]
        return found if attention is None else (found, attention[rows, prefix_rows[:, -1]])

    expected = search(
        step,
        limits,
        options,
        start_id=START,
        eos_id=END,
        suppressed=[0, START],
        source_lengths=lengths,
        prefixes=prefixes,
        numbers=numbers,
    )
    tasks = [
        Task(
            limit=limit,
            minimum=options.length_minimum(length),
            number=number,
            fed=START,
            prefix=prefix,
            source_length=length,
        )
        for limit, length, number, prefix in zip(
            limits, lengths, numbers, prefixes or [[]] * 4, strict=True
        )
    ]
    width = options.num_hypotheses if options.sampling else options.beam_size
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_search, "CHECK_EVERY", 1 + numbers[2] % 3)
        patch.setattr(torch_search, "_ROOM", 2 + numbers[3] % 9)
        found = TorchSearch(
            Tables(scores, attention, width, device).decoding(),
            tasks,
            options,
            eos_id=END,
            suppressed=[0, START],
            device=torch.device(device),
        ).run()
    assert_same(found, expected, tolerance=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("columns", [5, 64, 640, 641, 1000])
def test_the_best_come_first_and_equal_ones_by_column(device, columns):
    generator = torch.Generator().manual_seed(columns)
    scores = torch.randint(0, 40, (7, columns), generator=generator).float()
    scores[1] = -math.inf
    scores[2, ::3] = -math.inf
    scores[3] = 1.0
    scores[4, columns // 2] = math.nan
    for count in (1, 2, 5, 9):
        order = scores.sort(dim=1, descending=True, stable=True).indices[:, :count]
        values, places = best_of(scores.to(device), count)
        assert torch.equal(places.cpu(), order)
        torch.testing.assert_close(values.cpu(), scores.gather(1, order), equal_nan=True)


@needs_compiled
@pytest.mark.parametrize(
    "options",
    [
        SearchOptions(),
        SearchOptions(beam_size=1),
        SearchOptions(sampling=True, num_hypotheses=2, top_p=0.5),
        SearchOptions(
            coverage_penalty=0.5,
            return_attention=True,
            repetition_penalty=1.5,
            no_repeat_ngram_size=2,
            early_stopping="heuristic",
        ),
    ],
)
def test_a_step_calls_only_cuda_ops_and_never_waits(options, monkeypatch):
    """Tensors without data stand for those of a GPU: what needs their values fails."""
    registered = _registered_for_cuda()
    monkeypatch.setitem(_backend._DTYPES, "meta", _backend._DTYPES["cuda"])
    monkeypatch.setattr(_backend, "has_kernel", lambda op, device: op in registered)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    steps = []
    step = TorchSearch.step

    def watched(self):
        with set_backend("compiled"), Watched("meta") as found:
            step(self)
        steps.append(found.ops)

    monkeypatch.setattr(TorchSearch, "step", watched)
    model = make_model().set_precision("float16")
    sources = random_sources(model)
    engine = TorchEngine(model.to("meta"))
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        engine.search(sources, options, prefixes=[[4, 5]] * len(sources))
    assert len(steps) == torch_search.CHECK_EVERY
    ours = {op.partition("::")[2] for op in set.union(*steps) if op.startswith("transformer_ext")}
    assert {"attention_forward", "residual_norm_forward"} <= ours <= registered


@pytest.mark.parametrize(
    ("device", "precision", "tolerance"),
    [
        ("cpu", "bfloat16", 0.05),
        pytest.param("cuda", "float32", 1e-3, marks=needs_gpu),
        pytest.param("cuda", "bfloat16", 0.05, marks=needs_gpu),
        pytest.param("cuda", "float16", 0.01, marks=needs_gpu),
    ],
)
def test_what_is_found_step_by_step_is_scored_alike_at_once(device, precision, tolerance):
    model = make_model(seed=3, positions="rope", num_kv_heads=2).to(device)
    engine = TorchEngine(model.set_precision(precision))
    sources = random_sources(model)
    model.train()
    found = engine.search(sources, SearchOptions(max_length=15, return_attention=True))
    assert model.training
    best = [result.hypotheses[0] for result in found]
    end = [model.config.eos_id]
    targets = [[*h.tokens, *(end if h.ended else [])] for h in best]
    for hypothesis, (scores, attention) in zip(best, engine.align(sources, targets), strict=True):
        np.testing.assert_allclose(hypothesis.token_scores, scores, atol=tolerance)
        np.testing.assert_allclose(hypothesis.attention, attention, atol=tolerance)
    with pytest.raises(ValueError, match="targets: got 1, expected one for each of the 6 sources"):
        engine.score(sources, targets[:1])


@needs_gpu
@pytest.mark.parametrize(
    "options",
    [
        SearchOptions(num_hypotheses=3, max_length=15),
        SearchOptions(beam_size=1, max_length=15),
        SearchOptions(sampling=True, num_hypotheses=2, max_length=15),
        SearchOptions(repetition_penalty=1.3, no_repeat_ngram_size=2, max_length=15),
    ],
)
def test_on_a_gpu_it_finds_what_the_plain_search_finds(options):
    model = make_model(seed=3)
    sources = random_sources(model)
    expected = beam_search(model, sources, options)
    engine = TorchEngine(copy.deepcopy(model).cuda())
    assert_same(engine.search(sources, options), expected, tolerance=1e-4)
    language_model = make_language_model()
    expected = continuations(language_model, PROMPTS, options)
    found = TorchLanguageModel(copy.deepcopy(language_model).cuda()).search(PROMPTS, options)
    assert_same(found, expected, tolerance=1e-4)


def test_scores_of_given_targets_are_those_of_the_model():
    models = [make_model(seed=3), make_model(seed=4)]
    sources, targets = [[5, 6, 3], [], [7, 3], [8, 9, 9, 3]], [[8, 9, 3], [4, 3], [3], []]
    each = [TorchEngine(model).score(sources, targets) for model in models]
    assert [len(row) for row in each[0]] == [3, 0, 1, 0]
    for model, scores in zip(models, each, strict=True):
        fed = torch.tensor([[model.config.decoder_start_id, 8, 9]])
        with torch.no_grad():
            log_probs = model.logits(torch.tensor([[5, 6, 3]]), fed).log_softmax(-1)[0]
        expected = log_probs.gather(1, torch.tensor([[8], [9], [3]]))[:, 0]
        np.testing.assert_allclose(scores[0], expected, atol=1e-5)
    for i, row in enumerate(TorchEngine(models).score(sources, targets)):
        mean = np.mean([np.exp(scores[i]) for scores in each], axis=0) if row else []
        np.testing.assert_allclose(np.exp(row), mean, rtol=1e-5)


def test_a_batch_is_as_large_as_memory_allows(monkeypatch):
    """8 sentences of 4 hypotheses of 10 tokens, keys and values of one head of 8 numbers."""
    model = make_model(positions="rope", num_kv_heads=1)
    config = model.config
    # Two layers and one gathered, keys and values of one head of 8; five rows over 37 tokens.
    assert bytes_per_hypothesis(config, 10, 4) == 3 * 10 * 2 * 8 * 4 + 5 * 37 * 4
    engine = TorchEngine(model)
    most = [
        engine._most_at_once(1e9, SearchOptions(sampling=True, num_hypotheses=4, top_k=top_k), 10)
        for top_k in (5, None)
    ]
    assert most[0] > 1.5 * most[1]
    held = []
    grown = DecoderCache._held

    def watched(self, name, like):
        found = grown(self, name, like)
        held.append(found.numel() * found.element_size())
        return found

    monkeypatch.setattr(DecoderCache, "_held", watched)
    sources = [[5] * 9 + [3]] * 8
    options = SearchOptions(max_length=10)
    expected = TorchEngine(model).search(sources, options)
    assert max(held) == 8 * 4 * 10 * 2 * 8 * 4
    held.clear()
    room = 3 * (4 * bytes_per_hypothesis(config, 10, 4) + bytes_per_hypothesis(config, 10, 4))
    monkeypatch.setattr("transformer_ext.inference.torch_engine._MOST_BYTES", room)
    assert_same(TorchEngine(model).search(sources, options), expected)
    assert max(held) == 3 * 4 * 10 * 2 * 8 * 4


@pytest.mark.parametrize("kind", ["translates", "continues"])
def test_a_batch_that_memory_does_not_suffice_for_is_halved(kind, monkeypatch):
    if kind == "translates":
        engine, inputs = TorchEngine(make_model()), random_sources(make_model())
    else:
        engine, inputs = TorchLanguageModel(make_language_model()), PROMPTS
    options = SearchOptions(max_length=8, sampling=True, num_hypotheses=2)
    expected = engine.search(inputs, options)
    sizes, most = [], 2
    init = TorchSearch.__init__

    def with_little_memory(self, decoding, tasks, *arguments, **options):
        sizes.append(len(tasks))
        if len(tasks) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        init(self, decoding, tasks, *arguments, **options)

    monkeypatch.setattr(TorchSearch, "__init__", with_little_memory)
    assert_same(engine.search(inputs, options), expected)
    assert max(sizes) > most
    most = 0
    with pytest.raises(torch.OutOfMemoryError):
        engine.search(inputs, options)


def test_what_graphs_hold_of_a_gpus_memory_is_no_room(monkeypatch):
    """16 GiB: 8 of CUDA graphs, 3 that torch keeps for what comes, 5 free."""
    gpu = {"free": 5 << 30, "kept": 3 << 30}

    def empty_cache():
        gpu["free"], gpu["kept"] = gpu["free"] + gpu["kept"], 0

    monkeypatch.setattr(TorchEngine, "device", torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (gpu["free"], 16 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: (8 << 30) + gpu["kept"])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    engine = TorchEngine(make_model())
    assert engine._room() == 4 << 30
    # Where there is enough, nothing is given back: it would have to be asked for again.
    gpu.update(free=100 << 30, kept=3 << 30)
    assert engine._room() == 8 << 30 and gpu["kept"]


def test_parts_of_the_users_own(monkeypatch):
    class Changed(type(make_model())):
        def decode_packed(self, *args):
            return super().decode_packed(*args)

    class Layer(torch.nn.Module):
        pass

    model = make_model()
    with pytest.raises(UnsupportedModelError, match="Changed has a decode_packed of its own"):
        TorchEngine(Changed(model.config))
    # A position-wise part may be anything.
    model.decoder.layers[0].feed_forward = torch.nn.Identity()
    model.decoder.layers[0].feed_forward.forward = lambda x, rng=None: 0.5 * x
    sources = random_sources(model)
    options = SearchOptions(max_length=9)
    assert_same(TorchEngine(model).search(sources, options), beam_search(model, sources, options))
    model.decoder.layers[1].self_attention = Layer()
    with pytest.raises(UnsupportedModelError, match=r"layers.1.self_attention is a Layer"):
        TorchEngine(model)


def test_wrong_arguments_are_named():
    engine = TorchEngine(make_model(positions="learned", max_positions=12))
    for arguments, message in (
        (dict(sources=[[5, 37]]), "sources: got 37, expected integers from 0 to 36"),
        (dict(sources=[[5, 3]], prefixes=[]), "prefixes: got 0, expected one for each of the 1"),
        (dict(sources=[[5, 3]], prefixes=[[37]]), "prefixes: got 37, expected integers from 0"),
        (dict(sources=[[5] * 13]), "a sequence of 13 tokens is longer than the 12 learned"),
        (dict(sources=[[5, 3]], prefixes=[[5] * 12]), "prefix: got 12 tokens, expected fewer"),
        (dict(sources=[[5, 3]], batch_size=0), "batch_size: got 0, expected an integer from 1"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.search(**arguments)
    with pytest.raises(ValueError, match="suppressed_tokens: got 37, expected 0 to 36"):
        engine.search([[5, 3]], SearchOptions(suppressed_tokens=(37,)))
    with torch.no_grad():
        engine.models[0].generator.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="NaN among them"):
        engine.search([[5, 3]])
    with pytest.raises(ValueError, match="NaN among them"):
        engine.score([[5, 3]], [[5, 3]])
    engine.close()
    with pytest.raises(ValueError, match="^this TorchEngine is closed$"):
        engine.search([[5, 3]])
    with pytest.raises(ValueError, match="got none"):
        TorchEngine([])
    with pytest.raises(ValueError, match="number 1 .from 0. has eos_id 1, expected the 3"):
        TorchEngine([make_model(), make_model(eos_id=1, unk_id=3)])


@pytest.mark.parametrize("device", ["cpu:0", pytest.param("cuda", marks=needs_gpu)])
def test_a_translator_on_a_device(device, tmp_path, capsys):
    folder = save_random_model(tmp_path / "model")
    options = SearchOptions(max_length=12)
    with (
        Translator(folder, options=options) as compiled,
        Translator(folder, options=options, device=device) as translator,
    ):
        assert (translator.threads, translator.compute_type) == (1, "float32")
        assert translator.longest_source is None
        both = [each.translate(SENTENCES, num_hypotheses=2) for each in (compiled, translator)]
        for mine, theirs in zip(*both, strict=True):
            assert [h.text for h in mine.hypotheses] == [h.text for h in theirs.hypotheses]
            assert mine.score == pytest.approx(theirs.score, rel=1e-4)
        scores = [
            np.concatenate(each.score(SENTENCES, SENTENCES)) for each in (compiled, translator)
        ]
        np.testing.assert_allclose(*scores, atol=1e-3)
    text = tmp_path / "text"
    text.write_text("".join(f"{sentence}\n" for sentence in SENTENCES))
    command = [str(folder), str(text), "--max-length", "12", "--device"]
    assert translate.main([*command, device]) == 0
    assert capsys.readouterr().out.splitlines() == [found.text for found in both[0]]
    assert translate.main([*command, device, "--threads", "2"]) == 2
    assert f"threads: got 2, expected none on {device}" in capsys.readouterr().err
    assert translate.main([*command, "cpu", "--compute-type", "float16"]) == 2
    assert "compute_type: got 'float16', expected one of auto" in capsys.readouterr().err
    with pytest.raises(ValueError, match=f"got 'int8', expected one of .* on {device}"):
        Translator(folder, device=device, compute_type="int8")
    with pytest.raises(ValueError, match="device: got 'gpu', expected 'cpu' or a device that"):
        Translator(folder, device="gpu")


def test_validation_translates_with_the_model_where_it_is(tmp_path, monkeypatch):
    folder = save_random_model(tmp_path / "model")
    saved = load_model_dir(folder)
    model = Transformer(saved.config).load_weights(saved.weights)
    said = io.StringIO()
    tokenizers = saved.source_tokenizer, saved.target_tokenizer
    decoder = Decoder(model, *tokenizers, Console(said), threads=1)
    scorer = Scorer([(s, s[::-1]) for s in SENTENCES], decoder, Console(said), samples=0)
    assert not decoder.in_memory and not said.getvalue()
    expected = decoder(folder, SENTENCES, 3)
    assert decoder(None, SENTENCES, 3) == expected and len(set(expected)) > 1
    assert scorer(None) == scorer(folder)
    # On another device a folder is read to there.
    asked = []
    monkeypatch.setattr(Decoder, "_device", torch.device("cpu:0"))
    monkeypatch.setattr(TorchEngine, "of_weights", functools.partial(recorded, asked))
    assert decoder(folder, SENTENCES, 3) == expected
    assert asked == [("cpu:0", "float32")]

    class Own(type(model.decoder.layers[0].self_attention)):
        def forward(self, *args):
            return super().forward(*args)

    # What a search with a cache does not know, the plain one decodes.
    model.decoder.layers[0].self_attention.__class__ = Own
    assert decoder(None, SENTENCES, 3) == expected


def recorded(asked, models, *place):
    asked.append(place)
    return TorchEngine([Transformer(c).load_weights(weights) for c, weights in models])


def test_a_hypothesis_reads_what_its_past_has_said():
    slots = Slots([3, 1], 2, 5, torch.device("cpu"))
    # Position 0 and 1 of the first sentence, its first row.
    assert slots.prompt_slots().tolist() == [0, 2]
    slots.begin_step(slots.positions_for(3))
    assert slots.position.tolist() == [2, 2, 0, 0]
    assert slots.written.tolist() == [4, 5, 10, 11]

    def seen(row):
        return slots.mask.view(4, -1)[row].nonzero()[:, 0].tolist()

    assert [seen(row) for row in range(4)] == [[0, 2, 4], [0, 2, 5], [0], [1]]
    slots.end_step(torch.tensor([1, 1, 2, 2]))
    slots.begin_step(slots.positions_for(4))
    assert [seen(row) for row in range(4)] == [[0, 2, 5, 6], [0, 2, 5, 7], [0, 2], [0, 3]]
    slots.together = False
    slots.begin_step(slots.positions_for(4))
    assert slots.read.view(4, 5)[0].tolist()[:4] == [0, 2, 5, 6]
    assert slots.read.view(4, 5)[3].tolist()[:2] == [10, 13]
    assert slots.mask.sum((1, 2, 3)).tolist() == [4, 4, 2, 2]
