"""Makes the golden arrays beside it, with torch and transformers.

    python tests/golden/make_golden.py

Each file holds a tiny random model (`config`, the text of its config.json; `weights/NAME`, float16)
and what PyTorch computes with it in float32: `hidden` and `logits` of a padded batch. For Llamas
there are, with a random head `head/hidden` and `head/output`, the method's `pooled`, `scores`,
`guided`, `loss`, the gradients, and greedy tokens without and with guidance; for the other families
the `greedy` tokens after the batch padded on the left. Rows at attended positions only; of arrays
over the vocabulary every fourth row.
"""

import pathlib
import sys

import numpy as np
import torch
import transformers

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import reference  # noqa: E402

# Small, so that the files are; wide enough that every rotary branch and grouping is met.
SIZES = {
    "vocab_size": 96,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "bos_token_id": 94,
    "eos_token_id": 95,
}
MODELS = {
    "llama3_untied": {"num_key_value_heads": 1},
    "gqa_tied": {"num_key_value_heads": 1},
    "biases": {"num_key_value_heads": 2},
}
FAMILY_SIZES = {
    "n_inner": 24,
    "head_dim": 8,
    "num_key_value_heads": 1,
    "vocab_size_per_layer_input": 100,
}
TEMPERATURE, SCALE, STEPS = 2.5, 1.0, 24
LENGTHS = {"left": (36, 9, 1), "right": (36, 20, 3)}
FAMILY_LENGTHS = {"left": (24, 9, 1), "right": (24, 13, 3)}
FAMILY_STEPS = 32


def save(model) -> dict[str, np.ndarray]:
    """The config and the weights of a model, which are rounded to what is stored."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())
    out = {"config": np.array(model.config.to_json_string(use_diff=True))}
    for path, value in model.state_dict().items():
        if path != "lm_head.weight" or not model.config.tie_word_embeddings:
            out[f"weights/{path}"] = value.half().numpy()
    return out


def read(model, generator, side: str, lengths: tuple[int, ...]) -> tuple:
    """A padded batch: its tokens, mask, hidden states and logits, and the arrays to store."""
    longest = max(lengths)
    mask = np.arange(longest) < np.array(lengths)[:, None]
    mask = mask[:, ::-1].copy() if side == "left" else mask
    tokens = generator.integers(0, 95, mask.shape)
    hidden, logits = reference.read(model, torch.tensor(tokens), torch.tensor(mask))
    out = {f"{side}/tokens": tokens.astype(np.int32), f"{side}/mask": mask}
    out |= {f"{side}/hidden": hidden[mask].numpy(), f"{side}/logits": logits[mask][::4].numpy()}
    return tokens, mask, hidden, logits, out


def make_family(name: str) -> dict[str, np.ndarray]:
    """All arrays of the file of a family."""
    known = transformers.AutoConfig.for_model(name).to_dict()
    sizes = {key: value for key, value in FAMILY_SIZES.items() if key in known}
    model = reference.make_family(name, **SIZES, **sizes)
    out = save(model)
    generator = np.random.default_rng(0)
    for side, lengths in FAMILY_LENGTHS.items():
        tokens, mask, *_, arrays = read(model, generator, side, lengths)
        out |= arrays
        if side == "left":
            batch = torch.tensor(tokens), torch.tensor(mask)
            out["greedy"] = reference.continue_batch(model, *batch, FAMILY_STEPS).int().numpy()
    return out


def make_llama(name: str) -> dict[str, np.ndarray]:
    """All arrays of the file of a Llama."""
    model = reference.make_llama(name, **SIZES, **MODELS[name])
    out = save(model)
    generator = np.random.default_rng(0)

    torch.manual_seed(0)
    head = reference.GuidanceHead(model.config.hidden_size, model.config.vocab_size, rank=4)
    with torch.no_grad():
        head.proj[-1].weight *= 6
    out["head/hidden"] = head.proj[0].weight.detach().numpy().copy()
    out["head/output"] = head.proj[-1].weight.detach().numpy().copy()

    for side, lengths in LENGTHS.items():
        tokens, mask, hidden, logits, arrays = read(model, generator, side, lengths)
        out |= arrays

    pooled = reference.causal_mean(hidden, torch.tensor(mask))
    scores = head(pooled)
    answer = mask & (np.cumsum(mask, axis=1) > 2)
    retain = np.array([True, False, True])
    loss = reference.loss(scores, *map(torch.tensor, (tokens, answer, retain)))
    loss.backward()
    guided = reference.guided(logits, scores.detach(), TEMPERATURE, SCALE)
    out |= {
        "pooled": pooled[torch.tensor(mask)].numpy(),
        "scores": scores.detach()[torch.tensor(mask)][::4].numpy(),
        "guided": guided[torch.tensor(mask)][::4].numpy(),
        "answer": answer,
        "retain": retain,
        "loss": loss.detach().numpy(),
        "gradient/hidden": head.proj[0].weight.grad.numpy(),
        "gradient/output": head.proj[-1].weight.grad.numpy(),
    }
    for i, prompt in enumerate(([5, 9, 20], [77], list(range(30, 50)))):
        out[f"prompt/{i}"] = np.array(prompt, np.int32)
        out[f"greedy/{i}"] = np.array(reference.greedy(model, prompt, STEPS), np.int32)
        tokens = reference.guided_greedy(model, head, prompt, STEPS, TEMPERATURE, SCALE)
        out[f"guided_greedy/{i}"] = np.array(tokens, np.int32)
    return out


if __name__ == "__main__":
    for name in (*MODELS, *reference.FAMILIES):
        path = HERE / f"{name}.npz"
        arrays = make_llama(name) if name in MODELS else make_family(name)
        np.savez_compressed(path, **arrays)
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")
