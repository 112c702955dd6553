"""Copies of a state in host memory: shared storages once, views compactly, in buffers that stay warm."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from danling_core.checkpoints.plain import to_plain


class _Place(int):
    """Stands for a tensor of the state: its index among the tensors."""


class _Geometry(NamedTuple):
    """Form of a buffer: tensors of one geometry can take each other's buffer."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    pinned: bool


class _Source(NamedTuple):
    """Memory of the state to be copied, and the tensors of the state that lie in it."""

    tensor: Tensor
    geometry: _Geometry
    places: tuple[int, ...]
    begin: int | None  # element of the storage where a span of overlapping views begins; None: one tensor


@dataclass(frozen=True)
class FlatState:
    """A state taken apart: a plain tree with placeholders, its tensors, and the memory that they cover."""

    tree: Any
    tensors: list[Tensor]
    sources: list[_Source]
    size: int

    @classmethod
    def of(cls, state: Any) -> FlatState:
        """Copy the containers of `state`, not its tensors. CheckpointError names what cannot be saved."""
        tensors: list[Tensor] = []

        def place(tensor: Tensor) -> _Place:
            tensors.append(tensor)
            return _Place(len(tensors) - 1)

        tree = to_plain(state, place)
        sources = _sources(tensors)
        return cls(tree, tensors, sources, sum(_nbytes(source.geometry) for source in sources))


class Staging:
    """Host buffers for one snapshot, kept warm from one to the next (a fresh page costs about three copies).

    Tensors from a CUDA device go into pinned buffers by a side stream: the caller returns at once, its stream
    waits for the copy on the device, and `wait` blocks until the buffers hold the state.
    """

    def __init__(self) -> None:
        self._buffers: dict[_Geometry, list[Tensor]] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._events: list[torch.cuda.Event] = []

    @property
    def size(self) -> int:
        """Return bytes of all buffers."""
        return sum(_nbytes(geometry) * len(buffers) for geometry, buffers in self._buffers.items())

    @torch.no_grad()
    def copy(self, flat: FlatState) -> Any:
        """Return the state of `flat` with its tensors in this staging; it is overwritten by the next call."""
        buffers = self._reserve([source.geometry for source in flat.sources])
        staged: list[Tensor] = [torch.empty(0)] * len(flat.tensors)
        on_cuda: dict[torch.device, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for source, buffer in zip(flat.sources, buffers, strict=True):
            if source.tensor.layout is not torch.strided:
                buffer = source.tensor.to("cpu", copy=True)
            elif source.tensor.is_cuda:
                on_cuda[source.tensor.device].append((buffer, source.tensor))
            else:
                buffer.copy_(source.tensor)
            for place in source.places:
                staged[place] = (
                    buffer if source.begin is None else _view(buffer, flat.tensors[place], source.begin)
                )
        self._events = [self._copy_from(device, pairs) for device, pairs in on_cuda.items()]
        return _fill(flat.tree, staged)

    def wait(self) -> None:
        """Block until the last `copy` has landed. For the thread that writes."""
        for event in self._events:
            event.synchronize()
        self._events = []

    def _reserve(self, geometries: Sequence[_Geometry]) -> list[Tensor]:
        """Return a buffer for each geometry, old ones first; what is not needed is freed before any is allocated."""
        needed = Counter(geometries)
        kept = {geometry: self._buffers.get(geometry, [])[:count] for geometry, count in needed.items()}
        self._buffers = kept
        for geometry, count in needed.items():
            kept[geometry] += [_allocate(geometry) for _ in range(count - len(kept[geometry]))]
        handed = {geometry: iter(buffers) for geometry, buffers in kept.items()}
        return [next(handed[geometry]) for geometry in geometries]

    def _copy_from(self, device: torch.device, pairs: Sequence[tuple[Tensor, Tensor]]) -> torch.cuda.Event:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        side, current = self._streams[device], torch.cuda.current_stream(device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for buffer, source in pairs:
                buffer.copy_(source, non_blocking=True)
            done = torch.cuda.Event()
            done.record(side)
        # The next step changes the weights in place, and may reuse freed memory: not before they are copied.
        current.wait_event(done)
        return done


def compact(state: Any) -> Any:
    """Return `state` in plain containers, on the CPU, without holes; copied only if some tensor needs it."""
    flat = FlatState.of(state)
    storages = {
        source.tensor.untyped_storage().data_ptr() for source in flat.sources if _is_dense_host(source)
    }
    if len(storages) == len(flat.sources):
        return _fill(flat.tree, flat.tensors)
    staging = Staging()
    tree = staging.copy(flat)
    staging.wait()
    return tree


def _sources(tensors: Sequence[Tensor]) -> list[_Source]:
    by_storage: dict[Any, list[int]] = defaultdict(list)
    for index, tensor in enumerate(tensors):
        by_storage[_storage_key(tensor, index)].append(index)
    sources: list[_Source] = []
    for places in by_storage.values():
        if len(places) == 1:
            sources.append(_whole(tensors[places[0]], tuple(places)))
        else:
            sources += _shared(tensors, places)
    return sources


def _storage_key(tensor: Tensor, index: int) -> Any:
    """Equal for tensors that may share memory."""
    if tensor.layout is not torch.strided or tensor.numel() == 0:
        return index
    # torch.save refuses one storage seen as two types: those are saved apart.
    return tensor.device, tensor.dtype, tensor.untyped_storage().data_ptr()


def _shared(tensors: Sequence[Tensor], places: Sequence[int]) -> list[_Source]:
    """Return tensors of one storage: those that overlap stay together, those apart are copied on their own."""
    ordered = sorted(places, key=lambda place: _span(tensors[place]))
    clusters: list[tuple[list[int], int]] = []
    for place in ordered:
        begin, end = _span(tensors[place])
        if clusters and begin < clusters[-1][1]:
            clusters[-1] = ([*clusters[-1][0], place], max(end, clusters[-1][1]))
        else:
            clusters.append(([place], end))
    return [source for members, end in clusters for source in _cluster(tensors, members, end)]


def _cluster(tensors: Sequence[Tensor], places: list[int], end: int) -> list[_Source]:
    """Return overlapping tensors as one span, so that they overlap again; apart where the span is mostly holes."""
    alike: dict[Any, list[int]] = defaultdict(list)
    for place in places:
        alike[_exact_place(tensors[place])].append(place)
    first = tensors[places[0]]
    begin = _span(first)[0]
    if len(alike) == 1 or end - begin > sum(tensors[same[0]].numel() for same in alike.values()):
        return [_whole(tensors[same[0]], tuple(same)) for same in alike.values()]
    memory = torch.empty(0, dtype=first.dtype, device=first.device)
    memory.set_(first.untyped_storage(), begin, (end - begin,), (1,))
    return [_Source(memory, _geometry(memory), tuple(places), begin)]


def _exact_place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return the elements of its storage from the first to the last that a strided tensor has, the end exclusive."""
    begin = int(tensor.storage_offset())
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + last + 1


def _whole(tensor: Tensor, places: tuple[int, ...]) -> _Source:
    return _Source(tensor, _geometry(tensor), places, None)


def _geometry(tensor: Tensor) -> _Geometry:
    """Return the tensor's own strides where they leave no holes (channels_last, say), else contiguous ones."""
    if tensor.layout is not torch.strided:
        return _Geometry((0,), (1,), tensor.dtype, False)
    stride = tensor.stride() if tensor.is_contiguous() else torch.empty_like(tensor, device="meta").stride()
    return _Geometry(tuple(tensor.shape), stride, tensor.dtype, tensor.is_cuda)


def _allocate(geometry: _Geometry) -> Tensor:
    return torch.empty_strided(
        geometry.size, geometry.stride, dtype=geometry.dtype, device="cpu", pin_memory=geometry.pinned
    )


def _nbytes(geometry: _Geometry) -> int:
    elements = 1
    for size in geometry.size:
        elements *= size
    return elements * geometry.dtype.itemsize


def _view(buffer: Tensor, like: Tensor, begin: int) -> Tensor:
    """Return the part of a staged span that holds `like`."""
    offset = int(like.storage_offset()) - begin
    return torch.empty(0, dtype=like.dtype).set_(buffer.untyped_storage(), offset, like.shape, like.stride())


def _is_dense_host(source: _Source) -> bool:
    """Return whether one tensor in host memory fills its whole storage."""
    tensor = source.tensor
    if tensor.device.type != "cpu" or tensor.layout is not torch.strided or source.begin is not None:
        return False
    return tensor.numel() > 0 and tensor.nbytes == tensor.untyped_storage().nbytes()


def _fill(tree: Any, tensors: Sequence[Tensor]) -> Any:
    """Return the tree with its placeholders replaced, dicts and lists in place."""
    kind = type(tree)
    if kind is _Place:
        return tensors[tree]
    if isinstance(tree, dict):
        for key, value in tree.items():
            tree[key] = _fill(value, tensors)
    elif kind is list:
        tree[:] = [_fill(value, tensors) for value in tree]
    elif kind is tuple:
        return tuple(_fill(value, tensors) for value in tree)
    return tree
