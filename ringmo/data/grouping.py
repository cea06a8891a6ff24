"""Rows of a table that belong together, by pairs of them."""

import numpy as np
from numpy.typing import NDArray

Index = NDArray[np.int64]
Flags = NDArray[np.bool_]


def join(group: Index, pairs: Index) -> tuple[Index, int]:
    """Groups (N,), numbered from 0, once those of each pair of rows are one; and how many fewer."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    a, b = group[pairs[:, 0]], group[pairs[:, 1]]
    apart = a != b
    if not apart.any():
        return group, 0
    before = int(group.max()) + 1
    ones = np.ones(int(apart.sum()), np.bool_)
    graph = coo_array((ones, (a[apart], b[apart])), shape=(before, before))
    after, labels = connected_components(graph, directed=False)
    return labels[group].astype(np.int64), before - int(after)


def links(classes: Index, pairs: Index, new: Flags) -> Index:
    """Pairs of rows that join what all pairs of the rows in those classes would join.

    Args:
        classes: of each row, 0 to n - 1; the rows of one belong together, if one of them is new.
        pairs: (M, 2) of classes; in one class of each pair is a new row.

    Returns:
        (N, 2), i < j, each pair once, one of the two new.
    """
    order = np.lexsort((~new, classes))
    head = order[np.flatnonzero(np.diff(classes[order], prepend=-1))]  # a new one, if there is any
    fresh = new[head]
    rest = np.ones(len(classes), np.bool_)
    rest[head] = False
    star = np.flatnonzero(rest & fresh[classes])
    links = [head[pairs], np.stack([head[classes[star]], star], axis=1)]
    # Rows of a class without a new one are joined by what is near to all of them.
    first, second = pairs.T
    partner = np.full(len(head), -1)
    for old, other in ((first, second), (second, first)):
        partner[old[~fresh[old]]] = other[~fresh[old]]
    stray = np.flatnonzero(rest & ~fresh[classes] & (partner[classes] >= 0))
    links.append(np.stack([head[partner[classes[stray]]], stray], axis=1))
    found = np.concatenate(links)
    return np.stack([found.min(axis=1), found.max(axis=1)], axis=1)


def stars(codes: Index) -> Index:
    """Pairs of rows that join all rows of a code; -1 is none."""
    rows = np.flatnonzero(codes >= 0)
    _, heads, inverse = np.unique(codes[rows], return_index=True, return_inverse=True)
    return np.stack([rows[heads[inverse]], rows], axis=1)


class Groups:
    """Union-find over numbers; one that was never joined is a group of its own."""

    def __init__(self) -> None:
        self._parent: dict[int, int] = {}

    def find(self, i: int) -> int:
        parent = self._parent
        while (above := parent.get(i, i)) != i:
            parent[i] = i = parent.get(above, above)
        return i

    def join(self, i: int, j: int) -> bool:
        """Whether the two were apart."""
        i, j = sorted((self.find(i), self.find(j)))
        if i == j:
            return False
        self._parent[j] = i
        return True
