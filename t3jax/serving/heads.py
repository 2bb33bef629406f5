"""The heads of a server: their places in the stack, and whether they are on."""

import dataclasses

from t3jax.head_io import Head, check_head_fits
from t3jax.lm.model import LM
from t3jax.serving.stack import Stack, check_shape, make_stack, put


@dataclasses.dataclass(eq=False)
class _Installed:
    """A head in a place of the stack."""

    place: int
    active: bool


class HeadSet:
    """Heads by name, in a stack with a fixed number of places."""

    def __init__(self, lm: LM, places: int, rank: int):
        self.stack: Stack = make_stack(places, lm.hidden_size, lm.vocab_size, rank, lm.mesh)
        self._lm = lm
        self._empty = self.stack[0]
        self._installed: dict[str, _Installed] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """All heads, active or not."""
        return tuple(self._installed)

    @property
    def active(self) -> tuple[str, ...]:
        """The heads that are on for every request without `heads` of its own."""
        return tuple(name for name, head in self._installed.items() if head.active)

    def places(self, names: tuple[str, ...] | None) -> list[int]:
        """The places of the named heads that are still installed; None: of the active heads."""
        chosen = self.active if names is None else names
        return [self._installed[name].place for name in chosen if name in self._installed]

    def name_of(self, place: int) -> str | None:
        """The head in a place; None if it is empty."""
        return next((name for name, head in self._installed.items() if head.place == place), None)

    def check(self, head: Head) -> None:
        """Raises a ValueError unless a head fits the model and the stack."""
        check_head_fits(head, self._lm)
        check_shape(self.stack, head.config)

    def install(self, name: str, head: Head, active: bool) -> None:
        """Adds a head, or replaces the one of this name; a ValueError if there is no free place."""
        used = {installed.place for installed in self._installed.values()}
        free = (i for i in range(len(self.stack)) if i not in used)
        place = self._installed[name].place if name in self._installed else next(free, None)
        if place is None:
            raise ValueError(
                f"all {len(self.stack)} places for heads are taken; revoke a request, or start the "
                "server with a larger --config.serve.heads"
            )
        self.stack = put(self.stack, place, head, self._lm.mesh)
        self._installed[name] = _Installed(place, active)

    def activate(self, name: str, active: bool) -> None:
        """Turns a head on or off."""
        self._installed[name].active = active

    def remove(self, name: str) -> None:
        """Removes a head."""
        place = self._installed.pop(name).place
        self.stack = (*self.stack[:place], self._empty, *self.stack[place + 1 :])
