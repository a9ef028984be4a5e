"""Two nodes on one machine: network namespaces, joined by a link of a given speed, or by one that delays and loses
packets. They need Linux, root and iproute2."""

import contextlib
import fcntl
import os
import random
import select
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from threading import Thread

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000


def ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True)


class Node:
    """A network namespace with the address 10.99.0.1, the head, or 10.99.0.2, on a device called link0."""

    def __init__(self, i: int):
        self.name, self.i = f"node{i}", i

    def connect(self) -> None:
        for command in (f"addr add 10.99.0.{self.i + 1}/24 dev link0", "link set link0 up", "link set lo up"):
            ip(f"-n {self.name} {command}")

    def torchrun(self, nnodes: str, *flags: str) -> list[str]:
        """The beginning of a command that starts one process here."""
        launcher = f"{sys.executable} -m torch.distributed.run --nnodes={nnodes} --rdzv-backend=c10d --rdzv-id=nodes"
        launcher += f" --rdzv-endpoint=10.99.0.1:29400 --rdzv-conf=is_host={self.i == 0},last_call_timeout=5"
        launcher += f" --local-addr=10.99.0.{self.i + 1}"
        return f"ip netns exec {self.name} env GLOO_SOCKET_IFNAME=link0 {launcher}".split() + list(flags)


@contextlib.contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """Two nodes without a link, which are removed at the end."""
    nodes = Node(0), Node(1)
    with contextlib.ExitStack() as created:
        for node in nodes:
            ip(f"netns add {node.name}")
            created.callback(ip, f"netns del {node.name}")
        yield nodes


@contextlib.contextmanager
def linked_nodes(bits_per_second: float) -> Iterator[tuple[Node, Node]]:
    with two_nodes() as nodes:
        ip("link add link0 netns node0 type veth peer name link0 netns node1")
        for node in nodes:
            node.connect()
            limit = f"rate {bits_per_second:.0f}bit burst 256kb latency 50ms"
            ip(f"netns exec {node.name} tc qdisc add dev link0 root tbf {limit}")
        yield nodes


@contextlib.contextmanager
def flaky_nodes(delay: float, loss: float) -> Iterator[tuple[Node, Node]]:
    """Two nodes whose packets arrive `delay` seconds later; a share `loss` of them does not arrive."""
    with two_nodes() as nodes:
        Thread(target=carry, args=([tunnel(node) for node in nodes], delay, loss), daemon=True).start()
        yield nodes


def tunnel(node: Node) -> int:
    """Create link0 in a node as a device whose packets this process reads and writes."""
    end = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH14x", node.name.encode(), IFF_TUN | IFF_NO_PI))
    ip(f"link set {node.name} netns {node.name} name link0")
    node.connect()
    return end


def carry(tunnels: list[int], delay: float, loss: float) -> None:
    """Carry packets from each end to the other, until their nodes are removed."""
    under_way = deque()  # (time of arrival, end, packet), the next to arrive first
    with contextlib.suppress(OSError):  # of the first read or write after that
        while True:
            pause = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
            for end in select.select(tunnels, [], [], pause)[0]:
                packet = os.read(end, 2**16)
                if random.random() >= loss:
                    under_way.append((time.monotonic() + delay, tunnels[1 - tunnels.index(end)], packet))
            while under_way and under_way[0][0] <= time.monotonic():
                _, end, packet = under_way.popleft()
                os.write(end, packet)
    for end in tunnels:
        os.close(end)
