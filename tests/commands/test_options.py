"""Options of every command: one checker for command line, file and Python; help and errors that anybody understands."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from gcrm_fast import cli
from gcrm_fast.checkpoints.goals import DEFAULT
from gcrm_fast.commands.options import GoalOptions, ScoreOptions, VoteOptions
from gcrm_fast.common.command_line import exit_code, parse_options
from gcrm_fast.common.errors import UserError, kept_if_interrupted
from gcrm_fast.common.files import output_file
from gcrm_fast.common.options import Options, Range, flag, kinds_of
from gcrm_fast.training.config import PRESETS, TrainConfig, parse, read_toml
from support.training_runs import Gcrm

OPTIONS: dict[str, type[Options]] = {name: cli.imported(command.options) for name, command in cli.COMMANDS.items()}
SHARDED = "FSDP2 shards the model by itself (docs/clusters.md)"
RANGES = {
    name: one for name, kind in kinds_of(TrainConfig).items() for one in get_args(kind)[1:] if isinstance(one, Range)
}


def outside(limits: Range) -> list[float]:
    """Numbers next to a range, of the type of its bounds."""
    below = [limits.least - 1] if math.isfinite(limits.least) else []
    above = [limits.greatest + 1] if math.isfinite(limits.greatest) else []
    return below + above + [bound for bound in (limits.above, limits.below) if math.isfinite(bound)]


def shown_help(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *argv: str) -> str:
    monkeypatch.setenv("COLUMNS", "2000")
    with pytest.raises(SystemExit) as end:
        cli.run(argv[0], [*argv[1:], "--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", [*OPTIONS])
def test_help_explains_every_option_in_sentences(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = shown_help(capsys, monkeypatch, name)
    lines = text.splitlines()
    for field in kinds_of(OPTIONS[name]):
        positional = name != "train" and (name, field) != ("select", "model")
        shown = {"model": "MODEL", "policy": "POLICY", "data": "FILE"}.get(field, "") if positional else ""
        named = re.compile(rf"  (-o \S+, )?{shown or flag(field)}(,| |$)")
        [at] = [i for i, line in enumerate(lines) if named.match(line)]
        words = lines[at] if "  " in lines[at].strip() else lines[at + 1]
        assert re.search(r"\.( \([^()]*\))?$", words), words
    for word in ("STR", "''", "None", "()"):
        assert word not in text


def test_help_has_groups_and_says_where_defaults_come_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = shown_help(capsys, monkeypatch, "train")
    titles = [line[:-1] for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles == ["options", *TrainConfig.GROUPS]
    assert f"with --preset arithmetic: {PRESETS['arithmetic']['train_pairs']})" in text
    assert "default: 64; with --preset arithmetic: 80)" in text  # pairs per step
    (tmp_path / "c.toml").write_text("layers = 7\n")
    text = shown_help(capsys, monkeypatch, "train", "--data", "x.jsonl", "--config", str(tmp_path / "c.toml"))
    assert f"with --config {tmp_path / 'c.toml'}: 7)" in text
    assert "with --preset" not in text
    assert "(at least 0; default: 0.0)" in text
    assert "default: none)" in text


def test_every_group_starts_with_a_field() -> None:
    for kind in OPTIONS.values():
        assert set(kind.GROUPS.values()) <= kinds_of(kind).keys()
        assert {flag(name)[2:] for name in kinds_of(kind)} >= kind.ELSEWHERE.keys()
    tables = TrainConfig.ELSEWHERE, TrainConfig.NOT_HERE
    named = [theirs for table in tables for names in table.values() for theirs in names]
    assert len(named) == len(set(named))
    assert not {flag(name)[2:] for name in kinds_of(TrainConfig)} & set(named)


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--help"],
        ["vote", "--help"],
        ["train", "--leyers", "3"],
        ["serve"],
        ["train", "--data", "absent.jsonl", "--output", "new"],
        ["train", "--data", "{file}", "--model", "/no/such/model", "--output", "new"],
        ["train", "--data", "{file}", "--output", "{folder}/.."],
        ["score", "/no/such/model", "{file}", "-o", "new.jsonl"],
        ["score", "{folder}", "absent.jsonl", "-o", "new.jsonl"],
        ["score", "{folder}", "{file}", "-o", "/no/such/folder/new.jsonl"],
        ["vote", "{folder}", "{file}", "-o", "{file}"],
        ["evaluate", "{folder}", "absent.jsonl", "-o", "new"],
        ["overoptimize", "absent.jsonl", "-o", "new"],
        ["generate", "{folder}", "{file}", "-o", "new.jsonl", "--method", "filter", "--reward", "/no/such/model"],
        ["serve", "/no/such/model"],
    ],
)
def test_help_and_what_is_wrong_on_the_command_line_import_no_torch(arguments: list[str], tmp_path: Path) -> None:
    file, folder = tmp_path / "file.jsonl", tmp_path / "model"
    file.touch()
    folder.mkdir()
    arguments = [argument.format(file=file, folder=folder) for argument in arguments]
    program = f"""
import sys
from gcrm_fast import cli
try:
    cli.run({arguments[0]!r}, {arguments[1:]!r})
finally:
    print(*{{"torch", "transformers", "numpy"}} & sys.modules.keys(), "end", file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "end", done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--learning-rate", "3", "--no-such"], "unknown option --learning-rate: did you mean --lr?"),
        (["train", "--batch-size=8"], "unknown option --batch-size: did you mean --global-batch-pairs?"),
        (["train", "--output_dir", "x"], "unknown option --output-dir: did you mean --output?"),
        (["train", "--num_train_epochs", "1"], "unknown option --num-train-epochs: did you mean --epochs?"),
        (["train", "--leyers", "3"], "unknown option --leyers: did you mean --layers?"),
        *(
            (["train", typed, "3"], f"unknown option {typed.replace('_', '-')}: did you mean {meant}?")
            for typed, meant in {
                "--learning-rte": "--lr",
                "--eval-dta": "--eval-data",
                "--globl-batch-pairs": "--global-batch-pairs",
                "--train-layer": "--train-layers",
                "--use_peft": "--lora-rank",
                "--run_name": "--output",
                "--prompt_key": "--columns",
                "--chosen_key": "--columns",
                "--rejected_key": "--columns",
                "--freeze-layers": "--train-layers",
            }.items()
        ),
        *(
            (["train", name, "3"], f"unknown option {name}")
            for name in ("--load-in-4bit", "--num-labels", "--streaming", "--zzzzzz")
        ),
        (["train", "--zero_stage", "3"], f"unknown option --zero-stage: {SHARDED}"),
        (["train", "--deepspeed", "x"], f"unknown option --deepspeed: {SHARDED}"),
        (
            ["train", "--device", "cpu"],
            "unknown option --device: CUDA_VISIBLE_DEVICES chooses the GPUs; empty, it chooses the CPU",
        ),
        (["train", "--packing_samples"], "unknown option --packing-samples: pairs are always packed"),
        (["train", "--margin"], "unknown option --margin: the field 'margin' of a record is always read"),
        (["train", "pairs.jsonl"], "unexpected argument 'pairs.jsonl': did you mean --data pairs.jsonl?"),
        (["score", "--model", "m", "f"], "unknown option --model: write MODEL without an option"),
        (["evaluate", "m", "--data", "f"], "unknown option --data: write FILE without an option"),
        (
            ["score", "m", "f", "-o", "o", "--batch-size", "3"],
            "unknown option --batch-size: did you mean --tokens-per-batch?",
        ),
        (["train", "--lr"], "--lr: expected one argument"),
        (["score"], "MODEL is missing"),
        (["score", "m"], "FILE is missing"),
        (["score", "m", "f"], "--output is missing"),
        (["score", "m", "f", "-o", "o", "--learning-rate", "1"], "unknown option --learning-rate"),
        (["inspect", "m", "f"], "--output is missing"),
    ],
)
def test_a_wrong_call_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err == f"gcrm {arguments[0]}: {message} (see gcrm {arguments[0]} --help)\n"


def test_the_output_has_the_same_short_form_everywhere() -> None:
    assert parse(["-o", "runs/x"]).output == parse(["--output", "runs/x"]).output == "runs/x"


def test_a_wrong_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["trian"])
    assert capsys.readouterr().err == "gcrm: unknown command 'trian': did you mean train? (see gcrm --help)\n"


@pytest.mark.parametrize("name", [*RANGES])
def test_a_range_is_checked_at_every_door(name: str, tmp_path: Path) -> None:
    path, kind = tmp_path / "c.toml", type(getattr(TrainConfig(), name))
    for value in map(kind, outside(RANGES[name])):
        wanted = f"must be {RANGES[name]}"
        path.write_text(f"{name} = {value}\n")
        with pytest.raises(UserError, match=f"^{flag(name)} {value}: {wanted}"):
            parse([flag(name), str(value)])
        with pytest.raises(UserError, match=f"^{path}: option '{name}' is '{value}': {wanted}"):
            parse(["--config", str(path)])
        with pytest.raises(UserError, match=f"^{flag(name)} {value}: {wanted}"):
            TrainConfig(**{name: value})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": math.nan}, "--lr nan: must be"),
        ({"lr": math.inf}, "--lr inf: must be a finite number"),
        ({"layers": True}, "--layers True: must be a whole number"),
        ({"layers": 2.0}, "--layers 2.0: must be a whole number"),
        ({"compile": 1}, "--compile 1: must be true or false"),
        ({"data": "x"}, "--data x: must be a list of texts"),
        ({"data": (1,)}, "--data 1: must be a list of texts"),
        ({"output": "a\0b"}, "--output .*: must be text without NUL characters"),
        ({"output": "bad\udcff"}, r"--output bad\?: must be UTF-8 text"),
        ({"projection_size": 10**18}, "--projection-size .*: must be between 0 and 65536"),
        ({"train_pairs": 10**12}, "--train-pairs .*: must be between 0 and 100000000"),
        ({"lr": 10**400}, "--lr 1000"),
    ],
)
def test_types_and_sizes_are_checked(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainConfig(**values)


@pytest.mark.parametrize("depth", [100, 900, 20_000])
def test_deeply_nested_toml_is_one_line(depth: int, tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    for text in (
        "lr = " + "[" * depth + "]" * depth,
        "data = " + "[" * depth + "]" * depth,
        "x" + ".x" * depth + " = 1",
    ):
        path.write_text(text)
        with pytest.raises(UserError) as error:
            read_toml(path)
        assert len(str(error.value)) < 300


def test_a_config_that_is_no_regular_file_is_one_line(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.toml")
    for path in (Path("/dev/null"), tmp_path / "pipe.toml"):
        with pytest.raises(UserError, match=r"cannot be read \(not a regular file\): --config must name a TOML file"):
            read_toml(path)


def test_an_output_is_a_regular_file(tmp_path: Path) -> None:
    """A device or a pipe would be replaced by the new file."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(UserError, match=rf"--output {path}: is not a regular file"):
            output_file(str(path), ())


def test_values_are_read_as_written() -> None:
    config = parse(["--data", "a", "--eval_data=b", "--data", "c", "--eval-by", "--compile", "--max_length", "9"])
    assert (config.data, config.eval_data, config.eval_by) == (("a", "c"), ("b",), ())
    assert (config.compile, config.max_length, config.deterministic) == (True, 9, False)
    given = ["-o", "out", "m", "--threshold", "-1e-3", "f", "g", "--overwrite"]
    options = parse_options(VoteOptions, given, "gcrm vote")
    assert (options.threshold, options.data, options.output) == (-0.001, ("f", "g"), Path("out"))
    assert parse_options(VoteOptions, ["m", "f", "-o", "o", "--threshold", "auto"], "gcrm vote").threshold == "auto"
    assert parse_options(ScoreOptions, ["m", "-", "-o", "-"], "gcrm score").output == "-"


def test_the_default_goal_has_one_name() -> None:
    assert GoalOptions(model="m", data=("f",), output="o").name == DEFAULT


def test_ctrl_c_says_what_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    def interrupted_halfway() -> None:
        with kept_if_interrupted(lambda: "all"), kept_if_interrupted(lambda: "a half is kept"):
            interrupted()

    assert exit_code("gcrm score", interrupted) == 130
    assert capsys.readouterr().err == "\ngcrm score: interrupted; nothing is kept: the same command starts over\n"
    assert exit_code("gcrm score", interrupted_halfway) == 130
    assert capsys.readouterr().err == "\ngcrm score: interrupted; a half is kept\n"


def test_names_of_fields_are_separated_with_spaces(gcrm: Gcrm) -> None:
    assert parse(["--data", "a", "--eval-by", "b", "c"]).eval_by == ("b", "c")
    for command, option in (("train", "--eval-by"), ("evaluate", "--by"), ("vote", "--by")):
        arguments = ["--data", "a"] if command == "train" else ["model", "file", "-o", "out"]
        done = gcrm(command, *arguments, option, "b,c", "d")
        assert (done.returncode, done.stderr.split(": ", 1)[1]) == (
            2,
            f"{option} b,c d: separate fields with spaces: {option} b c d\n",
        )


def test_closed_pipes_end_quietly() -> None:
    program = """
import sys
from gcrm_fast.common.command_line import exit_code
sys.exit(exit_code("x", lambda: print("y" * 9**6)))
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait() == 1
        assert process.stderr is not None
        assert process.stderr.read() == b""
