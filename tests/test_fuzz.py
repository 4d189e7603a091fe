"""Malformed files of every kind that a user may hand over: one line that explains, or it is taken; nothing else."""

import json
import string
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adaptive.config.loading import dump_config, load_config
from adaptive.errors import AdaptiveError, CheckpointError, ConfigError
from adaptive.inference.policy import Policy
from adaptive.tracking.record import Record, read
from adaptive.training.checkpoints.store import MANIFEST, STATE, CheckpointStore, newest_or_refuse
from tests.helpers.locations import REPOSITORY

FIXED = {"derandomize": True, "deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
CONFIGS = sorted(path for path in (REPOSITORY / "configs").rglob("*.yaml") if path.parent.name != "sweeps")
NUMBERS = st.one_of(st.integers(), st.floats(), st.just(10**400), st.just(-1))
PLAIN = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=20))
TREES = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def mutated(original: bytes) -> st.SearchStrategy[bytes]:
    """A file of which some stretches were exchanged, cut out, or doubled."""
    change = st.tuples(st.integers(0, len(original)), st.integers(0, 40), st.binary(max_size=20))

    def apply(changes: list[tuple[int, int, bytes]]) -> bytes:
        content = original
        for place, length, put in changes:
            content = content[:place] + put + content[place + length :]
        return content

    return st.lists(change, min_size=1, max_size=4).map(apply)


def replaced(tree: object) -> st.SearchStrategy[object]:
    """A tree of which one value, anywhere, is another one."""
    places = list(_places(tree))

    def put(place: tuple, value: object) -> object:
        if not place:
            return value
        copy = json.loads(json.dumps(tree))
        node = copy
        for key in place[:-1]:
            node = node[key]
        node[place[-1]] = value
        return copy

    return st.builds(put, st.sampled_from(places), TREES)


def _places(tree: object, place: tuple = ()):
    yield place
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in entries:
        yield from _places(value, (*place, key))


def expect_one_line(error: AdaptiveError) -> None:
    message = str(error)
    assert message
    assert len(message) < 2000
    assert "\n" not in message


# --- configuration ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "file"


def try_config(file: Path, content: bytes, overrides: tuple[str, ...] = ()) -> None:
    file.write_bytes(content)
    try:
        config = load_config(file, overrides)
    except ConfigError as error:
        expect_one_line(error)
    else:
        dump_config(config)


@settings(max_examples=300, **FIXED)
@given(content=st.sampled_from(CONFIGS).flatmap(lambda path: mutated(path.read_bytes())))
def test_mutated_configurations(file, content):
    try_config(file, content)


@settings(max_examples=200, **FIXED)
@given(
    tree=st.deferred(
        lambda: replaced(json.loads(json.dumps(load_config(REPOSITORY / "configs/quickstart.yaml").model_dump())))
    )
)
def test_configurations_with_a_strange_value(file, tree):
    try_config(file, json.dumps(tree).encode())  # JSON is YAML


@settings(max_examples=150, **FIXED)
@given(content=st.binary(max_size=200) | st.text(string.printable, max_size=200).map(str.encode))
def test_what_is_no_configuration(file, content):
    try_config(file, content)


KEYS = st.sampled_from(["train.epochs", "train", "phases.0.lr", "phases", "model.exits", "data.mean.1", "x.y", "", "."])


@settings(max_examples=150, **FIXED)
@given(words=st.lists(st.builds(lambda key, value: key + value, KEYS, st.text(max_size=15)), max_size=3))
def test_strange_overrides(file, words):
    try_config(file, (REPOSITORY / "configs/quickstart.yaml").read_bytes(), tuple(words))


@pytest.mark.parametrize(
    "content",
    [
        "a: &a [x, x, x, x, x, x, x, x, x]\n"
        + "".join(
            f"{'bcdefghij'[i]}: &{'bcdefghij'[i]} [{', '.join(['*' + 'abcdefghij'[i]] * 9)}]\n" for i in range(9)
        ),
        "model: " + "[" * 2000,
        "model: " + "{a: " * 3000,
        "model: &m {backbone: *m}",
        "model: !!python/object/apply:os.system ['touch owned']",
        "model: !!python/name:os.system",
        "<<: *nothing",
    ],
    ids=["a billion laughs", "deep lists", "deep mappings", "itself", "code", "name", "unknown anchor"],
)
def test_hostile_yaml(file, content, monkeypatch):
    monkeypatch.chdir(file.parent)
    file.write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    expect_one_line(caught.value)
    assert [path.name for path in file.parent.iterdir()] == ["file"]


# --- policies --------------------------------------------------------------------------------------------------------

POLICY = Policy(kind="confidence", thresholds=[0.9, 0.5, 0.0], temperatures=[1.0, 1.2, 1.5])


def try_policy(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    try:
        policy = Policy.load(file)
    except AdaptiveError as error:
        expect_one_line(error)
    else:
        policy.save(file)
        assert Policy.load(file) == policy


@settings(max_examples=150, **FIXED)
@given(content=mutated(POLICY.model_dump_json(indent=1).encode()) | st.binary(max_size=100))
def test_mutated_policies(file, content):
    try_policy(file, content)


@settings(max_examples=150, **FIXED)
@given(tree=replaced(json.loads(POLICY.model_dump_json())))
def test_policies_with_a_strange_value(file, tree):
    try_policy(file, json.dumps(tree).encode())


# --- checkpoints and records -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory):
    store = CheckpointStore(tmp_path_factory.mktemp("checkpoints"))
    return store, store.save(3, {"weights": {"w": torch.arange(6.0)}}, {"progress": {"step": 3}}, 50.0).path


@settings(max_examples=150, **FIXED)
@given(data=st.data())
def test_a_changed_checkpoint_is_never_taken(checkpoint, data):
    store, path = checkpoint
    file = path / data.draw(st.sampled_from([MANIFEST, STATE, "weights.safetensors"]))
    before = file.read_bytes()
    try:
        changed = data.draw(mutated(before))
        if file.name == MANIFEST:
            changed = data.draw(
                st.just(changed) | replaced(json.loads(before)).map(lambda tree: json.dumps(tree).encode())
            )
        file.write_bytes(changed)
        try:
            found = newest_or_refuse(store)
        except CheckpointError as error:
            expect_one_line(error)
        else:  # what does not matter was changed: white space, an entry that nobody reads
            assert file.name == MANIFEST or changed == before
            assert found.tensors("weights")["w"].tolist() == list(range(6))
    finally:
        file.write_bytes(before)


@settings(max_examples=100, **FIXED)
@given(content=mutated(b'{"step": 1, "train/loss": 0.5}\n{"step": 2, "val/loss": "nan"}\n') | st.binary(max_size=60))
def test_mutated_records(file, content):
    file.write_bytes(content)
    try:
        read(file)
        Record(file).trim(1)
        Record(file).write({"step": 2})
        assert read(file)[-1] == {"step": 2}
    except AdaptiveError as error:
        expect_one_line(error)
