"""Loads that servers of others recorded: PyTorch's files without PyTorch, NumPy's and JSON; nothing in them is run."""

import contextlib
import io
import json
import pickle
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

from eplb_jax import read_loads
from eplb_jax.__main__ import main

COUNTS = np.random.default_rng(0).integers(0, 90, (3, 2, 8), dtype=np.int32)
STORAGES = {
    "int32": b"IntStorage",
    "int64": b"LongStorage",
    "float32": b"FloatStorage",
    "bool": b"BoolStorage",
    "bfloat16": b"BFloat16Storage",
}


def text(word):
    """The instructions of a string, as protocol 2 writes it."""
    return b"X" + len(word).to_bytes(4, "little") + word.encode()


def whole(number):
    return b"J" + number.to_bytes(4, "little", signed=True)


def tensor(array, key="0", offset=0, strides=None, size=None):
    """The instructions of a tensor as `torch.save` writes them: a call of _rebuild_tensor_v2 on a storage."""
    strides = [s // array.itemsize for s in array.strides] if strides is None else strides
    storage = b"(" + text("storage") + b"ctorch\n" + STORAGES[str(array.dtype)] + b"\n" + text(key) + text("cpu")
    storage += whole(array.size if size is None else size) + b"tQ"
    tuples = [b"(" + b"".join(map(whole, numbers)) + b"t" for numbers in (array.shape, strides)]
    hooks = b"ccollections\nOrderedDict\n)R"
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + whole(offset) + b"".join(tuples) + b"\x89" + hooks + b"tR"
    )


def program(**items):
    """A dict of these instructions."""
    return b"\x80\x02}q\x00(" + b"".join(text(name) + value for name, value in items.items()) + b"u."


def write(path, pickled, *arrays, compression=zipfile.ZIP_STORED, order=b"little"):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("dump/data.pkl", pickled)
        archive.writestr("dump/byteorder", order)
        for key, array in enumerate(arrays):
            archive.writestr(f"dump/data/{key}", array.tobytes())
        archive.writestr("dump/version", b"3\n")
    return path


def test_sglangs_recorder(tmp_path):
    """What `_StatAccumulator.dump` gives `torch.save`: rank, counts of buffered steps, and a rate or None."""
    dump = program(rank=b"K\x00", logical_count=tensor(COUNTS), average_utilization_rate_over_window=b"N")
    path = write(tmp_path / "expert_distribution_recorder_1.5.pt", dump, COUNTS)
    assert read_loads(path).tolist() == COUNTS.sum(0).tolist()
    assert main(["plan", str(path), "--replicas", "12", "--gpus", "4"]) == 0
    assert (tmp_path / "expert_distribution_recorder_1.5.plan.npz").exists()


def test_sglangs_passes_are_by_slot(tmp_path):
    """Mode per_pass: records of each pass, and the map of slots at the end."""
    slots = np.array([[0, 1, 2, 0], [2, 1, 0, 1]], np.int64)
    passes = np.arange(16, dtype=np.int32).reshape(2, 2, 4)
    records = [b"}(" + text("rank") + b"K\x00" + text("global_physical_count") + tensor(p, str(i)) + b"u"
               for i, p in enumerate(passes)]  # fmt: skip
    dump = program(records=b"](" + b"".join(records) + b"e", last_physical_to_logical_map=tensor(slots, "2"))
    counts = passes.sum(0)
    expected = [
        [counts[0, [0, 3]].sum(), counts[0, 1], counts[0, 2]],
        [counts[1, 2], counts[1, [1, 3]].sum(), counts[1, 0]],
    ]
    assert read_loads(write(tmp_path / "x.pt", dump, *passes, slots)).tolist() == expected


def test_vllms_window_is_by_slot(tmp_path):
    slots = np.array([[0, 1, 1, -1]])
    np.savez(tmp_path / "x.npz", expert_load_window=[[[1, 2, 3, 9]], [[1, 1, 1, 9]]], physical_to_logical_map=slots)
    assert read_loads(tmp_path / "x.npz").tolist() == [[2, 7]]
    np.savez(tmp_path / "y.npz", expert_load_window=np.ones((1, 1, 4)), other=1)
    with pytest.raises(
        ValueError, match=r"y.npz: its counts are by slot, of shape \(1, 1, 4\): it must have 'physical_"
    ):
        read_loads(tmp_path / "y.npz")


def test_json(tmp_path):
    path = tmp_path / "x.json"
    for found in ({"logical_count": COUNTS.tolist(), "rank": 0}, COUNTS.sum(0).tolist()):
        path.write_text(json.dumps(found))
        assert read_loads(path).tolist() == COUNTS.sum(0).tolist()
    for found, message in [
        ('{"a": [1]}', r"x.json: it holds \['a'\]: name the loads"),
        ("[[1, 2], [3]]", "lists have different lengths"),
        ('[["a", "b"]]', "has dtype <U1"),
        ('[[{}, "b"]]', "no array of numbers"),
        ("[[1, 2", "begins like JSON and is none"),
        ('{"loads": [[1, -2]]}', "1 values that are negative"),
    ]:
        path.write_text(found)
        with pytest.raises(ValueError, match=message):
            read_loads(path)


def test_a_view_of_a_tensor(tmp_path):
    """Strides and an offset: columns of a larger array."""
    part = COUNTS[0].T[2:6]
    path = write(tmp_path / "x.pt", program(loads=tensor(part, offset=2, size=16)), COUNTS[0])
    assert np.array_equal(read_loads(path), part)


class Runs:
    """Pickled, it is a call: of print, so that a reader that runs it fails no other test."""

    def __reduce__(self):
        return print, ("this must not be printed",)


def test_nothing_of_a_pickle_is_run(tmp_path, capsys):
    for protocol in range(2, 6):
        pickled = pickle.dumps({"logical_count": Runs()}, protocol)
        with pytest.raises(ValueError, match=r"x.pt: its pickle (names '\w*builtin\w*\.print'|has the instruction)"):
            read_loads(write(tmp_path / "x.pt", pickled))
    for pickled in (pickle.dumps(Runs(), 0), pickle.dumps(np.ones((1, 2))), pickle.dumps({1, 2}, 4)):
        with pytest.raises(ValueError, match="only tensors and plain values are read"):
            read_loads(write(tmp_path / "x.pt", pickled))
    assert capsys.readouterr().out == ""


def test_files_that_lie(tmp_path):
    path, good = tmp_path / "x.pt", program(loads=tensor(COUNTS))
    for pickled, arrays, options, message in [
        (good, [COUNTS[:1]], {}, "has 64 bytes, 48 numbers of int32 need others"),
        (good, [], {}, "which are not there"),
        (good, [COUNTS], {"compression": zipfile.ZIP_DEFLATED}, "is compressed, which torch.save does not do"),
        (good, [COUNTS], {"order": b"big"}, "byte order is b'big'"),
        (good[:-1], [COUNTS], {}, "pickle"),
        (
            program(loads=tensor(COUNTS, strides=[0, 0, 9])),
            [COUNTS],
            {},
            r"shape \(3, 2, 8\) does not fit the 48 numbers",
        ),
        (program(loads=tensor(COUNTS, strides=[-1, 8, 1])), [COUNTS], {}, "which is none"),
        (
            program(loads=tensor(np.broadcast_to(COUNTS[:1], (9, 2, 8)), size=16)),
            [COUNTS[:1]],
            {},
            "does not fit the 16",
        ),
        (b"\x80\x02h\x07.", [], {}, "damaged"),
        (b"\x80\x02K\x01(K\x02e.", [], {}, "adds to a int"),
        (b"\x80\x02R.", [], {}, "damaged"),
    ]:
        write(path, pickled, *arrays, **options)
        with pytest.raises(ValueError, match=message):
            read_loads(path)
    whole_file = io.BytesIO()
    write(whole_file, good, COUNTS)
    rng = np.random.default_rng(1)
    for _ in range(400):  # bytes that changed: loads or a sentence, never another error
        data = bytearray(whole_file.getvalue())
        for at in rng.integers(0, len(data), 3):
            data[at] = rng.integers(0, 256)
        path.write_bytes(data)
        with contextlib.suppress(ValueError):
            read_loads(path)


BOMBS = {
    "a list that holds itself twice, many times": b"\x80\x02]q\x00" + b"".join(
        b"]q" + bytes([i]) + b"(h" + bytes([i - 1]) + b"h" + bytes([i - 1]) + b"e" for i in range(1, 60)) + b".",
    "tuples of tuples": b"\x80\x02)q\x00" + b"".join(
        b"h" + bytes([i - 1]) + b"h" + bytes([i - 1]) + b"\x86q" + bytes([i]) for i in range(1, 60)) + b"Q.",
    "axes without end": b"\x80\x02" + tensor(COUNTS).replace(
        b"(" + b"".join(map(whole, COUNTS.shape)) + b"t", b"(" + b"K\x01" * 20000 + b"t") + b".",
}  # fmt: skip


@pytest.mark.parametrize("dump", BOMBS.values(), ids=BOMBS)
def test_small_files_take_little_time_and_memory(tmp_path, dump):
    with pytest.raises(ValueError, match=r"twice|axes"):
        read_loads(write(tmp_path / "x.pt", dump, COUNTS))


def test_an_entry_shorter_than_it_claims(tmp_path):
    """The directory at the end of a zip file says what its author likes; nothing beyond the bytes is read."""
    big = np.zeros((100, 400), np.float32)
    path = write(tmp_path / "x.pt", program(logical_count=tensor(big)), np.zeros(2, np.float32))
    raw = bytearray(path.read_bytes())
    entry = raw.rindex(b"dump/data/0") - 46  # of the directory
    raw[entry + 24 : entry + 28] = big.nbytes.to_bytes(4, "little")
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="is of 8 bytes and claims 160000"):
        read_loads(path)
    raw[entry + 20 : entry + 24] = big.nbytes.to_bytes(4, "little")
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"holds [0-9]+ numbers, not the 40000|no archive of torch.save"):
        read_loads(path)


@pytest.mark.parametrize("dtype, counts, wanted", [
    ("uint8", [200, 100, 3], [300, 3]), ("int32", [2**31 - 1] * 3, [2**32 - 2, 2**31 - 1]),
])  # fmt: skip
def test_sums_of_narrow_counts(tmp_path, dtype, counts, wanted):
    np.savez(
        tmp_path / "x.npz", expert_load_window=np.array([counts], dtype), physical_to_logical_map=np.array([[0, 0, 1]])
    )
    assert read_loads(tmp_path / "x.npz").tolist() == [wanted]


def test_each_step_of_bfloat16_is_checked(tmp_path):
    """Their sum may be fine."""
    steps = np.array([[[3, 3]], [[-1, 2]]]).astype(jnp.bfloat16)
    path = write(tmp_path / "x.pt", program(logical_count=tensor(steps)), steps)
    with pytest.raises(ValueError, match=r"step 1 of the loads in .* has 1 values that are negative"):
        read_loads(path)
