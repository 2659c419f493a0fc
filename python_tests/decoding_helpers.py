"""A small random model on disk, with a tokenizer of its own, for the tests of decoding."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

import numpy as np

from transformer_ext.data.tokenizer import SentencePieceTokenizer, train_tokenizer
from transformer_ext.files import parameter_shapes, save_model_dir
from transformer_ext.inference.engine import Engine
from transformer_ext.model.config import TransformerConfig

SENTENCES = [
    "Click the button to open the dialog.",
    "Open the file and save the table.",
    "The dialog has a button to close the file.",
    "Save the table before you close it.",
    "Klicken Sie auf die Schaltfläche, um den Dialog zu öffnen.",
    "Öffnen Sie die Datei und speichern Sie die Tabelle.",
]


@contextlib.contextmanager
def ctrl_c(seconds: float = 0.2) -> Iterator[None]:
    """SIGINT comes so long after the block begins, if it is still at work then."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(seconds, signal.raise_signal, (signal.SIGINT,))
    try:
        timer.start()
        yield
    finally:
        timer.cancel()
        timer.join()
        signal.signal(signal.SIGINT, before)


def save_random_model(folder, *, max_train_length=40, seed=5, sentences=SENTENCES, **changes):
    """Make `folder` a model directory; returns it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    tokenizer_file = folder.parent / "trained.model"
    tokenizer_file.write_bytes(train_tokenizer(sentences, vocab_size=330)[0])
    tokenizer = SentencePieceTokenizer(tokenizer_file)
    fields = dict(
        src_vocab_size=tokenizer.vocab_size,
        tgt_vocab_size=tokenizer.vocab_size,
        d_model=32,
        nhead=4,
        num_encoder_layers=1,
        num_decoder_layers=1,
        dim_feedforward=40,
        # Tied, a random model repeats the token that it is given.
        tie="none",
    )
    config = TransformerConfig(**{**fields, **changes})
    generator = np.random.default_rng(seed)
    weights = {
        name: (generator.normal(size=shape) * (1.0 if len(shape) == 1 else 0.3)).astype(np.float32)
        for name, shape in parameter_shapes(config).items()
    }
    save_model_dir(
        folder, config, weights, tokenizer, tokenizer, {"max_train_length": max_train_length}
    )
    return folder


def random_engine(vocabulary, threads=1, scale=1.0, seed=7, compute_type="float32", **changes):
    """An engine with random weights, so small that a search takes a millisecond."""
    fields = dict(
        src_vocab_size=vocabulary,
        tgt_vocab_size=vocabulary,
        d_model=16,
        nhead=2,
        num_encoder_layers=1,
        num_decoder_layers=2,
        dim_feedforward=24,
        tie="none",
    )
    config = TransformerConfig(**{**fields, **changes})
    generator = np.random.default_rng(seed)
    weights = {
        name: (generator.normal(size=shape) * scale * (1.0 if len(shape) == 1 else 0.4)).astype(
            np.float32
        )
        for name, shape in parameter_shapes(config).items()
    }
    return Engine(config, weights, threads=threads, compute_type=compute_type)
