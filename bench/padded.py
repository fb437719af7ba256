"""What people run today, for the training step's benchmark: transformers on padded batches, and TRL's RewardTrainer.

Both are one ``LlamaForSequenceClassification`` with float32 weights, under autocast for bfloat16, and one fused AdamW.
A pair is two sequences, each with its own copy of the prompt; a micro-batch of n pairs is one padded [2n, L] batch.
"""

import contextlib
import importlib.util
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForSequenceClassification, TrainerCallback

import drawn
import measure
from gcrm_fast.common.errors import one_line
from gcrm_fast.data.encoding import TokenizedPair
from gcrm_fast.data.sampling import Sampling, draw_samples
from gcrm_fast.data.tokenization import train_tokenizer
from gcrm_fast.model.llama import ModelConfig
from gcrm_fast.training.config import TrainConfig
from gcrm_fast.training.objectives import Objective, ranking_loss
from gcrm_fast.training.optimizer import Updater
from records import BOS, EOS, PAD

SCHEDULE_STEPS = 1_000_000  # enough to keep the learning rate constant


def naive_contrastive(z_RD: Tensor, rows_4NS: Tensor, has_positive_N: Tensor) -> Tensor:
    """The default objective (paired, log_then_mean) as people write it: index, cosine_similarity, log-sigmoid; [N]."""
    a, b, m, n = z_RD[rows_4NS].float()
    positive = -F.logsigmoid(torch.cosine_similarity(a, b, dim=-1)).mean(-1)
    negative = -F.logsigmoid(-torch.cosine_similarity(m, n, dim=-1)).mean(-1)
    return torch.where(has_positive_N, positive, 0.0) + negative


def cut(pairs: Sequence[TokenizedPair], size: int, bucketed: bool) -> list[list[TokenizedPair]]:
    """Micro-batches of ``size`` pairs, in order, or sorted by length within the global batch with ``bucketed``."""
    order = sorted(pairs, key=longest, reverse=True) if bucketed else list(pairs)
    return [order[i : i + size] for i in range(0, len(order), size)]


def longest(pair: TokenizedPair) -> int:
    return max(len(pair.chosen_ids), len(pair.rejected_ids))


@contextlib.contextmanager
def renamed_options() -> Iterator[None]:
    """Silences warnings about the old name of gradient checkpointing: transformers 4.57 and TRL know no other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def classifier(
    config: ModelConfig, seed: int, dtype: torch.dtype, device: torch.device
) -> tuple[LlamaForSequenceClassification, str]:
    """transformers' model with the initial weights of ours, float32, and its attention for ``dtype``."""
    flash = device.type == "cuda" and dtype == torch.bfloat16 and importlib.util.find_spec("flash_attn") is not None
    attention = "flash_attention_2" if flash else "sdpa"
    fields: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "num_labels": 1,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "use_cache": False,
        "attn_implementation": attention,
    }
    with torch.device(device):
        model = LlamaForSequenceClassification(LlamaConfig(**fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(drawn.value(name, parameter.shape, config, seed, device))
    return model, attention


class Padded:
    """The model, its optimizer, and one optimizer step over a global batch."""

    def __init__(
        self,
        config: ModelConfig,
        options: TrainConfig,
        objective: Objective,
        sampling: Sampling,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.model, self.attention = classifier(config, options.seed, dtype, device)
        self.model.train()
        self.updater = Updater(self.model, options, SCHEDULE_STEPS, device)
        self.objective, self.sampling = objective, sampling
        self.device, self.dtype = device, dtype

    def checkpointing(self, on: bool) -> None:
        with renamed_options():
            if on:
                self.model.gradient_checkpointing_enable({"use_reentrant": False})
            else:
                self.model.gradient_checkpointing_disable()

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def loss(self, pairs: Sequence[TokenizedPair]) -> Tensor:
        """Sum of the total loss over the pairs: ranking, and contrastive on hidden states at the sampled positions."""
        n, device = len(pairs), self.device
        sequences = [p.chosen_ids for p in pairs] + [p.rejected_ids for p in pairs]
        ids_BL = pad_sequence([torch.from_numpy(s).long() for s in sequences], batch_first=True, padding_value=PAD)
        lengths_B = torch.tensor([len(s) for s in sequences])
        mask_BL = torch.arange(ids_BL.shape[1]) < lengths_B[:, None]
        drawn_N4S = np.stack([draw_samples(p, self.sampling, 0) for p in pairs])
        # Sources, goals and negative sources lie on the chosen completion, negative goals on the rejected one.
        sequence_4N1 = torch.arange(n)[:, None] + torch.tensor([0, 0, 0, n])[:, None, None]
        start_4N1 = torch.tensor([[p.chosen_start for p in pairs]] * 3 + [[p.rejected_start for p in pairs]])[..., None]
        rows_4NS = sequence_4N1 * ids_BL.shape[1] + start_4N1 + torch.from_numpy(drawn_N4S).transpose(0, 1)
        has_positive_N = torch.tensor([len(p.chosen_ids) - p.chosen_start > 1 for p in pairs])
        margin_N = torch.tensor([p.margin for p in pairs])
        with self.autocast():
            hidden_BLH = self.model.model(
                input_ids=ids_BL.to(device), attention_mask=mask_BL.to(device), use_cache=False
            ).last_hidden_state
            end_BH = hidden_BLH[torch.arange(2 * n, device=device), lengths_B.to(device) - 1]
            reward_2N = self.model.score(end_BH).float().view(2, n)
        contrastive_N = naive_contrastive(hidden_BLH.flatten(0, 1), rows_4NS.to(device), has_positive_N.to(device))
        ranking_N = ranking_loss(reward_2N, margin_N.to(device))
        return (ranking_N + self.objective.contrastive_weight * contrastive_N).sum()

    def accumulate(self, pairs: Sequence[TokenizedPair], size: int, bucketed: bool) -> Tensor:
        total = torch.zeros((), device=self.device)
        for micro_batch in cut(pairs, size, bucketed):
            loss = self.loss(micro_batch) / len(pairs)
            loss.backward()
            total += loss.detach()
        return total

    def step(self, pairs: Sequence[TokenizedPair], size: int, bucketed: bool) -> None:
        self.updater.update(0, self.accumulate(pairs, size, bucketed))


# ------------------------------------------------------------------------------------------------------------- TRL


def trl_missing() -> str:
    """Why TRL cannot run here, or an empty string."""
    try:
        importlib.import_module("trl").RewardTrainer  # noqa: B018  # trl imports its dependencies lazily
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed: pip install '.[bench]'"
    except Exception as error:  # anything: a broken installation
        return f"TRL cannot be imported ({one_line(error)})"
    return ""


class _Clock(TrainerCallback):
    """Seconds and peak bytes of each optimizer step, from the end of the previous one (includes fetching batches)."""

    def __init__(self, device: torch.device, with_memory: bool) -> None:
        self.device, self.with_memory = device, with_memory
        self.seconds: list[float] = []
        self.peaks: list[measure.Peak] = []
        self.recording = contextlib.ExitStack()
        self.checkpointing = False

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        self.started = measure.now(self.device)

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        with renamed_options():
            self.checkpointing = kwargs["model"].is_gradient_checkpointing
        if self.with_memory:
            self.peaks.append(self.recording.enter_context(measure.recorded_peak(self.device)))

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.recording.close()
        ended = measure.now(self.device)
        self.seconds.append(ended - self.started)
        self.started = ended


@contextlib.contextmanager
def trl_trainer(
    padded: Padded, batches: Sequence[Sequence[TokenizedPair]], size: int, as_shipped: bool, clock: TrainerCallback
) -> Iterator[Any]:
    """TRL's RewardTrainer over ``batches`` in order, ``size`` pairs per micro-batch, with the model and optimizer of
    ``padded``; ``as_shipped`` leaves gradient checkpointing as TRL sets it."""
    import datasets
    from transformers import logging
    from transformers.trainer_callback import PrinterCallback
    from trl import RewardConfig, RewardTrainer

    datasets.disable_progress_bars()
    logging.set_verbosity_error()  # transformers warns about our process group of one
    pairs = [pair for batch in batches for pair in batch]
    rows = [{"chosen_ids": p.chosen_ids.tolist(), "rejected_ids": p.rejected_ids.tolist()} for p in pairs]
    padded.checkpointing(False)
    optimizer = padded.updater.optimizer
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    with tempfile.TemporaryDirectory() as folder, renamed_options():
        options = RewardConfig(
            output_dir=folder,
            per_device_train_batch_size=min(size, len(batches[0])),
            gradient_accumulation_steps=max(len(batches[0]) // size, 1),
            max_steps=len(batches),
            max_grad_norm=padded.updater.clip,
            bf16=padded.dtype == torch.bfloat16,
            use_cpu=padded.device.type == "cpu",
            dataloader_pin_memory=padded.device.type == "cuda",
            disable_tqdm=True,
            report_to=[],
            logging_strategy="no",
            save_strategy="no",
            eval_strategy="no",
            gradient_checkpointing=as_shipped and RewardConfig.gradient_checkpointing,
        )
        trainer = RewardTrainer(
            padded.model,
            options,
            train_dataset=datasets.Dataset.from_list(rows),
            callbacks=[clock],
            processing_class=train_tokenizer(["text"], 259),
            optimizers=(optimizer, schedule),
        )
        trainer.remove_callback(PrinterCallback)
        assert isinstance(trainer.train_dataset, datasets.Dataset)
        in_order = torch.utils.data.SequentialSampler(trainer.train_dataset)
        try:
            with mock.patch.object(trainer, "_get_train_sampler", return_value=in_order):
                yield trainer
        finally:
            # Accelerate replaced the model's forward by one under autocast, and would not do so again.
            for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
                vars(padded.model).pop(name, None)
            padded.checkpointing(False)


def trl_steps(
    padded: Padded, batches: Sequence[Sequence[TokenizedPair]], size: int, as_shipped: bool, with_memory: bool = False
) -> _Clock:
    """Runs ``trainer.train()`` for one optimizer step per batch; start-up, logging and saving are not timed."""
    clock = _Clock(padded.device, with_memory)
    with trl_trainer(padded, batches, size, as_shipped, clock) as trainer:
        trainer.train()
    return clock


def trl_gradients(padded: Padded, pairs: Sequence[TokenizedPair]) -> Tensor:
    """Mean ranking loss of the pairs as TRL computes it; gradients are left in the model."""
    with trl_trainer(padded, [pairs], len(pairs), False, TrainerCallback()) as trainer:
        batch = next(iter(trainer.get_train_dataloader()))
        with padded.autocast():
            loss = trainer.compute_loss(padded.model, batch)
        loss.backward()
    return loss.detach()
