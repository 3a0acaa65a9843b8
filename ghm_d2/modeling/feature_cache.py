"""Feature maps of a frozen network, computed once for each image."""

import hashlib
import logging
from collections.abc import Hashable

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

_FEW, _AFTER = 0.1, 2000  # the share of so many images found, below which a warning comes


class FeatureCache:
    """Keeps what a network computes for an image, as long as its weights stay as they are.

    An image is known by its content, so each flip, size and padding of it is an image of its own.
    Each is computed by itself: its maps do not depend on the images beside it, and agree with those
    of the whole batch but for rounding. A full cache keeps what it has: where images come back once
    an epoch and do not all fit, making room for the latest would drop each before it comes back.

    Copies and checkpoints of a model hold nothing of it.
    """

    def __init__(self, megabytes: int) -> None:
        """
        Args:
            megabytes: (10^6 bytes) for the maps, on the device that computes them; above 0.
        """
        self._megabytes = megabytes
        self._maps: dict[Hashable, dict[str, Tensor]] = {}
        self._weights: Hashable = None
        self._free = 0
        self._found = self._asked = 0

    def __reduce__(self) -> tuple[type["FeatureCache"], tuple[int]]:
        return FeatureCache, (self._megabytes,)

    def __call__(self, network: nn.Module, images: Tensor) -> dict[str, Tensor]:
        """
        Args:
            network: takes (N, C, H, W), and returns name to (N, ...), each image's for itself.
            images: (N, C, H, W).

        Returns:
            What the network returns. Where gradients are wanted, or the network is being traced or
            compiled, it computes as if there were no cache.
        """
        tensors = [*network.parameters(), *network.buffers()]
        if (
            torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            or any(x.requires_grad for x in (images, *tensors))
        ):
            return network(images)
        weights = tuple((x.data_ptr(), x._version) for x in tensors)
        if weights != self._weights:  # loaded, averaged, or moved to another device
            self._maps, self._weights, self._free = {}, weights, self._megabytes * 10**6
        # Mixed precision, as in a training whose evaluations have float32.
        one = images.new_zeros(1, 1)
        kind = images.shape[1:], images.dtype, one.mm(one).dtype
        maps = [self._of(network, image, kind) for image in images]
        return {name: torch.stack([each[name] for each in maps]) for name in maps[0]}

    @torch.no_grad()
    def _of(self, network: nn.Module, image: Tensor, kind: Hashable) -> dict[str, Tensor]:
        content = image.contiguous().view(torch.uint8).cpu().numpy()
        key = kind, hashlib.blake2b(content).digest()
        maps = self._maps.get(key)
        self._asked += 1
        self._found += maps is not None
        if self._asked == _AFTER and self._found < _FEW * _AFTER:
            logger.warning(
                "CACHE_MB of the backbone: the feature maps of %d of %d images were there already. "
                "It helps where images come back as they were, after a first epoch; random sizes, "
                "crops or colours make each a new one.",
                self._found,
                _AFTER,
            )
        if maps is None:
            # Clones, since a network may return views of something larger.
            maps = {name: x[0].clone() for name, x in network(image[None]).items()}
            size = sum(x.nbytes for x in maps.values())
            if size <= self._free:
                self._maps[key] = maps
                self._free -= size
        return maps


def cache_for(network: nn.Module, cache_mb: int) -> FeatureCache | None:
    """A cache for a network's feature maps; None where `cache_mb` is 0.

    Args:
        network: with the norms that it will have, and what is not trained marked as such.
        cache_mb: its size in units of 10^6 bytes.

    Raises:
        ValueError: `cache_mb` is negative, or what the network computes would change in training.
    """
    if cache_mb < 0:
        raise ValueError(f"cache_mb must be at least 0, got {cache_mb}")
    if not cache_mb:
        return None
    if trained := [name for name, x in network.named_parameters() if x.requires_grad]:
        raise ValueError(
            f"cache_mb must be 0 where part of the network is trained, got {cache_mb} with "
            f"{trained[0]} trained: FREEZE_AT must be the last stage"
        )
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules()):
        raise ValueError(
            f"cache_mb must be 0 where batch norm follows the batches, got {cache_mb}: NORM must "
            "be FrozenBN"
        )
    return FeatureCache(cache_mb)
