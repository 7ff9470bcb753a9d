"""Which KV-cache blocks of a request others may reuse: those before its first image.

In layers without vision tokens, text behind an image has its keys in blocks that the tokens of the image count for: a
block's tokens say what it holds only up to the first image. vLLM's prefix caching takes blocks by their tokens, so the
blocks from the first image on never enter its cache: each request has its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry


@dataclass(frozen=True, kw_only=True)
class LateFusionSpec(FullAttentionSpec):
    """vLLM's specification of a layer's keys, for which vLLM takes the manager below."""

    @classmethod
    def of(cls, spec: FullAttentionSpec) -> LateFusionSpec:
        return cls(**{field.name: getattr(spec, field.name) for field in fields(spec)})


class LateFusionManager(FullAttentionManager):
    """vLLM's manager of KV-cache blocks, which keeps those with an image out of the prefix cache."""

    def cache_blocks(
        self, request: Any, num_tokens: int, *args: Any, replay_boundaries: Sequence[int], **settings: Any
    ) -> None:
        """Let other requests find the full blocks among the first `num_tokens` that lie before the first image."""
        first = min((feature.mm_position.offset for feature in request.mm_features), default=num_tokens)
        super().cache_blocks(
            request, min(first, num_tokens), *args, replay_boundaries=replay_boundaries, **settings
        )


KVCacheSpecRegistry.check_kv_cache_spec_registry(
    {}
)  # vLLM's own go first: it adds them to an empty registry alone
KVCacheSpecRegistry.register(LateFusionSpec, LateFusionManager, uniform_type_base_spec=FullAttentionSpec)
