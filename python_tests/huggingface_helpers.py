"""Directories of BERT and GPT-2 with random weights, as transformers saves them."""

from __future__ import annotations

import json

TEXTS = [
    "Click the button to open the dialog.",
    "Open the file and save the table before you close it.",
    "the Dialog has a button",
    "Save!",
    "unknown: \u2603 stuff, twice [MASK] here",
]
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] the a an open file and save table before you close it click"
WORDS += " button to dialog has un ##known ##s stuff , . ! : twice here"
END = "<|endoftext|>"


def write_bert_tokenizer(folder):
    """vocab.txt; returns the number of tokens."""
    words = WORDS.split()
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(words)


def write_gpt2_tokenizer(folder):
    """vocab.json and merges.txt of bytes and a few merges; returns the number of tokens."""
    from tokenizers.pre_tokenizers import ByteLevel

    pieces = [*sorted(ByteLevel.alphabet())]
    merges = []
    for merge in ("t h", "th e", "Ġ the", "o p", "op e", "ope n", "s a", "i l", "Ġ t", "l e"):
        merges.append(merge)
        pieces.append(merge.replace(" ", ""))
    pieces.append(END)
    vocabulary = {piece: id for id, piece in enumerate(pieces)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    return len(pieces)


def _randomize(model, seed):
    import torch

    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.3)
    return model.eval()


def write_bert_dir(folder, head="BertModel", seed=1, **changes):
    """A directory of BERT; returns its model, with random biases and norms too."""
    import transformers

    folder.mkdir(parents=True)
    size = write_bert_tokenizer(folder)
    fields = dict(
        vocab_size=size + 3,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        max_position_embeddings=32,
        hidden_act="gelu",
    )
    config = transformers.BertConfig(**{**fields, **changes})
    model = _randomize(getattr(transformers, head)(config), seed)
    model.save_pretrained(folder)
    return model


def write_gpt2_dir(folder, head="GPT2LMHeadModel", seed=1, **changes):
    """A directory of GPT-2; returns its model, with random biases and norms too."""
    import transformers

    folder.mkdir(parents=True)
    size = write_gpt2_tokenizer(folder)
    fields = dict(
        vocab_size=size + 2,
        n_embd=24,
        n_layer=2,
        n_head=3,
        n_positions=48,
        bos_token_id=size - 1,
        eos_token_id=size - 1,
    )
    config = transformers.GPT2Config(**{**fields, **changes})
    model = _randomize(getattr(transformers, head)(config), seed)
    model.save_pretrained(folder)
    return model
