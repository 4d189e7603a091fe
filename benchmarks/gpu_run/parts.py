"""The parts of a visit to a GPU machine, in the order of their importance, each with its commands and time limit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Commands = list[list[str]]  # words behind the Python that runs everything


@dataclass(frozen=True)
class Visit:
    """What the parts' commands depend on.

    Attributes:
        output: folder of the results.
        rehearsal: tiny sizes on the CPU, to try every path but CUDA's own.
        seconds: what a part may take.
        resume: whether an earlier visit's results are continued.
        photos: tar file or folder of photos, or None: they are drawn.
        cifar: folder of CIFAR-10's class folders, or None.
        tests: pytest's -k expression for the device tests, or an empty string.
    """

    output: Path
    rehearsal: bool
    seconds: float
    resume: bool = False
    photos: Path | None = None
    cifar: Path | None = None
    tests: str = ""

    @property
    def device(self) -> str:
        """The device that commands are told."""
        return "cpu" if self.rehearsal else "cuda"


@dataclass(frozen=True)
class Part:
    """A step of the visit.

    Attributes:
        name: what ``--only`` takes.
        seconds: most that it may take.
        commands: of a visit; they run one after another, also when one fails.
        question: what it is there to answer.
        together: whether they run side by side instead.
        idle: exit code of a command that found nothing to do, which is a failure only where all end with it.
    """

    name: str
    seconds: float
    commands: Callable[[Visit], Commands]
    question: str
    together: bool = False
    idle: int | None = None


def _script(visit: Visit, name: str, *words: str) -> list[str]:
    return [f"benchmarks/{name}.py", *words, "--output", str(visit.output)]


def _doctor(visit: Visit) -> Commands:
    return [["-m", "adaptive", "doctor", "--json"]]


NO_TESTS_COLLECTED = 5  # pytest's exit code, here where --tests selects none of a group
# What takes about as long: processes that share the GPU.
TEST_GROUPS = (
    ["tests/networks"],
    ["tests/training/engine"],
    ["tests/training", "--ignore=tests/training/engine"],
    ["tests/data", "tests/inference"],
)


def _tests(visit: Visit) -> Commands:
    chosen = ["-k", visit.tests] if visit.tests else []
    words = ["-m", "pytest", "-m", "device", "--device", visit.device, "-q", "-p", "no:cacheprovider", *chosen]
    return [
        [*words, f"--junitxml={visit.output / f'device_tests_{number}.xml'}", *places]
        for number, places in enumerate(TEST_GROUPS, start=1)
    ]


def _steps(visit: Visit) -> Commands:
    words = ["--minutes", f"{visit.seconds / 60:.2f}"]
    words += ["--resume", "--retry"] if visit.resume else []
    words += ["--rehearse", "--rounds", "2", "--seconds", "0.1"] if visit.rehearsal else []
    return [_script(visit, "gpu_steps", *words)]


def _equilibrium(visit: Visit) -> Commands:
    if visit.rehearsal:
        tiny = ["--backbone", "test_resnet", "--image-size", "32", "--batch", "2", "--classes", "10", "--device", "cpu"]
        return [_script(visit, "equilibrium", *tiny, "--rounds", "2", "--repetitions", "2", "--exits", "2")]
    msdnet = [
        "--backbone",
        "msdnet_cifar_anytime",
        "--exits",
        "0",
        "--image-size",
        "32",
        "--batch",
        "64",
        "--classes",
        "10",
    ]
    resnet = ["--backbone", "resnet50", "--batch", "256", "--channels-last"]
    modes = (["--precision", "bf16", "--compile"], ["--precision", "bf16"])
    return [_script(visit, "equilibrium", *network, *mode) for mode in modes for network in (msdnet, resnet)]


def _inference(visit: Visit) -> Commands:
    if visit.rehearsal:
        words = ["--backbone", "test_resnet", "--rounds", "2", "--batches", "1", "3", "--device", "cpu"]
        return [_script(visit, "inference_batches", *words, "--accelerate", "eager", "compile")]
    ways = ["--accelerate", "eager", "cuda_graphs", "compile", "--rounds", "10"]
    large = ["--backbone", "resnet50", "--image-size", "224", "--classes", "1000", "--precision", "bf16"]
    return [
        _script(visit, "inference_batches", *ways),
        _script(visit, "inference_batches", *large, *ways, "--batches", "1", "16", "64", "256"),
    ]


def _data(visit: Visit) -> Commands:
    source = ["--source", str(visit.photos)] if visit.photos else []
    cifar = ["--source", str(visit.cifar)] if visit.cifar else []
    words = ["--device", visit.device, *source, "--needs", str(visit.output / "gpu_steps.json")]
    if visit.rehearsal:
        words += ["--images", "24", "--batch", "4", "--workers", "0", "2", "--seconds", "0.1"]
        small = ["--device", "cpu", "--rounds", "2", "--seconds", "0.2", "--images", "600"]
        return [_script(visit, "data_to_device", *words), _script(visit, "data_in_memory", *small)]
    return [
        _script(visit, "data_to_device", *words),
        _script(visit, "data_in_memory", "--device", "cuda", "--workers", "4", *cifar),
    ]


def _startup(visit: Visit) -> Commands:
    rounds = ["--rounds", "2", "--backbone", "test_resnet"] if visit.rehearsal else ["--rounds", "3"]
    return [_script(visit, "startup", "--device", visit.device, *rounds)]


def _memory(visit: Visit) -> Commands:
    if visit.rehearsal:
        return [
            _script(
                visit,
                "plan_memory",
                "--backbones",
                "test_resnet",
                "--stages",
                "0",
                "--image-size",
                "32",
                "--device",
                "cpu",
            )
        ]
    return [_script(visit, "plan_memory")]


def _training(visit: Visit) -> Commands:
    run, data = visit.output / "run", visit.output / "digits"
    train = ["-m", "adaptive", "train", "configs/quickstart.yaml", f"data.path={data}", f"train.run_folder={run}"]
    train += [f"train.device={visit.device}", "tracking.wandb=disabled"]
    train += ["train.max_steps=3"] if visit.rehearsal else ["train.precision=bf16", "train.channels_last=true"]
    return [
        ["-m", "adaptive", "pack", "builtin:digits", str(data)],
        train,
        ["-m", "adaptive", "evaluate", str(run), "--workers", "0"],
        ["-m", "adaptive", "calibrate", str(run), "--budget", "0.5", "--workers", "0"],
        ["-m", "adaptive", "report", str(run), "--workers", "0"],
    ]


def _promises(visit: Visit) -> Commands:
    run, device = str(visit.output / "run"), ["--device", visit.device]
    rounds = ["--rounds", "4"] if visit.rehearsal else []
    large, compiled = ("3", "3") if visit.rehearsal else ("64", "8")  # every size up to it is compiled by itself
    bench = ["-m", "adaptive", "bench", "inference", run, *device, *rounds]
    promised = _script(visit, "promised_time", run, *device, *rounds, "--batches", "1", large)
    return [
        [*bench, "--batch", "1", large],
        [*promised, "--runtimes", "torch"],
        [*bench, "--runtime", "torch", "compile", "--batch", "1", compiled],
        [*promised, "--runtimes", "torch", "compile"],
    ]


PARTS = (
    Part("doctor", 90, _doctor, "is the machine well?"),
    Part(
        "tests",
        270,
        _tests,
        "are the numerics on the device those of the CPU?",
        together=True,
        idle=NO_TESTS_COLLECTED,
    ),
    Part("steps", 300, _steps, "what does a step of the method cost?"),
    Part("inference", 120, _inference, "does early exit save time?"),
    Part("data", 120, _data, "is the data path faster than the step?"),
    Part("equilibrium", 120, _equilibrium, "does Gradient Equilibrium stay below 0.5 % of a step?"),
    Part("startup", 90, _startup, "how long until the first step?"),
    Part("training", 120, _training, "do train, evaluate, calibrate and report go through?"),
    Part("promises", 240, _promises, "does a policy take the milliseconds that were promised?"),
    Part("memory", 120, _memory, "is the memory that `adaptive plan` predicts the memory that is taken?"),
)
