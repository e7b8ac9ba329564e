"""Who am I, as torchrun, mpirun and Slurm say it."""

import sys

import pytest

from seqpar.collectives import launcher
from seqpar.collectives.launcher import Place, first_host, gpu_of, read_place

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "10.0.0.7",
    "MASTER_PORT": "29500",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
SLURM = {
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_STEP_NODELIST": "node[003-010,12]",
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "0",
}


def test_each_launcher_is_understood() -> None:
    assert read_place({}) == Place(0, 1, 0, 1, "", 0, "none")
    assert read_place(TORCHRUN) == Place(5, 8, 1, 4, "10.0.0.7", 29500, "torchrun")
    assert read_place(OPEN_MPI) == Place(2, 4, 0, 2, "", 0, "mpirun (Open MPI)")
    assert read_place(MPICH) == Place(1, 2, 1, 2, "", 0, "mpirun (MPICH)")
    place = read_place(SLURM)
    assert (place.rank, place.size, place.local_rank, place.local_size) == (3, 4, 1, 2)
    assert (place.address, place.launcher) == ("node003", "Slurm")


def test_torchrun_goes_before_what_it_was_started_in() -> None:
    assert read_place(SLURM | OPEN_MPI | TORCHRUN).launcher == "torchrun"
    assert read_place(SLURM | MPICH).launcher == "mpirun (MPICH)"


def test_torchrun_counts_its_attempts() -> None:
    assert read_place(TORCHRUN).attempt == 0
    assert read_place(TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "2"}).attempt == 2
    with pytest.raises(ValueError, match="TORCHELASTIC_RESTART_COUNT='-1' is not a number"):
        read_place(TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "-1"})


def test_a_given_address_is_taken() -> None:
    for told in (OPEN_MPI, MPICH, SLURM):
        place = read_place(told | {"MASTER_ADDR": "head", "MASTER_PORT": "1717"})
        assert (place.address, place.port) == ("head", 1717)


def test_slurm_ports_differ_between_jobs_and_agree_within_one() -> None:
    jobs = [SLURM | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)} for job in range(50) for step in range(3)]
    ports = [read_place(job).port for job in jobs]
    assert len(set(ports)) == len(ports)
    assert all(1024 < port < 32768 for port in ports)
    assert read_place(SLURM | {"SLURM_PROCID": "0"}).port == read_place(SLURM).port


def test_a_slurm_allocation_without_srun_is_one_process() -> None:
    """A batch script and the shell of salloc: told how many tasks there would be, and that they are task 0."""
    shell = {"SLURM_NTASKS": "8", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NODELIST": "n[1-2]"}
    assert read_place(shell).size == 1
    told = shell | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    assert read_place(told).size == 1
    for own in ("4294967290", "4294967291"):  # of salloc's shell, and of a batch script
        assert read_place(told | {"SLURM_STEP_ID": own, "SLURM_STEP_NUM_TASKS": "1"}).size == 1
        assert read_place(told | {"SLURM_STEPID": own}).size == 1
    for names in (("SLURM_STEP_ID",), ("SLURM_STEPID",)):
        assert read_place(told | dict.fromkeys(names, "3")).size == 8
    assert read_place(told | TORCHRUN).launcher == "torchrun"


def test_both_names_of_a_step_give_one_port() -> None:
    old = {name: value for name, value in SLURM.items() if name != "SLURM_STEP_ID"}
    for step in ("0", "5"):
        assert read_place(old | {"SLURM_STEPID": step}).port == read_place(SLURM | {"SLURM_STEP_ID": step}).port


def test_a_gpu_for_every_rank_of_a_host() -> None:
    assert gpu_of(read_place(TORCHRUN), 4) == 1
    with pytest.raises(ValueError, match="rank 5 of 8 is number 1 on its host, which has 1 GPUs"):
        gpu_of(read_place(TORCHRUN), 1)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node[003-010,12]", "node003"),
        ("node12", "node12"),
        ("a1,b[2-3]", "a1"),
        ("gpu[7,9-11]-ib,cpu1", "gpu7-ib"),
        ("rack[1-2]n[07,09]", "rack1n07"),
        ("10.0.0.[4-5]", "10.0.0.4"),
    ],
)
def test_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (TORCHRUN | {"RANK": "abc"}, "RANK='abc' is not a number"),
        (TORCHRUN | {"RANK": "-1"}, "RANK='-1' is not a number"),
        (TORCHRUN | {"RANK": "8"}, r"RANK='8' must be at least 0 and below 8 \(WORLD_SIZE=8\)"),
        (TORCHRUN | {"WORLD_SIZE": "0"}, "WORLD_SIZE='0' must be at least 1"),
        (TORCHRUN | {"LOCAL_RANK": "x"}, "LOCAL_RANK='x' is not a number"),
        (TORCHRUN | {"MASTER_PORT": "99999"}, "MASTER_PORT='99999' must be at least 1 and below 65536"),
        ({"RANK": "0"}, "RANK='0' is set but WORLD_SIZE is not"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE='2' is set but RANK is not"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set but MASTER_ADDR is not"),
        (MPICH | {"MASTER_ADDR": "head"}, "MASTER_ADDR='head' is set but MASTER_PORT is not"),
        (MPICH | {"PMI_SIZE": "two"}, "PMI_SIZE='two' is not a number"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"}, "SLURM_NODELIST are not: start with srun"),
        (SLURM | {"SLURM_STEP_ID": "x"}, "SLURM_STEP_ID='x' is not a number"),
        (SLURM | {"SLURM_STEP_NODELIST": "[1-2]["}, "looks like node"),
    ],
    ids=lambda value: value.split(" ")[0] if isinstance(value, str) else "",
)
def test_nonsense_is_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_place(environment)


def test_mpirun_without_mpi4py_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ValueError, match=r"install mpi4py .* or set MASTER_ADDR .* MASTER_PORT"):
        launcher._agree_by_mpi(read_place(MPICH))
