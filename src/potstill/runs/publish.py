"""A run's student on the model hub, where the user asks for that."""

import os
from pathlib import Path

from potstill.config import RecipeError
from potstill.console.printable import error_text
from potstill.runs.card import HUB_ID, write_card
from potstill.runs.run_folder import RunError, resume_command

OPTION = "--push-to-hub"


def refuse_push(repo_id: str) -> None:
    """Raise RecipeError where a push cannot succeed, as far as this machine knows: a name that is
    none, no token, or no hub."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
        is_name = HUB_ID.fullmatch(repo_id) is not None
    except HFValidationError:
        is_name = False
    if not is_name:
        raise RecipeError(
            f"{OPTION} is {repo_id!r}; give the owner and the name of a repository, like org/model"
        )
    if constants.HF_HUB_OFFLINE:
        raise RecipeError(f"{OPTION} is given and HF_HUB_OFFLINE is set; unset one of them")
    if get_token() is None:
        raise RecipeError(
            f"{OPTION} is given and there is no token of the hub; run `hf auth login`, or set "
            "HF_TOKEN"
        )


def push(folder: Path, repo_id: str) -> str:
    """Upload the model of a finished run, with its card, and return its address.

    The repository is private if it is made here; one that is there stays as visible as it is.
    Raises RunError, with the command that tries again, where the hub does not take it.
    """
    from huggingface_hub import HfApi

    write_card(folder, repo_id)
    api = HfApi()
    try:
        url = api.create_repo(repo_id, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=os.fspath(folder / "model"),
            commit_message="A student distilled with potstill",
        )
    # Any error can come from a network, a server or a client of any version.
    except Exception as error:
        raise RunError(
            f"the student is finished in {str(folder / 'model')!r}, and it could not be pushed to "
            f"{repo_id}: {error_text(error, 300)}; "
            f"`{resume_command(folder)} {OPTION} {repo_id}` tries again"
        ) from error
    return str(url)
