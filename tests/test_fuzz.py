"""The quick part of `tests/fuzz.py`: 300 damaged inputs, none of them wrongly taken or refused."""

import fuzz
import pytest


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    return fuzz.Runner(tmp_path_factory.mktemp("fuzz"), seed=7)


@pytest.mark.parametrize("kind", fuzz.WEIGHTS)
def test_damaged_inputs_are_refused_by_name_or_read_rightly(runner, kind):
    cases = [runner.run(name, number) for name, number in fuzz.plan(300, None) if name == kind]
    wrong = [str(case) for case in cases if case.outcome == fuzz.WRONG]
    assert not wrong
    # Both come about; otherwise the damage, or the judgement, is none.
    assert {fuzz.REFUSED} < {case.outcome for case in cases}
