"""All that knows vLLM. Behind this import it can also plan where its device is not, such as on a login node."""

from treepo_mcore.system.environment import gpus_are_missing


def _stand_in_for_the_device() -> None:
    """Without a device vLLM has no platform and cannot say what a configuration means: let it plan as on a CPU.

    But not as the CPU that its kernels are for: the vLLM for GPUs has none of those, and layers would look for them.
    """
    import vllm.platforms
    from vllm.platforms.cpu import CpuPlatform
    from vllm.platforms.interface import PlatformEnum

    class OnPaper(CpuPlatform):
        _enum = PlatformEnum.OOT

    if vllm.platforms.current_platform.is_unspecified():
        vllm.platforms.current_platform = OnPaper()


if gpus_are_missing():
    _stand_in_for_the_device()
