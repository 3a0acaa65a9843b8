"""What a server may do to a download: say nothing, or never end."""

import http.server
import socket
import threading
from pathlib import Path

import pytest
from iopath.common.file_io import HTTPURLHandler

from ghm_d2.checkpoint.files import fetch
from ghm_d2.errors import UserError
from ghm_d2.files import bounded_downloads


class Server(http.server.BaseHTTPRequestHandler):
    """Silent, endless, or as it should be."""

    def do_GET(self):
        if "silent" in self.path:
            self.server.stop.wait(30)
            return
        self.send_response(200)
        self.end_headers()
        try:
            for _ in range(10**6 if "endless" in self.path else 1):
                self.wfile.write(bytes(10_000))
        except OSError:
            pass

    def log_message(self, *args):
        pass


@pytest.fixture
def address(monkeypatch, tmp_path):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("ghm_d2.files._SILENCE", 0.5)
    monkeypatch.setattr("ghm_d2.files._LARGEST", 200_000)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.stop = threading.Event()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.stop.set()
    server.shutdown()


@pytest.mark.parametrize(("kind", "sentence"), [("silent", "timed out"), ("endless", "too large")])
def test_a_download_ends(address, tmp_path, kind, sentence):
    with pytest.raises(UserError) as error:
        fetch(f"{address}/{kind}.pth")
    assert f"{address}/{kind}.pth cannot be fetched" in str(error.value)
    assert sentence in str(error.value)
    left = [x for x in tmp_path.rglob("*") if x.is_file() and x.stat().st_size > 200_000]
    assert not left


def test_the_limits_end_with_the_download(address, tmp_path):
    with bounded_downloads():
        file = HTTPURLHandler()._get_local_path(f"{address}/fine.pth", cache_dir=str(tmp_path))
    assert Path(file).stat().st_size == 10_000
    (tmp_path / "large").write_bytes(bytes(300_000))
    assert socket.getdefaulttimeout() is None
