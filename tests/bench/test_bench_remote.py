"""Measuring on boards: a real sshd on loopback, the system's ssh, and a real rkd on the other side."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from rkd.bench import remote, result
from rkd.bench.command import Request, bench_command
from rkd.bench.options import BenchOptions
from rkd.bench.remote import bench_hosts
from rkd.errors import ConfigError, RemoteError

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"
pytestmark = pytest.mark.skipif(
    not Path(SSHD).exists() or shutil.which("ssh") is None, reason="needs OpenSSH's sshd and ssh"
)
OPTIONS = BenchOptions(mode="quick", threads=1)


@dataclass
class Server:
    """An sshd on loopback and the folder of its keys and of the client's configuration."""

    folder: Path
    port: int

    def client(self, monkeypatch, *lines):
        """Make the system's ssh read this configuration, through the one door that tests have: its arguments."""
        config = self.folder / f"config-{len(list(self.folder.iterdir()))}"
        config.write_text("\n".join(lines) + "\n")
        monkeypatch.setattr(remote, "_SSH", ("-F", str(config), *remote._SSH))


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ssh")
    for name in ("host", "user", "stranger"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    (folder / "authorized").write_text((folder / "user.pub").read_text())
    port = free_port()
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nPidFile {folder}/pid\n"
        f"AuthorizedKeysFile {folder}/authorized\nStrictModes no\nUsePAM no\nPasswordAuthentication yes\n"
        "AcceptEnv RKD_*\nPermitRootLogin yes\nLogLevel ERROR\n"
    )
    Path("/run/sshd").mkdir(exist_ok=True) if os.geteuid() == 0 else None
    child = subprocess.Popen([SSHD, "-D", "-e", "-f", str(folder / "sshd_config")], stderr=subprocess.DEVNULL)
    (folder / "known").write_text(f"[127.0.0.1]:{port} {(folder / 'host.pub').read_text()}")
    for _ in range(1000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        if child.poll() is not None:
            pytest.skip("sshd does not start here")
    yield Server(folder, port)
    child.terminate()
    child.wait()


@pytest.fixture
def boards(server, monkeypatch):
    """`one` and `two` are this machine; `strange` knows no key of the user; `new` has an unknown host key."""
    common = f"  HostName 127.0.0.1\n  Port {server.port}\n  User {getpass.getuser()}\n  IdentitiesOnly yes\n  IdentityAgent none"
    known = f"  UserKnownHostsFile {server.folder}/known"
    user, stranger = (f"  IdentityFile {server.folder}/{name}" for name in ("user", "stranger"))
    server.client(
        monkeypatch,
        f"Host one two\n{common}\n{known}\n{user}",
        f"Host strange\n{common}\n{known}\n{stranger}",
        f"Host new\n{common}\n  UserKnownHostsFile /dev/null\n  StrictHostKeyChecking yes\n{user}",
        f"Host closed\n  HostName 127.0.0.1\n  Port {free_port()}",
    )
    return server


@pytest.fixture
def rkd_there(tmp_path, monkeypatch):
    """How rkd is called on the boards: this checkout, as a program of its own; it notes its folders in `folders`."""
    program = tmp_path / "rkd"
    path = os.pathsep.join(sys.path)
    noted = f'[ "$1" = bench ] && pwd >> {tmp_path}/folders\n'
    program.write_text(f'#!/bin/sh\n{noted}PYTHONPATH={path!r} OMP_NUM_THREADS=1 exec {sys.executable} -m rkd "$@"\n')
    program.chmod(0o755)
    return str(program)


def test_two_boards_at_once_give_one_result_and_leave_nothing_behind(boards, rkd_there, make_bundle, tmp_path):
    said = []
    found, failed = bench_hosts([make_bundle()], OPTIONS, ["one", "two"], command=rkd_there, tell=said.append)
    assert failed == []
    result.verify(found, "two boards")
    assert [entry["host"] for entry in found["entries"]] == ["one", "two"]
    for entry in found["entries"]:
        assert entry["differences"] is None  # quick: not all images
        assert entry["agreement"]["share"]["percent"] == 100
        assert entry["latency"]["n"] >= 100
    for host in ("one", "two"):
        assert any(line.startswith(f"{host}: copying linear.ort-cpu.rkd") for line in said)
        assert any(line.startswith(f"{host}: latency") for line in said)
    folders = (tmp_path / "folders").read_text().split()
    assert len(set(folders)) == 2
    assert not [folder for folder in folders if Path(folder).exists()]


def test_the_command_writes_the_boards_result_and_holds_it_against_gates(
    boards, rkd_there, make_bundle, folder, capsys
):
    request = Request(
        (make_bundle().path,), OPTIONS, ("acc>=50", "agreement>=98"), hosts=("one",), remote_rkd=rkd_there
    )
    bench_command(request)
    (entry,) = result.read(folder / "result.json")["entries"]
    assert [gate["passed"] for gate in entry["gates"]] == [True, True]
    assert "linear.ort-cpu on one" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("host", "words"),
    [
        (
            "strange",
            r"strange: .*Permission denied.*wants a password or another key, and rkd asks for none.*ssh-copy-id",
        ),
        ("new", r"new: .*host key is unknown or changed: log in once by hand"),
        ("closed", r"closed: .*Connection refused; check that the board is up"),
        ("no-such-host.invalid", r"no-such-host.invalid: .*no such host"),
    ],
)
def test_a_board_that_cannot_be_reached_is_one_line_that_says_what_to_do(boards, make_bundle, host, words):
    with pytest.raises(RemoteError, match=words) as caught:
        bench_hosts([make_bundle()], OPTIONS, [host])
    assert "\n" not in str(caught.value)


def test_a_board_without_rkd_says_what_to_install(boards, make_bundle):
    with pytest.raises(RemoteError, match=r"one: the board has no working rkd.*it has Python 3\.\d+.*pip install"):
        bench_hosts([make_bundle()], OPTIONS, ["one"], command="rkd-that-is-not-there")


def test_what_the_boards_rkd_lacks_is_said_as_it_says_it(boards, make_bundle, tmp_path):
    program = tmp_path / "rkd"
    program.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo rkd 0.1.0 && exit 0\n'
        "echo \"rkd: onnxruntime is not installed; install it with: pip install 'rkd[ort]'\" >&2\nexit 1\n"
    )
    program.chmod(0o755)
    with pytest.raises(RemoteError, match=r"one: rkd bench failed there: onnxruntime is not installed; install it"):
        bench_hosts([make_bundle()], OPTIONS, ["one"], command=str(program))


@pytest.mark.parametrize(
    ("written", "words"),
    [("echo nonsense", "not JSON"), ("echo '{\"schema\": 1}'", "install the same rkd there"), ("true", "not JSON")],
)
def test_a_result_of_another_rkd_is_refused(boards, make_bundle, tmp_path, written, words):
    program = tmp_path / "rkd"
    program.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo rkd 9 && exit 0\n{written} > result.json\n')
    program.chmod(0o755)
    with pytest.raises(RemoteError, match=words):
        bench_hosts([make_bundle()], OPTIONS, ["one"], command=str(program))


def test_the_others_results_are_kept_where_one_board_fails(boards, rkd_there, make_bundle, folder):
    request = Request((make_bundle().path,), OPTIONS, hosts=("strange", "one"), remote_rkd=rkd_there)
    with pytest.raises(RemoteError, match="strange: "):
        bench_command(request)
    assert [entry["host"] for entry in result.read(folder / "result.json")["entries"]] == ["one"]


def test_an_interrupt_reaches_the_board_and_brings_its_partial_result(boards, make_bundle, measured, tmp_path):
    """The board's rkd writes what it has when it gets SIGINT, as the real one does."""
    partial = dict(measured, interrupted=True)
    (tmp_path / "partial.json").write_text(json.dumps(partial))
    program = tmp_path / "rkd"
    program.write_text(
        f'#!{sys.executable}\nimport pathlib, shutil, signal, sys\nif sys.argv[1] == "--version":\n    sys.exit(0)\n'
        "def stop(*_):\n"
        f'    shutil.copy("{tmp_path}/partial.json", "result.json")\n    sys.exit(130)\n'
        'signal.signal(signal.SIGINT, stop)\nprint("latency ...", file=sys.stderr, flush=True)\nsignal.pause()\n'
    )
    program.chmod(0o755)

    def stop(line):
        if line == "one: latency ...":
            board.interrupt()

    with tempfile.TemporaryDirectory(dir="/tmp") as sockets:
        board = remote._Board("one", str(program), stop, sockets)
        found = board.bench([make_bundle()], OPTIONS, per_class=False)
    assert found["interrupted"] is True


@pytest.mark.parametrize("host", ["-oProxyCommand=touch x", "a b", "", "a;b", "x" * 300])
def test_a_name_that_ssh_could_take_for_an_option_is_refused(make_bundle, host):
    with pytest.raises(ConfigError, match="--host"):
        bench_hosts([make_bundle()], OPTIONS, [host])


def test_a_board_that_is_named_twice_is_refused(make_bundle):
    with pytest.raises(ConfigError, match="one and one are one board"):
        bench_hosts([make_bundle()], OPTIONS, ["one", "one"])


@pytest.mark.parametrize("hosts", [("pi@board", "root@board"), ("board", "pi@Board")])
def test_a_board_is_one_whoever_logs_in(make_bundle, hosts):
    with pytest.raises(ConfigError, match=f"--host: {hosts[0]} and {hosts[1]} are one board named twice"):
        bench_hosts([make_bundle()], OPTIONS, hosts)


def test_data_of_this_machine_cannot_be_evaluated_on_a_board(make_bundle, folder):
    request = Request((make_bundle().path,), BenchOptions(data=folder), hosts=("one",))
    with pytest.raises(ConfigError, match="--data is a folder of this machine"):
        bench_command(request)
