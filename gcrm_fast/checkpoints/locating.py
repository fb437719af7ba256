"""The files of a model's folder, and where that folder is: on the disk or on the Hugging Face hub."""

import os
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from gcrm_fast.common.errors import UserError, one_line

HEAD_FILE = "gcrm.json"
COMPANION = "gcrm.safetensors"
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # peft's
PEFT_PREFIX = "base_model.model."  # of the names in its files
TOKENIZER_FILES = [
    *("config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
    *("vocab.json", "merges.txt", ADAPTER),
]
# Of the weights, in subfolders or in the format of Mistral itself: not fetched.
OTHER_COPIES = ["*/*", "consolidated*.safetensors"]
MODEL_FILES = [
    *(*TOKENIZER_FILES, HEAD_FILE, "*.safetensors", "*.safetensors.index.json"),
    "README.md",  # the model card, of which the card of what is trained from it names the license
]


def locate(name: str, flag: str, files: list[str]) -> Path:
    """The folder ``name``, or the copy of the hub repository ``name``, of which ``files`` (patterns) are downloaded
    unless they are in the hub's cache.

    Any number of processes may call it at once: the hub's own file locks let one of them download each file.

    Raises:
        UserError: neither a readable folder nor an available repository.
    """
    # os.path answers False where pathlib raises: names too long, or folders that may not be entered.
    if os.path.isdir(name):
        if not os.access(name, os.R_OK | os.X_OK):
            raise UserError(f"{flag} {name}: permission denied: make the folder readable")
        if not any(os.path.exists(os.path.join(name, file)) for file in ("config.json", ADAPTER)):
            if os.path.isdir(model := os.path.join(name, "model")):
                raise UserError(f"{flag} {name}: is the folder of a run: name its model, {model}")
            if files is MODEL_FILES:  # a tokenizer needs none
                raise UserError(f"{flag} {name}: holds no config.json: name the folder of a Hugging Face model")
        return Path(name)
    if os.path.exists(name):
        raise UserError(f"{flag} {name}: is a file: name the folder of a Hugging Face model")
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise UserError(f"{flag} {name}: no such folder") from None
    try:
        return Path(snapshot_download(name, allow_patterns=files, ignore_patterns=OTHER_COPIES))
    except Exception as error:  # the hub lets through errors of its HTTP library, which depends on its version
        raise UserError(f"{flag} {name}: no such folder, and {_unavailable(error)}") from None


def _unavailable(error: Exception) -> str:
    """Why the hub has no such repository for this user."""
    if isinstance(error, GatedRepoError):
        return "a repository of the Hugging Face hub that asks for access: request it there, and run hf auth login"
    if isinstance(error, RepositoryNotFoundError):
        return "no repository of the Hugging Face hub that you may read: for a private one run hf auth login"
    if isinstance(error, LocalEntryNotFoundError):
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        return f"not in the cache of the Hugging Face hub, and {why}"
    return f"not available from the Hugging Face hub ({one_line(error)})"
