"""Fails if a test was skipped that has to run here.

    python .ci/no_skips.py REPORT.xml

REPORT.xml is pytest's report (--junitxml). A test may be skipped only for want of the shared data
beside the checkout, or of a browser, and only where there is none. The comparison with PyTorch must
have run.
"""

import pathlib
import shutil
import sys
import xml.etree.ElementTree as ET

SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"


def main(report: str) -> int:
    """Prints what is wrong and returns the exit status."""
    ran_parity = False
    wrong = []
    for case in ET.parse(report).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        skipped = case.find("skipped[@type='pytest.skip']")
        if skipped is None:
            ran_parity |= "test_parity" in name
            continue
        reason = skipped.get("message", "")
        if "no browser" in reason and not shutil.which("chromium"):
            continue
        if SHARED.is_dir() or str(SHARED) not in reason:
            wrong.append(f"{name} was skipped: {reason}")
    if not ran_parity:
        wrong.append("no test of tests/test_parity.py ran")
    print("\n".join(wrong), file=sys.stderr, end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
