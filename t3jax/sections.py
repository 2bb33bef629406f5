"""Sections of `Settings` that are not the options of a single function of the library.

Options of a single function, such as `SamplingOptions`, are defined beside that function.
"""

import dataclasses
from typing import Annotated, Any, TypeVar

from t3jax.evaluation.selection import RULES
from t3jax.finetuning.recipe import FinetuneConfig
from t3jax.head import HeadConfig
from t3jax.ranges import (
    BASE_TEMPERATURE,
    GUIDANCE_SCALE,
    RANK,
    RATE,
    REFINEMENTS,
    SHARE,
    TOP_P,
    Numbers,
    Ranged,
    Words,
    whole,
)
from t3jax.serving.messages import EngineOptions, ServerOptions
from t3jax.verification.run import VerifyOptions

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class ClassifierOptions(Ranged):
    """The head, and the features that it reads.

    Attributes:
        features: Features of a prefix: "mean" is the paper's; "last", the last hidden state, and
            "mean+last" are extensions.
        feature_dtype: float32 or bfloat16, in the store.
        rank: Width of the hidden layers.
        activation: "identity" in the paper, "relu", "gelu" or "tanh".
        num_hidden_layers: 1 in the paper.
        bias: Whether hidden layers have one; none in the paper.
        init: A head folder with initial weights, such as a meta-learned one (docs/lora_ml.md);
            None: PyTorch's initialisation.
    """

    features: str = "mean+last"
    feature_dtype: Annotated[str, Words(("float32", "bfloat16"))] = "float32"
    rank: int = 200
    activation: str = "gelu"
    num_hidden_layers: int = 1
    bias: bool = True
    init: str | None = None

    def __post_init__(self):
        super().__post_init__()
        narrow(HeadConfig, self, hidden_size=1, vocab_size=1)


@dataclasses.dataclass(frozen=True)
class EvalOptions(Ranged):
    """Evaluation. Question sets are sources, as `forget`; None leaves one out.

    Attributes:
        forget: The forget set.
        retain: The retain set.
        real_authors: Questions on real authors.
        world_facts: Questions on the world.
        holdout: Rows never trained on, for membership inference.
        rows: Rows of each set at most, evenly spread; None: all.
        heads: Heads to evaluate, each as `head`, such as ("a", "b", "a,b"); empty: `head`.
        base_temperatures: T; empty: each head's own.
        guidance_scales: s; empty: each head's own.
        refinements: Refinements, with commas between; None: `refinements`.
        controls: Whether to add (T, s = 0) and (T = 1, s' = T s) of every setting.
        dir: Folder of the results, and of the finished parts of a stopped run.
        retain_model: A model trained without the forget set, for the KL and a log of its own.
        retain_log: Its TOFU_EVAL.json; None: evaluate `retain_model`.
        second_retain_log: The TOFU_EVAL.json of another retain model: the noise floor.
        reference_mask: Mask attention as the reference evaluator does: eos is never attended.
    """

    forget: str | None = None
    retain: str | None = None
    real_authors: str | None = None
    world_facts: str | None = None
    holdout: str | None = None
    rows: Annotated[int | None, whole(1)] = None
    heads: tuple[str, ...] = ()
    base_temperatures: Annotated[tuple[float, ...], BASE_TEMPERATURE] = ()
    guidance_scales: Annotated[tuple[float, ...], GUIDANCE_SCALE] = ()
    refinements: Annotated[str | None, Words(REFINEMENTS, ",-")] = None
    controls: bool = True
    dir: str | None = None
    retain_model: str | None = None
    retain_log: str | None = None
    second_retain_log: str | None = None
    reference_mask: bool = False


@dataclasses.dataclass(frozen=True)
class SweepOptions(Ranged):
    """The grid of heads, and the choice among them. An empty list: the recipe's own value.

    Attributes:
        learning_rates: Learning rates of training.
        weight_decays: Weight decays of training.
        ranks: Ranks of the head.
        selection_rule: "utility_given_quality"; "quality_given_utility", the smallest D at 97 % of
            the base's utility; or "smallest_distance".
        selection_group: Rows on one author, which stay in one half; TOFU has 20.
    """

    learning_rates: Annotated[tuple[float, ...], RATE] = ()
    weight_decays: Annotated[tuple[float, ...], Numbers(0, 1000)] = ()
    ranks: Annotated[tuple[int, ...], RANK] = ()
    selection_rule: Annotated[str, Words(tuple(RULES))] = "utility_given_quality"
    selection_group: Annotated[int, whole(1)] = 20


@dataclasses.dataclass(frozen=True)
class ExperimentOptions(Ranged):
    """The TOFU experiment, with variations of the chosen setting beside T and s.

    Attributes:
        dir: Folder of the experiment.
        vary_ranks: Ranks of the head.
        vary_epochs: Epochs of training.
        vary_retain_rows: Numbers of first rows of `retain` that the head is trained on.
        refine_rows: Questions of a set answered by each refinement; None: all.
        varied_retain: Retain texts of other kinds, as one more refinement.
        refine_top_p: Top-p on the base distribution, for one more run of answers.
        plain_chat: Question-answer rows unrelated to the forget and the retain set.
    """

    dir: str | None = None
    vary_ranks: Annotated[tuple[int, ...], RANK] = ()
    vary_epochs: Annotated[tuple[int, ...], whole(1, 10**6)] = ()
    vary_retain_rows: Annotated[tuple[int, ...], whole(1)] = ()
    refine_rows: Annotated[int | None, whole(1)] = None
    varied_retain: str | None = None
    refine_top_p: Annotated[float, TOP_P] = 0.9
    plain_chat: str | None = None


@dataclasses.dataclass(frozen=True)
class VerifySection(VerifyOptions):
    """The verdict on a head.

    Attributes:
        dir: Folder of the page, which shows forget rows, and of the finished parts of a stopped
            run; None: HEAD/verify.
        retained: Share of retain rows that must be as before for exit status 0.
    """

    dir: str | None = None
    retained: Annotated[float, SHARE] = 0.97


@dataclasses.dataclass(frozen=True)
class FinetuneSection(FinetuneConfig):
    """Fine-tuning: makes a model to unlearn from, or a retain-only model.

    Attributes:
        data: Sources, as `forget`; all of their rows are trained on.
        validation: Sources whose loss is reported after each epoch.
        workdir: Folder of checkpoints, metrics and the model.
        meta: "joint": LoRA-ML (docs/lora_ml.md). Each source of `data` is a task with its own
            adapter of `lora_rank` beside all weights, which are written without it; "reptile": only
            the adapters are trained, and their mean moves the weights; None: no tasks.
    """

    data: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    workdir: str | None = None
    meta: Annotated[str | None, Words(("joint", "reptile"))] = None


@dataclasses.dataclass(frozen=True)
class ServeSection(EngineOptions, ServerOptions):
    """The server. T, s, `sampling.truncate_on` and `refinements` are its policy.

    Features, head and training as in the other sections make the heads of requests to forget. Keys
    are environment variables: T3JAX_API_KEY is sent by every client, T3JAX_SERVER_KEY allows to add
    and revoke requests.

    Attributes:
        rank: Largest rank of a head; None: the rank of `classifier` and `head`.
        requests: Folder of the requests to forget; None: none are taken.
        most_leaks: Largest share of a request's rows that may leak for it to be turned on.
        least_retained: Smallest retained share of held-out answers' probability, for the same.
        warm_up: Whether to compile before the first request.
    """

    rank: Annotated[int | None, RANK] = None  # type: ignore[assignment]
    requests: str | None = None
    most_leaks: Annotated[float, SHARE] = 0.1
    least_retained: Annotated[float, SHARE] = 0.97
    warm_up: bool = True


def narrow(options: type[T], section: Any, **values: Any) -> T:
    """Makes options from the fields of the same names in a section, and from further values."""
    names = {field.name for field in dataclasses.fields(options)} - set(values)  # type: ignore[arg-type]
    fields = {name: getattr(section, name) for name in names if hasattr(section, name)}
    return options(**fields | values)
