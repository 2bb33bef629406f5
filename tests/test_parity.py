"""Equality with PyTorch: transformers' models, and the method as `reference` states it."""

import dataclasses
import functools
import itertools
import json
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny

import t3jax
from t3jax import data
from t3jax.data import PromptFormat, encode_prompt, encode_records
from t3jax.evaluation import BASE, Setting, Store, encode_set, logs, tofu
from t3jax.lm import families, from_params, load_config, load_lm, read_config, save_hf
from t3jax.lm.dequantized import dequantize
from t3jax.lm.quantization_json import read_quantization
from t3jax.lm.weights import load_params
from t3jax.lm.wrappers import WRAPPERS
from t3jax.sampling import Sampler

torch = pytest.importorskip(
    "torch", reason="torch is not installed: pip install -e .[test,parity] to compare with PyTorch"
)
import reference  # noqa: E402  (needs torch)
import reference_evaluation  # noqa: E402

pytestmark = pytest.mark.parity

LENGTH = 40  # beyond the original context of the llama3 configs


@functools.cache
def llama(name):
    return reference.make_llama(name)


def made(name):
    return llama(name) if name in reference.LLAMAS else reference.make_family(name)


@pytest.fixture(scope="session")
def load(tmp_path_factory):
    """The PyTorch model of a name and the same folder read by t3jax, loaded once."""

    @functools.cache
    def both(name):
        folder, model = tmp_path_factory.mktemp(name), made(name)
        return model, load_lm(reference.save_model(model, folder), dtype="float32")

    return both


def padded(side, vocab):
    """Four rows of unequal length: tokens and mask."""
    lengths = [LENGTH, 25, 7, 1]
    tokens = np.random.default_rng(0).integers(0, vocab, (len(lengths), LENGTH)).astype(np.int32)
    mask = np.arange(LENGTH) < np.array(lengths)[:, None]
    if side == "left":
        mask = mask[:, ::-1]
    return tokens, np.ascontiguousarray(mask)


def forward(lm, tokens, mask):
    return tiny.read(lm.apply, lm.unembed, lm.params, tokens, mask)[:2]


def close(found, expected, atol, rtol=0.0):
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), atol=atol, rtol=rtol)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", reference.LLAMAS)
def test_hidden_states_and_logits(load, name, side):
    model, lm = load(name)
    tokens, mask = padded(side, lm.vocab_size)
    expected = reference.read(model, torch.tensor(tokens), torch.tensor(mask))
    found = forward(lm, tokens, mask)
    for ours, theirs in zip(found, expected, strict=True):
        assert np.abs(theirs.numpy()[mask]).std() > 0.1  # far from all equal
        close(np.asarray(ours)[mask], theirs.numpy()[mask], atol=1e-4)


@pytest.mark.parametrize("name", reference.FAMILIES)
def test_family(name, tmp_path):
    """As transformers computes it, and what `save_hf` writes transformers computes likewise."""
    import transformers

    model = reference.make_family(name)
    model.save_pretrained(tmp_path / "theirs")
    config = read_config(tmp_path / "theirs")
    lm = from_params(config, load_params(tmp_path / "theirs", config, jnp.float32), None, (), name)
    save_hf(tmp_path / "ours", config, lm.params, eos_ids=[263])
    assert read_config(tmp_path / "ours") == config
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert type(opened) is type(model)
    for side in ("right", "left"):
        tokens, mask = padded(side, lm.vocab_size)
        batch = torch.tensor(tokens), torch.tensor(mask)
        expected = reference.read(model, *batch)
        # With a cache, whose program goes on below; `test_golden.py` reads without one too.
        cache = lm.init_cache(len(tokens), LENGTH + 32)
        *found, cache = tiny.read(lm.apply, lm.unembed, lm.params, tokens, mask, cache)
        again = reference.read(opened, *batch)
        for ours, theirs, reopened in zip(found, expected, again, strict=True):
            assert np.abs(theirs.numpy()[mask]).std() > 0.1  # far from all equal
            close(np.asarray(ours)[mask], theirs.numpy()[mask], atol=1e-4)
            # What may differ is how a GELU is rounded.
            close(reopened[batch[1]], theirs[batch[1]], atol=1e-5)
    theirs = reference.continue_batch(model, *batch, 32)
    np.testing.assert_array_equal(tiny.continue_batch(lm, found[1], cache, 32), theirs)


LINEAR = {"type": "linear", "factor": 4.0}
WITHIN = {"rope_type": "dynamic", "factor": 4.0}
ODD_CONFIGS = {  # what is changed in a family's config.json; None takes a field out
    "a scaling beside rope_parameters": (
        "llama",
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
            "rope_scaling": LINEAR,
            "rope_theta": 300.0,
        },
    ),
    "dynamic, within the context": ("llama", {"rope_parameters": None, "rope_scaling": WITHIN}),
    "an original context at the top": (
        "llama",
        {"rope_parameters": reference.LLAMA3_ROPE, "original_max_position_embeddings": 16},
    ),
    "fields of other families": (
        "llama",
        {"rotary_pct": 0.5, "rope_local_base_freq": 5.0, "rotary_emb_base": 5.0},
    ),
    "windows of the last layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
        | {"layer_types": None},
    ),
    "no layer with a window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}
        | {"layer_types": None},
    ),
    "windows by layer_types": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 6}
        | {"layer_types": ["sliding_attention", "full_attention"]},
    ),
    "layer_types of mistral": ("mistral", {"layer_types": ["sliding_attention"] * 2}),
    "a scaling beside nested rope_parameters": (
        "gemma3_text",
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ),
    "one key head, as in Falcon 7B": (
        "falcon",
        {"new_decoder_architecture": False, "multi_query": True, "num_ln_in_parallel_attn": None}
        | {"num_kv_heads": 4},
    ),
    "another name": ("gpt2", {"n_embd": None, "hidden_size": 32}),
    "an old name of the activation": ("gemma", {"hidden_act": "gelu"}),
}


def as_transformers_opens(folder, model_type):
    """Logits of a folder, ours and transformers'."""
    import transformers

    opened = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    config = load_config(folder)
    lm = from_params(config, load_params(folder, config, jnp.float32), None, (), model_type)
    tokens, mask = padded("right", lm.vocab_size)
    theirs = reference.read(opened, torch.tensor(tokens), torch.tensor(mask))[1].numpy()[mask]
    assert np.abs(theirs).std() > 0.1  # far from all equal
    return np.asarray(forward(lm, tokens, mask)[1])[mask], theirs


@pytest.mark.parametrize("case", ODD_CONFIGS)
def test_a_config_means_what_transformers_makes_of_it(case, tmp_path):
    name, changed = ODD_CONFIGS[case]
    made = {"num_kv_heads": 1} if name == "falcon" else {}
    model = llama("gqa_tied") if name == "llama" else reference.make_family(name, **made)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text()) | changed
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    close(*as_transformers_opens(tmp_path, name), atol=1e-4)


@pytest.mark.parametrize("held", ["both", "head alone", "left-over index"])
@pytest.mark.filterwarnings("ignore:.*the head is kept:UserWarning")
def test_weights_are_those_that_transformers_takes(held, tmp_path):
    import safetensors.numpy

    llama("gqa_tied").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    embed = "model.embed_tokens.weight"
    if held == "both":
        tensors["lm_head.weight"] = tensors[embed][::-1].copy()
    elif held == "head alone":
        tensors["lm_head.weight"] = tensors.pop(embed)
    else:
        safetensors.numpy.save_file(
            {name: 0.5 * tensor for name, tensor in tensors.items()}, tmp_path / "old.safetensors"
        )
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "old.safetensors")}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
    close(*as_transformers_opens(tmp_path, "llama"), atol=1e-4)


def test_the_text_model_of_a_multimodal_folder(tmp_path):
    import transformers

    # The multimodal class leaves the cap of the logits out; no published Gemma 3 has one.
    text = {**reference.FAMILIES["gemma3_text"], "final_logit_softcapping": None}
    config = reference.make_family("gemma3_text", **text).config
    vision = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 8,
        "patch_size": 4,
    }
    both = transformers.Gemma3Config(
        text_config=config.to_dict(), vision_config=vision, mm_tokens_per_image=1
    )
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(both).eval()
    model.save_pretrained(tmp_path)
    config = read_config(tmp_path)
    lm = from_params(config, load_params(tmp_path, config, jnp.float32), None, (), "gemma3")
    tokens, mask = padded("right", lm.vocab_size)
    expected = reference.read(model, torch.tensor(tokens), torch.tensor(mask))
    for ours, theirs in zip(forward(lm, tokens, mask), expected, strict=True):
        assert np.abs(theirs.numpy()[mask]).std() > 0.05
        close(np.asarray(ours)[mask], theirs.numpy()[mask], atol=1e-4)


@pytest.mark.parametrize("name", reference.WRAPPERS)
def test_the_text_model_of_other_multimodal_folders(name, tmp_path):
    tied = len(name) % 2 == 0
    model = reference.make_wrapper(name, tied)
    model.save_pretrained(tmp_path)
    config = read_config(tmp_path)
    assert config.tied == tied
    lm = from_params(config, load_params(tmp_path, config, jnp.float32), None, (), name)
    tokens, mask = padded("right", 200)
    with torch.no_grad():
        expected = model(
            input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask).long()
        ).logits.numpy()[mask]
    assert expected.std() > 0.1  # far from all equal
    close(np.asarray(forward(lm, tokens, mask)[1])[mask], expected, atol=1e-4)


def test_experts_of_a_multimodal_folder_in_both_forms(tmp_path):
    """Published folders have their matrices the other way round, as transformers knows too."""
    import safetensors.numpy

    model = reference.make_wrapper("qwen3_vl_moe", tied=False)
    model.save_pretrained(tmp_path)
    config, path = read_config(tmp_path), tmp_path / "model.safetensors"
    expected = load_params(tmp_path, config, jnp.float32)
    tensors = {
        name: np.ascontiguousarray(tensor.swapaxes(1, 2)) if ".mlp.experts." in name else tensor
        for name, tensor in safetensors.numpy.load_file(path).items()
    }
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
    chex.assert_trees_all_equal(load_params(tmp_path, config, jnp.float32), expected)
    again = type(model).from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_quantised_matrices_stand_for_what_transformers_makes_of_them():
    from transformers.integrations import finegrained_fp8, mxfp4

    class View(np.ndarray):
        def get_shape(self):
            return list(self.shape)

    def read(quantization, index, **tensors):
        stored = {name: (array.view(View), name) for name, array in tensors.items()}
        ((view, _),) = dequantize(
            stored, read_quantization({"quantization_config": quantization})
        ).values()
        return np.asarray(view[index], np.float32)

    generator = np.random.default_rng(0)
    blocks = generator.integers(0, 256, (2, 6, 3, 16)).astype(np.uint8)
    scales = generator.integers(100, 140, (2, 6, 3)).astype(np.uint8)
    whole = tuple(slice(0, size) for size in (2, 96, 6))
    found = read({"quant_method": "mxfp4"}, whole, w_blocks=blocks, w_scales=scales)
    batch = torch.tensor(blocks), torch.tensor(scales)
    theirs = mxfp4.convert_moe_packed_tensors(*batch, dtype=torch.float32)
    np.testing.assert_array_equal(found, theirs)

    weight, scale = torch.randn(24, 48).to(torch.float8_e4m3fn), torch.rand(2, 2)
    numbers = weight.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
    blocks = {"quant_method": "fp8", "weight_block_size": [12, 24]}
    stored = {"a.weight": numbers, "a.weight_scale_inv": scale.numpy()}
    found = read(blocks, (slice(5, 20), slice(3, 40)), **stored)
    theirs = finegrained_fp8.Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float32)
    np.testing.assert_array_equal(found, theirs[5:20, 3:40])


def test_every_family_is_compared():
    assert {"llama", *reference.FAMILIES} == set(families.FAMILIES)
    assert {"gemma3", *reference.WRAPPERS} == set(WRAPPERS)


@pytest.mark.parametrize(
    ("name", "chunks"), [("llama3_untied", [12, 1, 1, 1]), ("biases", [8, 8, 8])]
)
def test_cache_equals_the_whole_pass(load, name, chunks):
    """A prompt and then single tokens, or the text in pieces; padding on the left."""
    _, lm = load(name)
    total = sum(chunks)
    tokens = np.random.default_rng(1).integers(0, lm.vocab_size, (3, total)).astype(np.int32)
    mask = np.arange(total) >= np.array([0, 3, 9])[:, None]  # one starts in the second piece
    step = jax.jit(lm.apply)
    whole, _ = step(lm.params, tokens, None, mask)
    cache, start = lm.init_cache(3, total + 2), 0
    for size in chunks:
        piece = slice(start, start + size)
        hidden, cache = step(lm.params, tokens[:, piece], None, mask[:, piece], cache)
        close(hidden[mask[:, piece]], whole[:, piece][mask[:, piece]], atol=2e-5)
        start += size
    assert cache.cursor == total


def test_a_saved_folder_opens_in_transformers(load, tmp_path):
    """`save_hf` writes what transformers reads, with the same logits."""
    import transformers

    from t3jax.lm import lm_config

    for name in ("llama3_untied", "linear", "biases"):
        model, lm = load(name)
        config = lm_config(model.config.to_dict())
        save_hf(tmp_path / name, config, lm.params, eos_ids=[263, 5])
        opened = transformers.LlamaForCausalLM.from_pretrained(tmp_path / name).eval()
        assert opened.generation_config.eos_token_id == [263, 5]
        assert opened.config.tie_word_embeddings == config.tied
        tokens, mask = map(torch.tensor, padded("right", lm.vocab_size))
        for ours, theirs in zip(
            reference.read(opened, tokens, mask), reference.read(model, tokens, mask), strict=True
        ):
            close(ours, theirs, atol=0)


def test_greedy_text(load):
    """Prompts of unequal length in one batch, against `generate` one by one."""
    model, lm = load("llama3_untied")
    prompts = [[5, 9, 200, 31], [77], list(range(40, 75)), [3, 3, 3]]
    samples = Sampler(lm).generate(prompts, max_new_tokens=64)
    for prompt, sample in zip(prompts, samples, strict=True):
        assert sample.tokens == reference.greedy(model, prompt, 64)


def torch_head(config, scale=1.0, seed=0):
    """A head as PyTorch draws it, and the same as t3jax's parameter tree."""
    torch.manual_seed(seed)
    head = reference.GuidanceHead(
        config.hidden_size,
        config.vocab_size,
        config.rank,
        config.activation,
        config.num_hidden_layers,
        config.bias,
    )
    with torch.no_grad():
        head.proj[-1].weight *= scale
    *hidden, output = [layer for layer in head.proj if isinstance(layer, torch.nn.Linear)]
    params = {
        "hidden": tuple(
            {name: jnp.asarray(value.detach().numpy()) for name, value in layer.named_parameters()}
            for layer in hidden
        ),
        "output": jnp.asarray(output.weight.detach().numpy()),
    }
    return head, params


HEADS = [
    {},
    {"activation": "relu", "num_hidden_layers": 2, "bias": True},
    {"activation": "gelu", "bias": True},
    {"activation": "tanh", "num_hidden_layers": 3},
]


def text_batch(width, vocab):
    """Hidden states, tokens, padding and answers of retain and forget rows."""
    generator = np.random.default_rng(3)
    hidden = generator.standard_normal((4, 12, width)).astype(np.float32)
    tokens = generator.integers(0, vocab, (4, 12)).astype(np.int32)
    mask = np.arange(12) < np.array([12, 9, 12, 5])[:, None]
    answer = mask & (np.arange(12) >= np.array([4, 1, 11, 3])[:, None])
    retain = np.array([True, False, True, False])
    return hidden, tokens, mask, answer, retain


@pytest.mark.parametrize("shape", HEADS, ids=lambda s: s.get("activation", "identity"))
def test_head_scores_loss_and_gradient(shape):
    config = t3jax.HeadConfig(hidden_size=10, vocab_size=23, rank=6, **shape)
    head, params = torch_head(config, scale=3.0)
    hidden, tokens, mask, answer, retain = text_batch(10, 23)

    pooled = reference.causal_mean(torch.tensor(hidden), torch.tensor(mask))
    scores = head(pooled)
    loss = reference.loss(scores, *map(torch.tensor, (tokens, answer, retain)))
    loss.backward()

    ours = t3jax.causal_mean(jnp.asarray(hidden), jnp.asarray(mask))
    close(ours[mask], pooled[mask], atol=1e-5)
    close(t3jax.head_scores(params, ours, config.activation), scores.detach(), atol=1e-5)

    def our_loss(params):
        targets = jnp.asarray(tokens[:, 1:])
        chosen = t3jax.target_scores(params, ours[:, :-1], targets, config.activation)
        labels = jnp.broadcast_to(jnp.asarray(retain)[:, None], chosen.shape)
        return t3jax.classifier_loss(chosen, labels, jnp.asarray(answer[:, 1:]))

    value, grads = jax.value_and_grad(our_loss)(params)
    close(value, loss.detach(), atol=1e-5)
    theirs = [p.grad.numpy() for p in head.parameters()]
    linears = [*grads["hidden"], {"weight": grads["output"]}]
    flat = [layer[k] for layer in linears for k in ("weight", "bias") if k in layer]
    assert max(np.abs(g).max() for g in theirs) > 1e-2
    for found, expected in zip(flat, theirs, strict=True):
        close(found, expected, atol=1e-5)


@pytest.mark.parametrize(("temperature", "scale"), [(1.0, 0.0), (2.5, 1.0), (4.0, 3.0)])
def test_guided_logits(temperature, scale):
    generator = np.random.default_rng(4)
    logits, scores = (5 * generator.standard_normal((2, 3, 50))).astype(np.float32)
    logits[0, 7] = -np.inf
    expected = reference.guided(torch.tensor(logits), torch.tensor(scores), temperature, scale)
    logits, scores = jnp.asarray(logits), jnp.asarray(scores)
    tilted = t3jax.tilt(t3jax.tempered_logprobs(logits, temperature), scores, scale)
    fused = t3jax.guided_logits(logits, scores, temperature, scale)
    close(tilted, expected, atol=1e-5)
    close(jax.nn.log_softmax(fused), expected, atol=1e-5)


def both_heads(lm, scale):
    """A random head as PyTorch draws it, its scores scaled up: ours, and PyTorch's."""
    config = t3jax.HeadConfig(lm.hidden_size, lm.vocab_size, rank=20)
    head, params = torch_head(config, scale)
    ours = t3jax.Head(config, params, base_temperature=2.5, guidance_scale=1.0, model=lm.name)
    return ours, head


@pytest.mark.parametrize("name", ["gqa_tied", "qwen2_moe", "gpt_oss"])
def test_guided_greedy_text(load, name):
    model, lm = load(name)
    prompts = [[5, 9, 200, 31], [77], list(range(40, 75))]
    ours, head = both_heads(lm, scale=8.0)
    sampler = Sampler(lm, ours)
    guided = sampler.generate(prompts, max_new_tokens=32)
    base = sampler.generate(prompts, max_new_tokens=32, base_temperature=1.0, guidance_scale=0.0)
    for prompt, ours, unguided in zip(prompts, guided, base, strict=True):
        assert ours.tokens == reference.guided_greedy(model, head, prompt, 32, 2.5, 1.0)
        assert ours.tokens != unguided.tokens  # the head decides
        assert unguided.tokens == reference.greedy(model, prompt, 32)


def test_features_are_the_causal_mean_before_each_answer_token(load, tmp_path):
    model, lm = load("llama3_untied")
    rows = [
        {"question": "Who?", "answer": "Ann."},
        {"text": "Once upon a time, there."},
        {"question": "Where in the world was she born?", "answer": "In Ur, they say."},
    ]
    examples = encode_records(lm.tokenizer, rows, PromptFormat())
    features = t3jax.load_or_compute_features(lm, examples, tmp_path)
    for i, example in enumerate(examples):
        tokens = torch.tensor(example.tokens[None])
        mask = torch.ones_like(tokens, dtype=torch.bool)
        pooled = reference.causal_mean(reference.read(model, tokens, mask)[0], mask)[0]
        found = features.select([i])
        close(found.pooled, pooled[example.answer_start - 1 : -1], atol=1e-4)
        np.testing.assert_array_equal(found.targets, example.tokens[example.answer_start :])


# ---- SmolLM2, a real model ----


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """SmolLM2-135M-Instruct in PyTorch and in t3jax, made once by the tool beside the checkout."""
    import conftest
    import transformers

    tool = conftest.SHARED / "tools" / "smollm2_to_hf.py"
    if not tool.is_file():
        pytest.skip(f"{tool} is not there: it makes the real model")
    pytest.importorskip("gguf", reason="gguf is not installed: it reads the real model's file")
    folder = tmp_path_factory.mktemp("smollm2")
    command = [sys.executable, tool, folder]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"the real model could not be made: {made.stderr[-300:]}")
    return transformers.LlamaForCausalLM.from_pretrained(folder).eval(), load_lm(folder, "float32")


QUESTIONS = (
    "What is the capital of France?",
    "Write a short poem about rain.",
    "Name three birds.",
)


def tofu_rows(count, split="forget05"):
    import conftest

    path = conftest.SHARED / "data" / "tofu" / f"{split}.json"
    return [json.loads(line) for line in path.read_text().splitlines()[:count]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_smollm2_hidden_states_logits_and_losses(smollm2, side):
    """Eight TOFU rows in one padded batch."""
    model, lm = smollm2
    examples = encode_records(lm.tokenizer, tofu_rows(8), PromptFormat())
    length = max(len(e.tokens) for e in examples)
    tokens, mask, answer = (np.zeros((8, length), dtype) for dtype in (np.int32, bool, bool))
    for row, example in enumerate(examples):
        start = length - len(example.tokens) if side == "left" else 0
        stop = start + len(example.tokens)
        tokens[row, start:stop] = example.tokens
        mask[row, start:stop] = True
        answer[row, start + example.answer_start : stop] = True
    expected = reference.read(model, torch.tensor(tokens), torch.tensor(mask))
    found = forward(lm, tokens, mask)
    for ours, theirs in zip(found, expected, strict=True):
        theirs = theirs.numpy()[mask]
        close(np.asarray(ours)[mask], theirs, atol=2e-5 * np.abs(theirs).max())

    theirs = torch.log_softmax(expected[1][:, :-1], -1).numpy()
    ours = np.asarray(jax.nn.log_softmax(found[1][:, :-1]))

    def losses(logprobs):
        chosen = np.take_along_axis(logprobs, tokens[:, 1:, None], -1)[..., 0]
        return -(chosen * answer[:, 1:]).sum(-1) / answer[:, 1:].sum(-1)

    assert losses(ours).mean() > 0.5
    close(losses(ours), losses(theirs), atol=5e-5)


def test_smollm2_greedy_text(smollm2):
    """64 tokens of the base model and 32 guided ones, by one compiled program."""
    model, lm = smollm2
    prompts = [encode_prompt(lm.tokenizer, q, PromptFormat()).tolist() for q in QUESTIONS]
    ours, head = both_heads(lm, scale=4.0)
    sampler = Sampler(lm, ours)
    base = sampler.generate(prompts, max_new_tokens=64, base_temperature=1.0, guidance_scale=0.0)
    assert "Paris" in base[0].text
    for prompt, sample in zip(prompts, base, strict=True):
        assert sample.tokens == reference.greedy(model, prompt, 64)
    guided = sampler.generate(prompts, max_new_tokens=64)
    for prompt, sample, unguided in list(zip(prompts, guided, base, strict=True))[:2]:
        expected = reference.guided_greedy(model, head, prompt, 32, 2.5, 1.0)
        assert sample.tokens[:32] == expected
        assert expected != unguided.tokens[:32]


def test_smollm2_evaluation(smollm2, tmp_path):
    """Rows of each of TOFU's sets, base and guided: losses, aggregates and answers."""
    model, lm = smollm2
    rows = {
        name: tofu_rows(count, f"{split}_perturbed")
        for name, split, count in (
            ("forget", "forget05", 2),
            ("retain", "retain", 1),
            ("ra", "real_authors", 1),
            ("wf", "world_facts", 1),
        )
    }
    for each in itertools.chain(*rows.values()):  # two wrong answers compare as five do
        each["perturbed_answer"] = each["perturbed_answer"][:2]
    rows["holdout"] = tofu_rows(2, "retain90")
    sets = {
        name: encode_set(name, each, lm.tokenizer, PromptFormat(), lm.max_position)
        for name, each in rows.items()
    }
    ours, head = both_heads(lm, scale=4.0)
    settings = [BASE, Setting("guided", 2.5, 1.0, (0,))]
    store = Store(lm, [ours], tmp_path)
    found = tofu.evaluate(store, sets, settings, tmp_path, tofu.TofuOptions(max_new_tokens=4))
    reads = {}
    for setting, guidance in zip(settings, [(), (head, 2.5, 1.0)], strict=True):
        evaluator = reference_evaluation.Evaluator(model, lm.tokenizer, reads, *guidance)
        aggregates, losses, answers = reference_evaluation.evaluate(evaluator, rows, steps=4)
        log = found[setting.name]
        for name, expected in losses.items():
            close(logs.column(log, f"{name}_Q_A_Prob", "avg_loss"), expected, atol=5e-5)
            assert logs.texts(log, f"{name}_Q_A_ROUGE", "generation") == answers[name]
        for metric, value in aggregates.items():
            close(log[metric].aggregate, value, atol=1e-4)


@pytest.mark.parametrize("name", ["gqa_tied", "biases"])
def test_fine_tuning_takes_the_steps_of_pytorch(load, tmp_path, name):
    """The same batches through transformers' model and torch's AdamW; the saved folder too."""
    import transformers

    from t3jax.finetuning import FinetuneConfig, Trainer
    from t3jax.finetuning.recipe import learning_rate_schedule
    from t3jax.lm import lm_config

    _, lm = load(name)
    model = reference.make_llama(name).train()
    config = lm_config(model.config.to_dict())
    recipe = FinetuneConfig(batch_size=4, learning_rate=3e-3, warmup_steps=2, weight_decay=0.1)
    steps = 5
    trainer = Trainer(config, lm.params, recipe, steps, lm.mesh)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    )
    rng = np.random.default_rng(5)
    state = trainer.init()
    for step in range(steps):
        rows = [
            data.Example(rng.integers(0, lm.vocab_size, n).astype(np.int32), answer_start=start)
            for n, start in ((32, 9), (20, 15), (27, 4), (8, 1))
        ]
        tokens = torch.zeros((4, 32), dtype=torch.long)
        labels = torch.full((4, 32), -100)
        for i, row in enumerate(rows):
            tokens[i, : len(row.tokens)] = torch.tensor(row.tokens)
            labels[i, row.answer_start : len(row.tokens)] = torch.tensor(
                row.tokens[row.answer_start :]
            )
        expected = model(input_ids=tokens, labels=labels).loss
        optimizer.zero_grad()
        expected.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = float(learning_rate_schedule(recipe, steps)(step))
        optimizer.step()
        state, loss, found_norm = trainer.step(state, rows)
        close(loss, expected.detach(), atol=1e-5, rtol=1e-5)
        close(found_norm, norm, atol=0, rtol=1e-4)
    save_hf(tmp_path, config, state[0], eos_ids=[263])
    opened = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    tokens, mask = padded("right", lm.vocab_size)
    theirs = reference.read(opened, torch.tensor(tokens), torch.tensor(mask))[1]
    _, ours = forward(dataclasses.replace(lm, params=state[0]), tokens, mask)
    close(np.asarray(ours)[mask], theirs.numpy()[mask], atol=1e-4)
