"""MarianMT directories with random weights."""

from __future__ import annotations

import io
import json

import sentencepiece

ENGLISH = [
    "Click the button to open the dialog.",
    "Open the file and save the table.",
    "The dialog has a button to close the file.",
    "Save the table before you close it.",
]
GERMAN = [
    "Klicken Sie auf die Schaltfläche, um den Dialog zu öffnen.",
    "Öffnen Sie die Datei und speichern Sie die Tabelle.",
    "Der Dialog hat eine Schaltfläche zum Schließen der Datei.",
    "Speichern Sie die Tabelle, bevor Sie sie schließen.",
]


def sentencepiece_model(sentences, vocab_size=60):
    """As Marian's are: unknown, start and end first, no padding, no bytes for what is unknown."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return model.getvalue()


def pieces_of(model):
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    return [processor.id_to_piece(i) for i in range(processor.get_piece_size())]


def write_tokenizers(folder, separate=False):
    """source.spm, target.spm and vocabularies; returns the sizes of these."""
    models = [sentencepiece_model(ENGLISH), sentencepiece_model(GERMAN, 70)]
    (folder / "source.spm").write_bytes(models[0])
    (folder / "target.spm").write_bytes(models[1])
    special = ["</s>", "<unk>"]
    sides = [[piece for piece in pieces_of(m) if piece not in ("<s>", *special)] for m in models]
    if not separate:
        both = sorted({*sides[0], *sides[1]})
        sides = [[*both, ">>de<<", ">>fr<<"]] * 2
    # One id of padding for both.
    pad = min(map(len, sides)) + 2
    found = []
    for name, side in zip(("vocab.json", "target_vocab.json"), sides, strict=True):
        pieces = [*special, *side]
        pieces.insert(pad, "<pad>")
        if name == "vocab.json" or separate:
            values = {piece: id for id, piece in enumerate(pieces)}
            (folder / name).write_text(json.dumps(values), encoding="utf-8")
        found.append(len(pieces))
    settings = {"separate_vocabs": separate, "tokenizer_class": "MarianTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return found, pad


def write_marian_dir(folder, seed=1, separate=False, scale=0.3, **changes):
    """A MarianMT directory with random weights, biases and norms too; returns its model."""
    import torch
    import transformers

    folder.mkdir(parents=True)
    (source, target), pad = write_tokenizers(folder, separate)
    fields = dict(
        vocab_size=source,
        decoder_vocab_size=target,
        d_model=16,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        activation_function="swish",
        scale_embedding=True,
        max_position_embeddings=64,
        pad_token_id=pad,
        eos_token_id=0,
        forced_eos_token_id=0,
        decoder_start_token_id=pad,
        share_encoder_decoder_embeddings=not separate,
    )
    config = transformers.MarianConfig(**{**fields, **changes})
    torch.manual_seed(seed)
    model = transformers.MarianMTModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, scale)
        model.final_logits_bias.normal_()
    model.save_pretrained(folder)
    return model
