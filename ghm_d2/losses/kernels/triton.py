"""CUDA kernels in Triton: a pass that counts and one that weights, each over all tensors at once.

Almost every logit of a detector belongs to a row without an object, so the hot pass knows no
labels: NEGATIVE treats every logit as a negative and skips the tiles that `flag_kernel` has marked,
those with a positive, an ignored or a dropped row. A second launch with labels takes only these;
where only a gradient is wanted, one launch has both kinds of code and a tile's mark chooses.
Dense targets, masks of single examples and box deltas have one launch for all tiles.

A tensor is cut into tiles of TILE elements and a program takes ITERATIONS of them, full ones
without masks; histograms stay in registers until a program ends. `TRITON_INTERPRET=1` runs the same
kernels on the CPU; the tests do. triton_launch.py calls them.
"""

import triton
import triton.language as tl

from .triton_examples import (
    CLASS,
    NEGATIVE,
    NOT_FINITE,
    SOFT,
    tile_examples,
    unit_region,
    width_of_delta,
)

# Which tiles a launch takes, by the marks of `flag_kernel`.
ALL = tl.constexpr(0)  # without marks
PLAIN = tl.constexpr(1)  # those where every row is background that counts
OTHER = tl.constexpr(2)  # the rest
EITHER = tl.constexpr(3)  # all, the plain ones as negatives


@triton.jit
def _tensor(
    xs, ys, ws, outs, sizes, ITERATIONS: tl.constexpr, TILE: tl.constexpr, LEVELS: tl.constexpr
):  # fmt: skip
    """What this program works on: pointers, size, number of the tensor, first tiles of it."""
    program = tl.program_id(0)
    x_ptr, y_ptr, w_ptr, out_ptr = xs[0], ys[0], ws[0], outs[0]
    size, level, first = _size(sizes[0]), 0, 0
    tiles_before = 0
    next_first, next_tiles = 0, 0
    for i in tl.static_range(LEVELS):
        first_here, tiles_here = next_first, next_tiles
        tiles = tl.cdiv(_size(sizes[i]), TILE).to(tl.int32)
        next_first += tl.cdiv(tiles, ITERATIONS)
        next_tiles += tiles
        if i > 0:
            here = program >= first_here
            x_ptr = tl.where(here, xs[i], x_ptr)
            y_ptr = tl.where(here, ys[i], y_ptr)
            w_ptr = tl.where(here, ws[i], w_ptr)
            out_ptr = tl.where(here, outs[i], out_ptr)
            size = tl.where(here, _size(sizes[i]), size)
            level = tl.where(here, i, level)
            first = tl.where(here, first_here, first)
            tiles_before = tl.where(here, tiles_here, tiles_before)
    begin = (program - first) * ITERATIONS
    return x_ptr, y_ptr, w_ptr, out_ptr, size, level, begin, tiles_before


@triton.jit
def _size(odd):
    # Triton compiles anew for a number that 16 divides and for 1; triton_launch.py passes 2n + 3.
    return (odd - 3) // 2


@triton.jit
def _count_tile(
    x, y_ptr, w_ptr, mu, bits_ptr, start, i, inside,
    KIND: tl.constexpr, COLUMNS: tl.constexpr, IGNORED: tl.constexpr, WEIGHTED: tl.constexpr,
    MASKED: tl.constexpr, BINS: tl.constexpr, FLOOR_IS_EXACT: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    norm, _, _, counts, bad = tile_examples(
        x, y_ptr, w_ptr, mu, start, i, inside, KIND, COLUMNS, IGNORED, WEIGHTED, MASKED
    )
    region = unit_region(norm, BINS, FLOOR_IS_EXACT)
    if MASKED or WEIGHTED or KIND == CLASS or KIND == SOFT:
        region = tl.where(counts & inside, region, WIDTH - 1)  # a place that nobody reads
    if WEIGHTED or KIND == CLASS or KIND == SOFT:
        if tl.max(bad, axis=0) != 0:
            for bit in tl.static_range(4):
                found = tl.max(bad & (1 << bit), axis=0)
                tl.atomic_or(bits_ptr, found.to(tl.int64))
    return tl.histogram(region, WIDTH)


@triton.jit
def count_kernel(
    xs, ys, ws, mu_ptr, marks_ptr, counts_ptr, bits_ptr, sizes,
    KIND: tl.constexpr, COLUMNS: tl.constexpr, IGNORED: tl.constexpr, WEIGHTED: tl.constexpr,
    TILES: tl.constexpr, MU: tl.constexpr, BINS: tl.constexpr, FLOOR_IS_EXACT: tl.constexpr,
    WIDTH: tl.constexpr, ITERATIONS: tl.constexpr, TILE: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Adds to `counts` (LEVELS, BINS) the number of examples in each unit region."""
    x_ptr, y_ptr, w_ptr, _, size, level, begin, before = _tensor(
        xs, ys, ws, xs, sizes, ITERATIONS, TILE, LEVELS
    )
    mu = width_of_delta(mu_ptr, MU)
    i = tl.arange(0, TILE)
    total = tl.zeros([WIDTH], dtype=tl.int32)
    full = (size // TILE).to(tl.int32)
    tile = begin
    while tile < tl.minimum(begin + ITERATIONS, full):
        start = tl.cast(tile, tl.int64) * TILE
        x = tl.load(x_ptr + start + i)
        if TILES == ALL or tl.load(marks_ptr + before + tile) == TILES - PLAIN:
            total += _count_tile(
                x, y_ptr, w_ptr, mu, bits_ptr, start, i, i < TILE, KIND, COLUMNS, IGNORED, WEIGHTED,
                False, BINS, FLOOR_IS_EXACT, WIDTH,
            )  # fmt: skip
        tile += 1
    if (begin <= full) & (full < begin + ITERATIONS) & (full.to(tl.int64) * TILE < size):
        if TILES == ALL or tl.load(marks_ptr + before + full) == TILES - PLAIN:
            start = full.to(tl.int64) * TILE
            inside = i < size - start
            x = tl.load(x_ptr + start + i, mask=inside, other=0.0)
            total += _count_tile(
                x, y_ptr, w_ptr, mu, bits_ptr, start, i, inside, KIND, COLUMNS, IGNORED, WEIGHTED,
                True, BINS, FLOOR_IS_EXACT, WIDTH,
            )  # fmt: skip
    place = tl.arange(0, WIDTH)
    tl.atomic_add(
        counts_ptr + level * BINS + place, total.to(tl.int64), mask=(place < BINS) & (total > 0)
    )


@triton.jit
def _weigh_tile(
    x, y_ptr, w_ptr, mu, weights_ptr, factor, start, i, inside, negative,
    KIND: tl.constexpr, COLUMNS: tl.constexpr, IGNORED: tl.constexpr, WEIGHTED: tl.constexpr,
    MASKED: tl.constexpr, BINS: tl.constexpr, FLOOR_IS_EXACT: tl.constexpr,
):  # fmt: skip
    """(weighted loss, weighted slope) of one tile; `negative`: whether it holds negatives alone."""
    if negative:
        norm, loss, slope, counts, bad = tile_examples(
            x, y_ptr, w_ptr, mu, start, i, inside, NEGATIVE, 1, None, 0, MASKED
        )
    else:
        norm, loss, slope, counts, bad = tile_examples(
            x, y_ptr, w_ptr, mu, start, i, inside, KIND, COLUMNS, IGNORED, WEIGHTED, MASKED
        )
    weight = tl.load(weights_ptr + unit_region(norm, BINS, FLOOR_IS_EXACT)) * factor
    if MASKED or WEIGHTED or KIND == CLASS or KIND == SOFT:
        weight = tl.where(counts & inside, weight, 0.0)
    return weight * loss, weight * slope


@triton.jit
def loss_kernel(
    xs, ys, ws, mu_ptr, outs, marks_ptr, weights_ptr, factor_ptr, partial_ptr, sizes, row_stride,
    KIND: tl.constexpr, COLUMNS: tl.constexpr, IGNORED: tl.constexpr, WEIGHTED: tl.constexpr,
    TILES: tl.constexpr, MU: tl.constexpr, BINS: tl.constexpr, FLOOR_IS_EXACT: tl.constexpr,
    LOSS: tl.constexpr, GRADIENT: tl.constexpr, ITERATIONS: tl.constexpr, TILE: tl.constexpr,
    LEVELS: tl.constexpr,
):  # fmt: skip
    """The sum of each program's weighted losses (LOSS), the gradient of each example (GRADIENT).

    Without LOSS, the gradient has the factor at `factor_ptr` in its weights.
    """
    x_ptr, y_ptr, w_ptr, out_ptr, size, level, begin, before = _tensor(
        xs, ys, ws, outs, sizes, ITERATIONS, TILE, LEVELS
    )
    weights_ptr += level * row_stride
    mu = width_of_delta(mu_ptr, MU)
    factor = 1.0
    if not LOSS:
        factor = tl.load(factor_ptr)
    i = tl.arange(0, TILE)
    total = tl.zeros([TILE], dtype=tl.float32)
    full = (size // TILE).to(tl.int32)
    tile = begin
    while tile < tl.minimum(begin + ITERATIONS, full):
        start = tl.cast(tile, tl.int64) * TILE
        x = tl.load(x_ptr + start + i)
        mark = tl.load(marks_ptr + before + tile) if TILES != ALL else 0
        if TILES == ALL or TILES == EITHER or mark == TILES - PLAIN:
            loss, gradient = _weigh_tile(
                x, y_ptr, w_ptr, mu, weights_ptr, factor, start, i, i < TILE,
                mark == 0 if TILES == EITHER else False, KIND, COLUMNS, IGNORED, WEIGHTED, False,
                BINS, FLOOR_IS_EXACT,
            )  # fmt: skip
            if LOSS:
                total += loss
            if GRADIENT:
                tl.store(out_ptr + start + i, gradient.to(out_ptr.dtype.element_ty))
        tile += 1
    if (begin <= full) & (full < begin + ITERATIONS) & (full.to(tl.int64) * TILE < size):
        mark = tl.load(marks_ptr + before + full) if TILES != ALL else 0
        if TILES == ALL or TILES == EITHER or mark == TILES - PLAIN:
            start = full.to(tl.int64) * TILE
            inside = i < size - start
            x = tl.load(x_ptr + start + i, mask=inside, other=0.0)
            loss, gradient = _weigh_tile(
                x, y_ptr, w_ptr, mu, weights_ptr, factor, start, i, inside,
                mark == 0 if TILES == EITHER else False, KIND, COLUMNS, IGNORED, WEIGHTED, True,
                BINS, FLOOR_IS_EXACT,
            )  # fmt: skip
            if LOSS:
                total += loss
            if GRADIENT:
                gradient = gradient.to(out_ptr.dtype.element_ty)
                tl.store(out_ptr + start + i, gradient, mask=inside)
    if LOSS:
        tl.store(partial_ptr + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit
def flag_kernel(
    ys, ws, marks_ptr, sizes, COLUMNS: tl.constexpr, WEIGHTED: tl.constexpr, TILE: tl.constexpr,
    ROWS: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Marks each tile with 1 where a row of it is anything but background that counts, else 0."""
    _, y_ptr, w_ptr, _, size, _, tile, before = _tensor(ys, ys, ws, ys, sizes, 1, TILE, LEVELS)
    start = tl.cast(tile, tl.int64) * TILE
    first = start // COLUMNS
    last = (tl.minimum(start + TILE, size) - 1) // COLUMNS
    row = tl.arange(0, ROWS)
    inside = row <= last - first
    other = tl.load(y_ptr + first + row, mask=inside, other=COLUMNS) != COLUMNS
    if WEIGHTED:
        weight = tl.load(w_ptr + first + row, mask=inside, other=1).to(tl.float32)
        other = other | ((weight > 0) == 0)
    tl.store(marks_ptr + before + tile, tl.max(other.to(tl.int32), axis=0).to(tl.int8))


@triton.jit
def walk_kernel(
    counts_ptr, acc_ptr, updates_ptr, weights_ptr, new_acc_ptr, new_updates_ptr, levels,
    KEPT: tl.constexpr, LOG_MOMENTUM: tl.constexpr, ADDED: tl.constexpr, CORRECTED: tl.constexpr,
    DECAY: tl.constexpr, VALID: tl.constexpr, BINS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """functional.walk in one program; to be compiled without fused multiply-adds."""
    j = tl.arange(0, WIDTH)
    inside = j < BINS
    acc = tl.load(acc_ptr + j, mask=inside, other=0.0)
    added = tl.full((), ADDED, tl.float64)
    if CORRECTED:
        updates = tl.load(updates_ptr + j, mask=inside, other=0)
    level = 0
    while level < levels:
        counts = tl.load(counts_ptr + level * BINS + j, mask=inside, other=0)
        filled = counts > 0
        number = tl.sum(filled.to(tl.int32), axis=0)
        updated = inside & (number > 0) if DECAY else filled
        share = (counts.to(tl.float64) * added).to(tl.float32)
        acc = tl.where(updated, acc * KEPT + share, acc)
        mean = acc
        if CORRECTED:
            updates += updated.to(tl.int64)
            # momentum ** updates; updates are above 0 wherever the result is used
            power = tl.exp(updates.to(tl.float64) * tl.full((), LOG_MOMENTUM, tl.float64))
            mean = (acc.to(tl.float64) / (1.0 - power)).to(tl.float32)
        divisor = (number if VALID else BINS).to(tl.float32) if VALID else BINS * 1.0
        weight = tl.where(filled, tl.div_rn(1.0 + 0.0 * mean, mean * divisor), 0.0)
        tl.store(weights_ptr + level * BINS + j, weight, mask=inside)
        level += 1
    tl.store(new_acc_ptr + j, acc, mask=inside)
    if CORRECTED:
        tl.store(new_updates_ptr + j, updates, mask=inside)


@triton.jit
def finish_kernel(
    partial_ptr, number, bits_ptr, failed_ptr, loss_ptr, new_acc_ptr, acc_ptr, new_updates_ptr,
    updates_ptr, WRITES: tl.constexpr, CORRECTED: tl.constexpr, BINS: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds up the loss, NaN if anything was refused; otherwise keeps the new buffers."""
    i = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    start = 0
    while start < number:
        total += tl.load(partial_ptr + start + i, mask=start + i < number, other=0.0)
        start += BLOCK
    loss = tl.sum(total, axis=0)
    bits = tl.load(bits_ptr)
    bits |= tl.where(tl.abs(loss) < float("inf"), 0, NOT_FINITE)
    holds = bits == 0
    tl.store(failed_ptr, tl.load(failed_ptr) | bits)
    tl.store(loss_ptr, tl.where(holds, loss, float("nan")))
    if WRITES:
        j = tl.arange(0, WIDTH)
        mask = (j < BINS) & holds
        tl.store(acc_ptr + j, tl.load(new_acc_ptr + j, mask=mask), mask=mask)
        if CORRECTED:
            tl.store(updates_ptr + j, tl.load(new_updates_ptr + j, mask=mask), mask=mask)


@triton.jit
def scale_kernel(
    outs, factor_ptr, sizes, ITERATIONS: tl.constexpr, TILE: tl.constexpr, LEVELS: tl.constexpr
):  # fmt: skip
    """Multiplies by the factor, in place; does nothing where it is 1, as without a loss scale."""
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        out_ptr, _, _, _, size, _, begin, _ = _tensor(
            outs, outs, outs, outs, sizes, ITERATIONS, TILE, LEVELS
        )
        i = tl.arange(0, TILE)
        full = (size // TILE).to(tl.int32)
        tile = begin
        while tile < tl.minimum(begin + ITERATIONS, full):
            place = out_ptr + tl.cast(tile, tl.int64) * TILE + i
            tl.store(place, tl.load(place) * factor)
            tile += 1
        if (begin <= full) & (full < begin + ITERATIONS):
            place = out_ptr + full.to(tl.int64) * TILE + i
            inside = i < size - full.to(tl.int64) * TILE
            tl.store(place, tl.load(place, mask=inside, other=0.0) * factor, mask=inside)
