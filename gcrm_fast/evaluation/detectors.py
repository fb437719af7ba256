"""Detectors of over-optimization from latents of samples, compared with those of a reference policy (InfoRM, arXiv
2402.09345 and 2510.13694). Each has a null: what it says of one part of the reference against another.

Letters: N samples, D width of the latents.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from sklearn.cluster import DBSCAN
from sklearn.covariance import LedoitWolf
from sklearn.neighbors import NearestNeighbors

from gcrm_fast.common.errors import UserError
from gcrm_fast.common.normal import FEWEST_PER_WIDTH, Normal, few

NEIGHBORS = 5  # DBSCAN's min_samples, and the neighbor whose distance sets eps
QUANTILE = 0.99  # of squared distances of held-out reference latents, above which a sample is an outlier
STOP = 10.0  # early-stop indicator


class Clusters(NamedTuple):
    """Cluster separation index per sample (CSI / N), and the share of samples in no cluster."""

    csi: float
    noise: float


class Finding(NamedTuple):
    """What the detectors say of one file of samples."""

    clusters: Clusters
    outliers: float  # MOP: share of samples with a greater distance than QUANTILE of held-out reference samples
    distance: float  # mean Mahalanobis distance

    def measures(self) -> dict[str, float]:
        """The values by their names in results and logs."""
        return {
            "csi_per_sample": self.clusters.csi,
            "noise": self.clusters.noise,
            "outliers": self.outliers,
            "mahalanobis": self.distance,
        }


def parts_of(prompts: Sequence[str]) -> np.ndarray:
    """The part of the reference, 0 to 3, that each completion belongs to: a function of its prompt alone. Not of a
    CRC, by which prompts that differ in a number may miss a part."""
    return np.array([hashlib.blake2b(prompt.encode(), digest_size=1).digest()[0] & 3 for prompt in prompts])


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Latents of the reference policy, in three parts: fitted, for the threshold, and for the null."""

    fitted_ND: np.ndarray
    normal: Normal
    threshold: float  # of squared distances
    eps: float
    null: Finding
    warning: str

    @staticmethod
    def of(latents_ND: np.ndarray, part_N: np.ndarray, name: str) -> "Reference":
        """``part_N``: 0 and 1 are fitted, 2 sets the threshold, 3 is the null.

        Raises:
            UserError: fewer than FEWEST_PER_WIDTH samples per dimension, a part without NEIGHBORS + 1 samples, or
                latents that are all equal.
        """
        n, width = latents_ND.shape
        if n < FEWEST_PER_WIDTH * width or min(np.bincount(part_N, minlength=4)) <= NEIGHBORS:
            raise UserError(
                f"{name}: {n} completions for latents of width {width}: give at least "
                f"{max(FEWEST_PER_WIDTH * width, 8 * NEIGHBORS)}, of different prompts"
            )
        fitted_ND = latents_ND[part_N < 2]
        covariance = LedoitWolf().fit(fitted_ND)
        try:
            normal = Normal.of(covariance.location_, covariance.covariance_)
        except np.linalg.LinAlgError:
            what = "all completions have the same latents, or one of few"
            raise UserError(f"{name}: {what}: give completions that differ") from None
        threshold = float(np.quantile(normal.distances(latents_ND[part_N == 2]) ** 2, QUANTILE))
        eps = neighbor_distance(fitted_ND)
        null_ND = latents_ND[part_N == 3]
        return Reference(
            fitted_ND=fitted_ND,
            normal=normal,
            threshold=threshold,
            eps=eps,
            null=find(null_ND, fitted_ND, normal, threshold, eps),
            warning=few(n, width),
        )

    def find(self, latents_ND: np.ndarray) -> Finding:
        """The detectors on these samples."""
        return find(latents_ND, self.fitted_ND, self.normal, self.threshold, self.eps)


def find(latents_ND: np.ndarray, fitted_ND: np.ndarray, normal: Normal, threshold: float, eps: float) -> Finding:
    distance_N = normal.distances(latents_ND)
    return Finding(
        clusters=clusters(latents_ND, fitted_ND, eps),
        outliers=float((distance_N**2 > threshold).mean()),
        distance=float(distance_N.mean()),
    )


def neighbor_distance(latents_ND: np.ndarray) -> float:
    """Median distance to the NEIGHBORS-th nearest other latent. (The paper's eps of 0.5 makes all samples noise from
    about 32 dimensions on.)"""
    distances, _ = NearestNeighbors(n_neighbors=NEIGHBORS + 1).fit(latents_ND).kneighbors(latents_ND)
    return float(np.median(distances[:, NEIGHBORS]))


def clusters(latents_ND: np.ndarray, reference_ND: np.ndarray, eps: float) -> Clusters:
    """CSI = sum_i |C_i| d_i over the clusters of DBSCAN, noise being one, d_i the distance from a cluster's centroid to
    the nearest reference latent (InfoRM, section 5.2), here divided by the number of samples. ICDS is its other name.
    """
    label_N = DBSCAN(eps=max(eps, np.finfo(np.float32).tiny), min_samples=NEIGHBORS).fit_predict(latents_ND)
    nearest = NearestNeighbors(n_neighbors=1).fit(reference_ND)
    total = 0.0
    for label in np.unique(label_N):
        own_ND = latents_ND[label_N == label]
        distance, _ = nearest.kneighbors(own_ND.mean(0, keepdims=True))
        total += len(own_ND) * float(distance[0, 0])
    return Clusters(csi=total / len(latents_ND), noise=float((label_N < 0).mean()))


def early_stop(csi: Sequence[float]) -> list[float]:
    """e_t = D_t / mean(D_1 .. D_(t-1)) with D_t = |CSI_t - CSI_(t-1)|; above STOP the CSI jumps. NaN for t < 2, and
    where CSI never changed before."""
    changes = np.abs(np.diff(csi))
    values = [math.nan] * min(len(csi), 2)
    for t in range(1, len(changes)):
        before = float(changes[:t].mean())
        values.append(float(changes[t]) / before if before > 0 else math.nan)
    return values
