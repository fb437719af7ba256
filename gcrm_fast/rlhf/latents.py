"""How far completions are from a reference policy in a reward model's latents, for a penalty on the reward (IBL of
InfoRM, arXiv 2510.13694).

Letters: N completions, D width of the latents.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gcrm_fast.common.errors import UserError, one_line
from gcrm_fast.common.normal import FEWEST_PER_WIDTH, Normal, few
from gcrm_fast.common.notes import warn_once
from gcrm_fast.inference.scoring import RewardModel

RIDGE = 1e-6  # added to the variances
ONE_CLASS = "all"


def _names(classes: Sequence[object] | None, count: int) -> list[str]:
    """As texts, which a file keeps and a trainer's column gives; numbers are theirs."""
    return [ONE_CLASS] * count if classes is None else [str(name) for name in classes]


@dataclass(frozen=True, kw_only=True)
class LatentReference:
    """Latents of a reference policy in the reward model with this ``fingerprint``: a normal distribution for each class
    of prompts."""

    fingerprint: str
    classes: Mapping[str, Normal]

    @staticmethod
    def of(
        model: RewardModel, prompts: Sequence[str], completions: Sequence[str], classes: Sequence[object] | None = None
    ) -> "LatentReference":
        """From completions of the reference policy, usually the one before training.

        Args:
            classes: of each prompt, by its text; one class for all by default.

        Raises:
            UserError: fewer than FEWEST_PER_WIDTH completions of a class per dimension.
        """
        latents_ND = model.latents(model.encode(prompts, completions)).astype(np.float64)
        class_N = np.array(_names(classes, len(prompts)))
        width, normals = latents_ND.shape[1], {}
        for name in np.unique(class_N).tolist():
            own_ND = latents_ND[class_N == name]
            if len(own_ND) < FEWEST_PER_WIDTH * width:
                what = f"{len(own_ND)} reference completions of class {name!r} for latents of width {width}"
                raise UserError(f"{what}: give at least {FEWEST_PER_WIDTH * width}")
            if warning := few(len(own_ND), width, f" of class {name!r}"):
                warn_once(warning)
            normals[name] = Normal.of(own_ND.mean(0), np.atleast_2d(np.cov(own_ND.T)) + RIDGE * np.eye(width))
        return LatentReference(fingerprint=model.fingerprint, classes=normals)

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file."""
        tensors: dict[str, np.ndarray] = {}
        for number, normal in enumerate(self.classes.values()):
            tensors |= {f"{number}.mean": normal.mean_D, f"{number}.factor": normal.factor_DD}
        facts = {"fingerprint": self.fingerprint, "classes": list(self.classes)}
        save_file(tensors, path, metadata={"gcrm": json.dumps(facts)})

    @staticmethod
    def load(path: str | Path) -> "LatentReference":
        """What ``save`` wrote. Raises UserError for another file."""
        try:
            with safe_open(path, framework="numpy") as file:
                facts = json.loads((file.metadata() or {})["gcrm"])
                classes = {
                    name: Normal(file.get_tensor(f"{i}.mean"), file.get_tensor(f"{i}.factor"))
                    for i, name in enumerate(facts["classes"])
                }
                return LatentReference(fingerprint=facts["fingerprint"], classes=classes)
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            raise UserError(f"{path}: not a file that LatentReference.save wrote ({one_line(error)})") from None

    def check(self, model: RewardModel) -> None:
        """Raises UserError for another model than the one that the latents are from."""
        if self.fingerprint != model.fingerprint:
            raise UserError(
                "the latent reference is of another model's weights: make it with LatentReference.of for this"
            )

    def distances(self, latents_ND: np.ndarray, classes: Sequence[object] | None = None) -> np.ndarray:
        """Mahalanobis distances [N], not squared, each to the reference of its class. Raises UserError for a class
        without a reference."""
        names = _names(classes, len(latents_ND))
        if unknown := [name for name in names if name not in self.classes]:
            raise UserError(f"class {unknown[0]!r} has no latent reference: there is one for {', '.join(self.classes)}")
        distance_N = np.empty(len(names))
        for name in set(names):
            own = np.array([one == name for one in names])
            distance_N[own] = self.classes[name].distances(latents_ND[own])
        return distance_N
