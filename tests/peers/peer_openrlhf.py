"""OpenRLHF: its reward model class on an exported folder, a model that it saves, its client of a reward server."""

import asyncio
import importlib.metadata
import json
import re
import runpy
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import stubs

stubs.install("deepspeed", "flash_attn", "bitsandbytes", "vllm")

import deepspeed.checkpoint.utils  # noqa: E402 (the stubs come first)
import openrlhf.utils.deepspeed.deepspeed as strategies  # noqa: E402
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from openrlhf.datasets.reward_dataset import RewardDataset  # noqa: E402
from openrlhf.models import get_llm_for_sequence_regression  # noqa: E402
from openrlhf.utils import get_tokenizer  # noqa: E402

deepspeed.checkpoint.utils.clone_tensors_for_torch_save = dict
strategies.torch_dist_barrier_and_cuda_sync = lambda: None  # there is one process
VERSION = importlib.metadata.version("openrlhf")
NEW = int(VERSION.split(".")[1]) >= 11  # the names of options, and the client, have changed since 0.8
BROKEN = "openrlhf/models/model.py keeps mean and std in buffers that transformers 5 leaves without values"


def load(folder: str, **options: Any) -> Any:
    """Their model in their dtype, bfloat16; then computed in float32, so that only the arithmetic is compared."""
    precision = {} if NEW else {"bf16": True}
    return get_llm_for_sequence_regression(folder, "reward", attn_implementation="eager", **precision, **options)


def rewards(model: Any, encoded: list[list[int]]) -> list[float]:
    """Of one batch, padded at the left as in their trainer and their server."""
    longest = max(map(len, encoded))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in encoded])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in encoded])
    with torch.no_grad():
        return model.float().eval()(ids, attention_mask=mask).tolist()


def read(models: dict[str, Any], name: str) -> Iterator[dict[str, Any]]:
    """Folders of ``gcrm export --format openrlhf --dtype bfloat16 --standardize`` in their class."""
    folder = models[name]["exported"]
    tokenizer = get_tokenizer(folder, None, "left")
    encoded = [tokenizer(case["text"])["input_ids"] for case in models[name]["cases"]]
    model = load(folder, normalize_reward=False)
    yield {"what": "reward model class", "model": name, "folder": folder, "found": rewards(model, encoded)}
    model = load(folder, normalize_reward=True)
    what = f"reward model class, --{'reward.normalize_enable' if NEW else 'normalize_reward'}"
    found = rewards(model, encoded)
    # mean is rounded to bfloat16
    answer = {"what": what, "model": name, "folder": folder, "shifted": True, "found": found, "tolerance": 0.01}
    yield {**answer, "known": BROKEN} if NEW else answer


def saved(base: dict[str, Any], prefix: str, work: Path, texts: bool) -> dict[str, Any]:
    """A new head on ``base``, saved as their trainer saves, and rewards of the ids that their data set makes."""
    model = load(base["folder"], init_value_head=True, value_head_prefix=prefix)
    tokenizer = get_tokenizer(base["folder"], model, "left")
    folder = work / f"openrlhf-{VERSION}-{prefix}"
    ds = SimpleNamespace(zero_stage=2, tensor_parallel_size=1)
    strategy = SimpleNamespace(
        is_rank_0=lambda: True,
        _unwrap_model=lambda unwrapped: unwrapped,
        args=SimpleNamespace(ds=ds, zero_stage=2, ds_tensor_parallel_size=1),
    )
    strategies.DeepspeedStrategy.save_model(strategy, model, tokenizer, str(folder))

    cases = base["cases"]
    if texts:
        rows = {"prompt": [c["messages"][0]["content"] for c in cases]}
        answers = [c["messages"][1]["content"] for c in cases]
        rows |= {"chosen": answers, "rejected": answers}
    else:
        rows = {side: [c["messages"] for c in cases] for side in ("chosen", "rejected")}
    data = Namespace(
        prompt_key="prompt" if texts else None,
        chosen_key="chosen",
        rejected_key="rejected",
        apply_chat_template=not texts,
        tokenizer_chat_template=None,
    )
    options = SimpleNamespace(args=Namespace(data=data) if NEW else data)
    dataset = RewardDataset(Dataset.from_dict(rows), tokenizer, 256, options, num_processors=1)
    encoded = [dataset[i][0][0].tolist() for i in range(len(cases))]
    end = " " + tokenizer.eos_token
    given = (
        [[p, c + end] for p, c in zip(rows["prompt"], rows["chosen"], strict=True)]
        if texts
        else [[c["messages"][:1], c["messages"][1:]] for c in cases]
    )
    what = f"model saved with head {prefix!r}, {'texts (--end as-is)' if texts else 'messages'}, scored by gcrm"
    found = rewards(model, encoded)
    choice = "as-is" if texts else "auto"
    return {"what": what, "model": "base", "folder": str(folder), "found": found, "texts": given, "end": choice}


def asked(models: dict[str, Any], name: str) -> dict[str, Any]:
    """Their client on a running ``gcrm serve``."""
    url = f"{models[name]['url']}/get_reward"
    tokenizer = get_tokenizer(models[name]["folder"], None, "left")
    found = []
    for case in models[name]["cases"]:
        prompt = case["prompt"]
        if NEW:
            from openrlhf.utils.agent import SingleTurnAgentExecutor

            answer = tokenizer(case["text"].removeprefix(prompt), add_special_tokens=False)["input_ids"]
            output = SimpleNamespace(token_ids=answer, finish_reason="stop", logprobs=None)

            async def generate(*_: Any, output: Any = output, **__: Any) -> Any:
                return SimpleNamespace(outputs=[output])

            sampling, engine = SimpleNamespace(max_tokens=64, logprobs=None), SimpleNamespace(generate=generate)
            executor = SingleTurnAgentExecutor(url)
            result = asyncio.run(executor.execute(prompt, "", sampling, 256, tokenizer, engine))
            found.append(result["reward"][0])
        else:
            from openrlhf.utils.remote_rm_utils import request_api_wrapper

            body = {"query": [case["text"]], "prompts": [prompt], "labels": [""]}
            found.append(request_api_wrapper(url, body)["rewards"][0])
    return {"what": "remote reward client on gcrm serve", "model": name, "found": found}


def options_of(module: str) -> set[str]:
    """The names of a program's options, from its --help."""
    text, argv = StringIO(), sys.argv
    sys.argv = [module, "--help"]
    try:
        with redirect_stdout(text), suppress(SystemExit):
            runpy.run_module(module, run_name="__main__")
    finally:
        sys.argv = argv
    return set(re.findall(r"(?<![\w-])--[\w.]+", text.getvalue()))


def documented() -> dict[str, Any]:
    """Whether their programs have the options of our example and of the docs."""
    script = Path(__file__).resolve().parents[2] / "examples" / "openrlhf_remote.sh"
    wanted = {*re.findall(r"--(?:actor|data|reward)\.\w+", script.read_text()), "--reward.normalize_enable"}
    missing = sorted(wanted - options_of("openrlhf.cli.train_ppo_ray"))
    what = f"options of examples/openrlhf_remote.sh ({', '.join(sorted(wanted))}) missing from theirs"
    return {"what": what, "said": ", ".join(missing) or "none", "documented": "none"}


def main(work: Path, answers: Path) -> None:
    models = json.loads((work / "models.json").read_text())
    made = [*read(models, "text"), *read(models, "chatml")]
    made += [saved(models["base"], "score", work, True), saved(models["base"], "value_head", work, False)]
    made += [asked(models, "text"), asked(models, "chatml")]
    if NEW:
        made.append(documented())
    answers.write_text(json.dumps(made))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
