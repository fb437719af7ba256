"""Rewards in a trainer's process: what TRL hands over, and a policy that gets better by them."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from gcrm_fast import RewardModel
from gcrm_fast.checkpoints.saving import save_model
from gcrm_fast.common.errors import UserError
from gcrm_fast.data.arithmetic import generate, is_correct
from gcrm_fast.data.chat import as_text
from gcrm_fast.data.records import Pair
from gcrm_fast.data.tokenization import choose_pad
from gcrm_fast.rlhf.trl import RewardFunction
from support.chat import CHATML, LLAMA2, chat_tokenizer
from support.small import small_config, small_model

PROMPTS = ["hello?", "hello?", "1 2 3"]
COMPLETIONS = [" yes.", "", " world 漢字"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> RewardModel:
    tokenizer = chat_tokenizer(CHATML)
    config = small_config(vocab_size=len(tokenizer), num_hidden_layers=1)
    choose_pad(tokenizer, config.vocab_size, "test")
    state = {name: p.detach() for name, p in small_model(config, torch.float32).named_parameters()}
    folder = tmp_path_factory.mktemp("rewards") / "model"
    save_model(folder, state, config, tokenizer, torch.arange(32.0), 1)
    return RewardModel.from_pretrained(folder)


def test_text_and_columns(model: RewardModel) -> None:
    """As TRL calls it: by name, with the ids of the completions and every other column of the data."""
    found = RewardFunction(model)(
        prompts=PROMPTS, completions=COMPLETIONS, completion_ids=[[5], [], [6, 7]], answer=[1, 2, 3], trainer_state=None
    )
    assert all(type(reward) is float for reward in found)
    np.testing.assert_allclose(found, model.score(PROMPTS, COMPLETIONS), rtol=1e-6)


def test_the_end_state_as_a_second_signal(model: RewardModel) -> None:
    ends = np.array([q[-1] for q in model.q_values(PROMPTS, COMPLETIONS)])
    found = RewardFunction(model, q_weight=2.5)(PROMPTS, COMPLETIONS)
    np.testing.assert_allclose(found, model.score(PROMPTS, COMPLETIONS) + 2.5 * ends, rtol=1e-5)
    with pytest.raises(UserError, match="no goal 'nix'"):
        RewardFunction(model, q_weight=1.0, goal="nix")


def test_completions_that_the_length_limit_cut(model: RewardModel) -> None:
    """Without one of the policy's end tokens at their end; one without any text counts as ended."""
    found = RewardFunction(model, ends=[1, 2])(PROMPTS, COMPLETIONS, completion_ids=[[5, 1], [9], [6, 1, 7]])
    judged = model.judge(model.encode(PROMPTS, COMPLETIONS, [False, False, True]))
    np.testing.assert_allclose(found, [j.reward for j in judged], rtol=1e-6)


def test_messages(model: RewardModel) -> None:
    prompts = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    answers = [[{"role": "assistant", "content": completion}] for completion in COMPLETIONS]
    texts = [f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n" for prompt in PROMPTS]
    expected = model.score(texts, [f"{completion}<|im_end|>\n" for completion in COMPLETIONS])
    np.testing.assert_allclose(RewardFunction(model)(prompts, answers), expected, rtol=1e-6)


def test_tools_and_system_messages_are_columns(model: RewardModel) -> None:
    prompts = [[{"role": "user", "content": "hello?"}]] * 2
    answers = [[{"role": "assistant", "content": " yes."}]] * 2
    found = RewardFunction(model)(prompts, answers, system=["world", None], tools=None)
    system = "<|im_start|>system\nworld<|im_end|>\n"
    asked = "<|im_start|>user\nhello?<|im_end|>\n<|im_start|>assistant\n"
    np.testing.assert_allclose(found, model.score([system + asked, asked], [" yes.<|im_end|>\n"] * 2), rtol=1e-6)


@pytest.mark.parametrize(
    ("template", "prompt", "completion", "message"),
    [
        (None, [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}], "chat template"),
        (CHATML, "a", [{"role": "assistant", "content": "b"}], "both"),
        (CHATML, "a", "\ud800", "surrogate"),
        (LLAMA2, [{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}], "'user': the last"),
        (LLAMA2, [{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "b"}], "must alternate"),
        (
            "{{ messages | length }}",
            [{"role": "user", "content": "a"}],
            [{"role": "assistant", "content": "b"}],
            "no start",
        ),
    ],
)
def test_what_is_no_text(template: str | None, prompt: object, completion: object, message: str) -> None:
    tokenizer = chat_tokenizer(template or CHATML)
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=message):
        as_text(tokenizer, prompt, completion)


# ---------------------------------------------------------------------------------------------------------------- TRL


def imitate(policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, pairs: list[Pair], steps: int) -> None:
    """Supervised steps on solutions of which half are wrong: a policy that knows the form but not the answers."""
    rng = random.Random(0)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=5e-3)
    for _ in range(steps):
        drawn = rng.sample(pairs, 32)
        texts = [p.prompt + rng.choice((p.chosen, p.rejected)) + tokenizer.eos_token for p in drawn]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        prompt = min(len(tokenizer(p.prompt)["input_ids"]) for p in drawn)
        labels[:, :prompt] = -100
        policy(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def accuracy(policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> float:
    """Share of sampled solutions that the verifier accepts."""
    asked = prompts * 16
    batch = tokenizer(asked, return_tensors="pt", padding=True, padding_side="left")
    sampled = policy.eval().generate(**batch, do_sample=True, top_k=0, max_new_tokens=8)
    texts = tokenizer.batch_decode(sampled[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return float(np.mean([is_correct(*pair) for pair in zip(asked, texts, strict=True)]))


@pytest.mark.slow
def test_a_policy_gets_better_by_our_rewards(finished: Path, tmp_path: Path) -> None:
    """GRPO by TRL itself: the verifier, which the policy never meets, accepts more of its solutions than before."""
    trl = pytest.importorskip("trl", reason="TRL is not installed: pip install 'gcrm-fast[trl]'")
    datasets = pytest.importorskip("datasets")
    model = RewardModel.from_pretrained(finished / "model")
    tokenizer = model.tokenizer
    reward = RewardFunction(model, q_weight=1.0, ends=[tokenizer.eos_token_id])
    pairs = [pair for pair in generate(4000, 0, seed=1, max_steps=2)[0] if pair.fields["steps"] == 1]
    prompts = sorted({pair.prompt for pair in pairs})[3::60]
    policy = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=64,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    imitate(policy, tokenizer, [pair for pair in pairs if pair.prompt in prompts], 180)
    before = accuracy(policy, tokenizer, prompts)
    options = trl.GRPOConfig(
        output_dir=str(tmp_path),
        max_steps=30,
        per_device_train_batch_size=64,
        num_generations=8,
        max_completion_length=8,
        temperature=0.8,
        learning_rate=1e-3,
        beta=0.0,
        mask_truncated_completions=True,
        logging_steps=5,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        seed=0,
    )
    trainer = trl.GRPOTrainer(
        model=policy,
        reward_funcs=reward,
        args=options,
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
    )
    trainer.train()
    rewards = [row["rewards/gcrm/mean"] for row in trainer.state.log_history if "rewards/gcrm/mean" in row]
    assert rewards[-1] > rewards[0]
    assert accuracy(policy, tokenizer, prompts) > before + 0.2
