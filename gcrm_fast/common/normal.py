"""Normal distributions of latents, and how many samples one takes.

Letters: N samples, D width of the latents.
"""

from typing import NamedTuple

import numpy as np

FEWEST_PER_WIDTH, GOOD_PER_WIDTH = 2, 20  # samples per dimension


class Normal(NamedTuple):
    """Mean [D], and the lower Cholesky factor [D, D] of the covariance; float64."""

    mean_D: np.ndarray
    factor_DD: np.ndarray

    @staticmethod
    def of(mean_D: np.ndarray, covariance_DD: np.ndarray) -> "Normal":
        return Normal(mean_D, np.linalg.cholesky(covariance_DD))

    def distances(self, latents_ND: np.ndarray) -> np.ndarray:
        """Mahalanobis distances [N], not squared."""
        centered_DN = (latents_ND.astype(np.float64) - self.mean_D).T
        return np.linalg.norm(np.linalg.solve(self.factor_DD, centered_DN), axis=0)


def few(count: int, width: int, of: str = "") -> str:
    """A warning about too few reference completions, ``of`` which class; "" for enough."""
    if count >= GOOD_PER_WIDTH * width:
        return ""
    needed = f"{GOOD_PER_WIDTH * width} make the distances reliable"
    return f"{count} reference completions{of} are few for latents of width {width}: {needed}"
