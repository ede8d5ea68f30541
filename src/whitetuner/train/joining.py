"""How the ranks of a run find each other: one keeps a store, all sign in there, and whoever does not come is named."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from whitetuner.errors import EXIT_ENVIRONMENT, UserError
from whitetuner.runs.files import write_atomically
from whitetuner.runs.place import Place
from whitetuner.train.distributed import PATIENCE, Ranks, Several
from whitetuner.train.watch import Presence, Watch

_LOOK_EVERY_S = 0.1
#: For the answer of a store that is there.
_ANSWER = timedelta(seconds=60)


@contextmanager
def joined(place: Place | None, device: torch.device) -> Iterator[Ranks]:
    """The ranks of the run that this process is one of, until the end of the block. place: None: it is on its own.

    Raises UserError when the port is taken, when nobody answers there, and when ranks do not come in time, with their numbers.
    """
    if place is None:
        yield Ranks()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    ends = time.monotonic() + place.arrival_s
    keeps = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    port = place.port if keeps or not place.rendezvous else _told_port(place, ends)
    store = _store(place, port, ends, keeps=keeps)
    if keeps and place.rendezvous:
        write_atomically(Path(place.rendezvous), str(store.port))
    run = dist.PrefixStore("whitetuner", store)
    me = Presence(place.rank, socket.gethostname(), machine(), os.getpid(), _born(), str(device))
    run.set(f"here/{place.rank}", json.dumps(asdict(me)))
    presences = _all_here(run, place, ends)
    second = dist.PrefixStore("whitetuner", _store(place, store.port, time.monotonic() + 60, keeps=False))
    keeper = None if place.rank == 0 else presences[0]
    others = [one for one in presences if one.rank != place.rank]
    interface = _interface(place)
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    watch = Watch(second, me, others, place.launcher, keeper)
    on_card = device.type == "cuda" and dist.is_nccl_available()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_card else "gloo",
        store=dist.PrefixStore("torch", store),
        rank=place.rank,
        world_size=place.world,
        timeout=PATIENCE,
    )
    ranks = Several(run, presences, place.rank, place.local_rank, watch)
    try:
        yield ranks
    finally:
        ranks.close()


def _interface(place: Place) -> str | None:
    """The network interface by which rank 0 is reached: gloo would take that of the host's name, which may lead nowhere.

    None where it cannot be told: Windows, and a name that means this machine's loopback while others are elsewhere.
    """
    if os.name == "nt":
        return None
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # sends nothing
            probe.connect((place.host, place.port or 1))
            own = probe.getsockname()[0]
    except OSError:  # no IPv4 way to that name: gloo's own choice
        return None
    if own.startswith("127.") and place.world > place.local_world:
        return None
    names = psutil.net_if_addrs().items()
    if own.startswith("127."):
        own = "127.0.0.1"
    return next((name for name, addresses in names if any(one.address == own for one in addresses)), None)


def _born() -> float:
    return psutil.Process().create_time()


def machine() -> str:
    """The same for processes that see each other's numbers and this machine's loopback; another one elsewhere."""
    facts = [socket.gethostname()]
    boot = Path("/proc/sys/kernel/random/boot_id")
    if boot.is_file():
        facts.append(boot.read_text(encoding="utf-8").strip())
    for name in ("/proc/self/ns/pid", "/proc/self/ns/net"):
        if Path(name).exists():
            facts.append(str(Path(name).readlink()))
    return "|".join(facts)


def _store(place: Place, port: int, ends: float, *, keeps: bool) -> dist.TCPStore:
    try:
        store = dist.TCPStore(
            place.host,
            port,
            is_master=keeps,
            wait_for_workers=False,
            timeout=timedelta(seconds=max(1.0, ends - time.monotonic())),
            use_libuv=os.name != "nt",  # PyTorch's Windows builds come without it
        )
    except RuntimeError as error:
        reason = (str(error).splitlines() or [""])[0]
        if keeps and ("EADDRINUSE" in reason or "in use" in reason):
            raise UserError(
                "port {port} of this machine is taken: another run, or another program, listens there",
                where="MASTER_PORT",
                mend="give the ranks of this run another port: MASTER_PORT=29777, or torchrun --master_port 29777; "
                "with --gpus no port has to be chosen",
                code=EXIT_ENVIRONMENT,
                port=port,
            ) from error
        raise UserError(
            "rank 0 cannot be reached at {address} ({reason})",
            where=f"rank {place.rank} of {place.world}",
            mend="start it too, on the machine that MASTER_ADDR names, and let its firewall pass the ports between the machines",
            code=EXIT_ENVIRONMENT,
            reason=reason[:200],
            address=f"{place.host}:{port}",
        ) from error
    store.set_timeout(_ANSWER)
    return store


def _told_port(place: Place, ends: float) -> int:
    """Rank 0 takes a free port and writes it down: two runs on one machine never meet."""
    file = Path(place.rendezvous)
    while time.monotonic() < ends:
        if file.is_file():
            return int(file.read_text(encoding="utf-8"))
        time.sleep(_LOOK_EVERY_S)
    raise _missing([0], [], place)


def _all_here(store: dist.Store, place: Place, ends: float) -> list[Presence]:
    awaited = set(range(place.world))
    found: dict[int, Presence] = {}
    while awaited:
        for rank in sorted(awaited):
            if store.check([f"here/{rank}"]):
                found[rank] = Presence(**json.loads(store.get(f"here/{rank}")))
                awaited.discard(rank)
        if awaited and time.monotonic() > ends:
            raise _missing(sorted(awaited), list(found.values()), place)
        if awaited:
            time.sleep(_LOOK_EVERY_S)
    return [found[rank] for rank in range(place.world)]


def _missing(ranks: Sequence[int], here: Sequence[Presence], place: Place) -> UserError:
    return UserError(
        "{missing} of {world} did not come within {seconds} s; here are: {here}",
        where=f"rank {place.rank}",
        mend="look at how they were started (the same WORLD_SIZE, MASTER_ADDR and MASTER_PORT everywhere), and at their "
        "machines; WHITETUNER_ARRIVAL_S changes the time",
        code=EXIT_ENVIRONMENT,
        missing=", ".join(f"rank {rank}" for rank in ranks),
        world=place.world,
        seconds=round(place.arrival_s),
        here=", ".join(map(str, here)) or "none",
    )
