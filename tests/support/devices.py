"""Where tests run, and what its arithmetic can do."""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter's bfloat16 arithmetic is not that of any device; bfloat16 kernels are tested compiled.
HALVES = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]
# tl.exp and tl.log of a GPU are approximations, right to two units in the last place; the interpreter's are exact.
APPROXIMATE = 2**-22 if DEVICE == "cuda" else 0.0
