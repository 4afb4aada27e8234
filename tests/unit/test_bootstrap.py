import pytest
from mhc_launcher.bootstrap import (
    RankEnvironment,
    Source,
    expand_tasks_per_node,
    first_host,
    read_rank_environment,
    this_node,
)

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29501",
}
# As DeepSpeed 0.19.8's launch.py sets them.
DEEPSPEED = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "2",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
SLURM = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "gpu[07-09]",
}
KUBERNETES = {"JOB_COMPLETION_INDEX": "2", "WORLD_SIZE": "3", "MASTER_ADDR": "train-0.train"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (TORCHRUN, RankEnvironment(5, 8, 1, 4, "node0", 29501, Source.TORCHRUN, this_node())),
        (DEEPSPEED, RankEnvironment(3, 4, 1, 2, "10.0.0.1", 29500, Source.TORCHRUN, "node 1")),
        (OPEN_MPI, RankEnvironment(2, 4, 2, 4, "127.0.0.1", 29500, Source.MPI, this_node())),
        (MPICH, RankEnvironment(1, 2, 1, 2, "127.0.0.1", 29500, Source.MPI, this_node())),
        (SLURM, RankEnvironment(3, 5, 1, 2, "gpu07", 23456, Source.SLURM, "node 1")),
        (KUBERNETES, RankEnvironment(2, 3, 0, 1, "train-0.train", 29500, Source.KUBERNETES, "node 2")),
        ({}, RankEnvironment(0, 1, 0, 1, "127.0.0.1", 29500, Source.SINGLE, this_node())),
    ],
    ids=["torchrun", "deepspeed", "open-mpi", "mpich", "slurm", "kubernetes", "single"],
)
def test_each_launcher_is_understood(variables: dict[str, str], expected: RankEnvironment) -> None:
    # Oracle: the launchers' documented variables, written out.
    assert read_rank_environment(variables) == expected


def test_the_inner_launcher_wins() -> None:
    # Oracle: nesting; torchrun in srun, mpirun in a Slurm job, deepspeed in a pod.
    assert read_rank_environment({**SLURM, **TORCHRUN}).source is Source.TORCHRUN
    assert read_rank_environment({**SLURM, **OPEN_MPI}).source is Source.MPI
    assert read_rank_environment({**SLURM, **MPICH}).source is Source.MPI
    assert read_rank_environment({**SLURM, "PMI_RANK": "3", "PMI_SIZE": "5"}).source is Source.SLURM
    assert read_rank_environment({"JOB_COMPLETION_INDEX": "1", **DEEPSPEED}).source is Source.TORCHRUN


def test_a_slurm_batch_script_is_not_a_task() -> None:
    # Oracle: the variables of sbatch's own script, whose step is numbered 0xfffffffb or not at all.
    for step in ({}, {"SLURM_STEP_ID": str(0xFFFFFFFB)}):
        variables = {key: value for key, value in SLURM.items() if key != "SLURM_STEP_ID"} | step
        assert read_rank_environment(variables).source is Source.SINGLE


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0"}, r"RANK is set.*WORLD_SIZE is not. Set WORLD_SIZE"),
        ({**TORCHRUN, "RANK": "8"}, r"rank 8 is not below its number of processes 8"),
        ({**TORCHRUN, "LOCAL_RANK": "4"}, r"local rank 4 is not below its number of processes 4"),
        ({**TORCHRUN, "WORLD_SIZE": "two"}, r"WORLD_SIZE='two' is not a whole number"),
        ({**TORCHRUN, "RANK": "-1"}, r"RANK='-1' is not a whole number"),
        ({**TORCHRUN, "RANK": "1", "WORLD_SIZE": "2"}, r"4 processes on this node, but 2 in all"),
        ({**TORCHRUN, "MASTER_PORT": "70000"}, r"port 70000 is outside 1..65535"),
        ({**TORCHRUN, **OPEN_MPI}, r"OMPI_COMM_WORLD_RANK=2, but RANK=5.*Unset RANK"),
        (
            {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
            r"-x MASTER_ADDR",
        ),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, r"PMI_RANK is set, as by mpirun, but MPI_LOCALNRANKS is not"),
        ({**SLURM, "SLURM_NODEID": "3"}, r"SLURM_NODEID=3.*names 3 nodes"),
        ({"JOB_COMPLETION_INDEX": "2", "MASTER_ADDR": "a"}, r"WORLD_SIZE to the job's completions"),
        ({"JOB_COMPLETION_INDEX": "2", "WORLD_SIZE": "3"}, r"MASTER_ADDR to JOB-0.SERVICE"),
    ],
)
def test_bad_environments_are_refused_with_a_remedy(variables: dict[str, str], message: str) -> None:
    # Oracle: the wording promised to users.
    with pytest.raises(ValueError, match=message):
        read_rank_environment(variables)


@pytest.mark.parametrize(
    ("text", "tasks"), [("2(x3),1", [2, 2, 2, 1]), ("4", [4]), ("1,2", [1, 2]), ("3(x1)", [3])]
)
def test_slurm_task_counts_expand(text: str, tasks: list[int]) -> None:
    # Oracle: Slurm's run-length form by hand.
    assert expand_tasks_per_node(text) == tasks


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("gpu[07-09,12],cpu1", "gpu07"),
        ("node1,node2", "node1"),
        ("single", "single"),
        ("rack2-n[3,5]-ib", "rack2-n3-ib"),
    ],
)
def test_the_first_host_of_a_slurm_node_list(nodes: str, host: str) -> None:
    # Oracle: Slurm's host list syntax by hand.
    assert first_host(nodes) == host
