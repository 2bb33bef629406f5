"""The peak memory of a program, estimated from its jaxpr: nothing is compiled.

The equations of a jaxpr are followed in order. A value lives from the equation that computes it to
its last use. Reshaping, broadcasting and casting cost nothing, since compilers fuse them with the
reader; an elementwise result reuses the memory of an operand of its size that is no longer needed,
as do updates of slices and the carry of a loop. Other fusions, padding, layouts and reordering by
compilers are not modelled. docs/planning.md compares with compilers.
"""

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.extend import core as jex

_CALLS = {"checkpoint", "closed_call", "custom_jvp_call", "custom_vjp_call", "jit"}
_VIEWS = {
    "bitcast_convert_type",
    "broadcast_in_dim",
    "convert_element_type",
    "expand_dims",
    "optimization_barrier",
    "random_unwrap",
    "random_wrap",
    "reshape",
    "sharding_constraint",
    "slice",
    "split",
    "squeeze",
    "stop_gradient",
    "transpose",
}
# Their results cannot reuse an operand's memory; XLA copies the memory that a branch writes to.
_FRESH = {"concatenate", "cond", "cumsum", "dot_general", "gather", "ragged_dot_general", "sort"}


def peak_bytes(jaxpr: jex.Jaxpr, donated: Sequence[bool] = ()) -> int:
    """The most bytes alive at once in a program on one device, besides its arguments.

    Results that do not reuse a `donated` argument's memory are included; empty: none is donated.
    """
    memory = _Memory()
    free = donated or [False] * len(jaxpr.invars)
    # The caller holds an argument that is not donated: it never becomes free.
    arguments = [
        _Buffer(_bytes(var.aval), holders=1 if is_donated else 2)
        for var, is_donated in zip(jaxpr.invars, free, strict=True)
    ]
    memory.run(jaxpr, arguments)
    return memory.peak


@dataclasses.dataclass(eq=False)
class _Buffer:
    """A piece of memory.

    Attributes:
        size: Bytes.
        holders: Number of values and of running equations that need it.
        counted: Whether the program allocated it; the caller allocated arguments.
    """

    size: int
    holders: int = 1
    counted: bool = False


class _Memory:
    """The bytes alive while a program runs, and the most so far."""

    def __init__(self) -> None:
        self.live = self.peak = 0

    def run(self, jaxpr: jex.Jaxpr, arguments: Sequence[_Buffer]) -> list[_Buffer]:
        """Runs a program: consumes one reference to each argument, returns one to each result."""
        last = {var: i for i, eqn in enumerate(jaxpr.eqns) for var in _variables(eqn.invars)}
        last |= dict.fromkeys(_variables(jaxpr.outvars), len(jaxpr.eqns))
        known: dict[Any, _Buffer] = {}

        def bind(variables: Sequence[jex.Var], buffers: Sequence[_Buffer]) -> None:
            for var, buffer in zip(variables, buffers, strict=True):
                if var in last:
                    known[var] = buffer
                else:
                    self._release(buffer)

        bind(jaxpr.invars, arguments)
        bind(jaxpr.constvars, [_Buffer(0) for _ in jaxpr.constvars])
        for i, eqn in enumerate(jaxpr.eqns):
            operands = [self._hold(known, atom) for atom in eqn.invars]
            for var in {var for var in _variables(eqn.invars) if last[var] == i}:
                self._release(known.pop(var))
            bind(eqn.outvars, self._step(eqn, operands))
        results = [self._hold(known, atom) for atom in jaxpr.outvars]
        for buffer in known.values():
            self._release(buffer)
        return results

    def _step(self, eqn: jex.JaxprEqn, operands: list[_Buffer]) -> list[_Buffer]:
        """Runs an equation: consumes one reference to each operand, returns one to each result."""
        name = eqn.primitive.name
        if name in _CALLS:
            return self.run(_programs(eqn)[0], operands)
        if name in _VIEWS:
            operands[0].holders += len(eqn.outvars)
            results = [operands[0]] * len(eqn.outvars)
        else:
            if name == "cond":  # a branch allocates its results
                self._reach(max(peak_bytes(branch) for branch in _programs(eqn)))
            holds = collections.Counter(operands)
            dying = [b for b, count in holds.items() if b.holders == count and name not in _FRESH]
            results = [self._result(_bytes(var.aval), dying) for var in eqn.outvars]
            self._reach(_peak_of_loop(eqn) if name in ("scan", "while") else 0)
        for buffer in operands:
            self._release(buffer)
        return results

    def _reach(self, inside: int) -> None:
        self.peak = max(self.peak, self.live + inside)

    def _result(self, size: int, dying: list[_Buffer]) -> _Buffer:
        """Memory for a result: reused from a dying operand of its size, or new."""
        for buffer in dying:
            if buffer.size == size:
                dying.remove(buffer)
                buffer.holders += 1
                return buffer
        self.live += size
        return _Buffer(size, counted=True)

    def _hold(self, known: dict[jex.Var, _Buffer], atom: Any) -> _Buffer:
        """Adds a holder to the memory of a variable, and returns it; literals take none."""
        if isinstance(atom, jex.Literal):
            return _Buffer(0)
        known[atom].holders += 1
        return known[atom]

    def _release(self, buffer: _Buffer) -> None:
        buffer.holders -= 1
        if buffer.counted and not buffer.holders:
            self.live -= buffer.size


def _peak_of_loop(eqn: jex.JaxprEqn) -> int:
    """The peak of a loop's body and condition, which may write to the loop's carry."""
    peaks = []
    for program in _programs(eqn):
        first = eqn.params.get("num_consts", len(program.invars) - len(eqn.outvars))
        carried = range(first, first + eqn.params.get("num_carry", len(eqn.outvars)))
        peaks.append(peak_bytes(program, [i in carried for i in range(len(program.invars))]))
    return max(peaks)


def _programs(eqn: jex.JaxprEqn) -> list[jex.Jaxpr]:
    """The programs that an equation runs."""
    programs = [getattr(x, "jaxpr", x) for x in jax.tree.leaves(list(eqn.params.values()))]
    return [x for x in programs if isinstance(x, jex.Jaxpr)]


def _variables(atoms: Sequence[Any]) -> list[jex.Var]:
    return [atom for atom in atoms if not isinstance(atom, jex.Literal)]


def _bytes(aval: Any) -> int:
    return math.prod(aval.shape) * aval.dtype.itemsize if hasattr(aval, "shape") else 0
