"""The benchmark of tiles, in interpret mode on a shape that takes seconds."""

import pytest

from benchmarks import gpu_tiles
from benchmarks.layer_cases import Preset
from dynmoe_jax.experts.kernels.gpu.tiling import Tile

TINY = Preset(tokens=32, width=128, hidden_width=128, num_experts=2)


@pytest.mark.long
def test_every_kernel_is_timed_and_the_chosen_tile_is_marked(monkeypatch):
    monkeypatch.setattr(gpu_tiles, "CALLS", 1)
    monkeypatch.setattr(gpu_tiles, "CANDIDATES", (Tile(64, 128, 64, 4, 3),))
    records, refused = gpu_tiles.measure(TINY, list(gpu_tiles.KERNELS), 1, interpret=True)
    assert refused == {}
    assert {r["kernel"] for r in records} == set(gpu_tiles.KERNELS)
    for name in gpu_tiles.KERNELS:
        assert [r["chosen"] for r in records if r["kernel"] == name].count(True) == 1
    record = next(r for r in records if r["kernel"] == "swiglu")
    # 64 rows, gate and up.
    assert record["flops_per_s"] * record["seconds"] == pytest.approx(2 * 64 * 128 * 128 * 2)
    assert " *" in gpu_tiles.table(records)


def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit) as stop:
        gpu_tiles.main([])
    assert stop.value.code == 2
    assert "need an NVIDIA GPU, and JAX sees none" in capsys.readouterr().err
