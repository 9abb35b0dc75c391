"""
What can be wrong with offline data, one class per kind of mistake.

The commands (``python -m rl_zoo3.train --algo ...`` and ``python -m sb3_ext.offline.collect``) print the message without
a traceback and leave with the class's ``exit_status``.
"""


class DatasetError(ValueError):
    """
    Base class; a ``ValueError``, so that an Optuna trial of the zoo is pruned instead of ending the study.

    ``exit_status`` is the status with which the commands leave: 64 to 79, different for each class.
    """

    exit_status = 64


class DatasetNotFoundError(DatasetError):
    """No data set has this id, and no folder or file this name."""

    exit_status = 65


class CorruptDatasetError(DatasetError):
    """The files are truncated, damaged, or contradict each other."""

    exit_status = 66


class NonFiniteDataError(DatasetError):
    """Observations, actions or rewards contain NaN or infinite values."""

    exit_status = 67


class ActionRangeError(DatasetError):
    """Actions lie outside the action space."""

    exit_status = 68


class SpaceMismatchError(DatasetError):
    """The spaces of the data are not those of the environment."""

    exit_status = 69


class ActionTypeError(DatasetError):
    """Discrete actions for a continuous environment, or the reverse."""

    exit_status = 70


class EmptyDatasetError(DatasetError):
    """The data set holds no transition."""

    exit_status = 71


class PickleConsentError(DatasetError):
    """The file is a pickle, and the caller has not agreed to run what it contains."""

    exit_status = 72


class UnsupportedDataError(DatasetError):
    """The source or its spaces are of a kind that cannot be read as transitions."""

    exit_status = 73


class NormalizedEnvError(DatasetError):
    """The training environment normalises observations, while the data are raw."""

    exit_status = 74


class DatasetExistsError(DatasetError):
    """A data set of this name is there already."""

    exit_status = 75


class DiskFullError(DatasetError):
    """There is no room left for the data."""

    exit_status = 76


class ResumeError(DatasetError):
    """An unfinished collection of this name was started with other settings."""

    exit_status = 77


class AgentError(DatasetError):
    """The agent that should collect the data cannot be loaded or used."""

    exit_status = 78
