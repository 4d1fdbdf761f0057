"""The examples of ``deploy/``: every share is taken once, and the manifest is one."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

DEPLOY = Path(__file__).parents[1] / "deploy"


@pytest.fixture
def fake_command(tmp_path):
    """A ``flare-clef`` that prints its arguments."""
    command = tmp_path / "bin" / "flare-clef"
    command.parent.mkdir()
    command.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    command.chmod(0o755)
    return {"PATH": f"{command.parent}:{os.environ['PATH']}"}


def run(command, environment):
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout.splitlines()


def array_task(task, *, last, count):
    names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MAX", "SLURM_ARRAY_TASK_COUNT")
    return dict(zip(names, map(str, (task, last, count)), strict=True))


def test_slurm_tasks_take_each_share_once(fake_command):
    shares = set()
    for task in range(8):
        slurm = array_task(task, last=7, count=8)
        said = run(
            ["sh", str(DEPLOY / "slurm-array.sh"), "in put", "out"], {**fake_command, **slurm}
        )
        assert said[:4] == ["predict", "in put", "out", "--skip-existing"]
        shares.add(said[-1])
    assert shares == {f"{k}/8" for k in range(8)}
    # Two tasks of them once more.
    slurm = array_task(5, last=5, count=2)
    again = ["sh", str(DEPLOY / "slurm-array.sh"), "in put", "out", "8"]
    assert run(again, {**fake_command, **slurm})[-1] == "5/8"


@pytest.mark.parametrize(
    ("arguments", "slurm", "words"),
    [
        (["in"], array_task(0, last=7, count=8), "INPUTS or OUTPUTS is missing"),
        (["in", "out"], {}, "not a task of a Slurm array"),
        (["in", "out"], array_task(1, last=8, count=8), "tasks do not count from 0"),
        (["in", "out"], array_task(2, last=6, count=4), "tasks do not count from 0"),
    ],
    ids=["no OUTPUTS", "no sbatch", "1-8", "0-6:2"],
)
def test_a_wrong_use_of_slurm_is_one_line(fake_command, arguments, slurm, words):
    command = ["sh", str(DEPLOY / "slurm-array.sh"), *arguments]
    done = subprocess.run(command, env={**fake_command, **slurm}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and words in done.stderr
    assert "sbatch --array=0-7 deploy/slurm-array.sh INPUTS OUTPUTS" in done.stderr


def test_the_kubernetes_job_is_valid_by_the_schema_of_kubernetes():
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    schemas = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not there")
    text = (DEPLOY / "kubernetes-job.yaml").read_text()
    versions = schemas.utils.all_versions()
    for version in (versions[0], versions[-1]):
        schemas.validate(yaml.safe_load(text), version, strict=True)
    # A misspelt field and a wrong type are found, so the schema says something.
    for right, wrong in (
        ("completionMode:", "completionmode:"),
        ("completions: 8", 'completions: "8"'),
        ("mountPath: /tmp", "mountPaths: /tmp"),
    ):
        assert right in text
        with pytest.raises(schemas.ValidationError):
            schemas.validate(yaml.safe_load(text.replace(right, wrong)), versions[-1], strict=True)


def test_kubernetes_pods_take_each_share_once(fake_command):
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    job = yaml.safe_load((DEPLOY / "kubernetes-job.yaml").read_text())
    spec = job["spec"]
    # What the schema does not tell.
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] >= spec["parallelism"] >= 1
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] in ("Never", "OnFailure")
    (container,) = pod["containers"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    # A command would replace the entrypoint, which says why a pod was killed.
    assert "command" not in container
    shares = set()
    for index in range(spec["completions"]):
        said = run(
            container["args"],
            {**fake_command, "JOB_COMPLETION_INDEX": str(index)},
        )
        assert said[0] == "predict" and "--skip-existing" in said
        shares.add(said[-1])
    assert shares == {f"{k}/{spec['completions']}" for k in range(spec["completions"])}
