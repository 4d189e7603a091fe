"""A plan, and a simulation, as printed tables and as plain values for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from adaptive.foreign_text import say
from adaptive.planning.data_plan import resume_cost
from adaptive.planning.plan import GIB, Plan
from adaptive.planning.simulation import Scaling, ScalingRow, Stop
from adaptive.reporting.tables import human, print_table

MIB = 2**20
HOST = "in the machine's memory"


def plan_as_dict(
    plan: Plan, rate: float | None, source: str, limit: int | None, warnings: Sequence[str]
) -> dict[str, Any]:
    """Return everything that `print_plan` shows, in images, seconds and bytes."""
    batch, memory = plan.checked.batch, plan.memory
    times = _times(plan, rate)
    return {
        "nodes": plan.checked.nodes,
        "ranks": batch.world,
        "device": "cuda" if plan.cuda else "cpu",
        "global_batch": batch.global_batch,
        "micro_batch": batch.micro_batch,
        "micro_batch_limit": batch.limit,
        "accumulation": batch.accumulation,
        "steps_per_epoch": plan.data.steps,
        "steps": plan.steps,
        "phases": [
            {"name": p.plan.name, "epochs": p.plan.epochs, "steps": p.steps, "lr": p.plan.lr} for p in plan.phases
        ],
        "data": {
            "shards": _shards(plan),
            "readers_per_rank": _readers(plan),
            **asdict(plan.data),
            "decoded_bytes_per_node": plan.decoded,
        },
        "memory": {
            "moments": {moment.name: {**moment.kinds, "total": moment.total} for moment in memory.moments},
            "peak": memory.peak.name,
            "peak_bytes": memory.peak.total,
            "needed_bytes": plan.needed(memory),
            "gpu_memory_bytes": limit,
            "largest_micro_batch": plan.largest_micro_batch(limit) if limit is not None else None,
            "host": memory.host,
            "by_zero_stage": plan.by_stage(),
        },
        "host_memory": {**asdict(plan.host), "rank": plan.host.rank},
        "traffic": {
            "bytes_sent_per_rank_and_step": plan.bytes_sent,
            "collectives": [asdict(collective) for collective in plan.traffic],
        },
        "time": None if rate is None else {"images_per_second_per_rank": rate, "source": source, **times},
        "disk": {"checkpoint_bytes": plan.checkpoint, "total_bytes": plan.disk},
        "warnings": list(warnings),
    }


def print_plan(plan: Plan, rate: float | None, source: str, limit: int | None, warnings: Sequence[str]) -> None:
    """Print the plan as lines and tables, with its warnings."""
    batch, config = plan.checked.batch, plan.checked.config
    say(
        f"batch: {batch.world} rank(s) x {batch.micro_batch} images x {batch.accumulation} accumulated = "
        f"{batch.global_batch} per step"
    )
    if batch.derived:
        say(batch.derived)
    say(f"steps: {plan.data.steps} per epoch, {plan.steps} in all")
    for phase in plan.phases if len(plan.phases) > 1 else ():
        say(f"  {phase.plan.name}: {phase.plan.epochs} epochs, {phase.steps} steps, lr {phase.plan.lr:g}")
    _print_reading(plan)
    _print_memory(plan, limit)
    _print_traffic(plan)
    times = _times(plan, rate)
    if rate is None:
        say("time: unknown; give --images-per-second X of one rank, or --measure")
    else:
        say(
            f"time: {_duration(times['epoch_seconds'])} per epoch, {_duration(times['total_seconds'])} in all at "
            f"{rate:.4g} images/s per rank ({source}), communication, validation and saving not included"
        )
    say(
        f"disk: {plan.checkpoint / MIB:,.0f} MiB per checkpoint at most, {plan.disk / GIB:.2f} GiB for "
        f"checkpoint.keep = {config.checkpoint.keep}, the best, and one being written"
    )
    for warning in warnings:
        say(f"warning: {warning}")


def _print_reading(plan: Plan) -> None:
    data = plan.data
    if plan.decoded:
        say(
            f"data: {_shards(plan)} shards, read once by every node; a rank takes "
            f"{_range(*data.images_per_rank)} images per epoch from memory"
        )
        say(f"data.in_memory: {plan.decoded / MIB:,.0f} MiB of every node's memory for decoded images")
        return
    say(
        f"data: {_shards(plan)} shards; a rank opens {_range(data.opens[0], data.opens[2])} of them per epoch for "
        f"{_range(*data.images_per_rank)} images, each of its {_readers(plan)} reader(s) "
        f"{_range(*data.opens_per_reader)}; a node reads {human(data.bytes_per_node)}B"
    )


def _print_memory(plan: Plan, limit: int | None) -> None:
    memory = plan.memory
    where = "GPU" if plan.cuda else "CPU"
    kinds = list(dict.fromkeys(kind for moment in memory.moments for kind in moment.kinds))
    table = Table(title=f"memory per rank, MiB ({where}, ZeRO {plan.settings.stage})", title_justify="left")
    table.add_column("kind")
    for moment in memory.moments:
        table.add_column(f"{moment.name}{' *' if moment is memory.peak else ''}", justify="right")
    for kind in kinds:
        table.add_row(kind, *(_mebibytes(moment.kinds.get(kind, 0)) for moment in memory.moments))
    table.add_row("together", *(_mebibytes(moment.total) for moment in memory.moments))
    print_table(table)
    needed = plan.needed(memory)
    more = ", with CUDA's context and fragmentation" if plan.cuda else ""
    held = " (memory of the GPU unknown here: --gpu-memory GIB)" if limit is None and plan.cuda else ""
    if limit is not None:
        largest = plan.largest_micro_batch(limit)
        fits = "fits into" if needed <= limit else "DOES NOT FIT into"
        held = f": {fits} {limit / GIB:.2f} GiB; largest micro batch: {largest if largest is not None else 'none'}"
    say(f"needed: {needed / GIB:.2f} GiB{more}{held}")
    stages = ", ".join(f"{stage}: {needed / GIB:.2f}" for stage, needed in plan.by_stage().items())
    say(f"by ZeRO stage, GiB: {stages}")
    for kind, size in memory.host.items():
        say(f"besides, {HOST}: {kind} {size / MIB:,.0f} MiB")
    host = plan.host
    say(
        f"memory of the machine: {host.start / GIB:.1f} GiB per rank at its start, {host.training / GIB:.1f} GiB in "
        f"training, {host.node / GIB:.1f} GiB per node of {plan.checked.ranks_per_node} rank(s)"
    )


def _print_traffic(plan: Plan) -> None:
    if not plan.traffic:
        say("network: one rank sends nothing")
        return
    parts = ", ".join(f"{c.kind} of {c.purpose} {c.bytes / MIB:,.1f} MiB" for c in plan.traffic)
    say(f"network: {plan.bytes_sent / MIB:,.1f} MiB sent per rank and step ({parts})")


def simulation_as_dict(scaling: Scaling, rows: Sequence[ScalingRow], stops: Sequence[Stop]) -> dict[str, Any]:
    """Return everything that `print_simulation` shows."""
    cost = resume_cost(scaling.shards, scaling.config.data, scaling.config.train.seed, _resumed_batch(scaling))
    return {
        "assumptions": {
            "images_per_second_per_rank": scaling.images_per_second,
            **asdict(scaling.hardware),
            "zero_stage": scaling.settings.stage,
            "micro_batch": scaling.batch.limit,
            "images": scaling.shards.images,
            "shards": len(scaling.shards.counts),
            "bytes": sum(scaling.shards.bytes),
            "cached": scaling.cached,
        },
        "rows": [{**asdict(row), "step_seconds": row.time.total} for row in rows],
        "resume": asdict(cost),
        "stops": [asdict(stop) for stop in stops],
    }


def print_simulation(scaling: Scaling, rows: Sequence[ScalingRow], stops: Sequence[Stop]) -> None:
    """Print assumptions, two tables, and where it stops scaling."""
    shards, hardware, config = scaling.shards, scaling.hardware, scaling.config
    total = sum(shards.bytes)
    limit = scaling.batch.limit
    passes = f"up to {limit} images per pass" if limit else "a rank's images in one pass"
    say(
        f"assumed: {scaling.images_per_second:g} images/s per rank alone; {hardware.ranks_per_node} ranks per node; a "
        f"rank sends {hardware.intra_bandwidth:g} GB/s inside a node, a node {hardware.inter_bandwidth:g} GB/s to "
        f"others, {hardware.latency:g} us per hop; shared storage {hardware.storage_bandwidth:g} GB/s"
        f"{', asked in the first epoch only' if scaling.cached else ''}"
    )
    say(
        f"data: {shards.images:,} images, {human(total)}B in {len(shards.counts)} shards; "
        f"{scaling.sizes.learning:,} parameters learn, ZeRO {scaling.settings.stage}, {passes}"
    )
    _print_data(scaling, rows)
    _print_time(scaling, rows)
    if any(row.grown for row in rows):
        say(
            f"* train.global_batch = {config.train.global_batch} is not for so many ranks: every rank keeps its "
            f"{scaling.batch.share} images per step"
        )
    cost = resume_cost(shards, config.data, config.train.seed, _resumed_batch(scaling))
    say(
        f"going on from the middle of an epoch (step {cost.step}): {cost.skipped:,} samples and {cost.shards_passed} "
        f"shards passed over unread, {cost.shards_reopened} shards opened anew by each reader "
        f"({human(cost.bytes_refetched)}B per node without a cache), {1e3 * cost.seconds:.0f} ms to find the position"
    )
    for stop in stops:
        how = "train.global_batch as it is" if stop.batch == "fixed" else "batch growing with the ranks"
        if stop.world is None:
            say(f"{how}: above {stop.below:.0%} everywhere")
        else:
            say(f"{how}: below {stop.below:.0%} from {stop.world} ranks on ({stop.bound}). {stop.remedy}")


def _print_data(scaling: Scaling, rows: Sequence[ScalingRow]) -> None:
    table = Table(title="data plan of an epoch", title_justify="left")
    columns = (
        "ranks",
        "batch",
        "per pass",
        "steps",
        "images/rank",
        "shards/rank",
        "shards/reader",
        "read per node, GB",
        "in use, GB",
    )
    for name in columns:
        table.add_column(name, justify="right")
    for row in rows:
        data = row.data
        if data is None:
            table.add_row(str(row.world), f"{row.global_batch}*", *["-"] * 7)
            continue
        table.add_row(
            str(row.world),
            f"{row.global_batch}{'*' if row.grown else ''}",
            f"{row.accumulation} x {row.micro_batch}",
            str(data.steps),
            _range(*data.images_per_rank),
            _range(data.opens[0], data.opens[2]),
            _range(*data.opens_per_reader),
            f"{data.bytes_per_node / 1e9:.1f}",
            f"{data.window_bytes / 1e9:.2f}",
        )
    print_table(table)


def _print_time(scaling: Scaling, rows: Sequence[ScalingRow]) -> None:
    table = Table(title="sent per rank and step, time of a step, efficiency", title_justify="left")
    stages = [f"ZeRO {stage}, MB" for stage in range(4)]
    for name in ("ranks", *stages, "compute, ms", "exposed, ms", "data, ms", "step, ms", "fixed", "growing", "bound"):
        table.add_column(name, justify="right")
    for row in rows:
        times = (row.time.compute, row.time.exposed, row.time.data, row.time.total)
        table.add_row(
            f"{row.world}{'*' if row.grown else ''}",
            *(f"{row.sent[stage] / 1e6:.0f}" for stage in range(4)),
            *(f"{1e3 * seconds:.1f}" for seconds in times),
            _percent(row.fixed),
            _percent(row.growing),
            row.growing_bound if row.grown else row.fixed_bound,
        )
    print_table(table)


def _resumed_batch(scaling: Scaling) -> int:
    return min(scaling.config.train.global_batch, scaling.shards.images)


def _shards(plan: Plan) -> int:
    config = plan.checked.config
    return len(plan.checked.index.split(config.data.train_split).shards)


def _readers(plan: Plan) -> int:
    return max(1, plan.checked.config.data.workers)


def _times(plan: Plan, rate: float | None) -> dict[str, float]:
    if rate is None:
        return {}
    step = plan.checked.batch.global_batch / plan.checked.batch.world / rate
    return {"step_seconds": step, "epoch_seconds": step * plan.data.steps, "total_seconds": step * plan.steps}


def _mebibytes(size: int) -> str:
    return f"{size / MIB:,.1f}" if size else ""


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _range(low: int, high: int) -> str:
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _duration(seconds: float) -> str:
    """Return seconds as a reader counts them: 95 s, 12.5 min, 3.2 h, 4.1 days."""
    for size, unit in ((86400, "days"), (3600, "h"), (120, "min")):
        if seconds >= size:
            return f"{seconds / (60 if unit == 'min' else size):.1f} {unit}"
    return f"{seconds:.3g} s"
