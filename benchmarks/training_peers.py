"""The competitors of ``benchmarks/training.py``: each makes a function that trains on one batch.

All begin from the same weights, those of an ``nn.Transformer`` made from a fixed seed. They get the
same sentence pairs and make their batches from them within the time measured: ours without padding,
the peers padded to the longest sentence, as is usual with each. On a GPU the peers' batches lie there
before, so that no time of theirs is that of a loop in Python.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from transformer_ext import Transformer, ops, preset
from transformer_ext.config import OptimizerConfig
from transformer_ext.data import collate
from transformer_ext.model.config import TransformerConfig
from transformer_ext.model.interop import copy_nn_transformer
from transformer_ext.training.batches import BatchStream, Position
from transformer_ext.training.optimizer import Optimizer, parameters_by_name
from transformer_ext.training.schedules import Schedule
from transformer_ext.training.trainer import Plan, Trainer

PAD, START, END = 0, 2, 3
LABEL_SMOOTHING = 0.1
LEARNING_RATE = 3e-4
#: The competitors with static shapes are padded to multiples of this, in sentences and in length.
BUCKET = 16

#: Source ids (the end included) and target ids (neither start nor end) of a sentence pair.
Pair = tuple[np.ndarray, np.ndarray]
#: Trains on the batch of this number; gives the loss a token before the update, None where there is
#: none. It does not wait for a GPU.
TrainStep = Callable[[int], Tensor | None]


@dataclass(frozen=True)
class Task:
    """What all competitors train.

    Attributes:
        preset: size of the model.
        vocabulary: rows of the one embedding.
        norm_first: pre-norm; Marian has post-norm only and keeps it.
        batches: the sentence pairs of each batch.
        device: where they train.
    """

    preset: str
    vocabulary: int
    norm_first: bool
    batches: Sequence[Sequence[Pair]]
    device: str = "cpu"

    @property
    def config(self) -> TransformerConfig:
        """The sizes; nn.Transformer always has a norm after each stack."""
        return preset(
            self.preset,
            self.vocabulary,
            self.vocabulary,
            dropout=0.1,
            norm_first=self.norm_first,
            final_norm=True,
            pad_id=PAD,
            bos_id=START,
            eos_id=END,
        )

    def padded(self, index: int, static: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Source, what the decoder reads, and labels of a batch, padded on the right with 0."""
        pairs = self.batches[index]
        longest = [max(len(pair[side]) for pair in pairs) for side in (0, 1)]
        rows, source_length, target_length = len(pairs), longest[0], longest[1] + 1
        if static:
            rows, source_length, target_length = (
                -(-size // BUCKET) * BUCKET for size in (rows, source_length, target_length)
            )
        source = np.full((rows, source_length), PAD)
        target = np.full((rows, target_length), PAD)
        labels = np.full((rows, target_length), PAD)
        # A row of padding alone would make the attention of nn.Transformer NaN.
        source[:, 0] = END
        target[:, 0] = START
        for row, (source_ids, target_ids) in enumerate(pairs):
            source[row, : len(source_ids)] = source_ids
            target[row, 1 : len(target_ids) + 1] = target_ids
            labels[row, : len(target_ids)] = target_ids
            labels[row, len(target_ids)] = END
        return torch.from_numpy(source), torch.from_numpy(target), torch.from_numpy(labels)

    def target_tokens(self, index: int) -> int:
        """Labels of a batch."""
        return sum(len(target) + 1 for _, target in self.batches[index])


def _initial(config: TransformerConfig) -> tuple[nn.Transformer, Tensor]:
    """The weights that all begin from: both stacks, and the one embedding."""
    torch.manual_seed(1)
    stacks = nn.Transformer(
        config.d_model,
        config.nhead,
        config.num_encoder_layers,
        config.num_decoder_layers,
        config.dim_feedforward,
        config.dropout,
        norm_first=config.norm_first,
        batch_first=True,
    )
    return stacks, torch.randn(config.src_vocab_size, config.d_model) * config.d_model**-0.5


class _Sentences:
    """The part of a data set that ``collate`` reads, in memory."""

    bos_id, eos_id = START, END

    def __init__(self, pairs: Sequence[Pair]):
        self._pairs = pairs

    def gather_source(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._gather(0, indices)

    def gather_target(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._gather(1, indices)

    def _gather(self, side: int, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        chosen = [self._pairs[index][side] for index in indices]
        return np.concatenate(chosen), np.array([len(ids) for ids in chosen])


class _Order:
    """The batches as the numbers of their pairs."""

    def __init__(self, batches: Sequence[Sequence[Pair]]):
        ends = np.cumsum([len(batch) for batch in batches])
        self._batches = np.split(np.arange(ends[-1]), ends[:-1])

    def epoch(self, epoch: int) -> list[np.ndarray]:
        return self._batches


def ours(task: Task, precision: str) -> TrainStep:
    """The trainer of ``python -m transformer_ext.train``: its step, its optimizer with clipping."""
    config = task.config
    model = Transformer(config)
    stacks, embedding = _initial(config)
    copy_nn_transformer(model, stacks)
    with torch.no_grad():
        model.source_embedding.weight.copy_(embedding)
    del stacks, embedding
    model.set_precision(precision).to(task.device)
    pairs = [pair for batch in task.batches for pair in batch]
    sentences: Any = _Sentences(pairs)
    stream = BatchStream(
        lambda indices: collate(sentences, indices),
        _Order(task.batches),
        np.array([len(target) + 1 for _, target in pairs]),
    )
    defaults = OptimizerConfig()
    trainer = Trainer(
        model,
        stream,
        Optimizer(
            parameters_by_name(model).items(),
            betas=defaults.betas,
            eps=defaults.eps,
            clip_norm=defaults.clip_norm,
        ),
        Schedule("constant", LEARNING_RATE, 0, 1 << 30),
        Plan(1 << 30, label_smoothing=LABEL_SMOOTHING),
    )
    return _OurStep(trainer, stream)


class _OurStep:
    """A step of the trainer."""

    def __init__(self, trainer: Trainer, stream: BatchStream) -> None:
        self._trainer, self._stream = trainer, stream

    def __call__(self, index: int) -> Tensor:
        # Of the losses, of the negative log-likelihoods, of the tokens.
        sums = self._trainer._sums
        self._stream.seek(Position(0, index))
        sums.zero_()
        self._trainer.train_step()
        return sums[0] / sums[2]

    @property
    def graphs(self) -> int:
        """CUDA graphs recorded."""
        return self._trainer.graphs


class NNTransformer(nn.Module):
    """The model as a user of ``nn.Transformer`` writes it, with its loss."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.transformer, embedding = _initial(config)
        self.embedding = nn.Embedding.from_pretrained(embedding, freeze=False)
        self.dropout = nn.Dropout(config.dropout)
        self.scale = config.d_model**0.5
        self.register_buffer("positions", ops.sinusoidal_positions(1024, config.d_model))
        self.criterion = nn.CrossEntropyLoss(label_smoothing=LABEL_SMOOTHING, ignore_index=PAD)

    def _embed(self, ids: Tensor) -> Tensor:
        return self.dropout(self.embedding(ids) * self.scale + self.positions[: ids.shape[1]])

    def forward(self, source: Tensor, target: Tensor, labels: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(target.shape[1], source.device)
        padding = source == PAD
        hidden = self.transformer(
            self._embed(source),
            self._embed(target),
            tgt_mask=causal.isinf(),
            src_key_padding_mask=padding,
            tgt_key_padding_mask=target == PAD,
            memory_key_padding_mask=padding,
            tgt_is_causal=True,
        )
        logits = hidden @ self.embedding.weight.t()
        return self.criterion(logits.flatten(0, 1), labels.flatten())


class Marian(nn.Module):
    """Hugging Face's ``MarianMTModel`` of the same sizes, with its loss."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        from transformers import MarianConfig, MarianMTModel

        self.model = MarianMTModel(
            MarianConfig(
                vocab_size=config.src_vocab_size,
                d_model=config.d_model,
                encoder_layers=config.num_encoder_layers,
                decoder_layers=config.num_decoder_layers,
                encoder_attention_heads=config.nhead,
                decoder_attention_heads=config.nhead,
                encoder_ffn_dim=config.dim_feedforward,
                decoder_ffn_dim=config.dim_feedforward,
                activation_function="relu",
                dropout=config.dropout,
                attention_dropout=config.dropout,
                activation_dropout=config.dropout,
                scale_embedding=True,
                pad_token_id=PAD,
                bos_token_id=START,
                eos_token_id=END,
                decoder_start_token_id=START,
                forced_eos_token_id=None,
                use_cache=False,
            )
        )
        self.criterion = nn.CrossEntropyLoss(label_smoothing=LABEL_SMOOTHING, ignore_index=PAD)
        self._copy(*_initial(config))

    @torch.no_grad()
    def _copy(self, stacks: Any, embedding: Tensor) -> None:
        inner: Any = self.model.model
        inner.shared.weight.copy_(embedding)

        def attention(mine: Any, other: Any) -> None:
            for name, weight, bias in zip(
                "qkv", other.in_proj_weight.chunk(3), other.in_proj_bias.chunk(3), strict=True
            ):
                getattr(mine, f"{name}_proj").weight.copy_(weight)
                getattr(mine, f"{name}_proj").bias.copy_(bias)
            mine.out_proj.load_state_dict(other.out_proj.state_dict())

        for stack, others in (
            (inner.encoder.layers, stacks.encoder.layers),
            (inner.decoder.layers, stacks.decoder.layers),
        ):
            for mine, other in zip(stack, others, strict=True):
                attention(mine.self_attn, other.self_attn)
                if hasattr(mine, "encoder_attn"):
                    attention(mine.encoder_attn, other.multihead_attn)
                mine.fc1.load_state_dict(other.linear1.state_dict())
                mine.fc2.load_state_dict(other.linear2.state_dict())

    def forward(self, source: Tensor, target: Tensor, labels: Tensor) -> Tensor:
        logits = self.model(
            input_ids=source, attention_mask=(source != PAD).long(), decoder_input_ids=target
        ).logits
        return self.criterion(logits.flatten(0, 1), labels.flatten())


def peer(
    task: Task, kind: type[nn.Module], autocast: bool, fused: bool, compiled: str = ""
) -> TrainStep:
    """A PyTorch loop around a model; ``compiled`` is "", "dynamic" or "static"."""
    device = torch.device(task.device)
    module = kind(task.config).to(device).train()
    optimizer = torch.optim.Adam(
        [p for p in module.parameters() if p.requires_grad],
        lr=LEARNING_RATE,
        betas=(0.9, 0.98),
        eps=1e-9,
        fused=fused,
    )
    model: Any = module
    if compiled:
        # Each padded shape is a program of its own; the default limit of 8 would end in eager mode.
        torch._dynamo.config.recompile_limit = 256
        model = torch.compile(module, dynamic=compiled == "dynamic")

    on_device: dict[int, list[Tensor]] = {}

    def step(index: int) -> Tensor:
        batch = on_device.get(index)
        if batch is None:
            padded = task.padded(index, static=compiled == "static")
            batch = [tensor.to(device) for tensor in padded]
            if device.type != "cpu":
                on_device[index] = batch
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = model(*batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def gemm_only(task: Task, dtype: torch.dtype) -> TrainStep:
    """The matrix products of a step of our model and nothing else, by ``torch.mm``.

    Forward, gradient of the input, gradient of the weight, for the rows without padding, into
    buffers made before: no bias, no attention, no copies. No step built on these products can be
    faster; one that has better products can.
    """
    config = task.config
    d, inner = config.d_model, config.dim_feedforward

    def shapes(source: int, target: int) -> list[tuple[int, int, int]]:
        """(rows, in, out) of each product, in the order of the forward pass."""
        attention = [(d, 3 * d), (d, d)]
        feed_forward = [(d, inner), (inner, d)]
        result = []
        for _ in range(config.num_encoder_layers):
            result += [(source, *sizes) for sizes in (*attention, *feed_forward)]
        for _ in range(config.num_decoder_layers):
            result += [(target, *sizes) for sizes in (*attention, (d, d))]
            result += [(source, d, 2 * d), (target, d, d)]
            result += [(target, *sizes) for sizes in feed_forward]
        return [*result, (target, d, task.vocabulary)]

    def rows(index: int) -> tuple[int, int]:
        source = sum(len(ids) for ids, _ in task.batches[index])
        return source, task.target_tokens(index)

    most = [max(sizes) for sizes in zip(*map(rows, range(len(task.batches))), strict=True)]
    largest = shapes(most[0], most[1])
    device = task.device
    weights = [torch.randn(out, width, device=device).to(dtype) for _, width, out in largest]
    grad_weights = [torch.empty_like(weight) for weight in weights]
    wide = max(count * width for count, width, _ in largest)
    long = max(count * out for count, _, out in largest)
    x, grad_y = (torch.randn(size, device=device).to(dtype) for size in (wide, long))
    y, grad_x = torch.empty_like(grad_y), torch.empty_like(x)

    def step(index: int) -> None:
        products = shapes(*rows(index))
        for (count, width, out), weight in zip(products, weights, strict=True):
            torch.mm(
                x[: count * width].view(count, width),
                weight.t(),
                out=y[: count * out].view(count, out),
            )
        for (count, width, out), weight, grad in zip(products, weights, grad_weights, strict=True):
            grad_out = grad_y[: count * out].view(count, out)
            torch.mm(grad_out, weight, out=grad_x[: count * width].view(count, width))
            torch.mm(grad_out.t(), x[: count * width].view(count, width), out=grad)

    return step


@dataclass(frozen=True)
class Competitor:
    """A line of the table.

    Attributes:
        title: for people.
        make: from the task to the step.
        group: the name that ``--peers`` knows it by.
        needs: package that must be installed.
    """

    title: str
    make: Callable[[Task], TrainStep]
    group: str
    needs: str = "torch"

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.needs) is not None

    def load(self) -> None:
        """Imports what it needs, so that its memory is not counted as the model's."""
        if self.needs == "transformers":
            os.environ["HF_HUB_OFFLINE"] = "1"
            import transformers.models.marian.modeling_marian  # noqa: F401


def _peer(kind: type[nn.Module], autocast: bool, fused: bool, compiled: str = "") -> Any:
    return lambda task: peer(task, kind, autocast, fused, compiled)


def _compiled(autocast: bool, mode: str) -> Competitor:
    kind = "bfloat16 autocast" if autocast else "float32"
    padding = "dynamic=True" if mode == "dynamic" else f"static, padded to multiples of {BUCKET}"
    return Competitor(
        f"torch.compile of nn.Transformer, {kind}, fused Adam, {padding}",
        _peer(NNTransformer, autocast, True, mode),
        "compile",
    )


COMPETITORS: dict[str, Competitor] = {
    "ours-bfloat16": Competitor("ours, bfloat16", lambda task: ours(task, "bfloat16"), "ours"),
    "ours-float32": Competitor("ours, float32", lambda task: ours(task, "float32"), "ours"),
    "nn-float32": Competitor(
        "nn.Transformer, float32, Adam", _peer(NNTransformer, False, False), "eager"
    ),
    "nn-float32-fused": Competitor(
        "nn.Transformer, float32, fused Adam", _peer(NNTransformer, False, True), "eager"
    ),
    "nn-autocast": Competitor(
        "nn.Transformer, bfloat16 autocast, Adam", _peer(NNTransformer, True, False), "eager"
    ),
    "nn-autocast-fused": Competitor(
        "nn.Transformer, bfloat16 autocast, fused Adam", _peer(NNTransformer, True, True), "eager"
    ),
    "marian-float32": Competitor(
        "Hugging Face Marian, float32, fused Adam",
        _peer(Marian, False, True),
        "marian",
        "transformers",
    ),
    "marian-autocast": Competitor(
        "Hugging Face Marian, bfloat16 autocast, fused Adam",
        _peer(Marian, True, True),
        "marian",
        "transformers",
    ),
    "compile-float32-dynamic": _compiled(False, "dynamic"),
    "compile-float32-static": _compiled(False, "static"),
    "compile-autocast-dynamic": _compiled(True, "dynamic"),
    "compile-autocast-static": _compiled(True, "static"),
    "gemm-bfloat16": Competitor(
        "matrix products alone, torch.mm, bfloat16",
        lambda task: gemm_only(task, torch.bfloat16),
        "gemm",
    ),
    "gemm-float32": Competitor(
        "matrix products alone, torch.mm, float32",
        lambda task: gemm_only(task, torch.float32),
        "gemm",
    ),
}
