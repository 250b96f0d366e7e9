"""One small module per kind of object; `registry` finds the right one."""

from distckpt.graph.adapters.registry import adapter_for, is_checkpointable, refusal, unwrap

__all__ = ["adapter_for", "is_checkpointable", "refusal", "unwrap"]
