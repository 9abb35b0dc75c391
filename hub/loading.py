"""Agents from the Hugging Face Hub, without unpickling anything unless it is asked for."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch as th
from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.type_aliases import GymEnv

from sb3_ext.zoo import register

from .environment import SavedEnv
from .errors import SafeFormatError
from .files import CONFIG_NAME, read_config, weights_name
from .publishing import explained
from .safe import load_safe
from .values import check_type


def load(
    repo_id: str,
    env: GymEnv | None = None,
    device: th.device | str = "auto",
    revision: str | None = None,
    token: str | None = None,
    allow: Iterable[type] = (),
    trust_pickle: bool = False,
    **arguments: Any,
) -> tuple[Any, SavedEnv]:
    """
    Load an agent that ``python -m sb3_ext.hub.push`` has published.

    :param repo_id: ``organization/name``
    :param env: As for SB3's ``load``: the environment to go on training in (None: none yet)
    :param device: Device on which the code should run (``auto``: a GPU if there is one)
    :param revision: Branch, tag or commit (None: the newest)
    :param token: Access token (None: ``HF_TOKEN``, or that of ``hf auth login``)
    :param allow: Classes beyond the allow-list that you trust, see :func:`load_safe`
    :param trust_pickle: Load SB3's zip instead, which can run any code that its author has put into it. Needed for agents
        that other tools have published.
    :param arguments: Arguments of the algorithm in the place of those that were saved, such as ``buffer_size``
    :return: The model, and what is needed to build its environment; with ``trust_pickle``, nothing is known of that
    :raises SafeFormatError: if the files are damaged or name something that is not allowed, or there is only a zip
    :raises HubError: if the Hub refuses, or cannot be reached
    """
    # The environments that the zoo knows, this package's among them
    register()
    with explained(repo_id), tempfile.TemporaryDirectory() as folder:
        download = _Downloads(repo_id, revision, token, Path(folder))
        if trust_pickle:
            return _unpickle(repo_id, download, env, device, arguments), SavedEnv()
        try:
            download(CONFIG_NAME)
        except LocalEntryNotFoundError:
            # That the Hub could not be asked
            raise
        except EntryNotFoundError as error:
            raise SafeFormatError(
                f"{repo_id} has no {CONFIG_NAME}, only what has to be unpickled, which can run any code that its author has "
                "put into it. If you trust the author, say so: trust_pickle=True."
            ) from error
        download(weights_name(check_type(read_config(Path(folder)).get("weights_sha256"), str, "weights_sha256")))
        return load_safe(folder, env, device, allow, **arguments)


class _Downloads:
    """
    Downloads files of one commit, through the Hub's cache, into one folder.

    :param repo_id: ``organization/name``
    :param revision: Branch, tag or commit (None: the newest)
    :param token: Access token
    :param folder: Where to
    """

    def __init__(self, repo_id: str, revision: str | None, token: str | None, folder: Path) -> None:
        self.api, self.repo_id, self.folder = HfApi(token=token), repo_id, folder
        # A push in between must not mix two agents
        self.commit = self.api.repo_info(repo_id, revision=revision).sha

    def names(self) -> list[str]:
        """:return: of all files that are there"""
        return self.api.list_repo_files(self.repo_id, revision=self.commit)

    def __call__(self, name: str) -> Path:
        cached = self.api.hf_hub_download(self.repo_id, name, revision=self.commit)
        # The cache has links, which load_safe does not follow
        return Path(shutil.copy(cached, self.folder / name))


def _unpickle(
    repo_id: str, download: _Downloads, env: GymEnv | None, device: th.device | str, arguments: dict[str, Any]
) -> BaseAlgorithm:
    from rl_zoo3.utils import ALGOS

    models = [name for name in download.names() if name.endswith(".zip") and name != "train_eval_metrics.zip"]
    keys = [name.split("-")[0] for name in models]
    if len(models) != 1 or keys[0] not in ALGOS:
        raise SafeFormatError(f"{repo_id} has to have one file <algorithm>-<environment>.zip, but has {models or 'none'}.")
    return ALGOS[keys[0]].load(download(models[0]), env=env, device=device, **arguments)
