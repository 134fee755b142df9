"""Several processes on one machine: who starts what, sums across them, and every way to end."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from jax._src import clusters

from fedjax_llm.errors import UserError
from fedjax_llm.runs.processes import cluster, distributed, launch_places, launching
from fedjax_llm.runs.processes.launch_places import Place

SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}


@pytest.mark.parametrize(
    ("environment", "kind", "of_jax"),
    [
        (SLURM, "Slurm", clusters.SlurmCluster),
        (OPEN_MPI, "Open MPI", clusters.OmpiCluster),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, "TPU", clusters.GkeTpuCluster),
    ],
)
def test_what_jax_would_find_is_found(
    environment: dict[str, str],
    kind: str,
    of_jax: type[clusters.ClusterEnv],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert cluster.cluster(environment) == kind
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("jax._src.clusters.cloud_tpu_cluster.running_in_cloud_tpu_vm", True)
    assert of_jax.is_env_present()
    if kind != "TPU":
        assert (of_jax.get_process_count(), of_jax.get_process_id()) == (4, 3)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        SLURM | {"SLURM_NTASKS": "1"},
        # The batch script itself, of a job of four: srun has not started anything yet.
        {name: value for name, value in SLURM.items() if name != "SLURM_STEP_NODELIST"},
        OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"},
        {"TPU_WORKER_HOSTNAMES": "localhost"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
    ],
)
def test_one_process_is_one_process(environment: dict[str, str]) -> None:
    assert cluster.cluster(environment) is None
    assert distributed.join(environment) == distributed.World(0, 1)


def test_a_pod_whose_peers_cannot_be_found_is_no_run_of_one() -> None:
    pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}
    with pytest.raises(UserError, match=r"install jax\[k8s\], or set JAX_COORDINATOR_ADDRESS"):
        cluster.cluster(pod)


STATED = {cluster.ADDRESS: "host:1234", cluster.PROCESSES: "2", cluster.PROCESS: "1"}


def test_three_variables_say_it() -> None:
    assert cluster.stated(STATED) == cluster.Stated("host:1234", 2, 1)
    # JAX takes an address beside what Slurm tells.
    assert cluster.stated({cluster.ADDRESS: "host:1234"}) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({cluster.PROCESS: ""}, "JAX_PROCESS_ID is not set; set all three"),
        ({cluster.ADDRESS: ""}, "JAX_COORDINATOR_ADDRESS is not set; set all three"),
        ({cluster.ADDRESS: "host"}, "must be host:port, got 'host'"),
        ({cluster.PROCESSES: "0"}, "JAX_NUM_PROCESSES must be a whole number at least 1, got '0'"),
        ({cluster.PROCESS: "2"}, r"JAX_PROCESS_ID must be a whole number in \[0, 1\], got '2'"),
        ({cluster.PROCESS: "-1"}, "JAX_PROCESS_ID must be a whole number"),
    ],
)
def test_a_variable_that_cannot_be_is_told(change: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        cluster.stated(STATED | change)


@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 16))
def test_places_are_equal_and_apart(processes: int, cores: int, gpus: int) -> None:
    fits = processes <= cores and (gpus == 0 or (processes <= gpus and gpus % processes == 0))
    numbers = range(100, 100 + cores)
    if not fits:
        with pytest.raises(UserError, match=f"--processes {processes}"):
            launch_places.places(processes, numbers, range(gpus))
        return
    places = launch_places.places(processes, numbers, range(gpus))
    for kind, all_of_kind in (("cores", set(numbers)), ("gpus", set(range(gpus)))):
        own = [set(getattr(place, kind)) for place in places]
        assert len({len(each) for each in own}) == 1
        assert (
            sum(map(len, own))
            == len(set().union(*own))
            == len(all_of_kind) // processes * (processes)
        )
        assert set().union(*own) <= all_of_kind


def test_each_process_is_told_where_the_others_are() -> None:
    places = [Place((0,), (0, 1)), Place((1,), (2, 3))]
    found = [launch_places.environment({"HOME": "/h"}, 4321, places, k) for k in range(2)]
    assert [cluster.stated(each) for each in found] == [
        cluster.Stated("127.0.0.1:4321", 2, 0),
        cluster.Stated("127.0.0.1:4321", 2, 1),
    ]
    assert [each["JAX_LOCAL_DEVICE_IDS"] for each in found] == ["0,1", "2,3"]
    # Nobody from outside this machine can speak to the coordinator.
    assert {each["JAX_COORDINATOR_BIND_ADDRESS"] for each in found} == {"127.0.0.1:4321"}


@pytest.mark.parametrize(("local", "accelerators"), [(4, 4), (1, 1)])
def test_a_process_without_an_accelerator_is_refused(local: int, accelerators: int) -> None:
    cluster.check_local(local - 1, accelerators)
    cluster.check_local(local, 0)
    with pytest.raises(UserError, match=f"process {local} of this machine has no GPU"):
        cluster.check_local(local, accelerators)


CLUSTER = Path(__file__).parents[3] / "experiments" / "cluster"


def test_the_manifest_starts_as_many_as_it_says() -> None:
    jobset = yaml.safe_load((CLUSTER / "jobset.yaml").read_text())
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    variables = {each["name"]: each.get("value") for each in container["env"]}
    # The index of a pod comes from its annotation.
    assert variables[cluster.PROCESS] is None
    known = cluster.stated(variables | {cluster.PROCESS: "0"})
    assert known is not None
    assert known.processes == job["parallelism"] == job["completions"]
    assert (replicated["replicas"], job["backoffLimit"]) == (1, 0)
    name = jobset["metadata"]["name"]
    port = container["ports"][0]["containerPort"]
    assert known.address == f"{name}-{replicated['name']}-0-0.{name}:{port}"


def test_the_script_begins_or_goes_on(tmp_path: Path) -> None:
    program = tmp_path / "fedjax-llm"
    program.write_text('#!/bin/sh\necho "$@"\n')
    program.chmod(0o755)

    def called(*more: str) -> str:
        return subprocess.run(
            ["sh", CLUSTER / "run_or_resume.sh", "f.toml", tmp_path / "out", *more],
            env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    assert called("--set", "rounds=3") == f"run f.toml --out {tmp_path}/out --set rounds=3\n"
    (tmp_path / "out" / "checkpoints" / "0").mkdir(parents=True)
    assert called("--set", "rounds=3") == f"resume {tmp_path}/out\n"
    for path in CLUSTER.glob("*.sh"):
        subprocess.run(["bash", "-n", path], check=True)


def script(code: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code)]


def run(code: str, processes: int = 2, **options: float) -> tuple[launching.Ended, str]:
    """What became of processes that run some code, and what standard error was given."""
    said: list[str] = []
    ended = launching.launch(script(code), [Place()] * processes, echo=said.append, **options)
    return ended, "".join(said)


ME = "import os, sys, time; me = int(os.environ['JAX_PROCESS_ID'])\n"


def test_processes_that_join_sum_over_both(capfd: pytest.CaptureFixture[str]) -> None:
    ended, said = run(
        """
        import sys
        from fedjax_llm.runs.processes import distributed
        world = distributed.join(patience=60)
        import jax
        import jax.numpy as jnp
        from jax.sharding import AxisType, NamedSharding, PartitionSpec
        devices = jax.device_count()
        mesh = jax.make_mesh((devices,), ("clouds",), axis_types=(AxisType.Auto,))
        spread = NamedSharding(mesh, PartitionSpec("clouds"))
        mine = [jax.device_put(jnp.full((1,), 20 + world.process), own)
                for own in jax.local_devices()]
        all_of_them = jax.make_array_from_single_device_arrays((devices,), spread, mine)
        total = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))(all_of_them)
        print(int(total), file=sys.stdout if world.leads else sys.stderr)
        """
    )
    assert (ended, said) == (launching.Ended(0, 0), "[process 1] 82\n")
    # Two devices each, as in all tests; and nothing of Gloo's own words.
    assert capfd.readouterr() == ("82\n", "")


def test_a_death_is_told_at_once_and_takes_the_others_along(tmp_path: Path) -> None:
    started = time.monotonic()
    ended, said = run(
        ME
        + f"""
open({str(tmp_path)!r} + f"/{{me}}", "w").write(str(os.getpid()))
if me == 1:
    while len(os.listdir({str(tmp_path)!r})) < 3: time.sleep(0.01)
    print("my last words", file=sys.stderr, flush=True)
    os.kill(os.getpid(), 9)
time.sleep(60)
""",
        processes=3,
    )
    assert time.monotonic() - started < 10
    assert (ended.process, ended.code, ended.lines) == (1, -signal.SIGKILL, ("my last words",))
    assert said == "[process 1] my last words\n"
    assert launching.why(ended, 3).startswith("process 1 of 3 was ended by SIGKILL")
    for own in tmp_path.iterdir():
        # Neither alive nor a zombie.
        with pytest.raises(ProcessLookupError):
            os.kill(int(own.read_text()), 0)


def test_the_cause_is_named_and_not_its_victims() -> None:
    ended, said = run(
        ME
        + """
if me == 0:
    time.sleep(0.3)
    print("a stack of C++", file=sys.stderr, flush=True)
    os.abort()
time.sleep(0.4)
print("ValueError: the cause", file=sys.stderr)
sys.exit(1)
"""
    )
    assert (ended.process, ended.code) == (1, 1)
    assert said == "[process 1] ValueError: the cause\n"
    assert launching.why(ended, 2) == (
        "process 1 of 2 ended with code 1, its last words: 'ValueError: the cause'"
    )


def test_what_all_find_wrong_is_said_once() -> None:
    ended, said = run(
        ME + "print('fedjax-llm: the same mistake', file=sys.stderr); sys.exit(2)", processes=3
    )
    assert (ended.process, ended.code) == (0, 2)
    assert said == "fedjax-llm: the same mistake\n"


def test_one_that_does_not_end_is_killed() -> None:
    started = time.monotonic()
    ended, _ = run(
        ME
        + """
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if me == 0:
    time.sleep(60)
time.sleep(0.5)
sys.exit(1)
""",
        grace=0.5,
    )
    assert (ended.process, ended.code) == (1, 1)
    assert time.monotonic() - started < 10


def test_cores_are_bound(capfd: pytest.CaptureFixture[str]) -> None:
    core = max(os.sched_getaffinity(0))
    before = os.sched_getaffinity(0)
    command = script("import os; print(sorted(os.sched_getaffinity(0)))")
    launching.launch(command, [Place((core,))], echo=print)
    assert capfd.readouterr() == (f"[{core}]\n", "")
    assert os.sched_getaffinity(0) == before


LAUNCHER = """
import sys
from fedjax_llm.runs.processes import distributed, launching
from fedjax_llm.runs.processes.launch_places import Place
code = '''
import os, sys, time
from fedjax_llm.runs.processes import distributed
distributed.end_with_starter(int(os.environ[distributed.LIFELINE]))
print(os.getpid(), flush=True, file=sys.stderr)
time.sleep(60)
'''
launching.launch([sys.executable, "-c", code], [Place()] * 2, echo=sys.stdout.write)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_when_the_launcher_ends_all_do(number: int) -> None:
    with subprocess.Popen(
        [sys.executable, "-u", "-c", LAUNCHER],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as launcher:
        assert launcher.stdout is not None
        pids = [int(launcher.stdout.readline().split()[-1]) for _ in range(2)]
        launcher.send_signal(number)
        launcher.communicate(timeout=10)
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_one_that_waits_in_vain_says_so() -> None:
    done = subprocess.run(
        script("from fedjax_llm.runs.processes import distributed; distributed.join(patience=1.0)"),
        env=os.environ | STATED | {cluster.ADDRESS: "127.0.0.1:9"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "fedjax-llm: process 1 of 2 has waited 1 s for the others at 127.0.0.1:9; see that all "
        "were started with the same address and number, and that the port is open between them\n"
    )
