"""Warnings about a plan that will run, but hardly as its user means it: settings without effect, too few shards ..."""

from __future__ import annotations

from adaptive.config.sections import Config
from adaptive.planning.plan import Plan
from adaptive.training.batch import next_micro_batch
from adaptive.training.optimizer import is_scale_invariant

FAR = 2.0  # factor by which a learning rate may miss the rule, a micro batch its limit, before it is told of
SMALL_BATCH = 8  # images per rank and forward pass below which a GPU computes noticeably slower per image


def warnings_about(plan: Plan, preset: Config | None = None) -> list[str]:
    """Return the warnings, a line each; ``preset`` is the configuration file without the command line's overrides."""
    found = [*plan.checked.notes, *_about_shards(plan), *_about_epochs(plan)]
    config, batch = plan.checked.config, plan.checked.batch
    if preset is not None:
        found += _about_learning_rate(preset, config)
    if plan.cuda and batch.micro_batch < SMALL_BATCH:
        found.append(
            f"{batch.micro_batch} images per rank and forward pass: so small a batch leaves a GPU idle; use fewer "
            "ranks, or a larger train.global_batch"
        )
    if batch.limit and batch.accumulation > 1 and FAR * batch.micro_batch <= batch.limit:
        found.append(
            f"train.micro_batch = {batch.limit}, but {batch.share} images per rank divide into {batch.micro_batch} at "
            f"most; the next number that divides them is train.micro_batch={next_micro_batch(config, batch)}"
        )
    return found


def _about_shards(plan: Plan) -> list[str]:
    config, world = plan.checked.config, plan.settings.world
    split = plan.checked.index.split(config.data.train_split)
    shards, readers = len(split.shards), world * max(1, config.data.workers)
    if shards >= readers or world == 1 or config.data.in_memory:
        return []
    size = max(1, split.total_bytes // readers)
    each = max(1, config.data.workers)
    return [
        (
            f"{shards} training shards for {world} ranks x {each} reader(s): all read the same files; {readers} are "
            f"needed for one at a time each (adaptive pack --shard-bytes {size})"
        )
    ]


def _about_epochs(plan: Plan) -> list[str]:
    dropped = plan.data.dropped
    total = dropped + plan.data.steps * plan.checked.batch.global_batch
    if dropped * 10 <= total:
        return []
    return [
        (
            f"train.global_batch = {plan.checked.batch.global_batch} leaves {dropped} of {total} training images out "
            "of every epoch; a smaller one leaves out less"
        )
    ]


def _about_learning_rate(preset: Config, config: Config) -> list[str]:
    """Compare the learning rate with the rules for a larger batch.

    Linear scaling for SGD (arXiv 1706.02677), its square root for optimizers that ignore the gradient's scale.
    """
    grown = config.train.global_batch / preset.train.global_batch
    if grown == 1:
        return []
    adaptive = is_scale_invariant(config.optimizer.name)
    rule = grown**0.5 if adaptive else grown
    wanted = preset.optimizer.lr * rule
    found = []
    if not 1 / FAR < config.optimizer.lr / wanted < FAR:
        name = "square-root" if adaptive else "linear"
        found.append(
            f"train.global_batch is {grown:g} times the file's {preset.train.global_batch}, optimizer.lr is "
            f"{config.optimizer.lr:g}: the {name} scaling rule would say {wanted:.3g}"
        )
    if grown > FAR and not config.schedule.warmup_epochs:
        found.append("a batch so much larger than the file's wants a warm-up: schedule.warmup_epochs=5")
    return found
