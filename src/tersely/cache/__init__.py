"""The caches, by their names in recipes."""

from tersely.cache.base import CacheMethod, dense_bytes_per_token
from tersely.cache.latent import LatentCache

CACHES: dict[str, type[CacheMethod]] = {
    "latent": LatentCache,
}

__all__ = ["CACHES", "CacheMethod", "dense_bytes_per_token"]
