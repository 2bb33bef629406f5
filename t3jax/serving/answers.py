"""Answers of the OpenAI API, from events of the engine to JSON.

With the server key each token of a chat has three fields more: `base_logprob`, its log-probability
under the base model; `retain`, the P(retain) that the heads give it; and `changed`, whether they
changed the likeliest candidate at its place.
"""

import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from t3jax.serving.messages import Event, Scores
from t3jax.serving.protocol import Ask, Reader


class Writer:
    """Writes the answers to one body."""

    def __init__(self, ask: Ask, reader: Reader, model: str):
        self.ask = ask
        self.tokenizer = reader.lm.tokenizer
        self.id = f"{'chatcmpl' if ask.chat else 'cmpl'}-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.model = model
        self.counts = [0] * len(ask.requests)
        self._offsets = [0] * len(ask.requests)

    def whole(self, events: Sequence[Sequence[Event]]) -> dict[str, object]:
        """The body of a finished answer."""
        choices = []
        for i, answer in enumerate(events):
            text = "".join(event.text for event in answer)
            choice: dict[str, Any] = {"index": i, "finish_reason": answer[-1].finish}
            if self.ask.chat:
                choice["message"] = {"role": "assistant", "content": text, "refusal": None}
                content = [entry for event in answer for entry in self._chat_logprobs(event)]
                choice["logprobs"] = {"content": content} if self.ask.logprobs else None
            else:
                prompt = self._decode_prompt(i) if self.ask.echo else ""
                choice["text"] = prompt + ("" if self.ask.no_answer else text)
                parts = [self._prompt_logprobs(i, answer[0])] if self.ask.echo else []
                if not self.ask.no_answer:
                    parts += [self._logprobs(i, event) for event in answer]
                choice["logprobs"] = _join(parts) if self.ask.logprobs else None
            self.counts[i] = 0 if self.ask.no_answer else sum(len(event.tokens) for event in answer)
            choices.append(choice)
        kind = "chat.completion" if self.ask.chat else "text_completion"
        return self._body(kind, choices) | {"usage": self.usage}

    def first(self) -> list[dict[str, object]]:
        """The first chunks of a chat's stream."""
        if not self.ask.chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [
            self._chunk([{"index": i, "delta": delta, "finish_reason": None, "logprobs": None}])
            for i in range(len(self.ask.requests))
        ]

    def piece(self, i: int, event: Event) -> dict[str, object] | None:
        """A piece of a stream; None if it is empty."""
        self.counts[i] += 0 if self.ask.no_answer else len(event.tokens)
        choice: dict[str, Any] = {"index": i, "finish_reason": event.finish}
        first = event.prompt_scores is not None or self.counts[i] == len(event.tokens)
        if self.ask.chat:
            choice["delta"] = {"content": event.text} if event.text else {}
            entries = self._chat_logprobs(event)
            choice["logprobs"] = {"content": entries} if self.ask.logprobs and entries else None
            empty = not event.text and not (self.ask.logprobs and entries)
        else:
            echoes = self.ask.echo and first
            text = "" if self.ask.no_answer else event.text
            choice["text"] = (self._decode_prompt(i) if echoes else "") + text
            parts = [self._prompt_logprobs(i, event)] if echoes else []
            if not self.ask.no_answer:
                parts.append(self._logprobs(i, event))
            joined = _join(parts)
            choice["logprobs"] = joined if self.ask.logprobs and joined["tokens"] else None
            empty = not choice["text"] and choice["logprobs"] is None
        return None if empty and event.finish is None else self._chunk([choice])

    def last(self) -> list[dict[str, object]]:
        """The last chunks of a stream."""
        if not self.ask.include_usage:
            return []
        return [self._chunk([]) | {"usage": self.usage}]

    @property
    def usage(self) -> dict[str, int]:
        """Numbers of tokens."""
        prompt, answer = self.ask.prompt_tokens, sum(self.counts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": answer,
            "total_tokens": prompt + answer,
        }

    def _chunk(self, choices: Sequence[Mapping[str, object]]) -> dict[str, object]:
        kind = "chat.completion.chunk" if self.ask.chat else "text_completion"
        return self._body(kind, choices)

    def _body(self, kind: str, choices: Sequence[Mapping[str, object]]) -> dict[str, object]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def _decode_prompt(self, i: int) -> str:
        ids = self.ask.requests[i].prompt.tolist()
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _decode_token(self, id: int) -> str:
        """A token as a text; a part of a character as its name in the vocabulary."""
        text = str(self.tokenizer.decode([id], skip_special_tokens=False))
        return str(self.tokenizer.convert_ids_to_tokens(id)) if "\ufffd" in text else text

    def _prompt_logprobs(self, i: int, event: Event) -> dict[str, list]:
        """The log-probabilities of a prompt: its first token has none."""
        scores = event.prompt_scores
        if scores is None:
            return _join([])
        ids = self.ask.requests[i].prompt.tolist()
        likeliest = scores.likeliest or [[]] * len(scores.chosen)
        return self._columns(i, ids, [None, *scores.chosen], [None, *likeliest])

    def _logprobs(self, i: int, event: Event) -> dict[str, list]:
        if event.scores is None:
            return _join([])
        likeliest = event.scores.likeliest or [[]] * len(event.tokens)
        return self._columns(i, event.tokens, event.scores.chosen, likeliest)

    def _columns(
        self,
        i: int,
        ids: Sequence[int],
        chosen: Sequence[float | None],
        likeliest: Sequence[Sequence[tuple[int, float]] | None],
    ) -> dict[str, list]:
        tokens = [self._decode_token(id) for id in ids]
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[i])
            self._offsets[i] += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": list(chosen),
            "top_logprobs": [None if place is None else self._top(place) for place in likeliest],
            "text_offset": offsets,
        }

    def _top(self, place: Sequence[tuple[int, float]]) -> dict[str, float]:
        """Log-probabilities by the tokens' texts; of tokens with equal text, the likeliest's."""
        top: dict[str, float] = {}
        for id, logprob in place:
            top.setdefault(self._decode_token(id), logprob)
        return top

    def _chat_logprobs(self, event: Event) -> list[dict[str, object]]:
        scores = event.scores or Scores([], [], [], [])
        likeliest = scores.likeliest or [[]] * len(event.tokens)
        entries = [
            self._entry(id, logprob) | {"top_logprobs": [self._entry(*pair) for pair in place]}
            for id, logprob, place in zip(event.tokens, scores.chosen, likeliest, strict=True)
        ]
        if self.ask.shows_tilt:
            tilts = zip(scores.base, scores.retain, event.changed, strict=True)
            for entry, (base, retain, changed) in zip(entries, tilts, strict=True):
                entry |= {"base_logprob": base, "retain": retain, "changed": changed}
        return entries

    def _entry(self, id: int, logprob: float) -> dict[str, object]:
        text = self._decode_token(id)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def _join(parts: Sequence[dict[str, list]]) -> dict[str, list]:
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    return {name: [value for part in parts for value in part[name]] for name in names}
