"""Safetensors files and folders of them: read as the package reads them, and refused where they lie."""

import hashlib
import json
import os
import struct

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxpipe.deepseek.hf_files import INDEX, SINGLE, check_sums, encode_header, open_folder, read_header, read_json
from jaxpipe.deepseek.hf_fp8 import dequantise, quantise

GOOD = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}


def write(path, header, body=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)
    return path


def test_files_of_the_package_are_read(tmp_path):
    flax = pytest.importorskip("safetensors.flax", reason="needs the package safetensors")
    rng = np.random.default_rng(0)
    arrays = {
        "single": rng.normal(size=(5, 3)).astype(np.float32),
        "half": rng.normal(size=(4,)).astype(np.float16),
        "brain": rng.normal(size=(2, 2, 3)).astype(ml_dtypes.bfloat16),
        "scalar": np.float32(3),
        "none": np.zeros((0, 3), np.float32),
    }
    flax.save_file({name: jnp.asarray(array) for name, array in arrays.items()}, tmp_path / SINGLE, {"format": "pt"})
    found = open_folder(tmp_path)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].rows().dtype == array.dtype
        np.testing.assert_array_equal(found[name].rows(), array)
    np.testing.assert_array_equal(found["single"].rows(1, 4), arrays["single"][1:4])


def test_files_of_ours_are_read_by_the_package(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy", reason="needs the package safetensors")
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    (tmp_path / SINGLE).write_bytes(encode_header({"ä": ("F32", (2, 3))}, {"format": "pt"}) + array.tobytes())
    np.testing.assert_array_equal(numpy.load_file(tmp_path / SINGLE)["ä"], array)


@pytest.mark.parametrize(
    ("header", "body", "length", "message"),
    [
        (GOOD, 23, None, r"a in .*, F32\[2, 3\], ends at byte \d+, and the file has \d+: it is truncated"),
        (GOOD, 25, None, "its tensors end at .*: it is damaged"),
        (GOOD, 24, 1 << 62, f"should begin with a header of {1 << 62}"),
        (GOOD, 24, 10_000, "should begin with a header of 10000"),
        (b"[1]", 0, None, "JSON of list"),
        (b'{"a"', 0, None, "no JSON"),
        (b'{"a":1,"a":1}', 0, None, "a stands in it twice"),
        (b"[" * 200_000, 0, None, "no JSON"),
        ({"a": 1}, 0, None, "a in .* has dtype None"),
        ({"a": GOOD["a"] | {"dtype": "F7"}}, 24, None, "a in .* has dtype 'F7': known are"),
        ({"a": GOOD["a"] | {"shape": [2, -3]}}, 24, None, "a in .* has shape"),
        ({"a": GOOD["a"] | {"shape": [True, 6]}}, 24, None, "a in .* has shape"),
        ({"a": GOOD["a"] | {"shape": [2.0, 3]}}, 24, None, "a in .* has shape"),
        ({"a": GOOD["a"] | {"shape": [1 << 40, 1 << 40]}}, 24, None, "and its header gives it those from 0 to 24"),
        ({"a": {"dtype": "F32", "shape": [1 << 60], "data_offsets": [0, 1 << 62]}}, 24, None, "it is truncated"),
        ({"a": GOOD["a"], "b": GOOD["a"]}, 24, None, "b in .* begins at byte"),
        ({"a": GOOD["a"] | {"data_offsets": [8, 32]}}, 32, None, "a in .* begins at byte"),
        ({"a": GOOD["a"] | {"data_offsets": [24, 0]}}, 24, None, "those from 24 to 0"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path, header, body, length, message):
    path = write(tmp_path / SINGLE, header, bytes(body), length)
    with pytest.raises(ValueError, match=message):
        read_header(path)


def test_short_files_and_pickles_are_refused(tmp_path):
    (tmp_path / SINGLE).write_bytes(b"1234")
    with pytest.raises(ValueError, match="has 4 bytes"):
        open_folder(tmp_path)
    (tmp_path / SINGLE).rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"holds pickles \(pytorch_model.bin\).*convert them"):
        open_folder(tmp_path)
    with pytest.raises(ValueError, match="may be a pickle"):
        read_header(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no folder"):
        open_folder(tmp_path / "none")
    with pytest.raises(ValueError, match=r"no file .*config\.json"):
        read_json(tmp_path / "config.json")


def test_files_and_their_index_must_agree(tmp_path):
    write(tmp_path / "1.safetensors", GOOD, bytes(24))
    write(tmp_path / "2.safetensors", {"b": GOOD["a"]}, bytes(24))

    def index(files):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": files}))

    index({"a": "1.safetensors", "b": "2.safetensors"})
    assert [entry.path.name for entry in open_folder(tmp_path).values()] == ["1.safetensors", "2.safetensors"]
    for files, message in [
        ({"a": "1.safetensors", "b": "3.safetensors"}, r"3.safetensors is missing; .* 1 tensors: b: fetch"),
        ({"a": "1.safetensors", "c": "2.safetensors"}, "c is not in .*2.safetensors"),
        ({"a": "1.safetensors"}, None),
        ({"a": "2.safetensors", "b": "1.safetensors"}, "a is not in"),
        ({"a": "../1.safetensors"}, "only safetensors files beside the index"),
        ({"a": "pytorch_model.bin"}, "only safetensors files beside the index"),
        ({"a": 1}, "only safetensors files beside the index"),
        ({}, "no weight_map"),
    ]:
        index(files)
        if message is None:
            assert open_folder(tmp_path).keys() == {"a"}
            continue
        with pytest.raises(ValueError, match=message):
            open_folder(tmp_path)


def test_tensors_that_an_index_leaves_out_are_told(tmp_path):
    write(tmp_path / "1.safetensors", {**GOOD, "b": GOOD["a"] | {"data_offsets": [24, 48]}}, bytes(48))
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "1.safetensors"}}))
    with pytest.raises(ValueError, match=r"b in .* is not where .* says: None"):
        open_folder(tmp_path)


def test_checksums_are_compared_where_there_are_any(tmp_path):
    names = "abcdefgh"
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
        os.utime(tmp_path / name, (1.7e9, 1.7e9 + 0.5))
    sums = {name: hashlib.sha256(name.encode()).hexdigest() for name in names}
    other = "0" * 64
    # Of a file of that name in another folder, the checksum is another.
    (tmp_path / "SHA256SUMS").write_text(f"# ours\n\n{sums['a']}  ./a\n{sums['e'].upper()}  e\n{other}  other/d\n")
    (tmp_path / "b.sha256").write_text(f"{sums['b']} *b\n")
    (tmp_path / "f.sha256").write_text(f"{sums['f']}\n")
    (tmp_path / "g.sha256").write_text(f"{sums['g'].upper()}  /where/it/was/g\n")
    noted = tmp_path / ".cache" / "huggingface" / "download"
    noted.mkdir(parents=True)
    (noted / "c.metadata").write_text(f"{'1' * 40}\n{sums['c']}\n1700000000.0\n")
    (noted / "d.metadata").write_text(f"{'1' * 40}\n{'2' * 40}\n1700000000.0\n")
    (noted / "h.metadata").write_text(f"{'1' * 40}\n{other}\n1699999000.0\n")
    assert check_sums(tmp_path, names) == 6
    for name in "abcefg":
        (tmp_path / name).write_bytes(b"other")
        os.utime(tmp_path / name, (1.7e9, 1.7e9))
        with pytest.raises(ValueError, match=rf"{name} has SHA-256 d9298a.* and should have {sums[name]}"):
            check_sums(tmp_path, name)
    os.utime(tmp_path / "c")
    assert check_sums(tmp_path, "c") == 0
    (tmp_path / "SHA256SUMS").write_text(f"{other}\n")
    with pytest.raises(ValueError, match=f"SHA256SUMS has '{other}' where a SHA-256"):
        check_sums(tmp_path, "h")
    (tmp_path / "SHA256SUMS").unlink()
    (tmp_path / "h.sha256").write_text("SHA256 (h) = 12\n")
    with pytest.raises(ValueError, match=r"h\.sha256 has 'SHA256 \(h\) = 12' where a SHA-256 should be"):
        check_sums(tmp_path, "h")


def test_a_file_that_shrinks_is_told(tmp_path):
    entry = read_header(write(tmp_path / SINGLE, GOOD, bytes(24)))["a"]
    with open(tmp_path / SINGLE, "r+b") as file:
        file.truncate(entry.start + 20)
    with pytest.raises(ValueError, match="ends within a: it was changed"):
        entry.rows()


@pytest.mark.parametrize("shape", [(300, 130), (128, 128), (5, 7)])
def test_blocks_are_scaled_as_one_by_one(shape):
    matrix = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    numbers, scales = quantise(matrix)
    assert scales.shape == tuple(-(-size // 128) for size in shape)
    wanted = np.empty(shape, np.float32)
    for row in range(shape[0]):
        for column in range(shape[1]):
            wanted[row, column] = np.float32(numbers[row, column]) * scales[row // 128, column // 128]
    np.testing.assert_array_equal(dequantise(numbers, scales), wanted)
    for start, stop in ((0, 3), (100, 290), (127, 129)):
        np.testing.assert_array_equal(dequantise(numbers[start:stop], scales, start), wanted[start:stop])
    # Three bits of mantissa: half of a sixteenth.
    largest = np.abs(matrix).max()
    assert np.abs(wanted - matrix).max() <= largest / 16
    again, same = quantise(wanted)
    np.testing.assert_array_equal(again.view(np.uint8), numbers.view(np.uint8))
    np.testing.assert_allclose(same, scales, rtol=2e-7)


def test_blocks_of_the_smallest_numbers_stay_finite():
    """Their scales have a bit or two."""
    matrix = np.float32([[9e-43, -9e-43], [7e-43, 3e-45]])
    numbers, scales = quantise(matrix)
    found = dequantise(numbers, scales)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, matrix, atol=5e-43)


def test_zeros_have_a_scale_and_infinity_has_none():
    numbers, scales = quantise(np.zeros((2, 2), np.float32))
    assert dequantise(numbers, scales).tolist() == [[0, 0], [0, 0]]
    with pytest.raises(ValueError, match="not finite"):
        quantise(np.array([[1, np.inf]], np.float32))
