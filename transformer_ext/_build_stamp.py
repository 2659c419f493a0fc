"""The stamp over the C++ and CUDA sources that ties a compiled file to the code it was made from.

Used from both sides: CMake runs this file to write `build_info.json`; at run time a source tree
compares that stamp with its own. So it imports nothing of the package.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

SUFFIXES = frozenset({".cpp", ".h", ".cu", ".cuh"})


def source_stamp(root: Path) -> str:
    """Hash of the names and contents of the sources under `root`/csrc, tests left out."""
    digest = hashlib.sha256()
    csrc = root / "csrc"
    for path in sorted(csrc.rglob("*")):
        if path.suffix in SUFFIXES and not path.name.endswith("_test.cpp"):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(csrc).as_posix()} {len(content)}\n".encode())
            digest.update(content)
    return digest.hexdigest()[:16]


def main() -> None:
    """`_build_stamp.py <source root> <output> key=value ...`, called by the build."""
    root, output, *pairs = sys.argv[1:]
    info = dict(pair.split("=", 1) for pair in pairs)
    info["stamp"] = source_stamp(Path(root))
    Path(output).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
