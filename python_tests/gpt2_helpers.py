"""GPT-2 of transformers with random weights, and the same weights as ours."""

from __future__ import annotations

import numpy as np
import torch

from transformer_ext.model.config import LanguageModelConfig

#: Ours, theirs.
_PROJECTIONS = (
    ("self_attention.in_projection", "attn.c_attn"),
    ("self_attention.out_projection", "attn.c_proj"),
    ("feed_forward.in_projection", "mlp.c_fc"),
    ("feed_forward.out_projection", "mlp.c_proj"),
)
_NORMS = (("self_attention_norm", "ln_1"), ("feed_forward_norm", "ln_2"))


def random_gpt2(transformers, seed=0, spread=0.4, **changes):
    """A small ``GPT2LMHeadModel`` whose distributions have peaks, so that ties are rare."""
    fields = dict(vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    fields.update(eos_token_id=96, bos_token_id=96, initializer_range=spread)
    torch.manual_seed(seed)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**fields, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.2)
    return model


def ours(model):
    """Configuration and weights."""
    theirs = model.config
    config = LanguageModelConfig(
        vocab_size=theirs.vocab_size,
        num_layers=theirs.n_layer,
        d_model=theirs.n_embd,
        nhead=theirs.n_head,
        dim_feedforward=theirs.n_inner or 4 * theirs.n_embd,
        activation="gelu_tanh",
        norm_first=True,
        positions="learned",
        max_positions=theirs.n_positions,
        scale_embedding=False,
        layer_norm_eps=theirs.layer_norm_epsilon,
        prepend_bos=False,
        **{f"{name}_id": theirs.eos_token_id for name in ("pad", "unk", "bos", "eos")},
    )
    found = {
        name: tensor.detach().numpy() for name, tensor in model.transformer.state_dict().items()
    }
    weights = {
        "embedding.weight": found["wte.weight"],
        "decoder.positions.weight": found["wpe.weight"],
        "decoder.norm.weight": found["ln_f.weight"],
        "decoder.norm.bias": found["ln_f.bias"],
    }
    for number in range(theirs.n_layer):
        to, of = f"decoder.layers.{number}", f"h.{number}"
        for mine, name in _PROJECTIONS:
            weights[f"{to}.{mine}.weight"] = np.ascontiguousarray(found[f"{of}.{name}.weight"].T)
            weights[f"{to}.{mine}.bias"] = found[f"{of}.{name}.bias"]
        for mine, name in _NORMS:
            weights[f"{to}.{mine}.weight"] = found[f"{of}.{name}.weight"]
            weights[f"{to}.{mine}.bias"] = found[f"{of}.{name}.bias"]
    return config, weights
