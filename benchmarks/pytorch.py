"""The PyTorch side of the benchmarks, which runs in the child process of `benchmarks.peer`.

Nothing here imports JAX. `Peer` makes the classes and calls their methods; arguments and results
are lists, numbers and NumPy arrays.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn import functional

transformers.utils.logging.disable_progress_bar()


class Machine:
    """The machine's ceilings as PyTorch reaches them, in seconds."""

    def __init__(self, device: str = "cpu"):
        self.device = device

    def read(self, size: int, repeats: int) -> float:
        """A sum over an array of float32."""
        numbers = torch.ones(size // 4, device=self.device)
        return statistics.median(_time(numbers.sum, repeats))

    def product(self, side: int, dtype: str, repeats: int) -> float:
        """A product of two square matrices."""
        square = torch.randn(side, side, device=self.device).to(getattr(torch, dtype))
        return statistics.median(_time(lambda: square @ square, repeats))


class LanguageModel:
    """transformers' model: forward passes, `generate`, and the paper's method in a plain loop."""

    def __init__(
        self,
        folder: str | None,
        dtype: str = "float32",
        device: str = "cpu",
        shape: dict[str, Any] | None = None,
    ):
        """Loads a folder; or, with a shape instead, makes a Llama with random weights."""
        self.device = torch.device(device)
        make: Any = transformers.AutoModelForCausalLM
        kind = getattr(torch, dtype)
        with self.device:
            if shape is None:
                self.model = make.from_pretrained(folder, dtype=kind).eval()
            else:
                self.model = make.from_config(transformers.LlamaConfig(**shape), dtype=kind).eval()
        self.ends = self.model.generation_config.eos_token_id

    @torch.inference_mode()
    def generate(self, prompts: np.ndarray, new_tokens: int, cache: str) -> np.ndarray:
        """Greedy tokens `[B, new_tokens]` after prompts of one length `[B, P]`, without a stop.

        `cache` is "dynamic"; "static"; or "compiled", which is static under `torch.compile`.
        """
        self.model.generation_config.eos_token_id = None
        options: dict[str, Any] = {}
        if cache != "dynamic":
            options["cache_implementation"] = "static"
            options["disable_compile"] = cache != "compiled"
        if cache == "compiled":
            config = transformers.CompileConfig(fullgraph=False)
            # By default generate compiles on a GPU only.
            config._compile_all_devices = True  # type: ignore[assignment]
            options["compile_config"] = config
        out = self.model.generate(
            torch.from_numpy(prompts).long().to(self.device),
            attention_mask=torch.ones(prompts.shape, dtype=torch.long, device=self.device),
            do_sample=False,
            max_new_tokens=new_tokens,
            pad_token_id=0,
            **options,
        )
        return out[:, prompts.shape[1] :].cpu().numpy()

    def generate_with_experts(self, way: str, prompts: np.ndarray, new_tokens: int) -> np.ndarray:
        """`generate` with the dynamic cache and a way to multiply by experts."""
        self.model.set_experts_implementation(way)
        return self.generate(prompts, new_tokens, "dynamic")

    @torch.inference_mode()
    def guided(
        self,
        prompts: np.ndarray,
        new_tokens: int,
        head: tuple[np.ndarray, np.ndarray],
        temperature: float,
        scale: float,
    ) -> np.ndarray:
        """Greedy tokens of temper, then tilt, with a key-value cache and a running mean.

        The head is U `[R, D]` and W2 `[V, R]`, the temperature T, the scale s. Prompts are `[B, P]`
        and the result `[B, new_tokens]`.
        """
        projection, output = (torch.from_numpy(part).to(self.device) for part in head)
        read = torch.from_numpy(prompts).long().to(self.device)
        cache = transformers.DynamicCache(config=self.model.config)
        total, count, chosen = 0.0, 0, []
        for _ in range(new_tokens):
            hidden = self.model.model(
                input_ids=read, past_key_values=cache, use_cache=True
            ).last_hidden_state
            total = total + hidden.float().sum(dim=1)
            count += read.shape[1]
            logits = self.model.lm_head(hidden[:, -1]).float()
            scores = (total / count) @ projection.T @ output.T
            # The normalisers change no argmax.
            guided = logits / temperature + scale * functional.logsigmoid(scores)
            read = guided.argmax(dim=-1, keepdim=True)
            chosen.append(read)
        return torch.cat(chosen, dim=1).cpu().numpy()

    @torch.inference_mode()
    def forward(self, texts: Sequence[np.ndarray], rows: int) -> None:
        """Hidden states of texts, batches of like length."""
        for batch in _batch_by_length(texts, rows):
            tokens, mask = self._pad([texts[i] for i in batch])
            self.model.model(input_ids=tokens, attention_mask=mask, use_cache=False)
        _wait()

    @torch.inference_mode()
    def losses(self, texts: Sequence[np.ndarray], starts: Sequence[int], rows: int) -> list[float]:
        """Mean cross-entropy of each text from its start on; logits of those positions only."""
        losses = [0.0] * len(texts)
        for batch in _batch_by_length(texts, rows):
            tokens, mask = self._pad([texts[i] for i in batch])
            hidden = self.model.model(input_ids=tokens, attention_mask=mask).last_hidden_state
            for row, i in enumerate(batch):
                start, stop = starts[i], len(texts[i])
                logits = self.model.lm_head(hidden[row, start - 1 : stop - 1])
                losses[i] = float(functional.cross_entropy(logits, tokens[row, start:stop]))
        return losses

    @torch.inference_mode()
    def answers(
        self, prompts: Sequence[np.ndarray], rows: int, max_new_tokens: int
    ) -> list[list[int]]:
        """Greedy answers, up to and with the first end-of-text token."""
        self.model.generation_config.eos_token_id = self.ends
        ends = self.ends if isinstance(self.ends, list) else [self.ends]
        answers: list[list[int]] = [[] for _ in prompts]
        for batch in _batch_by_length(prompts, rows):
            tokens, mask = self._pad([prompts[i] for i in batch], left=True)
            out = self.model.generate(
                tokens,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=max_new_tokens,
                pad_token_id=0,
            )
            for row, i in enumerate(batch):
                answer = out[row, tokens.shape[1] :].tolist()
                stops = [at for at, token in enumerate(answer) if token in ends]
                answers[i] = answer[: stops[0] + 1] if stops else answer
        return answers

    def _pad(self, texts: Sequence[np.ndarray], left: bool = False) -> list[torch.Tensor]:
        return [part.to(self.device) for part in _pad(texts, left)]


class HeadTrainer:
    """Trains heads: `g(v) = W2[v] · U hbar` by AdamW, warm-up and decay, clipped gradients.

    Only the rows of W2 that a batch names are multiplied; V-wide scores are never formed.
    """

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        rank: int,
        folder: str | None = None,
        device: str = "cpu",
    ):
        self.sizes, self.device = (hidden_size, rank, vocab_size), device
        self.base: Any = folder and LanguageModel(folder).model.model

    def store(
        self, pooled: np.ndarray, targets: np.ndarray, forget_start: int, batches: list[np.ndarray]
    ) -> None:
        """Stores features, and the rows of each batch, indexed and labelled."""
        self.pooled = torch.from_numpy(pooled).to(self.device)
        self.targets = torch.from_numpy(targets).long().to(self.device)
        rows = [torch.from_numpy(batch).to(self.device) for batch in batches]
        self.batches = [
            (index, self.targets[index], (index < forget_start).float()) for index in rows
        ]

    def train(self, optimizer: str, steps: int, rate: float, decay: float) -> list[float]:
        """Trains a head on the stored features; returns the loss of every step.

        `optimizer` is an implementation of AdamW: "for-loop", "foreach" or "fused". A quarter of
        the steps is warm-up.
        """
        step = self._make_step(optimizer, steps, rate, decay)
        losses = [
            step(self.pooled[index], targets, labels)
            for index, targets, labels in self.batches[:steps]
        ]
        return torch.stack(losses).tolist()

    def rerun(
        self, texts: list[np.ndarray], starts: list[int], retain: list[bool], steps: int
    ) -> float:
        """Seconds of the fastest step that runs the base model, as the reference does."""
        step = self._make_step("fused", 1000, 1e-2, 1e-2)
        tokens, mask = _pad(texts)
        answer = torch.zeros(tokens.shape, dtype=torch.bool)
        for row, start in enumerate(starts):
            answer[row, start : len(texts[row])] = True
        labels = torch.tensor(retain).float()[:, None].expand(tokens.shape)[answer]

        def work() -> None:
            with torch.no_grad():
                hidden = self.base(input_ids=tokens, attention_mask=mask).last_hidden_state
                # Padding is on the right: no answer's mean reads it.
                count = torch.arange(1, tokens.shape[1] + 1)[:, None]
                pooled = (hidden.cumsum(dim=1) / count)[:, :-1][answer[:, 1:]]
            step(pooled, tokens[answer], labels)

        return min(_time(work, steps))

    def _make_step(
        self, optimizer: str, steps: int, rate: float, decay: float
    ) -> Callable[..., torch.Tensor]:
        """A step of a new head: features, targets and labels of a batch to its loss."""
        width, rank, vocab = self.sizes
        torch.manual_seed(0)
        projection = torch.nn.Linear(width, rank, bias=False, device=self.device).weight
        output = torch.nn.Linear(rank, vocab, bias=False, device=self.device).weight
        how: dict[str, Any] = {} if optimizer == "for-loop" else {optimizer: True}
        adamw = torch.optim.AdamW([projection, output], lr=rate, weight_decay=decay, **how)
        schedule = transformers.get_linear_schedule_with_warmup(adamw, steps // 4, steps)

        def step(pooled: torch.Tensor, targets: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            hidden = pooled @ projection.T
            scores = (hidden * functional.embedding(targets, output)).sum(dim=-1)
            loss = functional.binary_cross_entropy_with_logits(scores, labels)
            adamw.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([projection, output], 1.0)
            adamw.step()
            schedule.step()
            return loss.detach()

        return step


def _time(work: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each repeat, after a first one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        _wait()
        times.append(time.perf_counter() - start)
    return times[1:]


def _wait() -> None:
    """Waits until an accelerator is idle."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _batch_by_length(texts: Sequence[np.ndarray], rows: int) -> Iterator[list[int]]:
    """Indices of texts of like length, batch by batch."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for first in range(0, len(order), rows):
        yield order[first : first + rows]


def _pad(texts: Sequence[np.ndarray], left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and mask `[B, T]`."""
    width = max(map(len, texts))
    tokens = torch.zeros((len(texts), width), dtype=torch.long)
    mask = torch.zeros((len(texts), width), dtype=torch.long)
    for row, text in enumerate(texts):
        place = slice(width - len(text), width) if left else slice(0, len(text))
        tokens[row, place] = torch.from_numpy(np.asarray(text)).long()
        mask[row, place] = 1
    return tokens, mask
