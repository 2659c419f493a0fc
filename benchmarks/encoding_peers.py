"""The competitors of ``benchmarks/encoding.py``: each loads one set of weights and encodes with it.

Nothing is imported here that a competitor would not import itself: its memory is measured.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from processes import Command, first_missing, memory_of_process

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Task:
    """What all competitors encode.

    Attributes:
        folder: of the model, as Hugging Face has it.
        batch: most texts encoded together.
        threads: of all competitors alike.
        calls: of one turn: each a list of texts, or of lists of token ids that are of one length.
    """

    folder: Path
    batch: int
    threads: int
    calls: Sequence[Sequence[Any]]

    @property
    def text(self) -> bool:
        """Whether a call has texts, and wants a vector for each."""
        return isinstance(self.calls[0][0], str)


class Ours:
    """The compiled engine: states of token ids, or vectors of texts."""

    def __init__(self, task: Task, type: str) -> None:
        options = {"threads": task.threads, "compute_type": type}
        if task.text:
            from transformer_ext.inference.sentence_encoder import SentenceEncoder

            self._encode: Callable[[Any], Any] = SentenceEncoder(task.folder, **options).encode
        else:
            from transformer_ext.files import load_model_dir
            from transformer_ext.inference.encoder_engine import EncoderEngine
            from transformer_ext.model.config import TextEncoderConfig

            saved = load_model_dir(task.folder, TextEncoderConfig)
            engine = EncoderEngine(saved.config, saved.weights, **options)
            tokens = task.batch * len(task.calls[0][0])
            self._encode = lambda call: engine.states(
                call, batch_size=task.batch, batch_tokens=tokens
            )

    def __call__(self, call: Any) -> Any:
        return self._encode(call)

    def array(self, results: Any) -> NDArray[np.float32]:
        """As all competitors give it: the states of all tokens, or the vectors."""
        import numpy as np

        return np.asarray(results)


class Transformers:
    """``BertModel`` with scaled_dot_product_attention, compiled or not."""

    def __init__(self, task: Task, type: str, compiled: bool) -> None:
        import torch
        from transformers import BertModel

        torch.set_num_threads(task.threads)
        model = BertModel.from_pretrained(
            task.folder, dtype=getattr(torch, type), attn_implementation="sdpa"
        ).eval()
        self._model = torch.compile(model) if compiled else model

    def __call__(self, call: Any) -> Any:
        import torch

        with torch.inference_mode():
            ids = torch.tensor(call)
            return self._model(input_ids=ids, attention_mask=torch.ones_like(ids))

    def array(self, results: Any) -> NDArray[np.float32]:
        array: NDArray[np.float32] = results.last_hidden_state.float().numpy()
        return array


class SentenceTransformers:
    """``SentenceTransformer.encode``."""

    def __init__(self, task: Task, type: str) -> None:
        import torch
        from sentence_transformers import SentenceTransformer

        torch.set_num_threads(task.threads)
        self._model = SentenceTransformer(
            str(task.folder), device="cpu", model_kwargs={"dtype": getattr(torch, type)}
        )
        self._batch = task.batch

    def __call__(self, call: Any) -> Any:
        return self._model.encode(call, batch_size=self._batch, show_progress_bar=False)

    def array(self, results: Any) -> NDArray[np.float32]:
        import numpy as np

        return np.asarray(results, np.float32)


@dataclass(frozen=True)
class Competitor:
    """A line of the tables.

    Attributes:
        title: for people.
        module: the package that it needs.
        make: from the task to what encodes a call.
        type: that it multiplies in.
        text: whether it takes texts (True), token ids (False), or either (None).
        usual: runs where nothing else is asked for.
        start: a program that encodes the line that it gets, and prints: of the folder, the threads
            and the type.
    """

    title: str
    module: str
    make: Callable[[Task], Any]
    type: str
    start: str
    text: bool | None = None
    usual: bool = True

    @property
    def missing(self) -> str | None:
        """The package that is not installed."""
        return first_missing(self.module)

    def load(self, text: bool) -> None:
        """Imports what it needs, so that its memory is not counted as the model's."""
        os.environ["HF_HUB_OFFLINE"] = "1"
        if self.module == "transformer_ext":
            if text:
                import transformer_ext.inference.sentence_encoder  # noqa: F401
            import transformer_ext.inference.encoder_engine  # noqa: F401
        if self.module == "transformers":
            import transformers.models.bert.modeling_bert  # noqa: F401
        if self.module == "sentence_transformers":
            import sentence_transformers  # noqa: F401

    def command(self, task: Task) -> Command:
        """A fresh process that encodes one line."""
        return Command(["-c", self.start, str(task.folder), str(task.threads), self.type])


_OURS = """
import sys
from transformer_ext.inference.sentence_encoder import SentenceEncoder
encoder = SentenceEncoder(sys.argv[1], threads=int(sys.argv[2]), compute_type=sys.argv[3])
print(encoder.encode(sys.stdin.readline().strip())[0], flush=True)
sys.stdin.read()
"""

_TRANSFORMERS = """
import sys
import torch
from transformers import AutoTokenizer, BertModel
torch.set_num_threads(int(sys.argv[2]))
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = BertModel.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[3])).eval()
with torch.inference_mode():
    found = model(**tokenizer(sys.stdin.readline().strip(), return_tensors="pt"))
print(float(found.pooler_output[0, 0]), flush=True)
sys.stdin.read()
"""

_SENTENCE_TRANSFORMERS = """
import sys
import torch
from sentence_transformers import SentenceTransformer
torch.set_num_threads(int(sys.argv[2]))
options = {"dtype": getattr(torch, sys.argv[3])}
model = SentenceTransformer(sys.argv[1], device="cpu", model_kwargs=options)
print(model.encode(sys.stdin.readline().strip())[0], flush=True)
sys.stdin.read()
"""


def _ours(type: str) -> Competitor:
    return Competitor(
        f"this package, {type}", "transformer_ext", lambda task: Ours(task, type), type, _OURS
    )


def _transformers(type: str, compiled: bool = False) -> Competitor:
    return Competitor(
        f"transformers{', torch.compile' if compiled else ''}, {type}",
        "transformers",
        lambda task: Transformers(task, type, compiled),
        type,
        _TRANSFORMERS,
        text=False,
        usual=not compiled,
    )


def _sentence_transformers(type: str) -> Competitor:
    return Competitor(
        f"sentence-transformers, {type}",
        "sentence_transformers",
        lambda task: SentenceTransformers(task, type),
        type,
        _SENTENCE_TRANSFORMERS,
        text=True,
    )


COMPETITORS: dict[str, Competitor] = {
    **{f"ours-{type}": _ours(type) for type in ("float32", "bfloat16", "int8")},
    **{f"transformers-{type}": _transformers(type) for type in ("float32", "bfloat16")},
    **{
        f"transformers-{type}-compiled": _transformers(type, compiled=True)
        for type in ("float32", "bfloat16")
    },
    **{
        f"sentence-transformers-{type}": _sentence_transformers(type)
        for type in ("float32", "bfloat16")
    },
}


@dataclass(frozen=True)
class Turn:
    """What a competitor did in one turn.

    Attributes:
        seconds: of its calls.
        peak: greatest resident size so far, in bytes.
    """

    seconds: float
    peak: int


@dataclass(frozen=True)
class Loaded:
    """A competitor that is ready.

    Attributes:
        before: resident size before the model was loaded, in bytes.
        results: of the first call, to be compared.
    """

    before: int
    results: NDArray[np.float32]


def encoder(key: str, task: Task) -> Callable[[bool], Any]:
    """In the competitor's process: False loads and warms up, True encodes all calls."""
    competitor = COMPETITORS[key]
    competitor.load(task.text)
    before = memory_of_process("VmRSS")
    made = competitor.make(task)

    def answer(timed: bool) -> Loaded | Turn:
        if not timed:
            results = made.array(made(task.calls[0]))
            for call in task.calls[1:4]:
                made(call)
            return Loaded(before, results)
        start = time.perf_counter()
        for call in task.calls:
            made(call)
        return Turn(time.perf_counter() - start, memory_of_process("VmHWM"))

    return answer
