"""scripts/convert-4expert: from a directory and from a Hub to a verified GGUF, whatever was there before."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import checksums
from hub_server import HubServer

import dsv4tools as dt

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "convert_4expert.py"


def convert_4expert(*arguments, cwd, environment=None):
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, check=False,
                          cwd=cwd, env=environment or dict(os.environ), timeout=300)


def steps(out: str) -> list[str]:
    return [line.split()[2] for line in out.splitlines() if line.startswith("$ dsv4tools ")]


@pytest.fixture
def six(make_checkpoint) -> Path:
    return make_checkpoint("six", experts=12, experts_per_token=6)


def test_from_a_directory(six, tmp_path):
    before = checksums(six)
    ended = convert_4expert(six, "out.gguf", cwd=tmp_path)
    assert ended.returncode == 0, ended
    assert steps(ended.stdout) == ["reroute", "convert", "verify", "generate"]
    assert "The weather is great today" in ended.stdout
    assert "out.gguf is right" in ended.stdout
    assert checksums(six) == before
    expected = tmp_path / "expected.gguf"
    dt.convert(dt.plan(dt.open_checkpoint(tmp_path / "six-4Expert")), expected)
    assert (tmp_path / "out.gguf").read_bytes() == expected.read_bytes()


def test_from_a_hub(make_checkpoint, tmp_path):
    four = make_checkpoint("four", experts=12, experts_per_token=4)
    with HubServer({"org/four": four}) as hub:
        environment = hub.environment(tmp_path / "home")
        work = tmp_path / "work"
        work.mkdir()
        ended = convert_4expert("org/four", cwd=work, environment=environment)
        assert ended.returncode == 0, ended
        assert steps(ended.stdout) == ["download", "convert", "verify", "generate"]
        assert "four has 4 experts per token already: no re-routing" in ended.stdout
        (out,) = work.glob("*.gguf")
        assert dt.verify(out, source=work / "four").ok


@pytest.fixture
def script(monkeypatch, tmp_path):
    """The script as a module, in a directory of its own; its steps are noted in `script.steps` and not run."""
    spec = importlib.util.spec_from_file_location("convert_4expert", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.steps, module.experts = [], {}
    monkeypatch.setattr(module, "run", lambda *arguments: module.steps.append([str(a) for a in arguments]))
    monkeypatch.setattr(module, "ask", lambda _, path, *__: {
        "experts": {"per_token": module.experts.get(Path(path).name, 6)}, "out": "default.gguf"})
    monkeypatch.chdir(tmp_path)

    def main(*arguments) -> int:
        monkeypatch.setattr("sys.argv", ["convert-4expert", *map(str, arguments)])
        return module.main()

    module.call = main
    return module


def test_what_is_there_is_not_done_again(script, tmp_path, capsys):
    for name in ("six", "six-4Expert"):
        (tmp_path / name).mkdir()
    (tmp_path / "default.gguf").touch()
    script.experts = {"six-4Expert": 4}
    assert script.call("six") == 0
    assert script.steps == [
        ["verify", "default.gguf", "--source", str(tmp_path / "six-4Expert")],
        ["generate", "default.gguf", "-p", "The weather is great today", "-n", "8"],
    ]
    assert "default.gguf is there already: it is verified below" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "repository", "directory", "experts"), [
    ((), "hf://deepseek-ai/DeepSeek-V4-Flash", "DeepSeek-V4-Flash", 6),
    (("cloudyu/DeepSeek-V4-Flash-4Expert",), "hf://cloudyu/DeepSeek-V4-Flash-4Expert", "DeepSeek-V4-Flash-4Expert", 4),
    (("hf://a/b@v1",), "hf://a/b@v1", "b", 6),
])
def test_repositories(script, tmp_path, arguments, repository, directory, experts):
    script.experts = {directory: experts}
    assert script.call(*arguments) == 0
    four = tmp_path / f"{directory}-4Expert" if experts == 6 else directory
    reroute = [["reroute", directory, str(four), "--experts-per-token", "4"]] if experts == 6 else []
    assert script.steps[:-2] == [["download", repository, directory], *reroute,
                                 ["convert", str(four), "default.gguf"]]


def test_what_is_in_the_way(script, tmp_path, capsys):
    for name in ("six", "six-4Expert"):
        (tmp_path / name).mkdir()
    script.experts = {"six-4Expert": 3}
    assert script.call("six") == 3
    assert capsys.readouterr().err.endswith("six-4Expert: has 3 experts per token, expected 4; remove or rename it\n")
    assert script.call("six-4Expert") == 3
    assert "has 3 experts per token, expected 4 or more; use dsv4tools convert" in capsys.readouterr().err
    assert script.call("no-such-thing") == 2
    assert "no-such-thing: is no directory and no repository; give OWNER/NAME or" in capsys.readouterr().err
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.gguf").touch()
    assert script.call("a/b.gguf") == 2
    assert "a/b.gguf: is no checkpoint directory; dsv4tools reroute takes a GGUF" in capsys.readouterr().err
    assert script.steps == []


def test_the_code_of_a_step_is_the_script_s(tmp_path):
    ended = convert_4expert(tmp_path, cwd=tmp_path)
    assert ended.returncode == 3
    assert "config.json: is missing" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_wrapper_is_a_shell_script():
    assert subprocess.run(["/bin/sh", "-n", SCRIPT.with_name("convert-4expert")], check=False).returncode == 0
    assert os.access(SCRIPT.with_name("convert-4expert"), os.X_OK)
