"""The competitors of ``benchmarks/decoding.py``: each loads one set of weights and decodes with it.

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

from transformer_ext.inference.options import COMPUTE_TYPES, TORCH_COMPUTE_TYPES

#: Sentences of token ids, their end included, that are given to a program in one call.
Call = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Task:
    """What all competitors decode.

    Attributes:
        folder: of the weights, a folder for each program.
        batch: most sentences decoded together; where it is 1, a call has one sentence.
        beam: hypotheses.
        length: of every output, in tokens; None: as the model ends it.
        threads: of all competitors alike.
        blocks: what is translated in one turn: the calls of the turn.
        device: ``cpu``, or one that PyTorch names so.
    """

    folder: Path
    batch: int
    beam: int
    length: int | None
    threads: int
    blocks: Sequence[Sequence[Call]]
    device: str = "cpu"

    @property
    def kind(self) -> str:
        """``random`` weights with fixed lengths, or a trained model on ``text``."""
        return "text" if self.length is None else "random"


@dataclass(frozen=True)
class Setting:
    """How CTranslate2 is run.

    Attributes:
        workers: its ``inter_threads``: batches decoded at once.
        threads: its ``intra_threads``: of each worker.
        divisor: ``max_batch_size`` is the batch divided by it.
        tokens: ``max_batch_size`` counts tokens (of padded source), 32 for each sentence.
        environment: variables of its process.
        searched: found by ``--search-ctranslate2`` for this very case; else taken by rule.
    """

    workers: int
    threads: int
    divisor: int = 1
    tokens: bool = False
    environment: tuple[tuple[str, str], ...] = ()
    searched: bool = True

    def __str__(self) -> str:
        size = f"batch/{self.divisor}" if self.divisor > 1 else "batch"
        return " ".join(
            [
                f"{self.workers}x{self.threads}",
                f"{size} as tokens" if self.tokens else size,
                *(f"{name}={value}" for name, value in self.environment),
                *([] if self.searched else ["(by rule, not searched)"]),
            ]
        )


#: malloc keeps what is freed: the logits of a step are a block that it would map anew each time.
KEEP_MEMORY = (("MALLOC_MMAP_MAX_", "0"), ("MALLOC_TRIM_THRESHOLD_", "2147483647"))
ONE_ARENA = (("MALLOC_ARENA_MAX", "1"),)
HUGE_PAGES = (("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"),)

#: The best found for two threads on a Zen 5 by ``--search-ctranslate2``, by kind of task, type, batch
#: and beam. Beside them: one worker with both threads reaches 60 to 75 % of two with one each;
#: whole batches leave a worker idle, quarters cost 7 to 20 %; ``CT2_USE_MKL=1`` divides by 8,
#: ``CT2_USE_MKL=0``, ``CT2_FORCE_CPU_ISA`` (AVX2 or AVX512; GENERIC costs a third) and
#: ``CT2_PACKED_GEMM`` change nothing that is seen through the noise of 5 %, nor does
#: ``OMP_WAIT_POLICY``; ``OMP_PROC_BIND`` puts both workers on one core.
CTRANSLATE2_SETTINGS: dict[tuple[str, str, int, int], Setting] = {
    ("random", "int8", 64, 4): Setting(2, 1, 2, False, KEEP_MEMORY + ONE_ARENA + HUGE_PAGES),
    ("random", "int8", 64, 1): Setting(2, 1, 2),
    ("random", "int8", 16, 4): Setting(2, 1, 2, False, KEEP_MEMORY),
    ("random", "int8", 16, 1): Setting(2, 1, 2, False, KEEP_MEMORY),
    ("random", "float32", 64, 4): Setting(2, 1, 2, False, KEEP_MEMORY + ONE_ARENA + HUGE_PAGES),
    ("random", "float32", 64, 1): Setting(2, 1, 2, False, KEEP_MEMORY),
    ("text", "int8", 64, 4): Setting(2, 1, 8, True),
    ("text", "int8", 64, 1): Setting(2, 1, 8, True),
    ("text", "int8", 16, 4): Setting(2, 1, 2, True),
    ("text", "int8", 16, 1): Setting(2, 1, 2, True),
}


def ctranslate2_setting(type: str, task: Task) -> Setting:
    """The best that was found for a case, see ``--search-ctranslate2``; else what is good for all.

    The rule: for each sentence alone, one worker; else a worker for each thread, with its share of
    the batch.
    """
    found = CTRANSLATE2_SETTINGS.get((task.kind, type, task.batch, task.beam))
    if found and task.threads == 2:
        return found
    if task.batch == 1:
        # A second thread makes int8 slower, up to 12 times, and float32 1.6 times as fast.
        return Setting(1, task.threads if type == "float32" else 1, searched=False)
    return Setting(task.threads, 1, task.threads, searched=False)


class Ours:
    """``Translator``, on token ids."""

    def __init__(self, task: Task, type: str) -> None:
        from transformer_ext import Translator
        from transformer_ext.inference.options import SearchOptions

        if task.length is None:
            options = SearchOptions.preset("ctranslate2", beam_size=task.beam)
        else:
            options = SearchOptions(
                beam_size=task.beam, max_length=task.length, min_length=task.length
            )
        self._batch = task.batch
        self._translator = Translator(
            task.folder / "ours",
            task.threads if task.device == "cpu" else None,
            compute_type=type,
            options=options,
            device=task.device,
        )
        self.type = self._translator.compute_type

    def inputs(self, call: Call) -> Any:
        return call

    def translate(self, call: Any) -> Any:
        return self._translator.translate_ids(call, batch_size=self._batch)

    def ids(self, results: Any) -> list[list[int]]:
        return [result.hypotheses[0].tokens for result in results]


class CTranslate2:
    """Its ``Translator``, on tokens."""

    def __init__(self, task: Task, type: str, setting: Setting | None) -> None:
        import ctranslate2

        stored = "int8" if type.startswith("int8") else "float32"
        folder = str(task.folder / f"ctranslate2-{stored}")
        threads = {}
        self._options: dict[str, Any] = {"beam_size": task.beam}
        if setting is None:
            threads = {"intra_threads": task.threads}
            self._options["max_batch_size"] = task.batch
        else:
            threads = {"inter_threads": setting.workers, "intra_threads": setting.threads}
            size = max(1, task.batch // setting.divisor)
            self._options["max_batch_size"] = size * 32 if setting.tokens else size
            self._options["batch_type"] = "tokens" if setting.tokens else "examples"
        if task.length is not None:
            self._options["min_decoding_length"] = task.length
            self._options["max_decoding_length"] = task.length
        device, _, index = task.device.partition(":")
        self._translator = ctranslate2.Translator(
            folder, device, device_index=int(index or 0), compute_type=type, **threads
        )
        found = self._translator.compute_type
        self.type = "int8" if found.startswith("int8") else found
        with open(task.folder / "tokens.txt", encoding="utf-8") as file:
            self._tokens = file.read().split("\n")

    def inputs(self, call: Call) -> Any:
        return [[self._tokens[id] for id in source] for source in call]

    def translate(self, call: Any) -> Any:
        return self._translator.translate_batch(call, **self._options)

    def ids(self, results: Any) -> list[list[int]]:
        number = {token: id for id, token in enumerate(self._tokens)}
        return [[number[token] for token in result.hypotheses[0]] for result in results]


class HuggingFace:
    """``MarianMTModel.generate``."""

    def __init__(self, task: Task, type: str) -> None:
        import torch
        from decoding_models import marian_ids
        from transformers import MarianMTModel

        from transformer_ext.files import load_model_dir

        torch.set_num_threads(task.threads)
        folder = task.folder / "marian"
        model = MarianMTModel.from_pretrained(folder, dtype=getattr(torch, type))
        self._model = model.eval().to(task.device)
        self._device = task.device
        self.type = type
        self._ours = marian_ids(folder, load_model_dir(task.folder / "ours").target_tokenizer)
        self._theirs = {ours: id for id, ours in self._ours.items()}
        self._pad, self._end = self._model.config.pad_token_id, self._model.config.eos_token_id
        self._options: dict[str, Any] = {"num_beams": task.beam, "do_sample": False}
        if task.length is not None:
            self._options["min_new_tokens"] = self._options["max_new_tokens"] = task.length
            # Beside that of the model's file there would be a warning in each call.
            self._options["max_length"] = None

    def inputs(self, call: Call) -> Any:
        return [[self._theirs[id] for id in source] for source in call]

    def translate(self, call: Any) -> Any:
        import torch

        longest = max(map(len, call))
        ids = torch.tensor([[*source, *[self._pad] * (longest - len(source))] for source in call])
        ids = ids.to(self._device)
        with torch.inference_mode():
            # On the host, as that of the others: the device may still be at work when it returns.
            return self._model.generate(
                input_ids=ids, attention_mask=(ids != self._pad).long(), **self._options
            ).cpu()

    def ids(self, results: Any) -> list[list[int]]:
        # The first is the start of the sentence.
        return [
            [self._ours.get(id, -1) for id in row[1:] if id not in (self._pad, self._end)]
            for row in results.tolist()
        ]


@dataclass(frozen=True)
class Competitor:
    """A line of the tables.

    Attributes:
        title: for people.
        program: its package.
        make: from the task and the setting of CTranslate2 to the decoder.
        type: asked for.
        best: whether CTranslate2 runs with the settings of :func:`ctranslate2_setting`.
        environment: whether with the variables of the environment among them; those of a search are
            searched with them.
        slow: warmed up by a part of a turn only.
        usual: runs where nothing else is asked for.
    """

    title: str
    program: str
    make: Callable[[Task, Setting | None], Any]
    type: str
    best: bool = False
    environment: bool = True
    slow: bool = False
    usual: bool = True

    def setting(self, task: Task) -> Setting | None:
        """Of CTranslate2, where it does not run with its defaults."""
        if not self.best or task.device != "cpu":
            return None
        setting = ctranslate2_setting(self.type, task)
        return setting if self.environment else dataclasses.replace(setting, environment=())

    @property
    def missing(self) -> str | None:
        """The package that is not installed."""
        needed = {"huggingface": ("transformers", "torch")}.get(self.program, (self.program,))
        return first_missing(*needed)

    def load(self) -> None:
        """Imports what it needs, so that its memory is not counted as the model's."""
        if self.program == "transformer_ext":
            import transformer_ext.inference.translator  # noqa: F401
        if self.program == "ctranslate2":
            import ctranslate2  # noqa: F401
        if self.program == "huggingface":
            os.environ["HF_HUB_OFFLINE"] = "1"
            import decoding_models  # noqa: F401
            import transformers.models.marian.modeling_marian  # noqa: F401


def _ours(type: str) -> Competitor:
    return Competitor(
        f"this package, {type}",
        "transformer_ext",
        lambda task, _: Ours(task, type),
        type,
        usual=type != "auto",
    )


def _ctranslate2(type: str, environment: bool = True) -> Competitor:
    return Competitor(
        f"CTranslate2, {type}, settings as printed{'' if environment else ', options alone'}",
        "ctranslate2",
        lambda task, setting: CTranslate2(task, type, setting or ctranslate2_setting(type, task)),
        type,
        best=True,
        environment=environment,
        usual=environment and type in ("int8", "float32", "bfloat16"),
    )


def _huggingface(type: str) -> Competitor:
    return Competitor(
        f"Hugging Face generate, {type}",
        "huggingface",
        lambda task, _: HuggingFace(task, type),
        type,
        slow=True,
    )


#: What it may be asked for on a CPU.
CTRANSLATE2_TYPES = (
    "int8",
    "float32",
    "bfloat16",
    "int8_float32",
    "int8_bfloat16",
    "auto",
)

COMPETITORS: dict[str, Competitor] = {
    **{f"ours-{type}": _ours(type) for type in COMPUTE_TYPES},
    **{f"ctranslate2-{type}": _ctranslate2(type) for type in CTRANSLATE2_TYPES},
    # As its documents have it, without malloc's variables.
    **{f"ctranslate2-{type}-options": _ctranslate2(type, False) for type in ("int8", "float32")},
    "ctranslate2-defaults": Competitor(
        "CTranslate2, int8, one worker with all threads",
        "ctranslate2",
        lambda task, _: CTranslate2(task, "int8", None),
        "int8",
    ),
    **{f"huggingface-{type}": _huggingface(type) for type in ("float32", "bfloat16")},
    "ours-float16": dataclasses.replace(_ours("float16"), usual=False),
    "ctranslate2-float16": dataclasses.replace(_ctranslate2("float16"), usual=False),
    "huggingface-float16": dataclasses.replace(_huggingface("float16"), usual=False),
}

#: Those that run on another device than the CPU.
ON_A_DEVICE = tuple(
    f"{program}-{type}"
    for program in ("ours", "ctranslate2", "huggingface")
    for type in TORCH_COMPUTE_TYPES
    if type != "auto"
)


@dataclass(frozen=True)
class Turn:
    """What a competitor did in one turn.

    Attributes:
        seconds: of its calls.
        outputs: ids of each sentence, without the end.
        peak: greatest resident size so far, in bytes.
    """

    seconds: float
    outputs: list[list[int]]
    peak: int


@dataclass(frozen=True)
class Loaded:
    """A competitor that is ready.

    Attributes:
        type: that it multiplies in.
        before: resident size before the model was loaded, in bytes.
    """

    type: str
    before: int


def decoder(key: str, task: Task, setting: Setting | None) -> Callable[[int | None], Any]:
    """In the competitor's process: decodes the block of a number; None loads and warms up."""
    competitor = COMPETITORS[key]
    competitor.load()
    before = memory_of_process("VmRSS")
    made = competitor.make(task, setting)
    blocks = [[made.inputs(call) for call in block] for block in task.blocks]

    def answer(number: int | None) -> Loaded | Turn:
        if number is None:
            calls = blocks[0]
            if competitor.slow:
                calls = [calls[0][:4]]
            for call in calls:
                made.translate(call)
            return Loaded(made.type, before)
        start = time.perf_counter()
        results = [made.translate(call) for call in blocks[number]]
        seconds = time.perf_counter() - start
        outputs = [ids for result in results for ids in made.ids(result)]
        return Turn(seconds, outputs, memory_of_process("VmHWM"))

    return answer


# ---- Start-up: a fresh process that translates one line ---------------------------------------

_API = """
import sys
from transformer_ext import Translator
translator = Translator(sys.argv[1], int(sys.argv[2]), compute_type=sys.argv[3])
print(translator.translate(sys.stdin.readline(){options}).text, flush=True)
sys.stdin.read()
"""

_CTRANSLATE2 = """
import sys
import ctranslate2, sentencepiece
tokenizer = sentencepiece.SentencePieceProcessor(model_file=sys.argv[2])
translator = ctranslate2.Translator(sys.argv[1], compute_type=sys.argv[3], {threads})
pieces = tokenizer.encode(sys.stdin.readline(), out_type=str)
found = translator.translate_batch([[*pieces, "</s>"]], beam_size=4{options})
print(tokenizer.decode(found[0].hypotheses[0]), flush=True)
sys.stdin.read()
"""

_HUGGINGFACE = """
import json, sys
import sentencepiece, torch
from transformers import MarianMTModel
torch.set_num_threads({threads})
tokenizer = sentencepiece.SentencePieceProcessor(model_file=sys.argv[2])
model = MarianMTModel.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[3]))
with open(sys.argv[1] + "/vocab.json", encoding="utf-8") as file:
    ids = json.load(file)
names = dict(zip(ids.values(), ids))
pieces = tokenizer.encode(sys.stdin.readline(), out_type=str)
source = torch.tensor([[*map(ids.get, pieces), model.config.eos_token_id]])
found = model.generate(input_ids=source, num_beams=4{options})
left_out = (model.config.pad_token_id, model.config.eos_token_id)
print(tokenizer.decode([names[i] for i in found[0].tolist() if i not in left_out]), flush=True)
sys.stdin.read()
"""


def start_up_commands(key: str, task: Task) -> dict[str, Command]:
    """What is started, by title, to translate a line with a beam of 4; the task is that of single
    sentences."""
    competitor = COMPETITORS[key]
    length, type, threads = task.length, competitor.type, str(task.threads)
    ours = task.folder / "ours"
    pieces = str(ours / "tokenizer.model")
    if competitor.program == "transformer_ext":
        options = "" if length is None else f", max_length={length}, min_length={length}"
        command = ["-m", "transformer_ext.translate", str(ours), "--threads", threads]
        command += ["--compute-type", type]
        if length is not None:
            command += ["--max-length", str(length), "--min-length", str(length)]
        script = _API.format(options=options)
        return {
            f"{competitor.title}, command": Command(command),
            f"{competitor.title}, Translator": Command(["-c", script, str(ours), threads, type]),
        }
    if competitor.program == "ctranslate2":
        options = ""
        if length is not None:
            options = f", max_decoding_length={length}, min_decoding_length={length}"
        setting = competitor.setting(task) or Setting(1, task.threads)
        title = f"{competitor.title}: {setting}" if competitor.best else competitor.title
        workers = f"inter_threads={setting.workers}, intra_threads={setting.threads}"
        script = _CTRANSLATE2.format(threads=workers, options=options)
        stored = "int8" if type.startswith("int8") else "float32"
        folder = str(task.folder / f"ctranslate2-{stored}")
        return {title: Command(["-c", script, folder, pieces, type], setting.environment)}
    options = ""
    if length is not None:
        options = f", max_length=None, max_new_tokens={length}, min_new_tokens={length}"
    script = _HUGGINGFACE.format(threads=threads, options=options)
    return {competitor.title: Command(["-c", script, str(task.folder / "marian"), pieces, type])}
