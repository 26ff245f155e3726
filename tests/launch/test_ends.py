"""What the end of an attempt means: srun's words, and how many failures in a row are too many."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.job import End, JobFolder, Outcome, Start, Submission, failures_in_a_row
from launch.rank import place_of
from launch.ranks import read_srun


def test_of_ranks_that_end_together_the_one_that_caused_it_is_suspected() -> None:
    result = read_srun(
        137,
        [
            "srun: error: n2: task 1: Killed\n",
            "srun: Terminating StepId=7.0\n",
            "slurmstepd-n1: error: *** STEP 7.0 ON n1 CANCELLED AT 2026-11-25T03:00:00 ***\n",
            "srun: error: n1: tasks 0,2: Exited with exit code 1\n",
            "srun: error: n3: task 3: Terminated\n",
        ],
    )
    assert result.code == 137
    assert result.reason == "rank 1 on n2: Killed"
    assert result.suspects == {"n2"}
    assert result.lost == set()


def test_a_users_mistake_on_any_rank_is_one() -> None:
    said = ["srun: error: n1: task 0: Exited with exit code 2\n", "srun: error: n2: task 1: Exited with exit code 1\n"]
    assert read_srun(1, said).code == 2
    assert read_srun(1, said[1:]).code == 1


@pytest.mark.parametrize(
    "words",
    [
        "srun: error: Task launch for StepId=9.1 failed on node n3: Communication connection failure\n",
        "srun: error: Node failure on n3\n",
    ],
)
def test_a_node_that_srun_cannot_reach_is_lost(words: str) -> None:
    assert read_srun(1, [words]).lost == {"n3"}


def test_ranks_that_were_asked_to_save_before_they_could_listen_have_not_failed() -> None:
    said = ["srun: error: n1: task 0: User defined signal 2\n", "srun: error: n2: task 1: User defined signal 2\n"]
    assert read_srun(140, said).code == 0
    assert read_srun(140, [said[0], "srun: error: n2: task 1: Killed\n"]).code == 140


def test_an_end_without_words_is_told_by_the_last_line() -> None:
    assert read_srun(1, ["srun: error: Unable to create step\n"]).reason == "srun: error: Unable to create step"
    assert read_srun(0, ["srun: hello\n"]).reason == ""


def attempt(step: int, outcome: Outcome | None, reached: int | None = None) -> list[Start | End]:
    start = Start(attempt=1, time=0.0, step=step, nodes=("n1",))
    if outcome is None:
        return [start]
    return [start, End(attempt=1, time=1.0, step=step if reached is None else reached, outcome=outcome)]


@pytest.mark.parametrize(
    ("attempts", "now", "failures"),
    [
        ([], 0, 0),
        (attempt(0, "failed"), 0, 1),
        (attempt(0, "failed") + attempt(0, None) + attempt(0, "failed"), 0, 3),
        (attempt(0, "failed") + attempt(0, "failed", 8), 8, 0),
        (attempt(0, "failed") + attempt(0, None), 8, 0),
        (attempt(0, "failed") + attempt(0, "failed", 8) + attempt(8, "failed"), 8, 1),
        (attempt(4, "failed") + attempt(4, "saved"), 4, 0),
        (attempt(4, "failed") + attempt(4, "ended") + attempt(4, "failed"), 4, 1),
        (attempt(4, "failed") + attempt(4, "gave up"), 4, 0),
    ],
)
def test_failures_in_a_row_by_hand(attempts: list[Start | End], now: int, failures: int) -> None:
    assert failures_in_a_row(attempts, now) == failures


def test_whoever_reads_a_job_folder_while_it_is_written_reads_whole_files(tmp_path: Path) -> None:
    """A file that is open already stays as it was; the next who opens it sees the new one."""
    job = JobFolder(tmp_path)
    first, second = (Submission(kind="slurm", id=number, log=tmp_path / "log") for number in ("7", "8"))
    job.submitted(first)
    job.record(Start(attempt=1, time=0.0, step=0, nodes=("n1",)))
    with job.submission_file.open() as submission, job.attempts_file.open() as attempts:
        job.submitted(second)
        job.record(Start(attempt=2, time=1.0, step=0, nodes=("n1",)))
        assert Submission.model_validate_json(submission.read()) == first
        assert len(attempts.readlines()) == 1
    assert job.submission() == second
    assert [event.attempt for event in job.attempts()] == [1, 2]


def test_ranks_find_their_place_in_slurms_environment() -> None:
    slurm = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8"}
    assert place_of(slurm) == {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}
    given = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    assert place_of(slurm | given) == given
