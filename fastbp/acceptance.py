"""Whether a result is right: the one rule by which every candidate is accepted, and every rival called accurate.

What is found is compared with the same mathematics in float64 (``Exact``), beside the error that plain PyTorch makes in
the dtype of the result. At most twice that is allowed, and a rounding unit, in the RMS of the whole; and three times
the worst of PyTorch's in each row, each column and each number, so that a row that was not written and a single wrong
number are seen in millions that are right. NaN and infinities stand where those of float64, rounded to the dtype, or
PyTorch's own stand.

An error is taken in relation to what it is an error of: a row's by the RMS of that row, a column's by that of the
column, a number's by itself and what its row and column are like (the RMS of the one times that of the other, over that
of the whole). A number that is small by chance is not held to its own size, for what cancelled in it rounds as before.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

NUMBERS = 1 << 21  # in a block of rows: what is compared takes some 100 MB at a time, however large the results
PRIOR = 8  # numbers of average size that a row or a column counts beside its own: a short one is what others are like
# Nothing is wider than float64 to measure it by: a long sum in another order counts as right, in the whole and locally.
FLOAT64 = (2.0**-44, 2.0**-40)
TIMES = (2, 3, 3, 3)  # PyTorch's own errors, as KINDS; the largest of many is a matter of luck, the RMS of all is not
KINDS = ("whole", "row", "column", "number")


def rows_at_a_time(columns: int) -> int:
    """The rows of a block."""
    return max(1, NUMBERS // max(columns, 1))


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN, wherever it is allocated: what nobody writes is no right result of somebody else's."""
    fill, strict = torch.utils.deterministic, torch.are_deterministic_algorithms_enabled()
    before, warn_only = fill.fill_uninitialized_memory, torch.is_deterministic_algorithms_warn_only_enabled()  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    fill.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what has no deterministic algorithm, which nobody asks for
            yield
    finally:
        fill.fill_uninitialized_memory = before  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(strict, warn_only=warn_only)


def first_line(error: BaseException) -> str:
    """An exception in one line, for compilers and drivers write pages."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def rms_error(found: Tensor, exact: Tensor) -> float:
    """The RMS error over the RMS value, for a figure; infinite where it is no number, or not even the shape fits."""
    if found.shape != exact.shape:
        return math.inf
    error = ((found.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()).item()
    return math.inf if math.isnan(error) else error


class Originals:
    """The tensors of a call, to see whether somebody wrote over them; then they are as they were again."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.pairs = [(t.detach(), t.detach().clone()) for t in tensors]

    def overwritten(self) -> str | None:
        """Why a candidate is refused that wrote where it may only read, or None."""
        spoilt = [(t, original) for t, original in self.pairs if not torch.equal(t, original)]
        for t, original in spoilt:
            t.copy_(original)
        return f"it wrote over {_form(spoilt[0][0])}, which it may only read" if spoilt else None


class Errors(NamedTuple):
    """The relative errors of a result, the largest of each kind, and in which row or column that is."""

    largest: tuple[float, float, float, float]  # as KINDS
    row: int
    column: int
    row_of_number: int


class Beside(NamedTuple):
    """How far off results may be that are as right: each number, and the RMS of rows, columns and the whole."""

    numbers: Tensor
    rows: Tensor
    columns: Tensor
    whole: float

    @classmethod
    def of(cls, numbers: Tensor, blocks: Iterable[slice]) -> Beside:
        (m, n), device = numbers.shape, numbers.device
        rows, columns = (torch.zeros(size, dtype=torch.float64, device=device) for size in (m, n))
        for at in blocks:
            squares = numbers[at].double().square()
            rows[at] = squares.sum(1)
            columns += squares.sum(0)
        whole = math.sqrt(rows.sum().item() / max(m * n, 1))
        return cls(numbers, (rows / max(n, 1)).sqrt(), (columns / max(m, 1)).sqrt(), whole)


class Exact:
    """What a result should be, in float64: put in by blocks of rows, and kept as its rounding and the rest of it.

    Those two take as much memory as two results, where float64 itself would take four of a 16-bit dtype. Results are
    seen as matrices: vectors as one row, others as rows of their last size.
    """

    def __init__(self, like: Tensor, name: str = "the result") -> None:
        self.name, self.dtype, self.shape = name, like.dtype, like.shape
        columns = like.shape[-1] if like.dim() else 1
        size = (like.numel() // max(columns, 1), columns)
        self.rounded, self.rest = (torch.empty(size, dtype=like.dtype, device=like.device) for _ in range(2))
        self.beside: Beside | None = None

    def put(self, start: int, block: Tensor) -> None:
        """Rows of it, from ``start`` on."""
        block = block.detach().reshape(block.numel() // max(self.rounded.shape[1], 1), self.rounded.shape[1])
        for first in range(0, len(block), step := rows_at_a_time(block.shape[1])):
            part = block[first : first + step].double()
            at = slice(start + first, start + first + len(part))
            self.rounded[at] = part
            rest = part - self.rounded[at].double()
            # NaN for what is not finite in float64 either; nothing for what is beyond the dtype alone.
            self.rest[at] = torch.where(rest.isinf() & part.isfinite(), 0.0, rest)

    def allow(self, plain: Tensor, slack: float = 0.0, entered: float = 0.0, beside: Tensor | None = None) -> None:
        """Derive the bounds from plain PyTorch's result. Everything must have been put in.

        ``slack`` is what every error may be more. ``entered`` is the RMS of what a sum was made of where that may have
        cancelled: its error is in relation to it. ``beside`` is how far off each number of a result is that is as right
        as PyTorch's (``kinks``): so many times as PyTorch's own error that is no error. Of few numbers PyTorch's own
        error says little, for it may have been lucky in all of them, so more is allowed.
        """
        count, (m, n) = max(self.rounded.numel(), 1), self.rounded.shape
        device = self.rounded.device
        rows, columns = (torch.zeros(size, dtype=torch.float64, device=device) for size in (m, n))
        for at in self._blocks():
            squares = self.rounded[at].double().nan_to_num(0.0, 0.0, 0.0).square()
            rows[at] = squares.sum(1)
            columns += squares.sum(0)
        mean = max((rows.sum() / count).item(), entered**2)
        self.size, self.least = math.sqrt(mean), torch.finfo(self.dtype).tiny * torch.finfo(self.dtype).eps
        self.row_sizes = ((rows + PRIOR * mean) / (n + PRIOR)).sqrt().clamp(min=self.least)
        self.column_sizes = ((columns + PRIOR * mean) / (m + PRIOR)).sqrt().clamp(min=self.least)
        plain = self._matrix(plain)
        self.plain = None if self._finite_like(plain) else plain
        if beside is not None:
            self.beside = Beside.of(self._matrix(beside), self._blocks())
        own = self.errors(plain)
        eps = torch.finfo(self.dtype).eps
        spare = (FLOAT64[0], *[FLOAT64[1]] * 3) if self.dtype == torch.float64 else (eps,) * 4
        few = (8 / math.sqrt(count), *[32 / math.sqrt(count)] * 3)
        self.allowed = tuple(
            (1 + luck) * (times * error + unit) + slack
            for times, error, unit, luck in zip(TIMES, own.largest, spare, few, strict=True)
        )

    def refusal(self, found: Tensor) -> str | None:
        """Why a result is not accepted, or None: which bound it broke, and where, and what stands there."""
        if found.shape != self.shape or found.dtype != self.dtype:
            return f"{self.name} is {_form(found)}, where {_form(self)} is wanted"
        found = self._matrix(found)
        for at in self._blocks():
            wrong = self._misplaced(found[at], at)
            if wrong.any():
                row, column = divmod(int(wrong.flatten().nonzero()[0]), wrong.shape[1])
                return f"{self.name} has {self._instead(found, at.start + row, column)}"
        errors = self.errors(found)
        for kind, error, allowed in zip(KINDS, errors.largest, self.allowed, strict=True):
            if not error <= allowed:
                return self._words(found, errors, kind, error, allowed)
        return None

    def errors(self, found: Tensor) -> Errors:
        """The largest errors of a result of this shape, in relation to what they are errors of."""
        found = self._matrix(found)
        m, n = found.shape
        if not found.numel():
            return Errors((0.0, 0.0, 0.0, 0.0), 0, 0, 0)
        rows, numbers = (torch.zeros(m, dtype=torch.float64, device=found.device) for _ in range(2))
        columns = torch.zeros(n, dtype=torch.float64, device=found.device)
        for at in self._blocks():
            error = self._error(found[at], at)
            numbers[at] = self._relative(error, at).amax(1)
            squares = error.square_()
            rows[at] = squares.sum(1)
            columns += squares.sum(0)
        total, rows, columns = math.sqrt(rows.sum().item() / (m * n)), (rows / n).sqrt(), (columns / m).sqrt()
        if self.beside is not None:
            total = max(0.0, total - TIMES[0] * self.beside.whole)
            rows, columns = rows - TIMES[1] * self.beside.rows, columns - TIMES[2] * self.beside.columns
        whole = total / max(self.size, self.least)
        by_rows, by_columns = rows.clamp(min=0.0) / self.row_sizes, columns.clamp(min=0.0) / self.column_sizes
        largest = (whole, by_rows.max().item(), by_columns.max().item(), numbers.max().item())
        return Errors(largest, int(by_rows.argmax()), int(by_columns.argmax()), int(numbers.argmax()))

    def _matrix(self, found: Tensor) -> Tensor:
        return found.detach() if found.dim() == 2 else found.detach().reshape(self.rounded.shape)

    def _blocks(self) -> Iterator[slice]:
        m, n = self.rounded.shape
        for start in range(0, m, step := rows_at_a_time(n)):
            yield slice(start, min(start + step, m))

    def _error(self, found: Tensor, at: slice, columns: slice = slice(None)) -> Tensor:
        """|found − exact| in float64; nothing where either is not finite, and less than the dtype's least number."""
        exact = self.rounded[at, columns].double()
        limit = torch.finfo(self.dtype).max  # of what is beyond the dtype: as far as that goes
        error = found.double() - exact.clamp(-limit, limit) - self.rest[at, columns].double()
        return error.nan_to_num_(0.0, 0.0, 0.0).abs_().sub_(self.least).clamp_(min=0.0)

    def _relative(self, error: Tensor, at: slice) -> Tensor:
        """The error of each number in relation to what it is one of; one z beside a kink is seen in all of its row."""
        if self.beside is not None:
            error = error - TIMES[3] * (self.beside.numbers[at].double().abs() + self.beside.rows[at, None])
        return error.clamp(min=0.0) / self._sizes(at)

    def _sizes(self, at: slice) -> Tensor:
        """What the error of each number is in relation to."""
        sizes = self.rounded[at].double().nan_to_num(0.0, 0.0, 0.0).abs_()
        if self.size:
            sizes += self.row_sizes[at, None] * (self.column_sizes / self.size)
        return sizes.clamp_(min=self.least)

    def _finite_like(self, plain: Tensor) -> bool:
        """Whether plain PyTorch's NaN and infinities stand where those of float64, rounded, stand."""
        return not any((~plain[at].isfinite() & self.rounded[at].isfinite()).any() for at in self._blocks())

    def _misplaced(self, found: Tensor, at: slice) -> Tensor:
        """Where NaN or an infinity stands and should not, or does not and should."""
        rounded, rest = self.rounded[at], self.rest[at]
        fits = torch.where(found.isfinite(), ~rest.isnan(), _same(found, rounded))
        if self.plain is not None:  # an intermediate of PyTorch's overflowed
            fits |= ~found.isfinite() & _same(found, self.plain[at])
        return ~fits

    def _words(self, found: Tensor, errors: Errors, kind: str, error: float, allowed: float) -> str:
        """The bound that is broken, and the worst number of what broke it."""
        if kind == "column":
            each = slice(errors.column, errors.column + 1)
            row = int(torch.cat([self._error(found[at, each], at, each) for at in self._blocks()]).argmax())
            column = errors.column
        else:
            row = errors.row if kind == "row" else errors.row_of_number
            at = slice(row, row + 1)
            column = int(self._relative(self._error(found[at], at), at).argmax())
        of = {"row": f"row {row} of ", "column": f"column {column} of ", "number": "a number of "}.get(kind, "")
        return (
            f"error {error:.3g} against float64 of {of}{self.name}, where {allowed:.3g} is allowed: "
            f"{self._instead(found, row, column)}"
        )

    def _instead(self, found: Tensor, row: int, column: int) -> str:
        wanted = self.rounded[row, column].double() + self.rest[row, column].double().nan_to_num(0.0)
        return f"{found[row, column].item():.6g} at row {row}, column {column}, instead of {wanted.item():.6g}"


def _same(found: Tensor, wanted: Tensor) -> Tensor:
    return (found == wanted) | (found.isnan() & wanted.isnan())


def _form(of: Tensor | Exact) -> str:
    return f"{tuple(of.shape)} of {str(of.dtype).removeprefix('torch.')}"
