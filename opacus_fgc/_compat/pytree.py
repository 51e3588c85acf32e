"""Nestings of tuples, lists and dicts: ``torch.utils._pytree``, as torch 2.6 to 2.15 have it."""

from __future__ import annotations

from torch.utils import _pytree

TreeSpec = _pytree.TreeSpec
"""How leaves were nested; `tree_unflatten` takes it. Private: ``torch.utils._pytree.TreeSpec``."""

tree_flatten = _pytree.tree_flatten
"""The leaves of a nesting in order, and its `TreeSpec`. Private: ``torch.utils._pytree.tree_flatten``."""

tree_leaves = _pytree.tree_leaves
"""The leaves of a nesting in order. Private: ``torch.utils._pytree.tree_leaves``."""

tree_map_only = _pytree.tree_map_only
"""A nesting with all leaves of one type replaced by a function. Private: ``torch.utils._pytree.tree_map_only``."""

tree_unflatten = _pytree.tree_unflatten
"""The nesting of leaves that a `TreeSpec` tells. Private: ``torch.utils._pytree.tree_unflatten``."""
