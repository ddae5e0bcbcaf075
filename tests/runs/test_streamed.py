"""Arrays written and read slice by slice: what is asked for, how it lies on disk, what is read."""

import contextlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts
from flax import nnx

from dynmoe_jax import config
from dynmoe_jax.interop import load_hf
from dynmoe_jax.interop.export_model import export_model
from dynmoe_jax.model import parameter_shapes
from dynmoe_jax.runs.checkpoint import IMPORTED, Checkpoints
from dynmoe_jax.runs.errors import CheckpointError
from dynmoe_jax.runs.load import opened_run
from dynmoe_jax.runs.saving import chunks
from dynmoe_jax.runs.saving.stored import StoredArrays
from dynmoe_jax.runs.saving.streamed import StreamedArray

SHAPE = N, E, D, F = 2, 3, 32, 64


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """An expert of SHAPE in bfloat16 is just as large as a chunk must be."""
    monkeypatch.setattr(chunks, "SMALL_BYTES", 2 * D * F)


@pytest.fixture
def values_NEDF():
    return np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)


def save(folder, params, cfg=config.Config()):  # noqa: B008
    with contextlib.closing(Checkpoints(folder, config.Checkpoint())) as checkpoints:
        position = {"tokenizer": "", IMPORTED: "somewhere"}
        checkpoints.save(0, {"params": params}, position, cfg)
    return StoredArrays(folder / "checkpoints" / "0" / "state")


def chunk(folder, name):
    """Shape and type of a chunk on disk, read without the package."""
    base = f"file://{folder}/checkpoints/0/state/"
    store = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
    array = ts.open({"driver": "zarr", "kvstore": store}, read=True).result()
    return array.chunk_layout.read_chunk.shape, array.dtype.numpy_dtype


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_one_expert_is_one_chunk_in_the_stored_type(tmp_path, values_NEDF, dtype):
    asked = []

    def make(index):
        asked.append(index)
        return values_NEDF[index]

    stored = save(tmp_path, {"experts": StreamedArray(SHAPE, make, 2, dtype)})
    assert asked == list(np.ndindex(N, E))
    assert chunk(tmp_path, "params.experts") == ((1, 1, D, F), dtype)
    wanted = values_NEDF.astype(dtype).astype(np.float32)
    for index in ((), (1,), (1, 2), (0, 2, 5)):
        read = stored.read("params.experts", index)
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read, wanted[index])
    for n, layer in stored.slices("params.experts"):
        np.testing.assert_array_equal(layer, wanted[n])


def test_small_slices_are_joined(tmp_path, values_NEDF):
    """A chunk below a megabyte makes reading slow: then a layer is one, or all of it."""
    asked = []

    def make(index):
        asked.append(index)
        return values_NEDF[index][..., : F // 2]

    half = (*SHAPE[:-1], F // 2)
    arrays = {
        "half": StreamedArray(half, make, 2, "bfloat16"),
        "row": StreamedArray((N, D), lambda _: values_NEDF[:, 0, :, 0], 1),
        "layers": StreamedArray(SHAPE, lambda index: values_NEDF[index], 1),
    }
    assert [array.axes for array in arrays.values()] == [1, 0, 1]
    stored = save(tmp_path, arrays)
    assert asked == [(0,), (1,)]
    assert chunk(tmp_path, "params.half")[0] == (1, E, D, F // 2)
    assert chunk(tmp_path, "params.row")[0] == (N, D)
    np.testing.assert_array_equal(stored.read("params.row", (1,)), values_NEDF[1, 0, :, 0])
    np.testing.assert_array_equal(stored.read("params.layers", (1, 2)), values_NEDF[1, 2])
    assert [index for index, _ in stored.slices("params.row")] == [None]


def bytes_read():
    [metric] = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return metric["values"][0]["value"]


def test_no_more_chunks_are_read_than_hold_the_slice(tmp_path):
    shape = (4, 4, 64, 128)
    make = lambda index: np.full(shape[2:], sum(index), np.float32)  # noqa: E731
    stored = save(tmp_path, {"experts": StreamedArray(shape, make, 2)})
    stored.read("params.experts", (0, 0))
    before = bytes_read()
    assert stored.read("params.experts", (3, 2))[0, 0] == 5
    assert 64 * 128 * 4 <= bytes_read() - before < 2 * 64 * 128 * 4


def test_a_chunk_of_several_slices_is_read_once(tmp_path):
    shape = (2, 8, 64, 128)
    make = lambda index: np.ones(shape[1:], np.float32)  # noqa: E731
    stored = save(tmp_path, {"experts": StreamedArray(shape, make, 1)})
    before = bytes_read()
    for e in range(8):
        stored.read("params.experts", (1, e))
    assert bytes_read() - before < 2 * 8 * 64 * 128 * 4


def test_large_arrays_of_a_training_are_cut_along_leading_axes(tmp_path, monkeypatch):
    """Reading one expert of many would read all of them."""
    monkeypatch.setattr(chunks, "LARGE_BYTES", 4 * D * F)
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    along, whole = (jax.NamedSharding(mesh, jax.P(None, None, axis)) for axis in ("data", None))
    random = np.random.default_rng(0)
    draw = lambda place, *shape: jax.device_put(random.normal(size=shape), place)  # noqa: E731
    arrays = {
        "experts": draw(whole, *SHAPE),
        "split": draw(along, *SHAPE),
        "layers": draw(whole, N, D, F),
        "rows": draw(whole, 2 * D, F, 1),
    }
    stored = save(tmp_path, arrays)
    found = {name: chunk(tmp_path, f"params.{name}")[0] for name in arrays}
    assert found == {
        "experts": (1, 1, D, F),
        "split": (1, 1, D // 2, F),
        "layers": (1, D, F),
        "rows": (D, F, 1),  # each device writes a half
    }
    for name, array in arrays.items():
        np.testing.assert_array_equal(stored.read(f"params.{name}"), array)
    with contextlib.closing(Checkpoints(tmp_path, None)) as checkpoints:
        restored = checkpoints.part(0, {"params": arrays})["params"]
    jax.tree.map(np.testing.assert_array_equal, restored, arrays)
    assert restored["split"].sharding == along


def small_model():
    moe = config.MoE(num_experts=4, hidden_width=32, router="top_p")
    sizes = {"num_layers": 2, "width": 32, "num_heads": 2, "num_kv_heads": 2, "head_width": 4}
    return config.Model(**sizes, hidden_width=8, vocab_size=8, max_seq_len=8, moe=moe)


def test_a_bfloat16_checkpoint_is_a_model_in_float32(tmp_path):
    model = small_model()
    cfg = config.Config(model=model, data=config.Data(seq_len=8))
    random = np.random.default_rng(1)
    kept = {p: random.normal(size=x.shape) for p, x in parameter_shapes(model).flat_state()}
    leaves = [
        (path, leaf.replace(StreamedArray(leaf.shape, kept[path].__getitem__, 2, "bfloat16")))
        for path, leaf in parameter_shapes(model).flat_state()
    ]
    save(tmp_path / "run", nnx.from_flat_state(leaves), cfg)
    experts = "params.groups.layers.0.feed_forward.gate_up_ED2F.value"
    assert chunk(tmp_path / "run", experts) == ((1, 1, 32, 64), ml_dtypes.bfloat16)
    rounded = {p: x.astype(ml_dtypes.bfloat16).astype(np.float32) for p, x in kept.items()}
    with opened_run(tmp_path / "run") as run:
        decoder = run.decoder()
    export_model(tmp_path / "run", tmp_path / "hf")
    for loaded in (decoder, load_hf(tmp_path / "hf")):
        for path, leaf in nnx.state(loaded, nnx.Param).flat_state():
            assert leaf.dtype == jnp.float32
            np.testing.assert_array_equal(leaf[...], rounded[path])


def test_what_is_not_stored_is_said(tmp_path):
    model = small_model()
    params = nnx.map_state(lambda _, x: np.zeros(x.shape, np.float32), parameter_shapes(model))
    save(tmp_path, params, config.Config(model=model, data=config.Data(seq_len=8)))
    with opened_run(tmp_path, verify=False) as run:
        assert not run.has_moments
        assert run.updates == 0
        with pytest.raises(CheckpointError, match=r"holds no array first\.embedding_VD"):
            run.read(("embedding_VD",), group="first")
