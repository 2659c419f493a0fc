"""Atomic files and folders, tensors, model directories."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from transformer_ext.data import SentencePieceTokenizer, Tokenizer, train_tokenizer
from transformer_ext.files import (
    FileError,
    Tensors,
    atomic_directory,
    atomic_write,
    load_model_dir,
    parameter_shapes,
    read_json,
    save_model_dir,
    save_tensors,
    write_json,
)
from transformer_ext.model.config import TransformerConfig

SENTENCES = [f"The {word} of number {i}." for i in range(50) for word in ("cell", "row", "sheet")]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> tuple[Tokenizer, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    found = []
    for size in (300, 310):
        data, _ = train_tokenizer(SENTENCES, vocab_size=size)
        (folder / f"{size}.model").write_bytes(data)
        found.append(SentencePieceTokenizer(folder / f"{size}.model"))
    return found[0], found[1]


def small_config(vocabulary: int = 300, **changes) -> TransformerConfig:
    fields = {"d_model": 8, "nhead": 2, "num_encoder_layers": 1, "num_decoder_layers": 2}
    return TransformerConfig(vocabulary, vocabulary, **{**fields, "dim_feedforward": 12, **changes})


def some_weights(config: TransformerConfig) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    shapes = parameter_shapes(config)
    return {name: generator.normal(size=s).astype(np.float32) for name, s in shapes.items()}


@pytest.fixture
def model(tmp_path, tokenizers) -> Path:
    config = small_config()
    path = tmp_path / "a model"
    save_model_dir(
        path, config, some_weights(config), tokenizers[0], tokenizers[0], {"max_train_length": 99}
    )
    return path


def leftovers(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if ".tmp-" in name]


def test_atomic_write_replaces(tmp_path) -> None:
    path = tmp_path / "sub" / "file"
    atomic_write(path, "größer")
    atomic_write(path, b"\x00")
    assert path.read_bytes() == b"\x00"
    assert not leftovers(path.parent)


def test_atomic_write_does_not_replace_what_is_no_file(tmp_path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        atomic_write(fifo, "text")
        assert os.read(reader, 9) == b"text" and fifo.is_fifo()
    finally:
        os.close(reader)
    link, target = tmp_path / "link", tmp_path / "sub" / "file"
    link.symlink_to(target)
    for text in ("new", "newer"):
        atomic_write(link, text)
        assert link.is_symlink() and target.read_text() == text
    assert not leftovers(tmp_path) and not leftovers(target.parent)


def test_atomic_write_leaves_nothing_after_an_error(tmp_path) -> None:
    path = tmp_path / "file"
    path.mkdir()
    with pytest.raises(OSError):
        atomic_write(path, "text")
    assert path.is_dir() and not leftovers(tmp_path)


def test_atomic_directory_appears_when_complete(tmp_path) -> None:
    path = tmp_path / "folder"
    with atomic_directory(path) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("x")
        assert not path.exists()
    assert (path / "sub" / "file").read_text() == "x"
    with pytest.raises(FileError, match="is there already"), atomic_directory(path):
        pass
    with (
        pytest.raises(RuntimeError, match="stop"),
        atomic_directory(path, overwrite=True) as folder,
    ):
        (folder / "new").write_text("y")
        raise RuntimeError("stop")
    assert os.listdir(path) == ["sub"]
    with atomic_directory(path, overwrite=True) as folder:
        (folder / "new").write_text("y")
    assert os.listdir(path) == ["new"]
    assert not leftovers(tmp_path)


def test_atomic_directory_loses_a_race_cleanly(tmp_path) -> None:
    path = tmp_path / "folder"
    with pytest.raises(FileError, match="is there already"), atomic_directory(path):
        path.mkdir()
        (path / "other").write_text("first")
    assert os.listdir(path) == ["other"]
    assert not leftovers(tmp_path)


def test_a_killed_writer_leaves_the_old_file(tmp_path) -> None:
    path = tmp_path / "folder"
    program = (
        "import os, signal, sys\n"
        "from transformer_ext.files import atomic_directory\n"
        "with atomic_directory(sys.argv[1]) as folder:\n"
        "    (folder / 'half').write_text('x')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    process = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert process.returncode == -9
    assert not path.exists()
    assert len(leftovers(tmp_path)) == 1


def test_json(tmp_path) -> None:
    path = tmp_path / "values.json"
    write_json(path, {"a": [1, "ß"]})
    assert read_json(path) == {"a": [1, "ß"]}
    assert "ß" in path.read_text(encoding="utf-8")
    for text, message in (('{"a": ', "not JSON"), ("[1]", "expected an object")):
        path.write_text(text)
        with pytest.raises(FileError, match=message):
            read_json(path)
    with pytest.raises(FileError, match="no such file"):
        read_json(tmp_path / "none.json")


def test_tensors_are_lazy_and_typed(tmp_path) -> None:
    path = tmp_path / "t.safetensors"
    values = {
        "matrix": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "numbers": np.array([1, 2], np.int64),
        "none": np.empty((0, 3), np.float32),
        "single": np.array(3, np.float32),
        "odd": np.array([True, False, True]),
        "ä half": np.array([1.5, -2], np.float16),
        "wide": np.array([np.pi]),
        "bytes": np.array([255], np.uint8),
        "big endian": np.array([1, 258], ">i4"),
    }
    save_tensors(path, values, {"note": "x"})
    tensors = Tensors(path)
    assert tensors.metadata == {"note": "x"}
    assert set(tensors) == set(values) and len(tensors) == 9
    for name, value in values.items():
        assert tensors.shapes[name] == value.shape
        assert tensors[name].dtype == value.dtype.newbyteorder("=")
        np.testing.assert_array_equal(tensors[name], value)
        view = tensors.mapped(name)
        assert not view.flags.writeable or view.size == 0
        np.testing.assert_array_equal(view, value)
        floats = tensors.floats(name)
        assert (floats is not None) == (name == "matrix")
        if floats is not None:
            assert floats.readonly and floats.shape == value.shape and floats.format == "f"
            np.testing.assert_array_equal(np.asarray(floats), value)

    class Unread(Tensors):
        def __getitem__(self, name: str) -> np.ndarray:
            raise AssertionError(f"{name} was read")

    assert "matrix" in Unread(path) and "other" not in Unread(path)
    copy = tensors["matrix"]
    copy[:] = 7
    np.testing.assert_array_equal(tensors["matrix"], values["matrix"])
    with safe_open(path, framework="numpy") as reference:
        assert reference.metadata() == tensors.metadata
        assert set(reference.keys()) == set(values)
        for name in values:
            np.testing.assert_array_equal(reference.get_tensor(name), tensors[name])
    with pytest.raises(TypeError, match="c: got complex64, expected floats"):
        save_tensors(path, {"c": np.zeros(1, np.complex64)})
    with pytest.raises(KeyError):
        tensors["other"]


def test_files_of_other_writers(tmp_path) -> None:
    from safetensors.numpy import save_file

    path = tmp_path / "t.safetensors"
    values = {"a": np.arange(5, dtype=np.float32), "b": np.array([True]), "c": np.zeros((2, 0))}
    save_file(values, path)
    tensors = Tensors(path)
    assert tensors.metadata == {} and set(tensors) == set(values)
    for name, value in values.items():
        np.testing.assert_array_equal(tensors[name], value)
    # A header of odd length, so that nothing is aligned, and a type that numpy does not have.
    header = (
        b'{"w":{"dtype":"BF16","shape":[2],"data_offsets":[4,8]}, "v":{"dtype":"F32","shape":[1],'
    )
    header += b'"data_offsets":[0,4]}}'
    header += b" " * (1 - len(header) % 2)
    one = np.array([3.5], "<f4").tobytes()
    path.write_bytes(len(header).to_bytes(8, "little") + header + one + b"abcd")
    tensors = Tensors(path)
    assert tensors["v"] == [3.5] and tensors.shapes["w"] == (2,)
    with pytest.raises(FileError, match="t.safetensors: w: got BF16, which numpy has not"):
        tensors["w"]
    upper_halves = np.frombuffer(b"\0\0ab\0\0cd", "<f4")
    np.testing.assert_array_equal(tensors.as_float32("w"), upper_halves)


def test_tensors_are_written_without_another_copy_in_memory(tmp_path) -> None:
    values = {f"w{index}": np.zeros(1 << 18) for index in range(8)}
    tracemalloc.start()
    save_tensors(tmp_path / "t.safetensors", values)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < values["w0"].nbytes


def test_tensors_of_torch(tmp_path) -> None:
    torch = pytest.importorskip("torch")
    path = tmp_path / "t.safetensors"
    weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    save_tensors(path, {"w": weight, "t": weight.T})
    np.testing.assert_array_equal(Tensors(path)["t"], weight.detach().numpy().T)
    with pytest.raises(TypeError, match=r"half: got torch\.bfloat16"):
        save_tensors(path, {"half": torch.zeros(2, dtype=torch.bfloat16)})


def test_parameter_names_are_the_models() -> None:
    pytest.importorskip("torch")
    from transformer_ext.model.transformer import Transformer

    changes = [
        dict(zip(("tie", "output_bias", "bias", "norm"), values, strict=True))
        for values in product(
            ("all", "target", "none"), (False, True), (False, True), ("layer", "rms")
        )
    ] + [
        {"norm_first": True},
        {"norm_first": True, "final_norm": False},
        {"final_norm": True},
        {"embedding_norm": True, "positions": "learned", "max_positions": 7},
        {"activation": "swiglu", "num_kv_heads": 1, "head_dim": 6},
        {"num_encoder_layers": 2, "num_decoder_layers": 0},
    ]
    for change in changes:
        config = small_config(30, **change)
        parameters = dict(Transformer(config).named_parameters())
        found = {name: tuple(value.shape) for name, value in parameters.items()}
        assert parameter_shapes(config) == found, change


def test_model_directory_round_trip(model, tokenizers) -> None:
    assert sorted(os.listdir(model)) == ["config.json", "model.safetensors", "tokenizer.model"]
    loaded = load_model_dir(model)
    config = small_config()
    assert loaded.config == config
    assert loaded.training == {"max_train_length": 99}
    assert loaded.source_tokenizer is loaded.target_tokenizer
    assert loaded.source_tokenizer.sha256 == tokenizers[0].sha256
    for name, value in some_weights(config).items():
        np.testing.assert_array_equal(loaded.weights[name], value)
    assert not leftovers(model.parent)


def test_model_directory_with_two_tokenizers(tmp_path, tokenizers) -> None:
    config = TransformerConfig(
        300, 312, d_model=8, nhead=2, num_encoder_layers=1, num_decoder_layers=1, tie="target"
    )
    save_model_dir(tmp_path / "m", config, some_weights(config), *tokenizers)
    loaded = load_model_dir(tmp_path / "m")
    assert loaded.source_tokenizer.vocab_size == tokenizers[0].vocab_size
    assert loaded.target_tokenizer.sha256 == tokenizers[1].sha256
    assert (tmp_path / "m" / "source.model").is_file()


def test_a_state_dict_is_taken(tmp_path, tokenizers) -> None:
    pytest.importorskip("torch")
    from transformer_ext.model.transformer import Transformer

    config = small_config()
    network = Transformer(config)
    save_model_dir(tmp_path / "m", config, network.state_dict(), tokenizers[0], tokenizers[0])
    loaded = load_model_dir(tmp_path / "m")
    for name, value in network.named_parameters():
        np.testing.assert_array_equal(loaded.weights[name], value.detach().numpy())


def test_a_model_is_never_overwritten_silently(model, tokenizers) -> None:
    config = small_config()
    arguments = (model, config, some_weights(config), tokenizers[0], tokenizers[0])
    before = (model / "config.json").read_bytes()
    with pytest.raises(FileError, match="is there already"):
        save_model_dir(*arguments)
    assert (model / "config.json").read_bytes() == before
    save_model_dir(*arguments, overwrite=True)
    assert load_model_dir(model).training == {}


def test_weights_that_do_not_fit_are_not_written(tmp_path, tokenizers) -> None:
    config = small_config()
    weights = some_weights(config)
    wrong_shape = {**weights, "source_embedding.weight": np.zeros((300, 9), np.float32)}
    fewer = dict(list(weights.items())[1:])
    for wrong, message in (
        (wrong_shape, r"source_embedding.weight has the shape \[300, 9\], expected \[300, 8\]"),
        (fewer, "source_embedding.weight is missing"),
        ({**weights, "x": np.zeros(1)}, "x is not part of the model"),
        (
            {**weights, "generator.weight": np.zeros((300, 8), np.float32)},
            "generator.weight is not part of the model",
        ),
    ):
        with pytest.raises(FileError, match=message):
            save_model_dir(tmp_path / "m", config, wrong, tokenizers[0], tokenizers[0])
    with pytest.raises(FileError, match="src_vocab_size is 200, but .* has 300 pieces"):
        config = small_config(200)
        weights = some_weights(config)
        save_model_dir(tmp_path / "m", config, weights, tokenizers[0], tokenizers[0])
    assert os.listdir(tmp_path) == []


def edit_config(model: Path, /, **changes) -> None:
    values = json.loads((model / "config.json").read_text())
    for path, value in changes.items():
        target = values
        *parents, name = path.split("__")
        for parent in parents:
            target = target[parent]
        if value is None:
            del target[name]
        else:
            target[name] = value
    (model / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 3}, "format_version is 3, expected 1 or 2; a newer version"),
        ({"format_version": None}, "format_version is None, expected 1 or 2"),
        (
            {"format_version": None, "model_type": "marian"},
            "MarianMT, which is to be converted first: python -m transformer_ext.convert --from-huggingface ",
        ),
        ({"format_version": 2}, "kind: got None, expected one of encoder-decoder, decoder-only"),
        (
            {"format_version": 2, "kind": "decoder"},
            "kind: got 'decoder', expected one of encoder-decoder, decoder-only",
        ),
        (
            {"format_version": 2, "kind": "encoder-only"},
            "is an encoder-only (text encoding) model, expected an encoder-decoder (translation)",
        ),
        ({"model": None}, "the part 'model' is missing"),
        ({"tokenizer": None}, "the part 'tokenizer' is missing"),
        ({"model__d_model": 16}, "does not fit the model's configuration"),
        ({"model__nhaed": 2}, "unknown key 'nhaed'; did you mean 'nhead'"),
        ({"model__d_model": "8"}, "d_model: expected an integer"),
        ({"model__src_vocab_size": 200, "model__tgt_vocab_size": 200}, "has 300 pieces"),
        ({"model__layer_norm_eps": 0.0}, "layer_norm_eps: expected a number above 0"),
        ({"model__layer_norm_eps": float("nan")}, "layer_norm_eps: expected a number above 0"),
        ({"model__eos_id": 300}, "eos_id: expected an integer from 0 to 299, got 300"),
        ({"model__eos_id": 0}, "eos_id: expected another id than pad_id, got 0"),
        ({"model__eos_id": 5}, "eos_id is 5, but 3 in"),
        ({"model__decoder_start_id": -1}, "decoder_start_id: expected an integer of at least 0"),
        ({"model__norm_first": "no"}, "norm_first: expected true or false, got 'no'"),
        (
            {"model__num_decoder_layers": 9999},
            "num_encoder_layers and num_decoder_layers are 10000",
        ),
        ({"model__d_model": 2**40}, "d_model: expected an integer from 1 to 2147483647"),
        (
            {"training__max_train_length": 0},
            "training.max_train_length: got 0, expected an integer",
        ),
        ({"training": [1]}, "training: got [1], expected an object"),
        ({"tokenizer__source": ".."}, "tokenizer.source: got '..', expected a file name"),
        ({"tokenizer__sha256": "0"}, "not the tokenizer that this model was trained with"),
        ({"tokenizer__source": "../tokenizer.model"}, "expected a file name"),
        ({"tokenizer__source": "none.model"}, "none.model: no such file"),
    ],
)
def test_a_wrong_config_is_refused(model, changes, message: str) -> None:
    edit_config(model, **changes)
    with pytest.raises(FileError) as caught:
        load_model_dir(model)
    assert message in str(caught.value)


def test_missing_files_are_named(model) -> None:
    for name in ("model.safetensors", "tokenizer.model", "config.json"):
        (model / name).unlink()
        with pytest.raises(FileError, match=f"{name}: no such file"):
            load_model_dir(model)
    with pytest.raises(FileError, match="no such model directory"):
        load_model_dir(model / "none")


def test_the_folder_of_a_training_names_its_model(model) -> None:
    run = model.parent / "run"
    run.mkdir()
    model.rename(run / "model")
    with pytest.raises(FileError, match=f"its model is {run / 'model'}"):
        load_model_dir(run)
    # An interrupted one has none yet.
    (run / "checkpoints").mkdir()
    (run / "model").rename(run / "checkpoints" / "step-3")
    (run / "checkpoints" / "last").write_text("step-3\n")
    newest = f"the newest checkpoint is {run / 'checkpoints' / 'step-3'}"
    for folder in (run, run / "checkpoints"):
        with pytest.raises(FileError, match=newest):
            load_model_dir(folder)


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_truncated_weights(model, size: int) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(FileError, match=r"model\.safetensors: broken or cut off"):
        load_model_dir(model)


def test_damaged_files_are_one_clear_error(tmp_path) -> None:
    """In a process of its own: a crash, a hang or a huge allocation is a failure too."""
    cases = os.environ.get("TRANSFORMER_EXT_FUZZ_CASES", "400")
    script = Path(__file__).with_name("fuzz_model_dir.py")
    done = subprocess.run(
        [sys.executable, str(script), "--cases", cases],
        capture_output=True,
        text=True,
        check=False,
        cwd=script.parents[1],
        env={**os.environ, "PYTHONPATH": str(script.parents[1]), "TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "'FileError': " in done.stdout and "'translated': " in done.stdout


def test_corrupted_files(model) -> None:
    path = model / "model.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:8] + b"\xff" * 40 + good[48:])
    with pytest.raises(FileError, match="broken"):
        load_model_dir(model)
    path.write_bytes(good)
    (model / "tokenizer.model").write_bytes(b"garbage")
    with pytest.raises(FileError, match=r"tokenizer\.model: not a SentencePiece model"):
        load_model_dir(model)


def test_weights_of_another_model_are_refused(model, tmp_path, tokenizers) -> None:
    config = small_config(310)
    save_model_dir(tmp_path / "b", config, some_weights(config), tokenizers[1], tokenizers[1])
    (model / "model.safetensors").write_bytes((tmp_path / "b" / "model.safetensors").read_bytes())
    with pytest.raises(FileError, match="trained with another tokenizer"):
        load_model_dir(model)


def test_another_tokenizer_is_refused(model, tokenizers) -> None:
    (model / "tokenizer.model").write_bytes(tokenizers[1].path.read_bytes())
    edit_config(model, model__src_vocab_size=310, model__tgt_vocab_size=310)
    with pytest.raises(FileError, match="not the tokenizer that this model was trained with"):
        load_model_dir(model)


def test_loading_a_model_does_not_import_torch(model) -> None:
    program = (
        "import sys\n"
        "from transformer_ext.files import load_model_dir\n"
        "model = load_model_dir(sys.argv[1])\n"
        "ids = model.source_tokenizer.encode('The cell.')\n"
        "assert model.target_tokenizer.decode(ids) == 'The cell.'\n"
        "assert model.weights['source_embedding.weight'].shape == (300, 8)\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program, str(model)], check=True)
