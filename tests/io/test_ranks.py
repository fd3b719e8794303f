"""Who a process is, from the variables that launchers set."""

from __future__ import annotations

import pytest

from swd.io.ranks import Ranks, first_host, meeting_point, ranks
from swd.types import UserError

TASK = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "2", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "4711"}
STEP = TASK | {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "4", "SLURM_NTASKS": "16", "SLURM_NNODES": "8"}
SHELL = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "1"}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Ranks()),
        ({"WORLD_SIZE": "4"}, Ranks()),
        (TORCHRUN, Ranks(3, 4, 1, 2, 1, "torchrun")),
        (TORCHRUN | STEP, Ranks(3, 4, 1, 2, 1, "torchrun")),  # torchrun as a task of srun on each node
        ({"RANK": "2", "WORLD_SIZE": "3"}, Ranks(2, 3, 0, 1, 2, "torchrun")),  # one process in each container
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, Ranks(1, 2, 1, 2, 0, "torchrun")),
        (STEP, Ranks(5, 8, 1, 2, 2, "srun")),  # the step's numbers, not the job's
        (STEP | {"SLURM_JOB_NAME": "interactive"}, Ranks(5, 8, 1, 2, 2, "srun")),  # srun in a shell of salloc
        (TASK | {"SLURM_NTASKS": "6", "SLURM_NTASKS_PER_NODE": "2"}, Ranks(5, 6, 1, 2, 2, "srun")),
        (SHELL | {"SLURM_STEP_ID": "0"}, Ranks(0, 4, 0, 4, 0, "srun")),
        (SHELL, Ranks()),  # a batch script without srun
        (SHELL | {"SLURM_JOB_NAME": "train.sh"}, Ranks()),
        (SHELL | {"SLURM_STEP_ID": "4294967290", "SLURM_JOB_NAME": "interactive"}, Ranks()),  # a shell of salloc
        (SHELL | {"SLURM_STEP_ID": "0", "SLURM_PTY_PORT": "40000", "SLURM_JOB_NAME": "bash"}, Ranks()),  # srun --pty
        ({"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "bash"}, Ranks()),
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2"}, Ranks(1, 2, 1, 2, 0, "lightning")),
        ({"LOCAL_RANK": "0", "NODE_RANK": "0", "WORLD_SIZE": "2"}, Ranks(0, 2, 0, 2, 0, "lightning")),
    ],
)
def test_each_launcher_is_recognized_and_leftovers_are_not(variables: dict[str, str], expected: Ranks) -> None:
    found = ranks(variables)
    assert found == expected
    assert found.first == (expected.rank == 0) and found.nodes * found.local_world == found.world


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (TORCHRUN | {"RANK": "x"}, "^RANK=x is no number"),
        (TORCHRUN | {"LOCAL_RANK": "-1"}, "^LOCAL_RANK=-1 is no number"),
        (TORCHRUN | {"RANK": "5", "WORLD_SIZE": "2"}, "contradict each other: rank 5 of 2"),
        (TORCHRUN | {"LOCAL_RANK": "2"}, "on its machine rank 2 of 2"),
        (TORCHRUN | {"WORLD_SIZE": "5"}, "contradict"),
        (TORCHRUN | {"WORLD_SIZE": "0", "RANK": "0"}, "contradict"),
        ({"RANK": "1"}, "^RANK=1 without WORLD_SIZE"),
        (STEP | {"SLURM_STEP_NUM_NODES": "3"}, "8 tasks on 3 nodes"),
        (STEP | {"SLURM_PROCID": "8"}, "rank 8 of 8"),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, "SLURM_STEP_ID is missing"),
        (STEP | {"SLURM_PTY_PORT": "4000"}, "SLURM_PTY_PORT is set"),
        ({"LOCAL_RANK": "one"}, "^LOCAL_RANK=one is no number"),
    ],
)
def test_bad_values_are_one_line(variables: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        ranks(variables)
    assert "\n" not in str(caught.value)


def test_processes_of_srun_meet_at_the_first_node_of_their_step() -> None:
    assert meeting_point(ranks(STEP), STEP | {"SLURM_STEP_NODELIST": "gpu[07-09,12],x"}) == ("gpu07", 15000 + 4711)
    own = {"MASTER_ADDR": "a", "MASTER_PORT": "2000"}
    assert meeting_point(ranks(STEP), STEP | own) == meeting_point(ranks(TORCHRUN), own) == ("a", 2000)
    assert [first_host(text) for text in ("n1", "n1,n2", "n[3]", "a[01-04]b,c", "")] == [
        "n1", "n1", "n3", "a01b", "127.0.0.1",
    ]  # fmt: skip
    with pytest.raises(UserError, match="MASTER_PORT is not"):
        meeting_point(ranks(TORCHRUN), {"MASTER_ADDR": "a"})
    with pytest.raises(UserError, match="MASTER_PORT=70000"):
        meeting_point(ranks(TORCHRUN), own | {"MASTER_PORT": "70000"})
