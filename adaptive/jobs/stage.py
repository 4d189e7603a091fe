"""Stages a dataset's shards on this machine's disk before training: one task per node, started by the batch scripts.

Every shard is checked against the index; what is here already stays. Ranks with the same ADAPTIVE_STAGE
read from there.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import sys
import time

from adaptive import standard_streams
from adaptive.config.loading import load_config
from adaptive.data.shards.cache import MIB, ShardCache, shard_files, stage_folder
from adaptive.data.shards.index import load_index
from adaptive.errors import AdaptiveError, ConfigError, MachineError
from adaptive.foreign_text import say
from adaptive.jobs.code_version import check_frozen_code
from adaptive.jobs.requeue import leave_exit_code
from adaptive.passing_faults import exit_code_of, passing, told


def stage(words: list[str]) -> str:
    """Copy or download the shards of the splits that training reads; return a line about what was done.

    Raises:
        ConfigError: ADAPTIVE_STAGE is not set, or the configuration is wrong.
        DataError: the dataset cannot be read, or is not what its index says.
        MachineError: it does not fit.
    """
    data = load_config(words[0], words[1:]).data
    root = stage_folder()
    if root is None:
        raise ConfigError("ADAPTIVE_STAGE is not set; name a folder on the nodes' own disks")
    began = time.monotonic()
    index = load_index(data.path, data)
    files = shard_files(data.path, index, data)
    assert isinstance(files, ShardCache)
    names = dict.fromkeys((data.train_split, data.val_split))
    shards = [shard for name in names if name in index.splits for shard in index.split(name).shards]
    missing = [shard for shard in shards if not files.holds(shard)]
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(f"ADAPTIVE_STAGE = {str(root)!r} cannot be made: {error.strerror}; give another") from None
    needed, free = sum(shard.bytes for shard in missing), shutil.disk_usage(root).free
    if needed > free:
        raise MachineError(
            f"ADAPTIVE_STAGE = {str(root)!r} on {platform.node()} has {free // MIB} MiB free, the shards need another "
            f"{needed // MIB + 1}; free some, give another folder, or train without staging"
        )
    for shard in shards:
        files.fetch(shard)
    files.close()
    return (
        f"{platform.node()}: {len(shards)} shards in {root}, {files.downloads} of them brought now "
        f"({needed / MIB:.1f} MiB in {time.monotonic() - began:.1f} s)"
    )


def main() -> int:
    """Entry point of the script."""
    standard_streams.prepare()
    standard_streams.observe_only()  # what it prints is for the log
    parser = argparse.ArgumentParser(prog="stage.py", description="Used by the batch scripts in slurm/.")
    parser.add_argument("words", nargs="+", metavar="CONFIG [key=value]")
    words = parser.parse_args().words
    try:
        check_frozen_code()
        print(stage(words), flush=True)
    except (AdaptiveError, OSError) as error:
        if not isinstance(error, AdaptiveError) and not passing(error):
            raise
        code = exit_code_of(error)
        leave_exit_code(code)  # srun's own is that of a task which it killed, where there are several
        say((error if isinstance(error, AdaptiveError) else told(error)).told("train"), file=sys.stderr)
        return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
