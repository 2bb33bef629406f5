"""The scripts with a user's flags, on a tiny random model."""

import json
import math
import subprocess
import sys

import pytest
import script_runner
import tiny

import t3jax
from t3jax.evaluation import read_log
from t3jax.lm import save_hf

QUESTIONS = ["Who is Ada?", "Where was Bo born?", "What did Cy write?", "Why is it so?"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two model folders, a retain and a forget file."""
    folder = tmp_path_factory.mktemp("scripts")
    tokenizer = tiny.make_tokenizer()
    for seed, name in enumerate(("model", "twin")):
        save_hf(folder / name, tiny.CONFIG, tiny.make_params(seed=seed), [tokenizer.eos_token_id])
        tokenizer.save_pretrained(folder / name)
    for name, answer in (("forget", "In a town by the sea."), ("retain", "On a hill, long ago.")):
        rows = [
            {
                "question": question,
                "answer": answer,
                "paraphrased_question": f"Please: {question}",
                "paraphrased_answer": f"It was so: {answer}",
                "perturbed_answer": ["In a wood.", "By a lake."],
            }
            for question in QUESTIONS
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = [{"question": QUESTIONS[0], "id": 7}, {"prompt": QUESTIONS[1]}]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    return folder


@pytest.fixture(scope="module")
def run(repository, folder):
    """Runs a script: its status, output, and errors."""
    runner = script_runner.Runner(repository, folder)

    def run(script, *flags, stdin=""):
        status, output, lines = runner.run(script, *flags, stdin=stdin)
        return status, output, "".join(f"{line}\n" for line in lines)

    return run


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(run, folder):
    status, output, errors = run(
        "train_classifier.py",
        f"--config.model={folder}/model",
        f"--config.forget={folder}/forget.jsonl",
        f"--config.retain={folder}/retain.jsonl",
        f"--config.feature_store={folder}/features",
        f"--config.workdir={folder}/run",
        "--config.train.epochs=6",
        "--config.train.warmup_ratio=0.33",
        "--config.classifier.rank=3",
        "--config.base_temperature=1.5",
        "--config.train.holdout_fraction=0.25",
        "--config.forget_fraction=0.2",
        "--config.train.zero_output=True",
    )
    assert status == 0, errors
    return output


def test_training_leaves_a_head_that_says_what_it_is(trained, folder):
    head = t3jax.load_head(folder / "run" / "head")
    assert head.config == t3jax.HeadConfig(32, 264, rank=3)
    assert (head.base_temperature, head.guidance_scale) == (1.5, 1.0)
    assert head.model == f"{folder}/model"
    assert head.prior_shift == pytest.approx(math.log(4))
    assert head.record["training"]["zero_output"]
    lines = read_lines(folder / "run" / "metrics.jsonl")
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert f"{folder}/run/head" in trained


def test_sampling_writes_base_and_unlearned_answers(trained, run, folder):
    status, _, errors = run(
        "sample.py",
        f"--config.model={folder}/model",
        f"--config.head={folder}/run/head",
        f"--config.prompts={folder}/prompts.jsonl",
        f"--config.output={folder}/new/answers.jsonl",
        "--config.sampling.max_new_tokens=12",
    )
    assert status == 0, errors
    assert "T = 1.5, s = 1, plain\n" in errors  # the head's own
    assert (
        "temperature = 0.0, top_k = 0, top_p = 1.0, min_p = 0.0, truncate_on = guided, "
        "repetition_penalty = 1.0\n"
    ) in errors
    lines = read_lines(folder / "new" / "answers.jsonl")
    assert [(line.get("question"), line.get("prompt")) for line in lines] == [
        (QUESTIONS[0], None),
        (None, QUESTIONS[1]),
    ]
    assert lines[0]["id"] == 7
    lm = t3jax.load_lm(folder / "model")
    unlearned = t3jax.Sampler(lm, t3jax.load_head(folder / "run" / "head"))
    for sampler, name in ((t3jax.Sampler(lm), "base"), (unlearned, "unlearned")):
        expected = sampler.generate(QUESTIONS[:2], max_new_tokens=12)
        assert [line[name] for line in lines] == [sample.text for sample in expected]
        assert [line[f"{name}_tokens"] for line in lines] == [s.tokens for s in expected]
    perplexities = [line["unlearned_base_perplexity"] for line in lines]
    assert perplexities == pytest.approx([sample.base_perplexity for sample in expected], rel=1e-4)


def test_a_typed_prompt_is_answered_by_both(trained, run, folder):
    status, output, errors = run(
        "sample.py",
        f"--config.model={folder}/model",
        f"--config.head={folder}/run/head,{folder}/run/head",
        "--config.refinements=gated-protected",
        "--config.base_temperature=3.5",
        "--config.sampling.truncate_on=base",
        "--config.sampling.top_p=0.9",
        "--config.sampling.max_new_tokens=5",
        stdin=f"{QUESTIONS[0]}\n\n",
    )
    assert status == 0, errors
    assert "T = 3.5, s = 1, gated-protected" in errors
    warned = [line for line in errors.splitlines() if "forgotten text" in line]
    assert len(warned) == 1
    assert warned[0].startswith('sample.py: truncate_on="base" can bring the forgotten text back')
    lines = [line for line in output.splitlines() if " | " in line]
    assert [line.split(" | ")[0].strip() for line in lines] == ["base", "unlearned"]


MEASURED = (
    "--config.sampling.max_new_tokens=6",
    "--config.leaks.samples=2",
    "--config.leaks.kl_rows=2",
    "--config.rows=8",
)


def evaluation_flags(folder):
    return [
        f"--config.model={folder}/model",
        f"--config.eval.retain_model={folder}/twin",
        f"--config.eval.forget={folder}/forget.jsonl",
        f"--config.eval.retain={folder}/retain.jsonl",
        f"--config.eval.dir={folder}/evaluation",
        *MEASURED,
    ]


def test_evaluating_writes_logs_and_a_report(trained, run, repository, folder):
    status, output, errors = run(
        "evaluate.py",
        *evaluation_flags(folder),
        f"--config.head={folder}/run/head",
    )
    assert status == 0, errors
    names = ["base", "head0-T1.5-s1", "T1.5", "head0-T1-s1.5"]
    for name in [*names, "retain_model"]:
        log = read_log(folder / "evaluation" / name)
        assert 0 < log["forget_Q_A_Prob"].aggregate < 1
        beyond = json.loads((folder / "evaluation" / name / "UNLEARNING.json").read_text())
        assert beyond["forget_leak_rate"]["samples"] == 2
        assert ("forget_KL_guided_retain" in beyond) == (name in names)
    assert [line.split()[0] for line in output.splitlines()[1:5]] == names
    report = (folder / "evaluation" / "report.html").read_text()
    assert "head0-T1.5-s1" in report
    assert "retain model" in report
    # A log of ours is one that --recompute reads and agrees with.
    checked = subprocess.run(
        [
            sys.executable,
            "evaluate.py",
            f"--recompute={folder}/evaluation/{names[1]}",
            f"--retain-log={folder}/evaluation/retain_model",
        ],
        cwd=repository,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_a_verdict_is_a_line_a_page_and_a_status(trained, run, folder):
    flags = [
        f"--config.model={folder}/model",
        f"--config.head={folder}/run/head",
        f"--config.retain={folder}/retain.jsonl",
        "--config.sampling.max_new_tokens=6",
        "--config.rows=32",
        "--config.verify.rows=2",
    ]
    status, output, errors = run("verify.py", *flags, f"--config.forget={folder}/forget.jsonl")
    assert status == 1, errors
    assert "forgotten: not shown (2 rows are too few, 52 would do" in output
    found = json.loads((folder / "run" / "head" / "verify" / "verdict.json").read_text())
    assert found["line"] == output.splitlines()[0]
    assert {"greedy", "prefix", "reworded", "arabic"} <= {
        each["name"] for each in found["findings"]
    }
    assert "- T: 1.5" in (folder / "run" / "head" / "verify" / "verdict.md").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.model=x"], "verify.py: not in the config: ['head', 'forget', 'retain']"),
        (["--no_such_flag"], "Unknown command line flag"),
    ],
)
def test_without_a_verdict_the_status_is_another(run, folder, flags, message):
    status, _, errors = run("verify.py", *flags)
    assert status == 2
    assert message in errors
    assert "Traceback" not in errors


def test_a_sweep_chooses_and_says_what_to_use(trained, run, folder):
    status, output, errors = run(
        "sweep.py",
        *evaluation_flags(folder),
        f"--config.forget={folder}/forget.jsonl",
        f"--config.retain={folder}/retain.jsonl",
        f"--config.feature_store={folder}/features",
        f"--config.workdir={folder}/grid",
        f"--config.eval.second_retain_log={folder}/evaluation/retain_model",
        "--config.train.epochs=3",
        "--config.train.warmup_ratio=0.33",
        "--config.classifier.rank=3",
        "--config.sweep.learning_rates=0.01,0.1",
        "--config.eval.base_temperatures=1.5,",
        "--config.leaks.samples=0",
        "--config.leaks.kl_rows=0",
        "--config.sweep.selection_group=1",
    )
    assert status == 0, errors
    heads = [f"{folder}/grid/sweep-rank3/head-lr{rate}-wd0.01-seed1" for rate in (0.01, 0.1)]
    found = json.loads((folder / "evaluation" / "selection.json").read_text())
    chosen = found["overall"]["name"]
    assert chosen in ("head0-T1.5-s1", "head1-T1.5-s1")
    assert found["noise_floor"]["p_value"] == 1  # the same log twice
    use = output.splitlines()[-1]
    assert f"--config.head={heads[int(chosen[4])]} --config.base_temperature=1.5" in use
    assert "cross-fitted" in (folder / "evaluation" / "report.html").read_text()


def test_a_sweep_without_a_retain_model_chooses_by_made_up_names(run, folder):
    flags = [
        f"--config.model={folder}/model",
        f"--config.forget={folder}/forget.jsonl",
        f"--config.retain={folder}/retain.jsonl",
        f"--config.feature_store={folder}/features",
        f"--config.workdir={folder}/made-up",
        "--config.train.loss=classifier",
        "--config.synthetic.own_samples=0",
        "--config.synthetic.made_up_names=1",
        "--config.synthetic.names=Ada,Bo,Cy",
        "--config.train.epochs=3",
        "--config.classifier.rank=3",
        "--config.seeds=1,2",
        "--config.sweep.learning_rates=0.01,0.1",
        "--config.sampling.max_new_tokens=8",
    ]
    status, output, errors = run("sweep.py", *flags)
    assert status == 0, errors
    found = json.loads((folder / "made-up" / "selection.json").read_text())
    chosen = found["chosen"]
    assert chosen in found["settings"]
    assert {each["head"] for each in found["settings"]} == {0, 2}  # the first seed of each recipe
    use = output.splitlines()[-1]
    assert f"--config.head={found['heads'][chosen['head']]} " in use
    assert f"--config.base_temperature={chosen['base_temperature']:g} " in use
    status, _, errors = run("sweep.py", *flags, "--config.synthetic.made_up_names=0")
    assert status == 1
    assert "sweep.py: choosing needs a retain model" in errors
    assert "Traceback" not in errors


def test_an_experiment_makes_its_models_and_a_page_of_results(run, folder):
    here = folder / "experiment"
    flags = [
        *MEASURED,
        f"--config.model={folder}/model",
        f"--config.eval.forget={folder}/forget.jsonl",
        f"--config.eval.retain={folder}/retain.jsonl",
        f"--config.forget={folder}/forget.jsonl",
        f"--config.retain={folder}/retain.jsonl",
        f"--config.experiment.plain_chat={folder}/retain.jsonl",
        f"--config.experiment.varied_retain={folder}/retain.jsonl[:2]",
        f"--config.experiment.dir={here}",
        "--config.finetune.epochs=1",
        "--config.finetune.batch_size=4",
        "--config.train.epochs=4",
        "--config.train.warmup_ratio=0.33",
        "--config.classifier.rank=3",
        "--config.seeds=1,2",
        "--config.eval.base_temperatures=1,1.5",
        "--config.eval.refinements=plain,gated",
        "--config.experiment.vary_ranks=2,",
        "--config.experiment.vary_epochs=2,",
        "--config.experiment.vary_retain_rows=3,",
        "--config.sweep.selection_group=1",
    ]
    status, _, errors = run("experiment.py", *flags)
    assert status == 0, errors
    found = json.loads((here / "experiment.json").read_text())
    assert len(found["chosen"]) == len(found["choice"]["held_out"]) == 2  # seeds
    axes = {point["axis"] for point in found["points"]}
    assert axes == {"T", "s", "rank of the head", "epochs", "retain rows seen by the head"}
    rank = [point["value"] for point in found["points"] if point["axis"].startswith("rank")]
    assert rank == [3, 2]
    assert all(stage["done"] for stage in found["stages"].values())
    names = ["plain", "gated", "protected", "gated-protected", "zero-started output"]
    names += ["class prior 0.50", "more varied retain texts"]
    names += ["two requests", "two requests, product"]
    assert list(found["refined"]) == names
    assert all(len(each["scored"]) == 2 for each in found["refined"].values())
    assert found["refined"]["plain"] != found["refined"]["protected"]
    assert "forget_leak_rate" in found["truncated"]
    assert found["probes"]["plain chat"] == found["probes"]["retain answers (trained on)"]
    assert (here / "varied.svg").read_text().startswith("<?xml")
    page = (here / "results.md").read_text()
    assert "| reworded forget questions | retain-only model |" in page
    assert "cross-fitted, seed 2 of 2" in page
    # Again, nothing is made anew: the same numbers, and the stages' seconds stay.
    models = [here / name / "model" / "model.safetensors" for name in ("base", "retain_only")]
    before = [path.stat().st_mtime_ns for path in models]
    status, _, errors = run("experiment.py", *flags)
    assert status == 0, errors
    assert json.loads((here / "experiment.json").read_text()) == found
    assert [path.stat().st_mtime_ns for path in models] == before


def test_fine_tuning_writes_a_model_that_opens(run, folder):
    status, output, errors = run(
        "finetune.py",
        f"--config.model={folder}/model",
        f"--config.finetune.data=('{folder}/retain.jsonl', '{folder}/forget.jsonl')",
        f"--config.finetune.validation=('{folder}/forget.jsonl',)",
        f"--config.finetune.workdir={folder}/tuned",
        "--config.finetune.epochs=4",
        "--config.finetune.warmup_steps=1",
        "--config.finetune.learning_rate=0.01",
    )
    assert status == 0, errors
    assert f"written: {folder}/tuned/model" in output
    losses = [line["validation_loss"] for line in read_lines(folder / "tuned" / "metrics.jsonl")]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    base, tuned = t3jax.load_lm(folder / "model"), t3jax.load_lm(folder / "tuned" / "model")
    assert tuned.eos_ids == base.eos_ids
    assert tuned.tokenizer.get_vocab() == base.tokenizer.get_vocab()
    assert tuned.tokenizer.chat_template == base.tokenizer.chat_template
    assert (tuned.params["embed"]["weight"] != base.params["embed"]["weight"]).any()


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        ("sample.py", ["--config.temprature=1"], "unknown config key"),
        (
            "sample.py",
            ["--config.model=/no/such/folder", "--config.base_only=True"],
            "/no/such/folder: no such folder",
        ),
        ("train_classifier.py", ["--config.model=x"], "not in the config: ['forget', 'retain'"),
        ("evaluate.py", ["--config.model=x"], "not in the config: ['eval.forget', 'eval.dir']"),
        ("finetune.py", ["--config.model=x"], "not in the config: ['finetune.workdir'"),
    ],
)
def test_errors_are_one_clear_line(repository, script, flags, message):
    """Started as a user starts them."""
    command = [sys.executable, script, f"--config={repository}/configs/paper.py", *flags]
    done = subprocess.run(
        command, cwd=repository, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
