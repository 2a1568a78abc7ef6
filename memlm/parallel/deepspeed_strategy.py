"""Value tables split over memory groups, everything else spread by DeepSpeed's ZeRO."""

import argparse
import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import DeepSpeedStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from memlm.errors import ConfigError
from memlm.parallel import checkpoint_folder
from memlm.parallel.memory_strategy import MemoryStrategy
from memlm.parallel.zero_adamw import ZeroAdamW
from memlm.parallel.zero_checkpoint import ZeroCheckpoint
from memlm.parallel.zero_state import ZeroState, hidden_values

CONFIG_KEY = "trainer.strategy.init_args.config"
_OURS = {
    "optimizer": "is model.optimizer",
    "scheduler": "is model.optimizer.schedule",
    "gradient_clipping": "is trainer.gradient_clip_val",
    "gradient_accumulation_steps": "is trainer.accumulate_grad_batches",
    "train_batch_size": "follows from data.init_args.batch_size",
    "train_micro_batch_size_per_gpu": "is data.init_args.batch_size",
    "fp16": "is trainer.precision",
    "bf16": "is trainer.precision",
    "torch_autocast": "is trainer.precision",
    "zero_optimization.offload_optimizer": "is not supported here",
    "zero_optimization.offload_param": "is not supported here",
    "zero_optimization.zenflow": "is not supported here",
    "zero_optimization.zero_hpz_partition_size": "is not supported here",
    "zero_optimization.mics_shard_size": "is not supported here",
    "tensor_parallel": "is not supported here",
    "expert_parallel": "is not supported here",
}
"""Keys of DeepSpeed's own configuration that must not be in it, and why."""


class _OnAnyDevice(DeepSpeedStrategy):
    """Lightning's strategy without its refusal of CPUs."""

    def setup_environment(self) -> None:
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        import deepspeed

        super(DeepSpeedStrategy, self).setup_distributed()
        self._set_node_environment_variables()
        _choose_accelerator(self.root_device.type)
        deepspeed.init_distributed(self.process_group_backend, timeout=self._timeout)


class MemoryDeepSpeedStrategy(MemoryStrategy, _OnAnyDevice):
    """Value tables split over memory groups; the dense parameters by DeepSpeed's ZeRO.

    ZeRO does not know the tables: their rows are exchanged and updated as under the other strategies, and
    checkpoints are those of the other strategies too. With bf16-mixed and bf16-true the dense parameters are
    bf16, their fp32 values ZeRO's; the tables are fp32 with bf16-mixed.

    Args:
        stage: Of ZeRO: what of the dense part is split over all ranks. 1: the optimizer's state; 2: gradients
            too; 3: parameters too.
        memory_group: See :class:`memlm.parallel.strategy.MemoryParallelStrategy`.
        save_distributed_checkpoint: See there.
        asynchronous_save: See there.
        wire_dtype: See there.
        config: DeepSpeed's own options, or their JSON file, over the defaults: buckets, stage 3's
            thresholds. Optimizer, schedule, clipping, accumulation and precision are the Trainer's and the
            model's.
        process_group_backend: gloo, nccl; default: by device.
        timeout: After which a collective that some rank does not join fails.

    Raises:
        ConfigError: deepspeed is not installed, or an option is not supported.
    """

    optimizer_class = ZeroAdamW

    def __init__(
        self,
        stage: int = 2,
        memory_group: int | None = None,
        save_distributed_checkpoint: bool = True,
        asynchronous_save: bool = False,
        wire_dtype: Literal["bfloat16"] | None = None,
        config: dict[str, Any] | str | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        if importlib.util.find_spec("deepspeed") is None:
            raise ConfigError(
                "trainer.strategy", "needs deepspeed, which is not installed: pip install 'memlm[deepspeed]'"
            )
        if stage not in (1, 2, 3):
            raise ConfigError("trainer.strategy.init_args.stage", f"is {stage}, must be 1, 2 or 3")
        own = _read(config)
        _check(own, stage)
        super().__init__(
            memory_group,
            save_distributed_checkpoint,
            asynchronous_save,
            wire_dtype,
            stage=stage,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        defaults = {"train_micro_batch_size_per_gpu": 1}  # which it only logs
        self.config = _merged(cast(dict[str, Any], self.config) | defaults, own)
        self.stage = stage
        self._zero: ZeroState | None = None
        self._optimizer: ZeroAdamW | None = None

    @property
    def needs_all_ranks(self) -> bool:
        """Whether no rank can run the model without the others."""
        return super().needs_all_ranks or (self.ranks > 1 and self.stage == 3)

    def whole_between_passes(self) -> AbstractContextManager[Any]:
        """Within it all dense parameters are whole on every rank: stage 3 would gather each where it is used,
        the output layer's as often as that is called.
        """
        if self.stage != 3:
            return nullcontext()
        from deepspeed.runtime.zero.stage3 import unwrap_model_for_generation

        return unwrap_model_for_generation(self.model)

    # -- start

    def setup_distributed(self) -> None:
        """Start the processes' communication."""
        super().setup_distributed()
        self.meet()

    @property
    def handles_gradient_accumulation(self) -> bool:
        """No: :meth:`pre_backward` tells the engine which micro-batch is the last."""
        return False

    def model_sharded_context(self) -> AbstractContextManager[None]:  # type: ignore[override]
        """Nothing: ZeRO gets parameters that are whole, and have their initial values."""
        return nullcontext()

    def init_deepspeed(self) -> None:
        """Have DeepSpeed take over the model, for training; otherwise only what stage 3 would split."""
        module: Any = self.lightning_module
        fitting = module.trainer.state.fn == TrainerFn.FITTING
        if str(self.precision_plugin.precision).startswith("16"):
            raise ConfigError(
                "trainer.precision",
                f"is {self.precision_plugin.precision}; use 32-true, bf16-mixed or bf16-true",
            )
        self._fit_buckets()
        pools = module.pools.values()
        if fitting:
            if module.trainer.ckpt_path is None and self.run_config.get("ckpt_path") is None:
                module.take_pretrained()  # while parameters are whole
            optimizer, schedule = self._init_optimizers()
            assert isinstance(optimizer, ZeroAdamW)
            with hidden_values(pools):
                engine = self._engine(optimizer.adamw)
            self._zero = optimizer.zero = ZeroState(engine, optimizer.adamw, pools)
            self._optimizer, self.optimizers = optimizer, [optimizer]
            self.lr_scheduler_configs = [] if schedule is None else [schedule]
            self.model = engine
        elif self.stage == 3:
            with hidden_values(pools):
                self.model = self._engine(None)
            self._zero = ZeroState(self.model, None, pools)
        elif str(self.precision_plugin.precision).startswith("bf16"):
            for parameter in self._dense():
                parameter.data = parameter.data.to(torch.bfloat16)

    def _engine(self, optimizer: Optimizer | None) -> Any:
        import deepspeed

        module: Any = self.lightning_module
        index = self.root_device.index
        with named_options():
            return deepspeed.initialize(
                args=argparse.Namespace(device_rank=self.local_rank if index is None else index),
                config=self.config,
                model=module,
                model_parameters=[p for p in module.parameters() if p.requires_grad] if optimizer else [],
                optimizer=optimizer,
                dist_init_required=False,
            )[0]

    def _dense(self) -> list[torch.nn.Parameter]:
        module: Any = self.lightning_module
        tables = {id(pool.values) for pool in module.pools.values()}
        return [parameter for parameter in module.parameters() if id(parameter) not in tables]

    def _fit_buckets(self) -> None:
        """No larger than what there is to send: they are allocated. On a CPU there is nothing to overlap."""
        assert isinstance(self.config, dict)
        zero = self.config["zero_optimization"]
        dense = sum(parameter.numel() for parameter in self._dense())
        for name in ("reduce_bucket_size", "allgather_bucket_size"):
            zero[name] = min(int(zero[name]), dense)
        if self.root_device.type == "cpu":
            zero["overlap_comm"] = False
        self.config["gradient_clipping"] = 0.0  # see ZeroAdamW.clip_dense

    # -- steps

    def pre_backward(self, closure_loss: Tensor) -> None:
        """Tell the engine whether a step follows, for which gradients are to be reduced."""
        super().pre_backward(closure_loss)
        assert self.lightning_module is not None
        last = not self.lightning_module.trainer.fit_loop._should_accumulate()
        self.deepspeed_engine.set_gradient_accumulation_boundary(last)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Nothing: the engine knows from :meth:`pre_backward`."""
        yield

    def backward(
        self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """The engine's; Lightning has divided the loss by the number of micro-batches."""
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def optimizer_step(
        self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any
    ) -> Any:
        """The optimizer's own, where Lightning's plugin would step the engine."""
        model = model or self.lightning_module
        return Precision.optimizer_step(self.precision_plugin, optimizer, model, closure, **kwargs)

    # -- checkpoints

    def _checkpoint(self) -> ZeroCheckpoint | None:
        """What stands for model and optimizer; None where ZeRO has taken over nothing."""
        if self._zero is None:
            return None
        assert self.lightning_module is not None
        return ZeroCheckpoint(self.lightning_module, self._zero, self._optimizer, self._all_ranks)

    @property
    def _all_ranks(self) -> DeviceMesh:
        mesh = self.memory_mesh.mesh
        return mesh._flatten("ranks") if mesh.ndim > 1 else mesh

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """This rank's part of the model's state."""
        view = self._checkpoint()
        return super().lightning_module_state_dict() if view is None else view.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """This rank's part of the optimizer's state, by the parameters' names."""
        view: Any = self._checkpoint()
        return checkpoint_folder.optimizer_state(view, view)

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read this rank's part of a checkpoint of any strategy, and give it to ZeRO."""
        view: Any = self._checkpoint()
        if view is None:
            return super().load_checkpoint(checkpoint_path, weights_only)
        path = Path(self.broadcast(str(checkpoint_path)))
        self.finish_saving()
        optimizers = [] if self._optimizer is None else [view]
        rest = checkpoint_folder.load(path, view, optimizers, weights_only is None or weights_only)
        view.put_back()
        return rest


@contextmanager
def named_options() -> Iterator[None]:
    """Within it an option that DeepSpeed does not know, or whose value it refuses, is an error of the user's.

    Raises:
        ConfigError: Names the option, what DeepSpeed found, and which of its sections has it.
    """
    from pydantic import ValidationError  # which DeepSpeed needs

    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        section = "zero_optimization." if error.title == "DeepSpeedZeroConfig" else ""
        key = ".".join(map(str, first["loc"]))
        raise ConfigError(
            f"{CONFIG_KEY}.{section}{key}",
            f"is {first['input']!r}, which DeepSpeed refuses: {first['msg']} ({error.title})",
        ) from error


def _choose_accelerator(device: str) -> None:
    """DeepSpeed takes the GPUs that it finds, whatever the Trainer was told."""
    from deepspeed.accelerator import get_accelerator, set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    if device == "cpu" and get_accelerator().device_name() != "cpu":
        set_accelerator(CPU_Accelerator())


def _read(config: dict[str, Any] | str | None) -> dict[str, Any]:
    if config is None or isinstance(config, dict):
        return config or {}
    try:
        found = json.loads(Path(config).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(CONFIG_KEY, f"is {config}, which cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(CONFIG_KEY, f"is {config}, which holds no JSON object")
    return found


def _check(own: Mapping[str, Any], stage: int) -> None:
    for key, value in _flat(own):
        for refused, reason in _OURS.items():
            if key == refused or key.startswith(f"{refused}."):
                raise ConfigError(f"{CONFIG_KEY}.{refused}", f"must not be set: it {reason}")
        if key == "data_types.grad_accum_dtype" and stage == 1:
            raise ConfigError(
                f"{CONFIG_KEY}.{key}",
                "must not be set with init_args.stage 1, under which another optimizer may replace ZeRO",
            )
        if key == "zero_optimization.stage" and value != stage:
            raise ConfigError(f"{CONFIG_KEY}.{key}", f"is {value}, but init_args.stage is {stage}")


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _merged(defaults: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(defaults)
    for key, value in own.items():
        base = defaults.get(key)
        result[key] = _merged(base, value) if isinstance(base, dict) and isinstance(value, Mapping) else value
    return result


StrategyRegistry.register(
    "memory_deepspeed",
    MemoryDeepSpeedStrategy,
    description="value tables split over memory groups, all else by DeepSpeed's ZeRO",
)
