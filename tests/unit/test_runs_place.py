"""Which rank a process is, from what torchrun, accelerate launch, SLURM or our own spawner say."""

from __future__ import annotations

import pytest

from whitetuner.errors import UserError
from whitetuner.runs.devices import CPU, Device
from whitetuner.runs.place import entries, entry_of, hosts_of, place_here

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29777",
}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "123",
}


def test_torchrun_and_slurm_say_the_same() -> None:
    for given in (TORCHRUN, SLURM):
        place = place_here(given)
        assert place is not None
        assert (place.rank, place.world, place.local_rank, place.local_world) == (5, 8, 1, 4)
    assert place_here(TORCHRUN).host == "10.0.0.1" and place_here(TORCHRUN).port == 29777  # type: ignore[union-attr]
    assert place_here(SLURM).host == "gpu07"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"SLURM_PROCID": "0", "SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"},  # the batch script itself, no srun
    ],
)
def test_a_process_of_its_own_is_no_rank(given: dict[str, str]) -> None:
    assert place_here(given) is None


@pytest.mark.parametrize(
    "changed", [{"RANK": "8"}, {"LOCAL_RANK": "4"}, {"WORLD_SIZE": "many"}, {"WHITETUNER_ARRIVAL_S": "soon"}]
)
def test_variables_that_cannot_be_are_refused(changed: dict[str, str]) -> None:
    with pytest.raises(UserError):
        place_here({**TORCHRUN, **changed})


def test_two_runs_of_the_spawner_take_free_ports() -> None:
    place = place_here({**TORCHRUN, "WHITETUNER_RENDEZVOUS": "port"})
    assert place is not None and place.port == 0 and place.rendezvous == "port"


def test_two_slurm_jobs_do_not_meet() -> None:
    one, two = place_here(SLURM), place_here({**SLURM, "SLURM_JOB_ID": "124"})
    assert one is not None and two is not None and one.port != two.port


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("gpu[01-03,7],login", ["gpu01", "gpu02", "gpu03", "gpu7", "login"]),
        ("a1", ["a1"]),
        ("n[9-11]-ib,m", ["n9-ib", "n10-ib", "n11-ib", "m"]),
        ("", []),
    ],
)
def test_slurms_short_lists_are_written_out(text: str, hosts: list[str]) -> None:
    assert hosts_of(text) == hosts


def test_devices_are_given_out_one_to_a_rank() -> None:
    cards = [Device("GPU-a", "A", 2), Device("GPU-b", "B", 5)]
    assert entries("cpu,cpu", [CPU]) == ["cpu", "cpu"]
    assert entries("2,cuda:5", cards) == ["2", "5"]
    assert entries("any:2", cards) == ["0", "1"]  # those that were claimed are all that PyTorch sees then
    assert entry_of("2,5", 1) == "5" and entry_of("cpu", 3) == "cpu"


@pytest.mark.parametrize("gpus", ["0,0", "0,cpu"])
def test_a_gpu_twice_and_a_cpu_beside_a_gpu_are_refused(gpus: str) -> None:
    with pytest.raises(UserError):
        entries(gpus, [])


def test_more_ranks_than_devices_named_is_refused() -> None:
    with pytest.raises(UserError, match="names 2 devices"):
        entry_of("0,1", 2)
