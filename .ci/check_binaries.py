"""Checks of the compiled files that no test of results can make.

    check_binaries.py <CMake build folder> [<folder of _ops.so and _ops_cuda.so> ...]

1. The kernels of an instruction set hold no instruction beyond it: else they would crash on a
   machine of that level, which the machines that run the tests are not.
2. They define no weak symbol: of the copies compiled for each instruction set, the linker would
   keep one for all.
3. The op libraries need nothing of torch but the stable C interface of torch 2.11: else they would
   not load in an older or a later one.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

SHIMS = Path(__file__).resolve().parent.parent / "cmake" / "torch_2.11_shims.txt"

VNNI = r"\bvpdp(busd|wssd)"
BF16 = r"\bv(dpbf16|cvtne2?ps2?bf16|cvtneps2bf16)"
MASKED = r"\{%k|%k[0-7]\b"
UPPER_REGISTERS = r"%[xyz]mm(1[6-9]|2\d|3[01])\b"
# A regular expression over one line of disassembly, for what an instruction set lacks.
FORBIDDEN = {
    "baseline": re.compile(r"%ymm|%zmm|:\tv[a-z]"),
    "avx2": re.compile(rf"%zmm|{MASKED}|{UPPER_REGISTERS}|{VNNI}"),
    "avx2_vnni": re.compile(rf"%zmm|{MASKED}|{UPPER_REGISTERS}"),
    "avx512": re.compile(rf"{BF16}|{VNNI}"),
    "avx512_vnni": re.compile(BF16),
}

# Weak undefined symbols (null where torch has no CUDA) and what every library has.
ALLOWED = re.compile(
    r"_ITM_|__gmon_start__|__cxa_|_ZNSt|_ZNKSt|_ZSt|_ZTV|_ZTI|aoti_torch_get_current_cuda_stream$"
)


def lines(*command: str) -> Iterator[str]:
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return iter(result.stdout.splitlines())


def kernel_objects(build: Path, isa: str) -> list[Path]:
    folder = build / "CMakeFiles" / f"transformer_ext_kernels_{isa}.dir"
    return sorted(folder.rglob("*.o"))


def foreign_instructions(path: Path, isa: str) -> list[str]:
    if isa not in FORBIDDEN:
        return []
    found = []
    function = ""
    for line in lines("objdump", "-dC", "--no-show-raw-insn", str(path)):
        if line.endswith(">:"):
            function = line.split("<", 1)[1][:-2]
        elif FORBIDDEN[isa].search(line):
            found.append(f"{path.name} ({isa}): {line.strip()} in {function}")
    return found[:3]


def weak_symbols(path: Path, isa: str) -> list[str]:
    found = []
    for line in lines("nm", "-C", "--defined-only", str(path)):
        _, kind, name = line.split(maxsplit=2)
        # The pointer to the compiler's exception routine is the same in every copy.
        if kind in "WVu" and not name.startswith("DW.ref."):
            found.append(f"{path.name} ({isa}): weak symbol {name}")
    return found


def unknown_symbols(library: Path) -> list[str]:
    known = set(SHIMS.read_text(encoding="utf-8").split("\n"))
    found = []
    for line in lines("nm", "-D", "--undefined-only", str(library)):
        name = line.split()[-1]
        if "@" not in name and name not in known and not ALLOWED.match(name):
            found.append(f"{library.name}: needs {name}, which is not in {SHIMS.name}")
    return found


def main() -> int:
    build, *folders = map(Path, sys.argv[1:])
    problems: list[str] = []
    count = 0
    for isa in ("baseline", "avx2", "avx2_vnni", "avx512", "avx512_vnni", "avx512_bf16"):
        for path in kernel_objects(build, isa):
            count += 1
            problems += foreign_instructions(path, isa) + weak_symbols(path, isa)
    libraries = [path for folder in folders for path in sorted(folder.glob("_ops*.so"))]
    for library in libraries:
        problems += unknown_symbols(library)
    print("\n".join(problems))
    print(f"checked {count} kernel objects, {len(libraries)} libraries: {len(problems)} problems")
    return 1 if problems or not count else 0


if __name__ == "__main__":
    sys.exit(main())
