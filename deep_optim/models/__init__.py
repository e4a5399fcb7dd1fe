"""Reference models of Nested Learning: small, readable, right."""

from .self_modifying_titans import SelfModifyingTitans

__all__ = ["SelfModifyingTitans"]
