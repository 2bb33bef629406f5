"""The engine: what a request gets depends on nobody beside it, and on nothing that was compiled."""

import dataclasses
import queue
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from t3jax import guidance, pooling
from t3jax.head import head_scores
from t3jax.refinements import combine_heads
from t3jax.sampling import Sampler, SamplingOptions
from t3jax.serving import programs, stack, state
from t3jax.serving.engine import Engine
from t3jax.serving.messages import EngineOptions, QueueFull, Request
from t3jax.sharding import make_mesh

LM = tiny.make_lm()
HEAD = tiny.make_head(LM)
OTHER = tiny.make_head(LM, rank=4, seed=2)
OPTIONS = EngineOptions(rows=3, chunk=4, piece=32, max_length=96, queue=8, heads=3, rank=8)
T, S = 1.5, 1.0


@pytest.fixture(scope="module")
def engine():
    engine = Engine(LM, OPTIONS, base_temperature=T, guidance_scale=S)
    engine.install("head", HEAD)
    engine.start()
    yield engine
    engine.stop()


def answer(engine, *requests):
    """All events of each request."""
    events = [[] for _ in requests]
    arrived = queue.Queue()
    engine.submit(requests, lambda i, event: arrived.put((i, event)))
    left = len(requests)
    while left:
        i, event = arrived.get(timeout=120)
        events[i].append(event)
        left -= event.finish is not None
    return events


def tokens_of(events):
    return [token for event in events for token in event.tokens]


def make_requests():
    random = np.random.default_rng(0)
    fields = [
        {"temperature": 0.0},
        {"temperature": 1.0, "top_p": 0.9, "seed": 3},
        {"temperature": 0.7, "top_k": 5, "seed": 2**33},
        {"temperature": 2.0, "min_p": 0.1, "repetition_penalty": 1.3, "seed": 7},
        {"temperature": 1.0, "seed": 1},
    ]
    lengths = (5, 40, 70, 9, 33)
    return [
        Request(
            random.integers(3, LM.vocab_size, length).astype(np.int32),
            SamplingOptions(max_new_tokens=18, **own),
        )
        for length, own in zip(lengths, fields, strict=True)
    ]


def test_a_request_gets_the_same_whoever_is_beside_it(engine):
    requests = make_requests()
    alone = [answer(engine, request)[0] for request in requests]
    together = answer(engine, *requests)
    for one, other in zip(alone, together, strict=True):
        assert tokens_of(one) == tokens_of(other)
        assert [x for e in one for x in e.scores.chosen] == [
            x for e in other for x in e.scores.chosen
        ]


def test_tokens_and_text_are_those_of_the_sampler(engine):
    sampler = Sampler(LM, HEAD, base_temperature=T, guidance_scale=S)
    requests = make_requests()
    for request, events in zip(requests, answer(engine, *requests), strict=True):
        (sample,) = sampler.generate([request.prompt], request.options, logprobs=True)
        assert tokens_of(events) == sample.tokens
        assert "".join(event.text for event in events) == sample.text
        np.testing.assert_allclose(
            [x for event in events for x in event.scores.chosen], sample.guided_logprobs, atol=1e-5
        )
        np.testing.assert_allclose(
            [x for event in events for x in event.scores.base], sample.base_logprobs, atol=1e-5
        )


def test_a_prompt_is_scored_under_the_served_distribution(engine):
    prompt = make_requests()[2].prompt  # three pieces
    (events,) = answer(
        engine, Request(prompt, SamplingOptions(max_new_tokens=1), scores_prompt=True, likeliest=2)
    )
    hidden, _ = LM.apply(LM.params, jnp.asarray(prompt)[None])
    logits = LM.unembed(LM.params, hidden)[0, :-1]
    mean = pooling.causal_mean(hidden, jnp.ones((1, len(prompt)), bool))[0, :-1]
    scores = head_scores(HEAD.params, mean, HEAD.config.activation)
    served = jax.nn.log_softmax(guidance.guided_logits(logits, scores, T, S), axis=-1)
    expected = np.take_along_axis(np.asarray(served), prompt[1:, None], axis=-1)[:, 0]
    found = events[0].prompt_scores
    np.testing.assert_allclose(found.chosen, expected, atol=1e-5)
    likeliest = np.argsort(-np.asarray(served), axis=-1)[:, :2]
    assert [[id for id, _ in place] for place in found.likeliest] == likeliest.tolist()


def test_answers_end_where_they_should(engine):
    request = make_requests()[4]
    ((*_, last),) = answer(engine, request)
    whole = tokens_of(answer(engine, request)[0])
    assert last.finish == "length"
    assert len(whole) == 18
    stopping = SamplingOptions(max_new_tokens=18, temperature=1.0, seed=1, stop_ids=(whole[6],))
    ((*events,),) = answer(engine, Request(request.prompt, stopping))
    assert tokens_of(events) == whole[: whole.index(whole[6]) + 1]
    assert events[-1].finish == "stop"
    text = LM.tokenizer.decode(whole, skip_special_tokens=True)
    stop = text[6:8]
    options = SamplingOptions(max_new_tokens=18, temperature=1.0, seed=1, stop=(stop,))
    ((*events,),) = answer(engine, Request(request.prompt, options))
    assert "".join(event.text for event in events) == text[: text.index(stop)]
    assert events[-1].finish == "stop"


def test_heads_come_and_go_without_compiling(engine):
    request = make_requests()[1]
    first = tokens_of(answer(engine, request)[0])
    compiled = [
        program._cache_size()
        for program in (programs.read_piece, programs.choose_first, programs.decode, state.join)
    ]
    engine.install("other", OTHER)
    both = Sampler(LM, [HEAD, OTHER], base_temperature=T, guidance_scale=S)
    assert (
        tokens_of(answer(engine, request)[0])
        == both.generate([request.prompt], request.options)[0].tokens
    )
    engine.activate("other", False)
    assert tokens_of(answer(engine, request)[0]) == first
    base = Sampler(LM).generate([request.prompt], request.options)[0].tokens
    without = Request(request.prompt, request.options, heads=())
    assert tokens_of(answer(engine, without)[0]) == base != first
    engine.remove("other")
    assert engine.head_names == ("head",)
    assert tokens_of(answer(engine, request)[0]) == first
    assert compiled == [
        program._cache_size()
        for program in (programs.read_piece, programs.choose_first, programs.decode, state.join)
    ]


def test_a_head_turned_on_holds_for_answers_under_way(engine):
    engine.install("other", OTHER, active=False)
    request = Request(make_requests()[0].prompt, SamplingOptions(max_new_tokens=60))
    begun, arrived = threading.Event(), queue.Queue()

    def collect(_, event):
        arrived.put(event)
        begun.set()

    before = tokens_of(answer(engine, request)[0])
    engine.submit([request], collect)
    begun.wait(60)
    engine.activate("other", True)
    events = []
    while not events or events[-1].finish is None:
        events.append(arrived.get(timeout=60))
    engine.remove("other")
    after = tokens_of(events)
    assert after[0] == before[0]
    assert after != before


def test_the_queue_is_bounded_and_a_cancelled_request_leaves_its_row(engine):
    long = Request(make_requests()[0].prompt, SamplingOptions(max_new_tokens=80))
    finished = queue.Queue()
    tickets = engine.submit(
        [long] * 8, lambda _, event: event.finish and finished.put(event.finish)
    )
    with pytest.raises(QueueFull):
        engine.submit([long] * 8, lambda *_: None)
    engine.cancel(tickets)
    assert {finished.get(timeout=60) for _ in range(8)} == {"cancelled"}
    assert engine.waiting == engine.running == 0
    assert tokens_of(answer(engine, make_requests()[0])[0])


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (Request(np.zeros(0, np.int32), SamplingOptions()), "prompt: it is empty"),
        (Request(np.ones(90, np.int32), SamplingOptions(max_new_tokens=10)), "at most 6"),
        (Request(np.full(3, 999, np.int32), SamplingOptions(max_new_tokens=1)), "token ids"),
        (Request(np.ones(3, np.int32), SamplingOptions(10), heads=("none",)), "heads: unknown"),
        (Request(np.ones(3, np.int32), SamplingOptions(10, stop_ids=(300,))), "stop_token_ids"),
    ],
)
def test_what_cannot_be_answered_is_refused_before_it_waits(engine, request_, error):
    with pytest.raises(ValueError, match=error):
        engine.submit([request_], lambda *_: None)


def test_a_broken_head_fails_its_answers_and_the_engine_goes_on(engine):
    params = jax.tree.map(lambda x: np.full(x.shape, np.nan, np.float32), OTHER.params)
    engine.install("broken", dataclasses.replace(OTHER, params=params), active=False)
    requests = make_requests()[:2]
    broken = Request(requests[0].prompt, requests[0].options, heads=("broken",))
    (bad,), good = answer(engine, broken, requests[1])
    assert bad.finish == "error"
    assert "head's scores" in bad.error
    assert good[-1].finish == "length"
    engine.remove("broken")


def test_a_request_whose_reading_cannot_begin_is_answered_at_once(engine, monkeypatch):
    def fail(length):
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(engine._device, "begin", fail)
        ((event,),) = answer(engine, make_requests()[0])
    assert (event.finish, event.error) == ("error", "MemoryError: no room")
    assert tokens_of(answer(engine, make_requests()[0])[0])


def test_a_head_that_does_not_fit_is_refused(engine):
    with pytest.raises(ValueError, match="rank 16, and the server has room for 8"):
        engine.install("big", tiny.make_head(LM, rank=16))
    for i in range(2):
        engine.install(f"more{i}", OTHER, active=False)
    with pytest.raises(ValueError, match="all 3 places"):
        engine.install("more2", OTHER, active=False)
    engine.remove("more0")
    engine.remove("more1")


@pytest.mark.parametrize("features", ["mean", "last", "mean+last"])
def test_the_stack_scores_as_the_heads_do(features):
    heads = [
        tiny.make_head(LM, rank=rank, seed=seed, features=features, activation=act, bias=bias)
        for rank, seed, act, bias in ((8, 1, "identity", False), (3, 2, "gelu", True))
    ]
    places = stack.make_stack(3, LM.hidden_size, LM.vocab_size, 8, LM.mesh)
    for i, head in enumerate(heads):
        places = stack.put(places, i + 1, head, LM.mesh)
    mean, last = jax.random.normal(jax.random.key(0), (2, 4, LM.hidden_size))
    read = pooling.prefix_features(mean, last, stack.FEATURES_READ)
    single = [
        head_scores(h.params, pooling.prefix_features(mean, last, features), h.config.activation)
        + h.prior_shift
        for h in heads
    ]
    on = jnp.asarray(stack.on_mask([[1], [2], [1, 2], []], 3))
    found, hiddens = stack.combined_scores(places, read, on)
    both = combine_heads(single)
    expected = [single[0][0], single[1][1], both[2], np.full(LM.vocab_size, 1e30)]
    np.testing.assert_allclose(found, np.stack(expected), rtol=1e-4, atol=1e-4)
    token = jnp.asarray([5, 6, 7, 8])
    blamed = 1 + int(single[1][2, 7] < single[0][2, 7])
    assert stack.blame(places, hiddens, on, token).tolist() == [1, 2, blamed, -1]


def test_a_split_model_answers_as_the_sampler_does_there():
    mesh = make_mesh((1, 1, 2), jax.devices()[:2])
    lm = tiny.make_lm(mesh=mesh)
    split = Engine(lm, OPTIONS, base_temperature=T, guidance_scale=S)
    split.install("head", tiny.make_head(lm))
    split.start()
    request = make_requests()[1]
    (events,) = answer(split, request)
    split.stop()
    sampler = Sampler(lm, tiny.make_head(lm), base_temperature=T, guidance_scale=S)
    assert tokens_of(events) == sampler.generate([request.prompt], request.options)[0].tokens


def test_a_mesh_that_splits_rows_is_refused():
    lm = tiny.make_lm(mesh=make_mesh((2, 1, 1), jax.devices()[:2]))
    with pytest.raises(ValueError, match=r"splits the model and not the rows"):
        Engine(lm, OPTIONS)
