"""Models from and to the MarianMT directories of Hugging Face's ``transformers``.

Such a directory holds ``config.json``, ``model.safetensors`` (or ``pytorch_model.bin``),
``generation_config.json``, the SentencePiece models ``source.spm`` and ``target.spm``,
``vocab.json`` with the id of each piece (and ``target_vocab.json`` where the languages have one
each), and ``tokenizer_config.json``.

Marian's model is a post-norm Transformer. Its sinusoids come in halves, and its ids begin with the
end of sentence and end with padding, which starts a translation too. Import keeps all this.
Export reorders: the ids of a vocabulary, and, where sinusoids are interleaved, the columns of
everything that is ``d_model`` wide. Neither changes what is computed but for the order of sums.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from transformer_ext.data.tokenizer import SentencePieceTokenizer, Tokenizer, TokenizerError
from transformer_ext.files import (
    FileError,
    ModelDir,
    load_model_dir,
    parameter_shapes,
    read_json,
    save_tensors,
    write_json,
    write_model_files,
)
from transformer_ext.huggingface.checkpoint import Checkpoint
from transformer_ext.huggingface.conversion import (
    Conversion,
    output_folder,
    parameters,
    split_heads,
)
from transformer_ext.huggingface.fields import THEIR_ACTIVATIONS, Fields, HuggingFaceError
from transformer_ext.inference.options import SearchOptions
from transformer_ext.inference.search import never_proposed
from transformer_ext.model.config import TransformerConfig

#: That of nn.LayerNorm, which MarianMTModel leaves as it is.
_NORM_EPS = 1e-5
#: Rows of the position tables, unless longer sentences were trained on.
_POSITIONS = 1024


# --- both directions ----------------------------------------------------------------------------


def _layer_names(config: TransformerConfig) -> Iterator[tuple[str, list[str]]]:
    """Our name of each module in the layers, and theirs: several where ours is their rows joined."""
    for stack, depth in (
        ("encoder", config.num_encoder_layers),
        ("decoder", config.num_decoder_layers),
    ):
        for index in range(depth):
            ours, theirs = f"{stack}.layers.{index}", f"model.{stack}.layers.{index}"
            parts = [f"{theirs}.self_attn.{name}_proj" for name in "qkv"]
            yield f"{ours}.self_attention.in_projection", parts
            yield f"{ours}.self_attention.out_projection", [f"{theirs}.self_attn.out_proj"]
            yield f"{ours}.self_attention_norm", [f"{theirs}.self_attn_layer_norm"]
            if stack == "decoder":
                query, *parts = (f"{theirs}.encoder_attn.{name}_proj" for name in "qkv")
                yield f"{ours}.cross_attention.query_projection", [query]
                yield f"{ours}.cross_attention.key_value_projection", parts
                yield f"{ours}.cross_attention.out_projection", [f"{theirs}.encoder_attn.out_proj"]
                yield f"{ours}.cross_attention_norm", [f"{theirs}.encoder_attn_layer_norm"]
            yield f"{ours}.feed_forward.in_projection", [f"{theirs}.fc1"]
            yield f"{ours}.feed_forward.out_projection", [f"{theirs}.fc2"]
            yield f"{ours}.feed_forward_norm", [f"{theirs}.final_layer_norm"]


def _sinusoids(length: int, width: int) -> np.ndarray:
    """Their table: all sines, then all cosines; float32 ``[length, width]``, made in float64."""
    angles = np.arange(length)[:, None] / 10000.0 ** (np.arange(0, width, 2) / width)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


def _embedding_names(config: TransformerConfig) -> tuple[str, str, str]:
    """The weights that hold source embedding, target embedding and output projection."""
    source = "source_embedding.weight"
    target = source if config.tie == "all" else "target_embedding.weight"
    return source, target, "generator.weight" if config.tie == "none" else target


def _sizes(config: TransformerConfig) -> list[str]:
    vocabulary = f"{config.tgt_vocab_size:,} ids"
    if config.src_vocab_size != config.tgt_vocab_size:
        vocabulary = f"{config.src_vocab_size:,} source and {config.tgt_vocab_size:,} target ids"
    tied = {
        "all": "source embedding, target embedding and output projection are one",
        "target": "target embedding and output projection are one",
        "none": "no embeddings shared",
    }
    return [
        f"layers: {config.num_encoder_layers} + {config.num_decoder_layers} of width "
        f"{config.d_model} and {config.dim_feedforward}, {config.nhead} heads, "
        f"{config.activation}, {parameters(config):,} parameters",
        f"vocabulary: {vocabulary}; {tied[config.tie]}",
    ]


# --- import -------------------------------------------------------------------------------------


def from_marian(path: str | Path, output: str | Path, *, overwrite: bool = False) -> Conversion:
    """Make a model directory of a MarianMT directory. Needs no ``transformers``.

    Weights in ``pytorch_model.bin`` are read by torch, those in ``model.safetensors`` without it.
    float16 and bfloat16 weights become float32. Token ids stay what they were.

    Args:
        path: the MarianMT directory.
        output: the model directory to write, which appears when it is complete.
        overwrite: replace a model directory that is there.

    Raises:
        HuggingFaceError: the model has something that ours cannot hold.
        FileError: a file is missing, broken, or does not fit the rest; the output is in the way.
    """
    path, output = Path(path), Path(output)
    if not path.is_dir():
        raise FileError(f"{path}: no such folder")
    values = Fields(path / "config.json", read_json(path / "config.json"))
    # config.json is where older versions have its settings.
    generation_file = path / "generation_config.json"
    generation = Fields.read(generation_file) if generation_file.is_file() else values
    found = Checkpoint(path)
    types = found.types
    config, weights, notes = _imported(values, generation, found)
    try:
        search, more_notes = _search_options(generation.values, config)
    except (TypeError, KeyError, IndexError, ValueError) as error:
        raise HuggingFaceError(
            f"{generation.path}: a setting that cannot be read: {error}"
        ) from None
    with tempfile.TemporaryDirectory() as scratch:
        source, target = _import_tokenizers(path, Path(scratch), config)
        config = dataclasses.replace(config, unk_id=target.unk_id)
        training: dict[str, Any] = {"converted_from": "MarianMTModel"}
        if config.positions != "learned":
            training["max_train_length"] = values.integer("max_position_embeddings", 1024, least=1)
        with output_folder(output, path, overwrite) as folder:
            write_model_files(folder, config, weights, source, target, training)
    vocabularies = "" if source.vocabulary == target.vocabulary else ", a vocabulary for each side"
    messages = [
        f"{path}: MarianMTModel, weights of {found.path.name} in {types}"
        + ("" if types == "float32" else ", converted to float32"),
        *_sizes(config),
        f"special ids: end of sentence {config.eos_id}, unknown {config.unk_id}, padding "
        f"{config.pad_id}, start {config.decoder_start_id}{vocabularies}",
        *notes,
        *more_notes,
        f"to search as generate() does: --search-preset huggingface {_flags(search)}".rstrip(),
        f"written to {output}",
    ]
    return Conversion(output, config, messages, search)


def _imported(
    values: Fields, generation: Fields, found: Checkpoint
) -> tuple[TransformerConfig, dict[str, np.ndarray], list[str]]:
    """Architecture, weights by our names, and what is worth saying."""
    try:
        fields = _import_config(values, generation)
        weights, changes, notes = _import_tables(values, fields, found)
        config = TransformerConfig.from_dict({**fields, **changes})
    except FileError:
        raise
    except (ValueError, TypeError) as error:
        raise HuggingFaceError(f"{values.path}: {error}") from None
    for ours, theirs in _layer_names(config):
        for kind in ("weight", "bias"):
            parts = [found.take(f"{name}.{kind}") for name in theirs]
            weights[f"{ours}.{kind}"] = np.concatenate(parts) if len(parts) > 1 else parts[0]
    if config.embedding_norm:
        for stack in ("encoder", "decoder"):
            for kind in ("weight", "bias"):
                name = f"model.{stack}.layernorm_embedding.{kind}"
                weights[f"{stack}.embedding_norm.{kind}"] = found.take(name)
    found.refuse_left()
    for name, shape in parameter_shapes(config).items():
        if weights[name].shape != shape:
            raise FileError(
                f"{found.path}: {name}: made of tensors of the shape {list(weights[name].shape)}, "
                f"expected {list(shape)} as config.json has it"
            )
    return config, weights, notes


def _import_config(values: Fields, generation: Fields) -> dict[str, Any]:
    """The fields of TransformerConfig, as far as their ``config.json`` tells them."""
    # What only some versions of the format name, with the one value that the model class has.
    for key, only in (
        ("model_type", "marian"),
        ("normalize_before", False),
        ("add_final_layer_norm", False),
        ("is_encoder_decoder", True),
    ):
        values.only(key, only, "a MarianMTModel has nothing else")
    for key in ("attention_heads", "ffn_dim"):
        encoder, decoder = (
            values.integer(f"{side}_{key}", least=1) for side in ("encoder", "decoder")
        )
        if encoder != decoder:
            raise HuggingFaceError(
                f"{values.path}: encoder_{key}, decoder_{key}: got {encoder} and {decoder}, "
                "expected one number for both"
            )
    vocabulary = target = values.integer("vocab_size", least=1)
    if not values.boolean("share_encoder_decoder_embeddings", True):
        target = values.integer("decoder_vocab_size", vocabulary, least=1)
    eos = values.integer("eos_token_id", 0, most=target - 1)
    if generation.get("forced_eos_token_id") not in (None, eos, [eos]):
        generation.fail("forced_eos_token_id", f"the end of sentence ({eos})")
    pad = values.integer("pad_token_id", most=target - 1)
    start = generation.integer("decoder_start_token_id", -1, least=-1, most=target - 1)
    if start < 0:
        start = values.integer("decoder_start_token_id", pad, most=target - 1)
    return {
        "src_vocab_size": vocabulary,
        "tgt_vocab_size": target,
        "d_model": values.integer("d_model", least=1),
        "nhead": values.integer("encoder_attention_heads", least=1),
        "num_encoder_layers": values.integer("encoder_layers"),
        "num_decoder_layers": values.integer("decoder_layers"),
        "dim_feedforward": values.integer("encoder_ffn_dim", least=1),
        "dropout": values.probability("dropout", 0.1),
        "attention_dropout": values.probability("attention_dropout", 0.0),
        "activation_dropout": values.probability("activation_dropout", 0.0),
        "activation": values.activation("activation_function", "gelu"),
        "layer_norm_eps": _NORM_EPS,
        "positions": "sinusoidal_halves",
        "scale_embedding": values.boolean("scale_embedding", False),
        "embedding_norm": values.boolean("normalize_embedding", False),
        "pad_id": pad,
        "eos_id": eos,
        "bos_id": start,
        "decoder_start_id": start,
    }


def _import_tables(
    values: Fields, fields: Mapping[str, Any], found: Checkpoint
) -> tuple[dict[str, np.ndarray], dict[str, Any], list[str]]:
    """Embeddings, output projection and positions; the fields that follow from them; notes."""
    shared, source, target, output = (
        "model.shared.weight",
        "model.encoder.embed_tokens.weight",
        "model.decoder.embed_tokens.weight",
        "lm_head.weight",
    )
    groups = [[source], [target], [output]]
    if values.boolean("tie_word_embeddings", True):
        groups = [[source], [target, output]]
        if values.boolean("share_encoder_decoder_embeddings", True):
            groups = [[shared, target, output, source]]
    table: dict[str, np.ndarray] = {}
    for group in groups:
        # Tied ones stand once, under whichever name; all that stand there count for themselves.
        there = [name for name in group if name in found] or group[:1]
        loaded = {name: found.take(name) for name in there}
        for name in group:
            table[name] = loaded.get(name, loaded[there[0]])
    found.left.discard(shared)
    changes: dict[str, Any] = {"tie": "none"}
    weights = {"source_embedding.weight": table[source]}
    if not np.array_equal(table[target], table[output]):
        weights["generator.weight"] = table[output]
        weights["target_embedding.weight"] = table[target]
    elif np.array_equal(table[source], table[target]):
        changes["tie"] = "all"
    else:
        changes["tie"] = "target"
        weights["target_embedding.weight"] = table[target]
    bias = found.take("final_logits_bias") if "final_logits_bias" in found else np.zeros(1)
    changes["output_bias"] = bool(bias.any())
    if changes["output_bias"]:
        weights["generator.bias"] = bias.reshape(-1)
    positions, notes = _import_positions(fields["d_model"], found)
    if positions:
        weights |= positions
        changes["positions"] = "learned"
        changes["max_positions"] = len(positions["encoder.positions.weight"])
    return weights, changes, notes


def _import_positions(width: int, found: Checkpoint) -> tuple[dict[str, np.ndarray], list[str]]:
    """Tables of positions that are not Marian's sinusoids, where the file has such."""
    stacks = [s for s in ("encoder", "decoder") if f"model.{s}.embed_positions.weight" in found]
    tables = {s: found.take(f"model.{s}.embed_positions.weight") for s in stacks}
    if not tables:
        return {}, []
    for stack, table in tables.items():
        if table.ndim != 2 or table.shape[1] != width:
            raise FileError(
                f"{found.path}: model.{stack}.embed_positions.weight has the shape "
                f"{list(table.shape)}, expected [positions, {width}]"
            )
    rows = max(map(len, tables.values()))
    plain = _sinusoids(rows, width)
    difference = max(float(np.abs(table - plain[: len(table)]).max()) for table in tables.values())
    # Rounded to bfloat16, numbers up to 1 differ by 2^-9; to float16, by less.
    if difference <= (2.0**-9 if found.types != "float32" else 1e-6):
        return {}, ["positions: sinusoids, rounded in the file"] if difference > 1e-6 else []
    for stack in ("encoder", "decoder"):
        tables.setdefault(stack, plain)
    rows = min(map(len, tables.values()))
    return (
        {f"{stack}.positions.weight": table[:rows] for stack, table in tables.items()},
        [f"positions: {rows} rows that the file has, which are not sinusoids"],
    )


def _read_vocabulary(file: Path) -> list[str]:
    """The pieces of a ``vocab.json`` by id."""
    values = read_json(file)
    if not all(isinstance(id, int) for id in values.values()):
        raise FileError(f"{file}: expected an id for each piece")
    pieces = sorted(values, key=lambda piece: int(values[piece]))
    ids = [values[piece] for piece in pieces]
    if ids != list(range(len(ids))):
        wrong = next(i for i, id in enumerate(ids) if id != i)
        raise FileError(
            f"{file}: expected the ids 0 to {len(ids) - 1}, but not exactly one is {wrong}"
        )
    return pieces


def _import_tokenizers(
    path: Path, scratch: Path, config: TransformerConfig
) -> tuple[Tokenizer, Tokenizer]:
    """Their tokenizers as ours; vocabulary files are made in ``scratch``."""
    settings = Fields.read(path / "tokenizer_config.json")
    special = {
        "eos": settings.token("eos_token", "</s>"),
        "unk": settings.token("unk_token", "<unk>"),
        "pad": settings.token("pad_token", "<pad>"),
    }
    names = ["vocab.json", "vocab.json"]
    if settings.get("separate_vocabs"):
        names[1] = "target_vocab.json"
    tokenizers: list[Tokenizer] = []
    for side, model, name in zip(
        ("source", "target"), ("source.spm", "target.spm"), names, strict=True
    ):
        pieces = _read_vocabulary(path / name)
        for kind, token in special.items():
            if token not in pieces:
                raise FileError(f"{path / name}: has no {kind} token {token!r}")
        if side == "target":
            for kind, expected in (("eos", config.eos_id), ("pad", config.pad_id)):
                id = pieces.index(special[kind])
                if id != expected and (kind == "eos" or names[0] == names[1]):
                    raise FileError(
                        f"{path / name}: {special[kind]!r} has the id {id}, but {kind}_token_id "
                        f"in config.json is {expected}"
                    )
        start = pieces[config.decoder_start_id] if config.decoder_start_id < len(pieces) else None
        file = scratch / name
        write_json(file, {"pieces": pieces, **special, "bos": start or special["pad"]})
        try:
            tokenizers.append(SentencePieceTokenizer(path / model, file))
        except TokenizerError as error:
            # The file that a person has, not the one made of it.
            raise FileError(str(error).replace(str(file), str(path / name))) from None
    return tokenizers[0], tokenizers[1]


def _search_options(
    generation: Mapping[str, Any], config: TransformerConfig
) -> tuple[SearchOptions, list[str]]:
    """What ``generate`` would do, and what of it has no counterpart."""
    values = {key: value for key, value in generation.items() if value is not None}
    changes: dict[str, Any] = {"beam_size": values.get("num_beams", 1)}
    notes: list[str] = []
    # Lengths of outputs count the start token, those of new tokens do not.
    for ours, theirs in (("max_length", "max"), ("min_length", "min")):
        if f"{theirs}_new_tokens" in values:
            changes[ours] = values[f"{theirs}_new_tokens"]
        elif f"{theirs}_length" in values:
            changes[ours] = max(values[f"{theirs}_length"] - 1, 1 if theirs == "max" else 0)
    if values.get("length_penalty", 1.0) < 0.0:
        notes.append(f"not taken over: length_penalty {values['length_penalty']}")
    else:
        changes["length_penalty"] = values.get("length_penalty", 1.0)
    rules = {True: "first", False: "heuristic", "never": "exact"}
    changes["early_stopping"] = rules[values.get("early_stopping", False)]
    changes["no_repeat_ngram_size"] = values.get("no_repeat_ngram_size", 0)
    bad = [*values.get("bad_words_ids", []), *([id] for id in values.get("suppress_tokens", []))]
    single = {ids[0] for ids in bad if len(ids) == 1}
    changes["suppressed_tokens"] = tuple(sorted(single - never_proposed(config)))
    if any(len(ids) > 1 for ids in bad):
        notes.append("not taken over: bad_words_ids of more than one token")
    for key, default in (
        ("repetition_penalty", 1.0),
        ("do_sample", False),
        ("num_beam_groups", 1),
        ("forced_bos_token_id", None),
    ):
        if values.get(key, default) != default:
            notes.append(f"not taken over: {key} {values[key]}")
    return SearchOptions.preset("huggingface", **changes), notes


def _changes(options: SearchOptions) -> dict[str, Any]:
    """The options that are not those of the preset."""
    plain = SearchOptions.preset("huggingface")
    names = list(plain.__dataclass_fields__)
    return {n: getattr(options, n) for n in names if getattr(options, n) != getattr(plain, n)}


def _flags(options: SearchOptions) -> str:
    words: list[str] = []
    for name, value in _changes(options).items():
        words.append("--" + name.replace("_", "-"))
        words += (
            map(str, value)
            if isinstance(value, Sequence) and not isinstance(value, str)
            else [str(value)]
        )
    return " ".join(words)


# --- export -------------------------------------------------------------------------------------


def to_marian(
    path: str | Path,
    output: str | Path,
    *,
    overwrite: bool = False,
    zero_start: bool = False,
) -> Conversion:
    """Make a MarianMT directory of a model directory. Needs neither torch nor ``transformers``.

    Token ids change: the end of sentence becomes 0, the unknown token 1, the token that starts a
    translation becomes ``<pad>``, the last. Logits are those of our model in the new order.

    Args:
        path: the model directory.
        output: the MarianMT directory to write, which appears when it is complete.
        overwrite: replace a MarianMT directory that is there.
        zero_start: move the embedding of the start token into the first row of the decoder's
            positions. The logits are the same; ``ct2-transformers-converter`` needs it, because
            CTranslate2 starts every Marian model from an embedding of zeros. ``save_pretrained`` of
            ``transformers`` drops positions, so this is not for models to be trained further.

    Raises:
        HuggingFaceError: the model has something that a MarianMTModel cannot hold; the message names
            the field and what is expected.
        FileError: the model directory cannot be read; the output is in the way.
    """
    path, output = Path(path), Path(output)
    model = load_model_dir(path)
    config = model.config
    _check_exportable(path, config)
    order = _Order.of(model)
    tensors = _export_weights(model, order)
    start = order.start
    scale = math.sqrt(config.d_model) if config.scale_embedding else 1.0
    # An embedding of its own for each use, where they must differ.
    table = tensors.get("model.decoder.embed_tokens.weight", tensors.get("model.shared.weight"))
    assert table is not None
    moved = zero_start and bool(table[start].any())
    if moved:
        positions = tensors.setdefault(
            "model.decoder.embed_positions.weight", _sinusoids(_positions(model), config.d_model)
        )
        positions[0] += np.float32(scale) * table[start]
        shared = tensors.pop("model.shared.weight", None)
        if shared is not None:
            tensors["model.encoder.embed_tokens.weight"] = shared
        tensors.setdefault("lm_head.weight", table)
        tensors["model.decoder.embed_tokens.weight"] = table.copy()
        tensors["model.decoder.embed_tokens.weight"][start] = 0.0
    with output_folder(output, path, overwrite) as folder:
        save_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
        write_json(folder / "config.json", _export_config(model, order, set(tensors)))
        write_json(folder / "generation_config.json", _generation(model, order))
        _export_tokenizers(model, order, folder)
    messages = [
        f"{path}: post-norm Transformer, weights in float32",
        *_sizes(config),
        f"special ids: end of sentence {config.eos_id} -> 0, unknown {config.unk_id} -> 1, start "
        f"{config.decoder_start_id} -> {start}, which is <pad>",
    ]
    if config.positions == "sinusoidal":
        messages.append("positions: interleaved sinusoids -> halves, by the order of the columns")
    if moved:
        messages.append(
            "start: its embedding is in the decoder's positions, as CTranslate2 needs it; "
            "save_pretrained drops these"
        )
    elif bool(table[start].any()):
        messages.append(
            "start: its embedding is not zero; for ct2-transformers-converter export with "
            "--zero-start"
        )
    if any(name.endswith("embed_positions.weight") for name in tensors) and not moved:
        messages.append("positions: stored with the weights; save_pretrained drops them")
    messages.append(f"written to {output}")
    return Conversion(output, config, messages)


def _check_exportable(path: Path, config: TransformerConfig) -> None:
    norm = config.norm_first, config.final_norm
    expected = {
        "norm_first": (not norm[0], "false (post-norm); train with --no-norm-first"),
        "final_norm": (not norm[1], "false"),
        "norm": (config.norm == "layer", "'layer'"),
        "layer_norm_eps": (config.layer_norm_eps == _NORM_EPS, f"{_NORM_EPS}"),
        "embedding_norm": (not config.embedding_norm, "false"),
        "activation": (config.activation in THEIR_ACTIVATIONS, ", ".join(THEIR_ACTIVATIONS)),
        "positions": (
            config.positions in ("sinusoidal", "sinusoidal_halves", "learned"),
            "sinusoidal, sinusoidal_halves or learned",
        ),
        "head_dim": (
            config.head_dim * config.nhead == config.d_model,
            f"d_model / nhead ({config.d_model / config.nhead:g})",
        ),
    }
    for name, (holds, what) in expected.items():
        if not holds:
            got = json.dumps(getattr(config, name)) if name != "positions" else config.positions
            raise HuggingFaceError(
                f"{path}: {name}: got {got}, but a MarianMTModel is a post-norm Transformer: "
                f"expected {what}"
            )


def _positions(model: ModelDir[TransformerConfig]) -> int:
    """Rows of the position tables."""
    if model.config.positions == "learned":
        return model.config.max_positions
    longest = model.training.get("max_train_length")
    return max(_POSITIONS, longest if isinstance(longest, int) else 0)


@dataclass(frozen=True)
class _Order:
    """Which of our ids is which of theirs.

    Attributes:
        source: our source ids by theirs.
        target: our target ids by theirs.
        start: their id of the start token, which is their padding too.
        shared: whether both sides have one vocabulary.
    """

    source: list[int]
    target: list[int]
    start: int
    shared: bool

    @classmethod
    def of(cls, model: ModelDir[TransformerConfig]) -> _Order:
        config = model.config
        sizes = config.src_vocab_size, config.tgt_vocab_size
        same = model.source_tokenizer.sha256 == model.target_tokenizer.sha256
        shared = same and sizes[0] == sizes[1]
        # Both tables must have the row of the one padding id.
        start = min(sizes) - 1
        target = _order(sizes[1], config.eos_id, config.unk_id, config.decoder_start_id, start)
        if shared:
            return cls(target, target, start, True)
        source_tokenizer = model.source_tokenizer
        source = _order(
            sizes[0],
            source_tokenizer.eos_id,
            source_tokenizer.unk_id,
            source_tokenizer.pad_id,
            start,
        )
        if config.tie == "all" and source != target:
            raise HuggingFaceError(
                f"{model.path}: tie: got 'all' with tokenizers whose special ids differ; expected "
                "one tokenizer, or 'target' or 'none'"
            )
        return cls(source, target, start, False)


def _order(rows: int, eos: int, unk: int, last: int, position: int) -> list[int]:
    rest = [id for id in range(rows) if id not in (eos, unk, last)]
    ids = [eos, unk, *rest]
    ids.insert(position, last)
    if len(set(ids)) != rows:
        raise HuggingFaceError(
            f"eos_id, unk_id and decoder_start_id: got {eos}, {unk} and {last}, expected three "
            "different ids"
        )
    return ids


def _export_weights(model: ModelDir[TransformerConfig], order: _Order) -> dict[str, np.ndarray]:
    """Weights by their names."""
    config = model.config
    width = config.d_model
    # Where our sine and cosine of a frequency are neighbours, theirs are half the width apart.
    columns = np.arange(width)
    if config.positions == "sinusoidal":
        columns = np.concatenate([columns[0::2], columns[1::2]])
    source, target, output = (model.weights[name][:, columns] for name in _embedding_names(config))
    source, target, output = source[order.source], target[order.target], output[order.target]
    tensors: dict[str, np.ndarray] = {}
    if config.tie == "all":
        tensors["model.shared.weight"] = source
    else:
        tensors["model.encoder.embed_tokens.weight"] = source
        tensors["model.decoder.embed_tokens.weight"] = target
        if config.tie == "none":
            tensors["lm_head.weight"] = output
    bias = np.zeros(config.tgt_vocab_size, np.float32)
    if config.output_bias:
        bias = model.weights["generator.bias"][order.target]
    tensors["final_logits_bias"] = bias[None]
    if config.positions == "learned":
        for stack in ("encoder", "decoder"):
            name = f"{stack}.positions.weight"
            tensors[f"model.{stack}.embed_positions.weight"] = model.weights[name]
    for ours, theirs in _layer_names(config):
        weight = model.weights[f"{ours}.weight"]
        norm = weight.ndim == 1
        if norm or config.bias:
            bias = model.weights[f"{ours}.bias"]
        else:
            bias = np.zeros(len(weight), np.float32)
        # In: the columns are the model's width; out: the rows are.
        if norm or ours.endswith("out_projection"):
            weight, bias = weight[columns], bias[columns]
        else:
            weight = weight[:, columns]
        if len(theirs) > 1:
            weights, biases = (
                split_heads(config, weight, len(theirs)),
                split_heads(config, bias, len(theirs)),
            )
        else:
            weights, biases = [weight], [bias]
        for name, w, b in zip(theirs, weights, biases, strict=True):
            tensors[f"{name}.weight"], tensors[f"{name}.bias"] = w, b
    return tensors


def _export_config(
    model: ModelDir[TransformerConfig], order: _Order, names: set[str]
) -> dict[str, Any]:
    config = model.config
    values: dict[str, Any] = {
        "architectures": ["MarianMTModel"],
        "model_type": "marian",
        "is_encoder_decoder": True,
        "vocab_size": config.src_vocab_size,
        "decoder_vocab_size": config.tgt_vocab_size,
        "d_model": config.d_model,
        "max_position_embeddings": _positions(model),
        "activation_function": THEIR_ACTIVATIONS[config.activation],
        "dropout": config.dropout,
        "attention_dropout": config.attention_dropout,
        "activation_dropout": config.activation_dropout,
        "scale_embedding": config.scale_embedding,
        "share_encoder_decoder_embeddings": "model.shared.weight" in names,
        "tie_word_embeddings": "lm_head.weight" not in names,
        "static_position_embeddings": True,
        "normalize_before": False,
        "normalize_embedding": False,
        "add_final_layer_norm": False,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": order.start,
        "decoder_start_token_id": order.start,
        "forced_eos_token_id": None,
        "torch_dtype": "float32",
    }
    for side, depth in (
        ("encoder", config.num_encoder_layers),
        ("decoder", config.num_decoder_layers),
    ):
        values[f"{side}_layers"] = depth
        values[f"{side}_attention_heads"] = config.nhead
        values[f"{side}_ffn_dim"] = config.dim_feedforward
    return values


def _generation(model: ModelDir[TransformerConfig], order: _Order) -> dict[str, Any]:
    never = sorted(order.target.index(id) for id in never_proposed(model.config))
    return {
        "decoder_start_token_id": order.start,
        "pad_token_id": order.start,
        "eos_token_id": 0,
        # What our search does at the longest length: nothing.
        "forced_eos_token_id": None,
        "bad_words_ids": [[id] for id in never],
        "num_beams": 4,
        "max_length": min(512, _positions(model)),
    }


def _export_tokenizers(model: ModelDir[TransformerConfig], order: _Order, folder: Path) -> None:
    source, target = model.source_tokenizer, model.target_tokenizer
    for tokenizer in (source, target):
        if not isinstance(tokenizer, SentencePieceTokenizer):
            raise HuggingFaceError(
                f"{tokenizer.path}: not a SentencePiece model, which is what a MarianMT has"
            )
    vocabularies = {"vocab.json": _pieces(source, order.source, order.start)}
    if not order.shared:
        vocabularies["target_vocab.json"] = _pieces(target, order.target, order.start)
        if vocabularies["vocab.json"] == vocabularies["target_vocab.json"]:
            del vocabularies["target_vocab.json"]
    for name, pieces in vocabularies.items():
        write_json(folder / name, {piece: id for id, piece in enumerate(pieces)})
    for name, tokenizer in (("source.spm", source), ("target.spm", target)):
        (folder / name).write_bytes(tokenizer.path.read_bytes())
    pieces = vocabularies["vocab.json"]
    settings: dict[str, Any] = {
        "tokenizer_class": "MarianTokenizer",
        "eos_token": pieces[0],
        "unk_token": pieces[1],
        "pad_token": pieces[order.start],
        "model_max_length": _positions(model),
    }
    if "target_vocab.json" in vocabularies:
        if vocabularies["target_vocab.json"][:2] != pieces[:2]:
            raise HuggingFaceError(
                f"{model.path}: the tokenizers name their special pieces differently"
            )
        settings["separate_vocabs"] = True
    write_json(folder / "tokenizer_config.json", settings)


def _pieces(tokenizer: Tokenizer, order: Sequence[int], start: int) -> list[str]:
    """Their names of all ids; an id that no text has gets one that no text has."""
    names: list[str] = []
    for number, id in enumerate(order):
        name = tokenizer.piece(id) if id < tokenizer.vocab_size else None
        if number == start:
            name = "<pad>"
        elif name is None or id == tokenizer.pad_id or name == "<pad>":
            name = f"<unused {number}>"
        names.append(name)
    return names
