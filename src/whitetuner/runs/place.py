"""Which rank of a run this process is, as whoever started it says: our own spawner, torchrun, accelerate launch or SLURM."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from whitetuner.errors import EXIT_ENVIRONMENT, UserError
from whitetuner.runs.devices import Device, devices

#: Our own spawner's: the file in which rank 0 writes its port, what this rank trains on, and whose word ends the run.
RENDEZVOUS, DEVICE, LAUNCHER = "WHITETUNER_RENDEZVOUS", "WHITETUNER_DEVICE", "WHITETUNER_LAUNCHER"
#: Seconds until a rank that has not come is told: environment variable, and what it is unless set.
ARRIVAL, ARRIVAL_S = "WHITETUNER_ARRIVAL_S", 300.0
#: torchrun's default; for SLURM the job's number is added, so that two jobs on one machine do not meet.
_PORT, _PORTS = 29500, 10_000


@dataclass(frozen=True)
class Place:
    """rank of world, local_rank of local_world on this machine; host and port: of rank 0's store (port 0: told in the file
    `rendezvous`); device: given by the spawner, "" for others; launcher: pid of the spawner, 0 for others."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    host: str = "127.0.0.1"
    port: int = 0
    rendezvous: str = ""
    device: str = ""
    launcher: int = 0
    arrival_s: float = ARRIVAL_S


def place_here(environment: Mapping[str, str] | None = None) -> Place | None:
    """The place that the environment gives this process; None for a process on its own.

    Raises UserError for variables that contradict each other.
    """
    given = os.environ if environment is None else environment
    if "RANK" in given and "WORLD_SIZE" in given:
        found = _torchrun(given)
    elif _number(given, "SLURM_STEP_NUM_TASKS", 1) > 1 and "SLURM_PROCID" in given:
        found = _slurm(given)
    else:
        return None
    if not 0 <= found.rank < found.world or not 0 <= found.local_rank < max(1, found.local_world):
        raise UserError(
            "this process is told to be rank {rank} of {world} (number {local} of {beside} on this machine)",
            where="RANK / WORLD_SIZE / LOCAL_RANK",
            mend="start it with torchrun, accelerate launch or srun, or without these variables with --gpus",
            code=EXIT_ENVIRONMENT,
            rank=found.rank,
            world=found.world,
            local=found.local_rank,
            beside=found.local_world,
        )
    return None if found.world == 1 else found


def _torchrun(given: Mapping[str, str]) -> Place:
    """Also accelerate launch, which sets the same variables (docs: torch.distributed.run, "Environment Variables")."""
    world = _number(given, "WORLD_SIZE", 1)
    rank = _number(given, "RANK", 0)
    return Place(
        rank,
        world,
        _number(given, "LOCAL_RANK", rank),
        _number(given, "LOCAL_WORLD_SIZE", world),
        given.get("MASTER_ADDR", "127.0.0.1"),
        0 if RENDEZVOUS in given else _number(given, "MASTER_PORT", _PORT),  # a free one, told in that file
        given.get(RENDEZVOUS, ""),
        given.get(DEVICE, ""),
        _number(given, LAUNCHER, 0),
        _seconds(given),
    )


def _slurm(given: Mapping[str, str]) -> Place:
    """What srun tells each task (man srun, "OUTPUT ENVIRONMENT VARIABLES"); rank 0 is on the first machine of the list."""
    rank, world = _number(given, "SLURM_PROCID", 0), _number(given, "SLURM_STEP_NUM_TASKS", 1)
    hosts = hosts_of(given.get("SLURM_STEP_NODELIST", "") or given.get("SLURM_JOB_NODELIST", ""))
    nodes = max(1, _number(given, "SLURM_STEP_NUM_NODES", len(hosts) or 1))
    return Place(
        rank,
        world,
        _number(given, "SLURM_LOCALID", rank % -(-world // nodes)),
        _first_number(given.get("SLURM_STEP_TASKS_PER_NODE", ""), -(-world // nodes)),
        given.get("MASTER_ADDR") or (hosts[0] if hosts else "127.0.0.1"),
        _number(given, "MASTER_PORT", _PORT + 1 + _number(given, "SLURM_JOB_ID", 0) % _PORTS),
        arrival_s=_seconds(given),
    )


def entry_of(gpus: str, number: int) -> str:
    """The device of the rank of this number on its machine, of a list for all of them."""
    words = [word.strip() for word in gpus.split(",")]
    if len(words) == 1:
        return words[0] if words[0] in ("cpu", "any") else f"cuda:{words[0]}"
    if number >= len(words):
        raise UserError(
            "--gpus names {count} devices, and this is rank {number} of this machine, counted from 0",
            where="--gpus",
            mend="name as many devices as ranks are started on a machine, or leave --gpus out",
            count=len(words),
            number=number,
        )
    return words[number]


def entries(gpus: str, held: Sequence[Device]) -> list[str]:
    """What each rank trains on. held: what was claimed for "any:N", which are the first ones for PyTorch from then on.

    Raises UserError for a list that mixes GPUs and CPUs: they compute other bits, and one would wait for the other.
    """
    if gpus.startswith("any:"):
        return [str(number) for number in range(len(held))] if held and held[0].index is not None else ["cpu"]
    words = [word.strip().removeprefix("cuda:") for word in gpus.split(",") if word.strip()]
    if "cpu" in words and set(words) != {"cpu"}:
        raise UserError(
            "GPUs and CPUs cannot train one run together",
            where="--gpus",
            mend="give GPUs alone (0,1) or CPUs alone (cpu,cpu)",
        )
    known = {str(one.index) for one in devices() if one.index is not None}
    missing = [word for word in words if word != "cpu" and known and word not in known]
    if missing:
        raise UserError(
            "there is no GPU {missing} here; there are: {known}",
            where="--gpus",
            mend="name some of these, or any:N for so many that are free",
            code=EXIT_ENVIRONMENT,
            missing=", ".join(missing),
            known=", ".join(sorted(known)),
        )
    twice = next((word for word in words if word != "cpu" and words.count(word) > 1), None)
    if twice is not None:
        raise UserError(
            "GPU {number} is named twice",
            where="--gpus",
            mend="give each GPU once: a rank fills its card",
            number=twice,
        )
    return words


def hosts_of(text: str) -> list[str]:
    """SLURM's short lists: "gpu[01-03,7],login" -> gpu01, gpu02, gpu03, gpu7, login."""
    found = []
    for word in re.findall(r"[^,\[]+(?:\[[^\]]*\])?[^,\[]*", text):
        parts = re.fullmatch(r"([^\[]*)\[([^\]]*)\](.*)", word)
        if parts is None:
            found.append(word)
            continue
        before, inside, after = parts.groups()
        for piece in inside.split(","):
            first, _, last = piece.partition("-")
            for number in range(int(first), int(last or first) + 1):
                found.append(f"{before}{number:0{len(first)}d}{after}")
    return found


def _first_number(text: str, otherwise: int) -> int:
    """ "2(x3),1" -> 2."""
    found = re.match(r"\d+", text)
    return int(found[0]) if found else otherwise


def _number(given: Mapping[str, str], name: str, otherwise: int) -> int:
    text = given.get(name)
    if text is None or text == "":
        return otherwise
    try:
        return int(text)
    except ValueError as error:
        raise _no_number(name, text) from error


def _seconds(given: Mapping[str, str]) -> float:
    text = given.get(ARRIVAL) or str(ARRIVAL_S)
    try:
        return float(text)
    except ValueError as error:
        raise _no_number(ARRIVAL, text) from error


def _no_number(name: str, text: str) -> UserError:
    return UserError(
        "{value} is no number",
        where=name,
        mend="unset this variable of the environment, or let the program that starts the ranks set it",
        code=EXIT_ENVIRONMENT,
        value=repr(text),
    )
