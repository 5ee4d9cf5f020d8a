"""What a table of index and address pairs learns: address = base + stride · index."""

from collections.abc import Sequence


class Affine:
    """Base and stride of one load that follows indices, from the pairs that the program's loads show.

    Two pairs with different indices give a candidate; it is known once `confirmations` more pairs, of indices other than the one before, agree.
    A pair that disagrees starts the search anew.

    shifts_only: the stride must be a power of two, as IMP's shifter has it; rows of 96 bytes are then never found
    """

    def __init__(self, confirmations: int, shifts_only: bool = False) -> None:
        self._wanted = confirmations
        self._shifts_only = shifts_only
        self._last: tuple[int, int] | None = None
        self._stride: int | None = None
        self._base = 0
        self._agreed = 0

    @property
    def known(self) -> bool:
        return self._stride is not None and self._agreed >= self._wanted

    def address(self, index: int) -> int:
        """Where the load would go.  Only once the pattern is known."""
        assert self._stride is not None and self.known
        return self._base + self._stride * index

    def observe(self, indices: Sequence[int], addresses: Sequence[int]) -> None:
        if self.known:
            return
        for index, address in zip(indices, addresses, strict=True):
            if self._last is None:
                self._last = (index, address)
                continue
            step = index - self._last[0]
            if step == 0:
                continue
            if self._stride is not None and address == self._base + self._stride * index:
                self._agreed += 1
            else:
                self._propose(step, address - self._last[1], index, address)
            self._last = (index, address)

    def _propose(self, step: int, moved: int, index: int, address: int) -> None:
        stride, rest = divmod(moved, step)
        power = stride > 0 and stride & (stride - 1) == 0
        self._agreed = 0
        self._stride = stride if rest == 0 and (power or not self._shifts_only) else None
        self._base = address - stride * index
