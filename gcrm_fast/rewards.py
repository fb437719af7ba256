"""The former name of ``gcrm_fast.rlhf.trl``, kept for one release."""

from gcrm_fast.data.chat import as_text
from gcrm_fast.data.messages import Messages
from gcrm_fast.rlhf.trl import RewardFunction

__all__ = ["Messages", "RewardFunction", "as_text"]
