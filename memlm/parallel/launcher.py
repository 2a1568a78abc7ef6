"""Whether processes have been started as the Trainer is told."""

import os

from lightning.fabric.plugins.environments import ClusterEnvironment

from memlm.errors import ConfigError


def check_launcher(environment: ClusterEnvironment, devices: int, nodes: int) -> None:
    """Check that as many processes as the Trainer wants are those that torchrun or SLURM has started.

    Args:
        environment: Lightning's, of what has started this process.
        devices: Processes that the Trainer wants on a node.
        nodes: And how many nodes.

    Raises:
        ConfigError: Names ``trainer.devices`` and both numbers.
    """
    if not environment.creates_processes_externally:
        return
    kind = type(environment).__name__.removesuffix("Environment")
    launcher = {"TorchElastic": "torchrun"}.get(kind, kind)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", devices)) if launcher == "torchrun" else devices
    if (started := environment.world_size()) != devices * nodes or here != devices:
        raise ConfigError(
            "trainer.devices",
            f"is {devices}, and trainer.num_nodes {nodes}, which makes {devices * nodes} processes; "
            f"{launcher} has started {started}"
            + (f", {here} on this node" if launcher == "torchrun" else ""),
        )
    try:
        environment.validate_settings(devices, nodes)
    except ValueError as error:
        raise ConfigError("trainer.devices", str(error)) from error
