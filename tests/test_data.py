"""CIFAR-10 on disk: where it is looked for, how it gets there, and what is refused."""

import errno
import http.server
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import TRAIN_COUNT

from machinery.data import cifar10 as storage
from machinery.data.cifar10 import ARCHIVE, FOLDER, load_cifar10, prepare
from machinery.errors import DataUnreachableError
from train import DataError


@pytest.fixture
def nowhere(monkeypatch) -> Path:
    """No data anywhere: neither in CIFAR10_ROOT nor in ./data."""
    monkeypatch.delenv("CIFAR10_ROOT")
    return Path("data")


@pytest.fixture
def mirror(tiny, monkeypatch):
    """A web server on the loopback with the archive; `mirror(body)` serves something else instead."""
    served = {"body": tiny.archive.read_bytes(), "claimed": None}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(served["claimed"] or len(served["body"])))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(served["body"])

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *args) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("CIFAR10_URL", f"http://127.0.0.1:{server.server_port}/{ARCHIVE}")
    yield served
    server.shutdown()


def everything_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) if folder.exists() else []


def test_the_folder_given_comes_before_the_environment_and_data(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CIFAR10_ROOT", "from-environment")
    assert storage.search_path("given") == [Path("given"), Path("from-environment"), Path("data")]
    shutil.copytree(tiny.root / FOLDER, tmp_path / "given" / FOLDER)
    assert prepare("given") == Path("given")
    monkeypatch.setenv("CIFAR10_ROOT", str(tiny.root))
    assert capsys.readouterr().err == ""
    assert prepare("empty") == tiny.root
    assert f"not in empty; taking that in {tiny.root}" in capsys.readouterr().err


def test_the_batch_folder_itself_is_understood(tiny, nowhere):
    assert prepare(tiny.root / FOLDER) == tiny.root


def test_an_archive_put_there_by_hand_is_unpacked(tiny, nowhere):
    nowhere.mkdir()
    shutil.copy(tiny.archive, nowhere)
    images, labels = load_cifar10(train=True)
    assert images.shape == (TRAIN_COUNT, 32, 32, 3)
    assert sorted(os.listdir(nowhere)) == [FOLDER, ARCHIVE]
    assert len(labels) == TRAIN_COUNT


def test_is_downloaded_from_the_mirror_and_only_once(nowhere, mirror):
    prepare()
    assert os.listdir(nowhere) == [FOLDER]
    mirror["body"] = b""
    prepare()


@pytest.mark.parametrize("body", [b"<html>Not found</html>", b"", b"\x1f\x8b" + bytes(1000)])
def test_a_wrong_download_is_refused_and_leaves_nothing(nowhere, mirror, body):
    mirror["body"] = body
    with pytest.raises(DataError, match="is not that archive") as error:
        prepare()
    assert not isinstance(error.value, DataUnreachableError)  # else `make run` would go on with synthetic images
    assert not nowhere.exists()


def test_a_download_that_breaks_off_leaves_nothing(nowhere, mirror):
    nowhere.mkdir()
    mirror["claimed"] = len(mirror["body"])
    mirror["body"] = mirror["body"][:1000]
    with pytest.raises(DataError, match="it broke off"):
        prepare()
    assert everything_in(nowhere) == []


@pytest.mark.parametrize("url", ["http://127.0.0.1:port/archive", "no address"])
def test_a_mistyped_address_is_out_of_reach(nowhere, monkeypatch, url):
    monkeypatch.setenv("CIFAR10_URL", url)
    with pytest.raises(DataUnreachableError, match=f"downloading it from {url} failed"):
        prepare()
    assert not nowhere.exists()


def test_a_full_disk_is_not_taken_for_a_missing_network(nowhere, monkeypatch):
    def fill_the_disk(url, folder, *args) -> None:
        Path(folder, ARCHIVE).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(storage, "download_url", fill_the_disk)
    with pytest.raises(DataError, match=r"cannot write CIFAR-10 to data: .*No space left") as error:
        prepare()
    assert not isinstance(error.value, DataUnreachableError)
    assert not nowhere.exists()


def test_two_that_download_at_once_do_not_disturb_each_other(nowhere, mirror):
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: prepare(), range(4))) == [nowhere] * 4
    assert os.listdir(nowhere) == [FOLDER]
    assert len(load_cifar10(train=True)[1]) == TRAIN_COUNT


def test_an_interrupt_leaves_nothing(nowhere, mirror, monkeypatch):
    def interrupt(*args) -> None:
        Path(args[1], "half").write_bytes(b"written")
        raise KeyboardInterrupt

    monkeypatch.setattr(storage, "extract_archive", lambda archive, folder: interrupt(archive, folder))
    with pytest.raises(KeyboardInterrupt):
        prepare()
    assert not nowhere.exists()


def test_without_data_and_network_the_error_says_where_why_and_what_to_do(nowhere):
    with pytest.raises(DataUnreachableError) as error:
        prepare("given")
    message = str(error.value)
    for part in (str(Path("given").absolute()), str(nowhere.absolute()), "127.0.0.1:9", "refused"):
        assert part in message
    for way_out in ("--data-dir", "CIFAR10_ROOT", "CIFAR10_URL", "--data synthetic", ARCHIVE):
        assert way_out in message
    assert not Path("given").exists()


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_file_is_named_and_never_unpickled(tiny, nowhere, name, damage, monkeypatch):
    shutil.copytree(tiny.root / FOLDER, nowhere / FOLDER)
    path = nowhere / FOLDER / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "delete":
        path.unlink()
    else:
        path.write_bytes(content if damage == "flip" else content[: len(content) // 2])
    monkeypatch.setattr("pickle.load", lambda *args, **kwargs: pytest.fail("unpickled a damaged file"))
    with pytest.raises(DataError, match=name) as error:
        load_cifar10(train=True)
    assert ("missing" if damage == "delete" else "altered or truncated") in str(error.value)
    assert "Delete the folder" in str(error.value)


def test_a_wrong_archive_is_named_and_kept(nowhere):
    nowhere.mkdir()
    (nowhere / ARCHIVE).write_bytes(b"<html>Sign in to the hotel's network</html>")
    with pytest.raises(DataError, match=ARCHIVE):
        prepare()
    assert everything_in(nowhere) == [ARCHIVE]


def test_a_folder_that_cannot_be_written_is_not_taken_for_a_missing_network(nowhere):
    nowhere.write_text("a file where the folder should be")
    with pytest.raises(DataError, match="cannot write CIFAR-10 to data") as error:
        prepare()
    assert not isinstance(error.value, DataUnreachableError)


def test_a_failed_download_spares_what_another_process_put_there(nowhere, monkeypatch):
    def other_process_wins(*args) -> None:
        (nowhere / FOLDER).mkdir()
        raise OSError("timed out")

    monkeypatch.setattr(storage, "download_url", other_process_wins)
    with pytest.raises(DataUnreachableError, match="timed out"):
        prepare()
    assert everything_in(nowhere) == [FOLDER]


@pytest.mark.parametrize("name", ["cifar", "cifar-10-batches-py"])
def test_a_link_to_the_folder_is_taken_by_any_name(tiny, nowhere, name):
    nowhere.mkdir()
    link = nowhere / name
    link.symlink_to(tiny.root / FOLDER, target_is_directory=True)
    for given in (link, f"{link}/.", link.absolute()):
        assert len(load_cifar10(train=True, data_dir=given)[1]) == TRAIN_COUNT


def test_an_archive_in_a_folder_that_is_read_only_is_unpacked_into_the_next(tiny, nowhere, tmp_path, monkeypatch):
    locked = tmp_path / "locked"
    locked.mkdir()
    shutil.copy(tiny.archive, locked / ARCHIVE)
    writable = os.access
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != locked and writable(path, mode))
    assert prepare(locked) == nowhere
    assert everything_in(locked) == [ARCHIVE]
    monkeypatch.setattr(storage, "extract_archive", lambda *_: pytest.fail("unpacked again"))
    assert prepare(locked) == nowhere
