"""Faults planted in bench/: name -> (file, text, replacement, test that must turn red)."""

FAULTS = {
    "benchmark: the reference reads negative goals on the chosen completion": (
        "bench/padded.py",
        "torch.tensor([0, 0, 0, n])",
        "torch.tensor([0, 0, 0, 0])",
        "tests/bench/test_train_step.py -k lever",
    ),
    "benchmark: TRL without autocast from its second trainer on": (
        "bench/padded.py",
        '("forward", "_original_forward", "_is_accelerate_prepared")',
        '("forward",)',
        "tests/bench/test_train_step.py -k dtype_that_is_timed",
    ),
    "benchmark: views move bytes": (
        "bench/step_model.py",
        "not func.is_view and ",
        "",
        "tests/bench/test_step_model.py -k charged",
    ),
    "benchmark: attention's backward counted once": (
        "bench/step_model.py",
        '(2 if name.endswith("backward") else 1)',
        "1",
        "tests/bench/test_step_model.py -k operations_of_the_log",
    ),
    "benchmark: sharing not removed": (
        "bench/our_step.py",
        'with unshared if without == "sharing"',
        'with unshared if without == "none"',
        "tests/bench/test_train_step.py -k lever",
    ),
    "benchmark: differences in gradients pass": (
        "bench/contestants.py",
        "ok = loss_error <= tolerance and errors[worst] <= tolerance",
        "ok = loss_error <= tolerance",
        "tests/bench/test_train_step.py -k lever",
    ),
    "benchmark: all of causal attention counted": (
        "bench/contestants.py",
        "length * (length + 1) // 2",
        "length * length",
        "tests/bench/test_train_step.py -k flops",
    ),
    "benchmark: medians over steps and not over rounds": (
        "bench/train_step.py",
        "np.median(seconds, axis=0)",
        "np.median(seconds, axis=1)",
        "tests/bench/test_train_step.py -k speed",
    ),
    "benchmark: FSDP gathers a block once for its forward and backward": (
        "bench/step_model.py",
        "packs * (embedding + 2 * blocks)",
        "packs * (embedding + blocks)",
        "tests/bench/test_step_model.py -k fsdp_copies",
    ),
    "tables of GPU runs from the file that sorts last by device": (
        "bench/gpu_report.py",
        "key=lambda path: path.stem[-10:]",
        "key=lambda path: path.stem",
        "tests/bench/test_gpu_report.py -k newest",
    ),
    "tables of GPU runs with the numbers of a file's first call": (
        "bench/gpu_report.py",
        "                lines.clear()\n",
        "                continue\n",
        "tests/bench/test_gpu_report.py -k latest_numbers",
    ),
    "GPU run: what a part started outlives it": (
        "bench/gpu.py",
        "                os.kill(pid, signal.SIGKILL)",
        "                pass",
        "tests/bench/test_gpu.py -k hang_or_die",
    ),
    "GPU run: a line that was cut off swallows the next": (
        "bench/gpu.py",
        "    if rest:\n",
        "    if False:\n",
        "tests/bench/test_gpu.py -k hang_or_die",
    ),
}
