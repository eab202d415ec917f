"""The recipes for clusters write byte for byte the index of one `endex export`."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from index import FaissFit, IndexConfig, Searcher, export_index, merge_indexes
from launch.kubeflow.train import run as train_on_kubeflow
from launch.ray.serve import best_of, run
from launch.ray.train import run as train_on_ray
from retriever import Document, DualEncoder, DualEncoderConfig, InputError, embed_documents, read_corpus
from retriever.heads import ProductQuantizerConfig
from training import Experiment, dump_experiment
from training.experiment import DataConfig, OptimizationConfig
from training.losses import MCLConfig

ROOT = Path(__file__).parents[2]
SLURM = sorted((ROOT / "launch/slurm").glob("*.sbatch"))
NAMES = ("index", "codes.u8", "docid", "documents.jsonl", "documents.offsets")
BLOCK = 16  # of the 80 documents of `tiny_data`
ENDEX = f"""#!{sys.executable}
import sys
import index.encode
index.encode.BLOCK = {BLOCK}
from launch.main import main
sys.exit(main())
"""


@pytest.fixture(scope="module")
def model(tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    torch.manual_seed(0)
    head = ProductQuantizerConfig(num_codebooks=4, codebook_bits=4)
    built = DualEncoderConfig(encoder=str(tiny_model), document_max_length=32).build(head).eval()
    built.head.warm_start(embed_documents(built, list(read_corpus(tiny_data))), FaissFit(), 0)
    built.save(folder, files={"experiment.yaml": "seed: 1"})
    return folder


def export(model: Path, documents: list[Document], out: Path) -> dict[str, bytes]:
    export_index(model, documents, out, config=IndexConfig(), device="cpu", progress=False)
    return content(out)


def content(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in NAMES}


def environment(**variables: str) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        **variables,
    }


def call(words: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, cwd=folder, env=environment(**variables), capture_output=True, text=True, timeout=300
    )


# --- SLURM ---


@pytest.fixture
def cluster(model: Path, tiny_data: Path, tmp_path: Path) -> dict[str, str]:
    """Variables of a task, and an `endex` of small blocks first on the path."""
    shim = tmp_path / "bin" / "endex"
    shim.parent.mkdir()
    shim.write_text(ENDEX, encoding="utf-8")
    shim.chmod(0o755)
    return {
        "PATH": f"{shim.parent}:{os.environ['PATH']}",
        "MODEL": str(model),
        "CORPUS": str(tiny_data),
        "OUT": str(tmp_path / "index"),
        "OPTIONS": "",
    }


def task(name: str, folder: Path, variables: dict[str, str], **more: str) -> subprocess.CompletedProcess[str]:
    return call(["bash", str(ROOT / "launch/slurm" / name)], folder, **variables, **more)


@pytest.mark.parametrize("script", SLURM, ids=lambda path: path.name)
def test_a_job_script_is_bash(script: Path) -> None:
    assert subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=True).stderr == ""


def test_there_are_job_scripts() -> None:
    assert [script.name for script in SLURM] == [
        "export.sbatch",
        "export_parts.sbatch",
        "merge.sbatch",
        "train.sbatch",
    ]


def test_array_tasks_and_merge_give_one_export(
    model: Path, tiny_data: Path, tmp_path: Path, cluster: dict[str, str]
) -> None:
    for number in ("0", "1"):
        done = task(
            "export.sbatch", tmp_path, cluster, SLURM_ARRAY_TASK_ID=number, SLURM_ARRAY_TASK_COUNT="2"
        )
        assert done.returncode == 0, done.stderr
    again = task("export.sbatch", tmp_path, cluster, SLURM_ARRAY_TASK_ID="1", SHARDS="2")
    assert "shard 2/2 is finished" in again.stdout
    merged = task("merge.sbatch", tmp_path, cluster, SHARDS="2")
    assert merged.returncode == 0, merged.stderr
    assert json.loads(merged.stdout)["ntotal"] == 80
    assert content(tmp_path / "index") == export(model, list(read_corpus(tiny_data)), tmp_path / "whole")
    assert "the index is finished" in task("merge.sbatch", tmp_path, cluster, SHARDS="2").stdout


def test_a_task_without_a_shard_fails(tmp_path: Path, cluster: dict[str, str]) -> None:
    done = task("export.sbatch", tmp_path, cluster, SLURM_ARRAY_TASK_ID="5", SLURM_ARRAY_TASK_COUNT="1")
    assert (done.returncode, "array task 5 has no shard of 1" in done.stderr) == (2, True)


def test_merging_before_all_shards_are_there_fails(tmp_path: Path, cluster: dict[str, str]) -> None:
    first = task("export.sbatch", tmp_path, cluster, SLURM_ARRAY_TASK_ID="0", SHARDS="2")
    assert first.returncode == 0, first.stderr
    done = task("merge.sbatch", tmp_path, cluster, SHARDS="2")
    assert done.returncode == 2
    assert "2-of-2 is not a folder" in done.stderr
    assert not (tmp_path / "index").exists()


def test_array_task_makes_an_index_of_one_file(
    model: Path, tiny_data: Path, tmp_path: Path, cluster: dict[str, str]
) -> None:
    lines = (tiny_data / "corpus.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "files").mkdir()
    for name, part in (("a", lines[:48]), ("b", lines[48:])):
        (tmp_path / "files" / f"{name}.jsonl").write_text("".join(part), encoding="utf-8")
    cluster["CORPUS"] = str(tmp_path / "files")
    done = task("export_parts.sbatch", tmp_path, cluster, SLURM_ARRAY_TASK_ID="1")
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "index" / "b") == export(
        model, list(read_corpus(tiny_data))[48:], tmp_path / "whole"
    )
    again = task("export_parts.sbatch", tmp_path, cluster, SLURM_ARRAY_TASK_ID="1")
    assert "the part is finished" in again.stdout
    beyond = task("export_parts.sbatch", tmp_path, cluster, SLURM_ARRAY_TASK_ID="2")
    assert (beyond.returncode, "holds 2. Use --array=0-1" in beyond.stderr) == (2, True)


@pytest.mark.parametrize(("restarts", "resume"), [("", ""), ("0", ""), ("1", " --resume")])
def test_training_starts_on_every_node_and_resumes_when_requeued(
    tmp_path: Path, restarts: str, resume: str
) -> None:
    for name, body in {
        "scontrol": 'echo "node1\nnode2"',
        "srun": 'echo "$@"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    variables = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "7"}
    variables |= {"SLURM_GPUS_ON_NODE": "8", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    variables |= {"SLURM_RESTART_COUNT": restarts} if restarts else {}
    done = call(
        ["bash", str(ROOT / "launch/slurm/train.sbatch"), "a.yaml", "--output", "x y"], tmp_path, **variables
    )
    assert done.stdout.split("\n")[0] == (
        "torchrun --nnodes 2 --nproc_per_node 8 --rdzv_id 7 --rdzv_backend c10d --rdzv_endpoint node1:29500 "
        f"--no-python endex train a.yaml --output x y{resume}"
    )


# --- Ray ---


@pytest.fixture(scope="module")
def large_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of two blocks of 4,096: workers of Ray are processes of their own."""
    path = tmp_path_factory.mktemp("large") / "corpus.jsonl"
    rows = ({"_id": f"d{row}", "text": f"w{row % 120} w{row % 119} w{row % 113}"} for row in range(4100))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def ray(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("ray")
    script = [sys.executable, str(ROOT / "launch/ray/export.py")]
    return call([*script, *words, "--num_gpus", "0"], folder, RAY_USAGE_STATS_ENABLED="0")


def test_ray_tasks_and_merge_give_one_export(model: Path, large_corpus: Path, tmp_path: Path) -> None:
    words = [str(model), str(large_corpus), "--out", "index", "--shards", "2", "--json"]
    done = ray(words, tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["ntotal"] == 4100
    assert content(tmp_path / "index") == export(model, list(read_corpus(large_corpus)), tmp_path / "whole")
    assert not (tmp_path / "index.shards").exists()


def test_ray_reports_a_mistake_in_one_line(model: Path, large_corpus: Path, tmp_path: Path) -> None:
    many = ray([str(model), str(large_corpus), "--out", "index", "--shards", "3"], tmp_path)
    assert (many.returncode, many.stderr.count("\n")) == (2, 1)
    assert "too few for 3 shards" in many.stderr
    missing = ray([str(tmp_path), str(large_corpus), "--out", "index", "--shards", "1"], tmp_path)
    assert missing.returncode == 2
    assert "has no manifest.json" in missing.stderr.splitlines()[-1]


@pytest.fixture
def parts(model: Path, tiny_data: Path, tmp_path: Path) -> list[Path]:
    documents = list(read_corpus(tiny_data))
    export(model, documents[:48], tmp_path / "part1")
    export(model, documents[48:], tmp_path / "part2")
    return [tmp_path / "part1", tmp_path / "part2"]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def ask(port: int, body: bytes) -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("POST", "/", body)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def test_served_parts_answer_as_one_index(parts: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("ray.serve")
    merge_indexes(parts, tmp_path / "whole")
    scores, ids = Searcher(tmp_path / "whole").search(["w1 w2 w3"], 7)
    port = free_port()
    script = [sys.executable, str(ROOT / "launch/ray/serve.py"), *map(str, parts)]
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(
            [*script, "--port", str(port), "--num_cpus", "0.1"],
            env=environment(RAY_USAGE_STATS_ENABLED="0"),
            stdout=log,
            stderr=log,
        ) as server,
    ):
        try:
            status, answer = wait_for(port, b'{"query": "w1 w2 w3", "k": 7}', server)
            wrong = [
                ask(port, body)[0]
                for body in (b"x", b"[]", b'{"query": "", "k": 7}', b'{"query": "a", "k": 0}')
            ]
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(60)
    assert status == 200
    assert [hit["score"] for hit in answer["hits"]] == pytest.approx(scores[0].tolist(), abs=1e-6)
    assert [hit["id"] for hit in answer["hits"]] == ids[0]
    assert all(hit["text"] for hit in answer["hits"])
    assert wrong == [400] * 4


def wait_for(port: int, body: bytes, server: subprocess.Popen[bytes]) -> tuple[int, dict[str, Any]]:
    """Return the first answer that is not of a server that still starts."""
    for _ in range(240):
        assert server.poll() is None, "the server stopped"
        try:
            found = ask(port, body)
        except (OSError, http.client.HTTPException, json.JSONDecodeError):
            time.sleep(0.5)
        else:
            return found
    raise TimeoutError


def test_parts_of_different_models_are_not_served(
    parts: list[Path],
) -> None:
    manifest = parts[1] / "manifest.json"
    stored = json.loads(manifest.read_text(encoding="utf-8")) | {"model": "another"}
    manifest.write_text(json.dumps(stored), encoding="utf-8")
    with pytest.raises(InputError, match=r"part2 was made with another model than .*part1"):
        run([str(part) for part in parts])


# --- training on Ray, Kubeflow and SkyPilot ---


WORDS = ["recipe.yaml", "--output", "a folder/model"]


def test_ray_trains_as_one_process_a_worker(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray.train")
    recipe = tmp_path / "recipe.yaml"
    experiment = Experiment(
        output=str(tmp_path / "run"),
        model=DualEncoderConfig(encoder=str(tiny_model), query_max_length=16, document_max_length=32),
        head=ProductQuantizerConfig(num_codebooks=4, codebook_bits=4),
        loss=MCLConfig(),
        data=DataConfig(source=str(tiny_data)),
        optimization=OptimizationConfig(steps=2, batch_size=8, warm_start_documents=64),
    )
    recipe.write_text(dump_experiment(experiment), encoding="utf-8")
    words = ["--workers", "2", "--cpu", "--cpus_per_worker", "0.5", "--storage", str(tmp_path / "ray")]
    script = [sys.executable, str(ROOT / "launch/ray/train.py"), *words, "--", str(recipe)]
    done = call(script, tmp_path, RAY_USAGE_STATS_ENABLED="0")
    assert done.returncode == 0, done.stderr
    assert len(DualEncoder.load(tmp_path / "run" / "last").head.codebooks) == 4
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    assert json.loads((checkpoint / "trainer.json").read_text())["processes"] == 2


def test_ray_says_what_is_missing() -> None:
    with pytest.raises(InputError, match="there is nothing to train"):
        train_on_ray(["--workers", "2"])


@pytest.fixture
def kubeflow(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Return what the recipe prints for its words."""

    def printed(*words: str) -> dict[str, Any]:
        assert train_on_kubeflow(["--image", "image:1", "--claim", "disk", *words]) == 0
        return dict(yaml.safe_load(capsys.readouterr().out))

    return printed


def test_kubeflows_schema_takes_the_job(kubeflow: Callable[..., dict[str, Any]]) -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models")
    stored = kubeflow("--nodes", "4", "--gpus", "2", "--", *WORDS)
    job = models.TrainerV1alpha1TrainJob.from_dict(stored)
    assert (job.spec.trainer.num_nodes, job.spec.trainer.num_proc_per_node) == (4, 2)
    assert job.to_dict() == stored, "no field is unknown to the schema"


def test_a_kubeflow_pod_starts_torchrun_in_its_folder(
    kubeflow: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """The container's command, run here with a torchrun that prints its words."""
    trainer = kubeflow("--folder", str(tmp_path), "--", *WORDS)["spec"]["trainer"]
    shim = tmp_path / "torchrun"
    shim.write_text('#!/bin/bash\npwd\nprintf "%s\\n" "$@"\n', encoding="utf-8")
    shim.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    found = call([*trainer["command"], *trainer["args"]], ROOT, PATH=path).stdout.splitlines()
    assert found == [str(tmp_path), "--no-python", "endex", "train", *WORDS, "--resume"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--name", "My Run", "--", "recipe.yaml"], "--name must be letters a to z"),
        (["--gpus", "0", "--", "recipe.yaml"], "--gpus must be at least 1, got 0"),
        ([], "there is nothing to train"),
    ],
)
def test_a_kubeflow_job_that_cannot_run_is_refused(
    kubeflow: Callable[..., dict[str, Any]], words: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        kubeflow(*words)


SKY = ROOT / "launch/skypilot/train.yaml"


def test_skypilot_reads_the_task(monkeypatch: pytest.MonkeyPatch) -> None:
    sky = pytest.importorskip("sky")
    monkeypatch.chdir(ROOT)
    task = sky.Task.from_yaml_config(yaml.safe_load(SKY.read_text()), env_overrides={"WORDS": "a.yaml"})
    assert task.envs["WORDS"] == "a.yaml"
    assert {resource.accelerators["H100"] for resource in task.resources} == {8}


def test_every_skypilot_node_starts_torchrun(tmp_path: Path) -> None:
    shim = tmp_path / "torchrun"
    shim.write_text('#!/bin/bash\necho "$@"\n', encoding="utf-8")
    shim.chmod(0o755)
    script = yaml.safe_load(SKY.read_text())["run"]
    variables = {
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
    }
    variables |= {"SKYPILOT_NUM_GPUS_PER_NODE": "8", "PORT": "7", "WORDS": "a.yaml --seed 1"}
    done = call(["bash", "-c", script], tmp_path, **variables, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.stdout == (
        "--nnodes 2 --nproc_per_node 8 --node_rank 1 --master_addr 10.0.0.1 --master_port 7 "
        "--no-python endex train a.yaml --seed 1 --resume\n"
    ), done.stderr


@pytest.mark.parametrize("name", ["setup", "run"])
def test_a_skypilot_script_is_bash(name: str) -> None:
    script = yaml.safe_load(SKY.read_text())[name]
    assert call(["bash", "-n", "-c", script], ROOT).returncode == 0


def test_best_of_parts_is_stable() -> None:
    answers = [[{"id": "a", "score": 2.0}, {"id": "b", "score": 1.0}], [{"id": "c", "score": 2.0}], []]
    assert [hit["id"] for hit in best_of(answers, 2)] == ["a", "c"]
