"""Faults planted in inference/: name -> (file, text, replacement, test that must turn red)."""

FAULTS = {
    "families: texts longer than the window scored": (
        "gcrm_fast/inference/scoring.py",
        "if window and len(completion.ids) > window:",
        "if False:",
        "tests/model/test_families.py -k as_long_as",
    ),
    "a prompt computed for every completion": (
        "gcrm_fast/inference/scoring.py",
        "by_prompt.setdefault(ids[:start].tobytes(), [])",
        "by_prompt.setdefault(ids.tobytes(), [])",
        "tests/inference/test_scoring.py -k computed_once",
    ),
    "a new reward head scores silently": (
        "gcrm_fast/checkpoints/weights.py",
        "open_weights(folder, config, seed=None)",
        "open_weights(folder, config, seed=0)",
        "tests/inference/test_scoring.py -k must_not_score",
    ),
    "a reward that is not finite is returned": (
        "gcrm_fast/inference/scoring.py",
        "if not (np.isfinite(reward) and",
        "if not (reward is not None and",
        "tests/inference/test_scoring.py -k must_not_score",
    ),
    "scoring: lists of other lengths are cut to the shortest chunk": (
        "gcrm_fast/inference/scoring.py",
        "if not len(prompts) == len(completions) == ",
        "if not len(completions) == ",
        "tests/inference/test_scoring.py -k go_together",
    ),
    "scoring: what cannot be scored ends a run that skips": (
        "gcrm_fast/inference/candidates.py",
        "if bad.skip and (",
        "if not bad.skip and (",
        "tests/inference/test_scoring.py -k skipped_where",
    ),
    "scoring: a goal that is not finite": (
        "gcrm_fast/model/reward_model.py",
        "if not total.isfinite().all():",
        "if not completions:",
        "tests/inference/test_scoring.py -k must_not",
    ),
    "server: a large request outlives its client": (
        "gcrm_fast/inference/batcher.py",
        "                if job.over:\n",
        "                if job.refused:\n",
        "tests/inference/test_serve.py -k takes_turns",
    ),
    "server: answers given to other clients": (
        "gcrm_fast/inference/batcher.py",
        "for job in jobs:\n            job.judged +=",
        "for job in reversed(jobs):\n            job.judged +=",
        "tests/inference/test_serve.py -k many_clients",
    ),
    "server: batches over the token budget": (
        "gcrm_fast/inference/batcher.py",
        "job.take(room)",
        "job.take(10**9)",
        "tests/inference/test_serve.py -k token_budget",
    ),
    "server: one failing request fails its batch": (
        "gcrm_fast/inference/batcher.py",
        "            if len(jobs) > 1:",
        "            if False:",
        "tests/inference/test_serve.py -k fails_for_one",
    ),
    "server: a queue without a bound": (
        "gcrm_fast/inference/batcher.py",
        "if self.waiting + count > self.limit:",
        "if False:",
        "tests/inference/test_serve.py -k full_queue",
    ),
    "server: work for clients that hung up": (
        "gcrm_fast/inference/server.py",
        "            future.cancel()  # takes",
        "            pass  # takes",
        "tests/inference/test_serve.py -k hang_up",
    ),
    "server: a body without a bound": (
        "gcrm_fast/inference/server.py",
        "                    if len(body) > self.max_body:",
        "                    if False:",
        "tests/inference/test_serve.py -k without_an_announced",
    ),
    "server: the start of a token is enough": (
        "gcrm_fast/inference/server.py",
        "hmac.compare_digest(given.strip().encode(), self.token)",
        "self.token.startswith(given.strip().encode())",
        "tests/inference/test_serve.py -k token_is_asked",
    ),
    "server: OpenRLHF's samples without their prompt": (
        "gcrm_fast/inference/protocols.py",
        "prompt if query.startswith(prompt) else",
        "prompt if not query else",
        "tests/inference/test_serve.py -k compute_it_once",
    ),
    "server: Q-values of the default goal only": (
        "gcrm_fast/inference/server.py",
        "goal = goals.index(body.goal) if body.goal else 0",
        "goal = 0",
        "tests/inference/test_serve.py -k any_goal",
    ),
    "server: headers may take any time after the first answer": (
        "gcrm_fast/inference/connections.py",
        "            self._wait_for_headers()\n        super()",
        "            pass\n        super()",
        "tests/inference/test_connections.py -k byte_now_and_then",
    ),
    "server: any number of connections": (
        "gcrm_fast/inference/connections.py",
        "if len(self.connections) <= self._limit:",
        "if self._limit:",
        "tests/inference/test_connections.py -k over_the_maximum",
    ),
    "server: answers that nobody reads are kept": (
        "gcrm_fast/inference/connections.py",
        "self._for_reading, self.transport.abort)",
        "self._for_reading, print)",
        "tests/inference/test_connections.py -k is_not_read",
    ),
    "server: a half-closed client is dropped": (
        "gcrm_fast/inference/connections.py",
        "        return self._half_closed\n",
        "        return False\n",
        "tests/inference/test_connections.py -k half_closed_client",
    ),
    "server: two lengths keep a connection open": (
        "gcrm_fast/inference/connections.py",
        "self.cycle.keep_alive = False  #",
        "self.cycle.keep_alive = True  #",
        "tests/inference/test_connections.py -k with_chunks",
    ),
    "server: bodies together without a bound": (
        "gcrm_fast/inference/server.py",
        "if self.held > BODIES * self.max_body:",
        "if False:",
        "tests/inference/test_connections.py -k bodies_together",
    ),
    "server: redirects repeat the host": (
        "gcrm_fast/inference/server.py",
        "app.router.redirect_slashes = False",
        "app.router.redirect_slashes = True",
        "tests/inference/test_connections.py -k repeat_the_host",
    ),
    "server: ready before it listens": (
        "gcrm_fast/inference/connections.py",
        "        await super().startup(sockets)\n",
        "        self._on_ready()\n        await super().startup(sockets)\n",
        "tests/inference/test_connections.py -k test_head_of_health",
    ),
    "server: compressed bodies taken as they are": (
        "gcrm_fast/inference/protocols.py",
        'if encoding.lower() != "identity":',
        'if encoding.lower() == "":',
        "tests/inference/test_serve.py -k contents_that_are_not",
    ),
    "server: vLLM's fields that change the answer are ignored": (
        "gcrm_fast/inference/protocols.py",
        """    model_config = ConfigDict(extra="forbid")
    model: str""",
        """    model_config = ConfigDict(extra="ignore")
    model: str""",
        "tests/inference/test_serve.py -k vllm",
    ),
    "server: metrics without the token": (
        "gcrm_fast/inference/server.py",
        "        self._authorize(request)\n        return Response(",
        "        return Response(",
        "tests/inference/test_serve.py -k test_metrics",
    ),
}
