"""CIFAR-10 on disk: where it is looked for, how it gets there, and what is refused."""

import errno
import http.server
import os
import runpy
import shutil
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import TRAIN_COUNT

from machinery.data import cifar10 as storage
from machinery.data.cifar10 import ARCHIVE, FOLDER, PART, load_cifar10, prepare
from machinery.errors import DataUnreachableError
from train import DataError


@pytest.fixture
def nowhere(monkeypatch) -> Path:
    """No data anywhere: neither in CIFAR10_ROOT nor in ./data."""
    monkeypatch.delenv("CIFAR10_ROOT")
    return Path("data")


@pytest.fixture
def mirror(tiny, monkeypatch):
    """A web server on the loopback with the archive; `mirror["body"]` is what it serves, after `claimed` bytes."""
    served = {"body": tiny.archive.read_bytes(), "claimed": None, "times": 0}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(served["claimed"] or len(served["body"])))
            self.end_headers()
            if self.command == "GET":
                served["times"] += 1
                self.wfile.write(served["body"])

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *args) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("CIFAR10_URL", f"http://127.0.0.1:{server.server_port}/{ARCHIVE}")
    yield served
    server.shutdown()


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name[0] != ".")


def test_the_folder_given_comes_before_the_environment_and_data(tiny, monkeypatch):
    for name in ("given", "from-environment", "data"):
        shutil.copytree(tiny.root / FOLDER, Path(name, FOLDER))
    monkeypatch.setenv("CIFAR10_ROOT", "from-environment")
    for root in (Path("given"), Path("from-environment"), Path("data")):
        assert prepare("given") == root
        shutil.rmtree(root)


def test_the_batch_folder_itself_may_be_named_and_be_a_link(tiny, nowhere):
    nowhere.mkdir()
    (nowhere / FOLDER).symlink_to(tiny.root / FOLDER, target_is_directory=True)
    assert len(load_cifar10(True, nowhere / FOLDER)[1]) == TRAIN_COUNT


def test_an_archive_is_unpacked_beside_itself_or_else_into_the_next_folder(tiny, nowhere, tmp_path, monkeypatch):
    locked = tmp_path / "locked"
    for folder in (nowhere, locked):
        folder.mkdir()
        shutil.copy(tiny.archive, folder)
    assert load_cifar10(train=True)[0].shape == (TRAIN_COUNT, 32, 32, 3)
    assert visible(nowhere) == [FOLDER, ARCHIVE]
    writable = os.access
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != locked and writable(path, mode))
    monkeypatch.setattr(storage, "extract_archive", lambda *_: pytest.fail("unpacked again"))
    assert prepare(locked) == nowhere
    assert os.listdir(locked) == [ARCHIVE]


def test_several_at_once_download_it_once_from_the_mirror(nowhere, mirror):
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: prepare(), range(4))) == [nowhere] * 4
    assert mirror["times"] == 2  # torchvision asks for redirections first
    assert visible(nowhere) == [FOLDER, ARCHIVE]
    assert len(load_cifar10(train=True)[1]) == TRAIN_COUNT


def test_what_is_no_archive_is_refused_and_not_kept_as_one(nowhere, mirror):
    whole = mirror["body"]
    for body, claimed in ((b"<html>Not found</html>", None), (b"", None), (whole[:1000], len(whole))):
        mirror |= {"body": body, "claimed": claimed}
        with pytest.raises(DataError, match=f"cannot be brought from .*{ARCHIVE}") as error:
            prepare()
        assert not isinstance(error.value, DataUnreachableError)  # else `make run` would go on with synthetic images
        assert visible(nowhere) == []
    mirror |= {"body": whole, "claimed": None}
    assert prepare() == nowhere


@pytest.mark.parametrize("damage", ["download", "unpacking", "flip"])
def test_what_a_kill_leaves_is_mended(tiny, nowhere, mirror, damage):
    nowhere.mkdir()
    if damage == "download":
        (nowhere / PART).write_bytes(mirror["body"][:1000])
    else:
        shutil.copy(tiny.archive, nowhere)
        shutil.copytree(tiny.root / FOLDER, nowhere / FOLDER)
        os.truncate(nowhere / FOLDER / "data_batch_3", 100)
        if damage == "unpacking":
            (nowhere / FOLDER / "test_batch").unlink()
    assert len(load_cifar10(train=True)[1]) == TRAIN_COUNT
    assert visible(nowhere) == [FOLDER, ARCHIVE]


@pytest.mark.parametrize("url", ["http://127.0.0.1:port/archive", "no address", "http://127.0.0.1:9/archive"])
def test_out_of_reach_is_told_with_all_ways_out(nowhere, monkeypatch, url):
    monkeypatch.setenv("CIFAR10_URL", url)
    with pytest.raises(DataUnreachableError, match=url) as error:
        prepare("given")
    for part in ("given", str(nowhere.absolute()), "--data-dir", "CIFAR10_ROOT", "CIFAR10_URL", "--data synthetic"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("error", "kind"),
    [(OSError(errno.ENOSPC, "No space left"), DataError), (TimeoutError("timed out"), DataUnreachableError)],
)
def test_what_stops_a_download_is_told_from_an_unreachable_server(nowhere, monkeypatch, error, kind):
    def write_half(url: str, folder: Path, name: str, md5: str) -> None:
        assert socket.getdefaulttimeout() == 30  # seconds without a byte
        Path(folder, name).write_bytes(b"half")
        raise error

    monkeypatch.setattr(storage, "download_url", write_half)
    with pytest.raises(kind) as stopped:
        prepare()
    assert type(stopped.value) is kind
    assert socket.getdefaulttimeout() is None
    assert visible(nowhere) == []
    nowhere.rename("away")
    nowhere.write_text("a file where the folder should be")
    with pytest.raises(DataError, match="to data") as stopped:
        prepare()
    assert not isinstance(stopped.value, DataUnreachableError)


@pytest.mark.parametrize(
    ("name", "damage"), [("data_batch_3", "flip"), ("test_batch", "cut"), ("batches.meta", "lose"), (ARCHIVE, "cut")]
)
def test_a_damaged_file_is_named_and_never_unpickled_nor_replaced(tiny, nowhere, mirror, name, damage, monkeypatch):
    source = tiny.archive.parent if name == ARCHIVE else tiny.root / FOLDER
    folder = nowhere if name == ARCHIVE else nowhere / FOLDER
    shutil.copytree(source, folder)
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content if damage == "flip" else content[:-100])
    if damage == "lose":
        (folder / name).unlink()
    monkeypatch.setattr("pickle.load", lambda *args, **kwargs: pytest.fail("unpickled a damaged file"))
    with pytest.raises(DataError, match=f"{name}; delete"):
        load_cifar10(train=True)
    assert mirror["times"] == 0


def test_the_command_prints_where_the_data_is_and_its_status_says_what_is_wrong(tiny, monkeypatch, capsys):
    runpy.run_module("machinery.data", run_name="__main__")
    assert str(tiny.root / FOLDER) in capsys.readouterr().out
    monkeypatch.setenv("CIFAR10_ROOT", "none")
    for status in (3, 1):
        with pytest.raises(SystemExit) as leaving:
            runpy.run_module("machinery.data", run_name="__main__")
        assert leaving.value.code == status
        assert "CIFAR-10" in capsys.readouterr().err
        Path("data").mkdir(exist_ok=True)
        Path("data", ARCHIVE).write_text("no archive")
