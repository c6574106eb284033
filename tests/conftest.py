"""Checkpoints that the whole suite shares."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from process import error_line, messages

import dsv4tools as dt
from dsv4tools.checkpoint import open_checkpoint
from dsv4tools.cli.main import main
from dsv4tools.plan import make_plan
from dsv4tools.synthetic import FLASH, TINY, write_checkpoint, write_sparse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dsv4tools.plan import Plan

# Tests that reach into modules find them all loaded, whichever of them run.
_PUBLIC = [getattr(dt, name) for name in dt.__all__]

# A runner of tests in parallel (or a shell that starts them in the background) ignores Ctrl-C, and whatever is started
# from here would inherit that; several tests are about what Ctrl-C does.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SMALL = replace(TINY, layers=3, experts=4, lead_ratios=(0, 4, 128), hash_layers=1, draft_blocks=0)
"""One layer of each kind and no draft: what most tests need."""

TINY_6E = replace(TINY, layers=5, experts=12, experts_per_token=6)


def checksums(directory: Path) -> dict[str, str]:
    """File name -> sha256 of every file in `directory`."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


@pytest.fixture(scope="session")
def data() -> Path:
    """The directory of expected values."""
    return Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def tiny_6e(tmp_path_factory) -> Iterator[Path]:
    """The checkpoint that the files tests/data/tiny-6e.* were made from. Not to be changed."""
    path = write_checkpoint(tmp_path_factory.mktemp("shared") / "tiny-6e", TINY_6E, seed=1101)
    before = checksums(path)
    yield path
    assert checksums(path) == before, "a test has changed the shared checkpoint"


@pytest.fixture(scope="session")
def flash_sparse(tmp_path_factory) -> Path:
    """A checkpoint of full size whose tensors are holes. Not to be changed, not to be read through."""
    return write_sparse(tmp_path_factory.mktemp("shared") / "flash", FLASH)


@pytest.fixture(scope="session")
def flash_plan(flash_sparse) -> Plan:
    """The plan of the checkpoint of full size under the default policy."""
    return make_plan(open_checkpoint(flash_sparse))


@pytest.fixture(scope="session")
def _written(tmp_path_factory) -> Callable[..., Path]:
    """`write_checkpoint` that writes each variant once."""
    made: dict[object, Path] = {}

    def write(**arguments) -> Path:
        key = tuple(sorted(arguments.items()))
        if key not in made:
            made[key] = write_checkpoint(tmp_path_factory.mktemp("written") / "checkpoint", **arguments)
        return made[key]

    return write


@pytest.fixture
def make_checkpoint(tmp_path, _written) -> Callable[..., Path]:
    """Factory of small checkpoints that a test may change.

    ``make_checkpoint(name="checkpoint", seed=0, shards=2, merges_form="strings", **fields_of_Shape)`` returns
    ``tmp_path / name``. Variants are written once and copied after that.
    """

    def make(name="checkpoint", *, seed=0, shards=2, merges_form="strings", **fields) -> Path:
        source = _written(shape=replace(SMALL, **fields), seed=seed, shards=shards, merges_form=merges_form)
        return Path(shutil.copytree(source, tmp_path / name))

    return make


class Outcome(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> dict[str, Any]:
        """What ``--json`` printed."""
        return json.loads(self.out)

    def failed(self, code: int) -> str:
        """The error line of a command that ended with `code`."""
        assert self.code == code, self
        return error_line(self.err)

    @property
    def succeeded(self) -> bool:
        """Whether it ended well and without a word beyond notes."""
        return self.code == 0 and not messages(self.err)


@pytest.fixture
def dsv4tools(monkeypatch, capsys) -> Callable[..., Outcome]:
    """Run the command line in this process: ``dsv4tools("convert", source, out)``."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr("sys.argv", ["dsv4tools", *map(str, arguments)])
        handler = signal.getsignal(signal.SIGTERM)
        capsys.readouterr()
        try:
            with pytest.raises(SystemExit) as end:
                main()
        finally:
            signal.signal(signal.SIGTERM, handler)
        return Outcome(end.value.code, *capsys.readouterr())

    return run
