"""Outputs that a test builds by hand, as if this user had launched them."""

from __future__ import annotations

from p3d.jobs.trust import id_of, owned_at, remember
from p3d.pipeline.storage.store import DEFAULTS, Store, StoreOptions


def own(store: Store, options: StoreOptions = DEFAULTS) -> None:
    """Record the job or snapshot at a store as this user's own."""
    assert remember(store, id_of(owned_at(store)), "launched", options) == ""
