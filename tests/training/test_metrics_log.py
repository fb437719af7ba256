"""Where a run's metrics and its model go: TensorBoard, Weights & Biases, the Hugging Face Hub."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata, plugin_data_pb2

from gcrm_fast.common.errors import UserError
from gcrm_fast.train import main
from gcrm_fast.training import accounting, hub, run
from gcrm_fast.training.config import parse
from gcrm_fast.training.snapshots import Checkpoints
from support.training_runs import Gcrm, arguments, rows


def test_tensorboard_shows_scalars_and_options(pair_file: Path, tmp_path: Path, gcrm: Gcrm) -> None:
    assert gcrm("train", *arguments(pair_file, tmp_path)).returncode == 0
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    evaluations = [row["eval/auroc"] for row in rows(tmp_path) if "eval/auroc" in row]
    assert [event.value for event in events.Scalars("eval/auroc")][:3] == pytest.approx(evaluations)
    content = events.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    options = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert options["lr"].number_value == 0.01
    assert options["objective"].string_value == "gcrm"


def test_no_board_where_none_is_wanted(pair_file: Path, tmp_path: Path, gcrm: Gcrm) -> None:
    assert gcrm("train", *arguments(pair_file, tmp_path, "--report-to", "none")).returncode == 0
    assert not (tmp_path / "tensorboard").exists()
    assert rows(tmp_path)


def test_weights_and_biases_without_a_network(
    pair_file: Path, tmp_path: Path, gcrm: Gcrm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its records are kept in a file, in which texts and numbers are readable."""
    pytest.importorskip("wandb")
    for name, value in {"MODE": "offline", "SILENT": "true", "CACHE_DIR": str(tmp_path / "c")}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    output = tmp_path / "run"
    assert gcrm("train", *arguments(pair_file, output, "--report-to", "wandb")).returncode == 0
    assert not (output / "tensorboard").exists()
    [name] = [row["wandb_id"] for row in rows(output) if "wandb_id" in row]
    [file] = output.glob(f"wandb/offline-run-*/run-{name}.wandb")
    kept = file.read_bytes()
    evaluations = [row["eval/auroc"] for row in rows(output) if "eval/auroc" in row]
    options = ("objective_variant", "global_batch_pairs", str(pair_file))
    assert [text for text in (*options, "eval/auroc", *map(str, evaluations)) if text.encode() not in kept] == []


class Hub:
    """Stands for HfApi: notes its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self, name: str, **options: Any) -> None:
        self.calls.append(("create", {"name": name, **options}))

    def upload_folder(self, **options: Any) -> str:
        present = {path.name for path in Path(options["folder_path"]).iterdir()}
        self.calls.append(("upload", {**options, "present": present}))
        return "https://example.org/commit/1"


def test_the_finished_model_goes_to_the_hub(
    pair_file: Path, tmp_path: Path, gcrm: Gcrm, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Hub()
    monkeypatch.setattr(hub, "HfApi", lambda: fake)
    result = gcrm("train", *arguments(pair_file, tmp_path, "--push-to-hub", "owner/judge"))
    assert result.returncode == 0
    assert "uploaded to https://example.org/commit/1" in result.stdout
    (first, created), (second, uploaded) = fake.calls
    assert (first, created) == ("create", {"name": "owner/judge", "private": True, "exist_ok": True})
    assert (second, uploaded["repo_id"]) == ("upload", "owner/judge")
    assert uploaded["folder_path"] == tmp_path / "model"
    assert uploaded["present"] >= {"README.md", "config.json", "gcrm.json", "goal.safetensors", "model.safetensors"}


def test_a_hub_that_does_not_answer_is_noticed_before_training(pair_file: Path, tmp_path: Path, gcrm: Gcrm) -> None:
    result = gcrm("train", *arguments(pair_file, tmp_path, "--push-to-hub", "owner/judge"))
    assert result.returncode == 2
    assert "--push-to-hub owner/judge: not available" in result.stderr
    assert not (tmp_path / "metrics.jsonl").exists()
    with pytest.raises(UserError, match="hf upload owner/judge"):
        hub.upload(tmp_path, "owner/judge")
    with pytest.raises(UserError, match="OWNER/NAME"):
        parse(["--push-to-hub", "judge"])


def test_speeds_are_of_training_alone(pair_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each evaluation and each checkpoint takes a day longer."""
    late = [0.0]
    clock = SimpleNamespace(perf_counter=lambda: time.perf_counter() + late[0])
    monkeypatch.setattr(accounting, "time", clock)

    def a_day_longer(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def slow(*args: Any, **kwargs: Any) -> Any:
            late[0] += 86_400
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, slow)

    a_day_longer(run, "score_pairs")
    a_day_longer(Checkpoints, "save")
    assert (
        main(arguments(pair_file, tmp_path / "run", "--eval-every", "2", "--save-every", "3", "--log-every", "1")) == 0
    )
    assert late[0] > 5 * 86_400
    speeds = [row["pairs_per_s"] for row in rows(tmp_path / "run") if "pairs_per_s" in row]
    assert len(speeds) == 12
    assert min(speeds) > 1e-2
