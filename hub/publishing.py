"""Uploads to the Hugging Face Hub, and what can go wrong with them in words that say what to do."""

from __future__ import annotations

import argparse
import errno
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

from .errors import HubError

_AGAIN = "Nothing is half done: try again"


def add_repository(parser: argparse.ArgumentParser, name: str, message: str) -> None:
    """
    :param parser: Gets the arguments that say where and how to publish, except for the organization
    :param name: What the repository is called by default, for the help
    :param message: Of the commit by default
    """
    parser.add_argument("-name", "--repo-name", help=f"name of the repository (default: {name})")
    parser.add_argument("-m", "--commit-message", help="commit message", default=message)
    parser.add_argument("--private", help="make the repository private", action="store_true")
    parser.add_argument("--token", help="access token (default: HF_TOKEN, or that of `hf auth login`)")
    parser.add_argument("--license", help="licence of what is published, an identifier of the Hub", default="mit")


def check_token(token: str | None, repo_id: str) -> None:
    """
    Find out early whether the Hub knows who is there.

    :param token: Access token (None: ``HF_TOKEN``, or that of ``hf auth login``)
    :param repo_id: ``organization/name``, for the messages
    :raises HubError: if it does not
    """
    with explained(repo_id):
        HfApi(token=token).whoami()


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
    :param private: Make the repository private
    :param token: Access token (None: ``HF_TOKEN``, or that of ``hf auth login``)
    :return: Address of the repository
    :raises HubError: if it fails
    """
    api = HfApi(token=token)
    operations = [CommitOperationAdd(name, path) for name, path in files.items()]
    with explained(repo_id):
        url = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
        if private:
            # A repository that is there stays as public as it is
            api.update_repo_settings(repo_id, private=True, repo_type=repo_type)
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
    except (HTTPError, LocalEntryNotFoundError, LocalTokenNotFoundError) as error:
        raise HubError(_what_to_do(error, repo_id)) from error
    except RuntimeError as error:
        # Errors in the transfer of a large file come wrapped
        if not isinstance(error.__cause__, HTTPError):
            raise
        raise HubError(_what_to_do(error.__cause__, repo_id)) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise HubError(f"There is no room left for the files ({error.strerror}). {_AGAIN} when there is.") from error


def _what_to_do(error: BaseException, repo_id: str) -> str:
    if isinstance(error, LocalTokenNotFoundError):
        return "The Hub needs to know who you are: run `hf auth login`, or set HF_TOKEN."
    if isinstance(error, RepositoryNotFoundError):
        return f"There is no repository {repo_id}, or it is private and the token may not read it."
    if not isinstance(error, HfHubHTTPError):
        return f"The connection to the Hub failed ({type(error).__name__}: {error}). {_AGAIN}."
    status = error.response.status_code
    if status == 401:
        return "The Hub does not accept the token. Make a new one with write access, and run `hf auth login` or set HF_TOKEN."
    if status == 403:
        return f"The token may not write to {repo_id}. Check the organization's name and the token's permissions."
    if status == 429:
        return f"The Hub asks to send fewer requests. {_AGAIN} in some minutes."
    if status >= 500:
        return f"The Hub has a problem of its own ({status}). {_AGAIN} later."
    return f"The Hub refuses {repo_id}: {error.server_message or error}"
