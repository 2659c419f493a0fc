"""Where the time of one training step goes: shares by kind of operation, by torch's profiler.

The same steps as in ``benchmarks/training.py``, of this package and of ``nn.Transformer``, one after
the other in this process, all with the malloc settings of our train command. An operation counts
with the time that it spends itself, on the thread that calls it, which waits for the threads that
help; what no operation accounts for is Python. The profiler makes a step a few percent longer.

    python benchmarks/step_shares.py --preset small --max-tokens 2048 --markdown
"""

from __future__ import annotations

import argparse
import re
import time
from collections import Counter
from typing import Any

import torch
from processes import machine, say, table
from torch.profiler import ProfilerActivity, profile
from training import make_task
from training_peers import COMPETITORS, Task

from transformer_ext.training.environment import keep_freed_memory

#: Kind -> names of its operations; the first that fits counts. What is left is "the rest".
KINDS = {
    "matrix products": r"gemm_(linear|matmul|pack)_|aten::(mm|addmm|addmm_)$",
    "attention": r"[aA]ttention|aten::(bmm|baddbmm|_softmax|where|isneginf|masked_fill)",
    "norm, residual, its dropout": r"residual_norm|ResidualNorm|layer_norm",
    "activation, its dropout": r"activation|Activation|aten::(relu|clamp_min|threshold_backward)",
    "loss": r"cross_entropy|CrossEntropy|log_softmax|nll_loss",
    "embedding": r"embedding|Embedding",
    "dropout by itself": r"aten::(bernoulli_|div_|native_dropout|mul)$",
    "casts, copies, filling": r"aten::(copy_|_to_copy|fill_|zero_|clone)$",
}
ADAM = "Adam and norm of the gradients"
REST = "the rest: sums, autograd, Python"


def kind_of(event: Any) -> str:
    """Of an operation; what the optimizer calls is the optimizer's."""
    above = event
    while above is not None:
        if re.search(r"^Optimizer\.|_fused_adam|vector_norm|_foreach_norm", above.name):
            return ADAM
        above = above.cpu_parent
    return next((kind for kind, names in KINDS.items() if re.search(names, event.name)), REST)


def shares(key: str, task: Task, steps: int) -> tuple[float, dict[str, float]]:
    """Seconds of a step, and the share of each kind of operation in it."""
    step = COMPETITORS[key].make(task)
    for index in range(len(task.batches)):
        step(index)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        start = time.perf_counter()
        for number in range(steps):
            step(number % len(task.batches))
        seconds = time.perf_counter() - start
    spent: Counter[str] = Counter()
    for event in profiled.events():
        spent[kind_of(event)] += event.self_cpu_time_total / 1e6
    spent[REST] += seconds - sum(spent.values())
    return seconds / steps, {kind: spent[kind] / seconds for kind in (*KINDS, ADAM, REST)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=["tiny", "small", "base", "big"], default="small")
    parser.add_argument("--max-tokens", type=int, default=2048, help="target tokens a batch")
    parser.add_argument("--batches", type=int, default=3, help="different batches")
    parser.add_argument("--steps", type=int, default=6, help="steps to profile")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--only",
        nargs="+",
        choices=[key for key, each in COMPETITORS.items() if each.group in ("ours", "nn")],
        default=["ours-bfloat16", "nn-autocast-fused", "nn-float32"],
        help="whose step",
    )
    parser.add_argument("--markdown", action="store_true", help="print a table for a document")
    options = parser.parse_args()
    options.norm_first, options.device = False, "cpu"
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    task = make_task(options)
    columns = []
    for key in options.only:
        say(f"... {COMPETITORS[key].title}")
        columns.append(shares(key, task, options.steps))
    rows = [
        [kind, *(f"{found[kind]:.1%}" for _, found in columns)] for kind in (*KINDS, ADAM, REST)
    ]
    rows.append(["a step", *(f"{1e3 * seconds:.0f} ms" for seconds, _ in columns)])
    print(
        f"\n{options.preset}, {options.max_tokens:,} target tokens a batch; {options.threads} "
        f"threads, {machine()}, torch {torch.__version__}\n"
    )
    titles = [COMPETITORS[key].title for key in options.only]
    print("\n".join(table(["", *titles], rows, options.markdown)))


if __name__ == "__main__":
    main()
