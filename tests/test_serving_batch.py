"""Few rows for few answers, beginnings that are read once: no bit of an answer shows either."""

import collections

import numpy as np
import pytest
import tiny
from test_serving_engine import answer, tokens_of

from t3jax.sampling import SamplingOptions
from t3jax.serving.engine import Engine
from t3jax.serving.messages import EngineOptions, Request, split_prompt
from t3jax.serving.prefixes import Prefixes

LM = tiny.make_lm()
OPTIONS = EngineOptions(rows=12, chunk=4, piece=32, max_length=96, queue=20, heads=1, rank=8)
SHARED = np.random.default_rng(0).integers(3, LM.vocab_size, 64).astype(np.int32)


def make_engine(prefixes=4096):
    options = EngineOptions(**{**vars(OPTIONS), "prefixes": prefixes})
    engine = Engine(LM, options, base_temperature=1.5)
    engine.install("head", tiny.make_head(LM))
    engine.start()
    return engine


@pytest.fixture(scope="module")
def engine():
    engine = make_engine(prefixes=0)
    yield engine
    engine.stop()


def make_request(seed, prompt=SHARED[:9], length=16, **fields):
    options = SamplingOptions(max_new_tokens=length, temperature=1.0, seed=seed)
    return Request(prompt, options, **fields)


def numbers_of(events):
    return tokens_of(events), [x for event in events for x in event.scores.chosen]


def test_few_answers_are_decoded_with_few_rows_and_the_same_bits(engine):
    requests = [make_request(i, length=80 if i == 11 else 30 + i) for i in range(12)]
    widths = collections.Counter()
    decode = engine._device.decode

    def count_and_decode(asked):
        widths[len(asked), sum(each is not None for each in asked)] += 1
        return decode(asked)

    engine._device.decode = count_and_decode
    together = answer(engine, *requests)
    assert {rows for rows, at_work in widths if at_work > 8} == {12}
    assert widths[8, 1]  # the last one goes on with few rows, in another place than it began
    for i in (0, 5, 11):
        widths.clear()
        (alone,) = answer(engine, requests[i])
        assert set(widths) == {(8, 1)}
        assert numbers_of(alone) == numbers_of(together[i])
    engine._device.decode = decode


def test_where_few_rows_give_other_bits_all_are_decoded(engine, monkeypatch):
    monkeypatch.setattr(np, "array_equal", lambda *_: False)
    monkeypatch.setattr(engine._device, "_same_bits", {})
    assert engine.call(lambda: engine._device.fit([], 1, 20)) == {}
    assert engine._device.rows == 12


def test_a_beginning_is_read_once_and_no_bit_changes(engine):
    prompts = [np.concatenate([SHARED, SHARED[i : i + 5 + i]]) for i in range(4)]
    requests = [make_request(7, prompt) for prompt in (*prompts, prompts[0], prompts[3], SHARED)]
    remembering = make_engine()
    stats = remembering.stats
    expected_reads = [69, 70, 7, 8, 5, 8, 0]  # kept when it came twice; the whole of one as well
    for request, expected in zip(requests, expected_reads, strict=True):
        before = stats.prompt_tokens, stats.shared_tokens
        (found,) = answer(remembering, request)
        assert stats.prompt_tokens - before[0] == expected
        assert stats.shared_tokens - before[1] == len(request.prompt) - expected
        assert numbers_of(found) == numbers_of(answer(engine, request)[0])
    scored = make_request(7, prompts[0], scores_prompt=True)
    ((first, *_),) = answer(remembering, scored)
    assert len(first.prompt_scores.chosen) == len(prompts[0]) - 1
    remembering.stop()


def test_beginnings_that_are_kept_are_bounded_and_the_last_used_stay():
    dropped = []
    prefixes = Prefixes(300, dropped.append)
    first, second, third = (np.asarray([i], np.int32) for i in range(3))

    def come(tokens, slots):
        return [prefixes.add(tokens, slots) for _ in range(2)]

    assert prefixes.find(first) is None
    nothing, name = come(first, 128)
    assert nothing is None
    assert prefixes.find(first) == name
    _, other = come(second, 128)
    assert prefixes.find(first) == name  # used after the second
    assert come(third, 128)[1]
    assert dropped == [other]
    assert prefixes.find(first) == name
    assert come(np.asarray([9], np.int32), 512) == [None, None]


def test_prompts_that_begin_alike_have_the_same_pieces_up_to_there():
    options = EngineOptions(piece=64)
    assert split_prompt(150, options) == [(0, 64), (64, 64), (128, 32)]
    assert split_prompt(128, options) == [(0, 64), (64, 64)]
    assert split_prompt(30, options) == [(0, 32)]
