"""Faults planted in model/: name -> (file, text, replacement, test that must turn red)."""

FAULTS = {
    "layers: the network knows records": (
        "gcrm_fast/model/inputs.py",
        "import numpy as np\n",
        ("import numpy as np\nimport gcrm_fast.data.records\n"),
        "tests/test_layers.py",
    ),
    "residual lost at the second norm": (
        "gcrm_fast/model/llama.py",
        "return x_TH, maybe_recomputed(",
        "return normed_TH, maybe_recomputed(",
        "tests/model/test_parity.py",
    ),
    "weights of the two norms exchanged": (
        "gcrm_fast/model/llama.py",
        "rms_norm(branch_TH, self.input_layernorm",
        "rms_norm(branch_TH, self.post_attention_layernorm",
        "tests/model/test_parity.py",
    ),
    "causal mask aligned top-left": (
        "gcrm_fast/model/segment_attention.py",
        "+ earlier[:, None, None]",
        "+ 0 * earlier[:, None, None]",
        "tests/model/test_invariants.py",
    ),
    "read rows shifted": (
        "gcrm_fast/model/llama.py",
        "prune=i == len(self.layers) - 1",
        "prune=i == 0",
        "tests/model/test_invariants.py",
    ),
    "llama3 rope not interpolated": (
        "gcrm_fast/model/llama.py",
        ".clamp(0, 1)",
        ".round().clamp(0, 1)",
        "tests/model/test_parity.py",
    ),
    "families: norms of heads skipped": (
        "gcrm_fast/model/llama.py",
        "        if norm is None:\n",
        "        if True:\n",
        "tests/model/test_families.py -k states",
    ),
    "families: keys normed by the weight of queries": (
        "gcrm_fast/model/llama.py",
        "self._normed(k_TGD, self.k_norm)",
        "self._normed(k_TGD, self.q_norm)",
        "tests/model/test_families.py -k states",
    ),
    "families: Qwen2's biases dropped": (
        "gcrm_fast/model/llama.py",
        "config.attention_bias or family.qkv_bias",
        "config.attention_bias",
        "tests/model/test_families.py -k states",
    ),
    "families: a bias of Qwen2's output": (
        "gcrm_fast/model/llama.py",
        "d, h, bias=config.attention_bias)",
        "d, h, bias=bias)",
        "tests/model/test_families.py -k states",
    ),
    "families: config.json names another family's class": (
        "gcrm_fast/model/families.py",
        "return self.class_prefix + task",
        'return "Llama" + task',
        "tests/model/test_families.py -k in_and_out",
    ),
    "families: Qwen pads with what ends a turn": (
        "gcrm_fast/model/families.py",
        '("<|fim_pad|>", "<|im_start|>")',
        '("<|im_end|>", "<|im_start|>")',
        "tests/model/test_families.py -k ends_nothing",
    ),
    "recomputation ignored": (
        "gcrm_fast/model/llama.py",
        "if not again or not torch",
        "if again or not torch",
        "tests/training/test_step.py -k recomputing",
    ),
    "recomputation draws other random numbers": (
        "gcrm_fast/model/llama.py",
        "preserve_rng_state=True",
        "preserve_rng_state=False",
        "tests/model/test_modes.py -k survives",
    ),
    "a model loaded for scoring stays in training mode": (
        "gcrm_fast/inference/scoring.py",
        "load(network.eval().requires_grad_(False)",
        "load(network.requires_grad_(False)",
        "tests/model/test_modes.py -k modes",
    ),
    "only the last layer's gradient of a shared input": (
        "gcrm_fast/model/llama.py",
        "torch.addmm(dx_TH, grad, weight, out=dx_TH)",
        "grad @ weight",
        "tests/training/test_step.py -k one_input",
    ),
    "sizes of packs compiled in": (
        "gcrm_fast/model/reward_model.py",
        "dynamic=True",
        "dynamic=False",
        "tests/training/test_step.py -k compiled_blocks",
    ),
    "padded queries counted again in attention": (
        "gcrm_fast/model/segment_attention.py",
        "return values * self.real",
        "return values",
        "tests/data/test_packing.py -k segment_attention",
    ),
    "attention: square segments see what follows": (
        "gcrm_fast/model/segment_attention.py",
        "is_causal=bias is None, attn_mask",
        "is_causal=False, attn_mask",
        "tests/data/test_packing.py -k segment_attention",
    ),
    "attention: the backward of square segments sees what follows": (
        "gcrm_fast/model/segment_attention.py",
        "0.0, bias is None, attn_mask",
        "0.0, False, attn_mask",
        "tests/data/test_packing.py -k segment_attention",
    ),
}
