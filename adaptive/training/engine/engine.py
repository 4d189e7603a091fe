"""The one module that imports DeepSpeed: a network, an optimizer and the ranks become one training engine.

Everything that depends on DeepSpeed's insides (0.19) stands here, so that the rest of the library and its tests run
without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from adaptive.networks.cutting.block import Block
from adaptive.training.engine.passed_through import check_in_effect

# Loss scale of fp16: start, growth after this many good steps, lowest value.
FP16_SCALE: dict[str, Any] = {"init_scale": 2.0**15, "scale_window": 1000, "min_scale": 1.0}


class Engine:
    """A network under DeepSpeed: forward, backward, step, and gathering of what ZeRO has split.

    ``network`` keeps its identity; weights stay fp32 and low precision is autocast, so the parameters (or their
    partitions) are the master weights at every stage.
    """

    def __init__(
        self, network: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any], timeout_seconds: float
    ):
        import deepspeed
        from deepspeed.runtime import torch_autocast

        # A module global of DeepSpeed remembers autocast of an earlier engine in this process.
        torch_autocast.TORCH_AUTOCAST_INITIALIZED = False
        self._deepspeed = deepspeed
        self.network = network
        self.stage = int(config["zero_optimization"]["stage"])
        self._engine, self.optimizer, _, _ = deepspeed.initialize(
            model=network, optimizer=optimizer, config=config, dist_init_required=False
        )
        check_in_effect(config["zero_optimization"], self._engine._config.zero_config)
        self.device = torch.device(self._engine.device)
        self._register_external_parameters()
        self._set_group_timeouts(timeout_seconds)
        self._guard_against_overflow(config.get("torch_autocast", {}).get("dtype") == "float16")

    def __call__(self, images: Tensor) -> list[Tensor]:
        """Run the network on (N, 3, H, W) and return the logits of every exit."""
        return self._engine(images)

    def unhooked(self, images: Tensor) -> list[Tensor]:
        """Run the network as ``__call__`` does, without DeepSpeed's hooks on the logits.

        ``torch.autograd.grad`` may then go through them any number of times; ``backward`` takes a ``surrogate`` only.
        Not for ZeRO 3, which partitions parameters again after their first use in a backward pass.
        """
        from deepspeed.runtime.torch_autocast import autocast_if_enabled

        with autocast_if_enabled(self._engine):
            return self.network(images)

    def surrogate(self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> Tensor:
        """Return a scalar 0 that brings ``parameters`` these gradients when ``backward`` is called with it.

        They pass through everything that DeepSpeed does to gradients: reduction, partitioning, accumulation, scaling.
        """
        from deepspeed.runtime.utils import register_output_backward_hooks

        if self.stage > 0:
            self.optimizer.clear_backward_seen_flag()  # as the engine does before every forward pass
        scalar = _Deliver.apply(list(gradients), *parameters)
        # DeepSpeed prepares itself for a backward pass when the first gradient reaches the network's outputs.
        register_output_backward_hooks(scalar, preprocess_once_fn=self._engine._backward_prologue)
        return scalar

    def backward(self, loss: Tensor) -> None:
        """Back-propagate one micro batch; gradients are averaged over micro batches and ranks."""
        self._engine.backward(loss)

    def step(self) -> bool:
        """End a micro batch; at the accumulation boundary update the weights. True where weights were updated.

        An update with a gradient that is not finite is skipped on all ranks.
        """
        engine = self._engine
        if not engine.is_gradient_accumulation_boundary():
            engine.step()
            return False
        scaler = engine.torch_autocast_z0_gradscaler
        if self.stage == 0 and scaler is None and not self._gradients_finite():
            engine.zero_grad()
            engine.micro_steps += 1
            return False
        before = scaler.get_scale() if scaler is not None else None
        engine.step()
        if scaler is not None:
            return bool(scaler.get_scale() >= before)
        return bool(engine.was_step_applied())

    @property
    def loss_scale(self) -> float:
        """Factor that gradients carry before the step (1 except in fp16)."""
        scaler = self._engine.torch_autocast_z0_gradscaler
        if scaler is not None:
            return float(scaler.get_scale())
        return float(self.optimizer.loss_scaler.loss_scale) if self.stage else 1.0

    def loss_scale_state(self) -> dict[str, float]:
        """Return the fp16 loss scale as plain numbers (empty without one)."""
        scaler = self._engine.torch_autocast_z0_gradscaler
        if scaler is not None:
            state = scaler.state_dict()
            return {"scale": state["scale"], "good_steps": state["_growth_tracker"]}
        if self.stage and self.optimizer.loss_scaler.dynamic:
            own = self.optimizer.loss_scaler
            return {"scale": own.cur_scale, "good_steps": own.cur_iter - own.last_overflow_iter - 1}
        return {}

    def load_loss_scale_state(self, state: dict[str, float]) -> None:
        """Restore what ``loss_scale_state`` returned."""
        scaler = self._engine.torch_autocast_z0_gradscaler
        if not state:
            return
        if scaler is not None:
            merged = {**scaler.state_dict(), "scale": state["scale"], "_growth_tracker": int(state["good_steps"])}
            scaler.load_state_dict(merged)
        elif self.stage and self.optimizer.loss_scaler.dynamic:
            own = self.optimizer.loss_scaler
            own.cur_scale = state["scale"]
            own.cur_iter, own.last_overflow_iter = int(state["good_steps"]), -1

    @contextmanager
    def gathered(self, parameters: list[nn.Parameter]) -> Iterator[None]:
        """Make whole parameters readable inside the block (ZeRO 3 gathers them; collective)."""
        partitioned = [p for p in parameters if hasattr(p, "ds_id")]
        if not partitioned:
            yield
            return
        with self._deepspeed.zero.GatheredParameters(partitioned):
            yield

    def full_gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """Return a parameter's whole averaged gradient, as the optimizer will see it before clipping (collective)."""
        from deepspeed.utils import safe_get_full_grad

        if not parameter.requires_grad:
            return None
        gradient = safe_get_full_grad(parameter)
        return None if gradient is None else gradient.float() / self.loss_scale

    def around_gathering(self, around: Callable[[], AbstractContextManager[None]]) -> None:
        """Let ``around()`` surround every gathering of a layer's weights from all ranks, as ZeRO 3 needs them."""
        if self.stage < 3:
            return
        from deepspeed.runtime.compiler import lazy_disable

        coordinator = self.optimizer.parameter_offload.get_param_coordinator()
        fetch = coordinator.fetch_sub_module

        def surrounded(*arguments: Any, **named: Any) -> None:
            with around():
                fetch(*arguments, **named)

        coordinator.fetch_sub_module = lazy_disable(surrounded)  # torch.compile is kept off the original as well

    def destroy(self) -> None:
        """Release hooks and buffers, so that another engine can be built in this process."""
        self._engine.destroy()

    def _register_external_parameters(self) -> None:
        if self.stage < 3:
            return
        for part in self.network.modules():
            if isinstance(part, Block):
                for parameter in part.direct_parameters():
                    self._deepspeed.zero.register_external_parameter(part, parameter)

    def _set_group_timeouts(self, seconds: float) -> None:
        # DeepSpeed makes groups of its own and gives them torch's default of 30 minutes, whatever it was told.
        from torch.distributed import distributed_c10d as c10d

        setter = getattr(dist, "set_timeout", None) or c10d._set_pg_timeout
        for group in list(c10d._world.pg_map):
            setter(timedelta(seconds=seconds), group)

    def _guard_against_overflow(self, fp16: bool) -> None:
        """Make ZeRO skip steps with gradients that are not finite, in agreement over the ranks, at every stage.

        Under autocast DeepSpeed leaves the check to a GradScaler per rank, which sees that rank's partition only, so
        ranks could part ways; and in fp32 stage 3 does not check. Its own loss scaler and check do both rightly.
        """
        if self.stage == 0:
            if fp16:
                self._engine.torch_autocast_z0_gradscaler = torch.amp.GradScaler(
                    self.device.type, init_scale=FP16_SCALE["init_scale"], growth_interval=FP16_SCALE["scale_window"]
                )
            return
        optimizer = self.optimizer
        if fp16:
            from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

            optimizer.torch_autocast_gradscaler = None
            optimizer.loss_scaler = DynamicLossScaler(
                **FP16_SCALE, delayed_shift=1, consecutive_hysteresis=False, raise_error_at_min_scale=False
            )
        if self.stage == 3:

            def check_and_update_scale(update_scale: bool = True) -> bool:
                optimizer.check_overflow()
                return optimizer._loss_scale_update_and_overflow_cleanup() if update_scale else optimizer.overflow

            optimizer._overflow_check_and_loss_scale_update = check_and_update_scale

    def _gradients_finite(self) -> bool:
        gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
        return not gradients or math.isfinite(torch.nn.utils.get_total_norm(gradients).item())


class _Deliver(torch.autograd.Function):
    """A zero whose gradient with respect to each parameter is a tensor given beforehand."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return parameters[0].new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *scale: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *torch._foreach_mul(ctx.gradients, scale[0]))
