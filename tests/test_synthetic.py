"""The generator: its bytes against a checkpoint made before it, its inventory against what was published."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import resource
import shutil
from collections import Counter
from math import prod

import numpy as np
import pytest
import safetensors
from conftest import SMALL, TINY_6E, checksums
from hypothesis import given, settings
from hypothesis import strategies as st
from tamper import DTYPE_BYTES, load_shard, read_header, shards

from dsv4tools.errors import ResourceError, UsageError
from dsv4tools.synthetic import (
    FLASH,
    FLASH_0731,
    PRO,
    TINY,
    Shape,
    checkpoint,
    inventory,
    make_config,
    write_checkpoint,
    write_full_width,
    write_sparse,
)
from dsv4tools.synthetic.layout import tensor_rows
from dsv4tools.synthetic.tokenizer import LEAST_VOCAB, make_tokenizer
from dsv4tools.synthetic.values import cheap_values, encode_e4m3, quantize_fp4, quantize_fp8

# The files from which the C quantizer, llama.cpp and transformers made the values in tests/data.
TINY_6E_FILES = {
    "config.json": "cd84747259d2c92a081922edb1d79703cd23a533892a6d68dc3801f503cfa54c",
    "generation_config.json": "8d445e07e8e73c2faea15fe65324b3cb1d93d212c292682ac86e6a70736fbb47",
    "model-00001-of-00003.safetensors": "312c2a20636c22d86901dad80c285ed4e5915df37a03b516daecaa55d0d8f383",
    "model-00002-of-00003.safetensors": "c58fbc2a72dbb881aa284da069411175eac775e3127cf19a031ea79c12f20272",
    "model-00003-of-00003.safetensors": "06dae0b809631e4722dcec4300576c4b3a9006d98284f1e26e2b4d076c959b4d",
    "model.safetensors.index.json": "7f56d5b5e10914510b452190f428483f495f046dfa4abff4bdba149d4ac34819",
    "tokenizer.json": "07ccc0272f8df5119d02b2825f50d8e06b57c0d39e847c42d9ea58fc3afb5af3",
    "tokenizer_config.json": "94b12147927cfc9fd1a7f4b91c9463ede341c0b62914170f05f68b454982d648",
}

VARIANTS = {
    "small": SMALL,
    "hash layers everywhere": dataclasses.replace(SMALL, hash_layers=3),
    "no hash layer": dataclasses.replace(SMALL, hash_layers=0),
    "32x32 blocks": dataclasses.replace(SMALL, layers=1, fp8_block=(32, 32)),
    "edge tiles": dataclasses.replace(SMALL, hidden=160, q_lora=96, head_dim=72, expert_hidden=96),
    "experts in FP8": dataclasses.replace(SMALL, layers=1, expert_dtype="fp8"),
    "dspark draft": dataclasses.replace(SMALL, layers=1, hidden=128, draft="dspark", draft_blocks=3, draft_rank=16),
    "two mtp blocks": dataclasses.replace(SMALL, layers=1, draft_blocks=2),
}


def opened(directory):
    """Name -> (dtype, shape) as the safetensors library reads the shards, in file order."""
    found = {}
    for shard in shards(directory):
        with safetensors.safe_open(shard, framework="np") as file:
            names = file.offset_keys()
            assert not found.keys() & set(names)
            slices = {name: file.get_slice(name) for name in names}
            found |= {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    return found


def n_bytes_of(tensors):
    return sum(DTYPE_BYTES[dtype] * prod(shape) for dtype, shape in tensors.values())


def e4m3_values():
    """Value of every F8_E4M3 code, from the words of the specification."""
    values = []
    for code in range(256):
        sign, exponent, fraction = (-1 if code & 0x80 else 1), (code >> 3) & 15, code & 7
        magnitude = fraction / 8 * 2.0**-6 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7)
        values.append(float("nan") if code & 0x7F == 0x7F else sign * magnitude)
    return np.array(values)


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


# Bytes


def test_tiny_6e_is_rebuilt_bit_for_bit(tiny_6e):
    assert checksums(tiny_6e) == TINY_6E_FILES


def test_same_arguments_same_bytes_other_seed_other_bytes(tmp_path):
    first = checksums(write_checkpoint(tmp_path / "a", SMALL, seed=7, shards=2))
    assert checksums(write_checkpoint(tmp_path / "b", SMALL, seed=7, shards=2)) == first
    other = checksums(write_checkpoint(tmp_path / "c", SMALL, seed=8, shards=2))
    assert {name for name in first if first[name] != other[name]} == {p.name for p in shards(tmp_path / "a")}


def test_number_of_shards_moves_tensors_and_changes_none(tmp_path):
    one, five = (write_checkpoint(tmp_path / str(n), SMALL, shards=n) for n in (1, 5))
    assert [p.name for p in shards(one)] == ["model.safetensors"]
    assert not (one / "model.safetensors.index.json").exists()
    assert len(shards(five)) == 5
    assert {n: t for p in shards(five) for n, t in load_shard(p).items()} == load_shard(one / "model.safetensors")


def test_index_places_every_tensor_in_its_shard(tiny_6e):
    index = json.loads((tiny_6e / "model.safetensors.index.json").read_text("utf-8"))
    placed = {name: shard.name for shard in shards(tiny_6e) for name in load_shard(shard)}
    assert index["weight_map"] == placed
    assert index["metadata"]["total_size"] == n_bytes_of(opened(tiny_6e))


# Inventory


@pytest.mark.parametrize(
    ("shape", "n_tensors", "n_bytes"),
    [
        pytest.param(FLASH, 69_187, 159_609_485_896, id="Flash"),
        pytest.param(FLASH_0731, 72_317, 166_878_536_440, id="Flash-0731"),
        pytest.param(PRO, 145_116, 864_704_792_696, id="Pro"),
    ],
)
def test_inventory_has_the_published_size(shape, n_tensors, n_bytes):
    tensors = inventory(shape)
    assert (len(tensors), n_bytes_of(tensors)) == (n_tensors, n_bytes)
    assert n_tensors == sum(1 for _ in tensor_rows(shape))  # no name twice


def test_flash_has_the_published_number_of_tensors_per_dtype():
    assert Counter(dtype for dtype, _ in inventory(FLASH).values()) == {
        "I8": 33_792, "F8_E8M0": 34_167, "F8_E4M3": 375, "BF16": 433, "F32": 417, "I64": 3,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "dtype", "shape"),
    [
        ("embed.weight", "BF16", (129_280, 4096)),
        ("hc_head_fn", "F32", (4, 16_384)),
        ("layers.0.ffn.gate.tid2eid", "I64", (129_280, 6)),
        ("layers.2.attn.compressor.ape", "F32", (4, 1024)),
        ("layers.2.attn.indexer.wq_b.scale", "F8_E8M0", (64, 8)),
        ("layers.3.attn.compressor.wkv.weight", "BF16", (512, 4096)),
        ("layers.3.ffn.gate.bias", "F32", (256,)),
        ("layers.42.attn.wo_a.weight", "F8_E4M3", (8192, 4096)),
        ("layers.42.ffn.experts.255.w2.weight", "I8", (4096, 1024)),
        ("layers.42.ffn.experts.255.w2.scale", "F8_E8M0", (4096, 64)),
        ("mtp.0.e_proj.scale", "F8_E8M0", (32, 32)),
    ],
)
def test_flash_tensors_are_shaped_as_published(name, dtype, shape):
    assert inventory(FLASH)[name] == (dtype, shape)


@pytest.mark.parametrize(
    ("name", "dtype", "shape"),
    [
        ("mtp.0.main_proj.weight", "F8_E4M3", (4096, 12_288)),
        ("mtp.0.main_proj.scale", "F8_E8M0", (32, 96)),
        ("mtp.2.markov_head.markov_w2.weight", "BF16", (129_280, 256)),
        ("mtp.2.confidence_head.proj.weight", "BF16", (1, 4352)),
    ],
)
def test_0731_draft_is_shaped_as_published(name, dtype, shape):
    assert inventory(FLASH_0731)[name] == (dtype, shape)


# sha256 of the JSON of mtp.* of both releases, published with the counts.
@pytest.mark.parametrize(
    ("shape", "digest"),
    [
        (FLASH, "331296a906dd0fdf85384f0f6237602bc49e2e19c285ca19b1946b62cb330561"),
        (FLASH_0731, "e404f70fb47572253d4d3b3f2f1977611c4a65701bf16c81422303cbdbb4cf0b"),
    ],
    ids=["Flash", "Flash-0731"],
)
def test_draft_inventory_has_the_published_digest(shape, digest):
    draft = {n: {"dtype": d, "shape": list(s)} for n, (d, s) in inventory(shape).items() if n.startswith("mtp.")}
    text = json.dumps(draft, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(text.encode()).hexdigest() == digest


@pytest.mark.parametrize("shape", VARIANTS.values(), ids=VARIANTS)
def test_written_tensors_are_the_inventory(tmp_path, shape):
    directory = write_checkpoint(tmp_path / "x", shape, shards=2)
    assert list(opened(directory).items()) == list(inventory(shape).items())


def test_tiny_6e_opens_with_the_safetensors_library(tiny_6e):
    assert opened(tiny_6e) == inventory(TINY_6E)


def test_extra_tensors_come_last(tmp_path):
    extra = {
        "layers.0.attn.surprise": ("BF16", np.arange(6, dtype=np.uint16).reshape(2, 3).T),
        "nothing": ("F32", np.empty((0, 4), np.float32)),
    }
    directory = write_checkpoint(tmp_path / "x", SMALL, shards=2, extra=extra)
    expected = inventory(SMALL) | {"layers.0.attn.surprise": ("BF16", (3, 2)), "nothing": ("F32", (0, 4))}
    assert list(opened(directory).items()) == list(expected.items())
    data = load_shard(shards(directory)[-1])["layers.0.attn.surprise"][2]
    assert np.frombuffer(data, np.uint16).tolist() == [0, 3, 1, 4, 2, 5]


# Values


def test_every_e4m3_value_keeps_its_code():
    codes = np.array([c for c in range(256) if c & 0x7F != 0x7F], np.uint8)
    assert np.array_equal(encode_e4m3(e4m3_values()[codes].astype(np.float32)), codes)


def test_between_two_e4m3_values_the_nearest_wins_and_ties_go_to_even():
    values = e4m3_values()[:127]
    middle = ((values[:-1] + values[1:]) / 2).astype(np.float32)
    even = np.arange(126) + np.arange(126) % 2
    assert np.array_equal(encode_e4m3(middle), even)
    assert np.array_equal(encode_e4m3(np.nextafter(middle, np.float32(0))), np.arange(126))
    assert np.array_equal(encode_e4m3(-np.nextafter(middle, np.float32(448))), 0x80 + np.arange(1, 127))


@pytest.mark.parametrize("block", [(128, 128), (32, 32), (5, 7)])
def test_fp8_uses_the_range_of_each_block(block):
    w = np.random.default_rng(0).standard_normal((130, 200)).astype(np.float32)
    w[0, 0], w[129, 199] = 1e-9, 3e5
    codes, scales = quantize_fp8(w, block)
    assert scales.shape == (-(-130 // block[0]), -(-200 // block[1]))
    steps = np.exp2(np.repeat(np.repeat(scales - 127.0, block[0], 0), block[1], 1)[:130, :200])
    values = e4m3_values()[codes]
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            tile = values[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            assert 224 <= np.abs(tile).max() <= 448
    # Half a step of 3 fraction bits, or half of the smallest code.
    assert (np.abs(values * steps - w) <= np.maximum(np.abs(w) / 16, steps * 2.0**-10)).all()


def test_fp4_uses_the_range_of_each_group():
    w = np.random.default_rng(0).standard_normal((6, 96)).astype(np.float32)
    w[0, :32], w[1, 0] = 0, 6.0
    packed, scales = quantize_fp4(w)
    assert (packed.shape, packed.dtype, scales.shape) == ((6, 48), np.int8, (6, 3))
    nibbles = packed.view(np.uint8)[..., None] >> np.array([0, 4], np.uint8) & 15  # the low nibble is the even column
    values = E2M1[nibbles].reshape(6, 3, 32)
    steps = np.exp2(scales - 127.0)[..., None]
    assert (np.abs(values).max(-1)[1:] >= 3).all()
    assert (np.abs(values * steps - w.reshape(6, 3, 32)) <= steps).all()
    assert values[1, 0, 0] * steps[1, 0, 0] == 6.0


def test_hash_table_names_distinct_experts(make_checkpoint):
    directory = make_checkpoint(experts=8, experts_per_token=3)
    dtype, shape, data = load_shard(shards(directory)[0])["layers.0.ffn.gate.tid2eid"]
    ids = np.frombuffer(data, np.int64).reshape(shape)
    assert (dtype, shape) == ("I64", [512, 3])
    assert (ids.min(), ids.max()) == (0, 7)
    assert (np.diff(np.sort(ids), axis=1) > 0).all()


def test_cheap_values_look_like_weights():
    rows = list(tensor_rows(SMALL))
    first, second, other = (list(cheap_values(rows, seed)) for seed in (3, 3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert not np.array_equal(first[0], other[0])
    held = {row.name: value for row, value in zip(rows, first, strict=True)}
    assert all(row.n_bytes == value.nbytes for row, value in zip(rows, first, strict=True))
    codes = held["layers.0.attn.wq_b.weight"]
    assert not (codes & 0x7F == 0x7F).any()
    for matrix in ("layers.0.attn.wq_b", "layers.0.ffn.experts.0.w1"):
        scales = held[f"{matrix}.scale"]
        assert 2.0**-16 <= np.exp2(scales.min() - 127.0) <= np.exp2(scales.max() - 127.0) <= 2.0**-6
    decoded = e4m3_values()[codes]
    assert abs(decoded.mean()) < 3
    assert 140 < decoded.std() < 160


# config.json


@pytest.mark.parametrize(("shape", "name"), [(FLASH, "flash"), (PRO, "pro")], ids=["Flash", "Pro"])
def test_config_is_the_published_one(data, shape, name):
    published = json.loads((data / "configs" / f"{name}.json").read_text("utf-8"))
    assert list(make_config(shape).items()) == list(published.items())


def test_config_of_0731_adds_the_draft(data):
    flash = make_config(FLASH)
    added = {k: v for k, v in make_config(FLASH_0731).items() if flash.get(k) != v}
    assert added == {
        "expert_dtype": "fp4",
        "compress_ratios": [*flash["compress_ratios"], 0, 0],
        "dspark_block_size": 5,
        "dspark_noise_token_id": 128_799,
        "dspark_target_layer_ids": [40, 41, 42],
        "dspark_markov_rank": 256,
    }


def test_config_states_the_variant(make_checkpoint):
    directory = make_checkpoint(
        layers=5, fp8_block=(32, 32), expert_dtype=None, hash_layers=2, vocab=300, draft_blocks=1
    )
    config = json.loads((directory / "config.json").read_text("utf-8"))
    assert config["quantization_config"]["weight_block_size"] == [32, 32]
    assert "expert_dtype" not in config
    assert (config["num_hash_layers"], config["vocab_size"]) == (2, 300)
    assert config["compress_ratios"] == [0, 4, 128, 128, 4, 0]


# Tokenizer


def check_tokenizer(tokenizer, vocab_size):
    """What a reader may count on: ids in range and used once, merges of known parts in the order of their results."""
    vocab = tokenizer["model"]["vocab"]
    added = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    ids = Counter((vocab | added).values())
    assert max(ids.values()) == 1
    assert 0 <= min(ids) <= max(ids) < vocab_size
    assert len(added) == len(tokenizer["added_tokens"])
    assert [vocab[t] for t in list(vocab)] == list(range(len(vocab)))
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in tokenizer["model"]["merges"]]
    assert [vocab[a + b] for a, b in merges] == list(range(3 + 256, len(vocab)))
    assert all(max(vocab[a], vocab[b]) < vocab[a + b] for a, b in merges)
    return ids


@given(st.integers(LEAST_VOCAB, 3000), st.data())
@settings(deadline=None, max_examples=40)
def test_tokenizer_of_any_size_is_sound(vocab_size, data):
    most = vocab_size - LEAST_VOCAB
    merges = data.draw(st.none() | st.integers(0, most))
    tokenizer = make_tokenizer(vocab_size, merges=merges)
    ids = check_tokenizer(tokenizer, vocab_size)
    if merges is not None:
        assert len(tokenizer["model"]["merges"]) == merges
        assert len(ids) == vocab_size


def test_tokenizer_of_flash_has_the_published_counts(flash_sparse):
    tokenizer = json.loads((flash_sparse / "tokenizer.json").read_text("utf-8"))
    assert len(check_tokenizer(tokenizer, 129_280)) == 129_280
    assert len(tokenizer["model"]["merges"]) == 127_741
    assert len(tokenizer["model"]["vocab"]) == 128_000


def test_byte_tokens_cover_all_bytes():
    vocab = make_tokenizer(LEAST_VOCAB)["model"]["vocab"]
    letters = list(vocab)[3:]
    assert len(letters) == 256
    assert all(len(letter) == 1 and letter.isprintable() for letter in letters)
    assert {"!", "~", "Ġ", "Ċ", "ÿ"} <= set(letters)  # Ġ is the space, Ċ the newline: U+0100 plus the byte


def test_merges_in_both_forms_say_the_same():
    strings = make_tokenizer(600, merges=200)["model"]["merges"]
    pairs = make_tokenizer(600, merges=200, merges_form="pairs")["model"]["merges"]
    assert pairs == [merge.split(" ") for merge in strings]


def test_merges_form_reaches_the_file(make_checkpoint):
    text = (make_checkpoint(merges_form="pairs") / "tokenizer.json").read_text("utf-8")
    assert json.loads(text)["model"]["merges"][0] == ["Ġ", "t"]


# Full width and full size


def test_full_width_has_the_widths_of_flash(tmp_path):
    directory = write_full_width(tmp_path / "x", layers=1, experts=1, shards=2, vocab=300, hash_layers=0)
    flash, found = inventory(FLASH), opened(directory)
    per_layer = {n: t for n, t in found.items() if n.startswith("layers.0.") and ".gate." not in n}
    assert len(per_layer) == 33
    assert per_layer == {n: flash[n] for n in per_layer}
    config = json.loads((directory / "config.json").read_text("utf-8"))
    assert (config["hidden_size"], config["n_routed_experts"], config["num_hidden_layers"]) == (4096, 1, 1)
    shutil.rmtree(directory)  # 160 MB


def test_full_width_layers_are_of_all_kinds(monkeypatch, tmp_path):
    # The default call, its 1.4 GB of values left out: only the headers are of interest here.
    monkeypatch.setattr(checkpoint, "cheap_values", lambda rows, seed: None)
    config = json.loads((write_full_width(tmp_path / "x") / "config.json").read_text("utf-8"))
    assert config["compress_ratios"] == [0, 4, 128]
    assert config["n_routed_experts"] == 24
    assert {"layers.0.ffn.gate.tid2eid", "layers.1.attn.indexer.wq_b.weight", "layers.2.attn.compressor.ape"} < set(
        opened(tmp_path / "x")
    )


def test_sparse_flash_is_of_full_size_and_takes_little_disk(flash_sparse):
    files = shards(flash_sparse)
    assert len(files) == 46
    assert sum(p.stat().st_size - read_header(p)[1] for p in files) == 159_609_485_896
    assert sum(p.stat().st_blocks * 512 for p in flash_sparse.iterdir()) < 50e6
    assert opened(flash_sparse) == inventory(FLASH)


# Refusals


@pytest.mark.parametrize("write", [write_checkpoint, write_full_width, write_sparse])
def test_directory_in_use_is_refused_and_left_alone(tmp_path, write):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="not an empty directory"):
        write(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(UsageError, match="not an empty directory"):
        write(tmp_path / "notes.txt")


def test_empty_directory_is_taken(tmp_path):
    assert write_checkpoint(tmp_path, SMALL, shards=1) == tmp_path
    assert (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": 0}, "layers: found 0"),
        ({"experts": True}, "experts: found True"),
        ({"vocab": 512.0}, "vocab: found 512.0"),
        ({"hidden": 100}, "hidden: found 100, expected a multiple of 32"),
        ({"expert_hidden": 40}, "expert_hidden: found 40"),
        ({"head_dim": 32}, "head_dim: found 32"),
        ({"index_head_dim": 32}, "index_head_dim: found 32"),
        ({"o_groups": 3}, "o_groups: found 3"),
        ({"experts_per_token": 9}, "experts_per_token: found 9, expected at most 8"),
        ({"hash_layers": 7}, "hash_layers: found 7"),
        ({"lead_ratios": (0, 8)}, "lead_ratios"),
        ({"expert_dtype": "fp6"}, "expert_dtype"),
        ({"draft": "eagle"}, "draft: found 'eagle'"),
        ({"draft": "dspark"}, "draft_blocks: found 1, expected 3"),
        ({"fp8_block": (0, 128)}, "fp8_block"),
    ],
)
def test_impossible_shapes_are_refused(fields, message):
    with pytest.raises(UsageError) as error:
        Shape(**fields)
    assert message in str(error.value)


@pytest.mark.parametrize("count", [0, -1, 100_000])
def test_impossible_numbers_of_shards_are_refused(tmp_path, count):
    with pytest.raises(UsageError, match="shards"):
        write_checkpoint(tmp_path / "x", TINY, shards=count)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("arguments", [(LEAST_VOCAB - 1, None), (300, 20), (300, -1), (1_000_000, 900_000)])
def test_impossible_vocabularies_are_refused(arguments):
    vocab_size, merges = arguments
    with pytest.raises(UsageError, match="tokenizer"):
        make_tokenizer(vocab_size, merges=merges)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("norm.weight", ("F32", np.zeros(3, np.float32)), "is a tensor of the model"),
        ("x", ("F4", np.zeros(3, np.uint8)), "found dtype 'F4'"),
        ("x", ("F32", np.zeros(3)), "found values of 8 bytes, expected 4"),
    ],
)
def test_impossible_extra_tensors_are_refused(tmp_path, name, tensor, message):
    with pytest.raises(UsageError) as error:
        write_checkpoint(tmp_path / "x", SMALL, extra={name: tensor})
    assert message in str(error.value)
    assert not (tmp_path / "x").exists()


def test_sparse_without_holes_needs_the_space(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_has_holes", lambda path: False)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12 - 5000, 5000))
    with pytest.raises(ResourceError, match="keeps no holes and has 5000 bytes free, expected 159609485896"):
        write_sparse(tmp_path / "x")
    assert not list((tmp_path / "x").iterdir())


def test_holes_are_probed_on_a_real_file(tmp_path):
    checkpoint._has_holes(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_a_resource_error_and_leaves_no_config(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))  # the kernel refuses to make a file any larger
    try:
        with pytest.raises(ResourceError, match="cannot write"):
            write_checkpoint(tmp_path / "x", SMALL, shards=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "x" / "config.json").exists()


def test_a_parent_that_is_a_file_is_a_resource_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot write"):
        write_checkpoint(tmp_path / "file" / "x", SMALL)
