"""The former name of ``gcrm_fast.rlhf.trl``, kept for one release."""

from gcrm_fast.rlhf.trl import Messages, RewardFunction, as_text

__all__ = ["Messages", "RewardFunction", "as_text"]
