"""Files are written whole or not at all, whoever writes at the same time and whatever goes wrong."""

import errno
import multiprocessing
import os
import resource
import signal
import stat
import tempfile
import threading
from pathlib import Path

import fsspec
import pytest
import torch

import lightning_prune as lp
from lightning_prune import files
from lightning_prune.callbacks.checkpoints import WholeCheckpointIO
from lightning_prune.files import replacing, write

pytestmark = pytest.mark.skipif(
    os.name != "posix", reason="permissions, links and signals are those of POSIX"
)
CONTEXT = multiprocessing.get_context("forkserver")
FILL = 50_000


def content_of(number):
    """A content that shows when two of them were mixed."""
    return bytes([number]) * (FILL + number)


def write_often(path, number, times):
    for _ in range(times):
        write(path, content_of(number))


def save_often(path, number, times):
    for _ in range(times):
        lp.save_sparse({"x": torch.full((1000 + number,), float(number))}, path)


def checkpoint_often(path, number, times):
    for _ in range(times):
        WholeCheckpointIO().save_checkpoint({"x": torch.full((1000 + number,), float(number))}, path)


def read_whole(path):
    content = path.read_bytes()
    assert content == content_of(content[0])


def read_sparse(path):
    x = lp.load_sparse(path)["x"]
    assert x.tolist() == [len(x) - 1000.0] * len(x)


def read_checkpoint(path):
    x = torch.load(path, weights_only=True)["x"]
    assert x.tolist() == [len(x) - 1000.0] * len(x)


WRITERS = {
    "write": (write_often, read_whole),
    "save_sparse": (save_often, read_sparse),
    "checkpoints": (checkpoint_often, read_checkpoint),
}


def in_processes(*calls):
    processes = [CONTEXT.Process(target=work, args=arguments) for work, *arguments in calls]
    for process in processes:
        process.start()
    return processes


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# -------------------------------------------------------------------------------------- several who write


@pytest.mark.parametrize("writer", WRITERS)
def test_threads_that_write_to_one_path_leave_whole_files(writer, tmp_path):
    often, read = WRITERS[writer]
    often(path := tmp_path / "file", 1, 1)
    threads = [threading.Thread(target=often, args=(path, number, 20)) for number in (1, 2, 3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        read(path)
    read(path)
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("writer", WRITERS)
def test_processes_that_write_to_one_path_leave_whole_files(writer, tmp_path):
    often, read = WRITERS[writer]
    often(path := tmp_path / "file", 1, 1)
    processes = in_processes(*((often, path, number, 20) for number in (1, 2)))
    while any(process.is_alive() for process in processes):
        read(path)
    assert [process.exitcode for process in processes] == [0, 0]
    read(path)
    assert names(tmp_path) == ["file"]


# ----------------------------------------------------------------------------------------- what goes wrong


def write_and_die(path):
    with replacing(path) as file:
        file.write(b"half")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)


def write_slowly(path, begun, go_on):
    with replacing(path) as file:
        file.write(b"slow")
        begun.set()
        assert go_on.wait(60)


def test_a_kill_leaves_the_old_file_and_the_next_write_cleans_up(tmp_path):
    write(path := tmp_path / "file", "old")
    for other in ("file.tmp", ".file.tmp", ".file.0123.tmp", ".file2.0123456789abcdef.tmp"):
        (tmp_path / other).write_text("somebody else's")
    others = names(tmp_path)
    for _ in range(2):
        (process,) = in_processes((write_and_die, path))
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert path.read_text() == "old"
        assert len(names(tmp_path)) == len(others) + 1
    write(path, "new")
    assert path.read_text() == "new"
    assert names(tmp_path) == others


def test_who_cleans_up_leaves_those_alone_who_are_writing(tmp_path):
    path, begun, go_on = tmp_path / "file", CONTEXT.Event(), CONTEXT.Event()
    (process,) = in_processes((write_slowly, path, begun, go_on))
    assert begun.wait(60)
    with replacing(path) as file:
        file.write(b"within")
        write(path, "quick")
        assert len(names(tmp_path)) == 3
    assert path.read_text() == "within"
    go_on.set()
    process.join()
    assert process.exitcode == 0
    assert path.read_text() == "slow"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("old", ["old", None])
def test_an_exception_leaves_what_was_there_and_nothing_else(error, old, tmp_path):
    if old:
        write(tmp_path / "file", old)
    before = names(tmp_path)

    def content():
        yield content_of(1)
        raise error

    with pytest.raises(error), replacing(tmp_path / "file") as file:
        file.writelines(content())
    assert names(tmp_path) == before
    assert not old or (tmp_path / "file").read_text() == old


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_leaves_the_old_file_and_nothing_else(writer, tmp_path):
    often, read = WRITERS[writer]
    often(path := tmp_path / "file", 1, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            often(path, 2, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    read(path)
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failing_disk_leaves_the_old_file_and_nothing_else(step, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "the disk is broken")

    write(path := tmp_path / "file", "old")
    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="broken"):
        write(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


# ------------------------------------------------------------------------------- links, permissions, names


def test_a_symbolic_link_stays_and_its_target_is_replaced(tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    for link, to in (("link", "../there/file"), ("second", "link")):
        (tmp_path / "here" / link).symlink_to(to)
    for text in ("new", "newer"):  # the target is missing at first
        write(tmp_path / "here" / "second", text)
        assert (tmp_path / "there" / "file").read_text() == text
        assert not (tmp_path / "there" / "file").is_symlink()
    assert os.readlink(tmp_path / "here" / "link") == "../there/file"
    assert os.readlink(tmp_path / "here" / "second") == "link"
    assert names(tmp_path / "here") == ["link", "second"]
    assert names(tmp_path / "there") == ["file"]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666, 0o755])
def test_a_file_that_is_there_keeps_its_permissions(mode, tmp_path):
    path, seen = tmp_path / "file", []
    path.write_text("old")
    path.chmod(mode)
    with replacing(path) as file:
        seen += [stat.S_IMODE(entry.stat().st_mode) for entry in tmp_path.iterdir()]
        file.write(b"new")
    assert seen == [mode, mode]  # nor may others read what is not finished
    assert stat.S_IMODE(path.stat().st_mode) == mode
    lp.save_sparse({}, path)
    assert stat.S_IMODE(path.stat().st_mode) == mode


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o000])
def test_a_new_file_has_the_permissions_that_the_umask_leaves(mask, tmp_path):
    before = os.umask(mask)
    try:
        write(tmp_path / "ours", "new")
        (tmp_path / "plain").write_text("new")
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ours", "plain")]
    assert modes == [0o666 & ~mask] * 2


def write_as_nobody(path, mode, refused):
    os.chmod(path, mode)
    if os.getuid() == 0:
        os.chown(path, 65534, 65534)
        os.setgid(65534)
        os.setuid(65534)
    if not os.access(path, os.W_OK):
        with pytest.raises(PermissionError, match="file"):
            write(path, "new")
        refused.set()
    else:
        write(path, "new")


@pytest.mark.parametrize("mode", [0o444, 0o644])
def test_a_read_only_file_is_not_replaced(mode):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        (path := Path(folder, "file")).write_text("old")
        refused = CONTEXT.Event()
        (process,) = in_processes((write_as_nobody, path, mode, refused))
        process.join()
        assert process.exitcode == 0
        assert refused.is_set() == (mode == 0o444)
        assert path.read_text() == ("old" if mode == 0o444 else "new")
        assert names(path.parent) == ["file"]


def test_what_is_no_file_is_refused_by_name_and_stays(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for name, number in (
        ("folder", errno.EISDIR),
        ("pipe", errno.EINVAL),
        ("loop", errno.ELOOP),
        ("missing/file", errno.ENOENT),
    ):
        with pytest.raises(OSError, match=name) as error:
            write(tmp_path / name, "new")
        assert error.value.errno == number
        assert error.value.filename == str(tmp_path / name)
    assert names(tmp_path) == ["folder", "loop", "pipe"]


@pytest.mark.parametrize("name", ["x" * 255, "ä" * 127, "a b.c.tmp", "-", "[a]*?", ".hidden"])
def test_every_name_that_a_file_may_have_will_do(name, tmp_path):
    for text in ("new", "newer"):
        write(tmp_path / name, text)
    assert names(tmp_path) == [name]
    assert (tmp_path / name).read_text() == "newer"


def test_paths_may_be_relative_and_texts_are_unicode(tmp_path):
    write("file", "größer\r\n")
    assert (tmp_path / "file").read_bytes() == "größer\r\n".encode()


def test_checkpoints_of_this_machine_are_written_here_and_others_by_lightning(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(os, "replace", lambda a, b, replace=os.replace: (written.append(b), replace(a, b)))
    checkpoint, plugin = {"state_dict": {}, "pytorch-lightning_version": "2.6"}, WholeCheckpointIO()
    here = [str(tmp_path / "a" / "x.ckpt"), tmp_path / "b" / "x.ckpt", f"file://{tmp_path}/c/x.ckpt"]
    for path in (*here, "memory://folder/x.ckpt"):
        plugin.save_checkpoint(checkpoint, path)
        assert plugin.load_checkpoint(path) == checkpoint
    assert written == [str(tmp_path / folder / "x.ckpt") for folder in "abc"]
    assert fsspec.filesystem("memory").isfile("folder/x.ckpt")
    for path in (f"file://{tmp_path}/nowhere.ckpt", "memory://folder/nowhere.ckpt"):
        with pytest.raises(FileNotFoundError):
            plugin.load_checkpoint(path)


def test_where_nothing_can_be_locked_files_are_written_all_the_same(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    write(path := tmp_path / "file", "old")
    (tmp_path / ".file.0123456789abcdef.tmp").write_text("of a writer that may be alive")
    monkeypatch.setattr(files.fcntl, "flock", unsupported)
    write(path, "new")
    assert path.read_text() == "new"
    assert names(tmp_path) == [".file.0123456789abcdef.tmp", "file"]
