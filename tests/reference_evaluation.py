"""TOFU's evaluation stated in PyTorch, one text after the other, from the definitions alone.

What `t3jax.evaluation` is compared with: its own tokens, its own forward passes, its own formulas;
of t3jax it uses nothing. Needs torch.
"""

import zlib

import numpy as np
import reference
import torch
from rouge_score.rouge_scorer import RougeScorer
from scipy.stats import hmean
from sklearn.metrics import roc_auc_score

WRONG = "perturbed_answer"


class Evaluator:
    """A model as it is, or with a head at T and s.

    `reads` holds what the model, which no head changes, gave for the texts so far.
    """

    def __init__(self, model, tokenizer, reads, head=None, temperature=1.0, scale=0.0):
        self.model, self.tokenizer, self.reads, self.head = model, tokenizer, reads, head
        self.temperature, self.scale = temperature, scale

    def encode(self, question, answer):
        """Tokens of the whole chat, and how many of them are the prompt's."""
        chat = [{"role": "user", "content": question}]
        prompt = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        chat.append({"role": "assistant", "content": answer})
        ids = self.tokenizer.apply_chat_template(chat)["input_ids"]
        eos = self.tokenizer.eos_token_id
        return (ids if ids[-1] == eos else [*ids, eos]), len(prompt)

    def read(self, ids, start):
        """Causal means [N, D] and logits [N, V] before each token from `start` on."""
        key = tuple(ids), start
        if key not in self.reads:
            tokens = torch.tensor([ids])
            hidden, logits = reference.read(self.model, tokens, torch.ones_like(tokens).bool())
            means = hidden[0].cumsum(0) / torch.arange(1, len(ids) + 1)[:, None]
            self.reads[key] = means[start - 1 : -1].clone(), logits[0, start - 1 : -1].clone()
        return self.reads[key]

    @torch.no_grad()
    def logprobs(self, question, answer):
        """Log-distributions [N, V] before each answer token, and these tokens [N]."""
        ids, start = self.encode(question, answer)
        means, logits = self.read(ids, start)
        if self.head is None:
            found = torch.log_softmax(logits, -1)
        else:
            found = reference.guided(logits, self.head(means), self.temperature, self.scale)
        return found, torch.tensor(ids[start:])

    def loss(self, question, answer):
        found, tokens = self.logprobs(question, answer)
        return -float(found.gather(-1, tokens[:, None]).mean())

    def answer(self, question, steps):
        ids, start = self.encode(question, "")
        if self.head is None:
            tokens = reference.greedy(self.model, ids[:start], steps)
        else:
            tokens = reference.guided_greedy(
                self.model, self.head, ids[:start], steps, self.temperature, self.scale
            )
        return self.tokenizer.decode(tokens, skip_special_tokens=True).strip()

    def token_statistics(self, question, answer):
        """Of answer tokens but the last: log-probability, is it the argmax, Min-K%++ score."""
        found, tokens = (each[:-1] for each in self.logprobs(question, answer))
        chosen = found.gather(-1, tokens[:, None])[:, 0]
        mean = (found.exp() * found).sum(-1)
        variance = (found.exp() * (found - mean[:, None]) ** 2).sum(-1)
        scaled = (chosen - mean) / variance.clamp(min=1e-6).sqrt()
        return chosen.numpy(), (found.argmax(-1) == tokens).numpy(), scaled.numpy()


def evaluate(evaluator, sets, steps):
    """Aggregates by the reference's names, and losses and answers by set.

    `sets` are rows by set; forget and retain with paraphrased answers, holdout for membership.
    """
    found, losses, answers = {}, {}, {}
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    for name in ("forget", "retain", "ra", "wf"):
        rows = sets[name]
        right = np.array([evaluator.loss(r["question"], r["answer"]) for r in rows])
        wrong = np.array([[evaluator.loss(r["question"], a) for a in r[WRONG]] for r in rows])
        true = right
        if name in ("forget", "retain"):
            true = np.array([evaluator.loss(r["question"], r["paraphrased_answer"]) for r in rows])
            found[f"{name}_Q_A_PARA_Prob"] = np.exp(-true).mean()
        found[f"{name}_Q_A_Prob"] = np.exp(-right).mean()
        found[f"{name}_Q_A_PERT_Prob"] = np.exp(-wrong).mean()
        ratio = np.exp(-wrong.mean(1)) / (np.exp(-true) + 1e-10)
        if name == "forget":
            found["forget_truth_ratio"] = np.minimum(ratio, 1 / (ratio + 1e-10)).mean()
        else:
            found[f"{name}_Truth_Ratio"] = np.maximum(0, 1 - ratio).mean()
        if name in ("ra", "wf"):
            share = np.exp(-right) / (np.exp(-right) + np.exp(-wrong).sum(1) + 1e-10)
            found[f"{name}_Q_A_Prob_normalised"] = share.mean()
        answers[name] = [evaluator.answer(row["question"], steps) for row in rows]
        recalls = [
            scorer.score(row["answer"], text)["rougeL"].recall
            for row, text in zip(rows, answers[name], strict=True)
        ]
        found[f"{name}_Q_A_ROUGE"] = np.mean(recalls)
        losses[name] = right
    parts = [
        found[f"{n}_{m}"] for n in ("retain", "ra", "wf") for m in ("Q_A_ROUGE", "Truth_Ratio")
    ]
    parts += [found["retain_Q_A_Prob"]]
    parts += [found[f"{n}_Q_A_Prob_normalised"] for n in ("ra", "wf")]
    found["model_utility"] = hmean(parts)

    membership = {name: [] for name in ("mia_loss", "mia_zlib", "mia_min_k", "mia_min_k_plus_plus")}
    memorised, extracted = [], []
    for name in ("forget", "holdout"):
        for row in sets[name]:
            question, answer = row["question"], row["answer"]
            logprobs, correct, scaled = evaluator.token_statistics(question, answer)
            lowest = max(1, int(0.4 * len(logprobs)))
            loss = evaluator.loss(question, answer)
            membership["mia_loss"].append(loss)
            membership["mia_zlib"].append(loss / len(zlib.compress(answer.encode())))
            membership["mia_min_k"].append(-np.sort(logprobs)[:lowest].mean())
            membership["mia_min_k_plus_plus"].append(-np.sort(scaled)[:lowest].mean())
            if name == "forget":
                memorised.append(correct.mean())
                start = len(correct)
                while start and correct[start - 1]:
                    start -= 1
                extracted.append(1 - min(start, len(correct) - 1) / len(correct))
    labels = [0] * len(sets["forget"]) + [1] * len(sets["holdout"])
    found |= {name: roc_auc_score(labels, scores) for name, scores in membership.items()}
    found["exact_memorization"] = np.mean(memorised)
    found["extraction_strength"] = np.mean(extracted)
    return found, losses, answers
