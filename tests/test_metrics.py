import io
import tarfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from adaptive.config.sections import DataConfig
from adaptive.data.packing.pack import pack
from adaptive.data.shards.index import ShardInfo, SplitInfo, load_index, write_index
from adaptive.files import file_sha256
from adaptive.metrics import ExitMeter
from tests.helpers.ranks import run_ranks


def test_counts_are_exact_and_padding_is_left_out() -> None:
    generator = torch.Generator().manual_seed(1)
    meter = ExitMeter(2, "cpu")
    all_logits, all_labels = [], []
    for size in (7, 4, 1):
        outputs = [torch.randn(size + 2, 9, generator=generator) for _ in range(2)]
        labels = torch.randint(0, 9, (size + 2,), generator=generator)
        labels[size:] = -1
        meter.add(outputs, labels)
        all_logits.append(torch.stack(outputs)[:, :size])
        all_labels.append(labels[:size])
    outputs, labels = torch.cat(all_logits, 1), torch.cat(all_labels)
    values = meter.reduce(lambda t: t)
    assert values["samples"] == [12, 12]
    for i in range(2):
        order = outputs[i].argsort(dim=-1, descending=True)
        top1 = (order[:, 0] == labels).double().mean().item() * 100
        top5 = (order[:, :5] == labels[:, None]).any(-1).double().mean().item() * 100
        agree = (order[:, 0] == outputs[1].argmax(-1)).double().mean().item() * 100
        assert values["top1"][i] == top1
        assert values["top5"][i] == top5
        assert values["agreement"][i] == agree
        assert abs(values["loss"][i] - F.cross_entropy(outputs[i], labels).item()) < 1e-6


def test_soft_labels_count_their_largest_share() -> None:
    meter = ExitMeter(1, "cpu")
    logits = torch.eye(3)
    meter.add([logits], torch.tensor([[0.9, 0.1, 0], [0.6, 0.4, 0], [0, 0.1, 0.9]]), torch.tensor([2.0]))
    values = meter.reduce(lambda t: t)
    assert values["top1"] == pytest.approx([200 / 3])
    assert values["loss"] == [2.0]


def test_fewer_classes_than_five() -> None:
    meter = ExitMeter(1, "cpu")
    meter.add([torch.eye(3)], torch.tensor([1, 1, 1]))
    assert meter.reduce(lambda t: t)["top5"] == [100.0]


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test images in shards of 131, 130, 38 and 1."""
    folder = tmp_path_factory.mktemp("uneven") / "digits"
    pack("builtin:digits", folder, workers=1, progress=False)
    index = load_index(folder)
    (shard,) = index.split("test").shards
    with tarfile.open(folder / shard.name) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    each = len(members) // 300  # an image, its label and what else there is
    shards, start = [], 0
    for number, count in enumerate((131, 130, 38, 1)):
        path = folder / f"uneven-{number}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for member, content in members[each * start : each * (start + count)]:
                tar.addfile(member, io.BytesIO(content))
        start += count
        shards.append(ShardInfo(name=path.name, count=count, bytes=path.stat().st_size, sha256=file_sha256(path)))
    write_index(folder, index.classes, index.splits | {"test": SplitInfo(shards=shards, count=start)})
    assert start == 300
    return folder


def measured(folder: Path, workers: int) -> tuple[int, float, list[int]]:
    """Measure a classifier that knows the labels of every second class; returns the totals and this rank's ids."""
    from adaptive.data.reading.stream import EvaluationStream, LoaderOptions
    from adaptive.distributed.ranks import find_ranks
    from adaptive.metrics import measure_exits
    from adaptive.training.engine.group import all_reduce, init_distributed

    ranks = find_ranks()
    init_distributed(60)
    data = DataConfig(path=str(folder), image_size=8)
    loader = LoaderOptions(ranks.rank, ranks.world, workers)
    stream = EvaluationStream(load_index(folder), data, "test", loader, batch=17)
    batches = list(stream)
    labels = iter(batches)

    def forward(images: torch.Tensor) -> list[torch.Tensor]:
        wanted = next(labels).labels.clamp(min=0)
        return [F.one_hot(wanted - wanted % 2, 10).float() * 9]

    found = measure_exits(forward, batches, 1, torch.device("cpu"), stream.total, all_reduce)
    return found.samples, found.top1[0], [i for batch in batches for i in batch.ids.tolist() if i >= 0]


@pytest.mark.ranks
@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.full), 3])
@pytest.mark.parametrize("workers", [0, 5])  # five: more than there are shards
def test_totals_are_the_datasets_size_on_any_number_of_ranks(uneven: Path, world: int, workers: int) -> None:
    outcomes = run_ranks(measured, world, uneven, workers)
    assert {samples for samples, _, _ in outcomes} == {300}
    assert len({top1 for _, top1, _ in outcomes}) == 1
    assert sorted(i for _, _, ids in outcomes for i in ids) == list(range(300))
    alone = run_ranks(measured, 1, uneven, 0)[0]
    assert outcomes[0][1] == alone[1]
    assert 40 < alone[1] < 60
