"""Build, loading of the compiled files, `info`, the console script."""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from benchmark_files import benchmark

from transformer_ext import __main__ as console
from transformer_ext import __version__, _build_stamp, _native, info
from transformer_ext.inference.engine import resolve_compute_type
from transformer_ext.ops import _backend

ROOT = Path(__file__).resolve().parent.parent


def run_python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_import_is_lazy():
    result = run_python(
        "import sys, transformer_ext; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    )
    assert result.stdout == "[]\n", result.stderr


def test_compiled_files_are_those_of_this_source():
    compiled = _native.find_compiled()
    assert compiled is not None, _native.repair_command()
    assert not compiled.stale, _native.repair_command()
    assert _native.load_ops(), _native.ops_error()
    assert _native.ops_error() == ""


def test_native_needs_no_torch():
    result = run_python(
        "import sys; from transformer_ext._native import native; native().isa(); "
        "print('torch' in sys.modules)"
    )
    assert result.stdout == "False\n", result.stderr


def test_threads_within_affinity():
    assert 1 <= _native.native().default_threads() <= len(os.sched_getaffinity(0))


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512_bf16"])
def test_isa_override_lowers_or_fails_loudly(isa):
    levels = ["baseline", "avx2", "avx512", "avx512_bf16"]
    result = run_python(
        "from transformer_ext._native import native; print(native().isa())",
        TRANSFORMER_EXT_ISA=isa,
    )
    best = _native.native().best_isa()
    if levels.index(isa) <= levels.index(best):
        assert result.stdout == f"{isa}\n", result.stderr
    else:
        assert f"TRANSFORMER_EXT_ISA={isa}" in result.stderr and best in result.stderr


def test_isa_override_refuses_unknown_names():
    result = run_python(
        "from transformer_ext import info; raise SystemExit(info.main([]))",
        TRANSFORMER_EXT_ISA="sse9",
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "error: TRANSFORMER_EXT_ISA=sse9: expected one of baseline, avx2, avx512, avx512_bf16\n"
    )


def test_train_without_torch_names_the_cure():
    result = run_python(
        "import sys, runpy; sys.modules['torch'] = None; sys.argv[1:] = ['--help']; "
        "runpy.run_module('transformer_ext.train', run_name='__main__')"
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: torch does not import (")
    assert result.stderr.endswith("). To mend it: pip install 'torch>=2.11'\n")


def test_stamp_changes_with_a_source_and_not_with_a_test(tmp_path):
    folder = tmp_path / "csrc" / "thing"
    folder.mkdir(parents=True)
    (folder / "thing.cpp").write_text("1")
    first = _build_stamp.source_stamp(tmp_path)
    (folder / "thing_test.cpp").write_text("1")
    assert _build_stamp.source_stamp(tmp_path) == first
    (folder / "thing.cpp").write_text("2")
    assert _build_stamp.source_stamp(tmp_path) != first


def test_info_json():
    result = subprocess.run(
        [sys.executable, "-m", "transformer_ext.info", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = json.loads(result.stdout)
    assert (result.returncode, found["problems"]) == (0, [])
    assert found["transformer_ext"]["version"] == __version__
    assert found["torch"]["cpu_ops"] is True
    assert found["cpu"]["isa"]
    decoding = found["cpu"]["decoding"]
    assert decoding["compute_type_auto"] == resolve_compute_type("auto")
    assert decoding["int8_instruction"] == _native.native().int8_instruction()


@pytest.mark.parametrize(("isa", "feature"), [("avx2", "avx_vnni"), ("avx512", "vnni")])
def test_int8_takes_vnni_where_the_machine_has_it(isa, feature):
    features = _native.native().cpu_features()
    if not features[isa]:
        pytest.skip(f"this machine does not have {isa}")
    result = run_python(
        "from transformer_ext._native import native; print(native().int8_instruction())",
        TRANSFORMER_EXT_ISA=isa,
    )
    # The compiler may be too old for AVX-VNNI.
    compiled = isa == "avx512" or _native.find_compiled().info["avx_vnni"] == "1"
    if features[feature] and compiled:
        expected = {"avx2": "vpdpbusd (AVX-VNNI)", "avx512": "vpdpbusd (AVX512_VNNI)"}[isa]
    else:
        name = {"avx2": "AVX2", "avx512": "AVX-512"}[isa]
        expected = f"vpmaddwd ({name} without VNNI)"
    assert result.stdout == f"{expected}\n", result.stderr


def test_info_names_the_nearest_option(capsys):
    with pytest.raises(SystemExit) as stop:
        info.main(["--jsom"])
    assert stop.value.code == 2
    assert "unknown option '--jsom'; did you mean '--json'?" in capsys.readouterr().err


def test_info_without_torch():
    result = run_python(
        "import sys; sys.modules['torch'] = None; from transformer_ext import info; "
        "sys.exit(info.main([]))"
    )
    assert result.returncode == 1, result.stderr
    assert "PROBLEM: torch does not import" in result.stdout
    assert "pip install 'torch>=2.11'" in result.stdout
    assert "isa: " in result.stdout


def test_info_without_compiled_files():
    result = run_python(
        "import sys; from transformer_ext import _native, info; "
        "_native._candidates = lambda: []; sys.exit(info.main([]))"
    )
    assert result.returncode == 1, result.stderr
    assert "PROBLEM: Nothing compiled was found. To build it: " in result.stdout


def test_a_broken_library_is_told(tmp_path):
    (tmp_path / "build_info.json").write_text('{"python": "3.1"}')
    (tmp_path / "_ops.so").write_text("not a library")
    result = run_python(
        "import sys, warnings; warnings.simplefilter('ignore'); "
        "from pathlib import Path; from transformer_ext import _native, info; "
        f"_native._candidates = lambda: [Path({str(tmp_path)!r})]; "
        "print(_native.load_ops()); sys.exit(info.main([]))"
    )
    assert result.returncode == 1, result.stderr
    assert result.stdout.startswith("False\n")
    assert "holds no _C for Python" in result.stdout
    assert "invalid ELF header" in result.stdout or "file too short" in result.stdout


def test_a_gpu_that_no_kernel_was_built_for_takes_pytorch(monkeypatch, capsys):
    """Not a crash in the first op; said once for all ops of the GPU."""
    x = SimpleNamespace(
        device=torch.device("cuda:1"), dtype=torch.float16, is_floating_point=lambda: True
    )
    monkeypatch.setattr(_backend, "Tensor", SimpleNamespace)
    problems = {0: "", 1: "no kernel image"}
    monkeypatch.setattr(_backend, "cuda_problem", problems.get)
    monkeypatch.setattr(_backend, "has_kernel", lambda op, device: True)
    monkeypatch.setattr(_backend, "_said", set())
    with _backend.set_backend("auto"):
        assert not _backend.use_compiled("masked_softmax", x)
        assert not _backend.use_compiled("activation_forward", x)
        x.device = torch.device("cuda:0")
        assert _backend.use_compiled("masked_softmax", x)
    assert capsys.readouterr().err.splitlines() == [
        "transformer_ext: the compiled ops do not run on cuda:1: no kernel image; running the "
        "plain PyTorch reference instead"
    ]
    gpus = [
        SimpleNamespace(major=major, minor=0, name="a GPU", total_memory=2**34)
        for major in (9, 7, 9)
    ]
    asked = []
    cuda = SimpleNamespace(
        device_count=lambda: 3, current_device=lambda: 2, get_device_properties=gpus.__getitem__
    )
    monkeypatch.setattr(
        _native, "cuda_problem", lambda index: asked.append(index) or problems.get(index, "")
    )
    devices = info._cuda_devices(SimpleNamespace(cuda=cuda), _native.LoadedOps(True, True))
    assert [device["compiled_kernels"] for device in devices] == [
        "yes",
        "no, plain PyTorch instead: no kernel image",
        "yes",
    ]
    # No context on a GPU that is another process's.
    assert asked == [2, 1]
    x.device = torch.device("cuda:1")
    with (
        _backend.set_backend("compiled"),
        pytest.raises(RuntimeError, match="cuda:1: no kernel image"),
    ):
        _backend.use_compiled("masked_softmax", x)


def test_a_gpu_that_failed_for_the_moment_is_asked_again(monkeypatch):
    answers = [(b"out of memory", 0), (b"no kernel image", 1)]

    def ask(lasts):
        text, lasts._obj.value = answers.pop(0)
        return text

    library = SimpleNamespace(transformer_ext_cuda_problem=ask)
    monkeypatch.setattr(_native, "_cuda_problems", {})
    monkeypatch.setattr(_native, "loaded_ops", lambda: _native.LoadedOps(True, True))
    monkeypatch.setattr(_native, "_compiled", lambda: _native.Compiled(Path()))
    monkeypatch.setattr(_native.ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    said = [_native.cuda_problem(1) for _ in range(3)]
    assert said == ["out of memory", "no kernel image", "no kernel image"] and not answers


def test_console_lists_only_commands_that_exist(capsys):
    assert console.main([]) == 0
    shown = capsys.readouterr().out
    for name in console.COMMANDS:
        module = f"transformer_ext.{name.replace('-', '_')}"
        exists = importlib.util.find_spec(module) is not None
        assert (f"\n  {name} " in shown) == exists
    assert console.main(["no-such-command"]) == 2
    assert "no command 'no-such-command'" in capsys.readouterr().err
    for name in ("fill-mask", "fill_mask"):
        with pytest.raises(SystemExit, match="0"):
            console.main([name, "--help"])
    assert console.main(["--version"]) == 0


def test_console_runs_a_command(capsys):
    assert console.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []


@pytest.mark.parametrize(
    ("given", "after"),
    [
        ({}, {"GOMP_SPINCOUNT": "2000"}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"GOMP_SPINCOUNT": ""}, {"GOMP_SPINCOUNT": "2000"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
    ],
)
def test_training_alone_shortens_the_waits_of_openmp_unless_they_are_set(monkeypatch, given, after):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # So that it is put back, whoever sets it.
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)

    def waits():
        return {n: v for n, v in os.environ.items() if n in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}

    ran = SimpleNamespace(main=lambda arguments: 0)
    monkeypatch.setattr(console.importlib, "import_module", lambda name: ran)
    # Where torch has been imported it would have no effect.
    assert console.main(["train"]) == 0 and waits() == given
    monkeypatch.delitem(sys.modules, "torch")
    assert console.main(["info"]) == 0 and waits() == given
    assert console.main(["train"]) == 0 and waits() == after


@pytest.mark.skipif(
    importlib.util.find_spec("scikit_build_core") is None, reason="needs scikit-build-core"
)
def test_backend_asks_for_torch_only_where_none_fits(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("backend", ROOT / "build_backend" / "backend.py")
    backend = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(backend)
    monkeypatch.setattr(backend, "_torch_folders", lambda: [tmp_path])
    assert backend._torch_requirement() == ["torch>=2.11"]
    (tmp_path / "version.py").write_text("__version__ = '2.9.1+cpu'\n")
    assert backend._torch_requirement() == ["torch>=2.11"]
    (tmp_path / "version.py").write_text("__version__ = '2.11.0+cu130'\n")
    assert backend._torch_requirement() == []
    assert backend._with_torch({"a": "b"}) == {
        "a": "b",
        "cmake.define.TRANSFORMER_EXT_TORCH": str(tmp_path),
    }


@pytest.fixture
def gpu_check(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return benchmark("gpu_check")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_gpu_check_without_a_gpu_says_so_and_writes_nothing(gpu_check, tmp_path, capsys):
    assert gpu_check.main(["--output", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and "finds no GPU" in printed.err
    assert not printed.out and not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        gpu_check.main(["--only", "benchmarks"])
    assert (
        "no stage 'benchmarks'; there are: build, load, check, training" in capsys.readouterr().err
    )


def test_gpu_check_a_stage_that_fails_or_hangs_hides_no_other(
    gpu_check, tmp_path, monkeypatch, capsys
):
    row = (
        '{"benchmark": "softmax", "case": "8x8", "seconds": {"ours": 2, "torch": 3, "copy": 1.8}, '
    )
    row += '"bytes": 5e8}'
    stages = [
        gpu_check.Stage("fails", [["sh", "-c", "echo reason; exit 3"], ["false"]], 30),
        gpu_check.Stage("is not there", [["/no/such/program"]], 30),
        gpu_check.Stage("hangs", [["sh", "-c", "sleep 60 & sleep 60"]], 0.05),
        gpu_check.Stage("no tool", [[""]], 30),
        gpu_check.Stage("kernels", [["sh", "-c", f"echo '{row}' > {{saved}}; echo last"]], 30),
        gpu_check.Stage("late", [["true"]], 1e6),
    ]
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_check, "stages", lambda *_: stages)
    monkeypatch.setattr(gpu_check, "test_text", lambda _: None)
    monkeypatch.setattr(gpu_check, "facts_of_machine", lambda: {"GPU": "none"})
    output = tmp_path / "out"
    assert gpu_check.main(["--dry", "--output", str(output), "--skip", "late"]) == 1
    wanted = ["failed", "failed", "timeout", "not found", "ok", ""]
    assert [stage.status for stage in stages] == wanted
    assert [stage.said for stage in stages[:2]] == [
        "reason",
        "/no/such/program: No such file or directory",
    ]
    text = (output / "table.txt").read_text()
    assert "--- fails: failed\nreason" in text
    assert "90% of copy (median), 90% (8x8), 1.5x torch     85%  met" in text
    lines = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    assert [line["benchmark"] for line in lines if "benchmark" in line] == ["softmax"]
    assert (
        gpu_check.main(["--dry", "--output", str(output), "--only", "late", "--budget", "3"]) == 0
    )
    assert stages[-1].status == "no time left"
    assert f"--dry --output {output / 'rest'} --only late\n" in capsys.readouterr().out
    # Without the kernels nothing else is measured.
    stages[:] = [gpu_check.Stage(name, [["false"]], 30) for name in ("load", "kernels")]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gpu_check.main(["--output", str(output)]) == 1
    assert [stage.status for stage in stages] == ["failed", "not built"]


def test_gpu_check_every_kernel_is_run(gpu_check):
    every = benchmark("every_kernel")
    names = set()
    for case in every.cases(torch.bfloat16, every.SMALL):
        every.run(case)
        names.add(case.function.__name__)
    assert names >= {"residual_norm", "linear_cross_entropy", "cross_attention_packed"}
    leaf = torch.tensor([-1.0], requires_grad=True)
    with pytest.raises(ArithmeticError, match="root: the result is not a number"):
        every.run(every.Case("root", (), torch.sqrt, torch.sqrt, {"input": leaf}))


def test_gpu_check_figures_against_what_is_wanted(gpu_check):
    def attention(case, size=5e8, **seconds):
        row = {"benchmark": "attention", "case": case, "seconds": seconds, "bytes": size}
        return row | {"op_by_op": ["nested"]}

    rows = [
        attention("forward 64 bfloat16", ours=1e-5, copy=8e-6, nested=2e-5, flash=1.6e-5),
        attention("backward mix bfloat16", ours=1e-5, copy=5e-6, nested=2e-5),
        attention("forward 2048 bfloat16", ours=1e-5, copy=1e-6, flash=6e-6),
        attention("forward 64 bfloat16", ours=1e-5, copy=8e-6),
        attention("forward 64 bfloat16", size=2e8, ours=1e-5, copy=8e-6, nested=2e-5),
        attention("forward 64 bfloat16", copy=8e-6) | {"failed": "too large"},
    ]
    lines = gpu_check.attention_lines(rows, "")
    verdicts = ["met", "NOT MET", "met", "NOT MET", "within caches", "NOT MET"]
    assert [line[-1] for line in lines] == verdicts
    assert lines[0][1].endswith("80% of copy, 1.60x flash")
    assert lines[1][1].endswith("2.00x nested (op by op)") and lines[5][1] == "FAILED: too large"

    def training(tokens, seconds, graphs):
        facts = {"seconds": {"0": [seconds]}, "memory": 1 << 30, "graphs": graphs}
        setting = f"base, {tokens} target tokens a batch, a GPU"
        return {"setting": setting, "target_tokens": [900_000], "results": {"ours-bfloat16": facts}}

    lines = gpu_check.training_lines([training("25,000", 1.0, 4), training("4,096", 1.5, 0)])
    assert [line[1:] for line in lines] == [
        ["900,000 tokens/s, 1.0 GiB, 4 graphs", "850,000", "met"],
        ["600,000 tokens/s, 1.0 GiB, NO GRAPHS", "675,000", "NOT MET"],
    ]
    facts = {"seconds": [0.25, 0.25, 0.5], "tokens": [9000, 10_000, 11_000]}
    lines = gpu_check.decoding_lines([{"case": [512, 4], "results": {"ours-bfloat16": facts}}])
    assert [line[1] for line in lines] == ["1.00 s for the test text, 30,000 tokens/s"]
