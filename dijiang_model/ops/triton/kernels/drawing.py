"""Drawing one token from each row of logits, without sorting; the twins are `ops.torch.drawing`, `reference.drawing`.

The bits of floats that are not negative are ordered like the floats, and with the lower bits of negative ones flipped
that holds for all, as signed integers. So the k-th largest logit, and the lightest of the fewest weights that reach a
share of all, are found by cutting a range of integers into quarters, each time with one pass over the row: how many
logits, or what mass of weights, is not below each of three bounds. Two bits a pass, and no more of them as soon as
nothing is left to be decided; at most 16. Masses are fp64. All sums go through the row in the same order every time.
"""

import triton
import triton.language as tl

FIELDS = ("uniforms", "temperatures", "min_p", "top_k", "top_p")
"""Arguments that are views into a step's one copy; see `parts.INDICES`."""
FLAGS = ("has_min_p", "has_top_k", "has_top_p", "is_checked")


@triton.jit
def places_at(start, LINES: tl.constexpr, LANES: tl.constexpr):
    """[LINES, LANES] int32: places in the row from `start` on, in order; a sum over lines stays within a thread."""
    return start + tl.arange(0, LINES)[:, None] * LANES + tl.arange(0, LANES)[None, :]


@triton.jit
def key_of(x):
    """int32, ordered like the fp32 numbers; both zeros have the same."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def weights_at(row, at, size, most, temperature, min_p, least):
    """exp((x - most) / T) at these places; 0 behind the row, below `min_p`, and where the logit's key is below `least`.

    The same bits in whichever shape `at` is.
    """
    x = tl.load(row + at, mask=at < size, other=float("-inf"))
    weight = tl.exp((x - most) / temperature)
    return tl.where((weight >= min_p) & (key_of(x) >= least), weight, 0.0)


@triton.jit
def survey(row, size, LINES: tl.constexpr, LANES: tl.constexpr):
    """The largest logit, where the first such is, and the oddest number: 0 all are finite, 1 infinite, 2 NaN."""
    most = tl.full((LINES, LANES), float("-inf"), tl.float32)
    place = places_at(0, LINES, LANES)
    oddest = tl.zeros((LINES, LANES), tl.int32)
    for start in range(0, size, LINES * LANES):
        at = places_at(start, LINES, LANES)
        x = tl.load(row + at, mask=at < size, other=0.0)
        oddest = tl.maximum(oddest, tl.where(x != x, 2, tl.where(tl.abs(x) == float("inf"), 1, 0)))
        is_more = (x > most) & (at < size)
        most = tl.where(is_more, x, most)
        place = tl.where(is_more, at, place)
    largest = tl.max(most)
    return largest, tl.min(tl.where(most == largest, place, size)), tl.max(oddest)


@triton.jit
def quartered(low, high, in_first, in_second, in_third):
    """The quarter of low .. high that is left, by whether enough is not below its bounds: how many are, low, high."""
    step = (high - low + 3) >> 2
    num_reached = in_first.to(tl.int64) + in_second.to(tl.int64) + in_third.to(tl.int64)
    low = low + num_reached * step
    return num_reached, low, tl.minimum(high, low + step)


@triton.jit
def one_of(number, none, first, second, third):
    """none, first, second or third, by a number from 0 to 3."""
    return tl.where(number == 0, none, tl.where(number == 1, first, tl.where(number == 2, second, third)))


@triton.jit
def least_of_top_k(row, size, k, most, LINES: tl.constexpr, LANES: tl.constexpr):
    """A key that the k largest logits and equals of the last have or exceed, and no other does; 1 <= k < size.

    In every pass at least k keys are not below `low`, and fewer than k not below `high`.
    """
    low = tl.full((), -0x7F800001, tl.int64)  # of -inf
    high = key_of(most).to(tl.int64) + 1
    count = size.to(tl.int64)
    while (high - low > 1) & (count != k):
        step = (high - low + 3) >> 2
        bound = low.to(tl.int32)
        stride = step.to(tl.int32)
        first = tl.zeros((LANES,), tl.int32)
        second, third = first, first
        for start in range(0, size, LINES * LANES):
            at = places_at(start, LINES, LANES)
            key = key_of(tl.load(row + at, mask=at < size, other=float("-inf")))
            first += tl.sum((key >= bound + stride).to(tl.int32), 0)
            second += tl.sum((key >= bound + 2 * stride).to(tl.int32), 0)
            third += tl.sum((key >= bound + 3 * stride).to(tl.int32), 0)
        a, b, c = tl.sum(first).to(tl.int64), tl.sum(second).to(tl.int64), tl.sum(third).to(tl.int64)
        number, low, high = quartered(low, high, a >= k, b >= k, c >= k)
        count = one_of(number, count, a, b, c)
    return low.to(tl.int32)


@triton.jit
def mass_of(row, size, most, temperature, min_p, least, LINES: tl.constexpr, LANES: tl.constexpr):
    """The sum of all weights, fp64."""
    mass = tl.zeros((LANES,), tl.float64)
    for start in range(0, size, LINES * LANES):
        at = places_at(start, LINES, LANES)
        mass += tl.sum(weights_at(row, at, size, most, temperature, min_p, least).to(tl.float64), 0)
    return tl.sum(mass)


@triton.jit
def lightest_of_top_p(
    row, size, share, total, most, temperature, min_p, least, LINES: tl.constexpr, LANES: tl.constexpr
):
    """The bits of a weight that the fewest heaviest which reach `share` of `total`, and equals of the last, have or
    exceed, and no other does; and their mass.

    In every pass the weights that are not below `low` reach the share, and those not below `high` do not. Less than one
    and a half times the weight of `low` between the two is a single token.
    """
    wanted = share * total
    low = tl.zeros((), tl.int64)
    high = tl.full((), 0x3F800001, tl.int64)  # above the weight of the most likely, 1
    mass, above = total, total - total
    while (high - low > 1) & (mass - above >= 1.5 * low.to(tl.int32).to(tl.float32, bitcast=True).to(tl.float64)):
        step = (high - low + 3) >> 2
        bound = low.to(tl.int32)
        stride = step.to(tl.int32)
        first = tl.zeros((LANES,), tl.float64)
        second, third = first, first
        for start in range(0, size, LINES * LANES):
            weight = weights_at(row, places_at(start, LINES, LANES), size, most, temperature, min_p, least)
            bits, wide = weight.to(tl.int32, bitcast=True), weight.to(tl.float64)
            first += tl.sum(tl.where(bits >= bound + stride, wide, 0.0), 0)
            second += tl.sum(tl.where(bits >= bound + 2 * stride, wide, 0.0), 0)
            third += tl.sum(tl.where(bits >= bound + 3 * stride, wide, 0.0), 0)
        a, b, c = tl.sum(first), tl.sum(second), tl.sum(third)
        number, low, high = quartered(low, high, a >= wanted, b >= wanted, c >= wanted)
        above = one_of(number, a, b, c, above)
        mass = one_of(number, mass, a, b, c)
    return low.to(tl.int32), mass


@triton.jit
def kept_at(row, at, size, most, temperature, min_p, least, lightest):
    """Weights at these places that all filters leave, fp64."""
    weight = weights_at(row, at, size, most, temperature, min_p, least)
    return tl.where(weight.to(tl.int32, bitcast=True) >= lightest, weight, 0.0).to(tl.float64)


@triton.jit
def place_of(
    row, size, target, most, temperature, min_p, least, lightest, LINES: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """The first token whose weight and those before it are more than `target`; the last of any weight if none is.

    First the tile in which that happens, then the token in it. Sums within a tile may be rounded otherwise than its
    whole, and those of tiles otherwise than the target's.
    """
    start = size * 0
    tile = start
    mass = target * 0.0
    before = mass
    while (start < size) & (mass <= target):
        at = places_at(start, LINES, LANES)
        part = tl.sum(kept_at(row, at, size, most, temperature, min_p, least, lightest))
        tile = tl.where(part > 0.0, start, tile)
        before = tl.where(part > 0.0, mass, before)
        mass += part
        start += LINES * LANES
    at = tile + tl.arange(0, LINES * LANES)
    weight = kept_at(row, at, size, most, temperature, min_p, least, lightest)
    is_past = (before + tl.cumsum(weight, 0) > target) & (weight > 0.0)
    place = tl.min(tl.where(is_past, at, size), 0)
    last = tl.max(tl.where(weight > 0.0, at, -1), 0)
    place = tl.where(place < size, place, last)
    return tl.where(place < 0, size - 1, place)


@triton.jit(do_not_specialize=FLAGS, do_not_specialize_on_alignment=FIELDS)
def draw_kernel(
    logits, uniforms, temperatures, min_p, top_k, top_p, tokens, size,
    has_min_p, has_top_k, has_top_p, is_checked,
    LINES: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Grid (M,): a token for each row of logits [M, size], by the row's numbers [M]; see `ops.drawing.Draws`.

    Of what is off (`has_...` 0) nothing is read. Temperature 0: the first of the largest. Rows that have no weights,
    those with NaN say, get the last token; with `is_checked` all rows that are not finite get -1.
    """
    r = tl.program_id(0).to(tl.int64)
    row = logits + r * size
    most, place, oddest = survey(row, size, LINES, LANES)
    temperature = tl.load(temperatures + r).to(tl.float32)
    if (oddest == 2) | (tl.abs(most) == float("inf")):
        place = size - 1
    elif temperature > 0.0:
        floor, least, lightest = 0.0, -0x7F800001, 0
        if has_min_p != 0:
            floor = tl.load(min_p + r).to(tl.float32)
        if has_top_k != 0:
            k = tl.load(top_k + r)
            if k < size:
                least = least_of_top_k(row, size, k, most, LINES, LANES)
        mass = mass_of(row, size, most, temperature, floor, least, LINES, LANES)
        if has_top_p != 0:
            share = tl.load(top_p + r)
            if share <= 1.0:
                lightest, mass = lightest_of_top_p(
                    row, size, share, mass, most, temperature, floor, least, LINES, LANES
                )
        target = tl.load(uniforms + r) * mass
        place = place_of(row, size, target, most, temperature, floor, least, lightest, LINES, LANES)
    if (is_checked != 0) & (oddest > 0):
        place = -1
    tl.store(tokens + r, place.to(tl.int64))
