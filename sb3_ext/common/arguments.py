"""Checks of constructor arguments."""


def check_range(arguments: object, low: float, high: float, *names: str) -> None:
    """
    :param arguments: What has the arguments for attributes
    :param low: Smallest value allowed
    :param high: Largest value allowed
    :param names: Of the arguments; those that are None are not compared
    :raises ValueError: if one is out of range, NaN, a schedule, or text
    """
    for name in names:
        value = getattr(arguments, name)
        if value is not None and (isinstance(value, str) or callable(value) or not low <= value <= high):
            allowed = f"at least {low}" if high == float("inf") else f"in [{low}, {high}]"
            hint = " YAML takes 1e-2 for text: write 0.01 or !!float 1e-2." if isinstance(value, str) else ""
            raise ValueError(f"{name} must be {allowed}, but got {value!r}.{hint}")
