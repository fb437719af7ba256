"""Plants known faults, one at a time, in a copy of the project; each must turn a named test red (`make mutants`).

A mutant is (file, text, replacement, test to run: a file, and after " -k " which of its tests). The text must occur
exactly once, so that a mutant cannot go stale unnoticed. Exit code 1 if a fault goes unseen, or if a test is red
without one.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INVARIANTS, OBJECTIVES, PARITY = "tests/test_invariants.py", "tests/test_objectives.py", "tests/test_parity.py"
PACKING, DATA, ARITHMETIC = (f"tests/test_{name}.py" for name in ("packing", "data", "arithmetic"))
CHECKPOINT, TOKENIZATION, BAD_INPUT = (f"tests/test_{name}.py" for name in ("checkpoint", "tokenization", "bad_input"))
TRAIN, RECORDS, CACHE = "tests/test_train.py -k processes", "tests/test_records.py", "tests/test_token_cache.py"
BENCH, STEP, SURVIVAL = (f"tests/test_{name}.py -k " for name in ("bench", "step", "survival"))
STAGING, LAYERS = "tests/test_staging.py", "tests/test_layers.py"
SCORING, GOALS = "tests/test_scoring.py -k ", "tests/test_goals.py -k "
FAMILIES = "tests/test_families.py -k "
EXPORT, REWARDS, SERVE = (f"tests/test_{name}.py -k " for name in ("export", "rewards", "serve"))
JUDGING, EVALUATE, VOTE, PAGE = (f"tests/test_{name}.py -k " for name in ("judging", "evaluate", "vote", "page"))
KERNELS, EXPERIMENTS = "tests/test_kernels.py -k ", "tests/test_experiments.py -k "
GATHER, TILES = KERNELS + "gather", KERNELS + "tiles"
ANALYTIC, TRITON = (
    KERNELS + f"({path}-5-64 or {path}-16-200 or {path}-33 or eps) and not {other}"
    for path, other in (("pytorch", "triton"), ("triton", "pytorch"))
)
DENSE_ANALYTIC, DENSE_TRITON = (
    KERNELS + f"dense_loss and not any_lengths and {path}" for path in ("pytorch", "triton")
)
DENSE_CLAMPED, TRITON_NORMS = KERNELS + "clamped", KERNELS + "(different_norms or no_sample) and triton"
TRITON_PARTS, Q_TRITON = KERNELS + "number_of_parts and triton", KERNELS + "q_values and triton"
ELEMENTWISE = "tests/test_elementwise.py -k "
NORM, NORM_KERNELS = (ELEMENTWISE + f"test_rms_norm and {path} and not any_shape" for path in ("pytorch", "triton"))
SWIGLU, SWIGLU_KERNELS = (ELEMENTWISE + f"test_swiglu and {path} and not any_shape" for path in ("pytorch", "triton"))
ROTARY, ROTARY_KERNELS = (f"tests/test_rotary.py -k {path} and not any_shape" for path in ("pytorch", "triton"))
CONTRASTIVE, SAMPLED, DENSE, DENSE_KERNELS, Q_KERNEL, LAUNCH = (
    f"kernels/gcrm_kernels/{name}.py"
    for name in ("contrastive", "triton_contrastive", "dense", "triton_dense", "triton_qvalues", "launch")
)
RMS_NORM, SWIGLU_KERNEL, ROTARY_KERNEL = (
    f"kernels/gcrm_kernels/triton_{name}.py" for name in ("rms_norm", "swiglu", "rotary")
)

MUTANTS = {
    "layers: the network knows records": (
        "gcrm_fast/model/inputs.py",
        "import numpy as np\n",
        "import numpy as np\nimport gcrm_fast.data.records\n",
        LAYERS,
    ),
    "layers: a lower wing asks a higher one when it is called": (
        "gcrm_fast/data/sources.py",
        "    if source == STDIN:\n",
        "    from gcrm_fast.training import config as config\n\n    if source == STDIN:\n",
        LAYERS,
    ),
    "layers: scoring loads a plot library": (
        "gcrm_fast/common/tables.py",
        "from collections.abc import Sequence\n",
        "from collections.abc import Sequence\nimport matplotlib\n",
        LAYERS + " -k scoring",
    ),
    "train.py: packages hidden by folders of ours": (
        "gcrm_fast/train.py",
        "    del sys.path[0]",
        "    pass",
        "tests/test_packaging.py -k hides",
    ),
    "position off by one after a shared prefix": (
        "gcrm_fast/data/packing.py",
        "np.arange(start, len(sequence))",
        "np.arange(start, len(sequence)) + (start > 0)",
        INVARIANTS,
    ),
    "segment boundary moved": (
        "gcrm_fast/data/packing.py",
        "self.q_lens.append(len(own))",
        "self.q_lens.append(len(own) - (i == 1) + (i == 0))",
        INVARIANTS,
    ),
    "gathered rows scattered instead of added": (
        "kernels/gcrm_kernels/gather.py",
        ".index_add_(0, index, exact)",
        ".index_copy_(0, index, exact)",
        GATHER,
    ),
    "gather kernel: positions in place of their order": (
        "kernels/gcrm_kernels/triton_gather.py",
        "position = tl.load(order_ptr + i)",
        "position = i",
        GATHER + " and triton",
    ),
    "inverse index in the wrong order": (
        "kernels/gcrm_kernels/gather.py",
        "out=offsets[1:]",
        "out=offsets[:-1]",
        PACKING,
    ),
    "margin dropped": ("gcrm_fast/training/objectives.py", "reward_2N[1] - margin_N", "reward_2N[1]", OBJECTIVES),
    "scatter instead of add": (
        CONTRASTIVE,
        "out_RH.index_add_(0, index_I, values_IH)",
        "out_RH.index_copy_(0, index_I, values_IH)",
        OBJECTIVES,
    ),
    "negative term with the wrong sign": (
        CONTRASTIVE,
        "cosine.new_tensor([1.0, -1.0])",
        "cosine.new_tensor([1.0, 1.0])",
        OBJECTIVES,
    ),
    "temperature applied twice": (
        CONTRASTIVE,
        "x = cosine * (sign / temperature)",
        "x = cosine * (sign / temperature**2)",
        OBJECTIVES,
    ),
    "positive term kept for a completion of one token": (
        CONTRASTIVE,
        "loss_2N.mul(counted_2N).sum(0)",
        "loss_2N.sum(0)",
        OBJECTIVES,
    ),
    "cosines in half precision": (
        CONTRASTIVE,
        "norms_4NS = hidden_RH.new_empty((2, 2, n, s), dtype=dtype)",
        "norms_4NS = hidden_RH.new_empty((2, 2, n, s), dtype=hidden_RH.dtype)",
        OBJECTIVES,
    ),
    "goals' own share taken for sources": (
        CONTRASTIVE,
        "torch.stack([share.sum(-1), share.sum(-2)])",
        "torch.stack([share.sum(-2), share.sum(-1)])",
        ANALYTIC,
    ),
    "gradient through a clamped norm": (CONTRASTIVE, ".mul_(norms_4NS > EPS)", "", ANALYTIC),
    "reference without its clamp": (
        "kernels/gcrm_kernels/reference.py",
        ".clamp_min(EPS * EPS).sqrt()",
        ".sqrt()",
        ANALYTIC,
    ),
    "a unit missing from a tile": (
        CONTRASTIVE,
        "np.searchsorted(tile, np.arange(len(starts)))",
        "np.searchsorted(tile, np.arange(len(starts)) + 1)",
        TILES,
    ),
    "tiles built on the device off by one": (
        CONTRASTIVE,
        "F.pad(position, (1, 0))[before]",
        "F.pad(position, (1, 0), value=1)[before]",
        TILES,
    ),
    "kernel: padding samples counted": (
        SAMPLED,
        "similarity = tl.sum(tl.where(counted, cosine, 0.0)) / count",
        "similarity = tl.sum(cosine) / (SP * SP)",
        TRITON,
    ),
    "kernel: repeated rows added once": (
        SAMPLED,
        "named & (s[None, :] < slot[:, None])",
        "named & (s[None, :] < 0)",
        TRITON,
    ),
    "kernel: last row of a tile not written": (
        SAMPLED,
        "inside = (r < end)[:, None] & (h < width)[None, :]",
        "inside = (r < end - 1)[:, None] & (h < width)[None, :]",
        TRITON,
    ),
    "kernel: gradient of goals with the strides of sources": (
        SAMPLED,
        "            1,\n            S,\n            grad,\n",
        "            S,\n            1,\n            grad,\n",
        TRITON,
    ),
    "kernel: negatives without their gradient": (SAMPLED, "* direction * has_term", "* has_term", TRITON),
    "kernel: the last part of the columns left out": (
        SAMPLED,
        "tl.static_range(PARTS)",
        "tl.static_range(PARTS - 1)",
        TRITON_PARTS,
    ),
    "kernel: parts of the negatives from goals of the positives": (
        SAMPLED,
        "unit // n_pairs * 2 * n_pairs",
        "unit // n_pairs * n_pairs",
        TRITON_PARTS,
    ),
    "kernel: one power of two for all rows": (
        SAMPLED,
        "tl.max(tl.abs(coefficients), axis=1)",
        "tl.max(tl.abs(coefficients), axis=1) * 0 + tl.max(tl.abs(coefficients))",
        TRITON_NORMS,
    ),
    "kernel: the own term of rows that no sample names": (
        SAMPLED,
        "tl.where(own[:, None] != 0.0, own[:, None] * x.to(tl.float32), 0.0)",
        "own[:, None] * x.to(tl.float32)",
        TRITON_NORMS,
    ),
    "operators: autocast stays on": (
        LAUNCH,
        "torch.autocast(first.device.type, enabled=False)",
        'torch.autocast(first.device.type, enabled=torch.is_autocast_enabled("cpu"))',
        KERNELS + "autocast",
    ),
    "dense: a position compared with itself": (DENSE, " & (position[rows, None] != position)", "", DENSE_CLAMPED),
    "dense kernel: a position compared with itself": (
        DENSE_KERNELS,
        " & (i[:, None] != j[None, :])",
        "",
        DENSE_CLAMPED,
    ),
    "dense: negatives weighed like positives": (
        DENSE,
        "(1 / ((b - a) * (c - b)))",
        "(1 / (b - a) ** 2)",
        DENSE_ANALYTIC,
    ),
    "dense kernel: a lone position takes part in a positive": (
        DENSE_KERNELS,
        "tl.where(l_c > 1.0, 2.0 / tl.maximum(l_c * (l_c - 1.0), 1.0), 0.0)",
        "2.0 / (l_c * l_c)",
        DENSE_TRITON,
    ),
    "dense kernel: a turn starts at the first tile": (
        DENSE_KERNELS,
        "i = a + (first_tile + slot % tiles) * TILE",
        "i = a + (slot % tiles) * TILE",
        DENSE_TRITON,
    ),
    "dense kernel: the last pair of a turn skipped": (
        DENSE_KERNELS,
        "min(pairs, n - first_pair)",
        "min(pairs, n - first_pair - 1) or 1",
        DENSE_TRITON,
    ),
    "Q-values of goals that are not unit vectors": (Q_KERNEL, "q = dots * largest[None, :]", "q = dots", Q_TRITON),
    "norm: its statistics taken for constants": (
        "kernels/gcrm_kernels/rms_norm.py",
        ".addcmul_(s, own_T[:, None])",
        "",
        NORM,
    ),
    "norm: the gradient through the sum dropped": ("kernels/gcrm_kernels/rms_norm.py", "ds_TH += grad_s", "pass", NORM),
    "norm: the sum normalized but not returned": (
        "kernels/gcrm_kernels/rms_norm.py",
        "else s_TH, inverse_T",
        "else residual_TH.clone(), inverse_T",
        NORM,
    ),
    "norm kernel: mean over the padded row": (
        RMS_NORM,
        "tl.sum(s32 * s32) / width",
        "tl.sum(s32 * s32) / BLOCK_H",
        NORM_KERNELS,
    ),
    "norm kernel: eps forgotten": (RMS_NORM, "/ width + eps", "/ width", NORM_KERNELS),
    "norm kernel: the sum not rounded before it is normalized": (
        RMS_NORM,
        "s32 = s.to(tl.float32)\n    inverse",
        "s32 = s.to(tl.float32)\n    if RESIDUAL:\n        s32 = tl.load(x_ptr + at, mask=inside, other=0.0).to("
        "tl.float32) + tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)\n    inverse",
        NORM_KERNELS,
    ),
    "norm kernel: the last row of the last part left out": (
        RMS_NORM,
        "(part + 1) * rows, tokens)",
        "(part + 1) * rows, tokens - 1)",
        NORM_KERNELS,
    ),
    "norm kernel: the weight's gradient without 1 / rms": (
        RMS_NORM,
        "dweight += dy * normal",
        "dweight += dy * s.to(tl.float32)",
        NORM_KERNELS,
    ),
    "norm kernel: the gradient through the sum dropped": (
        RMS_NORM,
        "RESIDUAL=grad_s is not None",
        "RESIDUAL=False",
        NORM_KERNELS,
    ),
    "SwiGLU: gate and up exchanged": (
        "kernels/gcrm_kernels/swiglu.py",
        "F.silu(gate_TF) * up_TF",
        "F.silu(up_TF) * gate_TF",
        SWIGLU,
    ),
    "SwiGLU kernel: the gate's gradient is that of a product": (
        SWIGLU_KERNEL,
        " * (1.0 + g * (1.0 - sigmoid))",
        "",
        SWIGLU_KERNELS,
    ),
    "SwiGLU kernel: the last element left out": (
        SWIGLU_KERNEL,
        "gate, up, out, count, BLOCK",
        "gate, up, out, count - 1, BLOCK",
        SWIGLU_KERNELS,
    ),
    "rotary: keys gathered but not rotated": (
        "kernels/gcrm_kernels/rotary.py",
        "(rotate(k_TGD, cos_TD, sin_TD), v_TGD)",
        "(k_TGD, v_TGD)",
        ROTARY,
    ),
    "rotary kernel: the gradient rotated forward": (ROTARY_KERNEL, "sin = -sin", "sin = sin", ROTARY_KERNELS),
    "rotary kernel: halves exchanged": (ROTARY_KERNEL, "(a * cos - b * sin)", "(b * cos - a * sin)", ROTARY_KERNELS),
    "rotary kernel: the last position in place of the sum": (
        ROTARY_KERNEL,
        "v_a += _load",
        "v_a = _load",
        ROTARY_KERNELS,
    ),
    "rotary kernel: angles of the gathered place": (
        ROTARY_KERNEL,
        "angle += t * (2 * HALF)\n    _store_rotated(out_k_ptr",
        "angle += j * (2 * HALF)\n    _store_rotated(out_k_ptr",
        ROTARY_KERNELS,
    ),
    "residual lost at the second norm": (
        "gcrm_fast/model/llama.py",
        "return x_TH, maybe_recomputed(",
        "return normed_TH, maybe_recomputed(",
        PARITY,
    ),
    "weights of the two norms exchanged": (
        "gcrm_fast/model/llama.py",
        "rms_norm(branch_TH, self.input_layernorm",
        "rms_norm(branch_TH, self.post_attention_layernorm",
        PARITY,
    ),
    "dense: rejected positions before the divergence": (
        "gcrm_fast/data/packing.py",
        "positions = [chosen, rejected[negative_goals]]",
        "positions = [chosen, rejected]",
        PACKING,
    ),
    "causal mask aligned top-left": (
        "gcrm_fast/model/segment_attention.py",
        "+ earlier[:, None, None]",
        "+ 0 * earlier[:, None, None]",
        INVARIANTS,
    ),
    "read rows shifted": ("gcrm_fast/model/llama.py", "prune=i == len(self.layers) - 1", "prune=i == 0", INVARIANTS),
    "wrong rotary pairing": (
        "kernels/gcrm_kernels/reference.py",
        "torch.cat((-b, a), dim=-1)",
        "torch.cat((b, -a), dim=-1)",
        PARITY,
    ),
    "llama3 rope not interpolated": (
        "gcrm_fast/model/llama.py",
        "torch.where(between, smooth, scaled)",
        "scaled",
        PARITY,
    ),
    "norm epsilon of another model": (
        "gcrm_fast/checkpoints/config_json.py",
        '"rms_norm_eps": config.rms_norm_eps',
        '"rms_norm_eps": 0.1',
        PARITY,
    ),
    "reward scaled by a sigmoid in servers": (
        "gcrm_fast/checkpoints/config_json.py",
        '"problem_type": "regression",',
        "",
        PARITY,
    ),
    "pad equal to eos": ("gcrm_fast/data/tokenization.py", " and token != tokenizer.eos_token", "", TOKENIZATION),
    "missing trunk tensor re-initialised": (
        "gcrm_fast/checkpoints/weights.py",
        "    missing = [key for key in source.values() if key not in stored]\n",
        "    missing = []\n    source = {name: key for name, key in source.items() if key in stored}\n",
        f"{BAD_INPUT} -k missing",
    ),
    "lost head of a classifier re-initialised": (
        "gcrm_fast/checkpoints/weights.py",
        '"Classification" in',
        '"Never" in',
        f"{BAD_INPUT} -k classifier",
    ),
    "tensors without a place ignored": (
        "gcrm_fast/checkpoints/weights.py",
        "    if rest:\n",
        "    if False:\n",
        f"{BAD_INPUT} -k unknown",
    ),
    "shape of a tensor not checked": (
        "gcrm_fast/checkpoints/weights.py",
        "if tensor.shape != shape:",
        "if False:",
        f"{BAD_INPUT} -k shape",
    ),
    "dtype of a tensor not checked": (
        "gcrm_fast/checkpoints/weights.py",
        "if tensor.dtype not in FLOATS:",
        "if False:",
        f"{BAD_INPUT} -k int8",
    ),
    "every rank reads whole tensors": (
        "gcrm_fast/checkpoints/weights.py",
        "file.get_slice(source[name])[rows]",
        "file.get_tensor(source[name])[rows]",
        CHECKPOINT,
    ),
    "tied embedding under the name of lm_head not found": (
        "gcrm_fast/checkpoints/weights.py",
        'source["model.embed_tokens.weight"] = "lm_head.weight"',
        "pass",
        f"{PARITY} -k tied",
    ),
    "head_dim of config.json ignored": (
        "gcrm_fast/checkpoints/config_json.py",
        '_field(raw, path, "head_dim", int, hidden // n_heads)',
        "hidden // n_heads",
        PARITY,
    ),
    "families: norms of heads left out": (
        "gcrm_fast/model/llama.py",
        "        if norm is None:\n",
        "        if True:\n",
        FAMILIES + "states",
    ),
    "families: keys normed by the weight of queries": (
        "gcrm_fast/model/llama.py",
        "self._normed(k_TGD, self.k_norm)",
        "self._normed(k_TGD, self.q_norm)",
        FAMILIES + "states",
    ),
    "families: Qwen2's biases dropped": (
        "gcrm_fast/model/llama.py",
        "config.attention_bias or family.qkv_bias",
        "config.attention_bias",
        FAMILIES + "states",
    ),
    "families: a bias of Qwen2's output": (
        "gcrm_fast/model/llama.py",
        "d, h, bias=config.attention_bias)",
        "d, h, bias=bias)",
        FAMILIES + "states",
    ),
    "families: config.json names another family's class": (
        "gcrm_fast/model/families.py",
        "return self.class_prefix + task",
        'return "Llama" + task',
        FAMILIES + "in_and_out",
    ),
    "families: a token classifier of another family": (
        "gcrm_fast/commands/export.py",
        '[config.family.class_name("ForTokenClassification")]',
        '["LlamaForTokenClassification"]',
        FAMILIES + "token_classifiers",
    ),
    "families: an absent field is Llama's": (
        "gcrm_fast/checkpoints/config_json.py",
        "raw = {**family.defaults, **raw}",
        'raw = {"sliding_window": None, **raw}',
        FAMILIES + "absent",
    ),
    "families: Mistral's window lost on the way out": (
        "gcrm_fast/checkpoints/config_json.py",
        '{"sliding_window": config.sliding_window}',
        '{"sliding_window": None}',
        FAMILIES + "in_and_out",
    ),
    "families: texts longer than the window scored": (
        "gcrm_fast/inference/scoring.py",
        "if window and len(completion.ids) > window:",
        "if False:",
        FAMILIES + "as_long_as",
    ),
    "families: --max-length beyond the window": (
        "gcrm_fast/training/prepare.py",
        "if window and config.max_length > window:",
        "if False:",
        f"{BAD_INPUT} -k window",
    ),
    "families: windows in some layers ignored": (
        "gcrm_fast/checkpoints/config_json.py",
        "if window < positions:",
        "if False:",
        FAMILIES + "some_layers",
    ),
    "families: Qwen pads with what ends a turn": (
        "gcrm_fast/model/families.py",
        '("<|fim_pad|>", "<|im_start|>")',
        '("<|im_end|>", "<|im_start|>")',
        FAMILIES + "ends_nothing",
    ),
    "families: the inputs of heads' norms not counted": (
        "gcrm_fast/training/accounting.py",
        "attention += tokens * (q + g)",
        "attention += tokens * q",
        FAMILIES + "keep_their_input",
    ),
    "rope scaling of transformers 4 ignored": (
        "gcrm_fast/checkpoints/config_json.py",
        'else "rope_scaling"',
        'else "rope_parameters"',
        PARITY,
    ),
    "older name of the rope type ignored": (
        "gcrm_fast/checkpoints/config_json.py",
        'parameters.get("type", "default")',
        '"default"',
        PARITY,
    ),
    "rope theta of transformers 5 ignored": (
        "gcrm_fast/checkpoints/config_json.py",
        '**raw, **parameters}, path, "rope_theta"',
        '**raw}, path, "rope_theta"',
        PARITY,
    ),
    "bos of a bare sentencepiece model lost": (
        "gcrm_fast/data/tokenization.py",
        '"add_bos_token", True',
        '"add_bos_token", False',
        TOKENIZATION,
    ),
    "sentencepiece model not compared with sentencepiece": (
        "gcrm_fast/data/tokenization.py",
        "for text in PROBES:",
        "for text in ():",
        f"{BAD_INPUT} -k sentencepiece",
    ),
    "text rules of another transformers version": (
        "gcrm_fast/data/tokenization.py",
        "normalizer = stated.normalizer",
        "normalizer = None",
        TOKENIZATION,
    ),
    "goal not strictly after its source": ("gcrm_fast/data/sampling.py", "i, j + (j >= i)", "i, j", PACKING),
    "sampling depends on the epoch only": (
        "gcrm_fast/data/sampling.py",
        "counter=[0, 0, 0, pair.pair_id]",
        "counter=[0, 0, 0, 0]",
        PACKING,
    ),
    "negatives before the divergence": (
        "gcrm_fast/data/sampling.py",
        'if sampling.negatives != "after-divergence":',
        "if True:",
        PACKING,
    ),
    "a pair lost at a batch boundary": (
        "gcrm_fast/data/batches.py",
        "rest[room:], room - len(batch[-1])",
        "rest[room + 1 :], room - len(batch[-1])",
        PACKING,
    ),
    "eos not appended": ("gcrm_fast/data/encoding.py", "[*ids, tokenizer.eos_token_id]", "[*ids]", DATA),
    "data: bos of the tokenizer and of the template": (
        "gcrm_fast/data/encoding.py",
        "if bos is not None and ids[:2] == [bos, bos]:",
        "if False:",
        DATA,
    ),
    "data: what follows the end token kept": (
        "gcrm_fast/data/encoding.py",
        "ids = ids[: found[-1] + (not cut)]",
        "pass",
        DATA,
    ),
    "data: end of turn ends nothing": ("gcrm_fast/data/encoding.py", "if i in added][:1]", "if i in added][:0]", DATA),
    "data: eos after a cut completion": ("gcrm_fast/data/encoding.py", "elif not cut:", "else:", DATA),
    "data: truncation takes bos": ("gcrm_fast/data/encoding.py", "kept = int(ids[0][0] == bos)", "kept = 0", DATA),
    "data: a pair one token too long": (
        "gcrm_fast/data/encoding.py",
        "if longest > max_length:",
        "if longest > max_length + 1:",
        DATA,
    ),
    "data: a cut completion without tokens": (
        "gcrm_fast/data/encoding.py",
        "if starts[k] == len(ids[k])",
        "if False",
        f"{BAD_INPUT} -k cut",
    ),
    "data: dialogue split at the first answer": (
        "gcrm_fast/data/records.py",
        "text.rpartition(ASSISTANT)",
        "text.partition(ASSISTANT)",
        RECORDS,
    ),
    "data: earlier turns lost": (
        "gcrm_fast/data/records.py",
        "self._messages(prompt, before) + shared",
        "self._messages(prompt, before)",
        RECORDS,
    ),
    "data: ranks taken for scores": ("gcrm_fast/data/records.py", "[-value for value in values]", "values", RECORDS),
    "data: pairs of a record without a limit": (
        "gcrm_fast/data/records.py",
        "if len(pairs) == limit:",
        "if False:",
        RECORDS,
    ),
    "data: fields outside --columns read": (
        "gcrm_fast/data/records.py",
        "_Record(named or raw,",
        "_Record(raw | named,",
        RECORDS,
    ),
    "data: overlap hidden by white space": (
        "gcrm_fast/data/records.py",
        'return "".join(text.split())',
        "return text",
        RECORDS,
    ),
    "data: NaN taken for a number": (
        "gcrm_fast/data/records.py",
        "if not abs(value) <= MOST:",
        "if abs(value) > MOST:",
        f"{BAD_INPUT} -k NaN",
    ),
    "data: bad records skipped unasked": (
        "gcrm_fast/data/sources.py",
        "if not self.skip:",
        "if False:",
        f"{BAD_INPUT} -k UTF",
    ),
    "data: blank lines not counted": (
        "gcrm_fast/data/sources.py",
        "number += 1\n            yield number",
        "number += bool(line.strip())\n            yield number",
        RECORDS,
    ),
    "data: cached tokens not checked": (
        "gcrm_fast/data/token_cache.py",
        '"sha256": digest.hexdigest()',
        '"sha256": ""',
        CACHE,
    ),
    "data: one key for two cuts of a text": (
        "gcrm_fast/data/encoding.py",
        'digest.update(len(raw).to_bytes(8, "little"))',
        "",
        CACHE,
    ),
    "data: failed input leaves a cache": ("gcrm_fast/data/token_cache.py", "if kind is None:", "if True:", CACHE),
    "data: every process tokenizes": ("gcrm_fast/data/token_cache.py", "lock.acquire()", "pass", CACHE),
    "error step recorded wrongly": ("gcrm_fast/data/arithmetic.py", "number == wrong_step", "number == 1", ARITHMETIC),
    "one rank's scale wrong": (
        "gcrm_fast/train.py",
        "dist.get_world_size() / n_pairs",
        "(1 + dist.get_rank()) / n_pairs",
        TRAIN,
    ),
    "every rank trains on the same packs": (
        "gcrm_fast/training/loader.py",
        "[self.rank :: self.world_size]",
        "[0 :: self.world_size]",
        STEP + "ranks",
    ),
    "an epoch's order from another epoch": (
        "gcrm_fast/training/loader.py",
        "if epoch != self._epoch:",
        "if self._epoch < 0:",
        STEP + "who_builds",
    ),
    "attention of the last layer not counted": (
        "gcrm_fast/training/accounting.py",
        "return layers * (projections * tokens + 4 * q * products)",
        "return layers * projections * tokens + (layers - 1) * 4 * q * products",
        STEP + "counted",
    ),
    "kept activations without the MLP's product": (
        "gcrm_fast/training/accounting.py",
        "(3 if kernels else 4) * f",
        "(2 if kernels else 3) * f",
        STEP + "recomputing",
    ),
    "recomputation ignored": (
        "gcrm_fast/model/llama.py",
        "if not again or not torch",
        "if again or not torch",
        STEP + "recomputing",
    ),
    "only the last layer's gradient of a shared input": (
        "gcrm_fast/model/llama.py",
        "torch.addmm(dx_TH, grad, weight, out=dx_TH)",
        "grad @ weight",
        STEP + "one_input",
    ),
    "weights gathered once per step are never dropped": (
        "gcrm_fast/training/parallel.py",
        'set_reshard_after_backward(last or model.gather == "block")',
        'set_reshard_after_backward(model.gather == "block")',
        STEP + "gathered_once",
    ),
    "sizes of packs compiled in": (
        "gcrm_fast/model/reward_model.py",
        "dynamic=True",
        "dynamic=False",
        STEP + "compiled_blocks",
    ),
    "code of a folder runs": (
        "gcrm_fast/data/tokenization.py",
        "trust_remote_code=False, extra_special_tokens={}",
        "extra_special_tokens={}",
        "tests/test_tokenization.py -k code_of_a_folder",
    ),
    "choices of a file not checked": (
        "gcrm_fast/training/config.py",
        "in CHOICES.items():",
        "in {}.items():",
        "tests/test_train.py -k a_choice_in",
    ),
    "a host sync in the step": (
        "gcrm_fast/train.py",
        "= statistics if together",
        "= statistics if total.isfinite() and together",
        STEP + "never_waits",
    ),
    "bfloat16 weights without stochastic rounding": (
        "gcrm_fast/training/optimizer.py",
        "bf16_stochastic_round=True",
        "bf16_stochastic_round=False",
        STEP + "stochastic",
    ),
    "padded queries counted again in attention": (
        "gcrm_fast/model/segment_attention.py",
        "return values * self.real",
        "return values",
        PACKING + " -k segment_attention",
    ),
    "attention: square segments see what follows": (
        "gcrm_fast/model/segment_attention.py",
        "is_causal=bias is None, attn_mask",
        "is_causal=False, attn_mask",
        PACKING + " -k segment_attention",
    ),
    "attention: the backward of square segments sees what follows": (
        "gcrm_fast/model/segment_attention.py",
        "0.0, bias is None, attn_mask",
        "0.0, False, attn_mask",
        PACKING + " -k segment_attention",
    ),
    "benchmark: the reference reads negative goals on the chosen completion": (
        "bench/padded.py",
        "torch.tensor([0, 0, 0, n])",
        "torch.tensor([0, 0, 0, 0])",
        BENCH + "lever",
    ),
    "benchmark: TRL without autocast from its second trainer on": (
        "bench/padded.py",
        '("forward", "_original_forward", "_is_accelerate_prepared")',
        '("forward",)',
        BENCH + "dtype_that_is_timed",
    ),
    "benchmark: views move bytes": ("bench/step_model.py", "not func.is_view and ", "", BENCH + "charged"),
    "benchmark: attention's backward counted once": (
        "bench/step_model.py",
        '(2 if name.endswith("backward") else 1)',
        "1",
        BENCH + "operations_of_the_log",
    ),
    "benchmark: sharing not removed": (
        "bench/our_step.py",
        'with unshared if without == "sharing"',
        'with unshared if without == "none"',
        BENCH + "lever",
    ),
    "benchmark: differences in gradients pass": (
        "bench/contestants.py",
        "ok = loss_error <= tolerance and errors[worst] <= tolerance",
        "ok = loss_error <= tolerance",
        BENCH + "lever",
    ),
    "benchmark: all of causal attention counted": (
        "bench/contestants.py",
        "length * (length + 1) // 2",
        "length * length",
        BENCH + "flops",
    ),
    "benchmark: medians over steps and not over rounds": (
        "bench/train_step.py",
        "np.median(seconds, axis=0)",
        "np.median(seconds, axis=1)",
        BENCH + "speed",
    ),
    "benchmark: FSDP gathers a block once for its forward and backward": (
        "bench/step_model.py",
        "packs * (embedding + 2 * blocks)",
        "packs * (embedding + blocks)",
        BENCH + "fsdp_copies",
    ),
    "tables of GPU runs from the file that sorts last by device": (
        "bench/gpu_report.py",
        "key=lambda path: path.stem[-10:]",
        "key=lambda path: path.stem",
        BENCH + "newest",
    ),
    "tables of GPU runs with the numbers of a file's first call": (
        "bench/gpu_report.py",
        "                lines.clear()\n",
        "                continue\n",
        BENCH + "latest_numbers",
    ),
    "GPU run: what a part started outlives it": (
        "bench/gpu.py",
        "                os.kill(pid, signal.SIGKILL)",
        "                pass",
        BENCH + "hang_or_die",
    ),
    "GPU run: a line that was cut off swallows the next": (
        "bench/gpu.py",
        "    if rest:\n",
        "    if False:\n",
        BENCH + "hang_or_die",
    ),
    "the rewards of a pack in another order": (
        "gcrm_fast/data/packing.py",
        "indices=tuple(item.index for item in items),",
        "indices=tuple(sorted(item.index for item in items)),",
        SCORING + "company",
    ),
    "the reward read before the end token": (
        "gcrm_fast/data/packing.py",
        "item.start if per_token else -1 :]",
        "item.start if per_token else -2 :][:1]",
        SCORING + "transformers",
    ),
    "a prompt computed for every completion": (
        "gcrm_fast/inference/scoring.py",
        "by_prompt.setdefault(ids[:start].tobytes(), [])",
        "by_prompt.setdefault(ids.tobytes(), [])",
        SCORING + "computed_once",
    ),
    "a new reward head scores in silence": (
        "gcrm_fast/inference/scoring.py",
        "open_weights(folder, config, seed=None)",
        "open_weights(folder, config, seed=0)",
        SCORING + "must_not_score",
    ),
    "a reward that is not finite is returned": (
        "gcrm_fast/inference/scoring.py",
        "if not (np.isfinite(j.reward) and",
        "if not (j.reward is not None and",
        SCORING + "must_not_score",
    ),
    "another model's goal is taken": (
        "gcrm_fast/checkpoints/goals.py",
        'if metadata["fingerprint"] != fingerprint:',
        "if False:",
        GOALS + "another",
    ),
    "a cut completion's state is in the goal": (
        "gcrm_fast/commands/goals.py",
        "for candidate in wanted if not candidate.cut]",
        "for candidate in wanted]",
        GOALS + "means",
    ),
    "the worse side of a pair is in the goal": (
        "gcrm_fast/commands/goals.py",
        'if candidate.name in ("rejected", "incorrect"):',
        "if False:",
        GOALS + "conditions",
    ),
    "a resumed output keeps what came after its last whole window": (
        "gcrm_fast/commands/score.py",
        "file.truncate()",
        "file.seek(0, 2)",
        SCORING + "killed",
    ),
    "a partial output of other records is continued": (
        "gcrm_fast/commands/score.py",
        "if read.hexdigest() != (done.records or hashlib.sha256().hexdigest()):",
        "if False:",
        SCORING + "something_else",
    ),
    "a partial output of other options is continued": (
        "gcrm_fast/commands/score.py",
        "if found.made_by.get(name) != made_by[name]]",
        "if name not in found.made_by]",
        SCORING + "something_else",
    ),
    "the processes' windows in another order": (
        "gcrm_fast/commands/score.py",
        'output.append(b"".join(parts), done)',
        'output.append(b"".join(parts[::-1]), done)',
        SCORING + "share_the_work",
    ),
    "a record's own reward is lost": (
        "gcrm_fast/commands/score.py",
        "taken = sorted(raw.keys() & added.keys())",
        "taken = list[str]()",
        SCORING + "bad_record",
    ),
    "run: tensors of a checkpoint not copied before training goes on": (
        "gcrm_fast/training/snapshots.py",
        "self._staging.copy(state)",
        "state",
        STAGING,
    ),
    "staging: a copy that is the tensor itself": (
        "gcrm_fast/training/staging.py",
        "return buffer.copy_(tensor, non_blocking=True)",
        "return tensor",
        STAGING,
    ),
    "staging: memory taken anew for every checkpoint": (
        "gcrm_fast/training/staging.py",
        "            self._buffers[place] = buffer\n",
        "",
        STAGING,
    ),
    "staging: every tensor to the same memory": ("gcrm_fast/training/staging.py", "(*place, key)", "place", STAGING),
    "run: checksums not compared": (
        "gcrm_fast/training/snapshots.py",
        'if _digest(path) != expected["sha256"]:',
        "if False:",
        SURVIVAL + "damaged",
    ),
    "run: damaged manifest believed": (
        "gcrm_fast/training/snapshots.py",
        'manifest.get("sha256") != _own_digest(manifest)',
        "False",
        SURVIVAL + "damaged",
    ),
    "run: unfinished checkpoint under its final name": (
        "gcrm_fast/training/snapshots.py",
        "partial, path = self.folder / (name + PARTIAL), self.folder / name",
        "partial = path = self.folder / name",
        SURVIVAL + "cannot_be_written_ends",
    ),
    "run: damaged newer checkpoints stay in the way": (
        "gcrm_fast/training/snapshots.py",
        "if step_of(path) > after:",
        "if False:",
        SURVIVAL + "all_checkpoints_damaged",
    ),
    "run: the best checkpoint is not kept": (
        "gcrm_fast/training/snapshots.py",
        "keep.update(self.ranked()[:1])",
        "pass",
        SURVIVAL + "stay",
    ),
    "run: one checkpoint too many kept": (
        "gcrm_fast/training/snapshots.py",
        "present[-self.keep :]",
        "present[-self.keep - 1 :]",
        SURVIVAL + "stay",
    ),
    "run: moments of the optimizer not resumed": (
        "gcrm_fast/training/resume.py",
        "        load(found, tensors, group) ",
        '        load(found, {**tensors, "optimizer": {}}, group) ',
        SURVIVAL + "chosen",
    ),
    "run: schedule starts anew": (
        "gcrm_fast/training/resume.py",
        '"applied": self.updater.applied,',
        '"applied": self.updater.applied.clone(),',
        SURVIVAL + "chosen",
    ),
    "run: sums since the last log row lost": (
        "gcrm_fast/training/resume.py",
        "self.window.sums.copy_(sum(sums.values(), torch.zeros_like(self.window.sums)))",
        "pass",
        SURVIVAL + "chosen",
    ),
    "run: data start anew": (
        "gcrm_fast/train.py",
        "with load(run.steps, start, ",
        "with load(run.steps, 0, ",
        SURVIVAL + "chosen",
    ),
    "run: processes that build packs stay": (
        "gcrm_fast/training/loader.py",
        "            found._shutdown_workers()",
        "            pass",
        STEP + "worker_fails",
    ),
    "run: log not cut back": (
        "gcrm_fast/training/metrics_log.py",
        'if row["step"] <= step',
        "if True",
        SURVIVAL + "cut_back",
    ),
    "run: other data go unnoticed": (
        "gcrm_fast/training/resume.py",
        'if found.facts["data_key"] != data_key:',
        "if False:",
        SURVIVAL + "another_configuration",
    ),
    "run: another seed goes unnoticed": (
        "gcrm_fast/training/resume.py",
        "if name not in FREE and",
        'if name not in FREE | {"seed"} and',
        SURVIVAL + "another_configuration",
    ),
    "run: updates that are not finite are made": (
        "gcrm_fast/training/optimizer.py",
        "self.optimizer.found_inf = bad ",
        "self.optimizer.found_inf = bad * 0 ",
        SURVIVAL + "left_out",
    ),
    "run: schedule goes on without an update": (
        "gcrm_fast/training/optimizer.py",
        "self.applied += made",
        "self.applied += 1",
        SURVIVAL + "left_out",
    ),
    "run: a loss that is none counts in the log": (
        "gcrm_fast/training/resume.py",
        "self.sums += torch.where(made, together, 0)",
        "self.sums += together",
        SURVIVAL + "left_out",
    ),
    "run: second signal ignored": (
        "gcrm_fast/training/interrupts.py",
        "os._exit(128 + number)",
        "pass",
        SURVIVAL + "second",
    ),
    "judging: intervals draw completions": (
        "gcrm_fast/evaluation/measures.py",
        "_, number_N = np.unique(question_N, return_inverse=True)",
        "number_N = np.arange(len(question_N))",
        JUDGING + "draw_questions",
    ),
    "judging: ties count for nothing in an interval": (
        "gcrm_fast/evaluation/measures.py",
        "(below[:, above] + below[:, level]) / 2",
        "below[:, above]",
        JUDGING + "weighed",
    ),
    "judging: ties count for nothing": (
        "gcrm_fast/common/statistics.py",
        "rankdata(score_N)",
        "rankdata(score_N, 'min')",
        JUDGING + "sklearn",
    ),
    "judging: a shortcut fitted on what it is judged on": (
        "gcrm_fast/evaluation/measures.py",
        "scores(~own_N)[own_N]",
        "scores(own_N)[own_N]",
        JUDGING + "groups_score_nothing",
    ),
    "judging: couples of different questions": (
        "gcrm_fast/evaluation/measures.py",
        "np.diff(question_N[order], prepend=-1)",
        "np.diff(question_N[order] * 0, prepend=-1)",
        JUDGING + "within",
    ),
    "judging: a tied pair counts whole": (
        "gcrm_fast/evaluation/measures.py",
        "+ 1) / 2\n    _, number",
        "+ 1) > 0\n    _, number",
        JUDGING + "ties_counts",
    ),
    "judging: rejected completions taken for right": (
        "gcrm_fast/commands/shared.py",
        '"rejected": False',
        '"rejected": True',
        EVALUATE + "reports",
    ),
    "judging: a limit cuts records in two": (
        "gcrm_fast/commands/evaluate.py",
        "[candidate.row for candidate in candidates]",
        "list(range(len(candidates)))",
        EVALUATE + "whole_records",
    ),
    "outputs written in place": (
        "gcrm_fast/common/files.py",
        'path.name + ".partial"',
        "path.name",
        "tests/test_command_line.py",
    ),
    "what was half-written stays": (
        "gcrm_fast/common/files.py",
        "    finally:\n        _remove(partial)",
        "    finally:\n        pass",
        "tests/test_command_line.py",
    ),
    "results: what is no result is overwritten": (
        "gcrm_fast/evaluation/results.py",
        "    if others:",
        "    if not others and others:",
        EVALUATE + "unasked",
    ),
    "scoring: lists of other lengths are cut to the shortest chunk": (
        "gcrm_fast/inference/scoring.py",
        "if not len(prompts) == len(completions) == ",
        "if not len(completions) == ",
        SCORING + "go_together",
    ),
    "scoring: what cannot be scored ends a run that skips": (
        "gcrm_fast/inference/candidates.py",
        "if bad.skip and (",
        "if not bad.skip and (",
        SCORING + "skipped_where",
    ),
    "scoring: a goal that is not finite": (
        "gcrm_fast/inference/scoring.py",
        "if not total.isfinite().all():",
        "if not len(encoded):",
        SCORING + "must_not",
    ),
    "vote: samples without an answer are left alone": (
        "gcrm_fast/evaluation/voting.py",
        "any(answer for answer, kept in",
        "any(True for answer, kept in",
        VOTE + "drops_none",
    ),
    "run: copies of a shard round each in its own way": (
        "gcrm_fast/training/optimizer.py",
        "hash((self.seed, step, self.shard))",
        "hash((self.seed, step, dist.get_rank()))",
        SURVIVAL + "copies",
    ),
    "run: two signals of one occasion end it unsaved": (
        "gcrm_fast/training/interrupts.py",
        "if now >= self._told + REPEATED:",
        "if now >= self._told:",
        SURVIVAL + "second",
    ),
    "run: ignored signals stop it": (
        "gcrm_fast/training/interrupts.py",
        "if signal.getsignal(number) != signal.SIG_IGN",
        "if number",
        SURVIVAL + "second",
    ),
    "run: orphans that have hardly begun go on": (
        "gcrm_fast/train.py",
        "end_with_the_parent(PARENT)",
        "end_with_the_parent(os.getppid())",
        SURVIVAL + "hardly_begun",
    ),
    "run: a restart starts anew": (
        "gcrm_fast/train.py",
        'if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):',
        "if False:",
        SURVIVAL + "whatever",
    ),
    "run: other margins pass for the same data": (
        "gcrm_fast/training/prepare.py",
        "self.report.key.encode() + margins.tobytes()",
        "self.report.key.encode()",
        SURVIVAL + "another_configuration",
    ),
    "run: a forced resume keeps the old weight decay": (
        "gcrm_fast/training/resume.py",
        "parameters.update(self.updater.settings)",
        "pass",
        SURVIVAL + "another_configuration",
    ),
    "run: the best model's card tells of the last": (
        "gcrm_fast/train.py",
        "held_out_rows(log, of_best), of_best",
        "held_out_rows(log, evaluation), evaluation",
        SURVIVAL + "stay",
    ),
    "server: a large request outlives its client": (
        "gcrm_fast/inference/batcher.py",
        "                if job.over:\n",
        "                if job.refused:\n",
        SERVE + "takes_turns",
    ),
    "vote: the first tokens judged": ("gcrm_fast/evaluation/voting.py", "UNJUDGED = 5", "UNJUDGED = 0", VOTE + "sixth"),
    "vote: a Q-value at the threshold dropped": (
        "gcrm_fast/evaluation/voting.py",
        "question.lowest_q() >= threshold",
        "question.lowest_q() > threshold",
        VOTE + "at_the_threshold",
    ),
    "vote: the token that fell below saved too": (
        "gcrm_fast/evaluation/voting.py",
        "len(q) - UNJUDGED - 1 - int",
        "len(q) - UNJUDGED - int",
        VOTE + "first_below",
    ),
    "vote: all dropped": (
        "gcrm_fast/evaluation/voting.py",
        "if not any(answer for",
        "if False and any(answer for",
        VOTE + "drops_all",
    ),
    "vote: ties not broken by reward": (
        "gcrm_fast/evaluation/voting.py",
        "reward_before + reward",
        "reward_before",
        VOTE + "ties_by_summed",
    ),
    "vote: samples without an answer vote": (
        "gcrm_fast/evaluation/voting.py",
        "        if answer:\n",
        "        if True:\n",
        VOTE + "empty_answers",
    ),
    "vote: weights depend on a constant": (
        "gcrm_fast/evaluation/voting.py",
        "softmax(question.rewards_n)",
        "question.rewards_n",
        VOTE + "constant",
    ),
    "vote: the released metric takes ties for wrong": (
        "gcrm_fast/evaluation/voting.py",
        "len(answers) - len(wrong) >= max",
        "len(answers) - len(wrong) > max",
        VOTE + "released_metric",
    ),
    "vote: the test counts questions that agree": (
        "gcrm_fast/evaluation/voting.py",
        "binomtest(won, won + lost)",
        "binomtest(won, len(right_Q))",
        VOTE + "paired",
    ),
    "vote: the threshold reported where it was chosen": (
        "gcrm_fast/commands/vote.py",
        "for q, taken in zip(reported, taken_Q, strict=True) if taken]",
        "for q, taken in zip(reported, taken_Q, strict=True) if not taken]",
        VOTE + "automatic",
    ),
    "inspect: text not escaped": (
        "gcrm_fast/evaluation/page.py",
        "shown = html.escape(text).replace",
        "shown = text.replace",
        PAGE + "escapes",
    ),
    "inspect: steps counted from 1 where they count from 0": (
        "gcrm_fast/commands/inspect.py",
        '"first_error_step": 0',
        '"first_error_step": 1',
        PAGE + "error_steps",
    ),
    "inspect: the token before a step marked": (
        "gcrm_fast/evaluation/page.py",
        'position, "right"',
        'position, "left"',
        PAGE + "steps_begin",
    ),
    "inspect: the difference counted from the prompt": (
        "gcrm_fast/evaluation/page.py",
        "a, b = one.ids[one.start :], other.ids[other.start :]",
        "a, b = one.ids, other.ids",
        PAGE + "first_difference",
    ),
    "export: rewards not divided by their deviation": (
        "gcrm_fast/commands/export.py",
        'state["score.weight"].double() / scale.std',
        'state["score.weight"].double()',
        EXPORT + "standardized",
    ),
    "export: the shift with the wrong sign": (
        "gcrm_fast/commands/export.py",
        "return -self.mean / self.std",
        "return self.mean / self.std",
        EXPORT + "standardized",
    ),
    "export: goals under the fingerprint of the old weights": (
        "gcrm_fast/commands/export.py",
        "    weights = write_model(",
        "    write_model(",
        EXPORT + "standardized",
    ),
    "export: a token classifier without its bias": (
        "gcrm_fast/commands/export.py",
        "tokenizer, bias=bias,",
        "tokenizer, bias=None,",
        EXPORT + "standardized",
    ),
    "export: an MLP head dropped": (
        "gcrm_fast/commands/export.py",
        'if head != "linear" and (',
        "if False and (",
        EXPORT + "one_line",
    ),
    "export: nobody is told of a head that transformers cannot read": (
        "gcrm_fast/commands/export.py",
        "if not heads.KINDS[config.head].in_transformers:",
        "if False:",
        EXPORT + "goes_beside",
    ),
    "model card: a command without what differs from its preset": (
        "gcrm_fast/training/model_card.py",
        "value == getattr(default, field.name)",
        "value == field.default",
        "tests/test_model_card.py -k command",
    ),
    "rewards: Q at the first token": (
        "gcrm_fast/rlhf/trl.py",
        "j.q_Gn[0, -1]",
        "j.q_Gn[0, 0]",
        REWARDS + "second_signal",
    ),
    "rewards: cut completions taken for ended": (
        "gcrm_fast/rlhf/trl.py",
        "bool(ids) and ids[-1] not in self.ends",
        "False",
        REWARDS + "length_limit",
    ),
    "server: answers handed to others": (
        "gcrm_fast/inference/batcher.py",
        "for job in jobs:\n            job.judged +=",
        "for job in reversed(jobs):\n            job.judged +=",
        SERVE + "many_clients",
    ),
    "server: batches over the token budget": (
        "gcrm_fast/inference/batcher.py",
        "job.take(room)",
        "job.take(10**9)",
        SERVE + "token_budget",
    ),
    "server: one failing request fails its batch": (
        "gcrm_fast/inference/batcher.py",
        "            if len(jobs) > 1:",
        "            if False:",
        SERVE + "fails_for_one",
    ),
    "server: a queue without a bound": (
        "gcrm_fast/inference/batcher.py",
        "if self.waiting + count > self.limit:",
        "if False:",
        SERVE + "full_queue",
    ),
    "server: work for clients that hung up": (
        "gcrm_fast/inference/server.py",
        "            future.cancel()  # takes",
        "            pass  # takes",
        SERVE + "hang_up",
    ),
    "server: a body without a bound": (
        "gcrm_fast/inference/server.py",
        "            if size > self.max_body:",
        "            if False:",
        SERVE + "without_an_announced",
    ),
    "server: the start of a token is enough": (
        "gcrm_fast/inference/server.py",
        "not hmac.compare_digest(given.strip(), self.token)",
        "not self.token.startswith(given.strip())",
        SERVE + "token_is_asked",
    ),
    "server: OpenRLHF's samples without their prompt": (
        "gcrm_fast/inference/server.py",
        "if query.startswith(prompt) else",
        "if not query else",
        SERVE + "compute_it_once",
    ),
    "server: Q-values of the default goal only": (
        "gcrm_fast/inference/server.py",
        "goal = goals.index(body.goal) if body.goal else 0",
        "goal = 0",
        SERVE + "any_goal",
    ),
    "samples: a wrong solution that is right": (
        "gcrm_fast/data/arithmetic.py",
        '"is_correct": not error_step',
        '"is_correct": not error_step or error_step > 1',
        ARITHMETIC + " -k samples",
    ),
    "samples: the error's place one digit off": (
        "gcrm_fast/data/arithmetic.py",
        "next(differing, -1)",
        "next(differing, -2) + 1",
        ARITHMETIC + " -k place",
    ),
    "samples of problems that are trained on": (
        "gcrm_fast/commands/samples.py",
        'if options.side == "held-out":',
        'if options.side != "held-out":',
        ARITHMETIC + " -k sides",
    ),
    "halves: every held-out problem in the same one": (
        "gcrm_fast/evaluation/measures.py",
        ">> 16 & 1",
        "% 2",
        ARITHMETIC + " -k halves",
    ),
    "localisation: the error's own token counted before it": (
        "experiments/arithmetic_chain.py",
        "above(one)[one.error :].tolist()",
        "above(one)[one.error + 1 :].tolist()",
        EXPERIMENTS + "known_values",
    ),
    "localisation: a drop from the error's next token on": (
        "experiments/arithmetic_chain.py",
        "values_n[:error, None] - values_n[error:]",
        "values_n[:error, None] - values_n[error + 1 :]",
        EXPERIMENTS + "drop",
    ),
    "localisation: the error's token by its end": (
        "experiments/arithmetic_chain.py",
        'side="right"',
        'side="left"',
        EXPERIMENTS + "token_of_a_character",
    ),
    "position alone: wrong solutions counted": (
        "experiments/arithmetic_chain.py",
        'right = [own for c, own in zip(candidates, values, strict=True) if c.fields["is_correct"]]',
        "right = list(values)",
        EXPERIMENTS + "position_alone",
    ),
    "intervals over seeds of a normal distribution": (
        "experiments/summary.py",
        "scipy.stats.t.ppf((1 + COVERAGE) / 2, n - 1)",
        "scipy.stats.norm.ppf((1 + COVERAGE) / 2)",
        EXPERIMENTS + "students",
    ),
    "AUROC within groups over all groups together": (
        "experiments/objectives.py",
        "own = group_N == group",
        "own = group_N >= 0",
        EXPERIMENTS + "blind",
    ),
    "pairs: one side left out": (
        "experiments/objectives.py",
        "for ok in (a and b, a and b)]",
        "for ok in (a, b)]",
        EXPERIMENTS + "whole",
    ),
}


def is_red(folder: Path, test: str) -> bool:
    paths = f"{folder}{os.pathsep}{folder / 'kernels'}"
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}
    file, _, selected = test.partition(" -k ")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file, "-k", selected]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=False)
    return result.returncode == 1


def main() -> int:
    wanted = " ".join(sys.argv[1:])
    mutants = {name: m for name, m in MUTANTS.items() if wanted in name}
    unseen = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "project"
        shutil.copytree(
            ROOT, folder, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "*.egg-info", "__pycache__")
        )
        for test in sorted({m[3] for m in mutants.values()}):
            if is_red(folder, test):
                print(f"{test} is red without any fault")
                return 1
        for name, (file, text, replacement, test) in mutants.items():
            path = folder / file
            source = path.read_text()
            if source.count(text) != 1:
                print(f"stale    {name}: the text occurs {source.count(text)} times in {file}")
                unseen.append(name)
                continue
            path.write_text(source.replace(text, replacement))
            red = is_red(folder, test)
            path.write_text(source)
            print(f"{'red     ' if red else 'UNSEEN  '} {name} ({test})", flush=True)
            if not red:
                unseen.append(name)
    print(f"{len(mutants) - len(unseen)} of {len(mutants)} planted faults turn a test red")
    return int(bool(unseen))


if __name__ == "__main__":
    sys.exit(main())
