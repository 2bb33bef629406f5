"""The engine's options, inputs and outputs."""

import collections
import dataclasses
from collections.abc import Callable
from typing import Annotated

import numpy as np

from t3jax.ranges import COUNT, RANK, Numbers, Ranged, whole
from t3jax.sampling.sampler import SamplingOptions

MOST_STOP_IDS = 8  # of a request, beside the model's own
SHORT_PIECE = 32  # tokens


class QueueFull(Exception):
    """The queue of requests is full."""


class FieldError(ValueError):
    """A field of a request, `param`, that is refused."""

    def __init__(self, param: str, message: str):
        super().__init__(f"{param}: {message}")
        self.param = param


@dataclasses.dataclass(frozen=True)
class ServerOptions(Ranged):
    """Options of the server towards its clients.

    Attributes:
        host: Address that it listens on.
        port: Port; 0 takes a free one.
        model_name: Name of the model for clients; None: its folder or hub id.
        timeout: Seconds after which an answer is given up.
        max_body: Largest body, bytes.
        max_rows_body: Largest body with rows to forget, bytes.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, whole(0, 2**16 - 1)] = 8000
    model_name: str | None = None
    timeout: Annotated[float, Numbers(0, 10**6, above=True)] = 300.0
    max_body: Annotated[int, whole(2**10, 2**31)] = 2**20
    max_rows_body: Annotated[int, whole(2**10, 2**31)] = 2**25


@dataclasses.dataclass(frozen=True)
class EngineOptions(Ranged):
    """Limits and sizes of an engine.

    Attributes:
        rows: Answers decoded together.
        chunk: Steps between two host syncs; answers do not depend on it, their pieces in a stream
            do.
        piece: Tokens of a prompt that are read at a time: 32 times a power of two.
        max_length: Longest prompt and answer together, tokens; None: the model's context, at most
            2,048.
        queue: Requests that may wait.
        heads: Places for heads.
        rank: Largest rank of a head.
        prefixes: Tokens in the cache of prefixes that prompts share; 0: no cache.
    """

    rows: Annotated[int, whole(1, 2**12)] = 16
    chunk: Annotated[int, whole(1, 2**10)] = 8
    piece: Annotated[int, whole(1, 2**14)] = 128
    max_length: Annotated[int | None, whole(2, 2**20)] = None
    queue: Annotated[int, COUNT] = 256
    heads: Annotated[int, whole(1, 2**8)] = 8
    rank: Annotated[int, RANK] = 200
    prefixes: Annotated[int, whole(0, 2**24)] = 4096

    def __post_init__(self):
        super().__post_init__()
        if self.piece not in (SHORT_PIECE << i for i in range(10)):
            raise ValueError(f"piece = {self.piece}: expected {SHORT_PIECE}, 64, 128, ...")


def piece_sizes(options: EngineOptions) -> list[int]:
    """Sizes of the programs that read a prompt, the smallest first."""
    return [SHORT_PIECE << i for i in range(10) if SHORT_PIECE << i <= options.piece]


def split_prompt(length: int, options: EngineOptions) -> list[tuple[int, int]]:
    """Starts and sizes of a prompt's pieces, from its length alone.

    So prompts with a common prefix have the same pieces up to the last whole one in it.
    """
    sizes = piece_sizes(options)
    pieces, start = [], 0
    while start < length:
        size = next((size for size in sizes if size >= length - start), sizes[-1])
        pieces.append((start, size))
        start += size
    return pieces


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """A prompt to answer.

    Attributes:
        prompt: Its token ids.
        options: How to draw the answer; `num_samples`, `logprobs` and `refusal` are ignored.
        sample: Index among the answers to the same prompt; with the seed, it makes the key.
        base_temperature: T; None takes the engine's.
        guidance_scale: s; None takes the engine's.
        heads: Names of the heads that are on; None: all active heads.
        scores_prompt: Whether to score the prompt's tokens.
        likeliest: Number of likeliest tokens returned for each token.
    """

    prompt: np.ndarray
    options: SamplingOptions
    sample: int = 0
    base_temperature: float | None = None
    guidance_scale: float | None = None
    heads: tuple[str, ...] | None = None
    scores_prompt: bool = False
    likeliest: int = 0


@dataclasses.dataclass(frozen=True)
class Scores:
    """Log-probabilities under the served distribution, nats.

    Attributes:
        chosen: Log-probability of each token.
        base: The same under the base model.
        retain: P(retain) of each token by the heads.
        likeliest: For each token the likeliest candidates and their log-probabilities; empty unless
            asked for.
    """

    chosen: list[float]
    base: list[float]
    retain: list[float]
    likeliest: list[list[tuple[int, float]]]


@dataclasses.dataclass(frozen=True)
class Event:
    """New text and new tokens of a request.

    Attributes:
        scores: Scores of the new tokens.
        prompt_scores: Scores of the prompt's tokens but the first, in the first event.
        finish: In the last event "stop", "length", "cancelled" or "error".
        error: Message of an error.
        changed: For each new token, whether the heads changed the likeliest candidate.
    """

    text: str = ""
    tokens: tuple[int, ...] = ()
    scores: Scores | None = None
    prompt_scores: Scores | None = None
    finish: str | None = None
    error: str | None = None
    changed: tuple[bool, ...] = ()


@dataclasses.dataclass(eq=False)
class Ticket:
    """A submitted request.

    `on_event` takes its events in the engine's thread; `arrived` is in seconds of `time.monotonic`;
    `cancelled` means that the client has given it up.
    """

    request: Request
    on_event: Callable[[Event], None]
    arrived: float
    cancelled: bool = False


@dataclasses.dataclass
class Stats:
    """Counts since the engine started.

    `prompt_tokens` were read, `shared_tokens` taken from the cache of prefixes. `changed_tokens`
    are, by head, chosen tokens whose likeliest candidate it changed; `finished` are requests by
    reason.
    """

    prompt_tokens: int = 0
    shared_tokens: int = 0
    answer_tokens: int = 0
    changed_tokens: collections.Counter[str] = dataclasses.field(
        default_factory=collections.Counter
    )
    finished: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
