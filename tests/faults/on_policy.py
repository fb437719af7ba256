"""Faults in the training on samples of a policy: name -> (file, text, replacement, test that must turn red)."""

FAULTS = {
    "on policy: every pass draws the pairs of the first": (
        "gcrm_fast/data/on_policy.py",
        "self._epoch, self._drawn = epoch, self._pass(epoch)",
        "self._epoch, self._drawn = epoch, self._pass(0)",
        "tests/training/test_on_policy.py -k every_sample_once",
    ),
    "on policy: a pair without a partner joins no block": (
        "gcrm_fast/data/on_policy.py",
        "return [a + b for a, b in zip_longest(joined, alone, fillvalue=list[ViewPair]())]",
        "return joined + alone",
        "tests/training/test_on_policy.py -k blocks_hold",
    ),
    "run: the saved model holds the networks of the views": (
        "gcrm_fast/training/finishing.py",
        "if name != LM_HEAD and not name.startswith(VIEWS)",
        "if name != LM_HEAD",
        "tests/training/test_on_policy.py -k logs_the_loss",
    ),
    "run: a checkpoint fits other samples of a policy": (
        "gcrm_fast/training/prepare.py",
        'sources + (self.on_policy.key if self.on_policy else b"")',
        "sources",
        "tests/training/test_on_policy.py -k another_run",
    ),
    "loader: every step has the same pairs of samples": (
        "gcrm_fast/training/loader.py",
        "self.on_policy.views(epoch * len(self.pairs) + done, count)",
        "self.on_policy.views(done, count)",
        "tests/training/test_on_policy.py -k seed_and_step",
    ),
    "views: the weight of the divergences grows beyond 1": (
        "gcrm_fast/training/run.py",
        "LEAST_DIVERGENCE ** max(0.0, 1 - step / ramp)",
        "LEAST_DIVERGENCE ** (1 - step / ramp)",
        "tests/training/test_on_policy.py -k divergences_grows",
    ),
}
