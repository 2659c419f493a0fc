"""What a difference between two searches is worth: scores in float64."""

from __future__ import annotations

import numpy as np

from transformer_ext.files import load_model_dir
from transformer_ext.inference.options import SearchOptions


def model_in_float64(model_dir):
    """The torch model of a model directory."""
    import torch

    from transformer_ext.model.transformer import Transformer

    model = load_model_dir(model_dir)
    made = Transformer(model.config).eval()
    weights = {name: torch.from_numpy(np.array(value)) for name, value in model.weights.items()}
    missing, unexpected = made.load_state_dict(weights, strict=False)
    # Of tied ones the file has the first.
    assert not unexpected and all("embedding" in name or "generator" in name for name in missing)
    return made.double()


def score_in_float64(model, source, hypothesis, ended, options, absent=()):
    """Score of a hypothesis by our torch model in float64, as the options have it.

    Args:
        model: a Transformer, moved to float64.
        source: ids, end of sentence included.
        hypothesis: ids without it.
        ended: whether the hypothesis ends there.
        options: for the length penalty.
        absent: ids that are no part of the vocabulary.
    """
    import torch

    labels = [*hypothesis, model.config.eos_id] if ended else list(hypothesis)
    target = [model.config.decoder_start_id, *labels[:-1]]
    with torch.no_grad():
        logits = model.logits(torch.tensor([source]), torch.tensor([target]))[0]
    assert logits.dtype == torch.float64
    logits[:, list(absent)] = -torch.inf
    log_probs = torch.log_softmax(logits, -1)[torch.arange(len(labels)), torch.tensor(labels)]
    return float(log_probs.sum()) / options.penalty(len(hypothesis), ended)


def differences(model_dir, sources, ours, theirs, options: SearchOptions):
    """Where two searches found different hypotheses, and by how much these differ in float64.

    Args:
        model_dir: of the model that both searched with.
        sources: ids of each sentence.
        ours, theirs: for each sentence, ids of the hypothesis, and whether it ended.
        options: the rules of both.

    Returns:
        (number of the sentence, score of ours minus score of theirs) of each that differs.
    """
    model = model_in_float64(model_dir)
    found = []
    for number, (source, mine, other) in enumerate(zip(sources, ours, theirs, strict=True)):
        if (list(mine[0]), mine[1]) != (list(other[0]), other[1]):
            scores = [score_in_float64(model, source, *h, options) for h in (mine, other)]
            found.append((number, scores[0] - scores[1]))
    return found
