"""PEP 517 backend: scikit-build-core, plus torch as a build requirement only where none is installed.

The ops are compiled against torch's headers. A fixed `torch` in `build-system.requires` would make
pip download the newest CUDA build (several GB) into the isolated build environment although the
user's own torch is right there; none at all would fail where torch is not installed yet. pip's
isolation hides the user's packages from `sys.path`, but `sys.prefix` still is the user's
environment, so torch can be looked up there. It is never imported: its headers and one library to
link with are all that is needed, and any torch >= 2.11 does, because only the stable ABI is used.
"""

from __future__ import annotations

import importlib.util
import re
import sysconfig
from pathlib import Path
from typing import Any

from scikit_build_core import build as _base
from scikit_build_core.build import (
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

_OLDEST_TORCH = (2, 11)

_Settings = dict[str, Any] | None


def _torch_folders() -> list[Path]:
    folders = [Path(sysconfig.get_path(kind)) / "torch" for kind in ("purelib", "platlib")]
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.submodule_search_locations:
        folders.insert(0, Path(spec.submodule_search_locations[0]))
    return folders


def find_torch() -> Path | None:
    """Folder of the installed torch, or None where there is none that is new enough."""
    for folder in _torch_folders():
        try:
            text = (folder / "version.py").read_text(encoding="utf-8")
        except OSError:
            continue
        version = re.search(r"^__version__ = ['\"](\d+)\.(\d+)", text, re.MULTILINE)
        if version and (int(version[1]), int(version[2])) >= _OLDEST_TORCH:
            return folder
    return None


def _torch_requirement() -> list[str]:
    return [] if find_torch() else ["torch>={}.{}".format(*_OLDEST_TORCH)]


def get_requires_for_build_wheel(config_settings: _Settings = None) -> list[str]:
    return [*_base.get_requires_for_build_wheel(config_settings), *_torch_requirement()]


def get_requires_for_build_editable(config_settings: _Settings = None) -> list[str]:
    return [*_base.get_requires_for_build_editable(config_settings), *_torch_requirement()]


def _with_torch(config_settings: _Settings) -> dict[str, Any]:
    settings = dict(config_settings or {})
    torch = find_torch()
    if torch is not None:
        settings.setdefault("cmake.define.TRANSFORMER_EXT_TORCH", str(torch))
    return settings


def build_wheel(
    wheel_directory: str,
    config_settings: _Settings = None,
    metadata_directory: str | None = None,
) -> str:
    return _base.build_wheel(wheel_directory, _with_torch(config_settings), metadata_directory)


def build_editable(
    wheel_directory: str,
    config_settings: _Settings = None,
    metadata_directory: str | None = None,
) -> str:
    return _base.build_editable(wheel_directory, _with_torch(config_settings), metadata_directory)
