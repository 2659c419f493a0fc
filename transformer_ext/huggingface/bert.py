"""BERT (Devlin et al. 2019): ``BertModel`` and its heads for masked tokens and for labels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformer_ext.data.tokenizer import Tokenizer
from transformer_ext.files import ModelDir, save_tensors, write_json
from transformer_ext.huggingface.architecture import (
    LEAST_EPS,
    Imported,
    check_common,
    check_depth,
    check_exportable,
    check_tokenizer,
    joined,
    unused_keys,
)
from transformer_ext.huggingface.checkpoint import Checkpoint, Parts
from transformer_ext.huggingface.conversion import split_heads
from transformer_ext.huggingface.fields import THEIR_ACTIVATIONS, Fields, HuggingFaceError
from transformer_ext.huggingface.pooling import MODULES_FILE, SentenceModules, write_modules
from transformer_ext.model.config import TextEncoderConfig

if TYPE_CHECKING:
    import numpy as np

_ARCHITECTURES = (
    "BertModel",
    "BertForPreTraining",
    "BertForMaskedLM",
    "BertForSequenceClassification",
)
_KEYS = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("intermediate_size", "hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob"),
    *("max_position_embeddings", "type_vocab_size", "layer_norm_eps", "classifier_dropout"),
    *("position_embedding_type", "pooler_fc_size", "pooler_num_attention_heads"),
    *("pooler_num_fc_layers", "pooler_size_per_head", "pooler_type"),
)
#: Beginnings of names, and what such tensors are of.
_FOREIGN = {
    "qa_outputs.": "a head for question answering",
    "crossattention.": "a decoder",
    "classifier.": "a head for tokens or choices",
    "cls.": "a head of another kind",
}


def _layer_names(depth: int) -> dict[str, list[str]]:
    """Our name of each module in the layers, and theirs: several where ours is their rows joined."""
    names: dict[str, list[str]] = {}
    for index in range(depth):
        ours, theirs = f"encoder.layers.{index}", f"encoder.layer.{index}"
        heads = [f"{theirs}.attention.self.{name}" for name in ("query", "key", "value")]
        names[f"{ours}.self_attention.in_projection"] = heads
        names[f"{ours}.self_attention.out_projection"] = [f"{theirs}.attention.output.dense"]
        names[f"{ours}.self_attention_norm"] = [f"{theirs}.attention.output.LayerNorm"]
        names[f"{ours}.feed_forward.in_projection"] = [f"{theirs}.intermediate.dense"]
        names[f"{ours}.feed_forward.out_projection"] = [f"{theirs}.output.dense"]
        names[f"{ours}.feed_forward_norm"] = [f"{theirs}.output.LayerNorm"]
    return names


#: Our modules outside the layers, and theirs.
_HEADS = {
    "encoder.embedding_norm": ["embeddings.LayerNorm"],
    "pooler": ["pooler.dense"],
    "generator": ["classifier"],
    "masked_lm_head.projection": ["cls.predictions.transform.dense"],
    "masked_lm_head.norm": ["cls.predictions.transform.LayerNorm"],
}
_TABLES = {
    "embedding.weight": "embeddings.word_embeddings.weight",
    "encoder.positions.weight": "embeddings.position_embeddings.weight",
    "encoder.token_types.weight": "embeddings.token_type_embeddings.weight",
    "masked_lm_head.bias": "cls.predictions.bias",
}


# --- import -------------------------------------------------------------------------------------


def import_bert(
    fields: Fields, found: Checkpoint, tokenizer: Tokenizer, modules: SentenceModules | None
) -> Imported[TextEncoderConfig]:
    """Architecture and weights of a BERT.

    Args:
        fields: of its config.json.
        found: its tensors.
        tokenizer: its tokenizer.
        modules: of the folder, where it is of sentence-transformers.

    Raises:
        HuggingFaceError: it has something that ours cannot hold.
        FileError: weights that do not fit.
    """
    architecture = check_common(fields, _ARCHITECTURES, _KEYS)
    fields.only("position_embedding_type", "absolute", "positions are learned")
    notes = unused_keys(fields, _KEYS)
    names = {}
    for name in found.shapes:
        ours = name.removeprefix("bert.")
        # Of checkpoints that came from TensorFlow.
        for old, new in (
            ("LayerNorm.gamma", "LayerNorm.weight"),
            ("LayerNorm.beta", "LayerNorm.bias"),
        ):
            if ours.endswith(old):
                ours = ours.removesuffix(old) + new
        names[name] = ours
    found.rename(names)
    masked = "cls.predictions.transform.dense.weight" in found
    masked = masked or architecture in ("BertForMaskedLM", "BertForPreTraining")
    classifier = "classifier.weight" in found or architecture == "BertForSequenceClassification"
    pooler = classifier or "pooler.dense.weight" in found
    if modules is not None:
        if classifier:
            raise HuggingFaceError(
                f"{fields.path}: a classifier, but {MODULES_FILE} makes vectors of texts: expected "
                "one of them"
            )
        pooler = False
        if "pooler.dense.weight" in found:
            found.ignore("pooler.dense.weight")
            found.ignore("pooler.dense.bias")
            notes.append("left out: the pooler, which sentence-transformers does not use")
    width = fields.integer("hidden_size", 768, least=1)
    heads = fields.integer("num_attention_heads", 12, least=1)
    if width % heads:
        fields.fail("num_attention_heads", f"a divisor of hidden_size ({width})")
    vocabulary = fields.integer("vocab_size", 30522, least=1)
    check_tokenizer(fields, vocabulary, tokenizer, tokenizer.path)
    dropout = fields.probability("hidden_dropout_prob", 0.1)
    labels = _labels(fields) if classifier else []
    if labels and fields.probability("classifier_dropout", dropout) != dropout:
        notes.append("not used: classifier_dropout; in training it is hidden_dropout_prob")
    config = TextEncoderConfig(
        vocab_size=vocabulary,
        num_layers=check_depth(fields, "num_hidden_layers", 12, found),
        d_model=width,
        nhead=heads,
        dim_feedforward=fields.integer("intermediate_size", 3072, least=1),
        dropout=dropout,
        attention_dropout=fields.probability("attention_probs_dropout_prob", 0.1),
        activation_dropout=0.0,
        activation=fields.activation("hidden_act", "gelu"),
        layer_norm_eps=fields.number("layer_norm_eps", 1e-12, least=LEAST_EPS, below=1.0),
        positions="learned",
        max_positions=fields.integer("max_position_embeddings", 512, least=1),
        num_token_types=fields.integer("type_vocab_size", 2, least=1),
        scale_embedding=False,
        embedding_norm=True,
        output_bias=True,
        pooling="first" if modules is None else modules.pooling,
        pooler=pooler,
        normalize=modules is not None and modules.normalize,
        labels=labels,
        masked_lm_head=masked,
        pad_id=tokenizer.pad_id,
        unk_id=tokenizer.unk_id,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
    )
    parts = joined({**_layer_names(config.num_layers), **_HEADS})
    parts |= {ours: Parts((theirs,)) for ours, theirs in _TABLES.items()}
    if masked:
        parts["masked_lm_head.bias"] = _check_decoder(fields, found)
    notes += _ignore(found)
    return Imported(config, parts, architecture or "BertModel", notes, _FOREIGN)


def _labels(fields: Fields) -> list[str]:
    """Names of the classes."""
    kind = fields.get("problem_type")
    if kind not in (None, "single_label_classification"):
        fields.fail("problem_type", "'single_label_classification' or null: a text has one label")
    if "id2label" not in fields:
        return [f"LABEL_{i}" for i in range(fields.integer("num_labels", 2, least=2, most=10**6))]
    values = fields.get("id2label")
    if not isinstance(values, dict) or len(values) < 2:
        fields.fail("id2label", "the names of two labels or more, by id")
    labels = [values.get(str(id)) for id in range(len(values))]
    if not all(isinstance(label, str) for label in labels) or len(set(labels)) < len(labels):
        fields.fail("id2label", f"another name for each id from 0 to {len(labels) - 1}")
    return [str(label) for label in labels]


def _check_decoder(fields: Fields, found: Checkpoint) -> Parts:
    """Where the output projection of the masked-token head is not the embedding: an error."""
    weight, bias = "cls.predictions.decoder.weight", "cls.predictions.decoder.bias"
    table = _TABLES["embedding.weight"]
    if weight in found:
        found.claim(weight)
        if table in found and found.shapes[table] == found.shapes[weight]:
            if found.equal(weight, table):
                weight = ""
        if weight:
            raise HuggingFaceError(
                f"{found.file_of(weight)}: {found.their_name(weight)}: differs from "
                f"{found.their_name(table)}, expected the embedding as output projection"
            )
    elif not fields.boolean("tie_word_embeddings", True):
        fields.fail("tie_word_embeddings", "true: the embedding is the output projection")
    name = _TABLES["masked_lm_head.bias"]
    if bias in found:
        # They are one weight. Where they differ, this is what transformers adds.
        if name in found:
            found.ignore(name)
        name = bias
    return Parts((name,))


def _ignore(found: Checkpoint) -> list[str]:
    """Tensors that are no weights, and the head that nobody uses."""
    notes = []
    for name in ("embeddings.position_ids", "embeddings.token_type_ids"):
        found.ignore(name)
    for name in ("cls.seq_relationship.weight", "cls.seq_relationship.bias"):
        if name in found:
            found.ignore(name)
            notes = ["left out: the head that tells whether two sentences follow each other"]
    return notes


# --- export -------------------------------------------------------------------------------------


def export_bert(model: ModelDir[TextEncoderConfig], folder: Path) -> list[str]:
    """Write weights and configuration of a text encoder as a BERT; returns notes.

    Raises:
        HuggingFaceError: the model has something that a BERT cannot hold.
    """
    config = model.config
    _check_exportable(model.path, config)
    save_tensors(folder / "model.safetensors", _export_weights(model), {"format": "pt"})
    write_json(folder / "config.json", _export_config(config))
    pools = config.pooling != "first" or config.normalize
    if pools or not (config.pooler or config.labels or config.masked_lm_head):
        longest = model.training.get("max_seq_length", config.max_positions)
        write_modules(folder, config.d_model, config.pooling, config.normalize, longest)
        return ["modules of sentence-transformers: the vector of a text is as here"]
    return []


def _architecture(config: TextEncoderConfig) -> str:
    if config.labels:
        return "BertForSequenceClassification"
    return "BertForMaskedLM" if config.masked_lm_head else "BertModel"


def _check_exportable(path: Path, config: TextEncoderConfig) -> None:
    plain = not config.labels
    if config.labels and (not config.pooler or config.pooling != "first"):
        raise HuggingFaceError(
            f"{path}: pooling, pooler: got {config.pooling}, {str(config.pooler).lower()}, but a "
            "BERT's labels are read from the first token through its pooler: expected first, true "
            "(train with --pooling first --pooler)"
        )
    expected = {
        "norm_first": (not config.norm_first, "false (post-norm)"),
        "final_norm": (not config.final_norm, "false"),
        "norm": (config.norm == "layer", "layer"),
        "embedding_norm": (config.embedding_norm, "true"),
        "positions": (config.positions == "learned", "learned"),
        "scale_embedding": (not config.scale_embedding, "false"),
        "activation": (config.activation in THEIR_ACTIVATIONS, ", ".join(THEIR_ACTIVATIONS)),
        "head_dim": (
            config.head_dim * config.nhead == config.d_model,
            f"d_model / nhead ({config.d_model / config.nhead:g})",
        ),
        "normalize": (not config.normalize or plain, "false with labels"),
        "masked_lm_head": (not config.masked_lm_head or plain, "false with labels"),
        "labels": (len(config.labels) != 1, "none, or two or more"),
    }
    check_exportable(path, config, "a BERT is a post-norm encoder", expected)
    if config.pooler and (config.pooling != "first" or config.normalize):
        raise HuggingFaceError(
            f"{path}: pooler: got true with pooling {config.pooling} and normalize "
            f"{str(config.normalize).lower()}, but sentence-transformers pools without it: "
            "expected false"
        )


def _export_weights(model: ModelDir[TextEncoderConfig]) -> dict[str, np.ndarray]:
    """Weights by their names."""
    import numpy as np

    config = model.config
    # What has a head has the encoder under a name.
    prefix = "" if _architecture(config) == "BertModel" else "bert."
    tensors: dict[str, np.ndarray] = {}

    def put(name: str, value: np.ndarray) -> None:
        outside = name.startswith(("cls.", "classifier."))
        tensors[name if outside else prefix + name] = value

    weights = model.weights
    for ours, theirs in _TABLES.items():
        if ours in weights:
            put(theirs, weights[ours])
    if not config.num_token_types:
        put(_TABLES["encoder.token_types.weight"], np.zeros((1, config.d_model), np.float32))
    for ours, names in {**_layer_names(config.num_layers), **_HEADS}.items():
        if f"{ours}.weight" not in weights:
            continue
        weight = weights[f"{ours}.weight"]
        if f"{ours}.bias" in weights:
            bias = weights[f"{ours}.bias"]
        else:
            bias = np.zeros(len(weight), np.float32)
        split = (
            [split_heads(config, rows, 3) for rows in (weight, bias)]
            if len(names) > 1
            else [[weight], [bias]]
        )
        for name, w, b in zip(names, *split, strict=True):
            put(f"{name}.weight", w)
            put(f"{name}.bias", b)
    return tensors


def _export_config(config: TextEncoderConfig) -> dict[str, Any]:
    values: dict[str, Any] = {
        "architectures": [_architecture(config)],
        "model_type": "bert",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.nhead,
        "intermediate_size": config.dim_feedforward,
        "hidden_act": THEIR_ACTIVATIONS[config.activation],
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "max_position_embeddings": config.max_positions,
        "type_vocab_size": max(1, config.num_token_types),
        "layer_norm_eps": config.layer_norm_eps,
        "position_embedding_type": "absolute",
        "pad_token_id": config.pad_id,
        "dtype": "float32",
    }
    if config.labels:
        values["id2label"] = {str(id): label for id, label in enumerate(config.labels)}
        values["label2id"] = {label: id for id, label in enumerate(config.labels)}
        values["problem_type"] = "single_label_classification"
    return values
