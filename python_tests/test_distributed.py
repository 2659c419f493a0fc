"""Several processes train one model: the same gradients, one end for all, no rank left waiting.

The ranks are forked, with the environment that torchrun gives; the last tests run torchrun itself.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import end_of, forked
from test_device_step import Emulated, OpByOp, weights
from test_resume import assert_same_run, events, live
from test_training import Numbers, small_model, trainer_for
from training_helpers import SMALL_MODEL, write_text

from transformer_ext import train
from transformer_ext.training import distributed
from transformer_ext.training import trainer as trainer_module
from transformer_ext.training.batches import Layout
from transformer_ext.training.checkpoint import Checkpoints
from transformer_ext.training.device_step import DeviceStep
from transformer_ext.training.distributed import GradientSum, World
from transformer_ext.training.trainer import LossModule, Plan, Trainer

ROOT = Path(__file__).resolve().parent.parent
_STORES: list[torch.distributed.TCPStore] = []
PLAN = Plan(max_steps=6, log_every=2, validate_every=100)


def start_ranks(size: int, body: Callable[[int], int | None], **environment: str) -> list[int]:
    """Processes that are ranks of one job; returns their process ids."""
    # As torchrun has it: the store outlives the ranks.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    _STORES.append(store)

    def rank_body(rank: int) -> Callable[[], int | None]:
        def run() -> int | None:
            signal.alarm(120)
            os.environ |= {
                **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)},
                **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)},
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                **environment,
            }
            torch.set_num_threads(1)
            return body(rank)

        return run

    return [forked(rank_body(rank)) for rank in range(size)]


def in_ranks(size: int, body: Callable[[int], int | None]) -> list[int]:
    """Runs the body on each rank; returns their exit statuses."""
    return [end_of(pid) for pid in start_ranks(size, body)]


# Gradients ----------------------------------------------------------------------------------------


def record_gradients(trainer: Trainer, steps: int) -> list[dict[str, torch.Tensor]]:
    """The gradients that the optimizer is given, step by step."""
    found: list[dict[str, torch.Tensor]] = []
    apply = trainer.optimizer.step

    def record(rate: float) -> None:
        named = trainer.optimizer.parameters.items()
        found.append({n: p.grad.clone() for n, p in named if p.grad is not None})
        apply(rate)

    trainer.optimizer.step = record  # type: ignore[method-assign]
    for _ in range(steps):
        trainer.train_step()
    return found


@pytest.mark.parametrize(("size", "accum"), [(2, 1), (2, 3), (4, 1), (4, 2)])
def test_gradients_are_those_of_one_process_on_the_same_batch(
    tmp_path: Path, size: int, accum: int
) -> None:
    # 22 examples in batches of 4: the last batch of an epoch is smaller, and steps cross its end.
    data = Numbers(examples=22)

    def rank_body(rank: int) -> int:
        world = World.join(torch.device("cpu"))
        stream = data.stream(accum_steps=accum, rank=rank, world_size=size)
        trainer = trainer_for(small_model(dropout=0.2), stream, PLAN, world=world)
        torch.save(record_gradients(trainer, 4), tmp_path / f"{rank}.pt")
        distributed.leave()
        return 0

    assert in_ranks(size, rank_body) == [0] * size
    single = trainer_for(small_model(dropout=0.2), data.stream(accum_steps=accum * size), PLAN)
    expected = record_gradients(single, 4)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(size)]
    for step in range(4):
        assert expected[step].keys() == ranks[0][step].keys()
        for name, gradient in expected[step].items():
            for rank in ranks[1:]:
                assert torch.equal(ranks[0][step][name], rank[step][name])
            got = ranks[0][step][name]
            if step == 0 and size * accum == 2:
                # One sum of two, and dividing by 2 is exact: nothing is rounded otherwise.
                assert torch.equal(got, gradient), name
            # Else the order of the sum differs. Adam then makes weights of it that differ, but little.
            scale = max(float(g.norm()) for g in expected[step].values())
            assert float((got - gradient).norm()) <= (1e-6 if step == 0 else 1e-3) * scale, name


def exchanged_numbers(data: Numbers, world: World, accum: int, steps: int) -> list[int]:
    """Size of each exchange of gradients between two ranks in that many steps."""
    found: list[int] = []

    # DDP refuses a hook whose annotations are text, as they are here.
    def hook(state, bucket):  # type: ignore[no-untyped-def]
        found.append(bucket.buffer().numel())
        torch.distributed.all_reduce(bucket.buffer())
        future: Any = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    stream = data.stream(accum_steps=accum, rank=world.rank, world_size=2)
    trainer = trainer_for(small_model(), stream, PLAN, world=world)
    trainer._parallel.register_comm_hook(None, hook)
    for _ in range(steps):
        trainer.train_step()
    assert sum(found) == steps * sum(p.numel() for p in trainer.optimizer.parameters.values())
    return found


def test_gradients_are_exchanged_once_a_step() -> None:
    data = Numbers()

    def rank_body(rank: int) -> int:
        world = World.join(torch.device("cpu"))
        counts = [len(exchanged_numbers(data, world, accum, 4)) for accum in (1, 3)]
        assert counts[0] == counts[1]
        distributed.leave()
        return 0

    assert in_ranks(2, rank_body) == [0, 0]


# CUDA graphs --------------------------------------------------------------------------------------


def record_steps(graphs: OpByOp) -> None:
    """From now on this process trains as one with several GPUs does, with a stand-in for graphs."""
    module: Any = trainer_module
    module._records_steps = lambda plan, device: plan.cuda_graphs
    module.CudaGraphs = lambda device: graphs


class Failing(Emulated):
    """Cannot record one of the two parts of a step: what Python does is done, what is queued is not."""

    def __init__(self, part: str) -> None:
        self.part = part

    def record(self, work: Callable[[], None]) -> Any:
        recorded = super().record(work)
        if (work.__name__ == "_apply") == (self.part == "update"):
            raise RuntimeError(f"the {self.part} cannot be recorded")
        return recorded

    def release(self, forget: Callable[[], None]) -> None:
        forget()


def test_recorded_steps_are_those_of_ddp(tmp_path: Path) -> None:
    data = Numbers(examples=26)

    def rank_body(rank: int) -> int:
        world = World.join(torch.device("cpu"))
        call = DeviceStep.__call__
        layouts: list[Any] = []

        def broken(
            self: DeviceStep, batches: Any, rate: float, normalizer: float, rng: Any
        ) -> None:
            layouts.append(Layout.of(batches))
            # The NaN of one rank, in the fifth step, is to be noticed by all.
            bad = rank == 1 and rng[0][1] == 5
            call(self, batches, rate, float("nan") if bad else normalizer, rng)

        DeviceStep.__call__ = broken  # type: ignore[method-assign]

        def trainer(graphs: OpByOp, steps: int, found: dict[str, Any] | None = None) -> Any:
            record_steps(graphs)
            # Other weights on each rank: those of the first one count.
            model = small_model(dropout=0.2, seed=rank)
            start = None
            if found is not None:
                model.load_state_dict(found["model"])
                start = found["position"]
            stream = data.stream(accum_steps=2, rank=rank, world_size=2, start=start)
            made = trainer_for(model, stream, PLAN, world=world)
            if found is not None:
                made.optimizer.load_state_dict(found["optimizer"])
                made.progress.step = found["step"]
            told: list[str] = []
            made._device_step._tell = told.append
            for _ in range(steps):
                made.train_step()
            return made, told

        def state(made: Trainer) -> list[torch.Tensor]:
            return [*weights(made.model), *made.optimizer.state_dict().values()]

        # DDP in the shapes of a GPU: each sum is of two numbers and a power of 2 divides exactly.
        trainer_module._records_steps = lambda plan, device: False
        ddp = trainer_for(
            small_model(dropout=0.2, seed=rank),
            data.stream(accum_steps=2, rank=rank, world_size=2),
            PLAN,
            world=world,
        )
        ddp._device_step._graphs = OpByOp()  # type: ignore[assignment]
        for _ in range(9):
            ddp.train_step()
        assert int(ddp.optimizer.skipped) == 1 and len(set(layouts)) > 1
        torch.save([hash(layout) for layout in layouts], tmp_path / f"layouts.{rank}")
        expected = [*state(ddp), ddp._sums]

        for part in ("", "batches", "update"):
            # One rank goes on op by op, the other with its graphs.
            graphs = Failing(part) if rank == 1 and part else Emulated()
            made, told = trainer(graphs, 6)
            found = {
                "model": {name: t.clone() for name, t in made.model.state_dict().items()},
                "optimizer": {n: t.clone() for n, t in made.optimizer.state_dict().items()},
                "position": made.stream.position,
                "step": made.progress.step,
            }
            for _ in range(3):
                made.train_step()
            assert isinstance(made._gradients, GradientSum)
            fails = isinstance(graphs, Failing)
            assert [part in text for text in told] == [True] * fails
            assert (made.graphs == 0) == fails
            if fails:
                with contextlib.redirect_stderr(io.StringIO()) as error:
                    made._say_no_graphs("why not")
                assert error.getvalue() == "rank 1: warning: why not; it runs op by op\n"
            assert (made._device_step._update_part.graph is None) == fails
            for a, b in zip([*state(made), made._sums], expected, strict=True):
                assert torch.equal(a, b), part

        resumed, _ = trainer(Emulated(), 3, found)
        for a, b in zip(state(resumed), expected, strict=False):
            assert torch.equal(a, b)

        with pytest.raises(RuntimeError, match=r"^source_embedding.weight: got no gradient"):
            resumed.model.generator.weight.grad = None
            resumed._gradients.collect()
        shapes = {"here": torch.nn.Parameter(torch.zeros(2 + rank))}
        with pytest.raises(ValueError, match="^parameters: got other names or shapes on some"):
            GradientSum(torch.nn.Module(), shapes, world)
        distributed.leave()
        return 0

    assert in_ranks(2, rank_body) == [0, 0]
    layouts = [torch.load(tmp_path / f"layouts.{rank}") for rank in (0, 1)]
    assert any(a != b for a, b in zip(*layouts, strict=True))


# The command --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("text")
    source, target = write_text(folder)
    arguments = [
        *("--src-train", str(source), "--tgt-train", str(target), "--held-out", "0.05"),
        *("--cache", str(folder / "cache"), *SMALL_MODEL, "--validation-sentences", "3"),
    ]
    assert end_of(forked(live(*arguments, "--dry-run"))) == 0
    return arguments


SCHEDULE = "--max-steps 12 --validate-every 6 --checkpoint-every 4 --log-every 3".split()


def test_four_processes_report_and_resume_as_the_whole_training(
    text: list[str], tmp_path: Path
) -> None:
    # Adam divides by the size of a gradient: with its tiny eps the rounding errors of gradients that
    # are 0 in theory, as those of the biases of keys, would count in full.
    options = [*text, *SCHEDULE, "--eps", "1e-3", "--dropout", "0.2"]
    single, four, broken = (tmp_path / name for name in ("single", "four", "broken"))
    assert end_of(forked(live(*options, "--accum-steps", "4", "--output", str(single)))) == 0
    assert in_ranks(4, lambda rank: live(*options, "--output", str(four))()) == [0] * 4
    for kind in ("train", "validation"):
        for one, all_ranks in zip(events(single, kind), events(four, kind), strict=True):
            assert one["nll"] == pytest.approx(all_ranks["nll"], rel=1e-5)
            assert one["target_tokens"] == all_ranks["target_tokens"]

    # Killed between two reports, all at once.
    step = Trainer.train_step

    def dying(rank: int) -> int:
        def die(self: Trainer) -> None:
            if self.progress.step == 9:
                os.kill(os.getpid(), signal.SIGKILL)
            step(self)

        Trainer.train_step = die  # type: ignore[method-assign]
        return live(*options, "--output", str(broken))()

    assert in_ranks(4, dying) == [-signal.SIGKILL] * 4
    assert Checkpoints(broken / "checkpoints").last() == 8
    assert in_ranks(4, lambda rank: live("--output", str(broken), "--resume")()) == [0] * 4
    assert_same_run(broken, four)


def test_another_number_of_processes_is_warned_of(
    text: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    options = [*text, *SCHEDULE, "--output", str(run)]
    assert in_ranks(2, lambda rank: live(*options)()) == [0, 0]
    capfd.readouterr()
    assert (
        end_of(forked(lambda: train.main(["--output", str(run), "--resume", "--max-steps", "14"])))
        == 0
    )
    assert "warning: processes was 2 and is 1 now" in capfd.readouterr().out
    assert json.loads((run / "results.json").read_text())["steps"] == 14


def wait_for_step(run: Path, step: int) -> None:
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        if (run / "log.jsonl").exists():
            seen = re.findall(r'"event": "train", "step": (\d+)', (run / "log.jsonl").read_text())
            if seen and int(seen[-1]) >= step:
                return
        time.sleep(0.01)
    pytest.fail("no progress")


LONG = "--max-steps 100000 --validate-every 100000 --checkpoint-every 5 --log-every 1".split()


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_killed_rank_ends_the_training_and_is_named(
    text: list[str], tmp_path: Path, lost: int, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    options = [*text, *LONG, "--output", str(run)]

    def body(rank: int) -> int:
        if lost == 1:
            record_steps(Emulated())
        return train.main(options)

    pids = start_ranks(3, body)
    wait_for_step(run, 7)
    began = time.monotonic()
    os.kill(pids[lost], signal.SIGKILL)
    assert end_of(pids[lost]) == -signal.SIGKILL
    assert [end_of(pid) for rank, pid in enumerate(pids) if rank != lost] == [1, 1]
    assert time.monotonic() - began < 30
    error = capfd.readouterr().err
    assert error.count("is gone without a word") == 1, error
    assert f"error: rank {lost} (process {pids[lost]} on {socket.gethostname()}) is gone" in error
    assert "--resume" in error and "Traceback" not in error
    # A smaller world goes on.
    assert end_of(forked(live("--output", str(run), "--resume", "--max-steps", "11"))) == 0


def test_a_rank_that_fails_tells_the_others_why(
    text: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    step = Trainer.train_step

    def body(rank: int) -> int:
        def fail(self: Trainer) -> None:
            if rank == 1 and self.progress.step == 3:
                raise MemoryError("no room for 7 GB")
            step(self)

        Trainer.train_step = fail  # type: ignore[method-assign]
        return train.main([*text, *LONG, "--output", str(tmp_path / "run")])

    pids = start_ranks(3, body)
    statuses = [end_of(pid) for pid in pids]
    assert statuses[0] == statuses[2] == 1 and statuses[1] != 0
    error = capfd.readouterr().err
    assert error.count("failed: no room for 7 GB") == 1
    assert f"error: rank 1 (process {pids[1]} on " in error


def test_all_ranks_skip_the_step_that_one_cannot_use(text: list[str], tmp_path: Path) -> None:
    forward = LossModule.forward

    def body(rank: int) -> int:
        calls = iter(range(1000))

        def broken(self: LossModule, *arguments: Any) -> Any:
            loss, *rest = forward(self, *arguments)
            return (loss * float("nan") if next(calls) == 4 and rank == 1 else loss, *rest)

        LossModule.forward = broken  # type: ignore[method-assign]
        return live(*text, *SCHEDULE, "--output", str(tmp_path / "run"))()

    assert in_ranks(2, body) == [0, 0]
    assert [e["step"] for e in events(tmp_path / "run", "skipped")] == [5]
    assert events(tmp_path / "run", "train")[-1]["skipped_steps"] == 1
    assert (tmp_path / "run/skipped/step-5.rank-1.json").is_file()


def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(
    text: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    pids = start_ranks(2, lambda rank: train.main([*text, *LONG, "--output", str(run)]))
    wait_for_step(run, 3)
    os.kill(pids[1], signal.SIGTERM)
    assert [end_of(pid) for pid in pids] == [130, 130]
    last = Checkpoints(run / "checkpoints").last_good(pytest.fail)
    assert last is not None and last >= events(run, "train")[-1]["step"]
    assert (
        f"torchrun --nproc-per-node 2 -m transformer_ext.train --output {run} --resume"
        in capfd.readouterr().out
    )


# torchrun -----------------------------------------------------------------------------------------


def torchrun(tmp_path: Path, options: list[str], *own: str) -> subprocess.Popen[str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *(*own, "-m", "transformer_ext.train", *options),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def rank_of(agent: int, rank: int) -> int:
    """Process id of a rank that torchrun has started."""
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == agent and f"\0RANK={rank}\0" in (folder / "environ").read_text():
                return int(folder.name)
        except (OSError, ValueError):
            continue
    raise ProcessLookupError(rank)


def test_torchrun_restarts_a_killed_rank_from_the_last_checkpoint(
    text: list[str], tmp_path: Path
) -> None:
    options = [*text, "--max-steps", "200", "--validate-every", "200", "--log-every", "1"]
    options += ["--checkpoint-every", "5", "--beam-size", "1"]
    run = tmp_path / "runs/001"
    with torchrun(tmp_path, options, "--max-restarts=1") as job:
        wait_for_step(run, 12)
        os.kill(rank_of(job.pid, 1), signal.SIGKILL)
        try:
            out, error = job.communicate(timeout=100)
        except subprocess.TimeoutExpired:
            job.send_signal(signal.SIGINT)
            raise
    assert job.returncode == 0, error[-3000:]
    assert re.search(r"error: rank 1 \(process \d+ on .*\) is gone without a word", error), error
    found = re.search(r"going on from step (\d+)", out)
    assert found and int(found[1]) >= 10
    assert not (tmp_path / "runs/002").exists()
    assert [e["step"] for e in events(run, "train")] == list(range(1, 201))
    # Two ranks add up two numbers: in any order the same.
    whole = tmp_path / "whole"
    assert in_ranks(2, lambda rank: live(*options, "--output", str(whole))()) == [0, 0]
    assert events(run, "train") == events(whole, "train")
    names = ("training.safetensors", "model.safetensors")
    for path in (Path("checkpoints/step-200") / name for name in names):
        assert (run / path).read_bytes() == (whole / path).read_bytes()
