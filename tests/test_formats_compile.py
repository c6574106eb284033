"""The cache of compiled kernels: used when it is whole, replaced when it is not, done without when it cannot be."""

from __future__ import annotations

import logging
import os
import resource
import shutil
import sys
import tempfile
import threading

import numba
import numpy as np
import pytest

from dsv4tools import formats
from dsv4tools.errors import UsageError
from dsv4tools.formats import compile as compiled

KERNEL = """
from dsv4tools.formats.compile import helper, kernel

@helper
def twice(x):
    return 2 * x

@kernel("int64(int64)")
def run(x):
    return twice(x) + 1
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A package directory with one small kernel module, and an empty cache."""
    package = tmp_path / "package"
    package.mkdir()
    (package / "small_kernel.py").write_text(KERNEL)
    monkeypatch.setattr(formats, "__path__", [*formats.__path__, str(package)])
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "cache"))
    yield tmp_path / "cache" / "dsv4tools" / compiled.cache_key()
    forget()


def forget():
    """Let the next `load` act as in a new process."""
    sys.modules.pop("dsv4tools.formats.small_kernel", None)
    vars(formats).pop("small_kernel", None)


def load():
    """Load the small kernel as a new process would; how often it came from the cache, how often it was compiled."""
    forget()
    run = compiled.load("small_kernel").run
    assert run(20) == 41
    return sum(run.stats.cache_hits.values()), sum(run.stats.cache_misses.values())


FROM_CACHE, COMPILED = (1, 0), (0, 1)


def contents(entry):
    return {str(path.relative_to(entry)): path.read_bytes() for path in entry.rglob("*") if path.is_file()}


def test_it_is_compiled_once_and_said_so_before(cache, caplog, monkeypatch):
    monkeypatch.setattr(compiled, "_announced", False)
    caplog.set_level(logging.DEBUG, "dsv4tools")
    assert load() == COMPILED
    said = [(record.levelname, record.getMessage().split(" in ")[0].split(",")[0]) for record in caplog.records]
    assert said == [("INFO", "compiling kernels"), ("DEBUG", "compiled small_kernel")]
    assert load() == FROM_CACHE
    assert len(caplog.records) == 2
    assert [path.name for path in cache.iterdir()] == ["small_kernel"]   # nothing left of the building
    assert cache.stat().st_mode & 0o077 == 0


def test_the_setting_of_others_is_left_alone(cache):
    before = numba.config.CACHE_DIR
    load()
    assert before == numba.config.CACHE_DIR


@pytest.mark.parametrize("suffix", [".nbi", ".nbc", "manifest.json"])
@pytest.mark.parametrize("damage", ["empty", "half", "flipped", "gone", "a directory"])
def test_a_damaged_entry_is_replaced(cache, caplog, suffix, damage):
    load()
    entry = cache / "small_kernel"
    whole = contents(entry)
    (path,) = (entry / name for name in whole if name.endswith(suffix))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()
    if damage == "a directory":
        path.mkdir()
    elif damage != "gone":
        path.write_bytes({"empty": b"", "half": data[: len(data) // 2], "flipped": data}[damage])
    assert load() == COMPILED
    assert "compiling small_kernel again: its cache entry" in caplog.text
    assert {name.split("/")[-1] for name in contents(entry)} == {name.split("/")[-1] for name in whole}
    caplog.clear()
    assert load() == FROM_CACHE
    assert not caplog.records


def test_an_entry_that_is_whole_but_cannot_be_loaded_is_replaced(cache, caplog):
    """A file that another numba wrote, say: its checksum is right and its contents are not."""
    load()
    entry = cache / "small_kernel"
    for path in entry.rglob("*.nb?"):
        path.write_bytes(b"not what numba writes")
    compiled._write_manifest(entry)
    assert load() == COMPILED
    assert "could not be loaded" in caplog.text
    assert load() == FROM_CACHE


def test_a_cache_that_cannot_be_written(cache, caplog):
    cache.parent.parent.write_text("a file where the directory would be")
    assert load() == COMPILED
    assert "kernels are compiled for this process only: no cache in" in caplog.text


def test_a_full_disk(cache, caplog):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        assert load() == COMPILED
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "kernels are compiled for this process only: OSError" in caplog.text
    assert not list(cache.iterdir())
    assert load() == COMPILED
    assert load() == FROM_CACHE


def test_a_cache_that_can_be_read_only(cache, caplog, monkeypatch):
    """numba would fall back on a cache beside the sources, whose entries nobody checks."""
    load()
    temporary_file = tempfile.TemporaryFile

    def read_only(*args, **options):
        if str(cache) in options["dir"]:
            raise PermissionError("read-only file system")
        return temporary_file(*args, **options)

    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    assert load() == COMPILED
    assert "cannot be written" in caplog.text
    assert "for this process only" in caplog.text


def test_another_process_that_was_faster(cache, caplog, monkeypatch):
    load()
    whole = contents(cache / "small_kernel")
    forget()
    monkeypatch.setattr(compiled, "_is_intact", lambda entry: entry.exists() and "compiled" in order)
    order = []
    import_ = compiled._import
    monkeypatch.setattr(compiled, "_import", lambda *a: (order.append("compiled"), import_(*a))[1])
    assert compiled.load("small_kernel").run(1) == 3
    assert contents(cache / "small_kernel") == whole
    assert [path.name for path in cache.iterdir()] == ["small_kernel"]
    assert not caplog.records


def test_threads_that_load_at_once(cache, caplog):
    caplog.set_level(logging.DEBUG, "dsv4tools")
    results = []
    threads = [threading.Thread(target=lambda: results.append(compiled.load("small_kernel").run(5))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [11] * 8
    assert caplog.text.count("compiled small_kernel in") == 1


def test_a_kernel_with_a_mistake_says_so_and_leaves_nothing(cache, tmp_path):
    (tmp_path / "package" / "small_kernel.py").write_text(KERNEL.replace("2 * x", "x.nothing"))
    with pytest.raises(numba.core.errors.TypingError):
        load()
    assert not list(cache.iterdir())


def test_the_key_depends_on_every_source(tmp_path, monkeypatch):
    """Also on a file that the changed kernel only imports."""
    package = shutil.copytree(formats.__path__[0], tmp_path / "formats")
    monkeypatch.setattr(compiled, "_PACKAGE", package)
    key = compiled.cache_key.__wrapped__
    keys = {key()}
    assert key() in keys
    for name in ("lanes.py", "search.py", "tiles.py", "q4_k.py"):
        with (package / name).open("a") as file:
            file.write("\n")
        assert key() not in keys
        keys.add(key())
    monkeypatch.setattr(numba.config, "CPU_NAME", "another")
    assert key() not in keys


def test_a_platform_that_does_not_know_its_processor(monkeypatch):
    def unknown():
        raise RuntimeError("failed to get host cpu features.")

    assert compiled.host_features()
    monkeypatch.setattr("llvmlite.binding.get_host_cpu_features", unknown)
    assert compiled.host_features() == []
    assert compiled.cache_key.__wrapped__() != compiled.cache_key()


def test_caches_of_old_versions_go(cache):
    for i in range(9):
        (cache.parent / f"old{i}").mkdir(parents=True)
    killed, building = cache / ".small_kernel.killed", cache / ".small_kernel.building"
    killed.mkdir(parents=True)
    building.mkdir()
    os.utime(killed, (0, 0))
    load()
    assert (killed.exists(), building.exists(), cache.exists()) == (False, True, True)
    assert len(list(cache.parent.iterdir())) == 1 + compiled._KEPT_KEYS


def test_the_place_of_the_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(sys, "platform", "linux")
    assert compiled.cache_root() == tmp_path / "xdg" / "dsv4tools" / "kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert compiled.cache_root() == tmp_path / ".cache" / "dsv4tools" / "kernels"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert compiled.cache_root() == tmp_path / "Library" / "Caches" / "dsv4tools" / "kernels"


def test_a_user_without_a_home(monkeypatch, cache, caplog):
    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pathlib.Path.home", nobody)
    assert load() == COMPILED
    assert "for this process only" in caplog.text


def test_no_kernels_without_a_compiler(cache, monkeypatch):
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    with pytest.raises(UsageError, match="NUMBA_DISABLE_JIT: is set"):
        compiled.load("small_kernel")


def test_kernels_let_other_threads_run():
    """A long call does not hold the interpreter."""
    from dsv4tools.formats.codecs import quantize  # noqa: PLC0415  - compiles

    x = np.random.default_rng(0).normal(size=(2000, 4096)).astype(np.float32)
    done = threading.Event()
    ticks = 0

    def work():
        quantize(x, "Q4_K")
        done.set()

    quantize(x[:1], "Q4_K")
    thread = threading.Thread(target=work)
    thread.start()
    while not done.is_set():
        ticks += 1
        done.wait(0.0005)
    thread.join()
    assert ticks > 3
