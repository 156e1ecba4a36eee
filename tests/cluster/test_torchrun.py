"""The README's command for two machines: two torchrun agents, one rank each, one run.

On one machine, and as two hosts with addresses, host names and shared memory of their own where
network namespaces can be made. Not covered: a real network, NCCL.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import chat_run
from tests.distributed.harness import free_port
from tests.e2e import real_jobs

pytestmark = pytest.mark.slow


def words(node: int, address: str, port: int, out: str) -> list[str]:
    """One agent's command, as the README has it."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
    where = ["--node-rank", str(node), "--master-addr", address, "--master-port", str(port)]
    train = ["train", "sanity.tiny_dense", "--out", out, "--set", *chat_run.WORDS]
    ranks = ["--nproc-per-node", "1", *real_jobs.module_words(*train)]
    return [*torchrun, *where, *ranks]


def run_both(commands: list[list[str]], folder: Path, interfaces: list[str]) -> list[str]:
    """Both agents to their ends; returns what each wrote."""
    agents = []
    for command, interface in zip(commands, interfaces, strict=True):
        environment = {**real_jobs.environment(chat_run.E2E), "GLOO_SOCKET_IFNAME": interface}
        agents.append(
            subprocess.Popen(
                command, cwd=folder, env=environment, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
        )  # fmt: skip
    try:
        said = [agent.communicate(timeout=real_jobs.PATIENCE_S)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(said)
    return said


def test_two_agents_on_one_machine_train_and_sync(chat_folder: Path) -> None:
    port = free_port()
    commands = [words(node, "127.0.0.1", port, "two_agents") for node in (0, 1)]
    run_both(commands, chat_folder, ["lo", "lo"])
    chat_run.assert_trained(chat_folder / "two_agents")


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[list[list[str]]]:
    """What to put before a command to run it on one of two hosts, 10.77.0.1 and 10.77.0.2."""
    if os.geteuid() != 0 or not _try("ip", "netns", "add", "mp-probe"):
        pytest.skip("no network namespaces here")
    _try("ip", "netns", "del", "mp-probe")
    names = (tmp_path / "hosts").resolve()
    names.write_text("127.0.0.1 localhost\n10.77.0.1 host-a\n10.77.0.2 host-b\n")
    with contextlib.ExitStack() as made:
        for host in ("a", "b"):
            _need("ip", "netns", "add", f"mp-{host}")
            made.callback(_try, "ip", "netns", "del", f"mp-{host}")
        _need("ip", "link", "add", "mp-va", "type", "veth", "peer", "name", "mp-vb")
        for number, host in enumerate("ab", start=1):
            _need("ip", "link", "set", f"mp-v{host}", "netns", f"mp-{host}")
            inside = ("ip", "-n", f"mp-{host}")
            _need(*inside, "addr", "add", f"10.77.0.{number}/24", "dev", f"mp-v{host}")
            for device in ("lo", f"mp-v{host}"):
                _need(*inside, "link", "set", device, "up")
        yield [_prefix(host, names) for host in "ab"]


def _prefix(host: str, names: Path) -> list[str]:
    shell = (
        f"hostname host-{host}; mount --bind {names} /etc/hosts; "
        'mount -t tmpfs tmpfs /dev/shm; exec "$@"'
    )
    space = ["ip", "netns", "exec", f"mp-{host}", "unshare", "--uts", "--mount", "--ipc"]
    return [*space, "bash", "-c", shell, "bash"]


def _try(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def _need(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"


def test_two_hosts_with_addresses_of_their_own_train_and_sync(
    chat_folder: Path, hosts: list[list[str]]
) -> None:
    commands = [
        [*host, *words(node, "10.77.0.1", 29611, "two_hosts")] for node, host in enumerate(hosts)
    ]
    run_both(commands, chat_folder, ["mp-va", "mp-vb"])
    chat_run.assert_trained(chat_folder / "two_hosts")
