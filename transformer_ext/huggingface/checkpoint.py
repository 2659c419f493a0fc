"""The tensors of a Hugging Face directory: safetensors or ``.bin``, whole or in several files.

Nothing is converted before it is asked for, so that a model takes the memory of its weights, and not
of a second copy.
"""

from __future__ import annotations

import reprlib
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from transformer_ext.files import FileError, Tensors, Weights, is_file_name, read_json
from transformer_ext.huggingface.fields import HuggingFaceError

if TYPE_CHECKING:
    import numpy as np

#: What safetensors calls a floating type -> what people call it.
FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


class _File(Protocol):
    """A file of tensors: what :class:`Tensors` has."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    types: dict[str, str]

    def mapped(self, name: str) -> np.ndarray: ...

    def as_float32(self, name: str) -> np.ndarray: ...

    def floats(self, name: str) -> memoryview[float] | None: ...


class _TorchFile:
    """A file of ``torch.save``, read without running what it may hold."""

    def __init__(self, path: Path) -> None:
        import torch

        self.path = path
        try:
            # Without weights_only a file may run any program. Only the newer format can be mapped.
            found = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
        except Exception as error:  # torch names no exceptions for broken files
            reason = str(error).strip().split("\n")[0][:300]
            raise FileError(f"{path}: broken, or holds more than tensors: {reason}") from None
        if not isinstance(found, dict) or not all(
            isinstance(name, str)
            and isinstance(value, torch.Tensor)
            and value.layout == torch.strided
            and value.device.type == "cpu"
            and not value.is_quantized
            for name, value in found.items()
        ):
            raise FileError(f"{path}: expected tensors by name")
        self._tensors: dict[str, torch.Tensor] = {
            name: value.detach() for name, value in found.items()
        }
        names = {
            torch.float16: "F16",
            torch.bfloat16: "BF16",
            torch.float32: "F32",
            torch.float64: "F64",
        }
        self.shapes = {name: tuple(value.shape) for name, value in self._tensors.items()}
        self.types = {
            name: names.get(value.dtype, str(value.dtype).removeprefix("torch."))
            for name, value in self._tensors.items()
        }

    def mapped(self, name: str) -> np.ndarray:
        array: np.ndarray = self._tensors[name].numpy()
        return array

    def as_float32(self, name: str) -> np.ndarray:
        array: np.ndarray = self._tensors[name].float().numpy()
        return array

    def floats(self, name: str) -> memoryview[float] | None:
        return None


class Checkpoint:
    """The tensors of a folder by name, and which of them nobody has asked for yet.

    Args:
        folder: with ``model.safetensors`` or ``pytorch_model.bin``, or with the ``.index.json`` of
            either and the files that this names.

    Attributes:
        path: the file, or the index.
        shapes: shape of each tensor by name.
        left: names of the tensors that nobody has asked for.

    Raises:
        FileError: no weights, or broken ones.
    """

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, _File] = {}
        self._theirs: dict[str, str] = {}
        self.path = self._open(folder)
        self.shapes = {name: file.shapes[name] for name, file in self._files.items()}
        self.left = set(self.shapes)

    def _open(self, folder: Path) -> Path:
        for name in ("model.safetensors", "pytorch_model.bin"):
            path = folder / name
            if path.is_file():
                file = _open(path)
                self._files = dict.fromkeys(file.shapes, file)
                return path
            index = folder / f"{name}.index.json"
            if index.is_file():
                self._open_parts(index)
                return index
        raise FileError(f"{folder}: has neither model.safetensors nor pytorch_model.bin")

    def _open_parts(self, index: Path) -> None:
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise FileError(
                f"{index}: weight_map: got {reprlib.repr(places)}, expected the file of each tensor"
            )
        files: dict[str, _File] = {}
        for name, part in places.items():
            if not is_file_name(part):
                raise FileError(
                    f"{index}: weight_map: {name}: got {reprlib.repr(part)}, expected the name of "
                    "a file in this folder"
                )
            if part not in files:
                path = index.parent / part
                if not path.is_file():
                    raise FileError(f"{path}: no such file, but {index.name} names it")
                files[part] = _open(path)
            if name not in files[part].shapes:
                raise FileError(
                    f"{files[part].path}: {name} is missing, but {index.name} has it there"
                )
            self._files[name] = files[part]
        for file in files.values():
            for name in file.shapes:
                if name not in self._files:
                    raise FileError(f"{file.path}: {name} is there, but not in {index.name}")

    @property
    def paths(self) -> list[Path]:
        """All files that hold tensors."""
        return list(dict.fromkeys(file.path for file in self._files.values()))

    @property
    def types(self) -> str:
        """The types of the floating-point tensors, for a person to read."""
        found = {FLOATS.get(file.types[name]) for name, file in self._files.items()}
        return " and ".join(sorted(name for name in found if name is not None))

    def rename(self, names: Mapping[str, str]) -> None:
        """Give tensors other names.

        Args:
            names: the new name of each tensor by the old one.

        Raises:
            FileError: two tensors come to have one name.
        """
        old: dict[str, str] = {}
        for name in self.shapes:
            new = names.get(name, name)
            if new in old:
                raise FileError(f"{self.path}: {old[new]} and {name} are one weight, there twice")
            old[new] = name
        self._theirs = old
        self.shapes = {new: self.shapes[name] for new, name in old.items()}
        self.left = set(self.shapes)

    def their_name(self, name: str) -> str:
        """The name of a tensor in the file, for messages."""
        return self._theirs.get(name, name)

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor; of one that is missing, the file to look in."""
        there = self._files.get(self.their_name(name))
        return self.path if there is None else there.path

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def claim(self, name: str, shape: Sequence[int] | None = None) -> str:
        """Note that a tensor is part of the model; returns its name.

        Args:
            name: of the tensor.
            shape: that it must have; None: any.

        Raises:
            FileError: it is missing, of another shape, or not of floating-point numbers.
        """
        if name not in self.shapes:
            raise FileError(f"{self.path}: {name} is missing")
        self.left.discard(name)
        theirs = self.their_name(name)
        file = self._files[theirs]
        if shape is not None and self.shapes[name] != tuple(shape):
            raise FileError(
                f"{file.path}: {theirs} has the shape {list(self.shapes[name])}, expected "
                f"{list(shape)} as config.json has it"
            )
        if file.types[theirs] not in FLOATS:
            raise FileError(
                f"{file.path}: {theirs}: got {file.types[theirs]}, expected one of "
                f"{', '.join(FLOATS)}"
            )
        return name

    def ignore(self, name: str) -> None:
        """Note that a tensor is known, and not needed."""
        self.left.discard(name)

    def view(self, name: str) -> np.ndarray:
        """A tensor in float32, possibly read-only and as it lies in the file.

        Raises:
            FileError: it has a number that is none.
        """
        import numpy as np

        theirs = self.their_name(name)
        file = self._files[theirs]
        if file.types[theirs] == "F32":
            array = file.mapped(theirs)
        else:
            array = file.as_float32(theirs)
        if file.types[theirs] != "F64":
            _check_finite(file.path, theirs, array)
            return array
        with np.errstate(over="ignore"):
            array = np.asarray(array, np.float32)
        _check_finite(file.path, theirs, array)
        return array

    def take(self, name: str) -> np.ndarray:
        """A tensor in float32, noted as part of the model; errors as of :meth:`claim`."""
        import numpy as np

        return np.array(self.view(self.claim(name)), np.float32, order="C")

    def floats(self, name: str) -> memoryview[float] | None:
        """See :meth:`transformer_ext.files.Tensors.floats`."""
        import numpy as np

        theirs = self.their_name(name)
        view = self._files[theirs].floats(theirs)
        if view is not None:
            _check_finite(self._files[theirs].path, theirs, np.asarray(view))
        return view

    def equal(self, first: str, second: str) -> bool:
        """Whether two tensors hold the same numbers."""
        import numpy as np

        return np.array_equal(self.view(first), self.view(second))

    def refuse_left(self, known: Mapping[str, str] | None = None) -> None:
        """Refuse what nobody has asked for.

        Args:
            known: beginnings of names, and what such a tensor is a part of.

        Raises:
            HuggingFaceError: there is such a tensor.
        """
        if not self.left:
            return
        first, *more = sorted(self.left)
        others = f" (and {len(more)} more)" if more else ""
        what = "is no part of a model as config.json has it"
        for prefix, part in (known or {}).items():
            if first.startswith(prefix):
                what = f"is part of {part}, which is not supported"
        raise HuggingFaceError(f"{self.file_of(first)}: {self.their_name(first)}: {what}{others}")


def _open(path: Path) -> _File:
    return Tensors(path) if path.suffix == ".safetensors" else _TorchFile(path)


def _check_finite(path: Path, name: str, array: np.ndarray) -> None:
    import numpy as np

    # NaN and infinity stay in a sum, which takes a third of the time.
    with np.errstate(all="ignore"):
        if not np.isfinite(array.sum()) and not np.isfinite(array).all():
            raise FileError(f"{path}: {name}: has NaN or infinity")


def _transposed(array: np.ndarray) -> np.ndarray:
    """A copy with columns for rows."""
    import numpy as np

    result = np.empty(array.shape[::-1], array.dtype)
    # A cache line of the result at a time: of [768, 3072] five times as fast as numpy's own.
    for begin in range(0, len(array), 16):
        result[:, begin : begin + 16] = array[begin : begin + 16].T
    return result


@dataclass(frozen=True)
class Parts:
    """What one weight of ours is made of.

    Attributes:
        names: tensors of theirs; rows of several are joined.
        transposed: whether theirs have inputs for rows, as ``Conv1D`` has.
    """

    names: tuple[str, ...]
    transposed: bool = False


class ConvertedWeights(Weights):
    """Weights by our names, each made of the tensors of a checkpoint when asked for.

    Args:
        checkpoint: the tensors.
        parts: what each of our weights is made of.
        shapes: shape of each of our weights.

    Raises:
        FileError: a tensor is missing or does not fit.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        parts: Mapping[str, Parts],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        self.path = checkpoint.path
        self.files = tuple(checkpoint.paths)
        self.shapes = dict(shapes)
        self._checkpoint = checkpoint
        self._parts = {name: parts[name] for name in self.shapes}
        for name, part in self._parts.items():
            shape = self.shapes[name]
            if part.transposed:
                shape = shape[::-1]
            elif len(part.names) > 1:
                shape = (shape[0] // len(part.names), *shape[1:])
            for theirs in part.names:
                checkpoint.claim(theirs, shape)

    def __getitem__(self, name: str) -> np.ndarray:
        import numpy as np

        part = self._parts[name]
        if len(part.names) > 1:
            return np.concatenate([self._checkpoint.view(theirs) for theirs in part.names])
        array = self._checkpoint.view(part.names[0])
        return _transposed(array) if part.transposed else np.array(array, np.float32, order="C")

    def mapped(self, name: str) -> np.ndarray:
        part = self._parts[name]
        if len(part.names) > 1 or part.transposed:
            return self[name]
        return self._checkpoint.view(part.names[0])

    def floats(self, name: str) -> memoryview[float] | None:
        part = self._parts[name]
        if len(part.names) > 1 or part.transposed:
            return None
        return self._checkpoint.floats(part.names[0])

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)
