"""The fields of a body, one by one: each is read or refused by name."""

from collections.abc import Mapping, Sequence
from typing import Any

from t3jax.json_files import parse_json
from t3jax.serving.errors import KINDS, BadRequest, describe

Number = int | float

# Fields of the API that are not supported: they are accepted at these values, which do nothing.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "frequency_penalty": (0, 0.0),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "presence_penalty": (0, 0.0),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
}


def read_object(content: bytes) -> dict[str, object]:
    """Reads the JSON object of a body; raises a `BadRequest`."""
    try:
        value = parse_json(content, "the body")
    except ValueError as error:
        raise BadRequest(str(error)) from None
    if not isinstance(value, dict):
        raise BadRequest(f"the body must be a JSON object, got {describe(value)}")
    return value


class Fields:
    """The fields of a body, with their types."""

    def __init__(self, body: Mapping[str, object], known: Sequence[str], within: str = ""):
        """Checks that all fields are known, or fields of the API at a value that does nothing.

        `within` is the field whose value the object is, for errors. A `BadRequest` names another
        field; all methods raise one for a wrong value.
        """
        self.body = body
        self.within = f"{within}." if within else ""
        for name, value in body.items():
            if name in known or value is None:
                continue
            if within or name not in NEUTRAL:
                raise BadRequest(
                    f"unknown field {self.within}{name}; known: {', '.join(sorted(known))}",
                    within or name,
                )
            if (type(value), value) not in [(type(neutral), neutral) for neutral in NEUTRAL[name]]:
                raise BadRequest(f"{name} is not supported; leave it out", name)

    def take(self, name: str, kind: type | tuple[type, ...], otherwise: object = None) -> Any:
        """A value of one of the types; `otherwise` if it is missing or null."""
        value = self.body.get(name)
        if value is None:
            return otherwise
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if type(value) not in kinds:
            wider = {float} & set(kinds)  # a whole number is a number
            expected = " or ".join(KINDS[accepted] for accepted in wider or kinds)
            raise BadRequest(f"{self.within}{name} must be {expected}, got {describe(value)}", name)
        return value

    def whole(self, name: str, otherwise: int | None, low: int, high: int) -> Any:
        """A whole number in a range."""
        return self._within(name, self.take(name, int), otherwise, low, high)

    def number(self, name: str, otherwise: Number | None, low: Number, high: Number) -> Any:
        """A number in a range, as a float."""
        value = self._within(name, self.take(name, (int, float)), otherwise, low, high)
        return None if value is None else float(value)

    def _within(
        self,
        name: str,
        value: Number | None,
        otherwise: Number | None,
        low: Number,
        high: Number,
    ) -> Number | None:
        if value is None:
            return otherwise
        if not low <= value <= high:  # NaN too
            raise BadRequest(f"{name} must be in [{low}, {high}], got {describe(value)}", name)
        return value
