"""What is chosen for the user: size of the model, batch, schedule, length of training.

For the shipped corpus the recipe is fixed and ends by steps. For a user's own text it follows from
the number of sentence pairs and the device, and ends by early stopping. Everything that the user
set stays as set.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from transformer_ext.config import TrainConfig
from transformer_ext.model.config import PRESETS

__all__ = [
    "Recipe",
    "fill",
    "fine_tuning_recipe",
    "recipe_for",
    "shipped_recipe",
    "text_tuning_recipe",
]


@dataclass(frozen=True)
class Recipe:
    """Values for what a configuration leaves open.

    Attributes:
        preset: Size of the model; None: it is there already.
        vocab_size: Pieces of the vocabulary; None: as ``transformer_ext.data`` chooses by the pairs.
        model: Fields of the model that differ from the preset.
        learning_rate: Peak.
        schedule: Name of the schedule.
        warmup_steps: Steps of warm-up.
        max_tokens: Target tokens of a batch.
        max_steps: Optimizer steps.
        validate_every: Steps between validations.
        early_stop_patience: Validations without a better loss; None: the steps end the training.
        label_smoothing: Of the training loss.
    """

    preset: str | None
    vocab_size: int | None
    learning_rate: float
    schedule: str
    warmup_steps: int
    max_tokens: int
    max_steps: int
    validate_every: int
    early_stop_patience: int | None
    model: dict[str, Any] = field(default_factory=dict)
    label_smoothing: float = 0.1


def shipped_recipe(device_type: str, preset: str | None = None) -> Recipe:
    """The recipe of the shipped corpus: about 10 minutes on two CPU cores.

    Args:
        device_type: "cpu", or a GPU's.
        preset: Size that the user chose, with its own learning rate; None: ``small``.
    """
    recipe = _shipped_small(device_type)
    if preset is None or preset == recipe.preset:
        return recipe
    return dataclasses.replace(
        recipe,
        preset=preset,
        learning_rate=_LEARNING_RATES[preset],
        warmup_steps=recipe.max_steps // 10,
    )


def _shipped_small(device_type: str) -> Recipe:
    if device_type == "cpu":
        return Recipe(
            preset="small",
            vocab_size=8000,
            model={"norm_first": True},
            learning_rate=2e-3,
            schedule="linear",
            warmup_steps=300,
            max_tokens=1024,
            max_steps=7000,
            validate_every=1000,
            early_stop_patience=None,
        )
    return Recipe(
        preset="small",
        vocab_size=8000,
        model={"norm_first": True, "dropout": 0.2},
        learning_rate=2e-3,
        schedule="inverse_sqrt",
        warmup_steps=400,
        max_tokens=8192,
        max_steps=4000,
        validate_every=400,
        early_stop_patience=None,
    )


#: (least number of pairs, preset on the CPU, preset on a GPU, dropout, epochs at most).
#: Dropout falls and the model grows with the data, as in the low-resource studies of Sennrich and
#: Zhang, "Revisiting Low-Resource Neural Machine Translation" (2019), and Araabi and Monz,
#: "Optimizing Transformer for Low-Resource Neural Machine Translation" (2020).
_BY_PAIRS: tuple[tuple[int, str, str, float, int], ...] = (
    (0, "tiny", "tiny", 0.3, 200),
    (5_000, "tiny", "small", 0.3, 100),
    (20_000, "small", "small", 0.2, 60),
    (200_000, "small", "base", 0.1, 40),
    (1_000_000, "base", "base", 0.1, 30),
    (10_000_000, "base", "big", 0.1, 20),
)

#: Peak learning rate of inverse_sqrt by preset, at the batch sizes below.
_LEARNING_RATES = {"tiny": 2e-3, "small": 1.5e-3, "base": 7e-4, "big": 5e-4}
#: Target tokens of a batch by (preset, device); the paper's batches hold 25,000 (section 5.1).
_MAX_TOKENS = {
    "cpu": {"tiny": 2048, "small": 2048, "base": 2048, "big": 2048},
    "gpu": {"tiny": 8192, "small": 12288, "base": 25000, "big": 25000},
}


def recipe_for(
    pairs: int, target_tokens_per_pair: float, device_type: str, preset: str | None = None
) -> Recipe:
    """The recipe for a user's own text.

    Args:
        pairs: Sentence pairs to train on.
        target_tokens_per_pair: Mean length of a target, to estimate the steps of an epoch.
        device_type: "cpu", or a GPU's.
        preset: Size that the user chose; None lets it follow from the pairs.
    """
    device = "cpu" if device_type == "cpu" else "gpu"
    row = next(r for r in reversed(_BY_PAIRS) if pairs >= r[0])
    _, on_cpu, on_gpu, dropout, epochs = row
    size = preset or (on_cpu if device == "cpu" else on_gpu)
    max_tokens = _MAX_TOKENS[device].get(size, 4096)
    steps_per_epoch = max(1, round(pairs * target_tokens_per_pair / max_tokens))
    max_steps = steps_per_epoch * epochs
    # Often enough to stop in time, rarely enough that validating stays a small part of the time.
    validate_every = min(max(50, steps_per_epoch), 2000)
    return Recipe(
        preset=size,
        vocab_size=None,
        model={"norm_first": True, "dropout": dropout},
        learning_rate=_LEARNING_RATES.get(size, 7e-4),
        schedule="inverse_sqrt",
        warmup_steps=min(4000, max(20, max_steps // 25)),
        max_tokens=max_tokens,
        max_steps=max_steps,
        validate_every=validate_every,
        early_stop_patience=8,
    )


def fine_tuning_recipe(
    pairs: int, target_tokens_per_pair: float, device_type: str, d_model: int
) -> Recipe:
    """The recipe for going on from the weights of a model.

    Args:
        pairs: Sentence pairs to train on.
        target_tokens_per_pair: Mean length of a target.
        device_type: "cpu", or a GPU's.
        d_model: Width of the model.
    """
    size = min(PRESETS, key=lambda name: abs(math.log(PRESETS[name]["d_model"] / d_model)))
    recipe = recipe_for(pairs, target_tokens_per_pair, device_type, size)
    # The rate is that of random weights. Captions of pictures after software help, 1,000 steps of
    # 1,024 tokens: BLEU 28.5 with it, 22.5 with a third of it, and the old text is forgotten in both.
    return dataclasses.replace(recipe, preset=None, model={})


def text_tuning_recipe(tokens: int, device_type: str, d_model: int) -> Recipe:
    """The recipe for going on from a model that has read much text (BERT, GPT-2).

    Three passes over the text, as BERT's authors fine-tune (Devlin et al. 2019, appendix A.3), in
    batches of about as many tokens as theirs of 32 texts.

    Args:
        tokens: Of the text.
        device_type: "cpu", or a GPU's.
        d_model: Width of the model.
    """
    max_tokens = 1024 if device_type == "cpu" else 4096
    steps = max(1, round(tokens / max_tokens))
    max_steps = 3 * steps
    return Recipe(
        preset=None,
        vocab_size=None,
        # Theirs is 2e-5 to 5e-5 at a width of 768; a narrower model takes more.
        learning_rate=5e-5 * max(1.0, 768 / d_model),
        schedule="linear",
        warmup_steps=max_steps // 10,
        max_tokens=max_tokens,
        max_steps=max_steps,
        validate_every=min(max(20, steps), 2000),
        early_stop_patience=None,
        label_smoothing=0.0,
    )


def fill(config: TrainConfig, recipe: Recipe) -> TrainConfig:
    """The configuration with the recipe's value in every place that it leaves open."""
    model = {**recipe.model, **config.model}
    optimizer, training = config.optimizer, config.training
    schedule: Any = optimizer.schedule or recipe.schedule
    rate = optimizer.learning_rate
    if rate is None:
        rate = 1.0 if schedule == "noam" else recipe.learning_rate
    return dataclasses.replace(
        config,
        preset=config.preset or recipe.preset,
        model=model,
        data=dataclasses.replace(
            config.data, vocab_size=_first(config.data.vocab_size, recipe.vocab_size)
        ),
        optimizer=dataclasses.replace(
            optimizer,
            learning_rate=rate,
            schedule=schedule,
            warmup_steps=_first(optimizer.warmup_steps, recipe.warmup_steps),
            label_smoothing=_first(optimizer.label_smoothing, recipe.label_smoothing),
        ),
        training=dataclasses.replace(
            training,
            max_tokens=_first(training.max_tokens, recipe.max_tokens),
            # Passes over the text that the user asked for are not cut short by the recipe's steps.
            max_steps=training.max_steps
            if training.max_epochs is not None
            else _first(training.max_steps, recipe.max_steps),
            validate_every=_first(training.validate_every, recipe.validate_every),
            early_stop_patience=_first(training.early_stop_patience, recipe.early_stop_patience),
        ),
    )


def _first(value: Any, other: Any) -> Any:
    return other if value is None else value
