"""Faults planted in tests/peers/: name -> (file, text, replacement, test that must turn red)."""

FAULTS = {
    "peers: none runs where none is named": (
        "tests/peers/run.py",
        "parse_args(argv).peers or list(PEERS)",
        "parse_args(argv).peers",
        "tests/peers/test_results.py -k without_names",
    ),
    "peers: whatever a peer says is as documented": (
        "tests/peers/run.py",
        'agrees = answer["said"] == answer["documented"]',
        "agrees = True",
        "tests/peers/test_results.py -k verdicts",
    ),
    "peers: the mean difference counts, not the largest": (
        "tests/peers/run.py",
        "np.abs(np.subtract(a, b)).max()",
        "np.abs(np.subtract(a, b)).min()",
        "tests/peers/test_results.py -k verdicts",
    ),
    "peers: results of peers that did not run are lost": (
        "tests/peers/run.py",
        "json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}",
        "{}",
        "tests/peers/test_results.py -k without_names",
    ),
}
