"""The records of a set as serialized bytes in a few arrays, so that processes that are forked share them.

As dicts and lists, the records of COCO take gigabytes, and each loader process soon has a copy of its own: looking at
an object changes its reference count, and with it the page of memory that it lies in. Bytes in an array have no such
counts. A record is made when it is asked for.
"""

import pickle
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

Record = dict[str, Any]


class Packer:
    """Takes objects one by one and keeps their bytes in one growing buffer."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._ends = array("q", [0])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def add(self, content: Any) -> None:
        """Append an object that pickle knows."""
        self._bytes += pickle.dumps(content, protocol=5)
        self._ends.append(len(self._bytes))

    def packed(self) -> "Packed":
        """What was added, without a copy; nothing can be added any more."""
        return Packed(np.frombuffer(self._bytes, dtype=np.uint8), np.frombuffer(self._ends, dtype=np.int64))


class Packed:
    """Objects as bytes: number i lies at ends[i] … ends[i + 1] of ``content`` (uint8)."""

    def __init__(self, content: NDArray[np.uint8], ends: NDArray[np.int64]) -> None:
        self.content, self.ends = content, ends

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> Any:
        return pickle.loads(self.content[self.ends[index] : self.ends[index + 1]].data)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self.content.nbytes + self.ends.nbytes


class Records(Sequence[Record]):
    """The records of :mod:`mpformer.data.catalog`, made when they are asked for; a slice shares the bytes.

    heads: what a record has beside its annotations. marks: all annotations, of which those of image i are number
    ``order[first[i]]`` … ``order[first[i + 1] - 1]``; None: the heads are whole. An annotation is kept as the values of
    :data:`FIELDS`, None for one that it lacks.
    """

    def __init__(
        self,
        heads: Packed,
        marks: Packed | None = None,
        order: NDArray[np.int64] | None = None,
        first: NDArray[np.int64] | None = None,
        chosen: NDArray[np.int64] | None = None,
    ) -> None:
        self._heads, self._marks, self._order, self._first = heads, marks, order, first
        self._chosen = np.arange(len(heads)) if chosen is None else chosen

    def __len__(self) -> int:
        return len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> "Records": ...
    def __getitem__(self, index: int | slice) -> "Record | Records":
        if isinstance(index, slice):
            return self.only(range(len(self))[index])
        return self._whole(int(self._chosen[index]))

    def _whole(self, number: int) -> Record:
        record: Record = self._heads[number]
        if self._marks is None:
            return record
        assert self._first is not None
        assert self._order is not None
        mine = self._order[self._first[number] : self._first[number + 1]]
        return {**record, "annotations": [_mark(self._marks[int(index)]) for index in mine]}

    def heads(self) -> Iterator[Record]:
        """Yield the records, without their annotations if those are kept apart."""
        return (self._heads[int(number)] for number in self._chosen)

    def only(self, indices: Iterable[int]) -> "Records":
        """The records at some indices, in that order."""
        chosen = self._chosen[np.fromiter(indices, dtype=np.int64)]
        return Records(self._heads, self._marks, self._order, self._first, chosen)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        arrays = (self._order, self._first, self._chosen)
        packed = self._heads.nbytes + (self._marks.nbytes if self._marks is not None else 0)
        return packed + sum(found.nbytes for found in arrays if found is not None)


FIELDS = ("iscrowd", "bbox", "area", "category_id", "segmentation")
"""What is kept of an annotation; the names themselves would be a tenth of all bytes."""


def _mark(values: Sequence[Any]) -> Record:
    return {name: value for name, value in zip(FIELDS, values, strict=True) if value is not None}


def pack(records: Iterable[Record]) -> Records:
    """Pack records that are whole."""
    packer = Packer()
    for record in records:
        packer.add(record)
    return Records(packer.packed())


def grouped(heads: Packed, marks: Packed, image: Sequence[int]) -> Records:
    """Records with their annotations, of which number j belongs to image ``image[j]``; -1: to none that is there."""
    of = np.asarray(image, dtype=np.int64)
    order = np.argsort(of, kind="stable")
    order = order[np.count_nonzero(of < 0) :]
    first = np.searchsorted(of[order], np.arange(len(heads) + 1))
    return Records(heads, marks, order, first)
