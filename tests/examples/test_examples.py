"""The examples run: what each sends and reads, and what a policy learns."""

import asyncio
import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from gcrm_fast import RewardModel
from gcrm_fast.data.chat import as_text
from gcrm_fast.data.encoding import Completion
from support.serving import running, write_served_model
from support.training_runs import ROOT


def example(name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_served_model(tmp_path_factory.mktemp("examples") / "model")


def test_verl_gets_the_reward_of_the_server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = RewardModel.from_pretrained(folder)
    with running(model) as server:
        monkeypatch.setenv("GCRM_URL", f"http://127.0.0.1:{server.port}")
        reward = example("verl_reward").compute_score("data", " yes.", None, {"prompt": "hello?"})
    assert reward == pytest.approx(float(model.score(["hello?"], [" yes."])[0]), rel=1e-5)


def test_verl_marks_answers_that_were_cut(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With veRL's manager replaced by one that decodes the answer and calls the function, as its own does."""
    package = tmp_path / "verl" / "experimental" / "reward_loop" / "reward_manager"
    package.mkdir(parents=True)
    (package / "naive.py").write_text(
        "class NaiveRewardManager:\n"
        "    async def run_single(self, data):\n"
        "        item = data[-1]\n"
        "        ids = item.batch['responses'][: item.batch['attention_mask'][-len(item.batch['responses']):].sum()]\n"
        "        text = self.tokenizer.decode(ids, skip_special_tokens=True)\n"
        "        return {'reward_score': self.compute_score('data', text, None, item.non_tensor_batch['extra_info'])}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    model, module = RewardModel.from_pretrained(folder), example("verl_reward")
    question = [{"role": "user", "content": "hello?"}]
    prompt, _ = as_text(model.tokenizer, question, "yes.")
    manager = module.CutsIncluded()
    manager.tokenizer, manager.compute_score = model.tokenizer, module.compute_score
    with running(model) as server:
        monkeypatch.setenv("GCRM_URL", f"http://127.0.0.1:{server.port}")
        for text, cut in (("yes.<|im_end|>", False), ("yes.", True)):
            ids = torch.tensor(model.tokenizer(text, add_special_tokens=False)["input_ids"] + [0, 0])
            mask = torch.tensor([1] * (len(ids) - 2 + 3) + [0, 0])  # after a prompt of three tokens
            row = {"extra_info": {}, "raw_prompt": question}
            item = SimpleNamespace(batch={"responses": ids, "attention_mask": mask}, non_tensor_batch=row)
            [judged] = model.judge(model.encode([prompt], [text], [cut]))
            score = asyncio.run(manager.run_single([item]))["reward_score"]
            assert score == pytest.approx(judged.reward, rel=1e-5), text
            assert row["extra_info"] == {"cut": cut, "prompt": question}


def test_a_client_filters_a_policy_while_it_writes(folder: Path) -> None:
    """A policy that writes what the test says, 8 tokens a turn: the reward model drops all samples but the best."""
    model, client = RewardModel.from_pretrained(folder), example("live_client")
    end = model.tokenizer.eos_token_id
    texts = [model.tokenizer(text * 20, add_special_tokens=False)["input_ids"] for text in (" yes", " no", " 123")]
    samples = [[*texts[0][:9], end], [*texts[1][:13], end], texts[2][:16]]
    prompt_ids = model.encode(["hello?"], [""], [True])[0].ids.tolist()
    asked = []

    def step(ids: Sequence[list[int]], turn: int) -> list[list[int]]:
        asked.append(len(ids))
        done = [one[len(prompt_ids) :] for one in ids]
        own = [next(s for s in samples if s[: len(d)] == d) for d in done] if turn else samples
        return [sample[len(d) : len(d) + client.CHUNK] for sample, d in zip(own, done, strict=True)]

    with running(model) as server:
        options = {"samples": 3, "stop_ids": [end], "max_new_tokens": 16}
        url = f"http://127.0.0.1:{server.port}"
        whole = client.filtered(url, step, prompt_ids, threshold=-1.0, **options)
        strict = client.filtered(url, step, prompt_ids, threshold=1.0, **options)
        metrics = server.ask("/metrics", method="GET").body
    rewards = model.judge([Completion(np.array(prompt_ids + s, dtype=np.int32), len(prompt_ids), 0) for s in samples])
    best = max((0, 1), key=lambda i: rewards[i].reward)
    assert (whole.ids, whole.dropped) == (samples[best], [])
    assert whole.reward == pytest.approx(rewards[best].reward, rel=1e-4)
    assert whole.tokens == sum(map(len, samples))
    assert len(strict.dropped) == 2
    assert strict.tokens < whole.tokens
    assert asked == [3, 3, 3, 1]
    assert "gcrm_streams 0.0" in metrics


def test_the_step_for_vllm_gives_each_row_and_turn_its_own_seed() -> None:
    """Runs the step of the docstring on an engine that answers with each request's seed."""
    source = (ROOT / "examples" / "live_client.py").read_text(encoding="utf-8")
    [said] = re.findall(r"With vLLM:\n\n(.*?)\"\"\"", source, re.S)

    def generate(prompts: list[dict[str, list[int]]], parameters: list[dict[str, int]]) -> list[SimpleNamespace]:
        assert [one["prompt_token_ids"] for one in prompts] == [[5, 6]] * len(parameters)
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=(one["seed"],))]) for one in parameters]

    names: dict[str, Any] = {"SamplingParams": dict, "CHUNK": 8, "llm": SimpleNamespace(generate=generate)}
    exec(textwrap.dedent(said), names)
    seeds = [seed for turn in range(4) for [seed] in names["step"]([[5, 6]] * (16 - 4 * turn), turn)]
    assert len(set(seeds)) == len(seeds) == 16 + 12 + 8 + 4


class Classifier(BaseHTTPRequestHandler):
    """Answers as vLLM's /classify does."""

    bodies: ClassVar[list[dict[str, str]]] = []

    def do_POST(self) -> None:
        self.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"data": [{"index": 0, "probs": [-0.25], "num_classes": 1}]}).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def classifier() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Classifier)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/classify"
    server.shutdown()
    server.server_close()


def test_vllm_is_sent_the_end_token(folder: Path, classifier: str) -> None:
    assert example("vllm_classify").reward(str(folder), "hello?", " yes.", classifier) == -0.25
    end = RewardModel.from_pretrained(folder).tokenizer.eos_token
    assert Classifier.bodies[-1] == {"model": str(folder), "input": f"hello? yes.{end}"}


def test_openrlhf_is_given_the_endpoint(tmp_path: Path) -> None:
    """With both programs replaced by ones that write down their arguments."""
    then = {"gcrm": "exec sleep 20", "python": f"while [ ! -s {tmp_path}/gcrm.said ]; do sleep 0.05; done"}
    for name, last in then.items():
        (tmp_path / name).write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/{name}.said\n{last}\n')
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    script = ROOT / "examples" / "openrlhf_remote.sh"
    subprocess.run([script, "model", "policy", "prompts", "--train.batch_size", "8"], env=environment, check=True)
    assert (tmp_path / "gcrm.said").read_text().split() == ["serve", "model", "--port", "5000"]
    said = (tmp_path / "python.said").read_text()
    assert "--reward.remote_url http://127.0.0.1:5000/get_reward --train.batch_size 8" in said


def test_rewardbench_is_given_the_local_file(tmp_path: Path) -> None:
    """With the program replaced by one that writes down its arguments."""
    (tmp_path / "rewardbench").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/said\n')
    (tmp_path / "rewardbench").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    script = ROOT / "examples" / "rewardbench_local.sh"
    subprocess.run([script, "model", "pairs.jsonl"], env=environment, check=True)
    said = (tmp_path / "said").read_text()
    assert said.startswith("--model model --dataset pairs.jsonl --load_json --not_quantized --torch_dtype float32")


@pytest.mark.parametrize("name", ["grpo_with_trl.py", "openrlhf_remote.sh", "rewardbench_local.sh", "vllm_classify.py"])
def test_an_example_without_arguments_says_what_it_needs(name: str) -> None:
    path = ROOT / "examples" / name
    program = [sys.executable] if path.suffix == ".py" else []
    done = subprocess.run([*program, path], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert re.fullmatch(rf"usage: (python )?examples/{re.escape(name)} MODEL\b.*\n", done.stderr)


def test_grpo_without_a_model_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trl", reason="TRL is not installed: pip install 'gcrm-fast[trl]'")
    pytest.importorskip("datasets")
    path = ROOT / "examples" / "grpo_with_trl.py"
    monkeypatch.setattr(sys, "argv", [str(path), "/no/such/model"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(path), run_name="__main__")
    assert end.value.code == 2
    assert re.fullmatch(r"grpo_with_trl\.py: .*/no/such/model: no such folder.*\n", capsys.readouterr().err)


@pytest.mark.slow
def test_a_policy_gets_better_by_our_rewards(finished: Path) -> None:
    """GRPO by TRL itself: the verifier, which the policy never meets, accepts more of its solutions than before."""
    pytest.importorskip("trl", reason="TRL is not installed: pip install 'gcrm-fast[trl]'")
    pytest.importorskip("datasets")
    gain = example("grpo_with_trl").run(str(finished / "model"))
    assert gain.last_reward > gain.first_reward
    assert gain.right_after > gain.right_before + 0.2
