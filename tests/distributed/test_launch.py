"""Claims about the files that start runs over several processes; nothing is started elsewhere."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

LAUNCH = Path(__file__).parents[2] / "experiments/launch"


def stand_in(folder: Path, name: str, code: int = 0) -> None:
    """A program that writes down how it was called."""
    path = folder / name
    path.write_text(
        f'#!/bin/bash\nfor word in {name} "$@"; do printf "%s\\n" "$word"; done >> "$CALLS"\n'
        f'printf -- "--\\n" >> "$CALLS"\nexit {code}\n'
    )
    path.chmod(0o755)


def calls(folder: Path, script: Path, *words: str, **environment: str):
    """The exit code of a script, its errors, and the calls of its stand-ins, each a list."""
    written = folder / "calls"
    done = subprocess.run(
        ["bash", str(script), *words],
        cwd=folder,
        env={
            **os.environ,
            "PATH": f"{folder}:{os.environ['PATH']}",
            "CALLS": str(written),
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    texts = written.read_text().split("--\n") if written.exists() else []
    # A word "--" of its own would end a call early; none of the scripts has one.
    return done.returncode, done.stderr, [text.splitlines() for text in texts if text]


@pytest.mark.parametrize("name", ["slurm.sbatch", "tpu_vm.sh"])
def test_the_shell_can_read_it(name):
    done = subprocess.run(
        ["bash", "-n", str(LAUNCH / name)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("code", "again"), [(0, False), (2, False), (143, True)])
def test_a_job_that_was_stopped_goes_back_into_the_queue(tmp_path, code, again):
    stand_in(tmp_path, "srun", code)
    stand_in(tmp_path, "scontrol")
    found, _, (first, *others) = calls(
        tmp_path, LAUNCH / "slurm.sbatch", "--run", "runs/a b", SLURM_JOB_ID="7"
    )
    assert found == code
    assert first == [
        *("srun", "--kill-on-bad-exit=1", "flaxtransfer", "train"),
        *("--run", "runs/a b", "--resume"),
    ]
    assert others == ([["scontrol", "requeue", "7"]] if again else [])


def test_every_machine_of_a_tpu_installs_and_trains(tmp_path):
    stand_in(tmp_path, "gcloud")
    words = ("mine", "us-x", "--data", "folder:a b")
    code, said, made = calls(tmp_path, LAUNCH / "tpu_vm.sh", *words)
    assert (code, made) == (2, [])
    assert said.startswith("there must be a wheel in dist/")
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist/flaxtransfer-1-py3-none-any.whl").touch()
    code, _, made = calls(tmp_path, LAUNCH / "tpu_vm.sh", *words)
    assert code == 0
    assert [call[4] for call in made] == ["scp", "ssh", "ssh"]
    assert all("--worker=all" in call for call in made)
    assert made[0][5:7] == ["dist/flaxtransfer-1-py3-none-any.whl", "mine:"]
    trained = made[2][-1]
    assert trained == r"~/flaxtransfer/bin/flaxtransfer train --data folder:a\ b --resume"
    assert calls(tmp_path, LAUNCH / "tpu_vm.sh", "mine")[0] == 2


def test_the_jobset_has_a_process_for_each_machine_and_goes_on_after_a_restart():
    found = yaml.safe_load((LAUNCH / "gke-jobset.yaml").read_text())
    assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert found["spec"]["failurePolicy"]["maxRestarts"] > 0
    (job,) = found["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    across, down = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert spec["parallelism"] == spec["completions"] == across * down // chips == 4
    assert spec["backoffLimit"] == 0
    assert pod["terminationGracePeriodSeconds"] >= 60
    assert container["command"][:2] == ["flaxtransfer", "train"]
    assert "--resume" in container["command"]
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}


def strict(**properties):
    """An object with these fields and no other."""
    return {"type": "object", "properties": properties, "additionalProperties": False}


TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
COUNT = {"type": "integer", "minimum": 0}
JOBSET = strict(
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=strict(name={"type": "string"}, labels=TEXTS, annotations=TEXTS),
    spec=strict(
        failurePolicy=strict(
            maxRestarts=COUNT,
            restartStrategy={"enum": ["Recreate", "BlockingRecreate"]},
            rules={"type": "array"},
        ),
        successPolicy=strict(
            operator={"enum": ["All", "Any"]}, targetReplicatedJobs={"type": "array"}
        ),
        startupPolicy=strict(startupPolicyOrder={"enum": ["AnyOrder", "InOrder"]}),
        network=strict(
            enableDNSHostnames={"type": "boolean"},
            subdomain={"type": "string"},
            publishNotReadyAddresses={"type": "boolean"},
        ),
        suspend={"type": "boolean"},
        ttlSecondsAfterFinished=COUNT,
        managedBy={"type": "string"},
        replicatedJobs={
            "type": "array",
            "minItems": 1,
            "items": strict(
                name={"type": "string"},
                groupName={"type": "string"},
                replicas=COUNT,
                dependsOn={"type": "array"},
                template=strict(metadata={"type": "object"}, spec={"type": "object"}),
            ),
        },
    ),
)
"""The fields of a JobSet of v1alpha2. What is in the template of a job, Kubernetes defines."""


def test_the_jobset_has_no_field_that_jobsets_do_not_have():
    found = yaml.safe_load((LAUNCH / "gke-jobset.yaml").read_text())
    jsonschema.validate(found, JOBSET)
    for place, name in (((), "specs"), (("spec",), "replicatedJob"), (("metadata",), "label")):
        misspelt = copy.deepcopy(found)
        inner = misspelt
        for key in place:
            inner = inner[key]
        inner[name] = {}
        with pytest.raises(jsonschema.ValidationError, match=name):
            jsonschema.validate(misspelt, JOBSET)


@pytest.mark.slow
def test_the_job_of_the_jobset_is_one_of_kubernetes():
    """By the schemas that Kubernetes publishes, without fields that they do not have."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    found = yaml.safe_load((LAUNCH / "gke-jobset.yaml").read_text())
    (replicated,) = found["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "slice"}}
    job |= replicated["template"]
    kubernetes_validate.validate(job, "1.34", strict=True)
    job["spec"]["template"]["spec"]["nodeSelectors"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="nodeSelectors"):
        kubernetes_validate.validate(job, "1.34", strict=True)


def test_processes_of_this_machine_are_numbered_and_their_errors_told(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys\n"
        "print(os.environ['FT_PROCESS'], 'of', os.environ['FT_PROCESSES'], sys.argv[1:])\n"
        "sys.exit(3 * int(os.environ['FT_PROCESS']))\n"
    )
    done = subprocess.run(
        [
            *(sys.executable, str(LAUNCH / "local.py"), "2", "--devices", "4", "--"),
            *(sys.executable, str(program), "--run", "x"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3
    assert sorted(done.stdout.splitlines()) == [
        "[0] 0 of 2 ['--run', 'x']",
        "[1] 1 of 2 ['--run', 'x']",
    ]
    assert done.stderr == "process 1 of 2 has ended with code 3\n"


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="a policy of Linux")
@pytest.mark.parametrize("devices", [(), ("--devices", "1")])
def test_threads_do_not_interrupt_each_other_on_the_cpu(devices):
    # The policy comes right after the start.
    ask = "import os, time; time.sleep(0.5); print(os.sched_getscheduler(0) == os.SCHED_BATCH)"
    command = [sys.executable, str(LAUNCH / "local.py"), "2", *devices, "--"]
    done = subprocess.run(
        [*command, sys.executable, "-c", ask], capture_output=True, text=True, check=True
    )
    assert sorted(done.stdout.splitlines()) == [f"[{n}] {bool(devices)}" for n in range(2)]
