"""A small model, and a server of it, for the tests of one file."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from gcrm_fast import RewardModel
from support.serving import Server, running, write_served_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_served_model(tmp_path_factory.mktemp("served") / "model")


@pytest.fixture(scope="module")
def model(folder: Path) -> RewardModel:
    return RewardModel.from_pretrained(folder, tokens_per_batch=256)


@pytest.fixture(scope="module")
def server(model: RewardModel) -> Iterator[Server]:
    with running(model) as started:
        yield started
