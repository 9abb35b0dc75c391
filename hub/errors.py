"""What can be wrong with a saved agent."""


class SafeFormatError(ValueError):
    """
    The agent cannot be saved in the safe format, or its files cannot be loaded: damaged, incomplete, contradictory, or naming
    something that is not on the allow-list. The message says what is wrong and what to do. Nothing has been run that the
    files asked for. Commands leave with ``exit_status``.
    """

    exit_status = 81


class HubError(RuntimeError):
    """Something that the Hub refuses, or that keeps it from being reached. Commands leave with ``exit_status``."""

    exit_status = 80
