"""Wheels for tests of set-up: a folder of them, and a loopback stand-in for the package indexes."""

import base64
import hashlib
import shutil
import ssl
import subprocess
import threading
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import distribution
from pathlib import Path
from urllib.parse import unquote


def repack(name: str, folder: Path) -> Path:
    """Make a wheel of a package that is installed in the running environment."""
    package = distribution(name)
    assert package.files is not None
    contents: dict[str, bytes] = {}
    for file in package.files:
        path = str(file)
        if path.startswith(".."):  # a program beside Python; those of other packages are made by installers
            if name == "uv":
                contents[f"{name}-{package.version}.data/scripts/{file.name}"] = file.read_binary()
        elif file.suffix != ".pyc" and file.name not in (
            "INSTALLER",
            "RECORD",
            "REQUESTED",
            "direct_url.json",
        ):
            contents[path] = file.read_binary()
    wheel = package.read_text("WHEEL")
    assert wheel is not None
    tag = next(line.removeprefix("Tag: ") for line in wheel.splitlines() if line.startswith("Tag: "))
    return _zip(folder, f"{name.replace('-', '_')}-{package.version}", tag, contents)


def make(name: str, version: str, folder: Path) -> Path:
    """Make a wheel with a module that only knows its version."""
    stem = f"{name}-{version}"
    contents = {
        f"{name}.py": f"__version__ = {version!r}\n".encode(),
        f"{stem}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{stem}.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    return _zip(folder, stem, "py3-none-any", contents)


def _zip(folder: Path, stem: str, tag: str, contents: Mapping[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"{stem}-{tag}.whl"
    record = []
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, data in contents.items():
            entry = zipfile.ZipInfo(path)
            entry.external_attr = (0o100755 if "/scripts/" in path else 0o100644) << 16
            archive.writestr(entry, data)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            record.append(f"{path},sha256={digest},{len(data)}\n")
        path = next(path for path in contents if path.endswith("/METADATA")).replace("METADATA", "RECORD")
        archive.writestr(path, "".join([*record, f"{path},,\n"]))
    return wheel


def pin(wheel: Path) -> str:
    """Return the line of a locked requirements file for a wheel."""
    name, version = wheel.name.split("-")[:2]
    return f"{name}=={version} --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}\n"


class Indexes:
    """Every package index there is, as seen through a proxy: a TLS server with certificates of its own.

    Attributes:
        folders: which wheels a page lists, such as `/simple/torch/`; other pages do not exist.
        environment: makes uv take this for the network.
    """

    def __init__(self, folder: Path) -> None:
        self.folders: dict[str, Path] = {}
        self._folder = folder
        self._lock = threading.Lock()
        _openssl(
            "req",
            "-x509",
            *_KEY,
            "-keyout",
            folder / "ca.key",
            "-out",
            folder / "ca.pem",
            "-subj",
            "/CN=tests",
        )
        indexes = self

        class Handler(BaseHTTPRequestHandler):
            def do_CONNECT(self) -> None:
                self.send_response(200)
                self.end_headers()
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.load_cert_chain(*indexes._certificate(self.path.rpartition(":")[0]))
                with suppress(OSError), context.wrap_socket(self.request, server_side=True) as tunnel:
                    Handler(tunnel, self.client_address, self.server)

            def do_GET(self) -> None:
                page, name = self.path.rpartition("/")[::2]
                folder = indexes.folders.get(page + "/")
                if folder is None:
                    self.send_error(404)
                    return
                links = "".join(
                    f'<a href="{wheel.name}">{wheel.name}</a>\n' for wheel in folder.glob("*.whl")
                )
                body = (folder / unquote(name)).read_bytes() if name else links.encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/octet-stream" if name else "text/html")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        proxy = f"http://127.0.0.1:{self._server.server_port}"
        self.environment = {"HTTPS_PROXY": proxy, "SSL_CERT_FILE": str(folder / "ca.pem"), "UV_OFFLINE": "0"}

    def close(self) -> None:
        """End the server."""
        self._server.shutdown()
        self._server.server_close()

    def _certificate(self, host: str) -> tuple[Path, Path]:
        certificate, key = self._folder / f"{host}.pem", self._folder / f"{host}.key"
        with self._lock:
            if not certificate.exists():
                names = [
                    "-addext",
                    f"subjectAltName=DNS:{host}",
                    "-addext",
                    "basicConstraints=critical,CA:FALSE",
                ]
                authority = ["-CA", self._folder / "ca.pem", "-CAkey", self._folder / "ca.key"]
                draft = self._folder / f"{host}.new"
                _openssl(
                    "req",
                    "-x509",
                    *authority,
                    *_KEY,
                    "-keyout",
                    key,
                    "-out",
                    draft,
                    "-subj",
                    f"/CN={host}",
                    *names,
                )
                draft.rename(certificate)
        return certificate, key


_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2")


def _openssl(*arguments: str | Path) -> None:
    program = shutil.which("openssl")
    assert program is not None
    subprocess.run([program, *map(str, arguments)], check=True, capture_output=True)
