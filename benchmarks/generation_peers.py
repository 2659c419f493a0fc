"""The competitors of ``benchmarks/generation.py``: each loads one GPT-2 and continues prompts with it.

Nothing is imported here that a competitor would not import itself: its memory is measured.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from processes import Command, first_missing, memory_of_process

from transformer_ext.inference.options import TORCH_COMPUTE_TYPES


@dataclass(frozen=True)
class Task:
    """What all competitors continue.

    Attributes:
        folder: of the model, as Hugging Face has it.
        prompts: of one turn: token ids, all of one length, worked on together.
        beam: hypotheses.
        new: tokens of each output.
        threads: of all competitors alike.
        device: ``cpu``, or one that PyTorch names so.
    """

    folder: Path
    prompts: Sequence[Sequence[int]]
    beam: int
    new: int
    threads: int
    device: str = "cpu"


class Ours:
    """``LanguageModelEngine``, and on another device ``TorchLanguageModel``."""

    def __init__(self, task: Task, type: str) -> None:
        from transformer_ext.files import load_model_dir
        from transformer_ext.inference.language_engine import LanguageModelEngine
        from transformer_ext.inference.options import SearchOptions
        from transformer_ext.model.config import LanguageModelConfig

        saved = load_model_dir(task.folder, LanguageModelConfig)
        if task.device == "cpu":
            self._engine: Any = LanguageModelEngine(
                saved.config, saved.weights, threads=task.threads, compute_type=type
            )
        else:
            from transformer_ext.inference.torch_engine import TorchLanguageModel

            self._engine = TorchLanguageModel.of_weights(
                saved.config, saved.weights, task.device, type
            )
        del saved
        self._task = task
        self._options = SearchOptions.preset(
            "huggingface", beam_size=task.beam, min_length=task.new, max_length=task.new
        )
        self._tokens = len(task.prompts) * (len(task.prompts[0]) + task.beam * task.new)

    def __call__(self, few: bool) -> list[list[int]]:
        results = self._engine.search(self._task.prompts, self._options, batch_tokens=self._tokens)
        return [result.hypotheses[0].tokens for result in results]


class Transformers:
    """``GPT2LMHeadModel.generate``, also with a static cache and a compiled step."""

    def __init__(self, task: Task, type: str, cache: str | None) -> None:
        import torch
        from transformers import CompileConfig, GPT2LMHeadModel

        torch.set_num_threads(task.threads)
        model = GPT2LMHeadModel.from_pretrained(task.folder, dtype=getattr(torch, type))
        self._model = model.eval().to(task.device)
        self._task = task
        # A compiled step is made for the length of its cache.
        self._few = task.new if cache == "compiled" else 4
        self._options: dict[str, Any] = {}
        if cache is not None:
            self._options["cache_implementation"] = "static"
            self._options["disable_compile"] = cache == "static"
        if cache == "compiled":
            config = CompileConfig(mode="default")
            config._compile_all_devices = True
            self._options["compile_config"] = config

    def __call__(self, few: bool) -> list[list[int]]:
        import torch

        task = self._task
        ids = torch.tensor(task.prompts, device=task.device)
        new = self._few if few else task.new
        with torch.inference_mode():
            found = self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                num_beams=task.beam,
                do_sample=False,
                min_new_tokens=new,
                max_new_tokens=new,
                pad_token_id=self._model.config.eos_token_id,
                **self._options,
            )
        tokens: list[list[int]] = found[:, ids.shape[1] :].tolist()
        return tokens


@dataclass(frozen=True)
class Competitor:
    """A line of the tables.

    Attributes:
        title: for people.
        module: the package that it needs.
        make: from the task to what continues its prompts.
        type: that it multiplies in.
        usual: runs where nothing else is asked for.
        starts: whether its start-up is measured.
    """

    title: str
    module: str
    make: Callable[[Task], Callable[[bool], list[list[int]]]]
    type: str
    usual: bool = True
    starts: bool = True

    @property
    def missing(self) -> str | None:
        """The package that is not installed."""
        return first_missing(self.module)

    def load(self) -> None:
        """Imports what it needs, so that its memory is not counted as the model's."""
        os.environ["HF_HUB_OFFLINE"] = "1"
        if self.module == "transformer_ext":
            import transformer_ext.huggingface
            import transformer_ext.inference.language_engine  # noqa: F401
        else:
            import transformers.models.gpt2.modeling_gpt2  # noqa: F401

    def command(self, task: Task) -> Command:
        """A fresh process that continues the line that it gets by so many tokens, and prints it."""
        arguments = [str(task.folder), str(task.threads), self.type, str(task.new)]
        if self.module == "transformers":
            return Command(["-c", _TRANSFORMERS, *arguments])
        return Command(
            [
                *("-m", "transformer_ext.generate", str(task.folder)),
                *("--threads", str(task.threads), "--compute-type", self.type),
                *("--min-length", str(task.new), "--max-length", str(task.new)),
            ]
        )


_TRANSFORMERS = """
import sys
import torch
from transformers import AutoTokenizer, GPT2LMHeadModel
torch.set_num_threads(int(sys.argv[2]))
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = GPT2LMHeadModel.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[3])).eval()
new = int(sys.argv[4])
inputs = tokenizer(sys.stdin.readline().strip(), return_tensors="pt")
with torch.inference_mode():
    found = model.generate(
        **inputs, do_sample=False, min_new_tokens=new, max_new_tokens=new, pad_token_id=50256
    )
print(" ".join(tokenizer.decode(found[0]).splitlines()), flush=True)
sys.stdin.read()
"""


def _ours(type: str) -> Competitor:
    return Competitor(
        f"this package, {type}", "transformer_ext", lambda task: Ours(task, type), type
    )


def _transformers(type: str, cache: str | None = None) -> Competitor:
    more = {None: "", "static": ", static cache", "compiled": ", static cache, torch.compile"}
    return Competitor(
        f"transformers{more[cache]}, {type}",
        "transformers",
        lambda task: Transformers(task, type, cache),
        type,
        usual=cache is None,
        starts=cache is None,
    )


COMPETITORS: dict[str, Competitor] = {
    **{f"ours-{type}": _ours(type) for type in ("float32", "bfloat16", "int8")},
    **{f"transformers-{type}": _transformers(type) for type in ("float32", "bfloat16")},
    **{
        f"transformers-{type}-{cache}": _transformers(type, cache)
        for cache in ("static", "compiled")
        for type in ("float32", "bfloat16")
    },
    "ours-float16": dataclasses.replace(_ours("float16"), usual=False),
    "transformers-float16": dataclasses.replace(_transformers("float16"), usual=False),
}

#: Those that run on another device than the CPU.
ON_A_DEVICE = tuple(
    key for key, competitor in COMPETITORS.items() if competitor.type in TORCH_COMPUTE_TYPES
)


@dataclass(frozen=True)
class Loaded:
    """A competitor that is ready.

    Attributes:
        before: resident size before the model was loaded, in bytes.
    """

    before: int


@dataclass(frozen=True)
class Turn:
    """What a competitor did in one turn.

    Attributes:
        seconds: it took.
        peak: greatest resident size so far, in bytes.
        outputs: new tokens of each prompt.
    """

    seconds: float
    peak: int
    outputs: list[list[int]]


def generator(key: str, task: Task) -> Callable[[bool], Any]:
    """In the competitor's process: False loads and warms up, True continues all prompts."""
    competitor = COMPETITORS[key]
    competitor.load()
    before = memory_of_process("VmRSS")
    made = competitor.make(task)

    def answer(timed: bool) -> Loaded | Turn:
        if not timed:
            made(True)
            return Loaded(before)
        start = time.perf_counter()
        outputs = made(False)
        return Turn(time.perf_counter() - start, memory_of_process("VmHWM"), outputs)

    return answer
