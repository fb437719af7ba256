"""Small models and pairs that several test files share."""

import importlib
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import matplotlib
import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import settings

# Before anything imports triton: without a GPU its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS refuses work under ``poisoned``

from gcrm_fast import cli
from gcrm_fast.data.encoding import TokenizedPair
from gcrm_kernels import launch
from support.small import SPECIAL, VOCAB
from support.training_runs import Gcrm, Result, torchrun, write_pairs

GPU = torch.cuda.is_available()  # tests see none by default
# The same examples at every run, so that a red test is the change's own. --hypothesis-profile=default: fresh ones.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")

VISIBLE = "CUDA_VISIBLE_DEVICES"
# Modules of gcrm_kernels with kernels.
OPERATORS = ("contrastive", "dense", "gather", "qvalues", "rms_norm", "rotary", "swiglu")


def pytest_configure() -> None:
    """No test asks the Hub: not here, where huggingface_hub is imported already, and not in a subprocess."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    huggingface_hub.constants.HF_HUB_OFFLINE = True


@pytest.fixture(autouse=True, scope="session")
def _on_cpus() -> Iterator[str | None]:
    """Tests run on CPUs, and so in float32, where there is a GPU too: subprocesses and shared runs included."""
    with pytest.MonkeyPatch.context() as patch:
        before = os.environ.get(VISIBLE)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setenv(VISIBLE, "")
        yield before


@pytest.fixture(autouse=True, scope="module")
def _on_the_gpu(request: pytest.FixtureRequest, _on_cpus: str | None) -> Iterator[None]:
    """But files that take DEVICE from support/devices.py run on the GPU, if there is one."""
    with pytest.MonkeyPatch.context() as patch:
        if hasattr(request.module, "DEVICE"):
            patch.setattr(torch.cuda, "is_available", lambda: GPU)
            patch.delenv(VISIBLE) if _on_cpus is None else patch.setenv(VISIBLE, _on_cpus)
        yield


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests neither read nor fill the user's cache, subprocesses included; matplotlib keeps its slow font list."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPLCONFIGDIR", matplotlib.get_cachedir())
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> None:
    """Random weights that tests share are the same in each process and whatever ran before, as those of a test are."""
    if fixturedef.scope != "function":
        torch.manual_seed(zlib.crc32(fixturedef.argname.encode()))


@pytest.fixture(autouse=True)
def _fixed_seed() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.random.fork_rng():
        yield


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hub names are looked up in the local cache only, on machines with a network too."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(params=["pytorch", "triton"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which implementation runs. float64 always takes the PyTorch path."""
    if request.param == "triton" and not launch.HAS_TRITON:
        pytest.skip("triton is not installed")
    takes_triton = request.param == "triton"
    for name in OPERATORS:  # some of these names are functions in the package
        module = importlib.import_module(f"gcrm_kernels.{name}")
        monkeypatch.setattr(module, "use_triton", lambda x: takes_triton and x.dtype in launch.TRITON_DTYPES)
    return request.param


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Uninitialized memory is NaN, so that an element that a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)  # which also fills empty tensors with NaN
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def gcrm(capsys: pytest.CaptureFixture[str]) -> Gcrm:
    """``gcrm COMMAND ARGUMENTS`` in this process."""

    def call(command: str, *arguments: object) -> Result:
        return Result(cli.run(command, [*map(str, arguments)]), *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def pair_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """21 pairs, two per prompt."""
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl.gz")


@pytest.fixture
def make_pair() -> Callable[..., TokenizedPair]:
    """make_pair(id, prompt length, chosen length, rejected length, shared=...) with random tokens."""
    rng = np.random.default_rng(0)

    def make(
        pair_id: int, prompt: int, chosen: int, rejected: int, *, shared: int = 0, prompt_key: int = 0
    ) -> TokenizedPair:
        head = np.random.default_rng(prompt_key).integers(SPECIAL, VOCAB, size=prompt)
        same = rng.integers(SPECIAL, VOCAB, size=shared)
        first = int(rng.integers(SPECIAL, VOCAB - 1))
        tails = [
            np.r_[first + side, rng.integers(SPECIAL, VOCAB, size=n - shared - 1)]
            for side, n in enumerate((chosen, rejected))
        ]
        ids = [np.concatenate([head, same, tail]).astype(np.int32) for tail in tails]
        return TokenizedPair(
            pair_id=pair_id,
            chosen_ids=ids[0],
            rejected_ids=ids[1],
            chosen_start=prompt,
            rejected_start=prompt,
            margin=0.25 * (pair_id % 3),
            prompt_key=prompt_key,
        )

    return make


@pytest.fixture
def pairs(make_pair: Callable[..., TokenizedPair]) -> list[TokenizedPair]:
    """Seven pairs over three prompts: shared completion starts, a chosen completion of one token, no prompt at all."""
    return [
        make_pair(0, 5, 6, 7, prompt_key=1),
        make_pair(1, 5, 3, 9, prompt_key=1),
        make_pair(2, 8, 1, 4, prompt_key=2),
        make_pair(3, 8, 12, 9, shared=5, prompt_key=2),
        make_pair(4, 8, 9, 9, shared=1, prompt_key=2),
        make_pair(5, 0, 6, 2, prompt_key=3),
        make_pair(6, 3, 20, 17, shared=10, prompt_key=4),
    ]


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default run scaled down: problems of two steps at most, enough updates to learn something."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # shared by the processes of these tests: one trains, the others wait
    output = base / "finished" / "small"
    sizes = {"arithmetic-steps": 2, "steps": 250, "train-pairs": 16000, "eval-pairs": 200, "goal-pairs": 300}
    options = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    with FileLock(base / "finished.lock"):
        if not (output / "model").is_dir():
            result = torchrun("--dtype", "float32", "--output", str(output), *options)
            assert result.returncode == 0, result.stderr
            assert "held-out AUROC" in result.stdout
    return output
