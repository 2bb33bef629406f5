import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import t3jax
from t3jax import Refinements
from t3jax.sampling import batch, cache, loop, warn
from t3jax.sampling.options import as_integer, as_number

# Prompts of like length, and the same number of new tokens throughout: programs are shared.
QUESTIONS = ["Who wrote the book?", "Where was the author born?", "Why was it so?"]
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


def many_prompts(lm, count=64, longest=60):
    draw = np.random.default_rng(3)
    lengths = draw.integers(1, longest, count)
    return [draw.integers(0, lm.vocab_size, length).tolist() for length in lengths]


@pytest.mark.filterwarnings("ignore:.* answers are empty")
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


NAN, INFINITE, ALL_BANNED, ONE_BANNED = -1, -2, -3, -4


@functools.cache
def recitation(vocab_size):
    """The functions of a model whose parameters are a script: every script has one program."""

    def apply(params, tokens, positions, mask, cache):
        ids = params[positions]
        hidden = jax.nn.one_hot(ids, vocab_size, dtype=jnp.float32)
        for code, value in {NAN: jnp.nan, INFINITE: jnp.inf}.items():
            hidden = hidden.at[..., 7].set(jnp.where(ids == code, value, hidden[..., 7]))
        hidden = jnp.where(ids[..., None] == ALL_BANNED, -jnp.inf, hidden)
        hidden = hidden.at[..., 7].set(jnp.where(ids == ONE_BANNED, -jnp.inf, hidden[..., 7]))
        return hidden, cache

    def unembed(params, hidden):
        return 20 * hidden

    return apply, unembed


def reciting(lm, script, vocab_size=None, **fields):
    """A model that answers prompts of three tokens with a script: ids, or what logits are then."""
    table = np.zeros(lm.max_position, np.int32)
    table[2 : 2 + len(script)] = script
    functions = recitation(vocab_size or lm.vocab_size)
    options = {"tokenizer": lm.tokenizer, "eos_ids": ()} | fields
    return t3jax.make_lm(*functions, jnp.asarray(table), max_position=lm.max_position, **options)


@pytest.mark.parametrize("chunk", [1, 3, 20])
def test_nothing_comes_after_a_stop_string_whatever_the_chunk(tiny_lm, chunk):
    script = tiny_lm.tokenizer("Once upon a time, and then")["input_ids"]
    sampler = t3jax.Sampler(reciting(tiny_lm, script), chunk=chunk)
    options = {"max_new_tokens": len(script), "stop": ("time", "pon"), "logprobs": True}
    sample = sampler.generate([[1, 2, 3]], **options)[0]
    assert (sample.text, tiny_lm.tokenizer.decode(sample.tokens)) == ("Once u", "Once upon")
    assert len(sample.base_logprobs) == len(sample.guided_logprobs) == len(sample.tokens)
    assert "".join(sampler.stream([1, 2, 3], **options)) == sample.text


@pytest.mark.parametrize(
    ("stop", "chunk"), [("<|im_end|>", 1), ("<|im_end|>\n", 8), ("i<|im_end|>", 8)]
)
def test_a_stop_string_may_hold_a_special_token(tiny_lm, stop, chunk):
    tokenizer = tiny_lm.tokenizer
    script = tokenizer("Hi<|im_end|>\nyou there")["input_ids"]
    sampler = t3jax.Sampler(reciting(tiny_lm, script), chunk=chunk)
    options = {"max_new_tokens": len(script), "stop": (stop,)}
    sample = sampler.generate([[1, 2, 3]], **options)[0]
    assert sample.text == ("H" if stop.startswith("i") else "Hi")
    assert tokenizer.decode(sample.tokens) == ("Hi<|im_end|>\n" if "\n" in stop else "Hi<|im_end|>")
    assert "".join(sampler.stream([1, 2, 3], **options)) == sample.text


@pytest.mark.parametrize(
    ("fault", "options"),
    [(NAN, {}), (INFINITE, {"temperature": 1.0}), (ALL_BANNED, {"temperature": 1.0, "top_p": 0.9})],
)
def test_logits_that_are_not_finite_end_sampling_with_the_prompt(tiny_lm, fault, options):
    sampler = t3jax.Sampler(reciting(tiny_lm, [70, 71, 72, fault, 73]), chunk=2)
    prompts = [[1] * 12, [1, 2, 3]]  # after the first, longer one the script is over
    message = r"prompt 1, token 4 of the answer: the base model's logits are NaN .* float16"
    with pytest.raises(FloatingPointError, match=message):
        sampler.generate(prompts, max_new_tokens=5, **options)
    # What comes after the end is nobody's.
    for ended in ({"max_new_tokens": 3}, {"max_new_tokens": 5, "stop_ids": (72,)}):
        samples = sampler.generate(prompts, **ended, **options)
        assert len(samples[1].tokens) == 3


def test_a_banned_token_is_no_fault(tiny_lm):
    sampler = t3jax.Sampler(reciting(tiny_lm, [70, ONE_BANNED, 72]))
    assert len(sampler.generate([[1, 2, 3]], max_new_tokens=3)[0].tokens) == 3


def test_scores_that_are_not_finite_end_sampling_too(endless, head):
    sampler = t3jax.Sampler(endless, head, chunk=8, batch_size=4)
    output = head.params["output"].at[5].set(jnp.nan)
    broken = sampler._weights.heads[0] | {"output": output}
    sampler._weights = sampler._weights._replace(heads=(broken,))
    with pytest.raises(FloatingPointError, match=r"prompt 0, token 1 .* the head's scores are NaN"):
        sampler.generate(QUESTIONS[:1], max_new_tokens=2)


def test_empty_answers_are_warned_of(tiny_lm):
    eos = tiny_lm.tokenizer.eos_token_id
    sampler = t3jax.Sampler(reciting(tiny_lm, [eos, 72], eos_ids=(eos,)))
    with pytest.warns(UserWarning, match="1 of 1 answers are empty") as caught:
        assert sampler.generate([[1, 2, 3]])[0].text == ""
    assert len(caught) == 1
    with pytest.warns(UserWarning, match="empty"):
        assert list(sampler.stream([1, 2, 3])) == []
    sampler = t3jax.Sampler(reciting(tiny_lm, [eos, 72], eos_ids=(eos,), tokenizer=None))
    with pytest.warns(UserWarning, match="empty"):
        sampler.generate([[1, 2, 3]])
    t3jax.Sampler(reciting(tiny_lm, [72])).generate([[1, 2, 3]], max_new_tokens=1)


def test_seeds_beyond_32_bits_draw_differently(sampler):
    seeds = (0, 2**31, 2**32 - 1, 2**32, 2**33, 2**64 - 1)
    found = [tokens(sampler.generate(QUESTIONS[:1], **DRAWN, seed=seed)) for seed in seeds]
    assert len({str(each) for each in found}) == len(seeds)


def test_a_tokenizer_may_know_more_than_the_model_where_no_prompt_holds_it(tiny_lm):
    sampler = t3jax.Sampler(reciting(tiny_lm, [70], vocab_size=262))
    with pytest.raises(ValueError, match=r"prompt 0 holds token id 26\d: .* \[0, 262\)"):
        sampler(["Who?"])
    assert len(sampler.generate([[1, 2, 3]], max_new_tokens=1)[0].tokens) == 1


def test_what_needs_a_tokenizer_says_so(tiny_lm):
    sampler = t3jax.Sampler(reciting(tiny_lm, [70], tokenizer=None))
    for prompt, options in (("Who?", {}), ([1, 2, 3], {"stop": ("a",)})):
        with pytest.raises(ValueError, match="tokenizer"):
            sampler.generate([prompt], **options)


@pytest.mark.parametrize("stop", [(), ("e",)])
def test_streamed_pieces_join_to_the_answer(sampler, stop):
    pieces = list(sampler.stream(QUESTIONS[0], **DRAWN, stop=stop))
    assert "".join(pieces) == sampler(QUESTIONS[:1], **DRAWN, stop=stop)[0]
    assert stop or len(pieces) > 1


def test_logprobs_of_greedy_choices_agree_with_a_full_pass(sampler, endless, head):
    sample = sampler.generate(QUESTIONS[:1], max_new_tokens=20, logprobs=True)[0]
    prompt = t3jax.sampling.sampler.encode_prompt(
        endless.tokenizer, QUESTIONS[0], sampler.prompt_format
    )
    text = jnp.asarray(np.concatenate([prompt, sample.tokens]), jnp.int32)[None]

    @jax.jit
    def read():
        hidden, _ = endless.apply(endless.params, text)
        pooled = t3jax.causal_mean(hidden, jnp.ones(text.shape, bool))
        scores = t3jax.head_scores(head.params, pooled)
        logits = endless.unembed(endless.params, hidden)
        guided = t3jax.tilt(t3jax.tempered_logprobs(logits, 2.5), scores, 1.0)
        return jax.nn.log_softmax(logits), guided

    base, guided = map(np.asarray, read())
    where = np.arange(len(prompt) - 1, text.shape[1] - 1)
    base = base[0, where, sample.tokens]
    np.testing.assert_allclose(sample.base_logprobs, base, atol=2e-5)
    np.testing.assert_allclose(sample.guided_logprobs, guided[0, where, sample.tokens], atol=2e-5)
    np.testing.assert_array_equal(sample.tokens, np.argmax(guided[0, where], axis=-1))


@pytest.fixture
def never_warned():
    warn.warn_of_the_base.cache_clear()
    yield
    warn.warn_of_the_base.cache_clear()


@pytest.mark.parametrize("rule", [{"top_p": 0.9}, {"top_k": 9}, {"min_p": 0.1}])
def test_the_base_s_truncation_under_a_head_is_warned_of_once(sampler, never_warned, rule):
    options = {"truncate_on": "base", "max_new_tokens": 1, **rule}
    with pytest.warns(UserWarning, match="can bring the forgotten text back") as caught:
        sampler.generate(QUESTIONS, **options)
    assert len(caught) == 1
    sampler.generate(QUESTIONS, **options)  # a second one would be an error


def test_no_other_truncation_is_warned_of(sampler, endless, never_warned):
    tight = {"top_p": 0.9, "max_new_tokens": 1}
    for truncate_on in ("guided", "tilted"):
        sampler.generate(QUESTIONS, truncate_on=truncate_on, **tight)
    sampler.generate(QUESTIONS, truncate_on="base", max_new_tokens=1)
    sampler.generate(QUESTIONS, truncate_on="base", guidance_scale=0.0, **tight)
    t3jax.Sampler(endless).generate(QUESTIONS, truncate_on="base", **tight)


def test_answers_say_their_perplexity_under_the_base(sampler, endless):
    for options in ({}, {"temperature": 1.0}, {"guidance_scale": 0.0}):
        plain = sampler.generate(QUESTIONS, max_new_tokens=20, **options)
        asked = sampler.generate(QUESTIONS, max_new_tokens=20, logprobs=True, **options)
        expected = [np.exp(-np.mean(sample.base_logprobs)) for sample in asked]
        np.testing.assert_allclose([s.base_perplexity for s in plain], expected, rtol=1e-4)
        assert plain[0].base_logprobs is None
    assert t3jax.Sampler(endless).generate(QUESTIONS, max_new_tokens=2)[0].base_perplexity is None


def test_answers_say_how_much_likelier_the_head_made_them(sampler):
    for sample in sampler.generate(QUESTIONS, **DRAWN, base_temperature=1.0, logprobs=True):
        expected = np.sum(sample.guided_logprobs) - np.sum(sample.base_logprobs)
        np.testing.assert_allclose(sample.log_ratio, expected, atol=1e-4)
        assert not sample.refused


def test_answers_that_the_head_has_changed_are_refused(sampler, endless):
    options = {**DRAWN, "base_temperature": 1.0}
    plain = sampler.generate(QUESTIONS, **options, logprobs=True)
    between = float(np.median([sample.log_ratio for sample in plain]))
    refusal = {"refusal": "I don't know.", "refusal_threshold": between}
    samples = sampler.generate(QUESTIONS, **options, **refusal)
    assert [s.refused for s in samples] == [s.log_ratio > between for s in plain]
    assert tokens(samples) == tokens(plain)
    for sample, before in zip(samples, plain, strict=True):
        assert sample.text == ("I don't know." if sample.refused else before.text)
    assert {sample.refused for sample in samples} == {True, False}
    for question, sample in zip(QUESTIONS, samples, strict=True):
        refused = refusal | {"refusal_threshold": 1e-9 if sample.refused else 1e9}
        (piece,) = sampler.stream(question, **options, **refused)
        assert (piece == "I don't know.") == sample.refused
    # The base refuses nothing.
    base = sampler.generate(QUESTIONS, **options, guidance_scale=0.0, **refusal)
    assert not any(sample.refused for sample in base)
    assert t3jax.Sampler(endless).generate(QUESTIONS[:1], **DRAWN, refusal="No.")[0].text != "No."


@pytest.fixture(scope="module")
def sure(endless, head):
    """A sampler of a base that is sure of each next token, as one that recites is.

    Hidden states and logits are ten times as large, and the head reads a tenth of them.
    """
    norm = endless.params["final_norm"]
    params = endless.params | {"final_norm": jax.tree.map(lambda leaf: 10 * leaf, norm)}
    first, *rest = head.params["hidden"]
    first = first | {"weight": first["weight"] / 10}
    same = dataclasses.replace(head, params=head.params | {"hidden": [first, *rest]})
    return t3jax.Sampler(dataclasses.replace(endless, params=params), same, chunk=8, batch_size=4)


ABSURD = {**DRAWN, "base_temperature": 20.0}


def test_answers_that_are_no_language_to_the_base_are_warned_of(sure):
    with pytest.warns(UserWarning, match=r"T·s is 20 \(T = 20, s = 1\)") as caught:
        samples = sure.generate(QUESTIONS, **ABSURD)
    assert len(caught) == 1
    median = np.median([sample.base_perplexity for sample in samples])
    assert median > warn.ABSURD_PERPLEXITY
    assert f"median perplexity under it is {median:.0f}," in str(caught[0].message)
    with pytest.warns(UserWarning, match="no language"):
        list(sure.stream(QUESTIONS[0], **ABSURD))


def test_no_other_answers_are_warned_of(sure, sampler):
    limit = warn.ABSURD_PERPLEXITY
    fluent = sure.generate(QUESTIONS, **ABSURD | {"top_p": 0.5, "base_temperature": 1.0})
    assert max(sample.base_perplexity for sample in fluent) < limit
    # The base, tempered and not tilted: what is served is no head's fault.
    base = sure.generate(QUESTIONS, **ABSURD, guidance_scale=0.0)
    assert min(sample.base_perplexity for sample in base) > limit
    # A base that is sure of nothing.
    flat = sampler.generate(QUESTIONS, **ABSURD)
    assert min(sample.base_perplexity for sample in flat) > limit


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
    assert not calls  # the prompt's own step ends them all


def test_no_key_is_used_twice(sampler):
    """Where the model decides nothing, the noise alone does: the same noise is the same token."""
    options = {"temperature": 1e6, "max_new_tokens": 60, "num_samples": 2}
    with jax.debug_key_reuse(True):
        answers = np.array(tokens(sampler.generate(QUESTIONS, **options)))
    assert answers.shape == (6, 60)
    for answer in answers:
        assert len(set(answer.tolist())) > 40  # of 264, 54 are expected
    pairs = [(i, j) for i in range(6) for j in range(i)]
    assert all(np.mean(answers[i] == answers[j]) < 0.1 for i, j in pairs)


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
        ({"refusal": " "}, "refusal must be a text"),
        ({"stop_ids": (10**6,)}, r"stop_ids \[1000000\]: tiny has the tokens 0 to 263"),
        ({"stop_ids": (-1,)}, "stop_ids must be token ids"),
        ({"top_k": 2**31}, "top_k must be 0 .all., or 1 to"),
        ({"num_samples": 10**9}, r"num_samples must be 1 to 10\^6"),
        ({"num_samples": True}, "num_samples must be"),
        ({"max_new_tokens": 10**9}, r"max_new_tokens must be 1 to 2\^20"),
        ({"seed": -1}, "seed must be an integer, 0 to"),
        ({"seed": 2**64}, "seed must be an integer, 0 to"),
        ({"temperature": 1e-30}, "temperature must be"),
        *[
            ({name: value}, f"{name} must be")
            for name in (
                "temperature",
                "top_p",
                "min_p",
                "repetition_penalty",
                "base_temperature",
                "guidance_scale",
            )
            for value in (float("nan"), float("inf"), -float("inf"))
        ],
        ({"refusal_threshold": float("nan")}, "refusal_threshold must be"),
        ({"refusal": "No."}, "a refusal needs base_temperature = 1, got 2.5"),
    ],
)
def test_bad_options_are_named(sampler, options, message):
    with pytest.raises(ValueError, match=message):
        sampler.generate(QUESTIONS, **options)


def test_what_is_no_number_is_in_no_range():
    for value in ("0.7", None, True, [1.0], 10**400):
        assert np.isnan(as_number(value))
    for value in ("1", None, True, 1.5, float("nan")):
        assert as_integer(value) == -1
    assert as_number(np.float32(0.5)) == 0.5
    assert as_integer(np.int64(2**40)) == 2**40


def test_numbers_of_a_sampler_are_checked_before_it_is_used(endless):
    for name, value in {
        "base_temperature": float("nan"),
        "guidance_scale": float("nan"),
        "batch_size": 0,
        "chunk": 0,
    }.items():
        with pytest.raises(ValueError, match=f"{name} must be"):
            t3jax.Sampler(endless, **{name: value})


@pytest.mark.parametrize(
    "prompts",
    [
        [],
        "one string",
        [""],
        [[10**6]],
        [[10**30]],
        [[]],
        ["a\ud800"],
        [np.ones(2)],
        [np.ones((2, 2), int)],
    ],
)
def test_bad_prompts_are_refused(sampler, prompts):
    with pytest.raises(ValueError, match="prompt"):
        sampler.generate(prompts)


def test_a_head_of_another_vocabulary_is_refused(endless):
    config = t3jax.HeadConfig(endless.hidden_size, endless.vocab_size + 1, rank=2)
    head = t3jax.Head(config, t3jax.init_head(jax.random.key(0), config), 2.5, 1.0, "other")
    with pytest.raises(ValueError, match="vocab"):
        t3jax.Sampler(endless, head)
