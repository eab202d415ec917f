"""Print a TrainJob of Kubeflow Trainer v2 that trains on all GPUs of one or several nodes.

    python launch/kubeflow/train.py --image IMAGE --claim PVC [--nodes 2] [--gpus 8] -- recipe.yaml --output runs/x |
        kubectl apply -f -

Words after `--` are those of `endex train`; its files lie on the volume of the claim, which becomes the working
folder. The runtime tells torchrun of its nodes by the environment. A pod that is moved gets SIGTERM, writes a
checkpoint, and continues from it where it starts again. Nothing is sent to a cluster here:
`kubectl apply --dry-run=server -f -` lets the cluster itself check what is printed.
"""

from __future__ import annotations

import re
import shlex
import sys
from typing import Any

import yaml

from launch.arguments import parse, verb_parser
from retriever import InputError

__all__ = ["run", "train_job"]

GRACE = 300  # seconds from SIGTERM to SIGKILL
NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")  # RFC 1123, as Kubernetes wants names


def train_job(
    words: list[str],
    *,
    name: str,
    image: str,
    claim: str,
    nodes: int = 1,
    gpus: int = 8,
    cpus: int = 32,
    memory: str = "256Gi",
    folder: str = "/workspace",
    runtime: str = "torch-distributed",
) -> dict[str, Any]:
    """Return the TrainJob, as kubectl takes it.

    Args:
        words: Those of `endex train`.
        name: Name of the job.
        image: Container image in which Endex is installed.
        claim: Persistent volume claim that all nodes mount, with recipe, data and output.
        nodes: Pods.
        gpus: GPUs, and so processes, a pod.
        cpus: CPU cores a pod.
        memory: Memory a pod, in Kubernetes' units.
        folder: Where the claim is mounted; relative paths begin there.
        runtime: Name of the ClusterTrainingRuntime.

    Raises:
        InputError: If Kubernetes would not take the name, a number is not positive, or there is nothing to train.
    """
    if not NAME.fullmatch(name):
        raise InputError(f"--name must be letters a to z, digits and '-', up to 63, got {name!r}.")
    for option, value in (("nodes", nodes), ("gpus", gpus), ("cpus", cpus)):
        if value < 1:
            raise InputError(f"--{option} must be at least 1, got {value}.")
    if not words:
        raise InputError("there is nothing to train. Put the words of endex train behind --.")
    amounts = {"nvidia.com/gpu": str(gpus), "cpu": str(cpus), "memory": memory}
    trainer = {
        "image": image,
        "numNodes": nodes,
        "numProcPerNode": gpus,
        "command": ["bash", "-c", f'cd {shlex.quote(folder)} && exec "$@"', "bash"],
        "args": ["torchrun", "--no-python", "endex", "train", *words, "--resume"],
        "env": [{"name": "PET_SHUTDOWN_TIMEOUT", "value": str(GRACE - 60)}],
        "resourcesPerNode": {"requests": amounts, "limits": amounts},
    }
    mounts = [{"name": "files", "mountPath": folder}, {"name": "shm", "mountPath": "/dev/shm"}]
    pod = {
        "terminationGracePeriodSeconds": GRACE,
        "containers": [{"name": "node", "volumeMounts": mounts}],
        "volumes": [
            {"name": "files", "persistentVolumeClaim": {"claimName": claim}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},  # NCCL's, of which a pod has 64 MB
        ],
    }
    patch = {"replicatedJobs": [{"name": "node", "template": {"spec": {"template": {"spec": pod}}}}]}
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {"name": name},
        "spec": {
            "runtimeRef": {"name": runtime},
            "trainer": trainer,
            "runtimePatches": [
                {"manager": "endex.dev/recipe", "trainingRuntimeSpec": {"template": {"spec": patch}}}
            ],
        },
    }


def run(words: list[str]) -> int:
    """Print the job as YAML."""
    end = words.index("--") if "--" in words else len(words)
    parser = verb_parser(
        "kubeflow", "Print a TrainJob of Kubeflow Trainer v2; words of endex train after --."
    )
    parser.prog = "launch/kubeflow/train.py"
    parser.add_argument("--image", type=str, required=True, help="Container image with Endex.")
    parser.add_argument(
        "--claim", type=str, required=True, help="Persistent volume claim of recipe and data."
    )
    parser.add_argument("--name", type=str, default="endex-train", help="Name of the job.")
    parser.add_argument("--nodes", type=int, default=1, help="Pods.")
    parser.add_argument("--gpus", type=int, default=8, help="GPUs a pod.")
    parser.add_argument("--cpus", type=int, default=32, help="CPU cores a pod.")
    parser.add_argument("--memory", type=str, default="256Gi", help="Memory a pod.")
    parser.add_argument("--folder", type=str, default="/workspace", help="Where the claim is mounted.")
    parser.add_argument("--runtime", type=str, default="torch-distributed", help="ClusterTrainingRuntime.")
    options = parse(parser, words[:end]).as_dict()
    chosen = {key: value for key, value in options.items() if key not in ("config", "json")}
    print(yaml.safe_dump(train_job(words[end + 1 :], **chosen), sort_keys=False), end="")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(run(sys.argv[1:]))
    except InputError as error:
        print(f"endex: {error}", file=sys.stderr)
        sys.exit(2)
