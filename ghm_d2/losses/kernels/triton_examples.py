"""Norm, loss and slope of one tile of examples, and its unit regions: what the kernels compute."""

import triton
import triton.language as tl

# What a tile's targets are.
NEGATIVE = tl.constexpr(0)  # none: every logit is a negative
CLASS = tl.constexpr(1)  # an integer label for each row
SOFT = tl.constexpr(2)  # a target in [0, 1] for each logit
DELTA = tl.constexpr(3)  # box deltas
# The bits of what was refused.
_BAD_LABEL, _BAD_WEIGHT, NOT_FINITE = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)
_BAD_TARGET = tl.constexpr(8)
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _decay(x):
    """exp(-|x|)."""
    if _INTERPRETED:
        return tl.exp(-tl.abs(x))
    else:  # tl.exp also handles denormal numbers and tl.abs costs an extra instruction
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
    # e = exp(-|x|) in [0, 1]: a polynomial for log(1 + e) / e, with a relative error of 4e-7
    # in float32, even where e is so small that 1 + e rounds to 1.
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
def unit_region(norm, BINS: tl.constexpr, FLOOR_IS_EXACT: tl.constexpr):
    """The unit region of each norm, by the same float32 edges j / M as everywhere."""
    if FLOOR_IS_EXACT:
        region = (norm * BINS).to(tl.int32)
    else:
        # The nearest edge, and the region on the norm's side of it.
        region = (norm * BINS + 0.5).to(tl.int32)
        number = region.to(tl.float32)
        if _INTERPRETED:
            edge = number / BINS
        else:  # rounded as a division would, without its subroutine
            quotient = number * (1.0 / BINS)
            edge = tl.fma(tl.fma(quotient, -1.0 * BINS, number), 1.0 / BINS, quotient)
        region -= (norm < edge).to(tl.int32)
    # Unsigned, so that whatever a NaN becomes is a region too.
    return tl.minimum(region.to(tl.uint32, bitcast=True), BINS - 1).to(tl.int32)


@triton.jit
def width_of_delta(mu_ptr, MU: tl.constexpr):
    """The width of the quadratic part of deltas: MU, or where MU is None what the device holds."""
    if MU is None:
        return tl.load(mu_ptr)
    else:
        return MU


@triton.jit
def tile_examples(
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
