"""Settings every test shares: 8 simulated devices, strict promotion, and where shared data is."""

import os
import pathlib

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
# An accelerator's owner asks for it by name; tests that need several devices fail on a single one.
jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS", "cpu"))
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
SHARED = REPOSITORY.parent / "shared"


@pytest.fixture
def shared() -> pathlib.Path:
    """The folder of real data beside the checkout; the test is skipped where there is none."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not there: real data lies beside the checkout only in CI")
    return SHARED


@pytest.fixture(scope="session")
def repository() -> pathlib.Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def tiny_lm():
    """A two-layer decoder with random weights, a byte tokenizer and a ChatML template."""
    import tiny  # not above: pytest must first hook the imports of t3jax, to check shapes

    return tiny.make_lm()
