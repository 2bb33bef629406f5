"""What the benchmarks share: intervals, counted operations, the peer's process."""

import dataclasses
import json
import time

import jax
import numpy as np
import pytest
import tiny

from benchmarks import head, recipes
from benchmarks.__main__ import NAMES, main
from benchmarks.ceilings import forward_operations, weight_bytes
from benchmarks.peer import Peer
from benchmarks.side_by_side import alternate, overhead, ratio, write


def test_ratio_and_overhead():
    assert ratio([2.0, 6.0, 4.0], [1.0, 2.0, 4.0]) == {"median": 2.0, "low": 1.0, "high": 3.0}
    base = np.ones(30)
    times = np.random.default_rng(0).permutation(np.arange(1.0, 31.0))
    # The 10th and the 21st of 30: the textbook's 95 % interval of a median.
    assert overhead(times, base) == {"median": 14.5, "low": 9.0, "high": 20.0}
    assert overhead([1.5, 2.0], [1.0, 1.0]) == {"median": 0.75, "low": 0.5, "high": 1.0}


def test_alternate_takes_turns_and_leaves_preparation_out(monkeypatch):
    monkeypatch.setattr("benchmarks.side_by_side._PAUSE", 0.0)
    order = []
    works = {name: lambda repeat, name=name: order.append((name, repeat)) for name in "ab"}
    prepare = {"a": lambda: time.sleep(0.2), "b": lambda: order.append("prepared")}
    times = alternate(works, 2, prepare)
    assert order == [("a", 0), "prepared", ("b", 0), ("a", 1), "prepared", ("b", 1)]
    assert max(times["a"]) < 0.1


def test_counted_operations_and_bytes():
    params = tiny.make_params()
    # Weights of a layer: q and o, k and v, and the MLP's three.
    layer = 2 * 32 * 64 + 2 * 32 * 32 + 3 * 32 * 64
    attention = 2 * (2 * 64) * (1 + 2 + 3)  # two products for each pair of positions
    assert forward_operations(tiny.CONFIG, params, 3) == 2 * (2 * layer * 3 + attention)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert weight_bytes(tiny.CONFIG, params) == total
    untied = dataclasses.replace(tiny.CONFIG, tied=False)
    table = tiny.CONFIG.vocab_size * tiny.CONFIG.hidden_size * 4
    assert weight_bytes(untied, params) == total - table  # the head's takes its place
    mixture, params = tiny.MIXTURE, tiny.make_params(tiny.MIXTURE)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    spared = 6 * 3 * 32 * 16  # weights of the experts that a token is not sent to, 6 of 8
    assert weight_bytes(mixture, params) == total - table - 4 * spared
    matrices = sum(leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim > 1)
    met = matrices - 2 * tiny.CONFIG.vocab_size * tiny.CONFIG.hidden_size - spared
    assert forward_operations(mixture, params, 3) == 2 * met * 3 + 2 * attention


def test_write_gives_plain_numbers_and_their_bounds(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write("x", {"speedup": ratio([2.0, 3.0], [1.0, 1.0]), "share": 0.5}, {"seconds": [1.0]})
    content = json.loads((tmp_path / "out/benchmarks/x.json").read_text())
    assert content["figures"] == {"speedup": 2.5, "share": 0.5}
    assert content["bounds"] == {"speedup": [2.0, 3.0]}
    assert content["seconds"] == [1.0]
    assert "speedup        2.5" in capsys.readouterr().out


@pytest.mark.parity
def test_peer_works_in_a_process_of_its_own():
    pytest.importorskip("torch")
    with Peer("Machine") as peer:
        peer.set_threads(1)
        assert peer("read", 4096, 1) > 0
        assert 0 < peer.peak_memory_gib < 4
        with pytest.raises(RuntimeError, match="no attribute 'nothing'"):
            peer("nothing")


@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_tells_its_options(name, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmarks", name, "--help"])
    with pytest.raises(SystemExit, match="0"):
        main()
    assert "usage: python -m benchmarks" in capsys.readouterr().out


def test_every_kind_of_head_is_trained(monkeypatch):
    monkeypatch.setattr("benchmarks.side_by_side._PAUSE", 0.0)
    monkeypatch.setattr(
        recipes, "random_features", lambda _, seed, config: head.random_features(4, seed, config)
    )
    figures, details = recipes.compare(width=8, vocabulary=256, epochs=1, repeats=1)
    assert set(details["seconds an epoch"]) == {"published", "classifier", "distilled"}
    assert figures["distilled_over_published"]["median"] > 0
