"""What GPUs and networks can do by their makers' data sheets. Decimal units: 1e9 bytes, 1e12 operations a second."""

from __future__ import annotations

from dataclasses import dataclass, replace

from treepo_mcore.config import ConfigError

MIB = 1 << 20


@dataclass(frozen=True)
class Gpu:
    """One GPU. Rates are peaks without sparsity; links count one direction."""

    name: str
    memory: int  # bytes, as nvidia-smi reports them
    bf16: float  # operations/s
    fp8: float | None  # operations/s; None: no such tensor cores
    hbm: float  # bytes/s
    nvlink: float  # bytes/s to the other GPUs of the node
    host: float  # bytes/s to host memory
    capability: tuple[int, int]  # for computing


@dataclass(frozen=True)
class Network:
    """Between nodes."""

    name: str
    bandwidth: float  # bytes/s of one GPU, one direction, when all GPUs of a node send
    shared: bool = False  # `bandwidth` is that of a node's one port: see `find_network`


@dataclass(frozen=True)
class Cluster:
    """What a run is given."""

    gpu: Gpu
    network: Network
    nodes: int
    gpus_per_node: int

    @property
    def world(self) -> int:
        """GPUs, and processes."""
        return self.nodes * self.gpus_per_node

    def crosses(self, ranks: int) -> bool:
        """Whether some block of `ranks` consecutive ranks lies in more than one node."""
        return self.nodes > 1 and self.gpus_per_node % ranks != 0

    def link(self, ranks: int, stride: int = 1) -> float:
        """Bytes/s of each member in collectives of `ranks` ranks, every `stride`-th one.

        Across nodes a group sends through the ports of all its members in a node.
        """
        if not self.crosses(ranks * stride):
            return self.gpu.nvlink
        return min(self.gpu.nvlink, self.network.bandwidth * min(ranks, max(1, self.gpus_per_node // stride)))


# Data sheets: NVIDIA A100 80GB SXM (2021), H100 SXM (2023), H200 SXM (2024), HGX B200 (2025); PCIe generation 4 for
# the A100, 5 for the others, at the 80 % of the line rate that pinned copies reach.
GPUS = {
    "a100": Gpu("A100-SXM-80GB", 81920 * MIB, 312e12, None, 2.039e12, 300e9, 25e9, (8, 0)),
    "h100": Gpu("H100-SXM-80GB", 81559 * MIB, 989e12, 1979e12, 3.35e12, 450e9, 50e9, (9, 0)),
    "h200": Gpu("H200-SXM-141GB", 143771 * MIB, 989e12, 1979e12, 4.8e12, 450e9, 50e9, (9, 0)),
    "b200": Gpu("B200-SXM-180GB", 183359 * MIB, 2250e12, 4500e12, 7.7e12, 900e9, 50e9, (10, 0)),
}

# One network port a GPU, as in a DGX; eth100 is one port a node.
NETWORKS = {
    "ib200": Network("InfiniBand HDR 200 Gb/s", 25e9),
    "ib400": Network("InfiniBand NDR 400 Gb/s", 50e9),
    "ib800": Network("InfiniBand XDR 800 Gb/s", 100e9),
    "roce400": Network("RoCE 400 Gb/s", 50e9),
    "eth100": Network("Ethernet 100 Gb/s a node", 100e9 / 8, shared=True),
}


def make_cluster(gpu: str, network: str, nodes: int, gpus_per_node: int) -> Cluster:
    """Raises `ConfigError` that lists what is known."""
    return Cluster(find_gpu(gpu), find_network(network, gpus_per_node), nodes, gpus_per_node)


def find_gpu(name: str) -> Gpu:
    """By its name in `GPUS`. Raises `ConfigError`."""
    if name not in GPUS:
        raise ConfigError(f"--gpu: {name}; known: {', '.join(GPUS)}")
    return GPUS[name]


def find_network(name: str, gpus_per_node: int) -> Network:
    """By its name in `NETWORKS`, a node's one port shared by its GPUs, or by a number: GB/s of one GPU and direction.

    Raises `ConfigError`.
    """
    if name in NETWORKS:
        network = NETWORKS[name]
        return replace(network, bandwidth=network.bandwidth / gpus_per_node) if network.shared else network
    try:
        rate = float(name)
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise ConfigError(f"--network: {name}; known: {', '.join(NETWORKS)}, or GB/s of one GPU and direction")
    return Network(f"{rate:g} GB/s a GPU", rate * 1e9)
