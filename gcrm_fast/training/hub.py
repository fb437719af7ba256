"""Uploading a finished model to the Hugging Face Hub."""

from pathlib import Path

from huggingface_hub import HfApi

from gcrm_fast.common.errors import UserError, one_line


def create_repository(name: str) -> None:
    """Creates a private repository unless there is one of that name, which stays as it is: before training, so that a
    missing token is noticed then.

    Raises:
        UserError: it does not exist and cannot be created.
    """
    try:
        HfApi().create_repo(name, private=True, exist_ok=True)
    except Exception as error:  # the hub lets through errors of its HTTP library, which depends on its version
        raise UserError(f"--push-to-hub {name}: not available ({one_line(error)}): log in with hf auth login") from None


def upload(folder: Path, name: str) -> str:
    """Uploads all files of a model's folder in one commit, and returns the commit's address. Raises UserError."""
    try:
        commit = HfApi().upload_folder(repo_id=name, folder_path=folder, commit_message="Model of gcrm train")
    except Exception as error:
        raise UserError(
            f"--push-to-hub {name}: not uploaded ({one_line(error)}): the model is in {folder}: upload it with "
            f"hf upload {name} {folder}"
        ) from None
    return str(commit)
