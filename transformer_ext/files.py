"""Files that are either whole or not there, and the model directory. No pickles, no torch.

A model directory holds ``config.json``, ``model.safetensors`` and the tokenizer: ``tokenizer.model``
for both languages, or ``source.model`` and ``target.model`` (``.json`` where they are of the
``tokenizers`` library, as those of BERT and GPT-2 are). ``config.json`` is

    {"format_version": 1,
     "model": {...},                                      the fields of TransformerConfig
     "tokenizer": {"source": FILE, "target": FILE, "sha256": HASH},
     "training": {...}}                                   whatever the trainer has to say

for an encoder-decoder, and for every other kind of model

    {"format_version": 2, "kind": "decoder-only" or "encoder-only", ...}

with the fields of LanguageModelConfig or TextEncoderConfig under ``model``, and the rest as above; the
one tokenizer is then source and target.

A SentencePiece tokenizer with a vocabulary (``SentencePieceTokenizer`` in
``transformer_ext/data/tokenizer.py`` tells what that is) has it in ``vocabulary.json``, or in ``source.vocabulary.json`` and ``target.vocabulary.json``;
``tokenizer`` then has the keys ``source_vocabulary`` and ``target_vocabulary`` too.

A tokenizer of the ``tokenizers`` library is one that has the keys ``source_special_tokens`` and
``target_special_tokens``: its special tokens by role, ``{"bos": "[CLS]", "eos": "[SEP]", "pad":
"[PAD]", "unk": "[UNK]", "mask": "[MASK]"}``, the last of which may be missing.

Where texts may begin with tags, ``tokenizer`` has the lists ``source_tags`` (what a source text may
begin with) and ``target_prefixes`` (the same of a target text); each is a piece.

The hash is also in the header of ``model.safetensors``, so that weights cannot be used with the
tokenizer of another model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import mmap
import os
import reprlib
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    BinaryIO,
    Generic,
    NoReturn,
    TypeGuard,
    TypeVar,
    cast,
    overload,
)

from transformer_ext.data.tokenizer import SentencePieceTokenizer, Tokenizer, TokenizerError
from transformer_ext.model.config import (
    KINDS,
    LanguageModelConfig,
    ModelConfig,
    TextEncoderConfig,
    TransformerConfig,
)

if TYPE_CHECKING:
    import numpy as np
    import torch

#: Of an encoder-decoder, which every version of this package reads.
FORMAT_VERSION = 1
#: Of the other kinds; such a file says which.
KINDS_FORMAT_VERSION = 2
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


class FileError(ValueError):
    """A file or folder that is missing, broken, in the way, or does not fit its neighbours."""


class WriteError(OSError):
    """A file or folder that cannot be written: no space, no permission, a failing disk.

    Attributes:
        errno: the system's number of the reason.
        filename: what was to be written.
    """

    def __str__(self) -> str:
        return f"{self.filename}: cannot be written: {self.strerror}"


def write_error(
    path: str | os.PathLike[str], error: OSError, needed: int | None = None
) -> WriteError:
    """An error of the system, saying which file was to be written, and how large it is.

    Args:
        path: the file.
        error: what the system said.
        needed: size of the file in bytes, if known.
    """
    if isinstance(error, WriteError):
        return error
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        facts = [] if needed is None else [f"it needs {needed:,} bytes"]
        if error.errno == errno.EFBIG:
            # The room on its disk has nothing to do with it.
            facts.append(_size_limit())
        elif (free := free_bytes(path)) is not None:
            facts.append(f"{free:,} are free on its disk")
        reason += f" ({', '.join(facts)})" if facts else ""
    return WriteError(error.errno, reason, os.fspath(path))


def _size_limit() -> str:
    """What keeps files from growing, for people."""
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        if limit != resource.RLIM_INFINITY:
            return f"no file of this process may have more than {limit:,}: ulimit -f"
    except ImportError:
        pass
    return "more than its file system allows"


def free_bytes(path: str | os.PathLike[str]) -> int | None:
    """Bytes that this user may still write to the disk of a file that may not be there yet."""
    import shutil

    for folder in (Path(path), *Path(path).absolute().parents):
        try:
            return shutil.disk_usage(folder).free
        except FileNotFoundError:
            continue
        except OSError:
            break
    return None


def _temporary(path: Path) -> Path:
    # Modules that a process which only reads does not need are imported where they are used.
    import secrets

    # The process id tells a person whose it is; the random part serves threads.
    return path.with_name(f"{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")


def _sync(path: Path) -> None:
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(path: Path) -> None:
    # Windows cannot open a folder; there a rename is as durable as it gets.
    if os.name == "posix":
        _sync(path)


#: Folders that atomic_directory() has not finished yet. What is written into one needs no care of its
#: own: the folder is synced and appears as a whole.
_unfinished: set[Path] = set()


@contextlib.contextmanager
def _atomic_file(path: str | Path, size: int) -> Iterator[BinaryIO]:
    """A file to write, that appears under its name only when complete and on disk.

    A link stays, and the file that it leads to is written; a device or a FIFO is written as it is.
    """
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        try:
            with open(path, "wb", buffering=0) as file:
                yield cast(BinaryIO, file)
        except OSError as error:
            raise write_error(path, error, size) from error
        return
    whole = path.parent not in _unfinished
    if path.is_symlink():
        path = path.resolve()
    temporary = _temporary(path) if whole else path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered, so that no second attempt to write is made where the first one failed.
        with open(temporary, "wb", buffering=0) as file:
            yield cast(BinaryIO, file)
            if whole:
                os.fsync(file.fileno())
        if whole:
            os.replace(temporary, path)
            _sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise write_error(path, error, size) from error
        raise


def _write(file: BinaryIO, data: bytes | memoryview) -> None:
    # An unbuffered file may take less than it is given: where the disk becomes full within, and of
    # more than 2 GiB.
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Write a file so that at any moment, power cut included, it is the old or the new one.

    A link is followed. A device or a FIFO cannot be replaced: it is written to.

    Args:
        path: the file; its folder is made if there is none.
        data: its bytes, or its text in UTF-8.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    data = data.encode() if isinstance(data, str) else data
    with _atomic_file(path, len(data)) as file:
        _write(file, data)


def check_writable(path: str | Path) -> None:
    """Try whether :func:`atomic_write` could write a file, before the work whose result it is to hold.

    Nothing is changed, and nothing left behind.

    Args:
        path: the file; its folder is there.

    Raises:
        OSError: it cannot be written.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return
    temporary = _temporary(path.resolve() if path.is_symlink() else path)
    try:
        temporary.touch(exist_ok=False)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder that appears under its name only when complete and on disk.

    The body writes into the folder that the context manager gives, ``<path>.tmp-...``. When it ends
    without an exception, files are synced and the folder is renamed; otherwise it is removed.

    Args:
        path: the folder to appear.
        overwrite: replace a folder that is there; without it that is an error.

    Raises:
        FileError: the folder is there, and ``overwrite`` is not set.
        OSError: it cannot be written.
    """
    import shutil

    path = Path(path)
    if path.exists() and not overwrite:
        raise FileError(f"{path}: is there already")
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        raise write_error(path, error) from error
    _unfinished.add(temporary)
    try:
        yield temporary
        try:
            _finish_folder(temporary, path, overwrite)
        except OSError as error:
            raise write_error(path, error) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        _unfinished.discard(temporary)


def _finish_folder(temporary: Path, path: Path, overwrite: bool) -> None:
    """Give a folder its name, and what was there before away."""
    import shutil

    for folder, _, names in os.walk(temporary):
        for name in names:
            _sync(Path(folder) / name)
        _sync_folder(Path(folder))
    if overwrite and path.exists():
        # A folder cannot be replaced in one step: for an instant neither is under the name, but both
        # are on disk.
        old = _temporary(path)
        os.rename(path, old)
        os.rename(temporary, path)
        shutil.rmtree(old, ignore_errors=True)
    else:
        try:
            os.rename(temporary, path)
        except OSError as error:
            if path.exists():
                raise FileError(f"{path}: is there already") from error
            raise
    _sync_folder(path.parent)


def remove_abandoned(folder: str | Path) -> None:
    """Remove what processes that were killed left half written in a folder.

    Only for a folder that no other process writes to.
    """
    import shutil

    for path in Path(folder).glob("*.tmp-*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileError: missing, not JSON, or not an object.
    """
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
    except FileNotFoundError:
        raise FileError(f"{path}: no such file") from None
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror}") from None
    # ValueError: no JSON, no UTF-8, or a number of thousands of digits.
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path}: broken, not JSON: {error}") from None
    if not isinstance(values, dict):
        raise FileError(f"{path}: got {type(values).__name__}, expected an object with keys")
    return values


def write_json(path: str | Path, values: Mapping[str, Any]) -> None:
    """Write an object as indented JSON, atomically."""
    atomic_write(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


#: The elements that a safetensors file may hold: their bytes, and numpy's type where it has one.
_ELEMENTS: dict[str, tuple[int, str | None]] = {
    "BOOL": (1, "?"),
    "U8": (1, "u1"),
    "I8": (1, "i1"),
    "F8_E4M3": (1, None),
    "F8_E5M2": (1, None),
    "U16": (2, "<u2"),
    "I16": (2, "<i2"),
    "F16": (2, "<f2"),
    "BF16": (2, None),
    "U32": (4, "<u4"),
    "I32": (4, "<i4"),
    "F32": (4, "<f4"),
    "U64": (8, "<u8"),
    "I64": (8, "<i8"),
    "F64": (8, "<f8"),
}
# The reference implementation's limit.
_LONGEST_HEADER = 100_000_000


class Weights(Mapping[str, "np.ndarray"]):
    """The weights of a model by name: float32 arrays, each made when asked for.

    Attributes:
        path: the file that holds them, or the list of the files that do.
        files: the files that hold them.
        shapes: shape of each by name, known without reading it.
    """

    path: Path
    files: tuple[Path, ...]
    shapes: dict[str, tuple[int, ...]]

    def mapped(self, name: str) -> np.ndarray:
        """A weight, where possible as it lies in a mapped file: read-only and not aligned."""
        return self[name]

    def floats(self, name: str) -> memoryview[float] | None:
        """:meth:`mapped` of float32, aligned, as a buffer that need not be made with numpy.

        None where the weight does not lie in a file like that.
        """
        return None

    def check_finite(self) -> None:
        """Reads all weights and looks for what no training that succeeds writes.

        Raises:
            FileError: a weight holds NaN or an infinity; the message names it.
        """
        import numpy as np

        for name in self:
            wrong = int(np.count_nonzero(~np.isfinite(self.mapped(name))))
            if wrong:
                count = math.prod(self.shapes[name])
                where = ", ".join(map(str, self.files))
                raise FileError(
                    f"{where}: {name}: {wrong:,} of its {count:,} numbers are NaN or infinite; the "
                    "file is damaged, or what made it has failed"
                )

    def __contains__(self, name: object) -> bool:
        # Mapping's own would read the tensor.
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class Tensors(Weights):
    """The tensors of a safetensors file by name, each read from the mapped file when asked for.

    Attributes:
        metadata: the texts in its header.
        types: type of each tensor's elements by name, as the format calls it: ``F32``.

    Raises:
        FileError: missing, truncated or otherwise broken; or, of one tensor, of a type that numpy
            does not have.
    """

    # Not by safetensors' own reader: it copies every tensor, and the pages of the file that it has
    # mapped stay in memory besides, so that loading takes twice what the file holds.

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.files = (self.path,)
        if not self.path.is_file():
            raise FileError(f"{path}: no such file")
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                length = int.from_bytes(file.read(8), "little")
                if size < 8 or length > min(size - 8, _LONGEST_HEADER):
                    self._fail(size, f"a header of {length:,} bytes does not fit")
                header = file.read(length)
                self._map = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        except OSError as error:
            raise FileError(f"{path}: cannot be read: {error}") from None
        self._begin = 8 + length
        self.metadata, entries = self._read_header(size, header)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.types: dict[str, str] = {}
        self._offsets: dict[str, tuple[int, int]] = {}
        for name, entry in entries.items():
            self._read_entry(size, name, entry)
        end = 0
        for begin, after, name in sorted((*place, name) for name, place in self._offsets.items()):
            if begin != end:
                self._fail(size, f"{name} begins at {begin:,}, expected {end:,}")
            end = after
        if end != size - self._begin:
            self._fail(
                size, f"the tensors end at {end:,}, expected {size - self._begin:,}, the data's end"
            )

    def _fail(self, size: int, reason: str) -> NoReturn:
        raise FileError(f"{self.path}: broken or cut off ({size:,} bytes): {reason}")

    def _read_header(self, size: int, header: bytes) -> tuple[dict[str, str], dict[str, Any]]:
        def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            values = dict(pairs)
            if len(values) != len(pairs):
                raise ValueError("a name stands twice")
            return values

        try:
            entries = json.loads(header.decode(), object_pairs_hook=unique)
        except (ValueError, RecursionError) as error:
            self._fail(size, f"its header is no JSON: {error}")
        if not isinstance(entries, dict):
            self._fail(size, "its header is no JSON object")
        metadata = entries.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(
            isinstance(text, str) for text in metadata.values()
        ):
            self._fail(size, "__metadata__ in its header: expected texts")
        return metadata, entries

    def _read_entry(self, size: int, name: str, entry: Any) -> None:
        if not isinstance(entry, dict):
            self._fail(size, f"{name}: expected type, shape and offsets")
        kind: Any = entry.get("dtype")
        shape: Any = entry.get("shape")
        place: Any = entry.get("data_offsets")
        if not isinstance(kind, str) or kind not in _ELEMENTS:
            self._fail(size, f"{name}: unknown dtype {kind!r:.40}")
        for key, values in (("shape", shape), ("data_offsets", place)):
            if not isinstance(values, list) or not all(
                type(value) is int and 0 <= value < 2**63 for value in values
            ):
                self._fail(size, f"{name}: {key}: expected a list of integers, not negative")
        if len(place) != 2 or not place[0] <= place[1] <= size - self._begin:
            self._fail(size, f"{name}: its data_offsets {place!r:.60} are not within the data")
        if len(shape) > 32:
            self._fail(size, f"{name}: {len(shape):,} dimensions, expected at most 32")
        expected = math.prod(shape) * _ELEMENTS[kind][0]
        if place[1] - place[0] != expected:
            self._fail(
                size,
                f"{name}: {place[1] - place[0]:,} bytes, expected {expected:,} for {kind} of the "
                f"shape {shape!r:.60}",
            )
        self.shapes[name] = tuple(shape)
        self.types[name] = kind
        self._offsets[name] = (place[0], place[1])

    def __getitem__(self, name: str) -> np.ndarray:
        view = self.mapped(name)
        return view.astype(view.dtype.newbyteorder("="))

    def mapped(self, name: str) -> np.ndarray:
        """A tensor as it lies in the mapped file: read-only, and neither copied nor aligned.

        When the array is gone, what was read of the file leaves the memory of the process.
        """
        kind = _ELEMENTS[self.types[name]][1]
        if kind is None:
            raise FileError(f"{self.path}: {name}: got {self.types[name]}, which numpy has not")
        return self._view(name, kind)

    def as_float32(self, name: str) -> np.ndarray:
        """A tensor of another type as float32; of bfloat16, which numpy has not, too."""
        import numpy as np

        if self.types[name] != "BF16":
            return self.mapped(name).astype(np.float32)
        # A bfloat16 is the upper half of a float32.
        return np.left_shift(self._view(name, "<u2"), 16, dtype=np.uint32).view(np.float32)

    def _view(self, name: str, kind: str) -> np.ndarray:
        import numpy as np

        begin, end = self._place(name)
        if begin == end:
            return np.empty(self.shapes[name], kind)
        shape = self.shapes[name]
        array = np.frombuffer(self._map, kind, math.prod(shape), begin).reshape(shape)
        self._forget_with(array, begin, end)
        return array

    def floats(self, name: str) -> memoryview[float] | None:
        """:meth:`mapped` of float32, aligned, as a buffer that is made without numpy.

        None where the tensor is of another type, empty or not aligned.
        """
        begin, end = self._place(name)
        floats = self.types[name] == "F32" and begin % 4 == 0 and sys.byteorder == "little"
        if not floats or begin == end or not self.shapes[name]:
            return None
        view = memoryview(self._map)[begin:end].cast("f", self.shapes[name])
        self._forget_with(view, begin, end)
        return view

    def _place(self, name: str) -> tuple[int, int]:
        begin, end = self._offsets[name]
        return self._begin + begin, self._begin + end

    def _forget_with(self, view: Any, begin: int, end: int) -> None:
        if hasattr(mmap, "MADV_DONTNEED"):
            # Harmless where a page is used after all: it is read again.
            begin -= begin % mmap.PAGESIZE
            weakref.finalize(
                view, self._map.madvise, mmap.MADV_DONTNEED, begin, end - begin
            ).atexit = False


def save_tensors(
    path: str | Path,
    tensors: Mapping[str, np.ndarray | torch.Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors as a safetensors file, atomically.

    Args:
        path: the file.
        tensors: arrays, or torch tensors on any device, by name.
        metadata: texts for the header.

    Raises:
        TypeError: a type of element that safetensors' numpy face does not know, as bfloat16.
    """
    import numpy as np

    arrays: Mapping[str, np.ndarray]
    if isinstance(tensors, Weights) and not isinstance(tensors, Tensors):
        # Each is made where it is written, so that they are never in memory together.
        arrays, shapes = tensors, tensors.shapes
        kinds = dict.fromkeys(tensors, "F32")
    else:
        arrays = {name: _to_numpy(name, tensor) for name, tensor in tensors.items()}
        shapes = {name: array.shape for name, array in arrays.items()}
        kinds = {name: _safetensors_type(name, array) for name, array in arrays.items()}
    # The largest elements first, so that all are aligned.
    names = sorted(kinds, key=lambda name: (-_ELEMENTS[kinds[name]][0], name))
    # An empty header text without any tensor is a file that safetensors 0.8 does not read back.
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        begin, end = end, end + math.prod(shapes[name]) * _ELEMENTS[kinds[name]][0]
        header[name] = {
            "dtype": kinds[name],
            "shape": list(shapes[name]),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    # Not by safetensors' own writer: it holds the tensors twice more, which for a checkpoint is more
    # than a step of training needs (the base model: 0.9 GB).
    with _atomic_file(path, 8 + len(text) + end) as file:
        _write(file, len(text).to_bytes(8, "little") + text)
        for name in names:
            array = arrays[name]
            little = array.astype(array.dtype.newbyteorder("<"), copy=False)
            _write(file, little.reshape(-1).view(np.uint8).data)


def _safetensors_type(name: str, array: np.ndarray) -> str:
    """The format's name for the elements: F32, I64, BOOL."""
    kind, size = array.dtype.kind, array.itemsize
    if kind == "b":
        return "BOOL"
    if kind in "fiu" and size in ((2, 4, 8) if kind == "f" else (1, 2, 4, 8)):
        return f"{kind.upper()}{8 * size}"
    raise TypeError(f"{name}: got {array.dtype}, expected floats, integers or booleans")


def _to_numpy(name: str, tensor: Any) -> np.ndarray:
    import numpy as np

    if not isinstance(tensor, np.ndarray):
        try:
            tensor = tensor.detach().cpu().numpy()
        except (AttributeError, TypeError) as error:
            raise TypeError(
                f"{name}: got {getattr(tensor, 'dtype', type(tensor).__name__)}, expected an array "
                f"or tensor of a type that numpy has ({error})"
            ) from None
    return np.asarray(tensor, order="C")


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight of a model, as ``model.safetensors`` holds them.

    Tied weights stand once, under the first of their names in the order of :func:`_tied`.
    """
    d, head_dim = config.d_model, config.head_dim
    kv_heads = config.num_kv_heads
    assert head_dim is not None and kv_heads is not None
    q_width, kv_width = config.nhead * head_dim, kv_heads * head_dim
    shapes: dict[str, tuple[int, ...]] = {}

    def projection(name: str, rows: int, columns: int, bias: bool = config.bias) -> None:
        shapes[f"{name}.weight"] = (rows, columns)
        if bias:
            shapes[f"{name}.bias"] = (rows,)

    def norm(name: str) -> None:
        shapes[f"{name}.weight"] = (d,)
        if config.norm == "layer":
            shapes[f"{name}.bias"] = (d,)

    def stack(name: str, depth: int, cross: bool = False, token_types: int = 0) -> None:
        if config.positions == "learned":
            shapes[f"{name}.positions.weight"] = (config.max_positions, d)
        if token_types:
            shapes[f"{name}.token_types.weight"] = (token_types, d)
        if config.embedding_norm:
            norm(f"{name}.embedding_norm")
        for index in range(depth):
            layer = f"{name}.layers.{index}"
            projection(f"{layer}.self_attention.in_projection", q_width + 2 * kv_width, d)
            projection(f"{layer}.self_attention.out_projection", d, q_width)
            norm(f"{layer}.self_attention_norm")
            if cross:
                projection(f"{layer}.cross_attention.query_projection", q_width, d)
                projection(f"{layer}.cross_attention.key_value_projection", 2 * kv_width, d)
                projection(f"{layer}.cross_attention.out_projection", d, q_width)
                norm(f"{layer}.cross_attention_norm")
            inner = config.dim_feedforward
            projection(f"{layer}.feed_forward.in_projection", inner * (1 + config.gated), d)
            projection(f"{layer}.feed_forward.out_projection", d, inner)
            norm(f"{layer}.feed_forward_norm")
        if config.final_norm:
            norm(f"{name}.norm")

    if isinstance(config, TransformerConfig):
        shapes["source_embedding.weight"] = (config.src_vocab_size, d)
        if config.tie != "all":
            shapes["target_embedding.weight"] = (config.tgt_vocab_size, d)
        if config.tie == "none":
            shapes["generator.weight"] = (config.tgt_vocab_size, d)
        if config.output_bias:
            shapes["generator.bias"] = (config.tgt_vocab_size,)
        stack("encoder", config.num_encoder_layers)
        stack("decoder", config.num_decoder_layers, cross=True)
    elif isinstance(config, LanguageModelConfig):
        shapes["embedding.weight"] = (config.vocab_size, d)
        if not config.tie:
            shapes["generator.weight"] = (config.vocab_size, d)
        if config.output_bias:
            shapes["generator.bias"] = (config.vocab_size,)
        stack("decoder", config.num_layers)
    else:
        assert isinstance(config, TextEncoderConfig)
        shapes["embedding.weight"] = (config.vocab_size, d)
        stack("encoder", config.num_layers, token_types=config.num_token_types)
        if config.pooler:
            projection("pooler", d, d, bias=True)
        if config.labels:
            projection("generator", len(config.labels), d, config.output_bias)
        if config.masked_lm_head:
            projection("masked_lm_head.projection", d, d, bias=True)
            norm("masked_lm_head.norm")
            shapes["masked_lm_head.bias"] = (config.vocab_size,)
    return shapes


def _tied(config: ModelConfig) -> list[str]:
    """Names of one shared weight, the first being that under which it is stored."""
    if isinstance(config, LanguageModelConfig):
        return ["embedding.weight", "generator.weight"] if config.tie else []
    if not isinstance(config, TransformerConfig) or config.tie == "none":
        return []
    names = ["source_embedding.weight"] if config.tie == "all" else []
    return [*names, "target_embedding.weight", "generator.weight"]


def _without_tied(
    config: ModelConfig, weights: Mapping[str, np.ndarray | torch.Tensor]
) -> Mapping[str, np.ndarray | torch.Tensor]:
    """The weights without the second and third name of a shared one, as a state_dict has them."""
    import numpy as np

    names = _tied(config)
    equal = [
        name
        for name in names[1:]
        if name in weights
        and names[0] in weights
        and np.array_equal(_to_numpy(names[0], weights[names[0]]), _to_numpy(name, weights[name]))
    ]
    if not equal:
        return weights
    return {name: weight for name, weight in weights.items() if name not in equal}


def _tokenizer_hash(source: Tokenizer, target: Tokenizer) -> str:
    return hashlib.sha256(f"{source.sha256} {target.sha256}".encode()).hexdigest()


ConfigT = TypeVar("ConfigT", bound=ModelConfig)
AnyConfigT = TypeVar("AnyConfigT", bound=ModelConfig, covariant=True)


@dataclass(frozen=True)
class ModelDir(Generic[AnyConfigT]):
    """What lies in a model directory.

    Attributes:
        path: the folder.
        config: the architecture, of the class that goes with its kind.
        weights: float32 arrays by parameter name, each read when asked for.
        source_tokenizer: of the source language.
        target_tokenizer: of the target language; the same object if there is one for both.
        training: what the trainer noted, for example ``max_train_length``.
    """

    path: Path
    config: AnyConfigT
    weights: Weights
    source_tokenizer: Tokenizer
    target_tokenizer: Tokenizer
    training: dict[str, Any] = field(default_factory=dict)


def write_model_files(
    folder: str | Path,
    config: ModelConfig,
    weights: Mapping[str, np.ndarray | torch.Tensor],
    source_tokenizer: Tokenizer,
    target_tokenizer: Tokenizer,
    training: Mapping[str, Any] | None = None,
) -> None:
    """Write the files of a model directory into a folder that is there.

    For a folder that holds more than a model, such as a checkpoint; :func:`save_model_dir` makes
    the folder itself.

    Args:
        folder: where to.
        config: the architecture.
        weights: by parameter name, as :func:`parameter_shapes` has them, or a ``state_dict()``.
        source_tokenizer: of the source language.
        target_tokenizer: of the target language, possibly the same.
        training: anything worth noting that JSON can hold.

    Raises:
        FileError: weights or tokenizers do not fit the configuration.
    """
    folder = Path(folder)
    weights = _without_tied(config, weights)
    shapes = (
        weights.shapes
        if isinstance(weights, Weights)
        else {name: tuple(tensor.shape) for name, tensor in weights.items()}
    )
    _check_shapes(str(folder / WEIGHTS_FILE), config, shapes)
    _check_vocabulary(str(folder), config, source_tokenizer, target_tokenizer)
    digest = _tokenizer_hash(source_tokenizer, target_tokenizer)
    entry = _write_tokenizers(folder, source_tokenizer, target_tokenizer)
    # "pt" is what other readers of safetensors files expect to find under "format".
    save_tensors(folder / WEIGHTS_FILE, weights, {"format": "pt", "tokenizer_sha256": digest})
    write_json(
        folder / CONFIG_FILE,
        {
            **(
                {"format_version": FORMAT_VERSION}
                if isinstance(config, TransformerConfig)
                else {"format_version": KINDS_FORMAT_VERSION, "kind": config.kind}
            ),
            "model": config.to_dict(),
            "tokenizer": {**entry, "sha256": digest},
            "training": dict(training or {}),
        },
    )


def _write_tokenizers(folder: Path, source: Tokenizer, target: Tokenizer) -> dict[str, Any]:
    """Write their files; returns the names of these, and the tags, as ``config.json`` has them."""
    tokenizers = {"source": source, "target": target}
    shared = source.sha256 == target.sha256
    entry: dict[str, Any] = {
        side: f"{'tokenizer' if shared else side}{tokenizer.suffix}"
        for side, tokenizer in tokenizers.items()
    }
    for side, tokenizer in tokenizers.items():
        atomic_write(folder / entry[side], tokenizer.content())
        if tokenizer.special_tokens is not None:
            entry[f"{side}_special_tokens"] = dict(tokenizer.special_tokens)
    vocabularies = {
        side: tokenizer.vocabulary.read_bytes()
        for side, tokenizer in tokenizers.items()
        if tokenizer.vocabulary is not None
    }
    one = len(vocabularies) == 2 and len(set(vocabularies.values())) == 1
    for side, content in vocabularies.items():
        name = "vocabulary.json" if one else f"{side}.vocabulary.json"
        entry[f"{side}_vocabulary"] = name
        atomic_write(folder / name, content)
    for key, tags in (
        ("source_tags", source.given_source_tags),
        ("target_prefixes", target.target_prefixes),
    ):
        if tags:
            entry[key] = list(tags)
    return entry


def save_model_dir(
    path: str | Path,
    config: ModelConfig,
    weights: Mapping[str, np.ndarray | torch.Tensor],
    source_tokenizer: Tokenizer,
    target_tokenizer: Tokenizer,
    training: Mapping[str, Any] | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Write a model directory, atomically; see :func:`write_model_files` for the arguments.

    Raises:
        FileError: the folder is there and ``overwrite`` is not set, or something does not fit.
    """
    with atomic_directory(path, overwrite=overwrite) as folder:
        write_model_files(folder, config, weights, source_tokenizer, target_tokenizer, training)


@overload
def load_model_dir(path: str | Path) -> ModelDir[TransformerConfig]: ...


@overload
def load_model_dir(path: str | Path, kind: type[ConfigT]) -> ModelDir[ConfigT]: ...


def load_model_dir(
    path: str | Path, kind: type[ModelConfig] = TransformerConfig
) -> ModelDir[ModelConfig]:
    """Open a model directory; the weights are read as they are asked for.

    A directory of Hugging Face's ``transformers`` with BERT or GPT-2 is taken too; see
    :mod:`transformer_ext.huggingface`.

    Args:
        path: the folder.
        kind: class of the configuration that is expected; ``ModelConfig`` takes every kind.

    Raises:
        FileError: something is missing, cut off, broken, of a newer format, of another kind, or
            does not fit the rest; the message names the file and what is wrong with it.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(
            f"model directory: got {type(path).__name__}, expected the path of a folder"
        )
    # An empty name would be the working directory.
    if not str(path) or not Path(path).is_dir():
        refuse_pointer(path)
        raise FileError(f"{str(path) or repr('')}: no such model directory")
    path = Path(path)
    config_path = path / CONFIG_FILE
    if not config_path.is_file() and (path / "model" / CONFIG_FILE).is_file():
        raise FileError(f"{path}: the folder of a training; its model is {path / 'model'}")
    if not config_path.is_file():
        for what, folder in (
            ("the folder of a training that has not ended", path / "checkpoints"),
            ("the checkpoints of a training", path),
        ):
            if newest := _named_checkpoint(folder / "last"):
                raise FileError(f"{path}: {what}; the newest checkpoint is {newest}")
    if not config_path.is_file() and (path / "modules.json").is_file():
        return _load_huggingface(path, {}, kind)
    values = read_json(config_path)
    if "model_type" in values and "format_version" not in values:
        return _load_huggingface(path, values, kind)
    config_class = _config_class(path, values)
    check_kind(path, config_class, kind)
    for key in ("model", "tokenizer"):
        if not isinstance(values.get(key), dict):
            raise FileError(f"{config_path}: the part {key!r} is missing")
    try:
        config = config_class.from_dict(values["model"])
    except (ValueError, TypeError) as error:
        raise FileError(f"{config_path}: {error}") from None
    source, target = _load_tokenizers(path, values["tokenizer"])
    _check_vocabulary(str(config_path), config, source, target)
    weights = Tensors(path / WEIGHTS_FILE)
    bound = weights.metadata.get("tokenizer_sha256")
    if bound is not None and bound != values["tokenizer"].get("sha256"):
        raise FileError(
            f"{weights.path}: was trained with another tokenizer than the one in this folder"
        )
    _check_shapes(str(weights.path), config, weights.shapes)
    for name, elements in weights.types.items():
        if elements != "F32":
            raise FileError(f"{weights.path}: {name}: got {elements}, expected F32")
    return ModelDir(path, config, weights, source, target, _training(values, config_path))


def refuse_pointer(path: str | Path) -> None:
    """For what is to be a model or a text.

    Raises:
        FileError: it is a file whose one line names a checkpoint beside it, as ``checkpoints/best``
            of a training.
    """
    if named := _named_checkpoint(Path(path)):
        raise FileError(f"{path}: is a file that names a checkpoint, expected that: {named}")


def _named_checkpoint(path: Path) -> Path | None:
    if not path.is_file():
        return None
    try:
        with open(path, encoding="utf-8") as file:
            name = file.read(100).strip()
    except (OSError, ValueError):
        return None
    return path.parent / name if name and (path.parent / name / CONFIG_FILE).is_file() else None


@contextlib.contextmanager
def naming_damage(folders: Iterable[str | Path]) -> Iterator[None]:
    """Where the block fails because weights of these model directories are no numbers, says which.

    To look for that in every model would mean to read all of it, and numpy, which decoding does not
    need.

    Raises:
        FileError: in place of the block's ValueError, see :meth:`Weights.check_finite`.
    """
    try:
        yield
    except ValueError as error:
        # As the engines say it. A text that cannot be translated shall not cost this time.
        for folder in folders if "NaN" in str(error) else ():
            try:
                weights = load_model_dir(folder, ModelConfig).weights
            except FileError:
                continue  # It is no longer there, or another one.
            weights.check_finite()
        raise


def _load_huggingface(
    path: Path, values: Mapping[str, Any], kind: type[ModelConfig]
) -> ModelDir[ModelConfig]:
    from transformer_ext.huggingface.directory import load_huggingface_dir

    return load_huggingface_dir(path, values, kind)


def check_kind(path: Path, config_class: type[ModelConfig], kind: type[ModelConfig]) -> None:
    """Raise a FileError where a model is not of the kind that is expected."""
    if not issubclass(config_class, kind):
        raise FileError(
            f"{path}: is {_DESCRIPTIONS[config_class.kind]} model, expected "
            f"{_DESCRIPTIONS[kind.kind]} model"
        )


#: The kinds of model, for messages.
_DESCRIPTIONS = {
    "encoder-decoder": "an encoder-decoder (translation)",
    "decoder-only": "a decoder-only (language)",
    "encoder-only": "an encoder-only (text encoding)",
}


def _config_class(path: Path, values: Mapping[str, Any]) -> type[ModelConfig]:
    """The class of the configuration, by format version and kind."""
    version = values.get("format_version")
    config_path = path / CONFIG_FILE
    # True and 1.0 are equal to 1, but no version.
    if type(version) is int and version == FORMAT_VERSION:
        return TransformerConfig
    if type(version) is int and version == KINDS_FORMAT_VERSION:
        kind = values.get("kind")
        if not isinstance(kind, str) or kind not in KINDS:
            raise FileError(
                f"{config_path}: kind: got {reprlib.repr(kind)}, expected one of {', '.join(KINDS)}"
            )
        return KINDS[kind]
    advice = "; a newer version of this package wrote it" if _is_newer(version) else ""
    raise FileError(
        f"{config_path}: format_version is {reprlib.repr(version)}, expected "
        f"{FORMAT_VERSION} or {KINDS_FORMAT_VERSION}{advice}"
    )


def _training(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    training = values.get("training", {})
    if not isinstance(training, dict):
        raise FileError(
            f"{path}: training: got {reprlib.repr(training)}, expected an object with keys"
        )
    longest = training.get("max_train_length")
    if longest is not None and (type(longest) is not int or longest < 1):
        raise FileError(
            f"{path}: training.max_train_length: got {reprlib.repr(longest)}, expected an integer "
            "of at least 1"
        )
    return training


def _is_newer(version: Any) -> bool:
    return isinstance(version, int) and version > KINDS_FORMAT_VERSION


def is_file_name(name: Any) -> TypeGuard[str]:
    """Whether this is the name of a file, and no path out of its folder."""
    return (
        isinstance(name, str)
        and name not in ("", "..")
        and Path(name).name == name
        and "\0" not in name
        and len(os.fsencode(name) if name.isprintable() else name) <= 255
    )


def _load_tokenizers(path: Path, entry: Mapping[str, Any]) -> tuple[Tokenizer, Tokenizer]:
    files: list[tuple[Path, Path | None]] = []
    special: list[dict[str, str] | None] = []
    for side in ("source", "target"):
        names = [side] + [key for key in (f"{side}_vocabulary",) if key in entry]
        for key in names:
            name = entry.get(key)
            if not is_file_name(name):
                raise FileError(
                    f"{path / CONFIG_FILE}: tokenizer.{key}: got {reprlib.repr(name)}, expected a "
                    "file name"
                )
            if not (path / name).is_file():
                raise FileError(
                    f"{path / name}: no such file, but tokenizer.{key} in {CONFIG_FILE} names it"
                )
        found = [path / entry[key] for key in names]
        files.append((found[0], found[1] if len(found) == 2 else None))
        special.append(_special_tokens(path, entry, f"{side}_special_tokens"))
    tags = []
    for key in ("source_tags", "target_prefixes"):
        value = entry.get(key, [])
        if not isinstance(value, list) or not all(isinstance(tag, str) and tag for tag in value):
            raise FileError(
                f"{path / CONFIG_FILE}: tokenizer.{key}: got {reprlib.repr(value)}, expected a list "
                "of texts"
            )
        tags.append(value)
    try:
        if (files[0], special[0]) == (files[1], special[1]):
            source = target = _load_tokenizer(*files[0], special[0], *tags)
        else:
            source = _load_tokenizer(*files[0], special[0], tags[0], [])
            target = _load_tokenizer(*files[1], special[1], [], tags[1])
    except TokenizerError as error:
        raise FileError(str(error)) from None
    if entry.get("sha256") != _tokenizer_hash(source, target):
        read = dict.fromkeys(str(file) for pair in files for file in pair if file is not None)
        raise FileError(
            f"{', '.join(read)}: not the tokenizer that this model was trained with "
            "(its SHA-256 differs from the one in config.json)"
        )
    return source, target


def _special_tokens(path: Path, entry: Mapping[str, Any], key: str) -> dict[str, str] | None:
    """The special tokens by role; None where the tokenizer is one of SentencePiece."""
    value = entry.get(key)
    if value is None:
        return None
    if not isinstance(value, dict) or not all(isinstance(token, str) for token in value.values()):
        raise FileError(
            f"{path / CONFIG_FILE}: tokenizer.{key}: got {reprlib.repr(value)}, expected tokens by role"
        )
    return value


def _load_tokenizer(
    model: Path,
    vocabulary: Path | None,
    special: Mapping[str, str] | None,
    source_tags: list[str],
    target_prefixes: list[str],
) -> Tokenizer:
    if special is None:
        return SentencePieceTokenizer(model, vocabulary, source_tags, target_prefixes)
    from transformer_ext.data.json_tokenizer import JsonTokenizer

    return JsonTokenizer(model, special, source_tags, target_prefixes)


def _check_vocabulary(
    where: str, config: ModelConfig, source: Tokenizer, target: Tokenizer
) -> None:
    if isinstance(config, TransformerConfig):
        names = ("src_vocab_size", "tgt_vocab_size")
    else:
        names = ("vocab_size", "vocab_size")
    for name, tokenizer in zip(names, (source, target), strict=True):
        # A model may have spare rows, as when its vocabulary is padded to a multiple of 8.
        if tokenizer.vocab_size > getattr(config, name):
            raise FileError(
                f"{where}: {name} is {getattr(config, name)}, but {tokenizer.path} has "
                f"{tokenizer.vocab_size} pieces"
            )
    if target.eos_id != config.eos_id:
        raise FileError(
            f"{where}: eos_id is {config.eos_id}, but {target.eos_id} in "
            f"{target.vocabulary or target.path}"
        )


def _check_shapes(where: str, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    if config.layers > len(shapes):
        fields = [f.name for f in dataclasses.fields(config) if f.name.endswith("_layers")]
        together = " together" if len(fields) > 1 else ""
        raise FileError(
            f"{where}: does not fit the model's configuration: {len(shapes)} tensors, but "
            f"{' and '.join(fields)} {'are' if together else 'is'} {config.layers}{together}"
        )
    expected = parameter_shapes(config)
    problems = [f"{name} is missing" for name in expected if name not in shapes]
    problems += [f"{name} is not part of the model" for name in shapes if name not in expected]
    problems += [
        f"{name} has the shape {list(shapes[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise FileError(
            f"{where}: does not fit the model's configuration: {'; '.join(problems[:3])}{more}"
        )
