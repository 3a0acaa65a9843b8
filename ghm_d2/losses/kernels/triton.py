"""CUDA kernels in Triton: a pass that counts and one that weights, each over all tensors at once.

Almost every logit of a detector belongs to a row without an object, so the hot pass knows no
labels: NEGATIVE reads every logit as one and skips the tiles that `flag_kernel` has marked, those
with a positive, an ignored or a dropped row. A second launch with labels takes these alone. Dense
targets, masks of single examples and box deltas have one launch for all tiles.

A tensor is cut into tiles of TILE elements and a program takes ITERATIONS of them, full ones
without masks; histograms stay in registers until a program ends. `TRITON_INTERPRET=1` runs the same
kernels on the CPU; the tests do. triton_launch.py calls them.
"""

import triton
import triton.language as tl

__all__ = ["count_kernel", "finish_kernel", "flag_kernel", "loss_kernel", "scale_kernel"]
__all__ += ["CLASS", "DELTA", "NEGATIVE", "SOFT", "walk_kernel"]

# What a tile's targets are.
NEGATIVE = tl.constexpr(0)  # none: every logit is a negative
CLASS = tl.constexpr(1)  # an integer label for each row
SOFT = tl.constexpr(2)  # a target in [0, 1] for each logit
DELTA = tl.constexpr(3)  # box deltas
# The bits of what was refused.
_BAD_LABEL, _BAD_WEIGHT, _NOT_FINITE = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)
_BAD_TARGET = tl.constexpr(8)
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _decay(x):
    """exp(-|x|)."""
    if _INTERPRETED:
        return tl.exp(-tl.abs(x))
    else:  # tl.exp looks after denormal numbers and tl.abs takes an instruction of its own
        return tl.inline_asm_elementwise(
            """{
            .reg .f32 t;
            abs.ftz.f32 t, $1;
            mul.ftz.f32 t, t, 0fBFB8AA3B;
            ex2.approx.ftz.f32 $0, t;
            }""",
            "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def _reciprocal(x):
    if _INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _rsqrt(x):
    if _INTERPRETED:
        return 1.0 / tl.sqrt(x)
    else:
        return tl.inline_asm_elementwise(
            "rsqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _log1p(e):
    # e = exp(-|x|) in [0, 1]: a polynomial for log(1 + e) / e, right to 4e-7 of it in float32, also
    # where e is tiny and 1 + e would keep nothing of it.
    y = -0.00853920727968216
    y = y * e + 0.04408964142203331
    y = y * e - 0.1076817512512207
    y = y * e + 0.1774524599313736
    y = y * e - 0.2449546605348587
    y = y * e + 0.33275479078292847
    y = y * e - 0.4999740421772003
    y = y * e + 0.9999998211860657
    return y * e


@triton.jit
def _sigmoid(x):
    """exp(-|x|), sigmoid(x), and 1 - sigmoid(x) without cancellation."""
    e = _decay(x)
    r = _reciprocal(1.0 + e)
    return e, tl.where(x >= 0, r, e * r), tl.where(x >= 0, e * r, r)


@triton.jit
def _region(norm, BINS: tl.constexpr, FLOOR_IS_EXACT: tl.constexpr):
    """The unit region of each norm, by the same float32 edges j / M as everywhere."""
    if FLOOR_IS_EXACT:
        region = (norm * BINS).to(tl.int32)
    else:
        # The nearest edge, and the region on the norm's side of it.
        region = (norm * BINS + 0.5).to(tl.int32)
        number = region.to(tl.float32)
        if _INTERPRETED:
            edge = number / BINS
        else:  # what a division rounds to, without its subroutine
            quotient = number * (1.0 / BINS)
            edge = tl.fma(tl.fma(quotient, -1.0 * BINS, number), 1.0 / BINS, quotient)
        region -= (norm < edge).to(tl.int32)
    # Unsigned, so that whatever a NaN becomes is a region too.
    return tl.minimum(region.to(tl.uint32, bitcast=True), BINS - 1).to(tl.int32)


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
def _mu(mu_ptr, MU: tl.constexpr):
    """The width of the quadratic part of deltas: MU, or where MU is None what the device holds."""
    if MU is None:
        return tl.load(mu_ptr)
    else:
        return MU


@triton.jit
def _examples(
    x, y_ptr, w_ptr, mu, start, i, inside,
    KIND: tl.constexpr, COLUMNS: tl.constexpr, IGNORED: tl.constexpr, WEIGHTED: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """(norm, loss, slope, what counts, what is refused) of one tile; the fourth is 1 for all."""
    x = x.to(tl.float32)
    counts = inside
    bad = tl.zeros_like(i)
    row_before = start // COLUMNS
    local = (start - row_before * COLUMNS).to(tl.int32) + i
    row = local // COLUMNS
    if WEIGHTED == 1:
        w = tl.load(w_ptr + row_before + row, mask=inside, other=0).to(tl.float32)
    elif WEIGHTED == 2:
        w = tl.load(w_ptr + start + i, mask=inside, other=0).to(tl.float32)
    if WEIGHTED:
        bad = tl.where(w >= 0, 0, _BAD_WEIGHT)
        counts = inside & (w > 0)
    if KIND == NEGATIVE:
        e, norm, _ = _sigmoid(x)
        loss = tl.maximum(x, 0.0) + _log1p(e)
        slope = norm
    elif KIND == CLASS:
        label = tl.load(y_ptr + row_before + row, mask=inside, other=0)
        ignored = label == IGNORED
        good = ((label >= 0) & (label <= COLUMNS)) | ignored
        bad |= tl.where(good, 0, _BAD_LABEL)
        counts = counts & (ignored == 0)
        positive = label == local - row * COLUMNS
        z = tl.where(counts, tl.where(positive, -x, x), 0.0)
        e, norm, _ = _sigmoid(z)
        loss = tl.maximum(z, 0.0) + _log1p(e)
        slope = tl.where(positive, -norm, norm)
    elif KIND == SOFT:
        target = tl.load(y_ptr + start + i, mask=inside, other=0)
        t = target.to(tl.float32)
        if IGNORED is not None:
            counts = counts & (target != IGNORED)
            t = tl.where(target != IGNORED, t, 0.0)
        bad |= tl.where((t >= 0) & (t <= 1), 0, _BAD_TARGET)
        x = tl.where(counts, x, 0.0)
        e, p, q = _sigmoid(x)
        # p - t, and the loss, without a difference of large numbers.
        slope = p * (1.0 - t) - q * t
        norm = tl.minimum(tl.abs(slope), 1.0)
        loss = _log1p(e)
        loss += tl.where(x > 0, x * (1.0 - t), 0.0) + tl.where(x < 0, -x * t, 0.0)
        loss = tl.where(x == x, loss, x)
    else:
        y = (
            tl.load(y_ptr + start + i, mask=inside, other=0.0)
            if MASKED
            else tl.load(y_ptr + start + i)
        )
        d = x - y.to(tl.float32)
        if WEIGHTED:
            d = tl.where(counts, d, 0.0)
        square = d * d + mu * mu
        inverse = _rsqrt(square)
        slope = d * inverse
        norm = tl.minimum(tl.abs(slope), 1.0)
        loss = d * d * _reciprocal(square * inverse + mu)
    return norm, loss, slope, counts, bad


@triton.jit
def _count_tile(
    x, y_ptr, w_ptr, mu, bits_ptr, start, i, inside,
    KIND: tl.constexpr, COLUMNS: tl.constexpr, IGNORED: tl.constexpr, WEIGHTED: tl.constexpr,
    MASKED: tl.constexpr, BINS: tl.constexpr, FLOOR_IS_EXACT: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    norm, _, _, counts, bad = _examples(
        x, y_ptr, w_ptr, mu, start, i, inside, KIND, COLUMNS, IGNORED, WEIGHTED, MASKED
    )
    region = _region(norm, BINS, FLOOR_IS_EXACT)
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
    MARKED: tl.constexpr, MU: tl.constexpr, BINS: tl.constexpr, FLOOR_IS_EXACT: tl.constexpr,
    WIDTH: tl.constexpr, ITERATIONS: tl.constexpr, TILE: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Adds to `counts` (LEVELS, BINS) the number of examples in each unit region.

    MARKED: 0 takes every tile, else those whose mark is MARKED - 1.
    """
    x_ptr, y_ptr, w_ptr, _, size, level, begin, before = _tensor(
        xs, ys, ws, xs, sizes, ITERATIONS, TILE, LEVELS
    )
    mu = _mu(mu_ptr, MU)
    i = tl.arange(0, TILE)
    total = tl.zeros([WIDTH], dtype=tl.int32)
    full = (size // TILE).to(tl.int32)
    tile = begin
    while tile < tl.minimum(begin + ITERATIONS, full):
        start = tl.cast(tile, tl.int64) * TILE
        x = tl.load(x_ptr + start + i)
        if MARKED == 0 or tl.load(marks_ptr + before + tile) == MARKED - 1:
            total += _count_tile(
                x, y_ptr, w_ptr, mu, bits_ptr, start, i, i < TILE, KIND, COLUMNS, IGNORED, WEIGHTED,
                False, BINS, FLOOR_IS_EXACT, WIDTH,
            )  # fmt: skip
        tile += 1
    if (begin <= full) & (full < begin + ITERATIONS) & (full.to(tl.int64) * TILE < size):
        if MARKED == 0 or tl.load(marks_ptr + before + full) == MARKED - 1:
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
    x, y_ptr, w_ptr, mu, weights_ptr, factor, start, i, inside,
    KIND: tl.constexpr, COLUMNS: tl.constexpr, IGNORED: tl.constexpr, WEIGHTED: tl.constexpr,
    MASKED: tl.constexpr, BINS: tl.constexpr, FLOOR_IS_EXACT: tl.constexpr,
):  # fmt: skip
    """(weighted loss, weighted slope) of one tile."""
    norm, loss, slope, counts, _ = _examples(
        x, y_ptr, w_ptr, mu, start, i, inside, KIND, COLUMNS, IGNORED, WEIGHTED, MASKED
    )
    weight = tl.load(weights_ptr + _region(norm, BINS, FLOOR_IS_EXACT)) * factor
    if MASKED or WEIGHTED or KIND == CLASS or KIND == SOFT:
        weight = tl.where(counts & inside, weight, 0.0)
    return weight * loss, weight * slope


@triton.jit
def loss_kernel(
    xs, ys, ws, mu_ptr, outs, marks_ptr, weights_ptr, factor_ptr, partial_ptr, sizes, row_stride,
    KIND: tl.constexpr, COLUMNS: tl.constexpr, IGNORED: tl.constexpr, WEIGHTED: tl.constexpr,
    MARKED: tl.constexpr, MU: tl.constexpr, BINS: tl.constexpr, FLOOR_IS_EXACT: tl.constexpr,
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
    mu = _mu(mu_ptr, MU)
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
        if MARKED == 0 or tl.load(marks_ptr + before + tile) == MARKED - 1:
            loss, gradient = _weigh_tile(
                x, y_ptr, w_ptr, mu, weights_ptr, factor, start, i, i < TILE, KIND, COLUMNS,
                IGNORED, WEIGHTED, False, BINS, FLOOR_IS_EXACT,
            )  # fmt: skip
            if LOSS:
                total += loss
            if GRADIENT:
                tl.store(out_ptr + start + i, gradient.to(out_ptr.dtype.element_ty))
        tile += 1
    if (begin <= full) & (full < begin + ITERATIONS) & (full.to(tl.int64) * TILE < size):
        if MARKED == 0 or tl.load(marks_ptr + before + full) == MARKED - 1:
            start = full.to(tl.int64) * TILE
            inside = i < size - start
            x = tl.load(x_ptr + start + i, mask=inside, other=0.0)
            loss, gradient = _weigh_tile(
                x, y_ptr, w_ptr, mu, weights_ptr, factor, start, i, inside, KIND, COLUMNS,
                IGNORED, WEIGHTED, True, BINS, FLOOR_IS_EXACT,
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
    bits |= tl.where(tl.abs(loss) < float("inf"), 0, _NOT_FINITE)
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
