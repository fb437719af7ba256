"""Which prompts to train a policy on next: Pre-PPO selection and the curriculum (arXiv 2503.22230).

Prompts on which the policy does worst against a reference teach it most. Scores of different domains are not
comparable, so each is replaced by its place within its domain, and the lowest are kept.

Letters: N prompts.
"""

import re
import zlib
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from gcrm_fast.common.errors import UserError

SMALL = 20  # prompts: the place within fewer says little
ALL = "all"

Normalization = Literal["rank", "z"]


def pooled(domains: Sequence[str]) -> list[str]:
    """The group in which each prompt is compared: its domain, or for domains with fewer than SMALL prompts all of
    these together."""
    counts = {name: domains.count(name) for name in set(domains)}
    small = sorted(name for name, count in counts.items() if count < SMALL)
    if len(small) < 2:
        return list(domains)
    together = " + ".join(small)
    return [together if name in small else name for name in domains]


def normalized(scores_N: np.ndarray, groups: Sequence[str], prompts: Sequence[str], how: Normalization) -> np.ndarray:
    """The place of each score within its group, [N] float64: ``rank``, the share of the group below it, from 0 to 1; or
    ``z``, standard deviations from the group's mean. Of equal ranks a hash of the prompts decides, not their order."""
    places_N = np.zeros(len(scores_N))
    ties_N = np.array([zlib.crc32(prompt.encode("utf-8", "surrogatepass")) for prompt in prompts], dtype=np.int64)
    for group in dict.fromkeys(groups):
        own = np.flatnonzero(np.array(groups) == group)
        score = scores_N[own]
        if how == "rank":
            order = np.lexsort((own, ties_N[own], score))
            places_N[own[order]] = (np.arange(len(own)) + 0.5) / len(own)
        else:
            spread = score.std()
            places_N[own] = (score - score.mean()) / spread if spread > 0 else 0.0
    return places_N


def lowest(places_N: np.ndarray, keep: float, prompts: Sequence[str], how: Normalization) -> np.ndarray:
    """Which prompts to keep, [N] bool: the share ``keep`` with the lowest places; by ``rank`` of each group, by ``z``
    of all prompts. At least one prompt is kept."""
    if how == "rank":
        kept_N = places_N < keep
        kept_N[places_N.argmin()] = True
        return kept_N
    ties_N = np.array([zlib.crc32(prompt.encode("utf-8", "surrogatepass")) for prompt in prompts], dtype=np.int64)
    order = np.lexsort((np.arange(len(places_N)), ties_N, places_N))
    kept_N = np.zeros(len(places_N), dtype=bool)
    kept_N[order[: max(1, round(keep * len(places_N)))]] = True
    return kept_N


def check_order(order: str, domains: Sequence[str]) -> None:
    """Raises UserError for a name in ``order`` (see ``stages``) that is no domain."""
    known = set(domains) | {ALL}
    unknown = sorted({name.strip() for name in re.split(r"[,+]", order)} - known)
    if unknown:
        listed = ", ".join([*sorted(known - {ALL}), ALL])
        raise UserError(f"--order {order}: no prompt has the domain {unknown[0]!r}: the domains are {listed}")


def stages(order: str, domains: Sequence[str]) -> list[tuple[str, list[int]]]:
    """The prompts of each stage of a curriculum by their numbers; ``order`` is a list of stages such as
    ``math+code,all``, whose names are known. Raises UserError for a domain without prompts."""
    known = set(domains)
    found: list[tuple[str, list[int]]] = []
    for stage in order.split(","):
        names = {name.strip() for name in stage.split("+")}
        if dropped := sorted(names - known - {ALL}):
            raise UserError(
                f"--order {order}: of the prompts of the domain {dropped[0]!r} none is kept: omit it, or raise --keep"
            )
        own = [i for i, domain in enumerate(domains) if domain in names or ALL in names]
        found.append((stage.strip(), own))
    return found


def curriculum(of_stages: Sequence[tuple[str, Sequence[int]]], count: int, seed: int) -> Iterator[tuple[int, str]]:
    """``count`` prompts in the order of training, as (number, stage). The stages have equally many of them, and each
    goes through its prompts again and again, shuffled by (seed, stage, pass). The first n are the same for any count of
    a stage that they do not exceed, so a trainer that resumes skips what it has seen."""
    for number, (name, own) in enumerate(of_stages):
        share = count * (number + 1) // len(of_stages) - count * number // len(of_stages)
        for start in range(0, share, len(own)):
            order = np.random.default_rng((seed, number, start // len(own))).permutation(len(own))
            yield from ((own[i], name) for i in order[: share - start].tolist())
