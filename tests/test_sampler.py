import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import t3jax
from t3jax import Refinements
from t3jax.sampling import batch, cache, loop

QUESTIONS = ["Who wrote the book?", "Where was the author born?", "Why?"]
DRAWN = {"temperature": 1.0, "max_new_tokens": 20}


@pytest.fixture(scope="module")
def head(tiny_lm):
    config = t3jax.HeadConfig(tiny_lm.hidden_size, tiny_lm.vocab_size, rank=4)
    params = t3jax.init_head(jax.random.key(5), config)
    params["output"] = params["output"] * 20  # loud enough to change the text
    return t3jax.Head(config, params, base_temperature=2.5, guidance_scale=1.0, model="tiny")


@pytest.fixture(scope="module")
def endless(tiny_lm):
    """The tiny model without end-of-text, so that lengths are known."""
    return dataclasses.replace(tiny_lm, eos_ids=())


@pytest.fixture(scope="module")
def sampler(endless, head):
    return t3jax.Sampler(endless, head, chunk=8, batch_size=4)


def tokens(samples):
    return [sample.tokens for sample in samples]


def test_the_same_call_gives_the_same_answers_and_the_seed_matters(sampler):
    first = tokens(sampler.generate(QUESTIONS, **DRAWN))
    assert first == tokens(sampler.generate(QUESTIONS, **DRAWN))
    assert first != tokens(sampler.generate(QUESTIONS, **DRAWN, seed=1))
    assert all(len(row) == 20 for row in first)


def test_draws_depend_on_neither_chunk_size_nor_batch(sampler, endless, head):
    expected = tokens(sampler.generate(QUESTIONS, **DRAWN))
    other = t3jax.Sampler(endless, head, chunk=3, batch_size=1)
    assert tokens(other.generate(QUESTIONS, **DRAWN)) == expected


def test_a_cache_that_grows_changes_nothing(sampler, endless, head, monkeypatch):
    expected = tokens(sampler.generate(QUESTIONS, **DRAWN))
    grown = []

    def resize(program, state, shift, slots):
        grown.append((state.cache.positions.shape[1], int(shift), slots))
        return cache.resize(program, state, shift, slots)

    monkeypatch.setattr(batch, "resize", resize)
    monkeypatch.setattr(cache, "_SLOT_STEP", 8)
    other = t3jax.Sampler(endless, head, chunk=4, batch_size=4)
    assert tokens(other.generate(QUESTIONS, **DRAWN)) == expected
    # Prompts of up to 56 of 64 slots, then 1 + 20 rounded up to chunks: not by half, but to that.
    assert grown == [(72, 8, 85)]


@pytest.fixture(scope="module")
def uneven(tiny_lm):
    """A tenth of the vocabulary ends an answer: lengths differ much."""
    return dataclasses.replace(tiny_lm, eos_ids=tuple(range(0, tiny_lm.vocab_size, 10)))


def many_prompts(lm, count=64, longest=70):
    draw = np.random.default_rng(3)
    lengths = draw.integers(1, longest, count)
    return [draw.integers(0, lm.vocab_size, length).tolist() for length in lengths]


@pytest.mark.parametrize("cached", [True, False])
def test_rows_that_are_finished_take_the_next_prompts(uneven, head, monkeypatch, cached):
    lm = uneven
    if not cached:  # a model that reads the whole text anew is a cache of another kind

        def apply(params, tokens, positions, mask, _):
            return uneven.apply(params, tokens, positions, mask, None)

        lm = t3jax.make_lm(
            apply, lm.unembed, lm.params, max_position=lm.max_position, eos_ids=lm.eos_ids
        )
    prompts, options = many_prompts(lm), {"temperature": 1.0, "max_new_tokens": 40, "seed": 2}
    at_once = tokens(t3jax.Sampler(lm, head, batch_size=64, chunk=40).generate(prompts, **options))
    steps, moves = [], []

    def counted(program, weights, state, *arguments):
        steps.append(state.done.shape[0] * arguments[-1])
        return loop.decode_chunk(program, weights, state, *arguments)

    def compact(program, state, shift, slots):
        moves.append(int(shift))
        return cache.compact(program, state, shift, slots)

    monkeypatch.setattr(batch, "decode_chunk", counted)
    monkeypatch.setattr(batch, "compact", compact)
    monkeypatch.setattr(cache, "_SLOT_STEP", 8)
    found = tokens(t3jax.Sampler(lm, head, batch_size=8, chunk=2).generate(prompts, **options))
    assert found == at_once
    lengths = [len(answer) for answer in found]
    assert max(lengths) > 3 * np.mean(lengths)
    assert any(moves)
    # The first token of each came of its prompt. In batches of 8 as they stand, .6 were wasted.
    wasted = 1 - sum(length - 1 for length in lengths) / sum(steps)
    assert wasted < 0.3


def test_samples_of_a_prompt_differ_and_follow_one_another(sampler):
    several = tokens(sampler.generate(QUESTIONS, **DRAWN, num_samples=3))
    assert len(several) == 9
    assert len({tuple(row) for row in several}) == 9
    assert several[::3] == tokens(sampler.generate(QUESTIONS, **DRAWN))


def test_without_tempering_and_tilt_it_is_the_base_model(sampler, endless):
    base = t3jax.Sampler(endless)
    for options in ({"max_new_tokens": 20}, DRAWN):
        same = sampler.generate(QUESTIONS, base_temperature=1.0, guidance_scale=0.0, **options)
        assert tokens(same) == tokens(base.generate(QUESTIONS, **options))
        assert tokens(same) != tokens(sampler.generate(QUESTIONS, **options))


def test_changing_a_control_does_not_recompile(sampler):
    sampler.generate(QUESTIONS, max_new_tokens=20)
    compiled = loop.prefill._cache_size(), loop.decode_chunk._cache_size()
    changes = [
        {"temperature": 0.7},
        {"temperature": 0.3, "top_p": 0.9, "top_k": 7, "min_p": 0.1},
        {"base_temperature": 1.3, "guidance_scale": 0.4},
        {"repetition_penalty": 1.3, "seed": 9},
        {"max_new_tokens": 18},
    ]
    for change in changes:
        sampler.generate(QUESTIONS, **({"max_new_tokens": 20} | change))
    assert (loop.prefill._cache_size(), loop.decode_chunk._cache_size()) == compiled


def test_changing_t_or_s_with_refinements_does_not_recompile(endless, head):
    refined = Refinements(gated=True, protected=(3, 261))
    sampler = t3jax.Sampler(endless, [head, head], refinements=refined, chunk=8, batch_size=4)
    found = [tokens(sampler.generate(QUESTIONS, max_new_tokens=20))]
    compiled = loop.prefill._cache_size(), loop.decode_chunk._cache_size()
    for change in ({"base_temperature": 1.3}, {"guidance_scale": 0.2}):
        found.append(tokens(sampler.generate(QUESTIONS, max_new_tokens=20, **change)))
    # At T = 1 and s = 0 it is the base model, to which no refinement does anything.
    base = sampler.generate(QUESTIONS, max_new_tokens=20, base_temperature=1.0, guidance_scale=0.0)
    assert (loop.prefill._cache_size(), loop.decode_chunk._cache_size()) == compiled
    assert tokens(base) == tokens(t3jax.Sampler(endless).generate(QUESTIONS, max_new_tokens=20))
    assert len({str(each) for each in [*found, tokens(base)]}) == 4


def test_a_head_that_minds_nothing_may_be_served_beside_another(sampler, endless, head):
    """One that is sure of "retain" everywhere: revoking its request changes no answer."""
    idle = dataclasses.replace(
        head,
        config=dataclasses.replace(head.config, rank=2, activation="tanh"),
        params=t3jax.init_head(
            jax.random.key(0), dataclasses.replace(head.config, rank=2), zero_output=True
        ),
        prior_shift=60.0,
    )
    both = t3jax.Sampler(endless, [idle, head], chunk=8, batch_size=4)
    expected = tokens(sampler.generate(QUESTIONS, **DRAWN))
    assert tokens(both.generate(QUESTIONS, **DRAWN)) == expected


def test_heads_of_different_defaults_need_to_be_told(endless, head):
    other = dataclasses.replace(head, base_temperature=2.0)
    with pytest.raises(ValueError, match=r"differ in base_temperature, \[2.0, 2.5\]"):
        t3jax.Sampler(endless, [head, other])
    sampler = t3jax.Sampler(endless, [head, other], base_temperature=1.5)
    assert (sampler.base_temperature, sampler.guidance_scale) == (1.5, 1.0)
    with pytest.raises(ValueError, match="the refinements gated need a head"):
        t3jax.Sampler(endless, refinements=Refinements(gated=True))


def test_an_answer_ends_at_a_stop_token(sampler, endless, head):
    long = sampler.generate(QUESTIONS[:1], **DRAWN)[0].tokens
    position = next(i for i in range(2, 20) if long[i] not in long[:i])
    ended = sampler.generate(QUESTIONS[:1], **DRAWN, stop_ids=(long[position],))[0].tokens
    assert ended == long[: position + 1]
    own = t3jax.Sampler(dataclasses.replace(endless, eos_ids=(long[position],)), head, chunk=8)
    assert own.generate(QUESTIONS[:1], **DRAWN)[0].tokens == long[: position + 1]


def test_an_answer_ends_before_a_stop_string(sampler):
    text = sampler(QUESTIONS[:1], **DRAWN)[0]
    stop = text[len(text) // 3 : len(text) // 3 + 4]
    sample = sampler.generate(QUESTIONS[:1], **DRAWN, stop=(stop,))[0]
    assert sample.text == text[: text.find(stop)]
    assert len(sample.tokens) < 20


@pytest.mark.parametrize("stop", [(), ("e",)])
def test_streamed_pieces_join_to_the_answer(sampler, stop):
    pieces = list(sampler.stream(QUESTIONS[0], **DRAWN, stop=stop))
    assert "".join(pieces) == sampler(QUESTIONS[:1], **DRAWN, stop=stop)[0]
    assert stop or len(pieces) > 1


def test_logprobs_of_greedy_choices_agree_with_a_full_pass(sampler, endless, head):
    sample = sampler.generate(QUESTIONS[:1], max_new_tokens=12, logprobs=True)[0]
    prompt = t3jax.sampling.sampler.encode_prompt(
        endless.tokenizer, QUESTIONS[0], sampler.prompt_format
    )
    text = jnp.asarray(np.concatenate([prompt, sample.tokens]), jnp.int32)[None]
    hidden, _ = jax.jit(endless.apply)(endless.params, text)
    pooled = t3jax.causal_mean(hidden, jnp.ones(text.shape, bool))
    scores = t3jax.head_scores(head.params, pooled)
    logits = endless.unembed(endless.params, hidden)
    guided = t3jax.tilt(t3jax.tempered_logprobs(logits, 2.5), scores, 1.0)
    where = np.arange(len(prompt) - 1, text.shape[1] - 1)
    base = jax.nn.log_softmax(logits)[0, where, sample.tokens]
    np.testing.assert_allclose(sample.base_logprobs, base, atol=2e-5)
    np.testing.assert_allclose(sample.guided_logprobs, guided[0, where, sample.tokens], atol=2e-5)
    np.testing.assert_array_equal(sample.tokens, np.argmax(guided[0, where], axis=-1))


def test_a_finished_batch_stops_early(endless, head, monkeypatch):
    calls = []
    original = loop.decode_chunk

    def counting(*arguments):
        calls.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(batch, "decode_chunk", counting)
    all_tokens = tuple(range(endless.vocab_size))
    sampler = t3jax.Sampler(endless, head, chunk=4)
    answers = sampler.generate(QUESTIONS, max_new_tokens=200, stop_ids=all_tokens)
    assert [len(answer.tokens) for answer in answers] == [1, 1, 1]
    assert len(calls) <= 2


def test_no_key_is_used_twice(sampler):
    with jax.debug_key_reuse(True):
        sampler.generate(QUESTIONS, **DRAWN, num_samples=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be 0 .greedy. or more"),
        ({"top_p": 0.0}, "top_p"),
        ({"truncate_on": "both"}, "truncate_on"),
        ({"stop": ("",)}, "stop must be"),
        ({"temprature": 1.0}, "unknown sampling options .'temprature'."),
        ({"max_new_tokens": 10_000}, "exceeds the .* context"),
        ({"base_temperature": 0.0}, "base_temperature must be positive"),
    ],
)
def test_bad_options_are_named(sampler, options, message):
    with pytest.raises(ValueError, match=message):
        sampler.generate(QUESTIONS, **options)


@pytest.mark.parametrize("prompts", [[], "one string", [""], [[10**6]]])
def test_bad_prompts_are_refused(sampler, prompts):
    with pytest.raises(ValueError, match="prompt"):
        sampler.generate(prompts)


def test_a_head_of_another_vocabulary_is_refused(endless):
    config = t3jax.HeadConfig(endless.hidden_size, endless.vocab_size + 1, rank=2)
    head = t3jax.Head(config, t3jax.init_head(jax.random.key(0), config), 2.5, 1.0, "other")
    with pytest.raises(ValueError, match="vocab"):
        t3jax.Sampler(endless, head)
