/* Counts a tensor of activations in one pass over its memory.
 *
 * Floats are compared as integers: with the lower 31 bits of a negative number flipped, the order of the bit patterns is
 * the order of the numbers, -0 lies right below +0, and NaN lies beyond the infinities. So minima, maxima and counts are
 * integer reductions, which every compiler vectorises, and a value that is not finite shows in the extremes. A rectifier
 * counts those too, and its output can be written in the same pass; other kinds leave the call to counting.py. Sums run in
 * LANES lanes of float over at most BLOCK values and go on in double, in an order that no compiler may change: the same
 * numbers come out on every machine.
 *
 * counting.py counts the same integers with torch alone where this is not built.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

#define INFINITE 0x7f800000 /* key of +inf; that of -inf is -INFINITE - 1 */
#define BLOCK 4096
#define LANES 16
#define GROUP 16          /* units whose rows are counted by turns */
#define SHORT 256         /* values of a row that is short, at most, */
#define SHORT_ROWS 32     /* and rows of a unit that are counted one after the other */
#define CHUNK 128         /* units of a tile that are fetched together */
#define TILE 256          /* rows of a tile at most, */
#define TILE_LEAST 64     /* and at least */
#define TILE_VALUES 65536 /* values on as many pages as a tile is to stand on */
#define ROW 4096
#define PARTS 2           /* parts of the samples that are counted by themselves */
#define MOST_SHARES 256
#define WORTH_SHARING (1 << 16) /* values; fewer are counted before another thread has woken up */

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#define KEEP_LOOP _Pragma("GCC unroll 1") /* so that it becomes one of vectors, and not of single values put together */
#define FETCH(address) __builtin_prefetch(address, 0, 2)
#else
#define FETCH(address)
#define INLINE static __forceinline
#define KEEP_LOOP
#endif

typedef Py_ssize_t Size;

/* torch's own pool of threads, as kernel.py finds it; a second pool would fight with it for the processors. */
typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned);
typedef int (*ThreadNumber)(void);
static Parallel parallel = NULL;
static ThreadNumber thread_number = NULL;

enum { RECTIFIER, INPUT, SQUASHED, OUTPUT, CLIPPED };

/* Whether the output follows from the input, counts included, and can be written; a CLIPPED one ends at `border_high`. */
#define RECTIFIES(kind) ((kind) == RECTIFIER || (kind) == CLIPPED)
#define HAS_FLAT(kind) ((kind) == INPUT || (kind) == SQUASHED || (kind) == CLIPPED)
#define HAS_SUMS(kind) ((kind) == OUTPUT || RECTIFIES(kind))

/* What one call counts, an entry per unit. */
typedef struct {
    int32_t *low, *high;                  /* extremes, as keys */
    int64_t *positive;                    /* x > 0 */
    int64_t *zeros;                       /* x == 0 */
    int64_t *flat;                        /* x <= border_low or x >= border_high; of a CLIPPED one the latter alone */
    int64_t *nonfinite, *nan;             /* of what RECTIFIES */
    double *sum, *abs_sum, *square_sum;   /* of x; of the output of what RECTIFIES */
    double *plain_sum, *plain_square_sum; /* of x, for units that are silent */
    const uint8_t *silent;                /* units that had not fired before; NULL to leave the plain sums out */
    const uint8_t *asked;                 /* units to count; what is told of others says nothing; NULL for all */
    uint8_t *on;                          /* (samples, units): 1 where any x is on, else 0; NULL to leave it out */
    int32_t *out; /* where what RECTIFIES writes its output, which may be its input; NULL to leave it out */
    int32_t border_low, border_high, border_on;
} Counts;

INLINE int32_t key_of(int32_t bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }

INLINE float float_of(int32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Bring LANES lanes down to one, halving them: an order that is the same everywhere. Written out, or compilers do it value
 * by value. */
#define HALVE(lanes, op, half)                                                                                         \
    KEEP_LOOP                                                                                                          \
    for (int lane = 0; lane < half; lane++) (lanes)[lane] = op((lanes)[lane], (lanes)[lane + half]);
#define FOLD(lanes, op) HALVE(lanes, op, 8) HALVE(lanes, op, 4) HALVE(lanes, op, 2) HALVE(lanes, op, 1)
#define OR(a, b) ((a) | (b))
#define ADD(a, b) ((a) + (b))
#define LESSER(a, b) ((b) < (a) ? (b) : (a))
#define GREATER(a, b) ((b) > (a) ? (b) : (a))

/* Counts of LANES values side by side: of one unit, or of as many units. */
typedef struct {
    int32_t low[LANES], high[LANES], positive[LANES], zeros[LANES], flat[LANES];
    float sum[LANES], abs_sum[LANES], square_sum[LANES];
} Lanes;

INLINE void clear(Lanes *lanes) {
    for (int lane = 0; lane < LANES; lane++) {
        lanes->low[lane] = INT32_MAX;
        lanes->high[lane] = INT32_MIN;
        lanes->positive[lane] = lanes->zeros[lane] = lanes->flat[lane] = 0;
        lanes->sum[lane] = lanes->abs_sum[lane] = lanes->square_sum[lane] = 0;
    }
}

/* Count a value if `counts` is 1; if it is 0, the value is one that was counted before. */
INLINE void see(Lanes *lanes, int lane, int32_t bits, int counts, const Counts *c, int kind) {
    const int32_t key = key_of(bits);
    lanes->low[lane] = LESSER(lanes->low[lane], key);
    lanes->high[lane] = GREATER(lanes->high[lane], key);
    if (kind != OUTPUT) lanes->positive[lane] += counts & (key > 0);
    if (kind == OUTPUT) lanes->zeros[lane] += counts & ((bits & 0x7fffffff) == 0);
    if (HAS_FLAT(kind)) lanes->flat[lane] += counts & ((kind != CLIPPED && key <= c->border_low) | (key >= c->border_high));
    if (HAS_SUMS(kind)) {
        const int32_t kept = kind == CLIPPED ? LESSER(bits, c->border_high) : bits;
        const float value = float_of((kind == OUTPUT ? kept : GREATER(kept, 0)) & -counts);
        lanes->sum[lane] += value;
        lanes->square_sum[lane] += value * value;
    }
    if (kind == OUTPUT) lanes->abs_sum[lane] += float_of(bits & 0x7fffffff & -counts);
}

/* Count `n` times LANES values, `step` apart. */
INLINE void see_all(Lanes *lanes, const int32_t *x, Size n, Size step, const Counts *c, int kind) {
    for (Size i = 0; i < n; i++, x += step)
        for (int lane = 0; lane < LANES; lane++) see(lanes, lane, x[lane], 1, c, kind);
}

/* Begin a part of what `lanes` count, whose extremes and flat values are asked for by themselves. */
INLINE void begin_part(Lanes *part, const Lanes *lanes, int kind) {
    for (int lane = 0; lane < LANES; lane++) part->low[lane] = INT32_MAX;
    for (int lane = 0; lane < LANES; lane++) part->high[lane] = INT32_MIN;
    if (HAS_FLAT(kind)) memset(part->flat, 0, sizeof part->flat);
    if (kind != OUTPUT) memcpy(part->positive, lanes->positive, sizeof part->positive);
    if (kind == OUTPUT) memcpy(part->zeros, lanes->zeros, sizeof part->zeros);
    if (kind == OUTPUT) memcpy(part->abs_sum, lanes->abs_sum, sizeof part->abs_sum);
    if (HAS_SUMS(kind)) memcpy(part->sum, lanes->sum, sizeof part->sum);
    if (HAS_SUMS(kind)) memcpy(part->square_sum, lanes->square_sum, sizeof part->square_sum);
}

INLINE void end_part(Lanes *lanes, const Lanes *part, int kind) {
    KEEP_LOOP
    for (int lane = 0; lane < LANES; lane++) lanes->low[lane] = LESSER(lanes->low[lane], part->low[lane]);
    KEEP_LOOP
    for (int lane = 0; lane < LANES; lane++) lanes->high[lane] = GREATER(lanes->high[lane], part->high[lane]);
    if (HAS_FLAT(kind)) {
        KEEP_LOOP
        for (int lane = 0; lane < LANES; lane++) lanes->flat[lane] += part->flat[lane];
    }
    if (kind != OUTPUT) memcpy(lanes->positive, part->positive, sizeof part->positive);
    if (kind == OUTPUT) memcpy(lanes->zeros, part->zeros, sizeof part->zeros);
    if (kind == OUTPUT) memcpy(lanes->abs_sum, part->abs_sum, sizeof part->abs_sum);
    if (HAS_SUMS(kind)) memcpy(lanes->sum, part->sum, sizeof part->sum);
    if (HAS_SUMS(kind)) memcpy(lanes->square_sum, part->square_sum, sizeof part->square_sum);
}

static int is_finite(double value) { return value - value == 0; }

/* Count `n` inputs of what RECTIFIES one by one, as some are not finite or have squares beyond a float. The first of them
 * stands in row `row` of all, and they are `step` values apart. */
static void count_carefully(const int32_t *x, Size n, Size step, Size row, Size positions, Size unit, Size units,
                            const Counts *c, int kind) {
    for (Size i = 0; i < n; i++) {
        const int32_t bits = x[i * step], key = key_of(bits), magnitude = bits & 0x7fffffff;
        const double value = float_of(bits), output = float_of(kind == CLIPPED ? LESSER(bits, c->border_high) : bits);
        c->nonfinite[unit] += magnitude >= INFINITE;
        if (c->silent && c->silent[unit]) {
            c->plain_sum[unit] += value;
            c->plain_square_sum[unit] += value * value;
        }
        if (magnitude > INFINITE) {
            c->nan[unit]++;
            continue;
        }
        c->low[unit] = LESSER(c->low[unit], key);
        c->high[unit] = GREATER(c->high[unit], key);
        c->positive[unit] += key > 0;
        if (c->on) c->on[(row + i) / positions * units + unit] |= key > c->border_on;
        if (kind == CLIPPED) c->flat[unit] += key >= c->border_high;
        if (key > 0 && is_finite(output)) {
            c->sum[unit] += output;
            c->square_sum[unit] += output * output;
        }
    }
}

/* Write max(x, 0), and no more than a border, as torch does: -0 and NaN stay as they are. */
INLINE void rectify(const int32_t *x, int32_t *out, Size n, const Counts *c, int kind) {
    for (Size i = 0; i < n; i++) { /* negative from just below 0 down to infinity */
        const int32_t kept = (uint32_t)x[i] - 0x80000001u < INFINITE ? 0 : x[i];
        out[i] = kind == CLIPPED && kept > c->border_high && kept <= INFINITE ? c->border_high : kept;
    }
}

/* Tell whether the plain sums of values are asked for: they are not where a unit is on among them, and so not silent. */
INLINE int is_to_be_summed(const Counts *c, Size unit, int is_on, int kind) {
    return c->silent && c->silent[unit] && (kind == SQUASHED || !is_on);
}

/* The sums of `n` values and of their squares. */
INLINE void add_plain(const int32_t *x, Size n, double *sum, double *square_sum) {
    double s[LANES] = {0}, q[LANES] = {0};
    Size i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int lane = 0; lane < LANES; lane++) {
            const double value = float_of(x[i + lane]);
            s[lane] += value;
            q[lane] += value * value;
        }
    for (; i < n; i++) {
        const double value = float_of(x[i]);
        s[0] += value;
        q[0] += value * value;
    }
    FOLD(s, ADD)
    FOLD(q, ADD)
    *sum += s[0];
    *square_sum += q[0];
}

/* Bring what was told of each lane down to one. */
INLINE int32_t either(const int32_t *told) {
    int32_t any[LANES];
    memcpy(any, told, sizeof any);
    FOLD(any, OR)
    return any[0];
}

INLINE int is_asked(const Counts *c, Size unit) { return c->asked == NULL || c->asked[unit]; }

INLINE int is_one_asked(const Counts *c, Size first, Size width) {
    int any = c->asked == NULL;
    for (Size i = 0; i < width && !any; i++) any = c->asked[first + i];
    return any;
}

/* What there is among the values of a piece. */
enum { IS_ON = 1, IS_BAD = 2 };

/* Count fewer than LANES values; `end` is the end of the memory. */
INLINE void see_rest(Lanes *lanes, const int32_t *rest, int left, const int32_t *end, const Counts *c, int kind) {
    int32_t copy[LANES];
    const int32_t fill = *rest;
    if (end - rest < LANES) { /* else what stands beyond is read and not used */
        memcpy(copy, rest, (size_t)left * sizeof *rest);
        rest = copy;
    }
    for (int lane = 0; lane < LANES; lane++) {
        const int32_t counts = lane < left;
        see(lanes, lane, (rest[lane] & -counts) | (fill & (counts - 1)), counts, c, kind);
    }
}

/* Up to BLOCK values of a unit, as a part of `lanes`; nothing is counted if one is not finite of what RECTIFIES, which
 * IS_BAD. `end` is the end of the memory. */
INLINE int count_piece(Lanes *lanes, const int32_t *x, Size n, const int32_t *end, const Counts *c, int kind) {
    const Size whole = n / LANES;
    const int32_t *rest = x + whole * LANES;
    const int left = (int)(n - whole * LANES);
    Lanes part;
    begin_part(&part, lanes, kind);
    see_all(&part, x, whole, LANES, c, kind);
    if (left > 0) see_rest(&part, rest, left, end, c, kind);
    int32_t told[LANES];
    KEEP_LOOP
    for (int lane = 0; lane < LANES; lane++) {
        const int32_t is_on = kind == SQUASHED ? part.flat[lane] < (int)whole + (lane < left) : part.high[lane] > c->border_on;
        const int32_t is_bad = (part.low[lane] <= -INFINITE - 1) | (part.high[lane] >= INFINITE);
        told[lane] = is_on * IS_ON | (RECTIFIES(kind) ? is_bad * IS_BAD : 0);
    }
    const int32_t any = either(told);
    if (!(any & IS_BAD)) end_part(lanes, &part, kind);
    return any;
}

/* Where the pieces are into which a row is cut. */
typedef struct {
    Size sample, start, n;
} Piece;

INLINE Piece piece_at(Size number, Size positions) {
    const Size per_row = (positions + BLOCK - 1) / BLOCK, start = number % per_row * BLOCK;
    const Piece piece = {number / per_row, start, positions - start < BLOCK ? positions - start : BLOCK};
    return piece;
}

/* Add what the pieces from `from` to before `to` of a unit were counted as. */
INLINE void add_pieces(Lanes *lanes, const int32_t *x, Size units, Size positions, Size unit, Size from, Size to,
                       const Counts *c, int kind) {
    FOLD(lanes->low, LESSER)
    FOLD(lanes->high, GREATER)
    c->low[unit] = LESSER(c->low[unit], lanes->low[0]);
    c->high[unit] = GREATER(c->high[unit], lanes->high[0]);
    if (kind == OUTPUT) {
        FOLD(lanes->zeros, ADD)
        FOLD(lanes->abs_sum, ADD)
        c->zeros[unit] += lanes->zeros[0];
        c->abs_sum[unit] += lanes->abs_sum[0];
    } else {
        FOLD(lanes->positive, ADD)
        c->positive[unit] += lanes->positive[0];
    }
    if (HAS_FLAT(kind)) {
        FOLD(lanes->flat, ADD)
        c->flat[unit] += lanes->flat[0];
    }
    if (HAS_SUMS(kind)) {
        FOLD(lanes->sum, ADD)
        FOLD(lanes->square_sum, ADD)
        double sum = lanes->sum[0], square_sum = lanes->square_sum[0];
        if (RECTIFIES(kind) && !is_finite(square_sum)) { /* squares beyond a float; positive values are still there */
            sum = square_sum = 0;
            for (Size number = from; number < to; number++) {
                const Piece piece = piece_at(number, positions);
                const int32_t *row = x + (piece.sample * units + unit) * positions + piece.start;
                for (Size i = 0; i < piece.n; i++) {
                    const double value = row[i] > 0 ? float_of(kind == CLIPPED ? LESSER(row[i], c->border_high) : row[i]) : 0;
                    sum += value;
                    square_sum += value * value;
                }
            }
        }
        c->sum[unit] += sum;
        c->square_sum[unit] += square_sum;
    }
    clear(lanes);
}

/* Values ordered (samples, units, positions); units from `first` to before `end`. A few units at a time, whose lanes go on
 * from sample to sample and are brought down to one when they have seen BLOCK values. */
INLINE void count_long_rows(const int32_t *x, Size samples, Size units, Size positions, Size first, Size end,
                            const Counts *c, int kind) {
    const int32_t *memory_end = x + samples * units * positions;
    const Size per_row = (positions + BLOCK - 1) / BLOCK;
    Lanes lanes[GROUP];
    Size from[GROUP]; /* the first piece that the lanes hold */
    for (Size left = first; left < end; left += GROUP) {
        const Size width = end - left < GROUP ? end - left : GROUP;
        for (Size i = 0; i < width; i++) {
            clear(&lanes[i]);
            from[i] = 0;
        }
        for (Size sample = 0, seen = 0; sample < samples; sample++) {
            const int is_full = seen > 0 && seen + positions > BLOCK;
            seen = is_full ? positions : seen + positions;
            for (Size i = 0; i < width; i++) {
                const Size unit = left + i, at = sample * units + unit;
                if (!is_asked(c, unit)) {
                    if (RECTIFIES(kind) && c->out)
                        rectify(x + at * positions, c->out + at * positions, positions, c, kind);
                    continue;
                }
                for (Size start = 0; start < positions; start += BLOCK) {
                    const Size n = positions - start < BLOCK ? positions - start : BLOCK;
                    const Size number = sample * per_row + start / BLOCK;
                    const int32_t *values = x + at * positions + start;
                    if (is_full || start > 0) {
                        add_pieces(&lanes[i], x, units, positions, unit, from[i], number, c, kind);
                        from[i] = number;
                    }
                    const int told = count_piece(&lanes[i], values, n, memory_end, c, kind);
                    if (told & IS_BAD) {
                        add_pieces(&lanes[i], x, units, positions, unit, from[i], number, c, kind);
                        from[i] = number + 1;
                        count_carefully(values, n, 1, sample * positions + start, positions, unit, units, c, kind);
                    } else {
                        if (c->on) c->on[at] |= told & IS_ON;
                        if (is_to_be_summed(c, unit, told & IS_ON, kind))
                            add_plain(values, n, &c->plain_sum[unit], &c->plain_square_sum[unit]);
                    }
                    if (RECTIFIES(kind) && c->out) rectify(values, c->out + at * positions + start, n, c, kind);
                }
            }
        }
        for (Size i = 0; i < width; i++)
            add_pieces(&lanes[i], x, units, positions, left + i, from[i], samples * per_row, c, kind);
    }
}

/* `height` rows of a unit, `step` values apart, the first of sample `top`; `end` is the end of the memory. */
INLINE void count_short(const int32_t *x, Size height, Size step, Size top, Size unit, Size units, Size positions,
                        const int32_t *end, const Counts *c, int kind) {
    const Size whole = positions / LANES;
    const int left = (int)(positions - whole * LANES);
    uint8_t on[SHORT_ROWS];
    Lanes lanes;
    clear(&lanes);
    for (Size s = 0; s < height; s++) {
        const int32_t *row = x + s * step;
        int32_t before[LANES], told[LANES];
        if (kind == SQUASHED) {
            memcpy(before, lanes.flat, sizeof before);
            memset(lanes.flat, 0, sizeof before);
        } else {
            memcpy(before, lanes.high, sizeof before);
            for (int lane = 0; lane < LANES; lane++) lanes.high[lane] = INT32_MIN;
        }
        see_all(&lanes, row, whole, LANES, c, kind);
        if (left > 0) see_rest(&lanes, row + whole * LANES, left, end, c, kind);
        if (kind == SQUASHED) {
            KEEP_LOOP
            for (int lane = 0; lane < LANES; lane++) told[lane] = lanes.flat[lane] < (int)whole + (lane < left);
            KEEP_LOOP
            for (int lane = 0; lane < LANES; lane++) lanes.flat[lane] += before[lane];
        } else {
            KEEP_LOOP
            for (int lane = 0; lane < LANES; lane++) told[lane] = lanes.high[lane] > c->border_on;
            KEEP_LOOP
            for (int lane = 0; lane < LANES; lane++) lanes.high[lane] = GREATER(lanes.high[lane], before[lane]);
        }
        on[s] = (uint8_t)either(told);
    }
    int32_t bad = 0;
    for (int lane = 0; lane < LANES && RECTIFIES(kind); lane++)
        bad |= (lanes.low[lane] <= -INFINITE - 1) | (lanes.high[lane] >= INFINITE);
    const int32_t *all = x - unit * positions;
    if (bad) {
        Counts here = *c;
        here.on = c->on ? c->on + top * units : NULL;
        here.out = NULL;
        count_long_rows(all, height, units, positions, unit, unit + 1, &here, kind);
        return;
    }
    add_pieces(&lanes, all, units, positions, unit, 0, height, c, kind);
    for (Size s = 0; s < height && c->on; s++) c->on[(top + s) * units + unit] = on[s];
    for (Size s = 0; s < height && c->silent; s++)
        if (is_to_be_summed(c, unit, on[s], kind))
            add_plain(x + s * step, positions, &c->plain_sum[unit], &c->plain_square_sum[unit]);
}

/* The same, where short rows of a unit are counted one after the other, a few samples at a time: to take up the lanes of a
 * unit and lay them down again costs more than the values of such a row. */
INLINE void count_rows(const int32_t *x, Size samples, Size units, Size positions, Size first, Size end, const Counts *c,
                       int kind) {
    if (positions > SHORT) {
        count_long_rows(x, samples, units, positions, first, end, c, kind);
        return;
    }
    const int32_t *memory_end = x + samples * units * positions;
    const Size fit = BLOCK / (positions > 0 ? positions : 1), tall = fit < SHORT_ROWS ? fit : SHORT_ROWS;
    for (Size top = 0; top < samples; top += tall) {
        const Size height = samples - top < tall ? samples - top : tall;
        for (Size left = first; left < end; left += GROUP) {
            const Size width = end - left < GROUP ? end - left : GROUP, at = (top * units + left) * positions;
            for (Size i = 0; i < width; i++)
                if (is_asked(c, left + i))
                    count_short(x + at + i * positions, height, units * positions, top, left + i, units, positions, memory_end,
                                c, kind);
            for (Size s = 0; s < height && RECTIFIES(kind) && c->out; s++) /* they are still in the cache */
                rectify(x + at + s * units * positions, c->out + at + s * units * positions, width * positions, c, kind);
        }
    }
}

/* Add lanes of units from `first` on to their counts. */
INLINE void add_units(const Lanes *lanes, Size first, int width, const Counts *c, int kind) {
    for (int i = 0; i < width; i++) c->low[first + i] = LESSER(c->low[first + i], lanes->low[i]);
    for (int i = 0; i < width; i++) c->high[first + i] = GREATER(c->high[first + i], lanes->high[i]);
    if (kind == OUTPUT) {
        for (int i = 0; i < width; i++) c->zeros[first + i] += lanes->zeros[i];
        for (int i = 0; i < width; i++) c->abs_sum[first + i] += lanes->abs_sum[i];
    } else {
        for (int i = 0; i < width; i++) c->positive[first + i] += lanes->positive[i];
    }
    if (HAS_FLAT(kind)) {
        for (int i = 0; i < width; i++) c->flat[first + i] += lanes->flat[i];
    }
    if (HAS_SUMS(kind)) {
        for (int i = 0; i < width; i++) c->sum[first + i] += lanes->sum[i];
        for (int i = 0; i < width; i++) c->square_sum[first + i] += lanes->square_sum[i];
    }
}

/* Count a tile of what RECTIFIES unit by unit, as in some the values are not finite or their squares beyond a float. */
static void add_one_by_one(const Lanes *lanes, const int32_t *x, Size top, Size height, Size first, int width, Size units,
                           Size positions, const Counts *c, int kind) {
    for (int i = 0; i < width; i++) {
        const Size unit = first + i;
        const int is_silent = c->silent && c->silent[unit];
        if (is_silent || lanes->low[i] <= -INFINITE - 1 || lanes->high[i] >= INFINITE || !is_finite(lanes->square_sum[i])) {
            count_carefully(x + i, height, units, top, positions, unit, units, c, kind);
            continue;
        }
        c->low[unit] = LESSER(c->low[unit], lanes->low[i]);
        c->high[unit] = GREATER(c->high[unit], lanes->high[i]);
        c->positive[unit] += lanes->positive[i];
        if (HAS_FLAT(kind)) c->flat[unit] += lanes->flat[i];
        c->sum[unit] += lanes->sum[i];
        c->square_sum[unit] += lanes->square_sum[i];
    }
}

/* `height` rows from row `top` on, of `width` units from unit `first` on, a lane for each. */
INLINE void count_tile(const int32_t *x, Size top, Size height, Size first, int width, Size units, Size positions,
                       const Counts *c, int kind) {
    int32_t packed[TILE * LANES];
    const int32_t *from = x;
    Size step = units;
    if (width < LANES) {
        for (Size r = 0; r < height; r++)
            for (int lane = 0; lane < LANES; lane++) packed[r * LANES + lane] = x[r * units + (lane < width ? lane : 0)];
        from = packed;
        step = LANES;
    }
    Lanes lanes;
    clear(&lanes);
    if (positions == 1 || c->on == NULL)
        see_all(&lanes, from, height, step, c, kind);
    else
        for (Size r = 0, stop; r < height; r = stop) { /* the rows of one sample */
            const Size sample = (top + r) / positions, next = (sample + 1) * positions - top;
            stop = next < height ? next : height;
            Lanes part;
            begin_part(&part, &lanes, kind);
            see_all(&part, from + r * step, stop - r, step, c, kind);
            uint8_t *on = c->on + sample * units + first;
            for (int i = 0; i < width; i++)
                on[i] |= kind == SQUASHED ? part.flat[i] < stop - r : (part.high[i] > c->border_on) & (part.high[i] <= INFINITE);
            end_part(&lanes, &part, kind);
        }
    int any_bad = 0, any_silent = 0;
    for (int lane = 0; lane < LANES && RECTIFIES(kind); lane++)
        any_bad |= (lanes.low[lane] <= -INFINITE - 1) | (lanes.high[lane] >= INFINITE) | !is_finite(lanes.square_sum[lane]);
    for (int i = 0; i < width; i++) any_silent |= is_to_be_summed(c, first + i, lanes.high[i] > c->border_on, kind);
    if (any_bad) {
        add_one_by_one(&lanes, x, top, height, first, width, units, positions, c, kind);
        return;
    }
    if (width == LANES)
        add_units(&lanes, first, LANES, c, kind);
    else
        add_units(&lanes, first, width, c, kind);
    if (any_silent) {
        double s[LANES] = {0}, q[LANES] = {0};
        for (Size r = 0; r < height; r++)
            for (int lane = 0; lane < LANES; lane++) {
                const double value = float_of(from[r * step + lane]);
                s[lane] += value;
                q[lane] += value * value;
            }
        for (int i = 0; i < width; i++) {
            c->plain_sum[first + i] += c->silent[first + i] ? s[i] : 0;
            c->plain_square_sum[first + i] += c->silent[first + i] ? q[i] : 0;
        }
    }
}

/* Values ordered (samples, positions, units): a tile of LANES units at a time, whose rows stand on few enough pages for
 * the processor to remember where they are. It cannot guess which comes next down the rows, so CHUNK units are asked for
 * ahead; what is done value by value is done to them, in the cache by then. */
INLINE void count_columns(const int32_t *x, Size samples, Size units, Size positions, Size first, Size end,
                          const Counts *c, int kind) {
    const Size rows = samples * positions, fit = TILE_VALUES / units;
    const Size tile = fit < TILE_LEAST ? TILE_LEAST : fit < TILE ? fit : TILE;
    for (Size top = 0; top < rows; top += tile)
        for (Size left = first; left < end; left += CHUNK) {
            const Size height = rows - top < tile ? rows - top : tile, width = end - left < CHUNK ? end - left : CHUNK;
            const Size at = top * units + left;
            for (Size r = 0; r < height; r++)
                for (Size i = 0; i < width; i += LANES) FETCH(x + at + r * units + i);
            for (Size i = 0; i < width; i += LANES) {
                const int beside = width - i < LANES ? (int)(width - i) : LANES;
                if (is_one_asked(c, left + i, beside))
                    count_tile(x + at + i, top, height, left + i, beside, units, positions, c, kind);
            }
            for (Size r = 0; r < height && positions == 1 && c->on; r++) {
                const int32_t *row = x + at + r * units;
                uint8_t *on = c->on + at + r * units;
                for (Size i = 0; i < width; i++) {
                    const int32_t key = key_of(row[i]);
                    on[i] |= kind == SQUASHED ? (key > c->border_low) & (key < c->border_high)
                                              : (key > c->border_on) & (key <= INFINITE);
                }
            }
            for (Size r = 0; r < height && RECTIFIES(kind) && c->out; r++)
                rectify(x + at + r * units, c->out + at + r * units, width, c, kind);
        }
}

/* One function per kind and order, and per set of vector instructions. */
#define DEFINE(kind, name)                                                                                             \
    CLONES static void name##_rows(const int32_t *x, Size s, Size u, Size p, Size from, Size to, const Counts *c) {    \
        count_rows(x, s, u, p, from, to, c, kind);                                                                     \
    }                                                                                                                  \
    CLONES static void name##_columns(const int32_t *x, Size s, Size u, Size p, Size from, Size to, const Counts *c) { \
        count_columns(x, s, u, p, from, to, c, kind);                                                                  \
    }
DEFINE(RECTIFIER, rectifier)
DEFINE(INPUT, input)
DEFINE(SQUASHED, squashed)
DEFINE(OUTPUT, output)
DEFINE(CLIPPED, clipped)

typedef void (*Kernel)(const int32_t *, Size, Size, Size, Size, Size, const Counts *);
static const Kernel KERNELS[5][2] = {{rectifier_rows, rectifier_columns},
                                     {input_rows, input_columns},
                                     {squashed_rows, squashed_columns},
                                     {output_rows, output_columns},
                                     {clipped_rows, clipped_columns}};

/* A run of samples, whose counts are its own: no sum depends on the number of threads. */
typedef struct {
    const int32_t *x;
    Size samples;
    Counts c;
} Part;

/* What the threads of one call share: parts of the samples, each cut into shares of units. */
typedef struct {
    Kernel kernel;
    Part parts[PARTS];
    int n_parts, n_shares; /* shares of each part */
    int is_large;          /* enough for another thread to wake up */
    Size units, positions, share;
    uint8_t taken[MOST_SHARES];
} Work;

static void count_share(const Work *w, int number) {
    const Part *part = &w->parts[number / w->n_shares];
    const Size first = number % w->n_shares * w->share, end = w->units - first < w->share ? w->units : first + w->share;
    w->kernel(part->x, part->samples, w->units, w->positions, first, end, &part->c);
}

/* Take shares until none is left, as there may be fewer threads than were asked for; first the one of the memory that a
 * thread of torch's operators works on, which is in its processor's cache. */
static void count_shares(void *shared) {
    Work *w = shared;
#if defined(__GNUC__)
    const int all = w->n_parts * w->n_shares, own = thread_number == NULL ? 0 : thread_number();
    for (int i = 0; i < all; i++) {
        const int number = (own + i) % all;
        if (!__atomic_exchange_n(&w->taken[number], 1, __ATOMIC_RELAXED)) count_share(w, number);
    }
#else
    for (int number = 0; number < w->n_parts * w->n_shares; number++) count_share(w, number);
#endif
}

/* Share out the units of each part, in steps of a cache line of floats. */
static void count_all(Work *w, int threads) {
    if (parallel == NULL || !w->is_large) threads = 1;
    if (threads > MOST_SHARES / PARTS) threads = MOST_SHARES / PARTS;
    const int apart = threads / w->n_parts > 1 ? threads / w->n_parts : 1;
    const Size even = (w->units + apart - 1) / apart, share = (even + LANES - 1) / LANES * LANES;
    w->share = share > 0 ? share : LANES;
    w->n_shares = (int)((w->units + w->share - 1) / w->share);
    if (threads > 1 && w->n_parts * w->n_shares > 1)
        parallel(count_shares, w, (unsigned)threads, 0);
    else
        count_shares(w);
}

/* Totals of a site, in the order in which kernel.py gives their addresses. */
typedef struct {
    double *input_low, *input_high, *output_low, *output_high;
    int64_t *positive, *zeros, *flat, *nonfinite;
    double *sum, *abs_sum, *square_sum, *plain_sum, *plain_square_sum; /* of the running batch */
} Totals;
#define N_TOTALS 13

INLINE void extend(double *low, double *high, double from, double to) {
    if (from < *low) *low = from;
    if (to > *high) *high = to;
}

/* Add what a call counted to the totals, `n` values a unit. */
static void add(const Counts *c, const Totals *t, Size units, int64_t n, int kind) {
    for (Size u = 0; u < units; u++) {
        const int is_seen = c->low[u] <= c->high[u]; /* or every value was NaN */
        const double low = float_of(key_of(c->low[u])), high = float_of(key_of(c->high[u]));
        if (kind == OUTPUT) {
            if (is_seen) extend(&t->output_low[u], &t->output_high[u], low, high);
            t->zeros[u] += c->zeros[u];
        } else {
            if (is_seen) extend(&t->input_low[u], &t->input_high[u], low, high);
            t->positive[u] += c->positive[u];
            t->flat[u] += RECTIFIES(kind) ? n - c->positive[u] - c->nan[u] + c->flat[u] : c->flat[u];
        }
        if (RECTIFIES(kind)) { /* the output is 0 exactly where the input is not above 0 */
            const double top = kind == CLIPPED ? float_of(c->border_high) : high;
            if (is_seen) extend(&t->output_low[u], &t->output_high[u], low > top ? top : low > 0 ? low : 0,
                                high > top ? top : high > 0 ? high : 0);
            t->zeros[u] += n - c->positive[u] - c->nan[u];
            t->nonfinite[u] += c->nonfinite[u];
            t->abs_sum[u] += c->sum[u];
        }
        if (kind == OUTPUT) t->abs_sum[u] += c->abs_sum[u];
        t->sum[u] += c->sum[u];
        t->square_sum[u] += c->square_sum[u];
        t->plain_sum[u] += c->plain_sum[u];
        t->plain_square_sum[u] += c->plain_square_sum[u];
    }
}

static int32_t key_of_float(float value) {
    int32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return key_of(bits);
}

static const char COUNT_DOC[] =
    "count(kind, units_last, data, samples, units, positions, totals, silent, asked, on, border_low, border_high,\n"
    "      border_on, threads, out)\n"
    "--\n\n"
    "Count float32 values at the address `data` and add to `totals`, a tuple of addresses; 0 leaves `silent`, `on`\n"
    "or `out` out and asks all. What is told of a unit that is not asked says nothing. A rectifier, clipped or not, also\n"
    "writes its output to the address `out`, which may be `data`.\n"
    "Return False, with nothing added, where a value or its square is not finite and the kind is no rectifier.";

static PyObject *count(PyObject *self, PyObject *args) {
    int kind, units_last, threads;
    unsigned long long data, silent, asked, on, out, t[N_TOTALS];
    Size samples, units, positions;
    float border_low, border_high, border_on;
    if (!PyArg_ParseTuple(args, "ipKnnn(KKKKKKKKKKKKK)KKKfffiK", &kind, &units_last, &data, &samples, &units, &positions,
                          &t[0], &t[1], &t[2], &t[3], &t[4], &t[5], &t[6], &t[7], &t[8], &t[9], &t[10], &t[11],
                          &t[12], &silent, &asked, &on, &border_low, &border_high, &border_on, &threads, &out))
        return NULL;
    if (kind < RECTIFIER || kind > CLIPPED || threads < 1 || samples < 0 || units < 0 || positions < 0) {
        PyErr_SetString(PyExc_ValueError, "no such kind of count, a negative size, or no thread");
        return NULL;
    }
    const size_t n = (size_t)units;
    Work w = {.kernel = KERNELS[kind][units_last != 0], .units = units, .positions = positions, .n_parts = 1};
    w.is_large = samples * units * positions >= WORTH_SHARING;
    if (w.is_large && samples >= PARTS) w.n_parts = PARTS;
    const size_t size = 5 * sizeof(int64_t) + 5 * sizeof(double) + 2 * sizeof(int32_t);
    char *memory = calloc((size_t)w.n_parts * n + 1, size);
    if (memory == NULL) return PyErr_NoMemory();
    for (int i = 0; i < w.n_parts; i++) {
        const Size first = samples * i / w.n_parts, at = first * units * positions;
        int64_t *ints = (int64_t *)(memory + (size_t)i * n * size);
        double *reals = (double *)(ints + 5 * n);
        int32_t *keys = (int32_t *)(reals + 5 * n);
        const Counts c = {
            .low = keys, .high = keys + n,
            .positive = ints, .zeros = ints + n, .flat = ints + 2 * n, .nonfinite = ints + 3 * n, .nan = ints + 4 * n,
            .sum = reals, .abs_sum = reals + n, .square_sum = reals + 2 * n,
            .plain_sum = reals + 3 * n, .plain_square_sum = reals + 4 * n,
            .silent = (const uint8_t *)(uintptr_t)silent, .asked = (const uint8_t *)(uintptr_t)asked,
            .on = on ? (uint8_t *)(uintptr_t)on + first * units : NULL,
            .out = out ? (int32_t *)(uintptr_t)out + at : NULL,
            .border_low = key_of_float(border_low), .border_high = key_of_float(border_high),
            .border_on = key_of_float(border_on)};
        w.parts[i] = (Part){(const int32_t *)(uintptr_t)data + at, samples * (i + 1) / w.n_parts - first, c};
    }
    Totals totals;
    void **address = (void **)&totals;
    for (int i = 0; i < N_TOTALS; i++) address[i] = (void *)(uintptr_t)t[i];
    int finite = 1;
    Py_BEGIN_ALLOW_THREADS
    if (on) memset((uint8_t *)(uintptr_t)on, 0, (size_t)samples * n);
    for (int i = 0; i < w.n_parts; i++)
        for (size_t u = 0; u < n; u++) {
            w.parts[i].c.low[u] = INT32_MAX;
            w.parts[i].c.high[u] = INT32_MIN;
        }
    count_all(&w, threads);
    for (int i = 0; i < w.n_parts && !RECTIFIES(kind); i++) {
        const Counts *c = &w.parts[i].c;
        for (size_t u = 0; u < n; u++)
            finite &= c->low[u] > -INFINITE - 1 && c->high[u] < INFINITE && is_finite(c->square_sum[u]) &&
                      is_finite(c->plain_square_sum[u]);
    }
    for (int i = 0; i < w.n_parts && finite; i++)
        add(&w.parts[i].c, &totals, units, (int64_t)w.parts[i].samples * positions, kind);
    Py_END_ALLOW_THREADS
    free(memory);
    return PyBool_FromLong(finite);
}

/* Add a batch to the samples fired, in units of one byte, and find the first sample in which each unit fired. */
CLONES static int fire_units(const uint8_t *on, Size samples, Size units, int64_t first_sample, int64_t *fired,
                             int64_t *first, uint8_t *unfired) {
    int left = 0;
    for (Size start = 0; start < units; start += ROW) {
        const Size width = units - start < ROW ? units - start : ROW;
        uint8_t *waiting = unfired + start;
        uint16_t times[ROW] = {0};
        int any = 0;
        for (Size u = 0; u < width; u++) any |= waiting[u];
        for (Size sample = 0; sample < samples; sample++) {
            const uint8_t *row = on + sample * units + start;
            for (Size u = 0; u < width; u++) times[u] += row[u];
            if (sample % 0xffff == 0xfffe || sample == samples - 1)
                for (Size u = 0; u < width; u++) {
                    fired[start + u] += times[u];
                    times[u] = 0;
                }
            if (!any) continue;
            uint8_t hit = 0;
            any = 0;
            for (Size u = 0; u < width; u++) hit |= waiting[u] & row[u];
            if (hit)
                for (Size u = 0; u < width; u++)
                    if (waiting[u] & row[u]) {
                        waiting[u] = 0;
                        first[start + u] = first_sample + sample;
                    }
            for (Size u = 0; u < width; u++) any |= waiting[u];
        }
        left |= any;
    }
    return left;
}

/* Add the sums of a batch to the totals, what rounding drops to the rest (Knuth's two-sum), and clear them. */
static void settle(double *batch, double *sums, double *rest, size_t n) {
    for (size_t i = 0; i < n; i++) {
        const double total = sums[i] + batch[i], back = total - sums[i];
        const double dropped = (sums[i] - (total - back)) + (batch[i] - back);
        if (is_finite(dropped)) rest[i] += dropped;
        sums[i] = total;
        batch[i] = 0;
    }
}

static const char SETTLE_DOC[] =
    "settle(batch, sums, rest, n)\n"
    "--\n\n"
    "Add `n` sums of a batch to the totals and what rounding drops to the rest, all at addresses; clear the batch.";

static PyObject *settle_sums(PyObject *self, PyObject *args) {
    unsigned long long batch, sums, rest;
    Size n;
    if (!PyArg_ParseTuple(args, "KKKn", &batch, &sums, &rest, &n)) return NULL;
    settle((double *)(uintptr_t)batch, (double *)(uintptr_t)sums, (double *)(uintptr_t)rest, (size_t)n);
    Py_RETURN_NONE;
}

static const char FIRE_DOC[] =
    "fire(on, samples, units, first_sample, fired, first_fired, unfired)\n"
    "--\n\n"
    "Add a batch, (samples, units) of 0 and 1 at the address `on`, to the samples fired and the first of them.\n"
    "Return whether there is a unit that has not fired yet.";

static PyObject *fire(PyObject *self, PyObject *args) {
    unsigned long long on_at, fired_at, first_at, unfired_at;
    Size samples, units;
    long long first_sample;
    if (!PyArg_ParseTuple(args, "KnnLKKK", &on_at, &samples, &units, &first_sample, &fired_at, &first_at, &unfired_at))
        return NULL;
    int left;
    Py_BEGIN_ALLOW_THREADS
    left = fire_units((const uint8_t *)(uintptr_t)on_at, samples, units, first_sample, (int64_t *)(uintptr_t)fired_at,
                      (int64_t *)(uintptr_t)first_at, (uint8_t *)(uintptr_t)unfired_at);
    Py_END_ALLOW_THREADS
    return PyBool_FromLong(left);
}

static const char USE_DOC[] =
    "use_threads(parallel, number)\n"
    "--\n\n"
    "Share large counts out to the threads of GOMP_parallel and omp_get_thread_num, which stand at these addresses.";

static PyObject *use_threads(PyObject *self, PyObject *args) {
    unsigned long long parallel_at, number_at;
    if (!PyArg_ParseTuple(args, "KK", &parallel_at, &number_at)) return NULL;
    parallel = (Parallel)(uintptr_t)parallel_at;
    thread_number = (ThreadNumber)(uintptr_t)number_at;
    Py_RETURN_NONE;
}

static PyMethodDef METHODS[] = {{"count", count, METH_VARARGS, COUNT_DOC},
                                {"fire", fire, METH_VARARGS, FIRE_DOC},
                                {"settle", settle_sums, METH_VARARGS, SETTLE_DOC},
                                {"use_threads", use_threads, METH_VARARGS, USE_DOC},
                                {NULL, NULL, 0, NULL}};
static struct PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, "_counting", "One pass over a tensor of activations.", 0,
                                    METHODS, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__counting(void) { return PyModule_Create(&MODULE); }
