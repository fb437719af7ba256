"""Rewards from vLLM: the last token's score of a saved model.

    vllm serve MODEL --runner pooling
    python examples/vllm_classify.py MODEL "PROMPT" "COMPLETION"

The text must end with the token at which the model was trained to be read, so it is appended here.
"""

import json
import sys
from urllib.request import Request, urlopen

from transformers import AutoTokenizer

URL = "http://127.0.0.1:8000/classify"


def reward(model: str, prompt: str, completion: str, url: str = URL) -> float:
    tokenizer = AutoTokenizer.from_pretrained(model)
    body = {"model": model, "input": prompt + completion + tokenizer.eos_token}
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=60) as answer:
        return float(json.load(answer)["data"][0]["probs"][0])


if __name__ == "__main__":
    if len(sys.argv) != 4:
        print("usage: python examples/vllm_classify.py MODEL PROMPT COMPLETION", file=sys.stderr)
        sys.exit(2)
    print(reward(*sys.argv[1:4]))
