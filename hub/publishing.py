"""Uploads to the Hugging Face Hub, and what can go wrong with them in words that say what to do."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)


class HubError(RuntimeError):
    """Something that the Hub refuses, or that keeps it from being reached."""

    exit_status = 80


def upload(
    files: Mapping[str, Path],
    repo_id: str,
    message: str,
    repo_type: str = "model",
    private: bool = False,
    token: str | None = None,
) -> str:
    """
    Upload files in one commit: the repository shows all of them, or what was there before. Large files that are there already
    are not sent again, so that an interrupted upload can be repeated.

    :param files: What to upload, by its name in the repository
    :param repo_id: ``organization/name``; made if it does not exist
    :param message: Of the commit
    :param repo_type: "model" or "dataset"
    :param private: Whether a new repository is private
    :param token: Access token (None: ``HF_TOKEN``, or that of ``hf auth login``)
    :return: Address of the repository
    :raises HubError: if it fails
    """
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token)
    with explained(repo_id):
        url = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
        operations = [CommitOperationAdd(name, path) for name, path in files.items()]
        api.create_commit(repo_id, operations, commit_message=message, repo_type=repo_type)
    return str(url)


def files_in(folder: Path) -> dict[str, Path]:
    """
    :param folder: Whose files are to be uploaded
    :return: All of them, by their names relative to it
    """
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


@contextmanager
def explained(repo_id: str) -> Iterator[None]:
    """
    :param repo_id: ``organization/name``, for the messages
    :raises HubError: instead of the client's errors
    """
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise HubError("The Hub needs to know who you are: run `hf auth login`, or set HF_TOKEN.") from error
    except HfHubHTTPError as error:
        raise HubError(_what_to_do(error, repo_id)) from error
    # What the client raises for a file that is not in its cache when it cannot ask for it
    except (HTTPError, LocalEntryNotFoundError) as error:
        reason = type(error.__cause__ or error).__name__
        raise HubError(f"The connection to the Hub failed ({reason}). Nothing is half done: try again.") from error
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise HubError("There is no room left on the disk. Nothing is half done: make room, and try again.") from error


def _what_to_do(error: HfHubHTTPError, repo_id: str) -> str:
    status = error.response.status_code
    if status == 401 and not isinstance(error, RepositoryNotFoundError):
        return "The Hub does not accept the token. Make a new one with write access, and run `hf auth login` or set HF_TOKEN."
    if status == 403:
        return f"The token may not write to {repo_id}. Check the organization's name and the token's permissions."
    if isinstance(error, RepositoryNotFoundError):
        return f"There is no repository {repo_id}, or it is private and the token may not read it."
    if status == 429:
        return "The Hub asks to send fewer requests. Nothing is half done: try again in some minutes."
    if status >= 500:
        return f"The Hub has a problem of its own ({status}). Nothing is half done: try again later."
    return f"The Hub refuses {repo_id}: {error.server_message or error}"
