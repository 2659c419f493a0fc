"""Configuration dataclasses, YAML and command line."""

from __future__ import annotations

import argparse
import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from transformer_ext import config as configuration
from transformer_ext.config import (
    ArgumentParser,
    ConfigError,
    CorpusConfig,
    DataConfig,
    TrainConfig,
    from_dict,
    from_yaml,
    group,
    option,
    options,
    overrides,
    parse_arguments,
    to_commented_yaml,
    to_dict,
)
from transformer_ext.files import parameter_shapes
from transformer_ext.model.config import preset
from transformer_ext.training.schedules import Schedule


@dataclass
class Inner:
    size: int = option(4, help="a size", unit="things", minimum=1, maximum=9)
    kind: Literal["red", "blue"] = option("red", help="a colour")
    ratio: float | None = option(None, help="a ratio", auto="chosen")


@dataclass
class Part:
    """A class with its help in the docstring.

    Attributes:
        width: how wide; None means
            ``height``.
        height, depth: the others.
    """

    width: int | None = None
    height: int = 2
    depth: int = 2
    hidden: int = 0


@dataclass
class Outer:
    name: str = option("x", help="a name, 100 % free")
    files: list[str] = option([], help="some files")
    pair: tuple[float, float] = option((0.5, 0.25), help="two numbers", minimum=0.0)
    flag: bool = option(False, help="a switch")
    inner: Inner = group(Inner, help="Inner things.")
    part: dict[str, object] = overrides(Part, help="Some of Part.", exclude=("hidden",))


def parse(*argv: str) -> Outer:
    return parse_arguments(Outer, argv, prog="test", description="Test.")


def failure(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as caught:
        parse(*argv)
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_defaults_are_the_dataclass() -> None:
    assert parse() == Outer()
    assert parse_arguments(TrainConfig, [], prog="t", description="") == TrainConfig()


def test_command_line_values() -> None:
    config = parse(
        *("--name", "n", "--files", "a", "b c", "--pair", "1", "1e-3", "--flag", "--size", "7"),
        *("--kind", "blue", "--ratio", "2", "--width", "3"),
    )
    assert config == Outer(
        "n", ["a", "b c"], (1.0, 1e-3), True, Inner(7, "blue", 2.0), {"width": 3}
    )
    assert parse("--no-flag").flag is False


def test_command_line_over_file_over_default(tmp_path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("name: file\ninner: {size: 5, ratio: 1e-3}\npart: {width: 8, depth: 1}\n")
    config = parse("--config", str(path), "--size", "6", "--depth", "7", "--ratio", "auto")
    assert config.name == "file"
    assert config.inner == Inner(6, "red", None)
    assert config.part == {"width": 8, "depth": 7}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--siez", "3"], "unknown option '--siez'; did you mean '--size'?"),
        (["--size=x"], "--size: got 'x', expected an integer from 1 to 9"),
        (["--size", "10"], "--size: got 10, expected an integer from 1 to 9"),
        (["--kind", "bleu"], "got 'bleu', expected one of red, blue; did you mean 'blue'?"),
        (["--ratio", "nan"], "--ratio: got nan, expected a number, or auto"),
        (["--pair", "1"], "--pair: expected 2 arguments"),
        (["--hidden", "1"], "unknown option '--hidden'"),
        (["--siz", "3"], "unknown option '--siz'"),
        (["--config", "/nowhere.yaml"], "/nowhere.yaml: cannot be read: No such file"),
    ],
)
def test_wrong_command_lines(capsys, argv: list[str], message: str) -> None:
    assert message in failure(capsys, *argv)


@pytest.mark.parametrize(
    "line", ["m a b --top 3", "m --top 3 a b", "--top 3 m a b", "m a --top 3 b"]
)
def test_options_may_stand_anywhere(line: str) -> None:
    parser = ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("files", nargs="*", default=[])
    parser.add_argument("--top", type=int)
    found = parser.parse_args(line.split())
    assert (found.model, found.files, found.top) == ("m", ["a", "b"], 3)
    assert parser.parse_args(["m", "--top", "3", "--", "-f"]).files == ["-f"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("naem: x", "unknown key 'naem'; did you mean 'name'?"),
        ("inner: {siz: 3}", "unknown key 'inner.siz'; did you mean 'size'?"),
        ("size: 3", "unknown key 'size'; it belongs under 'inner'"),
        ("size: {no: 1}", "unknown key 'size'; inner.size is a single value, not a group of keys"),
        ("size: {kind: red}", "not a group of keys; 'kind' belongs under 'inner'"),
        ("inner: {name: x}", "unknown key 'inner.name'; it belongs at the top"),
        ("inner: {size: big}", "inner.size: got 'big', expected an integer from 1 to 9"),
        ("inner: {size: true}", "inner.size: got True, expected an integer"),
        ("inner: {size: 2.5}", "inner.size: got 2.5, expected an integer"),
        ("inner: {kind: green}", "inner.kind: got 'green', expected one of red, blue"),
        ("inner: 3", "inner: got 3, expected a group of keys"),
        ("part: {hidden: 1}", "unknown key 'part.hidden'"),
        ("pair: [1]", "pair: got [1], expected 2 values, each a number of at least 0.0"),
        ("pair: [1, -1]", "pair: got [1, -1], expected 2 values"),
        ("files: 3", "files: got 3, expected a list, each a text"),
        ("flag: 1", "flag: got 1, expected true or false"),
        ("name: null", "name: got None, expected a text"),
        ("name: a\nname: b", "the key 'name' is given twice"),
        ("- a", "got list, expected a mapping"),
        ("name: [", "not YAML"),
        ("name: \udcff", "not YAML"),
    ],
)
def test_wrong_files(tmp_path, text: str, message: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError) as caught:
        from_yaml(Outer, str(path))
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1 or "not YAML" in message


def test_scientific_notation_without_a_dot() -> None:
    # PyYAML reads 1e-3 as a string.
    assert from_dict(Outer, {"inner": {"ratio": "1e-3"}}).inner.ratio == 1e-3
    with pytest.raises(ConfigError):
        from_dict(Outer, {"inner": {"ratio": "much"}})


def test_empty_file_is_all_defaults(tmp_path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing\n")
    assert from_yaml(Outer, str(path)) == Outer()


@pytest.mark.parametrize(
    "config",
    [
        Outer(),
        Outer("1e3", ["ä b", "on"], (1e-9, 1e22), True, Inner(9, "blue", 1e-5), {"width": None}),
        TrainConfig(),
        TrainConfig(
            preset="small",
            data=DataConfig(src_train=["a: b", "#c"], tgt_train=["d", "e"], max_length_ratio=2.5),
            model={"d_model": 64, "norm_first": True, "activation": "swiglu"},
        ),
        TrainConfig(
            data=DataConfig(
                corpora=[
                    CorpusConfig("a: b", src=["x"], tgt=["y"], weight=2.0, source_tag="<2de>"),
                    CorpusConfig("yes", pairs=["#c.tsv", "d.jsonl"], target_prefix="[de]"),
                ]
            )
        ),
    ],
)
def test_printed_yaml_reads_back_equal(tmp_path, config) -> None:
    path = tmp_path / "printed.yaml"
    text = to_commented_yaml(config)
    path.write_text(text, encoding="utf-8")
    assert from_yaml(type(config), str(path)) == config
    assert from_dict(type(config), to_dict(config)) == config
    for entry in options(type(config)):
        assert entry.help and f"{entry.name}:" in text, entry.key
    assert max(map(len, text.splitlines())) <= 100


def test_commented_out_lines_may_be_uncommented(tmp_path) -> None:
    path = tmp_path / "printed.yaml"
    path.write_text(to_commented_yaml(Outer()).replace("# height: 2", "height: 3"))
    assert from_yaml(Outer, str(path)).part == {"height": 3}


def test_print_config_ends_the_command(capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("--print-config", "--size", "3")
    assert caught.value.code == 0
    assert "  # a size (things; default: 4)\n  size: 3\n" in capsys.readouterr().out


def test_help_shows_defaults_and_units(capsys) -> None:
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "a size (things; default: 4)" in text
    assert "a colour (red | blue; default: red)" in text
    assert "a ratio (default: chosen)" in text
    assert "a name, 100 % free" in text
    assert "how wide; None means height" in text


def test_flags_of_a_training_are_unique_and_explained() -> None:
    parser = argparse.ArgumentParser()
    configuration.add_arguments(parser, TrainConfig)
    names = [entry.name for entry in options(TrainConfig)]
    assert len(names) == len(set(names))
    assert all(entry.help for entry in options(TrainConfig))
    assert {"d_model", "src_train", "learning_rate", "beam_size", "output"} <= set(names)
    assert "src_vocab_size" not in names


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": {"src_train": ["a"]}}, "data.src_train has 1 files and data.tgt_train 0"),
        ({"data": {"src_dev": ["a"], "tgt_dev": ["a"]}}, "data.src_train: got no file"),
        ({"data": {"src_tokenizer": "a"}}, "expected both or neither"),
        (
            {"data": {"corpora": [{"name": "a", "pairs": "a.tsv"}], "pairs_train": ["b.tsv"]}},
            "data.corpora and data.pairs_train: expected one of them",
        ),
        (
            {"data": {"corpora": [{"name": "a", "pairs": "a.tsv"}] * 2}},
            "data.corpora: the name 'a' is given twice",
        ),
        (
            {
                "data": {
                    "corpora": [
                        {"name": "a", "pairs": "a.tsv"},
                        {"name": "b", "pairs": "b.tsv", "weight": 2},
                    ],
                    "temperature": 2.0,
                }
            },
            "data.temperature and the weight of corpus 'b': expected one of them",
        ),
        ({"data": {"temperature": 2.0}}, "data.temperature: got 2.0 without several data.corpora"),
        ({"output": {"resume": True, "overwrite": True}}, "expected one of them"),
        (
            {"training": {"subword_dropout_sides": "source"}},
            "has no effect without training.subword_dropout",
        ),
        (
            {"task": "classify", "training": {"subword_dropout": 0.1}},
            "--subword-dropout: --task classify reads its text as it is",
        ),
    ],
)
def test_options_that_exclude_each_other(values, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        from_dict(TrainConfig, values)


@pytest.mark.parametrize(
    ("corpora", "message"),
    [
        ("3", "data.corpora: got 3, expected a list, each a mapping with keys of name, src, tgt"),
        ("[3]", "data.corpora[0]: got 3, expected a mapping with keys of name"),
        ("[{naem: x}]", "data.corpora[0]: unknown key 'naem'; did you mean 'name'?"),
        ("[{pairs: x.tsv}]", "data.corpora[0]: name: got none, expected a name"),
        ("[{name: x}]", "data.corpora[0]: corpus 'x': expected files: src and tgt, or pairs"),
        ("[{name: x, src: a}]", "data.corpora[0]: src has 1 files and tgt 0"),
        (
            "[{name: x, pairs: a.tsv}, {name: y, pairs: b.tsv, weight: -1}]",
            "data.corpora[1]: weight: got -1, expected a number of at least 0.0",
        ),
        ("[{name: x, pairs: a.tsv, weight: 0}]", "weight: got 0.0, expected a number above 0"),
        ("[{name: x, pairs: a.tsv, source_tag: a b}]", "source_tag: got 'a b', expected a text"),
        ("[{name: x, pairs: a.tsv, target_prefix: <s>}]", "target_prefix: got '<s>', expected"),
        ("[{name: x, pairs: a.tsv, source_tag: <0x0A>}]", "source_tag: got '<0x0A>', expected"),
    ],
)
def test_wrong_corpora(tmp_path, corpora: str, message: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(f"data: {{corpora: {corpora}}}\n")
    with pytest.raises(ConfigError) as caught:
        from_yaml(TrainConfig, str(path))
    assert message in str(caught.value) and str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_list_default_is_not_shared() -> None:
    first = DataConfig()
    first.src_train.append("x")
    assert DataConfig().src_train == []


def test_an_unusable_annotation_is_refused() -> None:
    wrong = dataclasses.make_dataclass("Wrong", [("field", bytes, option(b"", help="bytes"))])
    with pytest.raises(TypeError, match="field"):
        options(wrong)


def recipe(name: str, *argv: str) -> TrainConfig:
    return parse_arguments(TrainConfig, ["--config", name, *argv], prog="test", description="Test.")


@pytest.mark.parametrize("name", sorted(configuration.recipes()))
def test_recipes_are_read_by_name(name: str) -> None:
    config = recipe(name, "--src-train", "a", "--tgt-train", "b", "--seed", "7")
    assert config == recipe(
        str(configuration.recipes()[name]), *("--src-train", "a", "--tgt-train", "b", "--seed", "7")
    )
    assert config.data.src_train == ["a"] and config.training.seed == 7
    # They end by steps, as often as the checkpoints that are averaged are there.
    assert config.training.max_steps and config.training.early_stop_patience == 0
    assert config.output.keep_checkpoints >= config.output.averaged_last


@pytest.mark.parametrize(
    ("name", "millions", "steps", "averaged", "dropout"),
    [("wmt14-base", 65, 100_000, 5, 0.1), ("wmt14-big", 213, 300_000, 20, 0.3)],
)
def test_recipes_of_the_paper(
    name: str, millions: float, steps: int, averaged: int, dropout: float
) -> None:
    config = recipe(name)
    assert config.preset is not None and config.data.vocab_size == 37_000
    pieces = config.data.vocab_size
    architecture = preset(config.preset, pieces, pieces, **config.model)
    count = sum(math.prod(shape) for shape in parameter_shapes(architecture).values())
    # Table 3 counts a little otherwise: biases, and rows of the vocabulary.
    assert count / 1e6 == pytest.approx(millions, rel=0.03)
    assert (architecture.norm_first, architecture.tie) == (False, "all")
    assert architecture.dropout == dropout
    assert architecture.attention_dropout == architecture.activation_dropout == 0.0
    assert config.training.max_steps == steps and config.training.max_tokens == 25_000
    optimizer = config.optimizer
    assert optimizer.betas == (0.9, 0.98) and optimizer.eps == 1e-9
    assert optimizer.label_smoothing == 0.1 and optimizer.clip_norm == 0.0
    rates = Schedule(
        optimizer.schedule,
        optimizer.learning_rate,
        optimizer.warmup_steps,
        steps,
        d_model=architecture.d_model,
    )
    # Equation 3.
    for step in (1, 3999, 4000, 4001, steps):
        expected = architecture.d_model**-0.5 * min(step**-0.5, step * 4000**-1.5)
        assert rates(step) == pytest.approx(expected)
    assert (config.output.average_last, config.output.keep_checkpoints) == (averaged, averaged)
    assert (config.evaluation.beam_size, config.evaluation.length_penalty) == (4, 0.6)


def test_no_more_checkpoints_are_averaged_than_are_kept() -> None:
    def averaged(**given: Any) -> int:
        return from_dict(TrainConfig, {"output": given}).output.averaged_last

    assert averaged() == averaged(keep_checkpoints=9) == averaged(average_last=None) == 5
    assert averaged(keep_checkpoints=3) == 3
    assert averaged(keep_checkpoints=3, average_last=2) == 2
    assert averaged(keep_checkpoints=9, average_last=7) == 7
    with pytest.raises(ConfigError, match="average_last: got 4, expected at most keep_checkpoints"):
        averaged(keep_checkpoints=3, average_last=4)


def test_an_unknown_recipe_names_those_there_are(capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        recipe("wmt14-bse")
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert "--config: wmt14-bse is neither a file nor a recipe of the package" in said
    assert "wmt14-base, wmt14-big" in said and "did you mean 'wmt14-base'?" in said
    # A file of that name comes first.
    (tmp_path / "wmt14-base").write_text("training: {seed: 9}")
    assert recipe("wmt14-base").training.seed == 9
