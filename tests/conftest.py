"""Settings every test shares: 8 simulated devices, strict promotion, and where shared data is."""

import os
import pathlib

import jax
import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
SHARED = REPOSITORY.parent / "shared"

# Tests spend their time compiling small programs: here with the passes that compile quickest, and a
# program that two tests share is compiled once. Scripts that a test starts inherit the variables.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1",
)
for name, value in {
    "jax_compilation_cache_dir": str(REPOSITORY / "out" / "tests" / "xla"),
    "jax_persistent_cache_min_compile_time_secs": 0.0,  # reading one takes half of the time
}.items():
    os.environ[name.upper()] = str(value)
    jax.config.update(name, value)
jax.config.update("jax_num_cpu_devices", 8)
# An accelerator's owner asks for it by name; tests that need several devices fail on a single one.
jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS", "cpu"))
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Files that take minutes start first, so that no worker is left with one at the end.
_SLOWEST = ("test_scripts", "test_sampler", "test_parity", "test_sharding", "test_stopping")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(_SLOWEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture
def shared() -> pathlib.Path:
    """The folder of real data beside the checkout; the test is skipped where there is none."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not there: real data lies beside the checkout only in CI")
    return SHARED


@pytest.fixture(scope="module", autouse=True)
def _compiled_programs():
    """Drops a file's compiled programs: they hold memory maps, of which a process has 65,530."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def repository() -> pathlib.Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def tiny_lm():
    """A two-layer decoder with random weights, a byte tokenizer and a ChatML template."""
    import tiny  # not above: pytest must first hook the imports of t3jax, to check shapes

    return tiny.make_lm()
