"""The command line: what every command shows, says in an error, and leaves alone."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
from dataclasses import replace
from pathlib import Path

import click
import pytest
from conftest import SMALL, checksums
from gguf_bytes import F32, STR, gguf, kv_arr, kv_str, kv_u32, tensor, text
from process import COMMAND, ROOM_SECONDS, failed, messages, run
from tamper import drop_tensor, edit_config, find_tensor, shards

import dsv4tools as dt
from dsv4tools.__main__ import start
from dsv4tools.cli.main import COMMANDS, group
from dsv4tools.errors import EXIT_CODES

HOSTILE = "\x1b[31mred\x1b[0m\x07\x9b2J\u202e"
ALL_COMMANDS = [(name,) for name in COMMANDS] + [("policy", name) for name in ("list", "show", "explain")]


def find_command(words) -> click.Command:
    command = group
    for word in words:
        command = command.get_command(click.Context(group), word)
    return command


@pytest.fixture
def source(_written):
    """A small checkpoint. Not to be changed."""
    path = _written(shape=SMALL, seed=0, shards=2, merges_form="strings")
    before = checksums(path)
    yield path
    assert checksums(path) == before


def files(directory) -> list[str]:
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*"))


# --------------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("words", [(), *ALL_COMMANDS], ids=" ".join)
def test_help_shows_examples_and_exit_codes(words, dsv4tools):
    ended = dsv4tools(*words, "--help")
    assert ended.succeeded
    shown = " ".join(ended.out.split())
    assert re.search(r"Examples?\b[^:]*: dsv4tools ", shown)
    assert "Exit codes: " + ", ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items()) + "." in shown
    assert dsv4tools(*words, "-h").out == ended.out


@pytest.mark.parametrize("words", ALL_COMMANDS, ids=" ".join)
def test_every_option_says_what_it_does(words):
    options = [p for p in find_command(words).params if isinstance(p, click.Option)]
    assert [o.name for o in options if not (o.help or "").endswith((".", ")", "]"))] == []


def test_every_command_is_in_the_list_and_in_the_documentation(dsv4tools):
    shown = dsv4tools("--help").out
    documented = (Path(__file__).parent.parent / "docs" / "commands.md").read_text("utf-8")
    for name, line in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(line)}$", shown, re.MULTILINE)
        assert re.search(rf"^\| `{name}\b", documented, re.MULTILINE)
    for code in EXIT_CODES:
        assert re.search(rf"^\|.*\b{code}\b", documented, re.MULTILINE)


def test_no_command_is_a_short_help_and_usage(dsv4tools):
    ended = dsv4tools()
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("Usage: dsv4tools")


def test_version(dsv4tools):
    assert dsv4tools("--version").out == f"dsv4tools, version {dt.__version__}\n"
    assert run("--version").stdout.endswith(f"version {dt.__version__}\n")
    [script] = importlib.metadata.entry_points(group="console_scripts", name="dsv4tools")
    assert script.load() is start


def test_ctrl_c_while_modules_load_ends_without_a_traceback():
    code = """
import importlib.abc, os, runpy, signal, sys

class Interrupts(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "click":
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Interrupts())
runpy.run_module("dsv4tools", run_name="__main__")
"""
    ended = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, "", "")


@pytest.mark.parametrize("arguments", [
    ("--help",), ("--version",), ("convert", "--help"), ("policy", "list"), ("inspect", "{source}"),
    ("convert", "{source}", "--dry-run"), ("policy", "explain", "{source}"),
], ids=" ".join)  # fmt: skip
def test_what_needs_no_kernel_does_not_import_numba(arguments, source):
    code = """
import sys
from dsv4tools.cli.main import main
try:
    main()
except SystemExit as end:
    print(end.code, "numba" in sys.modules, "llvmlite" in sys.modules, file=sys.stderr)
"""
    words = [a.format(source=source) for a in arguments]
    ended = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert ended.stderr == "0 False False\n"


def test_help_does_not_import_the_library():
    code = """
import sys
from dsv4tools.cli.main import main
try:
    main()
except SystemExit:
    print(*sorted(m for m in sys.modules if m.split(".")[0] in ("dsv4tools", "numpy")), file=sys.stderr)
"""
    ended = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True)
    assert ended.stderr.split() == ["dsv4tools", "dsv4tools.cli", "dsv4tools.cli.main", "dsv4tools.cli.output",
                                    "dsv4tools.errors"]


def test_a_shell_can_ask_for_completions():
    ended = run(environment={"_DSV4TOOLS_COMPLETE": "bash_source"})
    assert (ended.returncode, messages(ended.stderr)) == (0, [])
    assert "complete " in ended.stdout


# --------------------------------------------------------------------------------------------------------------- JSON


def test_json_of_convert(source, tmp_path, dsv4tools):
    out = tmp_path / "out.gguf"
    planned = dsv4tools("convert", source, out, "--dry-run", "--json", "--threads", 3).data
    assert planned.keys() == {
        "out", "total_bytes", "data_bytes", "data_offset", "source_bytes", "free_bytes", "fits", "hash_verified",
        "threads", "buffer_bytes", "estimated_seconds", "policy", "experts_per_token", "nan", "notes", "left_out",
        "bytes_by_type", "n_tensors", "tensors", "engines", "changes", "hints", "imatrix", "imatrix_coverage", "files",
        "stream",
    }  # fmt: skip
    assert planned["fits"] is True
    assert planned["threads"] == 3
    assert not out.exists()
    done = dsv4tools("convert", source, out, "--manifest", tmp_path / "m", "--json", "--threads", 3).data
    added = {"seconds", "zeroed", "manifest", "losses"}
    assert done.keys() == planned.keys() - {"tensors", "free_bytes", "estimated_seconds"} | added
    assert {k: v for k, v in done.items() if k not in added} == {k: planned[k] for k in done.keys() - added}
    assert done["total_bytes"] == out.stat().st_size
    assert done["manifest"] == str(tmp_path / "m")
    assert sum(t["n_bytes"] for t in planned["tensors"]) == sum(planned["bytes_by_type"].values())
    assert {t["rule"] for t in planned["tensors"]} >= {"vector", "routing table"}
    seen = dsv4tools("inspect", out, "--json").data
    assert seen["kind"] == "gguf"
    assert seen["data_offset"] == planned["data_offset"]
    assert [t["name"] for t in seen["tensors"]] == [t["name"] for t in planned["tensors"]]
    assert seen["experts"] == {"routed": 4, "per_token": 2, "shared": 1}
    assert seen["findings"] == []


def test_json_of_the_others(source, tmp_path, dsv4tools):
    seen = dsv4tools("inspect", source, "--json").data
    assert seen["kind"] == "checkpoint"
    assert seen["experts"] == {"routed": 4, "per_token": 2, "shared": 1}
    assert seen["layers"] == {"n": 3, "by_compress_ratio": {"0": 1, "4": 1, "128": 1}, "hash_routed": [0]}
    assert seen["tokenizer"]["n_tokens"] == 512
    policies = dsv4tools("policy", "list", "--json").data["policies"]
    assert policies[0]["name"] == "q4k"
    assert dsv4tools("policy", "show", "q4k", "--json").data == policies[0]
    explained = dsv4tools("policy", "explain", source, "--json").data
    assert explained.keys() == {"policy", "total_bytes", "tensors"}
    assert explained["tensors"][0].keys() == {"tensor", "type", "n_bytes", "rule"}
    written = dsv4tools("template", source, tmp_path / "t.gguf", "--json").data
    assert written.keys() == {"out", "n_bytes", "sparse", "n_tensors", "total_bytes", "notes"}
    assert written["n_bytes"] == (tmp_path / "t.gguf").stat().st_size
    assert written["total_bytes"] == explained["total_bytes"]


def test_text_says_what_json_says(source, tmp_path, dsv4tools):
    ended = dsv4tools("convert", source, tmp_path / "o.gguf", "--dry-run")
    planned = dsv4tools("convert", source, tmp_path / "o.gguf", "--dry-run", "--json").data
    assert f"tensor data    {planned['data_bytes']} bytes" in ended.out
    assert f"{planned['total_bytes']} bytes" in ended.out
    assert re.search(r"free space +[\d.]+ [GT]B \([\d.]+ [GT]iB\)\n", ended.out)
    assert re.search(r"memory +about ", ended.out)
    assert re.search(r"time +about .* estimate", ended.out)
    assert "not hash-verified" in ended.out
    for t in planned["tensors"]:
        assert re.search(rf"^{re.escape(t['name'])} +{'x'.join(map(str, t['ne']))} +{t['type']} +{t['offset']} ",
                         ended.out, re.MULTILINE)  # fmt: skip
    assert "experts        4 routed, 2 active per token, 1 shared" in dsv4tools("inspect", source).out
    assert "blk.0.ffn_gate_exps.weight" in dsv4tools("policy", "explain", source).out
    shown = dsv4tools("policy", "show", "q4k").out
    assert shown == (Path(__file__).parent.parent / "policies" / "q4k.toml").read_text("utf-8")


def test_a_dry_run_at_full_size_writes_nothing(flash_sparse, tmp_path, monkeypatch, dsv4tools):
    monkeypatch.chdir(tmp_path)
    planned = dsv4tools("convert", flash_sparse, "--dry-run", "--json", "--manifest", tmp_path / "m").data
    # Of a header that llama.cpp and ds4 were both seen to load: each tensor padded to 32.
    assert planned["data_bytes"] == 164_628_168_768
    assert planned["n_tensors"] == 1328
    assert planned["buffer_bytes"] < 1 << 30
    assert files(tmp_path) == []


def test_a_dry_run_does_not_mind_the_output(source, tmp_path, dsv4tools):
    (tmp_path / "there").write_text("mine")
    for out in (tmp_path / "there", tmp_path / "no" / "where.gguf"):
        ended = dsv4tools("convert", source, out, "--dry-run")
        assert ended.succeeded
    assert files(tmp_path) == ["there"]
    assert "free space     unknown" in ended.out


# -------------------------------------------------------------------------------------------------------------- names


def test_the_output_is_named_by_convention(make_checkpoint, tmp_path, monkeypatch, dsv4tools):
    monkeypatch.chdir(tmp_path)
    source = make_checkpoint("DeepSeek-V4-Tiny", layers=1)
    out = dsv4tools("convert", source, "--json").data["out"]
    assert re.fullmatch(r"DeepSeek-V4-Tiny-4x[\d.]+[KM]-v1\.0-Q4_K\.gguf|DeepSeek-V4-Tiny-[\w.x]+-v1\.0-\w+\.gguf", out)
    assert (tmp_path / out).is_file()
    options = ("--experts-per-token", 1, "--policy", "bf16")
    other = dsv4tools("convert", source, "--dry-run", "--json", *options).data["out"]
    assert re.fullmatch(r"DeepSeek-V4-Tiny-[\w.x]+-1Expert-v1\.0-BF16\.gguf", other)
    (source / "README.md").write_text("---\nmodel_name: ../../etc/Müller \x1b[31m 7B\n---\n".replace("\x1b", "\\e"))
    hostile = dsv4tools("convert", source, "--dry-run", "--json").data["out"]
    assert "/" not in hostile
    assert hostile.isascii()
    assert hostile.isprintable()
    assert hostile.endswith(".gguf")


def test_existing_names_are_kept(source, tmp_path, monkeypatch, dsv4tools):
    monkeypatch.chdir(tmp_path)
    out = dsv4tools("convert", source, "--json").data["out"]
    before = (tmp_path / out).read_bytes()
    (tmp_path / out).write_bytes(b"mine")
    assert "exists; --overwrite replaces it" in dsv4tools("convert", source).failed(2)
    assert (tmp_path / out).read_bytes() == b"mine"
    assert dsv4tools("convert", source, "--overwrite").code == 0
    assert (tmp_path / out).read_bytes() == before
    assert files(tmp_path) == [out]


# ------------------------------------------------------------------------------------------------------------- errors


def cut(source):
    shard, position, n_bytes = find_tensor(source, "norm.weight")
    shard.write_bytes(shard.read_bytes()[: position + n_bytes // 2])


def link_out(source):
    shard = shards(source)[0]
    shard.rename(source.parent / "elsewhere.safetensors")
    shard.symlink_to(source.parent / "elsewhere.safetensors")


def policy(tmp_path, content) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(content)
    return path


BAD_SOURCES = {
    "no directory": (lambda c: None, "{c}/none", "checkpoint/none: is missing"),
    "a file": (lambda c: None, "{c}/config.json", "config.json: is no directory"),
    "an empty directory": (lambda c: (c / "empty").mkdir(), "{c}/empty", "config.json: is missing"),
    "a shard is missing": (lambda c: shards(c)[1].unlink(), "{c}", "model-00002-of-00002.safetensors is named by"),
    "a shard is cut": (cut, "{c}", "model-00002-of-00002.safetensors: is truncated"),
    "a shard is empty": (lambda c: shards(c)[0].write_bytes(b""), "{c}", "00001-of-00002.safetensors: has 0 bytes"),
    "a scale is missing": (lambda c: drop_tensor(c, "layers.1.attn.wkv.scale"), "{c}", "layers.1.attn.wkv.scale"),
    "a weight is missing": (lambda c: drop_tensor(c, "head.weight"), "{c}", "head.weight"),
    "no tokenizer": (lambda c: (c / "tokenizer.json").unlink(), "{c}", "tokenizer.json: is missing"),
    "no JSON": (lambda c: (c / "config.json").write_text("{"), "{c}", "config.json: is not valid JSON"),
    "a wrong number": (lambda c: edit_config(c, n_routed_experts=3), "{c}", "nothing uses: layers.0.ffn.experts.3"),
    "a link that leads out": (link_out, "{c}", "outside the checkpoint"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_SOURCES)
def test_a_bad_checkpoint(case, make_checkpoint, tmp_path, dsv4tools):
    spoil, path, said = BAD_SOURCES[case]
    checkpoint = make_checkpoint()
    spoil(checkpoint)
    before = checksums(checkpoint) if case != "an empty directory" else None
    (tmp_path / "out").mkdir()
    for options in ((), ("--dry-run",), ("--json",)):
        message = dsv4tools("convert", path.format(c=checkpoint), tmp_path / "out" / "o.gguf", *options).failed(3)
        assert said in message
    assert files(tmp_path / "out") == []
    assert before is None or checksums(checkpoint) == before


BAD_POLICIES = {
    "syntax": ('description = "x"\n[[rule]\ntensors = "*"\n', "line 2"),
    "type": ('[[rule]]\ntensors = "blk.*"\ntype = "Q4_K"\n[[rule]]\ntensors = "*"\ntype = "Q9"\n',
             "rule 2 ('*'): unknown type 'Q9'"),
    "nothing": ('[[rule]]\ntensors = "nothing.*"\ntype = "F16"\n[[rule]]\ntensors = "*"\ntype = "F16"\n',
                "mine.toml: mine rule 1: nothing.*: decides no tensor"),
    "incomplete": ('[[rule]]\ntensors = "blk.*"\ntype = "F16"\n',
                   "mine.toml: no rule matches tensor 'token_embd.weight'"),
    "vector": ('[[rule]]\ntensors = "output_norm.weight"\ntype = "F16"\n[[rule]]\ntensors = "*"\ntype = "F16"\n',
               "'output_norm.weight' is a vector, which is always F32"),
    "no encoder": ('[[rule]]\ntensors = "*"\ntype = "IQ1_S"\n', "type IQ1_S cannot be written"),
    "hostile": (f'[[rule]]\ntensors = "a{chr(92)}u001b[31m"\ntype = "F16"\n', "is no glob of tensor names"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_POLICIES)
def test_a_bad_policy(case, source, tmp_path, dsv4tools):
    content, said = BAD_POLICIES[case]
    message = dsv4tools("convert", source, tmp_path / "o.gguf", "--policy", policy(tmp_path, content)).failed(3)
    assert said in message
    assert files(tmp_path) == ["mine.toml"]


def test_a_row_that_is_no_whole_number_of_blocks(make_checkpoint, tmp_path, dsv4tools):
    checkpoint = make_checkpoint(hidden=288)
    message = dsv4tools("convert", checkpoint, tmp_path / "o.gguf").failed(3)
    assert "288 columns are not a whole number of Q4_K blocks of 256 values" in message
    assert "by --tensor-type blk.0.ffn_gate_exps.weight=TYPE" in message
    assert "blk.0.ffn_gate_exps.weight" in message


USAGE = {
    "threads 0": (["--threads", "0"], "'--threads': 0 is not in the range 1<=x<=1024"),
    "threads -1": (["--threads", "-1"], "'--threads': -1 is not in the range"),
    "threads 10**6": (["--threads", "1000000"], "'--threads': 1000000 is not in the range"),
    "threads many": (["--threads", "many"], "'many' is not a valid integer"),
    "experts 7": (["--experts-per-token", "7"], "is 7, the checkpoint routes each token to 2"),
    "experts 0": (["--experts-per-token", "0"], "0 is not in the range"),
    "policy": (["--policy", "q5"], "'q5' is neither a shipped policy (bf16, f32, mxfp4, q2, q4k, q8) nor a file"),
    "type": (["--experts", "q9_k"], "--experts: unknown ggml type 'q9_k'"),
    "tensor type": (["--tensor-type", "blk.0"], "'blk.0' is not NAME=TYPE"),
    "nan": (["--nan", "ignore"], "'ignore' is not one of 'refuse', 'zero'"),
    "option": (["--speed", "9"], "No such option"),
    "argument": (["more", "arguments"], "unexpected extra argument"),
}


@pytest.mark.parametrize("case", USAGE)
def test_wrong_usage(case, source, tmp_path, dsv4tools):
    options, said = USAGE[case]
    message = dsv4tools("convert", source, tmp_path / "o.gguf", *options).failed(2)
    assert said in message
    assert files(tmp_path) == []


def test_wrong_usage_of_the_others(source, tmp_path, dsv4tools):
    assert "dsv4tools: No such command 'comvert'" in dsv4tools("comvert", source).failed(2)
    assert "Missing argument 'SRC'; see dsv4tools convert --help" in dsv4tools("convert").failed(2)
    assert "Missing argument 'OUT.gguf'" in dsv4tools("template", source).failed(2)
    assert "neither a shipped policy" in dsv4tools("policy", "show", "q5").failed(2)
    assert "No such command" in dsv4tools("policy", "make").failed(2)
    assert "Missing argument 'FILE|DIR|hf://...'" in dsv4tools("inspect").failed(2)
    assert "no such file" in dsv4tools("inspect", tmp_path / "none").failed(3)
    assert "--threads" in dsv4tools("verify", tmp_path / "x", "--threads", 0).failed(2)


def test_outputs_that_must_not_be_written(make_checkpoint, tmp_path, dsv4tools):
    checkpoint = make_checkpoint(layers=1)
    shard = shards(checkpoint)[0]
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "there.gguf").write_text("mine")
    (outside / "hard.gguf").hardlink_to(shard)
    (outside / "soft.gguf").symlink_to(shard)
    (outside / "a.gguf.partial").hardlink_to(shard)
    (outside / "b.gguf.partial").symlink_to(shard)
    (outside / "c.gguf.partial").symlink_to(outside / "there.gguf")
    (outside / "d.gguf.partial").hardlink_to(outside / "there.gguf")
    (outside / "linked").symlink_to(checkpoint)
    before, held = checksums(checkpoint), files(outside)
    for command in ("convert", "template"):
        for name, options, code, said in (
            ("there.gguf", (), 2, "exists; --overwrite replaces it"),
            ("hard.gguf", ("--overwrite",), 2, "is one of the inputs"),
            ("soft.gguf", ("--overwrite",), 2, "is one of the inputs"),
            ("a.gguf", ("--overwrite",), 2, "is one of the inputs"),
            ("b.gguf", ("--overwrite",), 2, "is one of the inputs"),
            ("c.gguf", ("--overwrite",), 4, "c.gguf.partial: cannot be written"),
            ("d.gguf", ("--overwrite",), 4, "has a second name as a hard link"),
            (shard, ("--overwrite",), 2, "is one of the inputs"),
            (checkpoint / "new.gguf", (), 2, "lies in the source directory"),
            ("linked/new.gguf", (), 2, "lies in the source directory"),
            (f"../{checkpoint.name}/new.gguf", (), 2, "lies in the source directory"),
            (".", (), 2, "is a directory"),
            ("no/where.gguf", (), 4, "no: is no directory; create it first"),
            ("there.gguf/o.gguf", (), 4, "there.gguf: is no directory"),
            ("x" * 250 + ".gguf", (), 4, "cannot be written: File name too long"),
            ("x" * 300, (), 4, "cannot be written: File name too long"),
        ):  # fmt: skip
            message = dsv4tools(command, checkpoint, outside / name, *options).failed(code)
            assert said in message
            assert files(outside) == held
    assert checksums(checkpoint) == before
    assert (outside / "there.gguf").read_text() == "mine"


def test_template_files(source, tmp_path, dsv4tools):
    out = tmp_path / "o.gguf"
    assert "none: no such file" in dsv4tools("convert", source, out, "--template", tmp_path / "none").failed(3)
    (tmp_path / "text").write_text("no GGUF at all, and long enough to have had a header")
    assert "text: " in dsv4tools("convert", source, out, "--template", tmp_path / "text").failed(3)
    assert "give a template file" in dsv4tools("convert", source, out, "--policy", "template").failed(3)
    assert dsv4tools("template", source, tmp_path / "t.gguf").code == 0
    assert dsv4tools("convert", source, out, "--template", tmp_path / "t.gguf", "--policy", "template").code == 0
    assert dsv4tools("verify", out, "--source", source).code == 0
    assert b"dsv4tools.template" not in out.read_bytes()[:100_000]


def test_debug_shows_the_traceback(tmp_path, dsv4tools):
    for arguments in (("--debug", "inspect", tmp_path / "none"), ("inspect", tmp_path / "none", "--debug")):
        ended = dsv4tools(*arguments)
        assert ended.code == 3
        assert ended.err.startswith("Traceback (most recent call last):\n")
        assert ended.err.splitlines()[-1].startswith("error: ")
    ended = dsv4tools("inspect", "--", "--debug")       # a file of that name
    assert (ended.code, "Traceback" in ended.err) == (3, False)


@pytest.mark.parametrize(("error", "code", "said"), [
    (ValueError("two\nlines\x1b[31m"), 1, r"a bug in dsv4tools: ValueError: two\x0alines\x1b[31m; please report it"),
    (MemoryError(), 4, "not enough memory; use fewer --threads"),
    (OSError(5, "Input/output error", "/some/file"), 4, "/some/file: Input/output error"),
    (OSError("odd"), 4, "input/output: odd"),
    (RecursionError("deep"), 1, "a bug in dsv4tools: RecursionError: deep"),
    (KeyboardInterrupt(), 130, "interrupted; no unfinished file has its final name"),
])  # fmt: skip
def test_any_other_exception_is_failed(error, code, said, source, monkeypatch, dsv4tools):
    def fail(*_):
        raise error

    monkeypatch.setattr(sys.modules["dsv4tools.cli.inspect"], "open_argument", fail)
    assert said in dsv4tools("inspect", source).failed(code)


def test_a_conversion_without_memory_names_the_tensor(source, tmp_path, monkeypatch, dsv4tools):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(sys.modules["dsv4tools.derive"].UnitDeriver, "encode", fail)
    message = dsv4tools("convert", source, tmp_path / "o.gguf").failed(4)
    assert "not enough memory; use fewer --threads" in message
    assert message.startswith(("error: token_embd.weight: ", "error: output"))
    assert files(tmp_path) == []


# --------------------------------------------------------------------------------------------- terminals, pipes, text


def test_a_reader_that_goes_away_early(source, tmp_path):
    for arguments in (("inspect", source), ("convert", source, "--dry-run"), ("policy", "show", "q4k"), ("--help",)):
        read_end, write_end = os.pipe()
        os.close(read_end)
        ended = run(*arguments, stdout=write_end, stderr=subprocess.PIPE, capture_output=False, cwd=tmp_path)
        os.close(write_end)
        assert ended.returncode == 4
        assert ended.stderr == ""


def test_one_line_through_a_real_pipe(source):
    shell = f"'{COMMAND[0]}' -m dsv4tools convert '{source}' --dry-run --json | head -1"
    ended = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, timeout=ROOM_SECONDS, check=True)
    assert (ended.stdout, ended.stderr) == ("{\n", "")


def test_a_stdout_that_takes_nothing(source):
    with Path("/dev/full").open("w") as full:
        for arguments in (("inspect", source), ("--help",), ("inspect", source, "--json")):
            ended = run(*arguments, stdout=full, stderr=subprocess.PIPE, capture_output=False)
            assert ended.returncode == 4
            assert ended.stderr == "error: input/output: No space left on device\n"


def test_closed_standard_streams(source, tmp_path):
    """No output file may get the number of a standard stream that somebody writes to."""
    dt.convert(dt.plan(dt.open_checkpoint(source)), tmp_path / "expected.gguf")
    for closed in ("2>&-", "<&- >&- 2>&-"):
        out = tmp_path / "out.gguf"
        shell = f"'{COMMAND[0]}' -m dsv4tools convert '{source}' '{out}' {closed}"
        ended = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, timeout=ROOM_SECONDS, check=False)
        assert (ended.returncode, messages(ended.stderr)) == (0, [])
        assert out.read_bytes() == (tmp_path / "expected.gguf").read_bytes()
        out.unlink()
        ended = subprocess.run(["sh", "-c", f"{shell} --experts-per-token 9"], capture_output=True, check=False)
        assert ended.returncode == 2


def test_closed_streams_keep_their_numbers(tmp_path):
    code = """
import contextlib, os, sys
from dsv4tools.cli import main
with contextlib.suppress(SystemExit):
    main()
fd = os.open(sys.argv[2], os.O_CREAT | os.O_WRONLY)
os.write(fd, b"%d" % fd)
"""
    for closed in ("<&-", ">&-", "2>&-", "<&- >&- 2>&-"):
        shell = f"\"$0\" -c '{code}' --version '{tmp_path / 'fd'}' {closed}"
        subprocess.run(["sh", "-c", shell, sys.executable], check=True)
        assert int((tmp_path / "fd").read_text()) > 2


def test_a_pipe_gets_neither_colours_nor_progress(source, tmp_path):
    ended = run("convert", source, tmp_path / "o.gguf", environment={"FORCE_COLOR": "1", "TERM": "xterm-256color"})
    assert (ended.returncode, messages(ended.stderr)) == (0, [])
    last = r"^wrote .*o\.gguf: 92 tensors, .* in .*\nnext: dsv4tools verify .*\n\Z"
    assert re.search(last, ended.stdout, re.MULTILINE)
    assert "\x1b" not in ended.stdout
    assert "\r" not in ended.stdout


def on_terminal(*arguments, environment, columns=100, command=COMMAND) -> tuple[int, str]:
    """Run a command whose stderr is a terminal; its exit code and what the terminal showed."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, columns))
    process = subprocess.Popen([*command, *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=theirs,
                               env={**os.environ, **environment})  # fmt: skip
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):      # EIO: the last writer has closed
        while part := os.read(ours, 65536):
            shown += part
    os.close(ours)
    return process.wait(ROOM_SECONDS), shown.decode()


def test_a_line_does_not_run_into_a_progress_bar():
    story = "from dsv4tools.cli.output import progress_bar, say\nwith progress_bar(9, 'x') as f: f(5); say('note: so')"
    code, shown = on_terminal(environment={"TERM": "xterm"}, command=(sys.executable, "-c", story))
    assert (code, "| 5.00/9.00 [" in shown) == (0, True)
    assert "note: so" in [line.split("\r")[-1] for line in shown.split("\r\n")], shown


@pytest.mark.parametrize("columns", [100, 0])
def test_a_terminal_sees_rate_and_remaining_time(columns, source, tmp_path):
    environment = {"TERM": "xterm"}
    code, shown = on_terminal("convert", source, tmp_path / "o.gguf", environment=environment, columns=columns)
    assert code == 0
    assert "o.gguf: " in shown
    assert "100%" in shown
    assert re.search(r"\d+:\d\d<\d+:\d\d, +[\d.]+[kMG]?B/s", shown)    # elapsed<remaining, rate
    if columns:
        code, shown = on_terminal("verify", tmp_path / "o.gguf", "--source", source, environment=environment)
        assert code == 0
        assert "100%" in shown
        assert "B/s" in shown


def test_a_dumb_terminal_sees_no_progress(source, tmp_path):
    code, shown = on_terminal("convert", source, tmp_path / "o.gguf", environment={"TERM": "dumb"})
    assert (code, messages(shown)) == (0, [])


NOT_UTF8 = {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


@pytest.fixture(scope="module")
def oddly_named(_written, tmp_path_factory):
    """A checkpoint and its GGUF, in paths with blanks, quotes and characters of several scripts."""
    directory = tmp_path_factory.mktemp("odd")
    source = _written(shape=replace(SMALL, layers=1), seed=0, shards=2, merges_form="strings")
    checkpoint = shutil.copytree(source, directory / "Prüf stand \u2603 it's")
    return checkpoint, directory / "aus gabe \u4e2d.gguf"


@pytest.mark.parametrize("environment", [{"LC_ALL": "C"}, NOT_UTF8], ids=["C", "not-UTF-8"])
def test_a_conversion_in_any_locale(environment, oddly_named):
    checkpoint, out = oddly_named
    manifest = out.with_name("mäni fest")
    options = {"environment": environment, "encoding": "utf-8", "errors": "replace"}
    ended = run("convert", checkpoint, out, "--manifest", manifest, "--overwrite", **options)
    assert (ended.returncode, messages(ended.stderr)) == (0, [])
    assert f"{out.name}:token_embd.weight" in manifest.read_text("utf-8")
    ended = run("verify", out, "--source", checkpoint, **options)
    assert (ended.returncode, messages(ended.stderr)) == (0, [])


@pytest.mark.parametrize("environment", [
    {"LC_ALL": "C"}, NOT_UTF8, {"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"}, {"LC_ALL": "C.UTF-8"},
], ids=range(5))  # fmt: skip
def test_words_in_any_locale(environment, oddly_named):
    checkpoint, out = oddly_named
    options = {"environment": environment, "encoding": "utf-8", "errors": "replace"}
    ended = run("inspect", checkpoint, **options)
    assert (ended.returncode, messages(ended.stderr)) == (0, [])
    seen = run("inspect", checkpoint, "--json", environment=environment)
    assert json.loads(seen.stdout)["path"].encode("utf-8", "surrogateescape") == bytes(checkpoint)
    failed(run("convert", checkpoint / "none", out, **options), 3)


def test_what_to_do_next_can_be_copied(make_checkpoint, tmp_path, dsv4tools):
    checkpoint = make_checkpoint("it's a\tcheckpoint", layers=1)
    out = tmp_path / "my file.gguf"
    ended = dsv4tools("convert", checkpoint, out)
    following = next(line for line in ended.out.splitlines() if line.startswith("next: "))
    command = following.removeprefix("next: dsv4tools ").replace("\\x09", "\t")
    shell = f"'{COMMAND[0]}' -m dsv4tools {command}"
    assert subprocess.run(["sh", "-c", shell], capture_output=True, timeout=ROOM_SECONDS, check=False).returncode == 0


def test_a_path_that_is_no_unicode(make_checkpoint, tmp_path):
    name = os.fsdecode(b"\xff\xfe odd")
    checkpoint = make_checkpoint(name, layers=1)
    out = tmp_path / f"{name}.gguf"
    manifest = tmp_path / "m"
    ended = run("convert", checkpoint, out, "--manifest", manifest)
    assert (ended.returncode, messages(ended.stderr)) == (0, [])
    assert b"\xff\xfe odd.gguf:token_embd.weight" in manifest.read_bytes()
    assert json.loads(run("inspect", checkpoint, "--json").stdout)["path"] == str(checkpoint)
    failed(run("convert", checkpoint, out), 2)


# -------------------------------------------------------------------------------------------- hostile names and texts


def harmless(ended) -> None:
    for shown in (ended.out, ended.err):
        assert all(c.isprintable() or c in "\n\t" for c in shown), shown


def test_control_characters_never_reach_the_terminal(source, make_checkpoint, tmp_path, dsv4tools):
    file = tmp_path / f"{HOSTILE}.gguf"
    file.write_bytes(gguf([
        kv_str("general.architecture", HOSTILE), kv_str(f"key.{HOSTILE}", f"one\n{HOSTILE}\rtwo"), kv_u32("\x1b", 1),
        kv_arr("list", STR, 2, text(HOSTILE) + text("b")), kv_arr("nan", F32, 1, b"\0\0\xc0\x7f"),
    ], [tensor(HOSTILE, (8,)), tensor("b", (8,), offset=32)], bytes(64)))  # fmt: skip
    for options in ((), ("--tensors",), ("--json",)):
        harmless(dsv4tools("inspect", file, *options))
    seen = dsv4tools("inspect", file, "--json").data
    assert seen["metadata"][f"key.{HOSTILE}"] == f"one\n{HOSTILE}\rtwo"
    assert seen["metadata"]["nan"] == ["nan"]
    assert "\nkey." not in dsv4tools("inspect", file).out.replace("\nkey.\\x1b", "")
    for options in ((), ("--json",), ("--source", source), ("--source", source, "--json")):
        harmless(dsv4tools("verify", file, *options))
    harmless(dsv4tools("convert", source, tmp_path / "o.gguf", "--template", file))
    checkpoint = make_checkpoint(HOSTILE)
    edit_config(checkpoint, scoring_func=HOSTILE)
    for arguments in (("inspect", checkpoint), ("convert", checkpoint), ("convert", checkpoint, "--json")):
        ended = dsv4tools(*arguments)
        ended.failed(3)
        harmless(ended)
    harmless(dsv4tools(HOSTILE))
    harmless(dsv4tools("convert", source, "--policy", HOSTILE))
    mine = policy(tmp_path, f'[[rule]]\ntensors = "*"\ntype = "F16"  # {HOSTILE[-1]}\n')
    harmless(dsv4tools("policy", "show", mine))


def test_a_description_cannot_forge_a_line(source, tmp_path, dsv4tools):
    forged = '''description = """x\nOUT.gguf: right: 9 tensors"""\n[[rule]]\ntensors = "*"\ntype = "F16"\n'''
    ended = dsv4tools("convert", source, tmp_path / "o.gguf", "--policy", policy(tmp_path, forged), "--dry-run")
    assert ended.code == 0
    assert "\nOUT.gguf: right" not in ended.out


# --------------------------------------------------------------------------------------------------------- quickstart


def test_quickstart(tmp_path, dsv4tools):
    ended = dsv4tools("quickstart", "--keep", tmp_path / "demo", "--layers", 3, "--experts", 6)
    assert ended.succeeded
    assert re.search(r"(\d+) of \1 tensors are what the source gives, byte for byte", ended.out)
    demo = tmp_path / "demo"
    assert dsv4tools("verify", demo / "tiny.gguf", "--source", demo / "tiny-checkpoint").code == 0
    assert "exists" in dsv4tools("quickstart", "--keep", demo).failed(2)
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").touch()
    for taken in (other, other / "mine.txt"):
        assert "is no empty directory" in dsv4tools("quickstart", "--keep", taken).failed(2)
    assert files(other) == ["mine.txt"]
    before = files(tmp_path)
    assert dsv4tools("quickstart", "--layers", 3, "--experts", 6).code == 0
    assert files(tmp_path) == before
