"""What is refused before weights are loaded: fields by themselves, and all that a script reads."""

import dataclasses
import errno
import json
import math

import jax
import pytest
import tiny

from configs import default, demo, demo_paper, llama31_tofu, paper, smollm2, smollm2_tofu
from t3jax import cli, files, hosts, ranges, sharding
from t3jax.commands import evaluate, experiment, finetune, sample, sweep, train, verify
from t3jax.evaluation import Setting
from t3jax.finetuning import FinetuneConfig
from t3jax.head_io import save_head
from t3jax.lm import save_hf
from t3jax.settings import expected, names_of
from t3jax.training import TrainConfig, make_members


@pytest.mark.parametrize(
    "module", [default, demo, demo_paper, llama31_tofu, paper, smollm2, smollm2_tofu]
)
def test_the_configs_that_ship_are_taken(module):
    tiny.make_settings(module)


def test_variables_of_the_chat_template_are_json():
    field = "prompt_format.chat_template_kwargs"
    made = tiny.make_settings(default, {field: '{"enable_thinking": true}'})
    assert made.prompt_format.chat_template_kwargs == {"enable_thinking": True}
    for value, wrong in (("{'a': 1}", "not valid JSON"), ("[1]", "an object"), ('{"": 1}', "")):
        with pytest.raises(ValueError, match=f"chat_template_kwargs.*{wrong}"):
            tiny.make_settings(default, {field: value})


def test_every_number_of_the_default_config_has_a_range():
    config = default.get_config()
    for name in names_of():
        section, _, field = name.rpartition(".")
        value = (config[section] if section else config)[field]
        known = value[0] if isinstance(value, tuple) and value else value
        if isinstance(known, int | float) and not isinstance(known, bool):
            assert expected(name) not in ("", "a whole number", "a finite number"), name


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("rows", (0, -1, 2**20)),
        ("classifier.rank", (0, 10**9)),
        ("sampling.temperature", (math.nan, math.inf, -0.1)),
        ("sampling.max_new_tokens", (0, 10**9)),
        ("sampling.seed", (-1, 2**64)),
        ("finetune.seed", (-1, 2**32)),
        ("seeds", ((), (1, 1), (-1,), (2**32,), (1.5,), (True,), ("a",))),
        ("train.epochs", (0,)),
        ("train.holdout_fraction", (1.0, -0.1, math.nan)),
        ("train.warmup_ratio", (1.1, math.nan)),
        ("leaks.samples", (-1,)),
        ("eval.rows", (0,)),
        ("mesh", ((1.5, 1, 1), ("a",), (), (-2, 1, 1))),
        ("base_temperature", (0.0, math.inf, math.nan)),
        ("guidance_scale", (-1.0, math.nan)),
        ("eval.base_temperatures", ((1.0, 0.0),)),
        ("forget_fraction", (0.0, 1.0, math.nan)),
        ("sampling.top_p", (0.0, 1.5)),
        ("sweep.ranks", ((1, 0),)),
        ("sampling.truncate_on", ("bases",)),
        ("train.loss", ("none",)),
        ("refinements", ("gate", "plain,gated")),
        ("eval.refinements", ("plain,gate",)),
        ("model", ("", "None", "a\0b", "\ud800")),
        ("synthetic.names", (("Ada", ""), (1,))),
    ],
)
def test_a_value_out_of_its_range_is_named(field, values):
    for value in values:
        with pytest.raises(ValueError, match=rf"^config\.{field} = .*: expected ") as error:
            tiny.make_settings(default, {field: value})
        assert "\n" not in str(error.value)


def test_seeds_that_are_taken_draw_differently():
    largest = int(ranges.SEED.high)
    drawn = [jax.random.key_data(jax.random.key(seed)).tolist() for seed in (0, 1, largest)]
    assert len({tuple(each) for each in drawn}) == 3


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        (
            TrainConfig,
            {
                "learning_rate": (math.inf, math.nan),
                "weight_decay": (math.inf, math.nan),
                "retain_weight": (math.inf,),
                "distilled_temperature": (math.inf,),
                "b1": (1.0, math.nan),
                "eps": (0.0,),
            },
        ),
        (
            FinetuneConfig,
            {
                "learning_rate": (math.inf, math.nan),
                "weight_decay": (math.inf,),
                "b2": (math.nan,),
                "seed": (2**32, -1),
            },
        ),
    ],
)
def test_options_refuse_what_is_not_finite(options, fields):
    for name, values in fields.items():
        for value in values:
            with pytest.raises(ValueError, match=name):
                options(**{name: value})


def test_settings_and_members_refuse_what_is_not_finite():
    for knobs in ({"base_temperature": math.inf}, {"guidance_scale": math.inf}):
        with pytest.raises(ValueError, match="finite"):
            Setting("a", heads=(0,), **knobs)
    with pytest.raises(ValueError, match=r"\[0, 2\^32\)"):
        make_members([TrainConfig()], [2**32])
    with pytest.raises(ValueError, match="three positive whole numbers"):
        sharding.make_mesh((0, 1, 1))


def test_processes_count_from_zero(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    for count, index in ((0, 0), (2, 2)):
        monkeypatch.setenv("JAX_NUM_PROCESSES", str(count))
        monkeypatch.setenv("JAX_PROCESS_ID", str(index))
        with pytest.raises(ValueError, match="ids that count from 0"):
            hosts.initialize("on")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, a head that fits it and one that does not, rows, and a bad file."""
    folder = tmp_path_factory.mktemp("preflight")
    tokenizer = tiny.make_tokenizer()
    save_hf(folder / "model", tiny.CONFIG, tiny.make_params(), [tokenizer.eos_token_id])
    tokenizer.save_pretrained(folder / "model")
    head = tiny.make_head(tiny.make_lm())
    save_head(folder / "head", head)
    save_head(folder / "other-T", dataclasses.replace(head, base_temperature=1.0))
    wide = tiny.make_lm(dataclasses.replace(tiny.CONFIG, hidden_size=64))
    save_head(folder / "wide", tiny.make_head(wide))
    (folder / "unweighed").mkdir()
    (folder / "unweighed" / "config.json").write_text(
        (folder / "model" / "config.json").read_text()
    )
    (folder / "rows.jsonl").write_text(json.dumps({"question": "Who?", "answer": "Ada."}) + "\n")
    (folder / "bad.jsonl").write_text('{"question": "Who?"}\n')
    (folder / "file").write_text("")
    return folder


FIELDS = {
    sample: {"head": "head", "prompts": "rows.jsonl", "output": "new/answers.jsonl"},
    verify: {"head": "head", "forget": "rows.jsonl", "retain": "rows.jsonl"},
    evaluate: {"head": "head", "eval.forget": "rows.jsonl", "eval.dir": "evaluation"},
    train: {
        "forget": "rows.jsonl",
        "retain": "rows.jsonl",
        "workdir": "run",
        "feature_store": "features",
    },
    finetune: {"finetune.data": ("rows.jsonl",), "finetune.workdir": "tuned"},
}
FIELDS[sweep] = FIELDS[train] | {
    "eval.forget": "rows.jsonl",
    "eval.retain": "rows.jsonl",
    "eval.dir": "evaluation",
    "eval.retain_model": "model",
}
FIELDS[experiment] = {
    name: FIELDS[sweep][name] for name in ("forget", "retain", "eval.forget", "eval.retain")
} | {"experiment.dir": "experiment"}


@pytest.mark.parametrize(
    ("script", "changed", "message"),
    [
        (sample, {"head": None}, "no head: .* --config.base_only=True"),
        (sample, {"head": "wide"}, "wide on .*/model: the head does not fit"),
        (sample, {"head": "nowhere"}, "nowhere: no such folder"),
        (sample, {"head": "head,other-T"}, "the heads differ in base_temperature"),
        (sample, {"prompts": "nowhere.jsonl"}, "nowhere.jsonl does not exist"),
        (sample, {"output": "file/answers.jsonl"}, "file: nothing can be written here"),
        (sample, {"output": "model"}, "expected a file, not a folder"),
        (sample, {"sampling.max_new_tokens": 256}, "expected less than the 256 tokens"),
        (sample, {"model": "unweighed"}, "unweighed: "),
        (
            sample,
            {"sampling.refusal": "I don't know."},
            "config.sampling.refusal needs T = 1, which is 2.5",
        ),
        (sample, {"base_only": True, "refinements": "gated"}, "they need a head"),
        (verify, {"head": "wide"}, "the head does not fit"),
        (verify, {"retain": "bad.jsonl"}, "bad.jsonl:1"),
        (verify, {"verify.dir": "file/verify"}, "file/verify: nothing can be written here"),
        (evaluate, {"head": "wide"}, "the head does not fit"),
        (evaluate, {"eval.retain": "bad.jsonl"}, "bad.jsonl:1"),
        (evaluate, {"eval.retain_model": "nowhere"}, "nowhere"),
        (evaluate, {"eval.retain_log": "nowhere"}, "nowhere"),
        (evaluate, {"eval.dir": "file"}, "file: nothing can be written here"),
        (train, {"forget": "bad.jsonl"}, "bad.jsonl:1"),
        (train, {"workdir": "file/run"}, "file/run: nothing can be written here"),
        (train, {"feature_store": "file/f"}, "file/f: nothing can be written here"),
        (train, {"classifier.init": "nowhere"}, "nowhere: no such folder"),
        (
            train,
            {"classifier.init": "wide"},
            "wide': the head to start at has hidden_size",
        ),
        (sweep, {"classifier.init": "wide"}, "wide': the head to start at has hidden_size"),
        (train, {"train.patience": 3, "train.holdout_fraction": 0.0}, "patience"),
        (finetune, {"finetune.data": ("rows.jsonl", "bad.jsonl")}, "bad.jsonl:1"),
        (finetune, {"finetune.microbatches": 64}, "microbatches"),
        (finetune, {"finetune.workdir": "file"}, "file: nothing can be written here"),
        (sweep, {"eval.retain_model": "nowhere"}, "nowhere"),
        (sweep, {"eval.forget": "bad.jsonl"}, "bad.jsonl:1"),
        (experiment, {"experiment.plain_chat": "bad.jsonl"}, "bad.jsonl:1"),
        (experiment, {"experiment.dir": "file"}, "file: nothing can be written here"),
    ],
)
def test_scripts_find_what_is_wrong_before_weights_are_loaded(
    folder, monkeypatch, script, changed, message
):
    def loaded(*_, **__):
        raise AssertionError("weights were loaded")

    for module in ("", ".pipeline.models", ".pipeline.evaluation", ".study.experiment"):
        monkeypatch.setattr(f"t3jax{module}.load_lm", loaded)

    def place(value):
        if isinstance(value, tuple):
            return tuple(map(place, value))
        return ",".join(str(folder / part) for part in value.split(","))

    fields = {"model": str(folder / "model")}
    before = set(folder.rglob("*"))
    for name, value in (FIELDS[script] | changed).items():
        is_path = isinstance(value, str | tuple) and name not in ("refinements", "sampling.refusal")
        fields[name] = place(value) if is_path else value
    with pytest.raises((ValueError, OSError), match=message):
        script.main(tiny.make_settings(default, fields))
    assert set(folder.rglob("*")) == before


def test_an_evaluation_without_a_head_says_so(folder, monkeypatch, capsys):
    values = {"model": "model", "eval.forget": "bad.jsonl", "eval.dir": "e"}
    fields = {name: str(folder / value) for name, value in values.items()}
    with pytest.raises(ValueError, match=r"bad\.jsonl"):
        evaluate.main(tiny.make_settings(default, fields))
    assert "nothing is unlearned" in capsys.readouterr().out


def test_a_pages_long_error_of_a_full_disk_is_one_line():
    inner = ValueError("OUT_OF_RANGE: (\n" + "line\n" * 2000 + "No space left on device)")
    error = OSError(f"run: the checkpoint of epoch 3 could not be saved ({inner}); make room")
    error.__cause__ = inner
    assert cli._one_line(error) == (
        "run: the checkpoint of epoch 3 could not be saved; make room (No space left on device)"
    )
    named = OSError(errno.ENOSPC, "No space left on device", "a/b.json")
    assert cli._one_line(named).startswith("a/b.json: No space left on device; make room")
    assert cli._one_line(KeyError("a")) is None
    assert "lower config.rows" in cli._one_line(RuntimeError("RESOURCE_EXHAUSTED: Out of memory"))


def test_what_cannot_be_written_to_is_known_before(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="nothing can be written here"):
        files.check_writable(tmp_path / "file" / "below")
    files.check_writable(tmp_path / "new" / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
