"""From a script's config to the options that the library's functions take."""

import dataclasses
from typing import Any, TypeVar

T = TypeVar("T")


def from_config(options: type[T], config: Any, prefix: str = "", **values: Any) -> T:
    """Makes options of the fields of a config that have their names.

    Args:
        options: A dataclass, such as `SamplingOptions`.
        config: The settings of a script.
        prefix: What the config puts before the names.
        **values: Fields that the config has under another name, or not at all.

    Returns:
        The options. A field that is in neither keeps the dataclass's default.

    Raises:
        ValueError: If the dataclass refuses a value.
    """
    names = {field.name for field in dataclasses.fields(options)} - set(values)  # type: ignore[arg-type]
    found = {name: config[prefix + name] for name in names if prefix + name in config}
    # A list of a config file is a tuple in options, which are hashable.
    tuples = {name: tuple(value) for name, value in found.items() if isinstance(value, list)}
    return options(**found | tuples | values)
