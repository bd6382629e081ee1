"""Fetching an archive: whole and verified or not at all, and never outside its folder."""

from __future__ import annotations

import errno
import hashlib
import http.server
import io
import stat
import tarfile
import threading
import types
import zipfile

import pytest

from kdlit.data import download
from kdlit.data.download import fetch

CONTENT = {"pictures/a.txt": b"first", "pictures/inner/b.txt": bytes(range(256)) * 9}


def tar_of(path, members=CONTENT, mode="w:gz", **special):
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for key, value in special.items():
                setattr(member, key, value)
            archive.addfile(member, io.BytesIO(content))
    return path


def zip_of(path, members=CONTENT, mode=stat.S_IFREG | 0o644):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            member = zipfile.ZipInfo(name)
            member.external_attr = mode << 16
            archive.writestr(member, content)
    return path


def sum_of(path, kind="md5"):
    return hashlib.new(kind, path.read_bytes()).hexdigest()


def files_in(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def source(tmp_path):
    (tmp_path / "source").mkdir()
    return tmp_path / "source"


@pytest.fixture
def goal(tmp_path):
    """Where the folder is to appear; what else lies there must stay as it is."""
    (tmp_path / "goal").mkdir()
    (tmp_path / "goal" / "mine.txt").write_text("mine")
    return tmp_path / "goal" / "pictures"


def nothing_happened(goal):
    return files_in(goal.parent) == {"mine.txt": b"mine"} and len(list(goal.parent.iterdir())) == 1


@pytest.fixture
def server(source):
    """Serves ``source`` on this machine; ``short`` bytes fewer than announced, where that is set."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        short = 0

        def __init__(self, *args):
            super().__init__(*args, directory=str(source))

        def copyfile(self, file, output):
            content = file.read()
            output.write(content[: len(content) - self.short])

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=[0.01])
        thread.start()
        running.url = f"http://127.0.0.1:{running.server_port}"
        yield running
        running.shutdown()
        thread.join()


@pytest.mark.parametrize("kind", ["md5", "sha256"])
def test_an_archive_from_a_server_is_unpacked_in_its_place(source, goal, server, kind):
    archive = tar_of(source / "pictures.tar.gz")
    fetch(f"{server.url}/pictures.tar.gz", goal, sum_of(archive, kind))
    assert files_in(goal.parent) == {**CONTENT, "mine.txt": b"mine"}
    assert {path.name for path in goal.parent.iterdir()} == {"pictures", "mine.txt"}


@pytest.mark.parametrize(("make", "name"), [(tar_of, "p.tar.gz"), (zip_of, "p.zip")])
def test_missing_folders_above_are_made(source, tmp_path, make, name):
    archive = make(source / name)
    fetch(archive.as_uri(), tmp_path / "new" / "deep" / "pictures", sum_of(archive))
    assert files_in(tmp_path / "new" / "deep") == CONTENT


def test_a_tar_that_ends_with_a_zip_is_a_tar(source, goal):
    inner = zip_of(source / "inner.zip").read_bytes()
    archive = tar_of(source / "p.tar", {"pictures/inner.zip": inner}, mode="w")
    fetch(archive.as_uri(), goal, sum_of(archive))
    assert files_in(goal) == {"inner.zip": inner}


def test_what_is_there_stays_as_it_is(source, goal):
    archive = tar_of(source / "p.tar")
    goal.mkdir()
    (goal / "a.txt").write_text("own")
    fetch(archive.as_uri(), goal, sum_of(archive))
    assert files_in(goal) == {"a.txt": b"own"}


def test_another_sum_is_refused_with_both_sums(source, goal, server):
    archive = tar_of(source / "p.tar.gz")
    with pytest.raises(ValueError, match=f"not the published archive: its md5 is {sum_of(archive)}, not {'0' * 32}"):
        fetch(f"{server.url}/p.tar.gz", goal, "0" * 32)
    assert nothing_happened(goal)


def test_a_connection_that_ends_early_is_reported(source, goal, server):
    archive = tar_of(source / "p.tar.gz")
    size = archive.stat().st_size
    server.RequestHandlerClass.short = 7
    with pytest.raises(
        OSError, match=rf"cannot fetch http.*({size - 7} of {size} bytes|IncompleteRead\({size - 7}).*try again"
    ):
        fetch(f"{server.url}/p.tar.gz", goal, sum_of(archive))
    assert nothing_happened(goal)


def test_an_address_without_a_file_or_a_server_is_reported(goal, server):
    with pytest.raises(
        OSError, match="cannot fetch http.*none.tar: HTTP Error 404.*fetch it elsewhere and unpack it in .*goal"
    ):
        fetch(f"{server.url}/none.tar", goal, "0" * 32)
    with pytest.raises(OSError, match="cannot fetch http://127.0.0.1:9/p.tar: .*refused; try again"):
        fetch("http://127.0.0.1:9/p.tar", goal, "0" * 32)
    with pytest.raises(OSError, match="cannot fetch file:///none/p.tar: .*No such file"):
        fetch("file:///none/p.tar", goal, "0" * 32)
    assert nothing_happened(goal)


@pytest.mark.parametrize(
    ("number", "cure"), [(errno.ENOSPC, "No space left on device; free some space"), (errno.EROFS, "choose another")]
)
def test_a_disk_that_cannot_be_written_is_reported(source, goal, monkeypatch, number, cure):
    def full(*args):
        raise OSError(number, "No space left on device" if number == errno.ENOSPC else "Read-only file system")

    monkeypatch.setattr(download, "_unpack", full)
    archive = tar_of(source / "p.tar")
    with pytest.raises(OSError, match=f"cannot write what file:.* holds into .*goal: .*{cure}"):
        fetch(archive.as_uri(), goal, sum_of(archive))
    assert nothing_happened(goal)


def test_what_cannot_fit_is_not_fetched(source, goal, monkeypatch):
    archive = tar_of(source / "p.tar")
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10))
    with pytest.raises(OSError, match=rf"goal: {archive.stat().st_size} bytes do not fit; free some space"):
        fetch(archive.as_uri(), goal, sum_of(archive))
    assert nothing_happened(goal)


def test_a_lack_of_permission_is_reported(source, goal, request):
    archive = tar_of(source / "p.tar")
    digest = sum_of(archive)
    goal.parent.chmod(0o555)
    request.getfixturevalue("as_nobody")
    with pytest.raises(OSError, match="into .*goal: Permission denied; change its permissions"):
        fetch(archive.as_uri(), goal, digest)


def test_a_file_in_the_way_is_reported(source, tmp_path):
    archive = tar_of(source / "p.tar")
    (tmp_path / "data").write_text("")
    with pytest.raises(OSError, match=r"cannot write .* into .*data: .*choose another place"):
        fetch(archive.as_uri(), tmp_path / "data" / "pictures", sum_of(archive))


@pytest.mark.parametrize("name", ["../evil", "pictures/../../evil", "/evil", "C:\\evil", "pictures\\..\\..\\evil"])
@pytest.mark.parametrize("make", [tar_of, zip_of])
def test_paths_that_lead_out_are_refused(source, goal, tmp_path, make, name):
    archive = make(source / "p.archive", CONTENT | {name: b"!"})
    with pytest.raises(ValueError, match="is refused: .*evil.* leads out of the folder"):
        fetch(archive.as_uri(), goal, sum_of(archive))
    assert nothing_happened(goal)
    assert not list(tmp_path.rglob("*evil*"))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_in_a_tar_are_refused(source, goal, kind):
    archive = tar_of(source / "p.tar", {"pictures/link": b""}, type=kind, linkname="/etc/passwd")
    with pytest.raises(ValueError, match="'pictures/link' in it is a link or device"):
        fetch(archive.as_uri(), goal, sum_of(archive))
    assert nothing_happened(goal)


def test_links_in_a_zip_are_refused(source, goal):
    archive = zip_of(source / "p.zip", {"pictures/link": b"/etc/passwd"}, mode=stat.S_IFLNK | 0o777)
    with pytest.raises(ValueError, match="'pictures/link' in it is a link or device"):
        fetch(archive.as_uri(), goal, sum_of(archive))
    assert nothing_happened(goal)


def test_damaged_archives_and_those_of_something_else_are_refused(source, goal):
    whole = tar_of(source / "p.tar.gz").read_bytes()
    for name, content in (("junk", b"no archive"), ("cut.tar.gz", whole[: len(whole) // 2]), ("cut.zip", zip_of(source / "z").read_bytes()[:-9])):  # fmt: skip
        (source / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} cannot be unpacked"):
            fetch((source / name).as_uri(), goal, sum_of(source / name))
    other = tar_of(source / "other.tar", {"photographs/a.txt": b""})
    with pytest.raises(ValueError, match="holds no folder pictures, only photographs"):
        fetch(other.as_uri(), goal, sum_of(other))
    assert nothing_happened(goal)


def test_an_interrupted_download_leaves_nothing(source, goal, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    archive = tar_of(source / "p.tar")
    monkeypatch.setattr(download, "_give_name", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch(archive.as_uri(), goal, sum_of(archive))
    assert nothing_happened(goal)


def test_two_that_fetch_at_once_do_not_disturb_each_other(source, goal, monkeypatch):
    archive, both_ready, errors = tar_of(source / "p.tar.gz"), threading.Barrier(2, timeout=20), []
    give_name = download._give_name

    def together(*args):
        both_ready.wait()
        give_name(*args)

    def run():
        try:
            fetch(archive.as_uri(), goal, sum_of(archive))
        except BaseException as error:
            errors.append(error)

    monkeypatch.setattr(download, "_give_name", together)
    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert files_in(goal.parent) == {**CONTENT, "mine.txt": b"mine"}
    assert len(list(goal.parent.iterdir())) == 2
