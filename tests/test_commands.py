"""The commands: their help, without waiting for JAX, and names of fields wherever they stand."""

import re
import subprocess
import sys

import pytest

from t3jax.commands import FIELDS, usage
from t3jax.settings import expected, names_of, nearest


def run(repository, *words):
    code = "import sys; from t3jax.commands import main; main()"
    return subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code, *words],
        cwd=repository,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("words", [("--help",), ("sample", "--help")])
def test_help_does_not_wait_for_jax(repository, words):
    done = run(repository, *words)
    assert done.returncode == 0
    assert "usage: t3jax" in done.stdout
    assert not re.search(r"[| ](jax|absl|ml_collections|numpy)$", done.stderr, re.MULTILINE)


def test_an_unknown_command_names_the_nearest(repository):
    done = run(repository, "smple")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "t3jax: unknown command 'smple'; did you mean sample?"


@pytest.mark.parametrize("name", [name for name in FIELDS if FIELDS[name]])
def test_help_lists_the_fields_with_comment_and_default(name):
    text = usage.describe(name, "t3jax", FIELDS[name].split())
    listed = re.findall(r"^  --([\w.]+)=(.*)\n      \S", text, re.MULTILINE)
    assert {field for field, _ in listed} <= set(names_of())
    assert len(listed) == len(re.findall(r"^  --", text, re.MULTILINE)) > 5  # each has a comment
    assert all(value for _, value in listed)
    defaults = dict(listed)
    if name == "train":
        assert defaults["train.epochs"] == "40"  # of the recipe
        assert defaults["train.batch_size"] == "32"  # of the dataclass
        assert "train.b1" in defaults
    if name == "verify":
        assert defaults["verify.rows"] == "60"  # of a base class
        assert "verify.seed" not in defaults
        assert defaults["leaks.threshold"] == "0.7"  # its prefix is left out


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("top_p", "sampling.top_p"),
        ("eval_dir", "eval.dir"),
        ("eval_temperatures", "eval.base_temperatures"),
        ("eval_scales", "eval.guidance_scales"),
        ("leak_samples", "leaks.samples"),
        ("rank", "classifier.rank"),
        ("seed", "sampling.seed"),
        ("epochs", "train.epochs"),
        ("finetune_epochs", "finetune.epochs"),
        ("selection_rule", "sweep.selection_rule"),
        ("hed", "head"),
    ],
)
def test_a_name_of_the_flat_config_is_found_in_its_section(old, new):
    assert nearest(old) == f"; did you mean --config.{new}?"


def test_every_field_in_the_docs_is_there(repository):
    known = {*names_of(), "FIELD", "NAME", "SECTION.FIELD"}
    files = [repository / "README.md", repository / "CONTRIBUTING.md"]
    for folder, pattern in (("docs", "*.md"), ("t3jax", "**/*.py"), ("demo", "*.py")):
        files += (repository / folder).glob(pattern)
    files += repository.glob("*.py")
    unknown = [
        (path.name, field)
        for path in files
        for field in re.findall(r"--config\.([\w.]*\w)", path.read_text())
        if field not in known
    ]
    assert not unknown


def test_what_a_field_may_be_is_known():
    assert expected("classifier.rank") == "a whole number in [1, 65536]"
    assert expected("leaks.top_p") == "a number in (0, 1]"
    assert expected("train.loss") == "one of classifier, distillation, auto"
    assert expected("base_only") == "True or False"
