"""What --dry-run shows of the data."""

import json
from pathlib import Path

from gcrm_fast.data.encoding import encode_completions
from gcrm_fast.data.tokenization import load_tokenizer
from gcrm_fast.train import main
from support.serving import write_served_model


def test_the_first_pair_is_shown_as_the_model_reads_it(tmp_path: Path, capsys) -> None:
    model = write_served_model(tmp_path / "model")
    record = {
        "prompt": [{"role": "user", "content": "hello\nworld " + "a " * 300 + "z?"}],
        "chosen": [{"role": "assistant", "content": "yes."}],
        "rejected": [{"role": "assistant", "content": "naïve \x1b[2J"}],
    }
    (tmp_path / "pairs.jsonl").write_text(json.dumps(record) + "\n")
    command = ["--data", f"{tmp_path}/pairs.jsonl", "--model", str(model), "--dry-run", "--cache", "none"]
    assert main(command) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    at = next(i for i, line in enumerate(lines) if line.startswith("first pair"))
    pair, prompt, chosen, rejected = lines[at : at + 4]
    assert pair.endswith("pairs.jsonl:1")
    assert '"<|bos|><|im_start|>user\\nhello\\nworld a a' in prompt
    assert " ... " in prompt
    assert prompt.endswith('z?<|im_end|>\\n<|im_start|>assistant\\n"')
    text = f"<|im_start|>user\n{record['prompt'][0]['content']}<|im_end|>\n<|im_start|>assistant\n"
    [(ids, start, _)] = encode_completions(load_tokenizer(model), [text], ["yes.<|im_end|>\n"])
    place = f'tokens {start + 1} to {len(ids)}; the reward is read at the last, "<|im_end|>"'
    assert chosen == f'chosen                 "yes.<|im_end|>", {place}'
    assert '"naïve \\x1b[2J<|im_end|>", tokens' in rejected
