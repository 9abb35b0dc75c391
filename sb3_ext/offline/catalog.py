"""Where data sets are found: Minari's local folder and those shipped with this package."""

import os
from pathlib import Path

from sb3_ext.offline.errors import CorruptDatasetError, DatasetNotFoundError

SHIPPED_ROOT = Path(__file__).parent / "datasets"
METADATA = Path("data", "metadata.json")
# Of the address of a data set of the Hugging Face Hub
HUB = "hf://"


def local_root() -> Path:
    """
    :return: the folder in which Minari keeps data sets: ``$MINARI_DATASETS_PATH`` or ``~/.minari/datasets``
    """
    # minari.storage.get_dataset_path would also create the folder, which fails in a read-only home
    return Path(os.environ.get("MINARI_DATASETS_PATH") or Path.home() / ".minari" / "datasets")


def list_ids(root: Path) -> list[str]:
    """
    :param root: a folder of Minari data sets
    :return: the ids of the data sets in it, sorted
    """
    folders = (path.parent.parent.relative_to(root) for path in root.rglob(str(METADATA)))
    return sorted(folder.as_posix() for folder in folders if not any(part.startswith(".") for part in folder.parts))


def find_folder(source: str | Path, env_id: str | None) -> Path:
    """
    :param source: id, or path of a data set's folder (or of the ``data`` folder in it), or ``hf://organization/name`` for
        one of the Hugging Face Hub
    :param env_id: environment for which the message says how to make a data set
    :return: the folder that contains ``metadata.json``
    :raises DatasetNotFoundError: when there is none
    :raises CorruptDatasetError: when the folder lacks its metadata
    """
    if str(source).startswith(HUB):
        return _download(str(source))
    if str(source):
        source = Path(source).expanduser()
        for root in (Path(), local_root(), SHIPPED_ROOT):
            for data in (root / source / METADATA.parent, root / source):
                if (data / METADATA.name).is_file():
                    return data
                if (data / "main_data.hdf5").is_file():
                    raise CorruptDatasetError(f"The data set {data} has no {METADATA.name}: it is incomplete. Make it again.")
    raise not_found(source, env_id)


def _download(source: str) -> Path:
    """:return: the folder in the Hub's cache, into which files are downloaded that are not there yet"""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(source.removeprefix(HUB), repo_type="dataset", allow_patterns=f"{METADATA.parent}/*")
    except (HFValidationError, HTTPError, LocalEntryNotFoundError) as error:
        raise DatasetNotFoundError(
            f"The data set {source} cannot be downloaded: {error}\n"
            "If it is private, the Hub needs to know who you are: run `hf auth login`, or set HF_TOKEN."
        ) from error
    data = Path(folder, METADATA.parent)
    if not (data / METADATA.name).is_file():
        raise CorruptDatasetError(f"{source} is no Minari data set: it has no file {METADATA.as_posix()}.")
    return data


def not_found(source: object, env_id: str | None) -> DatasetNotFoundError:
    """
    :param source: what was asked for; None for nothing
    :param env_id: environment for which the message says how to make a data set
    :return: the error, listing what exists and the commands that make a data set
    """
    asked = "No data set was given."
    if source is not None and Path(str(source)).exists():
        asked = f"{source} is no data set: give an id, a folder with {METADATA.as_posix()} in it, or a replay buffer's .pkl."
    elif source is not None:
        asked = f"There is no data set with the id '{source}', and no folder or file of this name."
    local, shipped = list_ids(local_root()), list_ids(SHIPPED_ROOT)
    return DatasetNotFoundError(
        f"{asked}\n"
        f"Data sets in {local_root()}: {', '.join(local) or 'none'}\n"
        f"Data sets that come with sb3-ext: {', '.join(shipped) or 'none'}\n"
        f"To make one:\n{making_commands(env_id or 'CartPole-v1')}"
    )


def making_commands(env_id: str) -> str:
    """
    :param env_id: id of an environment
    :return: the commands that train an agent, record its episodes, and train on them
    """
    dataset_id = f"{env_id.split(':')[-1]}/ppo-v0"
    return (
        f"  python -m rl_zoo3.train --algo ppo --env {env_id} -f logs\n"
        f"  python -m sb3_ext.offline.collect --algo ppo --env {env_id} -f logs --n-episodes 500 "
        f"--dataset-id {dataset_id}\n"
        f"and then to train on it:\n"
        f"  python -m rl_zoo3.train --algo bcq --env {env_id} -params dataset:\"'{dataset_id}'\""
    )
