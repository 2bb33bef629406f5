"""Models of a user's own: what docs/your_model.md shows, run as it stands there."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import t3jax
from t3jax.lm.model import LM


@pytest.fixture(scope="module")
def shown(repository, tmp_path_factory):
    """The names that the page's Python defines."""
    page = (repository / "docs" / "your_model.md").read_text()
    names = {"__name__": "your_model"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("page"))
        for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
            exec(block, names)
    return names


def greedy(lm: LM, prompt: list[int], steps: int) -> list[int]:
    """The likeliest tokens, the text read anew and without a cache for each."""
    tokens = np.zeros((1, 20), np.int32)
    tokens[0, : len(prompt)] = prompt
    mask = np.arange(tokens.shape[1])[None] < len(prompt)
    for at in range(len(prompt), len(prompt) + steps):
        _, logits, _ = tiny.read(lm.apply, lm.unembed, lm.params, tokens, mask)
        tokens[0, at] = np.argmax(logits[0, at - 1])
        mask[0, at] = True
    return tokens[0, len(prompt) : len(prompt) + steps].tolist()


@pytest.mark.parametrize("name", ["attentive", "recurrent"])
def test_own_model_from_features_to_scores(shown, name, tmp_path):
    lm = shown[name]
    assert (lm.vocab_size, lm.hidden_size, lm.eos_ids) == (264, 32, ())
    if name == "recurrent":
        sampler, base, unlearned = (shown[each] for each in ("sampler", "base", "unlearned"))
        assert [len(answer.tokens) for answer in shown["answers"]] == [8] * 4
    else:
        texts = shown["texts"]
        sampler, (base, unlearned) = shown["unlearn"](lm, texts[:4], texts[4:], tmp_path)
    # The head made the forget answers less likely.
    assert (unlearned.retain_prob < 0.4).all()
    assert (unlearned.logprobs < base.logprobs - 0.5).all()
    # Cache and padding: prompts of unequal length in one batch, against the plain reading.
    prompts = [[5, 9, 200, 31], [77], list(range(40, 52)), [3]]
    untouched = {"base_temperature": 1.0, "guidance_scale": 0.0}
    samples = sampler.generate(prompts, max_new_tokens=8, **untouched)
    for prompt, sample in zip(prompts, samples, strict=True):
        assert sample.tokens == greedy(lm, prompt, 8)
    # Fewer rows than prompts: whatever the cache, a row that is finished takes the next one.
    few = t3jax.Sampler(lm, batch_size=2, chunk=4).generate(prompts, max_new_tokens=8)
    assert [sample.tokens for sample in few] == [sample.tokens for sample in samples]


def test_functions_that_do_not_fit_are_refused():
    def apply(params, tokens, positions, mask, cache):
        return jnp.zeros((*tokens.shape, 4), jnp.bfloat16), cache

    def unembed(params, hidden):
        return jnp.zeros((*hidden.shape[:-1], 7), hidden.dtype)

    with pytest.raises(ValueError, match=r"unembed gave bfloat16 \(2, 3, 7\).*expected float32"):
        t3jax.make_lm(apply, unembed, {}, max_position=9)
    with pytest.raises(ValueError, match=r"mine: apply gave hidden states \(2, 4\) for tokens"):
        t3jax.make_lm(
            lambda *args: (jnp.zeros((2, 4)), None), unembed, {}, max_position=9, name="mine"
        )


def test_end_tokens_are_the_tokenizers(shown):
    lm = shown["attentive"]
    tokenizer = tiny.make_tokenizer()
    again = t3jax.make_lm(lm.apply, lm.unembed, lm.params, max_position=64, tokenizer=tokenizer)
    assert again.eos_ids == (tokenizer.eos_token_id,)
